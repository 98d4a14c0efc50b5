// SPDX-License-Identifier: Apache-2.0
// Section 5: others write where our entry is.

import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { until } from '../netns.ts';
import { type Ground, ONE, PORT, SERVER, SHOP } from './ground.ts';
import { pod, SYSTEM } from './manifests.ts';
import { ask, urlOf } from './mesh.ts';
import { CONFLIST } from './node.ts';

interface Conflist {
  plugins: { type: string }[];
}

export async function neighbours(ground: Ground): Promise<void> {
  const { step, section, cluster } = ground;
  section('5 Others at the conflist');
  const node = cluster.node(ONE);
  const path = node.path(CONFLIST);
  const has = (file: string) =>
    existsSync(file) &&
    (JSON.parse(readFileSync(file, 'utf8')) as Conflist).plugins.some(({ type }) => type === 'ambient-redirect');
  const without = () => {
    const list = JSON.parse(readFileSync(path, 'utf8')) as Conflist;
    const plugins = list.plugins.filter(({ type }) => type !== 'ambient-redirect');
    // As it was written first: at the end it is compared with that.
    return `${JSON.stringify({ ...list, plugins }, null, 2)}\n`;
  };
  const redirected = async (name: string) => {
    const fresh = await ground.run({ name, node: ONE, ...SERVER });
    await ground.untilAnnotated('enabled');
    const answer = await ask(cluster, fresh, urlOf(ground.pod('near'), PORT));
    if (answer.localPort === answer.clientPort) throw new Error(`a connection of ${name} went direct`);
    await ground.delete(name);
  };
  await step('the conflist is written anew without our entry: it is put back, new pods are redirected', async () => {
    writeFileSync(`${path}.new`, without());
    renameSync(`${path}.new`, path);
    await until('the entry is back', () => has(path), 20_000);
    await redirected('after-rewrite');
  });
  await step('a list that is read before it appears, and goes again', async () => {
    const first = node.path('/etc/cni/net.d/05-first.conflist');
    writeFileSync(`${first}.new`, without());
    renameSync(`${first}.new`, first);
    await until('the entry is in it', () => has(first), 20_000);
    await redirected('by-the-first');
    rmSync(first);
    await until('it is in the other', () => has(path), 20_000);
    await redirected('by-the-other');
  });
  await step('the agent’s own pod comes while its plugin refuses others', async () => {
    await cluster.kubectl([
      'delete',
      'pod',
      '-n',
      SYSTEM,
      '-l',
      'k8s-app=istio-cni-node',
      '--force',
      '--grace-period=0',
    ]);
    await cluster.apply(pod({ namespace: SHOP, name: 'meanwhile', node: ONE, ...SERVER }));
    await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
    ground.keep(await cluster.untilReady(SHOP, 'meanwhile', 90_000));
    await ground.untilAnnotated('enabled');
    await ground.delete('meanwhile');
  });
}
