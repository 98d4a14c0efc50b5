// SPDX-License-Identifier: Apache-2.0
//
// The contract in-pod with the API: nothing is attached before a ztunnel is there, the annotation follows its Ack, and
// ADD asks the agent.

import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { HAProxy } from '../e2e/haproxy.ts';
import { isDirect } from '../e2e/mesh.ts';
import { executable, outsiderAddress } from '../e2e/topology.ts';
import { type Running, Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { NODE_PREFIX, Site, type SitePod } from './site.ts';

const MODE = 'istio.io/dataplane-mode';
const AMBIENT = { [MODE]: 'ambient' };

describe.runIf(missingControlPlane() === undefined)('contract in-pod with kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let plane: ControlPlane;
  let count = 0;
  let site: Site;
  let namespace: string;
  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
    await plane.createNamespace('istio-system');
  }, 3_000_000);
  afterAll(() => testbed.close());
  beforeEach(async () => {
    namespace = `shop-${++count}`;
    await plane.createNamespace(namespace, AMBIENT);
    const proxy = { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } };
    site = await Site.start(plane, `${NODE_PREFIX}${count}`, { entry: { proxy } });
    return () => site.close();
  });

  function ztunnel(misbehaviour?: object): Running {
    const { testbed: bed, node, runDir } = site.topology;
    const xds = join(runDir, '..', 'xds.yaml');
    writeFileSync(xds, '[]');
    const argv = [executable, 'stand-in-ztunnel', '--socket', site.zdsSocket, '--xds', xds, '--drain-ms', '0'];
    if (misbehaviour !== undefined) argv.push('--misbehaviour', JSON.stringify(misbehaviour));
    return bed.start(node.argv(argv));
  }
  const served = (process: Running): string[] => {
    const states = process.output
      .split('\n')
      .filter((line) => line.startsWith('{"event":"state"') && line.endsWith('}'));
    return (JSON.parse(states.at(-1) ?? '{"served":[]}') as { served: string[] }).served;
  };
  const row = async (pod: SitePod) => {
    const found = await site.attachment(pod);
    return found && `${found.role} ${found.state}`;
  };
  const failing = () => site.metric('ambient_redirect_queue_failing');

  test('a running pod waits for a ztunnel; then Ack, then the annotation', async () => {
    const web = await site.createPod({ namespace, name: 'web', serviceAccount: 'web' });
    site.startAgent();
    await until(
      'it waits',
      () =>
        failing().then(
          (pods) => pods === 1,
          () => false,
        ),
      20_000,
    );
    expect([await row(web), await site.redirection(web)]).toEqual(['none recorded', undefined]);
    const proxy = ztunnel();
    await site.untilRedirection(web, 'enabled');
    expect([await row(web), served(proxy)]).toEqual(['pod attached', [web.uid]]);
    await site.untilReady();

    await plane.label(site.path(web), { [MODE]: 'none' });
    await site.untilRedirection(web, undefined);
    await until('ztunnel has let go of it', () => served(proxy).length === 0, 10_000);
    expect(await row(web)).toBe('none recorded');
  });

  test('a pod that lost its programs is closed before a ztunnel is there, and open to nobody until then', async () => {
    await site.topology.outsider.listen(8080);
    const web = await site.createPod({ namespace, name: 'web', serviceAccount: 'web' });
    site.startAgent();
    const proxy = ztunnel();
    await site.untilRedirection(web, 'enabled');
    await site.process(web);
    await site.agent?.stop('SIGKILL');
    await proxy.stop('SIGKILL');
    rmSync(site.topology.stateDir, { recursive: true });
    const connect = (timeout: number) => web.sandbox.endpoint.connect(outsiderAddress[6], 8080, { timeout });
    await web.sandbox.endpoint.close(await connect(5_000));
    site.startAgent();
    await site.untilRedirection(web, 'pending', 20_000);
    const rows = async () => (await site.attachments()).map(({ uid, role, state }) => `${uid} ${role} ${state}`);
    expect(await rows()).toEqual([`${web.uid} pod attached`]);
    await expect(connect(600)).rejects.toThrow();
    const next = ztunnel();
    await site.untilRedirection(web, 'enabled', 20_000);
    expect(served(next)).toEqual([web.uid]);
  });

  test('a ztunnel that refuses the pod: "pending", and an event', async () => {
    const web = await site.createPod({ namespace, name: 'web', serviceAccount: 'web' });
    site.startAgent();
    const refusing = ztunnel({ nack: 'no room' });
    await site.untilRedirection(web, 'pending', 20_000);
    const events = async () =>
      (await plane.admin.list(`/api/v1/namespaces/${namespace}/events`)).items.map(({ message }) => message);
    await until('there is an event', async () => (await events()).length > 0, 20_000);
    expect((await events())[0]).toMatch(/no room/);
    // The next one takes it.
    await refusing.stop('SIGKILL');
    const proxy = ztunnel();
    await site.untilRedirection(web, 'enabled', 20_000);
    expect(served(proxy)).toEqual([web.uid]);
  });

  test('from shared to in-pod without a restart of the pod; connections of the old proxy go on', async () => {
    const shared = { proxy: { contract: 'shared', match: { namespace: 'istio-system', name: 'ztunnel-*' } } };
    const old = await site.proxy(`ztunnel-${count}`, { entry: shared });
    await new HAProxy(site.topology.testbed, old.sandbox.netns, 'only').start();
    await site.topology.outsider.listen(8080);
    const web = await site.createPod({ namespace, name: 'web', serviceAccount: 'web' });
    site.startAgent({ entry: shared });
    await site.untilRedirection(web, 'enabled');
    const { endpoint } = web.sandbox;
    const held = await endpoint.connect(outsiderAddress[4], 8080);
    expect(isDirect(held)).toBe(false);
    await site.agent?.stop();

    site.startAgent();
    const proxy = ztunnel();
    await site.untilRedirection(web, undefined);
    await endpoint.exchange(held, 100_000);
    expect(await site.attachment(web)).toMatchObject({ state: 'attached', contract: 'shared' });
    await endpoint.close(held);
    await site.untilRedirection(web, 'enabled', 20_000);
    expect(await site.attachment(web)).toMatchObject({ state: 'attached', contract: 'in-pod' });
    expect(served(proxy)).toEqual([web.uid]);
  });

  test('ADD asks the agent, with "enrollment": "agent"', async () => {
    site.startAgent();
    await site.untilReady();
    const proxy = ztunnel();
    await until('ztunnel is there', () => site.metric('ztunnel_connected').then((value) => value === 1), 10_000);
    const entry = { enrollment: 'agent' };
    const inside = await site.createPod({ namespace, name: 'inside', serviceAccount: 'inside' }, { entry });
    // From its ADD on, before the agent could have seen that it has an address.
    expect([await row(inside), served(proxy)]).toEqual(['pod attached', [inside.uid]]);
    const outside = await site.createPod({ namespace, name: 'outside', labels: { [MODE]: 'none' } }, { entry });
    expect(await row(outside)).toBe('none recorded');
    await site.untilRedirection(inside, 'enabled');
    expect(await site.redirection(outside)).toBeUndefined();
  });
});
