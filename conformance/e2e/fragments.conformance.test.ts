// SPDX-License-Identifier: Apache-2.0
//
// IP fragments: none gets past the proxy, those of a proxied connection follow it, and what is not TCP is left alone.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Capture } from './capture.ts';
import type { RawClient } from './endpoint.ts';
import { ACK, SYN } from './frames.ts';
import { Mesh, PORT } from './mesh.ts';
import { type Family, families } from './topology.ts';

const EXCLUDED = 7001;
const ECHO = '0123456789abcdef'.repeat(4);
const IN_ORDER = [0, 1, 2];

describe.each(['ptp', 'bridge'] as const)('fragments, %s', (primary) => {
  let mesh: Mesh;
  let atOutsider: Capture;
  let atServer: Capture;

  beforeAll(async () => {
    mesh = await Mesh.start({ primary, entry: { exclude: { outboundPorts: [EXCLUDED] } } }, [PORT, EXCLUDED]);
    const { topology } = mesh;
    // The kernel of the raw clients knows nothing of their connections and would reset them.
    for (const netns of [mesh.client.netns, topology.outside]) {
      netns.run(
        ['nft', '-f', '-'],
        'table inet mute { chain output { type filter hook output priority 0; tcp flags & rst == rst tcp sport 20000-29999 drop; }\n}\n',
      );
    }
    atOutsider = await Capture.start(topology.testbed, topology.outside, 'eth0', 'outsider');
    atServer = await Capture.start(topology.testbed, mesh.server.netns, 'eth0', 'server');
    await topology.outsider.serveUDP(5000);
    for (const family of families) await mesh.client.endpoint.ping(mesh.address('outsider', family));
  });
  afterAll(() => mesh?.close());

  const fromClient = (family: Family, port = PORT): RawClient => ({
    ifname: 'eth0',
    mac: mesh.client.mac,
    gateway: mesh.client.gatewayMac,
    source: mesh.address('client', family),
    sourcePort: mesh.nextPort(),
    address: mesh.address('outsider', family),
    port,
  });
  const fromOutsider = (family: Family): RawClient => ({
    ifname: 'eth0',
    mac: mesh.topology.outside.mac('eth0'),
    gateway: mesh.topology.node.mac('outside0'),
    source: mesh.address('outsider', family),
    sourcePort: mesh.nextPort(),
    address: mesh.address('server', family),
    port: PORT,
  });
  const proxied = (greeting: string, client: RawClient) => {
    const [source, port] = greeting.split(' ');
    expect(source).toBe(client.source);
    return Number(port) !== client.sourcePort;
  };

  test.each(families)('IPv%i: a first fragment without the flags is dropped', async (family) => {
    const before = mesh.counters();
    for (const flags of [SYN, ACK]) await mesh.client.endpoint.loneFragment(fromClient(family), flags, 8);
    await mesh.untilMoved(before, mesh.client, 'pod_egress drop_short_first_fragment', 2);
    await mesh.topology.outsider.loneFragment(fromOutsider(family), SYN, 8);
    await mesh.untilMoved(before, mesh.server, 'pod_ingress drop_short_first_fragment');
  });

  test.each(families)('IPv%i: a SYN in fragments is dropped', async (family) => {
    const before = mesh.counters();
    await mesh.client.endpoint.loneFragment(fromClient(family), SYN, 24);
    await mesh.untilMoved(before, mesh.client, 'pod_egress drop_syn_fragment');
    await mesh.topology.outsider.loneFragment(fromOutsider(family), SYN, 24);
    await mesh.untilMoved(before, mesh.server, 'pod_ingress drop_syn_fragment');
  });

  test.each(families)('IPv%i: data in fragments follows its connection out', async (family) => {
    const before = mesh.counters();
    const client = fromClient(family);
    const { greeting, echo } = await mesh.client.endpoint.segments(client, [IN_ORDER]);
    expect(proxied(greeting, client)).toBe(true);
    expect(echo).toBe(ECHO);
    const increase = mesh.moved(before, mesh.client);
    expect(Object.keys(increase).filter((key) => / drop_|pass_fragment/.test(key))).toEqual([]);
    expect(atOutsider.packets(`port ${client.sourcePort}`)).toEqual([]);
  });

  test.each(families)('IPv%i: data in fragments follows its connection in', async (family) => {
    const before = mesh.counters();
    const client = fromOutsider(family);
    const { greeting, echo } = await mesh.topology.outsider.segments(client, [IN_ORDER]);
    expect(proxied(greeting, client)).toBe(true);
    expect(echo).toBe(ECHO);
    expect(Object.keys(mesh.moved(before, mesh.server)).filter((key) => key.includes(' drop_'))).toEqual([]);
    expect(atServer.packets(`port ${client.sourcePort}`)).toEqual([]);
  });

  test.each(families)('IPv%i: a fragment before the first one is dropped, and the next try arrives', async (family) => {
    const before = mesh.counters();
    const client = fromClient(family);
    const { echo } = await mesh.client.endpoint.segments(client, [[1, 0, 2], IN_ORDER]);
    expect(echo).toBe(ECHO);
    await mesh.untilMoved(before, mesh.client, 'pod_egress drop_fragment');
  });

  test.each(families)('IPv%i: fragments of a connection that is excluded pass', async (family) => {
    const before = mesh.counters();
    const client = fromClient(family, EXCLUDED);
    const { greeting, echo } = await mesh.client.endpoint.segments(client, [IN_ORDER]);
    expect(proxied(greeting, client)).toBe(false);
    expect(echo).toBe(ECHO);
    await mesh.untilMoved(before, mesh.client, 'pod_egress pass_fragment', 2);
  });

  test.each(families)('IPv%i: UDP and ICMP fragments are left alone', async (family) => {
    const before = mesh.counters();
    const text = 'x'.repeat(1900);
    const answer = await mesh.client.endpoint.udp(mesh.address('outsider', family), 5000, text);
    expect(answer).toBe(`${mesh.address('client', family)} ${text}`.slice(0, 2048));
    await mesh.client.endpoint.ping(mesh.address('outsider', family), 4000);
    await mesh.topology.outsider.ping(mesh.address('client', family), 4000);
    // A bridge floods frames for others whenever it has forgotten where they are.
    const reasons = Object.keys(mesh.moved(before, mesh.client)).filter((key) => !key.endsWith(' pass_other_host'));
    expect(reasons.sort()).toEqual(['pod_egress pass_not_tcp', 'pod_ingress pass_not_tcp']);
  });
});
