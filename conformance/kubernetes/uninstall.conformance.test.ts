// SPDX-License-Identifier: Apache-2.0
// `uninstall` on a node of a real API server, with the agent gone and with it running.
import { mkdtempSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { executable } from '../e2e/topology.ts';
import { type Outcome, Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { NODE_PREFIX, Site, type SitePod } from './site.ts';

describe.runIf(missingControlPlane() === undefined)('uninstall through kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  const root = testbed.directory('uninstall');
  let plane: ControlPlane;
  let site: Site;
  let count = 0;
  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
  }, 3_000_000);
  afterEach(() => site?.close());
  afterAll(() => testbed.close());

  /** A node with two annotated pods and an agent. */
  const start = async (): Promise<SitePod[]> => {
    const namespace = `leave-${++count}`;
    await plane.createNamespace(namespace, { 'istio.io/dataplane-mode': 'ambient' });
    site = await Site.start(plane, `${NODE_PREFIX}${count}`);
    site.startAgent();
    const pods = [await site.createPod({ namespace, name: 'a' }), await site.createPod({ namespace, name: 'b' })];
    for (const pod of pods) await site.untilRedirection(pod, 'enabled');
    return pods;
  };

  const uninstall = (nodeName = site.nodeName): Promise<Outcome> => {
    const { topology, front, tokenFile } = site;
    const netDir = mkdtempSync(join(root, 'net.d-'));
    writeFileSync(
      join(netDir, '10.conflist'),
      '{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"ptp"},{"type":"ambient-redirect"}]}',
    );
    const directories = ['--state-dir', topology.stateDir, '--run-dir', topology.runDir, '--cni-net-dir', netDir];
    const access = ['--kube-api', front.url, '--kube-ca-file', plane.caFile, '--kube-token-file', tokenFile];
    return topology.node.exec([
      ...[executable, 'uninstall', ...directories, '--cni-bin-dir', mkdtempSync(join(root, 'bin-'))],
      ...[...access, '--executable-delay', '0', ...(nodeName === '' ? [] : ['--node-name', nodeName])],
    ]);
  };

  test('the agent is gone: uninstall takes the annotations of this node’s pods away, and of no other', async () => {
    const pods = await start();
    const elsewhere = await plane.createPod({
      namespace: pods[0]?.namespace ?? '',
      name: 'elsewhere',
      node: 'another-node',
      annotations: { 'ambient.istio.io/redirection': 'enabled' },
    });
    expect(elsewhere).not.toBe('');
    await site.agent?.stop('SIGKILL');
    const outcome = await uninstall();
    expect(outcome, outcome.stderr).toMatchObject({ status: 0, stderr: '' });
    for (const pod of pods) {
      expect(outcome.stdout).toContain(`removed the annotation of ${pod.namespace}/${pod.name}\n`);
      expect(await site.redirection(pod)).toBeUndefined();
    }
    expect(await plane.annotation(pods[0]?.namespace ?? '', 'elsewhere', 'ambient.istio.io/redirection')).toBe(
      'enabled',
    );
  });

  test('the agent runs: it does not annotate or attach again', async () => {
    const pods = await start();
    const outcome = await uninstall();
    expect(outcome, outcome.stderr).toMatchObject({ status: 0 });
    await until('the agent knows', () => /uninstall was run on this node/.test(site.agent?.output ?? ''), 20_000);
    // Something that would have it enrol: a new pod of the namespace.
    const late = await site.createPod({ namespace: pods[0]?.namespace ?? '', name: 'late' }, { plugin: false });
    for (const pod of [...pods, late]) expect(await site.redirection(pod)).toBeUndefined();
    expect(site.log().filter(({ msg }) => /^attached/.test(String(msg))).length).toBeLessThanOrEqual(pods.length);
  });

  test('without the name of the node nothing is begun', async () => {
    site = await Site.start(plane, `${NODE_PREFIX}9`);
    expect(await uninstall('')).toMatchObject({
      status: 1,
      stderr: 'ambient-redirect: --node-name (NODE_NAME) is needed: annotations of the pods of one node are to go\n',
    });
  });
});
