// SPDX-License-Identifier: Apache-2.0
//
// The agent against a real API server: labels in, programs and annotations out.

import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { HAProxy } from '../e2e/haproxy.ts';
import { isDirect } from '../e2e/mesh.ts';
import { outsiderAddress } from '../e2e/topology.ts';
import { Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { Site } from './site.ts';

const MODE = 'istio.io/dataplane-mode';
const PORT = 8080;

describe.runIf(missingControlPlane() === undefined)('enrolment through kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let plane: ControlPlane;
  let count = 0;
  let site: Site;
  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
    await plane.createNamespace('istio-system');
  }, 3_000_000);
  afterAll(() => testbed.close());
  afterEach(async () => {
    await site?.agent?.stop();
    site?.close();
  });

  const start = async (labels: Record<string, string> = {}) => {
    count++;
    const namespace = `shop-${count}`;
    await plane.createNamespace(namespace, labels);
    site = await Site.start(plane, `node-${count}`);
    return namespace;
  };

  test('a label moves a running pod in, its removal moves it out', async () => {
    const namespace = await start();
    const ztunnel = await site.proxy(`ztunnel-${count}`, { entry: { enrollment: 'all' } });
    const haproxy = new HAProxy(site.topology.testbed, ztunnel.sandbox.netns, 'only');
    await haproxy.start();
    const web = await site.createPod({ namespace, name: 'web' });
    await site.topology.outsider.listen(PORT);
    const direct = async () => {
      const connection = await web.sandbox.endpoint.connect(outsiderAddress[4], PORT);
      await web.sandbox.endpoint.close(connection);
      return isDirect(connection);
    };
    site.startAgent();
    await until('the agent has looked', () => /watching/.test(site.agent?.output ?? ''));
    expect(await direct()).toBe(true);

    await plane.label(`/api/v1/namespaces/${namespace}`, { [MODE]: 'ambient' });
    await site.untilRedirection(web, 'enabled');
    expect(await direct()).toBe(false);

    await plane.label(site.path(web), { [MODE]: 'none' });
    await site.untilRedirection(web, undefined);
    expect(await direct()).toBe(true);
  });
});
