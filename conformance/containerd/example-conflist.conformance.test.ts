// SPDX-License-Identifier: Apache-2.0
// cni-conf.example.json as it stands: a throwaway node has every path of a real one to itself.
import { readFile } from 'node:fs/promises';
import { afterAll, expect, test } from 'vitest';
import { Testbed } from '../netns.ts';
import { HAProxy } from './haproxy.ts';
import { ask, meshNode, podState, runWorkload } from './mesh.ts';
import type { Conflist } from './throwaway-node.ts';

const testbed = Testbed.open();
afterAll(() => testbed.close());

test('containerd works with cni-conf.example.json, and its pods with the proxy', async () => {
  const example = await readFile(new URL('../../cni-conf.example.json', import.meta.url), 'utf8');
  const node = await meshNode(testbed, JSON.parse(example) as Conflist);
  const enrolled = { annotations: { 'ambient-redirect/enroll': 'true' } };
  const proxy = await node.runPod('istio-system', 'ztunnel-x7k2p');
  const haproxy = await HAProxy.start(node, proxy);
  const [client, server] = await Promise.all([
    runWorkload(node, 'client', enrolled),
    runWorkload(node, 'server', enrolled),
  ]);
  expect(server.pod.addresses.length).toBe(2);
  for (const [family, address] of server.pod.addresses.entries()) {
    const { uri, ...answer } = await ask(node, client, address);
    const source = client.pod.addresses[family];
    expect(answer).toEqual({ client: source, server: 'server' });
    expect(await haproxy.sightingsOf(uri)).toMatchObject([
      { listener: 'outbound', client: source, destination: address },
    ]);
  }
  await Promise.all([client, server].map(({ pod }) => node.removePod(pod)));
  await node.removePod(proxy);
  expect(await podState(node)).toEqual([]);
});
