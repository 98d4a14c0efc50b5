// SPDX-License-Identifier: Apache-2.0
// Section 3: another version and back, while requests go at a fixed rate.

import { readdirSync } from 'node:fs';
import { NODE_NAMES } from './cluster.ts';
import { type Ground, ONE, PORT, TWO } from './ground.ts';
import { Load } from './load.ts';
import { SYSTEM } from './manifests.ts';
import { urlOf } from './mesh.ts';

export async function upgrade(ground: Ground): Promise<void> {
  const { step, section, cluster } = ground;
  const { current, next } = cluster.images;
  section('3 Upgrade and roll back under load');
  const programs = () =>
    NODE_NAMES.map((name) => readdirSync(cluster.node(name).path('/sys/fs/bpf/ambient-redirect/programs')).join());
  const expectVersion = async (version: string) => {
    for (const node of NODE_NAMES) {
      const said = await cluster.node(node).run(['/opt/cni/bin/ambient-redirect', '--version']);
      if (said.trim() !== version) throw new Error(`${node} has ${said.trim()}, not ${version}`);
    }
  };
  const rolled = async () => {
    const argv = ['rollout', 'status', '-n', SYSTEM, 'daemonset/istio-cni-node', '--timeout=120s'];
    await cluster.kubectl(argv, { timeout: 130_000 });
    await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
  };
  const loads: Load[] = [];
  const old = programs();
  await step('requests from pods of both nodes, on one node and across', async () => {
    const [near, far] = [ground.pod('near'), ground.pod('far')];
    loads.push(await Load.start(ground, 'steady-near', ONE, urlOf(near, PORT)));
    loads.push(await Load.start(ground, 'steady-far', ONE, urlOf(far, PORT)));
    loads.push(await Load.start(ground, 'steady-back', TWO, urlOf(near, PORT, 6)));
  });
  await step(`helm upgrade to ${next.version}: executable and programs of both nodes are the new ones`, async () => {
    await cluster.helm(['upgrade', ...ground.release(next.version)]);
    await rolled();
    await expectVersion(next.version);
    for (const [index, now] of programs().entries()) {
      if (now === old[index] || now.includes(',')) throw new Error(`${NODE_NAMES[index]}: programs/ has ${now}`);
    }
    for (const load of loads) await load.untilAnswered(20);
  });
  await step(`helm rollback: those of ${current.version} again`, async () => {
    await cluster.helm(['rollback', 'ambient-redirect', '1', '-n', SYSTEM]);
    await rolled();
    await expectVersion(current.version);
    if (programs().join() !== old.join()) throw new Error(`programs/ has ${programs().join()}, it had ${old.join()}`);
    for (const load of loads) await load.untilAnswered(20);
  });
  for (const load of loads) {
    await step(`${load.name}: no request lost, none past the proxies`, () => load.end({ way: 'proxied' }));
  }
}
