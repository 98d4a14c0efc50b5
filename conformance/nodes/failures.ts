// SPDX-License-Identifier: Apache-2.0
// Section 4: kill -9 of everything that can be killed, and a reboot.

import { until } from '../netns.ts';
import { type Ground, ONE, PORT, SHOP, TWO } from './ground.ts';
import { Load } from './load.ts';
import { SYSTEM } from './manifests.ts';
import { urlOf } from './mesh.ts';

export async function failures(ground: Ground): Promise<void> {
  const { step, section, cluster } = ground;
  section('4 kill -9 and a reboot');
  const one = cluster.node(ONE);
  const sandboxes = async () =>
    (await ground.rows(ONE))
      .map(({ containerId }) => containerId)
      .sort()
      .join();
  const loads: Load[] = [];
  await step('requests on one node and across', async () => {
    loads.push(await Load.start(ground, 'calm-near', ONE, urlOf(ground.pod('near'), PORT)));
    loads.push(await Load.start(ground, 'calm-far', ONE, urlOf(ground.pod('far'), PORT)));
  });
  await step('kill -9 of the agent: kubelet starts it again, nothing else changes', async () => {
    const before = await sandboxes();
    await one.killProcess('ambient-redirect agent');
    await until(
      'it was started again',
      async () => {
        const pods = await cluster.pods(SYSTEM, 'k8s-app=istio-cni-node');
        const restarts = pods.map(({ status }) => status.containerStatuses?.[0]?.restartCount ?? 0);
        return Math.max(...restarts) > 0;
      },
      60_000,
    );
    await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
    if ((await sandboxes()) !== before) throw new Error('other sandboxes are recorded');
    for (const load of loads) await load.untilAnswered(20);
  });
  await step('kill -9 of kubelet', async () => {
    const before = await sandboxes();
    await one.kill('kubelet');
    for (const load of loads) await load.untilAnswered(20);
    await one.startKubelet();
    await cluster.untilNodeReady(ONE);
    if ((await sandboxes()) !== before) throw new Error('other sandboxes are recorded');
  });
  await step('kill -9 of containerd', async () => {
    const before = await sandboxes();
    await one.kill('containerd');
    // Nobody takes what containers print while it is away: the loads' own words come later, these answers at once.
    const killed = Date.now();
    const { netns } = (await ground.rows(ONE)).find(({ name }) => name === 'client') ?? {};
    const fetch = ['nsenter', `--net=${netns?.path}`, '--', 'busybox', 'wget', '-q', '-O', '-'];
    for (let i = 0; i < 20; i++) {
      const answer = JSON.parse(await one.run([...fetch, urlOf(ground.pod('far'), PORT)])) as { server: string };
      if (answer.server !== 'far') throw new Error(`${answer.server} answered`);
    }
    const back = Date.now();
    await one.startContainerd();
    for (const load of loads) {
      await load.untilAnswered(20);
      const meanwhile = load.results().filter(({ begun }) => begun > killed && begun < back);
      if (meanwhile.length === 0) throw new Error(`${load.name} asked nothing while containerd was away`);
    }
    await cluster.untilNodeReady(ONE);
    if ((await sandboxes()) !== before) throw new Error('other sandboxes are recorded');
    const late = await ground.run({ name: 'after-containerd', node: ONE, command: ['/bin/sleep', '100000'] });
    await ground.untilAnnotated('enabled');
    await ground.delete(late.metadata.name);
  });
  for (const load of loads) {
    await step(`${load.name}: no request lost, none past the proxies`, () => load.end({ way: 'proxied' }));
  }
  await step('kill -9 of ztunnel: nothing goes direct, and all by the proxy when it is back', async () => {
    const load = await Load.start(ground, 'bold', ONE, urlOf(ground.pod('near'), PORT));
    await one.killProcess('/bin/node /app/dist/pod.mjs ztunnel');
    await load.untilAnswered(40, 90_000);
    await cluster.untilAllReady(SYSTEM, 'app=ztunnel', 2);
    return load.end({ way: 'proxied', lossy: true });
  });
  await step('reboot: pods of the node come back enrolled, in between all is closed', async () => {
    const towards = await Load.start(ground, 'towards', ONE, urlOf(ground.pod('far'), PORT));
    const from = await Load.start(ground, 'from', TWO, urlOf(ground.pod('near'), PORT));
    const boot = Date.now();
    await cluster.node(TWO).reboot();
    await until(
      'the node’s pods run in new sandboxes',
      async () => {
        const pods = await cluster.pods(SHOP);
        const there = pods.filter(({ spec }) => spec.nodeName === TWO);
        const rows = await ground.rows(TWO).catch(() => []);
        return there.every(({ metadata, status }) =>
          rows.some(
            ({ uid, role: of, addresses }) =>
              uid === metadata.uid && of === 'pod' && addresses.includes(status.podIP ?? ''),
          ),
        );
      },
      120_000,
    ).catch(async (error: Error) => {
      throw new Error(`${error.message}\n${JSON.stringify(await ground.rows(TWO).catch(String)).slice(0, 1_500)}`);
    });
    await cluster.untilNodeReady(TWO);
    await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
    await cluster.untilAllReady(SYSTEM, 'app=ztunnel', 2);
    await ground.refresh();
    await ground.untilAnnotated('enabled', 60_000);
    await from.untilAnswered(20);
    const again = from.results().filter(({ begun }) => begun > boot && from.results().length > 0);
    if (again.length === 0) throw new Error('the pod on the node did not ask again');
    const notes = [await towards.end({ way: 'proxied', lossy: true }), await from.end({ way: 'proxied', lossy: true })];
    await ground.traffic(true);
    return notes.join('; ');
  });
}
