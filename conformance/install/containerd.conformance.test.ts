// SPDX-License-Identifier: Apache-2.0
// `install` and `uninstall` on a node with a real containerd: what is written is what the runtime picks up.
import { existsSync } from 'node:fs';
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { HAProxy } from '../containerd/haproxy.ts';
import { ask, runWorkload, type Workload } from '../containerd/mesh.ts';
import { network } from '../containerd/networks.ts';
import { type Pod, ThrowawayNode } from '../containerd/throwaway-node.ts';
import { Testbed, until } from '../netns.ts';

const executable = fileURLToPath(new URL('../../dist/ambient-redirect', import.meta.url));
const enrolled = { annotations: { 'ambient-redirect/enroll': 'true' } };

const testbed = Testbed.open();
afterAll(() => testbed.close());

/** A lone configuration, as the primary's installer writes it: tabs, and a number that JavaScript would change. */
const [primary] = network('ptp').plugins;
const lone = `{\n\t"cniVersion": "1.0.0", "name": "pods",\n\t"vendor": 1.50,\n${JSON.stringify(primary, null, '\t').slice(2)}\n`;

let node: ThrowawayNode;
let proxy: Pod;
let client: Workload;
let server: Workload;
let haproxy: HAProxy;
const pods: Pod[] = [];

const netDir = (...names: string[]) => node.path(['/etc/cni/net.d', ...names].join('/'));
const command = (...words: string[]) => node.run([executable, ...words], { timeout: 60_000 });
const seen = async (uri: string) => haproxy.seen.filter((request) => request.uri === uri).length;

beforeAll(async () => {
  if (!existsSync(executable)) throw new Error(`${executable} is not there: npm run build`);
  node = await ThrowawayNode.start(testbed);
});

test('it waits for the primary plugin, and a runtime that runs already takes the list', async () => {
  const installing = node.launch([executable, 'install', '--wait', '60']);
  await until(
    'it waits',
    () => installing.output.includes('waiting for a network configuration in /etc/cni/net.d'),
    20_000,
  );
  await writeFile(netDir('99-loopback.conf'), '{"cniVersion":"1.0.0","name":"lo","type":"loopback"}');
  await writeFile(netDir('10-pods.conf'), lone);
  await installing.ended;
  expect(installing.output).toContain('/etc/cni/net.d/10-pods.conflist: made a list of 10-pods.conf, added our entry');
  expect((await readdir(netDir())).sort()).toEqual(['10-pods.conflist', '99-loopback.conf']);
  expect(await readFile(netDir('10-pods.conflist'), 'utf8')).toContain(lone.trim());

  await node.startContainerd();
  proxy = await node.runPod('istio-system', 'ztunnel-x7k2p');
  haproxy = await HAProxy.start(node, proxy);
  [client, server] = await Promise.all([runWorkload(node, 'client', enrolled), runWorkload(node, 'server', enrolled)]);
  pods.push(proxy, client.pod, server.pod);
  for (const address of server.pod.addresses) {
    const { uri } = await ask(node, client, address);
    expect(await haproxy.sightingsOf(uri)).toMatchObject([{ listener: 'outbound', destination: address }]);
  }
});

test('containerd takes a change of our entry while it runs', async () => {
  const annotationsOff = [executable, 'install', '--enrollment', 'all', '--exclude-namespaces', 'istio-system'];
  expect(await node.run(annotationsOff)).toBe(
    '/opt/cni/bin/ambient-redirect: unchanged\n/etc/cni/net.d/10-pods.conflist: changed our entry\n',
  );
  // The runtime learns of the file by inotify, some time after it was renamed.
  await until(
    'a pod without annotation is enrolled',
    async () => {
      const pod = await node.runPod('shop', 'plain');
      const list = JSON.parse(await command('pods', '-o', 'json')) as { name: string; role: string }[];
      await node.removePod(pod);
      return list.some(({ name, role }) => name === 'plain' && role === 'pod');
    },
    20_000,
  );
});

test('containerd takes a list of our own, which is read before the primary’s', async () => {
  const owned = ['install', '--owned-conflist', '--enrollment', 'all', '--exclude-namespaces', 'istio-system'];
  expect(await command(...owned)).toContain('/etc/cni/net.d/02-ambient-redirect.conflist: made 02-ambient-redirect');
  expect((await readdir(netDir())).sort()).toEqual([
    '02-ambient-redirect.conflist',
    '10-pods.conf',
    '99-loopback.conf',
  ]);
  expect(await readFile(netDir('10-pods.conf'), 'utf8')).toBe(lone);
  // containerd 1.6 reads the directory at each change of it; that it has is seen by what it does.
  const other = await runWorkload(node, 'other');
  pods.push(other.pod);
  for (const address of server.pod.addresses) {
    const { uri } = await ask(node, other, address);
    expect(await haproxy.sightingsOf(uri)).toMatchObject([{ listener: 'outbound', destination: address }]);
  }
  // Back to an entry in the primary's.
  await command('install', '--enrollment', 'all', '--exclude-namespaces', 'istio-system');
  expect((await readdir(netDir())).sort()).toEqual(['10-pods.conflist', '99-loopback.conf']);
});

test('SIGTERM of install removes nothing', async () => {
  const before = await readFile(netDir('10-pods.conflist'), 'utf8');
  const waiting = node.launch([executable, 'install', '--cni-conf-name', '77-other.conflist']);
  await until('it waits', () => waiting.output.includes('waiting'), 20_000);
  await node.run(['pkill', '-TERM', '-f', 'install --cni-conf-name 77-other.conflist']);
  await waiting.ended;
  expect(await readFile(netDir('10-pods.conflist'), 'utf8')).toBe(before);
  expect(existsSync(node.path('/opt/cni/bin/ambient-redirect'))).toBe(true);
});

test('uninstall with running pods: they go on, direct, and the node is as it was', async () => {
  const output = await command('uninstall', '--executable-delay', '0');
  expect(output).toContain('put 10-pods.conf back');
  expect(output).toContain('3 pods unenrolled\n');
  expect(output).toContain('removed /opt/cni/bin/ambient-redirect\n');
  expect((await readdir(netDir())).sort()).toEqual(['10-pods.conf', '99-loopback.conf']);
  expect(await readFile(netDir('10-pods.conf'), 'utf8')).toBe(lone);
  expect(existsSync(node.path('/sys/fs/bpf/ambient-redirect'))).toBe(false);
  expect((await readdir(node.path('/opt/cni/bin'))).filter((name) => name.includes('ambient'))).toEqual([]);
  for (const address of server.pod.addresses) {
    const { uri, ...answer } = await ask(node, client, address);
    expect(answer.server).toBe('server');
    expect(await seen(uri)).toBe(0);
  }
});

test('containerd starts and removes pods without us, those of before too', async () => {
  const added = await runWorkload(node, 'added', enrolled);
  for (const address of added.pod.addresses) expect((await ask(node, client, address)).server).toBe('added');
  for (const pod of [...pods, added.pod]) await node.removePod(pod);
});

test('uninstall once more finds nothing to do', async () => {
  expect(await command('uninstall', '--executable-delay', '0')).toBe(
    '0 pods unenrolled\n/opt/cni/bin/ambient-redirect: not there\n',
  );
});
