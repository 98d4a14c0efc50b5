// SPDX-License-Identifier: Apache-2.0
// The executable under a real containerd. The runtime alone makes the pods; Debian's HAProxy is the node's proxy.
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { Testbed, until } from '../netns.ts';
import { HAProxy, type Seen } from './haproxy.ts';
import { type Answer, ask, meshNode, podState, runWorkload, type Workload } from './mesh.ts';
import { gateways, network } from './networks.ts';
import type { Pod, ThrowawayNode } from './throwaway-node.ts';

const entry = {
  type: 'ambient-redirect',
  enrollment: 'annotation',
  proxy: { contract: 'shared', match: { namespace: 'istio-system', name: 'ztunnel-*' } },
  capabilities: { 'io.kubernetes.cri.pod-annotations': true },
};
const enrolled = { annotations: { 'ambient-redirect/enroll': 'true' } };
const families = [
  ['IPv4', 0],
  ['IPv6', 1],
] as const;
type Family = (typeof families)[number][1];

const hostPort = 8080;
const port_mappings = [{ container_port: 80, host_port: hostPort }];
const settling = { timeout: 5_000, interval: 100 };

describe.each([
  ['bridge', 'tcx'],
  ['ptp', 'clsact'],
] as const)('containerd with %s, then portmap, then ours on %s', (primary, hook) => {
  const testbed = Testbed.open();
  let node: ThrowawayNode;
  let before: KernelState;
  let proxy: Pod;
  let haproxy: HAProxy;
  let client: Workload;
  let server: Workload;
  /** Without any annotation, so not enrolled; and another one. */
  let plain: Workload;
  let other: Workload;

  const nodeState = () => kernelState([node.namespace]);
  const command = async (...words: string[]): Promise<unknown> =>
    JSON.parse(await node.run(['/opt/cni/bin/ambient-redirect', ...words, '-o', 'json']));
  const address = ({ pod }: Workload, family: Family): string => {
    const found = pod.addresses[family];
    if (!found) throw new Error(`${pod.config.metadata.name} has the addresses ${pod.addresses}`);
    return found;
  };

  /** Asks `to` from `from` and expects that it went through `listener` of the proxy, seen from both ends. */
  const expectThrough = async (listener: Seen['listener'], from: Workload, to: Workload, family: Family) => {
    const { uri, ...answer } = await ask(node, from, address(to, family));
    expect(answer).toEqual({ client: address(from, family), server: to.pod.config.metadata.name });
    expect(await haproxy.sightingsOf(uri)).toEqual([
      { listener, client: address(from, family), destination: address(to, family), port: 80, uri },
    ]);
  };

  /** Expects that the proxy saw nothing of `answer`: the log is complete up to a later request that it did see. */
  const expectUnseen = async ({ uri }: Answer) => {
    await expectThrough('outbound', client, server, 0);
    expect(haproxy.seen.filter((request) => request.uri === uri)).toEqual([]);
  };

  beforeAll(async () => {
    node = await meshNode(testbed, network(primary, { ...entry, hook }));
    // The first pod leaves the bridge and portmap's empty chains behind, of which we know nothing.
    await node.removePod(await node.runPod('shop', 'first', { port_mappings }));
    // The kernel takes a bridge without ports down some time after its last port.
    await until('the bridge is down', async () => {
      before = await nodeState();
      return !before.get('node link cni0')?.includes('"operstate":"UP"');
    });
    [client, plain, other] = await Promise.all([
      runWorkload(node, 'client', enrolled),
      runWorkload(node, 'plain'),
      runWorkload(node, 'other'),
    ]);
  });
  afterAll(() => testbed.close());

  test('before there is a proxy an enrolled pod reaches nobody, and only the node reaches it', async () => {
    const refused = [
      ask(node, client, address(plain, 0), { seconds: 1 }),
      ask(node, plain, address(client, 1), { seconds: 1 }),
    ];
    expect(await Promise.allSettled(refused)).toMatchObject([{ status: 'rejected' }, { status: 'rejected' }]);
    const dropped = { pod: 'client', reason: 'drop_no_listener' };
    expect(await command('counters')).toEqual(
      expect.arrayContaining([
        expect.objectContaining({ ...dropped, program: 'pod_egress' }),
        expect.objectContaining({ ...dropped, program: 'pod_ingress' }),
      ]),
    );
    for (const [, family] of families) {
      expect(await ask(node, 'node', address(client, family))).toMatchObject({ server: 'client' });
      expect(await ask(node, plain, address(other, family))).toMatchObject({ server: 'other' });
    }
  });

  test('the pod that proxy.match names becomes the proxy, for pods that came before and after it', async () => {
    proxy = await node.runPod('istio-system', 'ztunnel-x7k2p');
    haproxy = await HAProxy.start(node, proxy);
    server = await runWorkload(node, 'server', { ...enrolled, port_mappings });
    expect(await command('status')).toMatchObject({
      kernel: { hook },
      proxies: [{ name: 'istio-system/ztunnel-x7k2p', contract: 'shared', present: true }],
      pods: { enrolled: 2, proxies: 1, recorded: 2, attaching: 0 },
      problems: [],
    });
  });

  describe.each(families)('%s', (_, family) => {
    test('HTTP between enrolled pods goes through the proxy, and the server sees the client', async () => {
      await expectThrough('outbound', client, server, family);
      await expectThrough('outbound', server, client, family);
    });

    test('HTTP to and from a pod that is not enrolled goes through the proxy', async () => {
      await expectThrough('outbound', client, plain, family);
      await expectThrough('inboundPlaintext', plain, server, family);
    });

    test('a request to the hostPort of an enrolled pod reaches the proxy after the node has translated it', async () => {
      const gateway = gateways[family];
      // portmap hides a client of the pods' own subnet behind the gateway.
      const inbound = { listener: 'inboundPlaintext', client: gateway, destination: address(server, family), port: 80 };
      const fromPlain = await ask(node, plain, gateway, { port: hostPort });
      expect(fromPlain).toMatchObject({ client: gateway, server: 'server' });
      expect(await haproxy.sightingsOf(fromPlain.uri)).toMatchObject([inbound]);

      const fromClient = await ask(node, client, gateway, { port: hostPort });
      expect(fromClient).toMatchObject({ client: gateway, server: 'server' });
      const outbound = { listener: 'outbound', client: address(client, family), destination: gateway, port: hostPort };
      const legs = () => haproxy.seen.filter((request) => request.uri === fromClient.uri);
      await expect.poll(legs, settling).toMatchObject([inbound, outbound]);
    });

    test('a probe from the node goes direct', async () => {
      const answer = await ask(node, 'node', address(server, family));
      expect(answer.server).toBe('server');
      await expectUnseen(answer);
    });

    test('traffic between pods that are not enrolled is not touched', async () => {
      const answer = await ask(node, plain, address(other, family));
      expect(answer).toMatchObject({ client: address(plain, family), server: 'other' });
      await expectUnseen(answer);
    });
  });

  /** While there is no containerd: from inside the client's namespace, without ExecSync. */
  const askWithoutContainerd = async () => {
    const uri = '/cgi-bin/whoami?while-containerd-is-down';
    const url = `http://${address(server, 0)}${uri}`;
    await node.run(['busybox', 'timeout', '5', 'wget', '-q', '-O', '-', url], { netns: client.pod.netns });
    expect(await haproxy.sightingsOf(uri)).toMatchObject([{ listener: 'outbound', client: address(client, 0) }]);
  };

  test('containerd killed and started again changes nothing: the proxy still sees everything', async () => {
    const programs = async () => {
      const lines = differences(before, await nodeState());
      return lines.filter((line) => line.startsWith(hook === 'tcx' ? '+ node tcx ' : '+ node filter '));
    };
    const alive = await programs();
    // Two for each of the enrolled pods, and two on the proxy's host-side veth.
    expect(alive.length).toBe(6);
    await node.killContainerd();
    expect(await programs()).toEqual(alive);
    await askWithoutContainerd();
    await node.startContainerd();
    expect(await programs()).toEqual(alive);
    await expectThrough('outbound', client, server, 0);
    await expectThrough('inboundPlaintext', plain, server, 1);
  });

  test('StopPodSandbox and RemovePodSandbox of every pod leave nothing', async () => {
    expect((await podState(node)).length).toBeGreaterThan(0);
    await node.removePod(client.pod);
    await Promise.all([server, plain, other].map(({ pod }) => node.removePod(pod)));
    await haproxy.stop();
    await node.removePod(proxy);
    await expect.poll(async () => differences(before, await nodeState()), settling).toEqual([]);
    expect(await podState(node)).toEqual([]);
    expect(await command('pods')).toEqual([]);
  });
});
