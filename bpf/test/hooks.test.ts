// SPDX-License-Identifier: Apache-2.0
// What BPF_PROG_TEST_RUN cannot show, with the programs attached and frames sent through the veths: tags that the
// kernel has taken into the skb, frames too short for an IP header, bpf_sk_assign, and that a redirected frame arrives.

import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Namespace } from '../../conformance/netns.ts';
import { until } from '../../conformance/netns.ts';
import type { Direction, ProgramName } from '../../plugin/native.ts';
import { ACK, type End, ETH_P_IP, ETH_P_IPV6, ethernetFrame, RST, tcpFrame, type Wire } from './frames.ts';
import { refusal } from './gso.ts';
import { APP, addresses, Datapath, DEAF, families, GATEWAY_MAC, HTTP, Node, OLD_MAC, POD_MAC, SIGN } from './node.ts';
import { tagged } from './parse-cases.ts';

const seen = new Set<string>();
let node: Node;
let datapath: Datapath;

beforeAll(async () => {
  node = await Node.open();
  datapath = new Datapath(node, seen);
  const { node: host, old } = node.namespaces;
  attach('pod_egress', host, node.ifindex.pod, 'ingress');
  attach('pod_ingress', host, node.ifindex.pod, 'egress');
  attach('proxy_egress', host, node.ifindex.old, 'ingress');
  attach('proxy_guard', host, node.ifindex.old, 'egress');
  attach('proxy_ingress', old, ifindexIn(old, 'eth0'), 'ingress');
});
afterAll(() => node?.close());
beforeEach(() => datapath.reset());

function ifindexIn(namespace: Namespace, ifname: string): number {
  const [link] = JSON.parse(namespace.ip('-j', 'link', 'show', 'dev', ifname)) as { ifindex: number }[];
  return link?.ifindex ?? 0;
}

function attach(program: ProgramName, namespace: Namespace, ifindex: number, direction: Direction): void {
  const { native } = node;
  const netns = native.openNetns(namespace.path);
  const fd = native.openProgram(join(datapath.directory, 'programs', datapath.tag, program));
  native.attachTcx(netns, ifindex, direction, fd, 'first', join(datapath.directory, `link-${program}`));
  native.close(fd);
  native.close(netns);
}

/** Packets counted by now. */
function counted(program: ProgramName, reason: string): bigint {
  return node.native
    .counters(datapath.state)
    .filter((counter) => counter.program === program && counter.reason === reason)
    .reduce((sum, { packets }) => sum + packets, 0n);
}

/** Does `send` and waits until each of the counters has one packet more; the last one is the last on the way. */
async function counts(send: () => Promise<void>, ...counters: [ProgramName, string][]): Promise<void> {
  const before = counters.map(([program, reason]) => counted(program, reason));
  await send();
  const last = counters.length - 1;
  const [program, reason] = counters[last] ?? ['pod_egress', ''];
  await until(`${program} ${reason}`, () => counted(program, reason) > (before[last] ?? 0n));
  expect(counters.map(([program, reason], i) => counted(program, reason) - (before[i] ?? 0n))).toEqual(
    counters.map(() => 1n),
  );
}

/** The old proxy, or who else, has a request socket for this tuple: one of its listeners took the SYN. */
async function taken(client: End, server: End, by: Namespace = node.namespaces.old): Promise<void> {
  const filter = `( sport = :${server.port} and dport = :${client.port} )`;
  await until('request socket', () => by.run(['ss', '-Htan', 'state', 'syn-recv', filter]).includes(`:${client.port}`));
}

/** The host-side MAC of the pod's veth: what the node's stack takes for its own. */
const fromPodToNode = (): Wire => ({ source: POD_MAC, destination: node.namespaces.node.mac('pod0') });

describe.each(families)('at the hooks, IPv%i', (family) => {
  const its = addresses[family];
  const pod = (): End => ({ address: its.podSilent, port: node.port() });

  test.each(
    tagged(
      { source: POD_MAC, destination: GATEWAY_MAC },
      { address: its.pod, port: 1 },
      { address: its.outside, port: 2 },
    ),
  )('$name from the pod: dropped', ({ frame }) =>
    counts(() => node.inPod.frame('eth0', frame), ['pod_egress', 'drop_vlan_tagged']),
  );

  test.each([0, 19])('a frame with %i bytes of an IP header: dropped', (length) => {
    const frame = ethernetFrame(fromPodToNode(), family === 4 ? ETH_P_IP : ETH_P_IPV6, Buffer.alloc(length, 0x46));
    return counts(() => node.inPod.frame('eth0', frame), ['pod_egress', 'drop_malformed']);
  });

  test('a SYN of the pod: the outbound listener takes it, whatever its destination', async () => {
    const [client, server] = [pod(), { address: its.outsideAtOld, port: 4242 }];
    const frame = tcpFrame(fromPodToNode(), client, server);
    await counts(
      () => node.inPod.frame('eth0', frame),
      ['pod_egress', 'redirected_outbound'],
      ['proxy_ingress', 'proxy_assigned'],
    );
    await taken(client, server);
  });

  test('a SYN to the pod: past the guard, and the inbound listener takes it', async () => {
    const { node: host } = node.namespaces;
    // Forwarded by the node, from one of its devices to the pod's.
    const [client, server] = [
      { address: its.outsideSilent, port: node.port() },
      { address: its.podAtProxy, port: 4243 },
    ];
    const set = (name: string) => host.run(['sysctl', '-qw', `${name}=1`]);
    set(family === 4 ? 'net.ipv4.ip_forward' : 'net.ipv6.conf.all.forwarding');
    host.run(['sysctl', '-qw', 'net.ipv4.conf.all.rp_filter=0', 'net.ipv4.conf.pod1.rp_filter=0']);
    host.ip('link', 'set', 'pod1peer', 'up');
    host.ip('neighbour', 'replace', server.address, 'lladdr', POD_MAC, 'dev', 'pod0');
    host.ip('route', 'replace', client.address, 'dev', 'pod1');
    const frame = tcpFrame({ source: GATEWAY_MAC, destination: host.mac('pod1') }, client, server);
    await counts(
      () => node.inNode.frame('pod1peer', frame),
      ['pod_ingress', 'redirected_inbound'],
      ['proxy_ingress', 'proxy_assigned'],
    );
    await taken(client, server);
  });

  test.each([{ flags: [] }, { flags: ['NO_PEER'] }])(
    'a SYN of the proxy to the pod, flags $flags: the pod’s listener takes it',
    async ({ flags }) => {
      datapath.enrol({ flags });
      const [client, server] = [
        { address: family === 4 ? '10.71.0.77' : 'fd71::77', port: node.port() },
        { address: its.pod, port: APP },
      ];
      // A client whom nobody answers for; and the frame is for a gateway, whose MAC no device has.
      const frame = tcpFrame({ source: OLD_MAC, destination: GATEWAY_MAC }, client, server);
      await counts(() => node.old.frame('eth0', frame), ['proxy_egress', 'from_proxy_local']);
      await taken(client, server, node.namespaces.pod);
    },
  );

  test('a SYN of the proxy in the pod’s name: the node takes it from the pod’s interface', async () => {
    const [client, server] = [
      { address: its.podSilent, port: node.port() },
      { address: its.host, port: APP },
    ];
    const frame = tcpFrame({ source: OLD_MAC, destination: GATEWAY_MAC }, client, server);
    await counts(
      () => node.old.frame('eth0', frame),
      ['proxy_egress', 'from_proxy_reinjected'],
      ['pod_egress', 'pass_bypass'],
    );
    await taken(client, server, node.namespaces.node);
  });

  test('a frame with our sign that we did not send: stopped at the proxy’s veth', async () => {
    const wire = { source: datapath.signed(SIGN.OUTBOUND), destination: OLD_MAC };
    const frame = tcpFrame(wire, pod(), { address: its.outsideAtOld, port: HTTP });
    const refused = () => expect(node.inNode.frame('old0', frame)).rejects.toMatchObject({ code: 'ENOBUFS' });
    await counts(refused, ['proxy_guard', 'drop_forged_sign']);
  });

  test('a packet of the host’s own socket to the pod passes, and so does the answer', async () => {
    const before = ['pod_ingress', 'pod_egress'].map((program) => counted(program as ProgramName, 'pass_host_socket'));
    await node.connect(node.inNode, its.host, its.pod, APP);
    expect(counted('pod_ingress', 'pass_host_socket')).toBeGreaterThan(before[0] ?? 0n);
    expect(counted('pod_egress', 'pass_host_socket')).toBeGreaterThan(before[1] ?? 0n);
  });

  test.each(['plainly', 'behind options'])(
    'closedAction reset: a segment that is still to be cut, %s, is answered by one RST that is not',
    async (how) => {
      const [client, server] = [pod(), { address: its.outsideSilent, port: HTTP }];
      datapath.enrol({ flags: ['STRICT', 'CLOSED_RESET'] });
      // A flow of a proxy that died since without a word.
      await datapath.run('pod_egress', tcpFrame(fromPodToNode(), client, server));
      datapath.proxies([datapath.old({ ports: { outbound: DEAF } })]);
      const before = counted('pod_egress', 'reset_no_listener');
      expect(refusal(node.namespaces.pod, 'eth0', fromPodToNode(), client, server, how !== 'plainly')).toEqual({
        kind: 0,
        frame: tcpFrame(
          { source: fromPodToNode().destination, destination: POD_MAC },
          server,
          client,
          { flags: RST, seq: 0x01020304, ack: 0, window: 0 },
          { id: 0, dontFragment: true },
        ).toString('hex'),
      });
      expect(counted('pod_egress', 'reset_no_listener') - before).toBe(1n);
    },
  );

  test('a segment of a connection that the proxy has reaches its socket', async () => {
    const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
    const frame = tcpFrame(fromPodToNode(), client, server, { flags: ACK });
    await counts(
      () => node.inPod.frame('eth0', frame),
      ['pod_egress', 'to_proxy_established'],
      ['proxy_ingress', 'proxy_delivered'],
    );
  });
});
