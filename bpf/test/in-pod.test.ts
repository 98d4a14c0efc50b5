// SPDX-License-Identifier: Apache-2.0
//
// The programs of the in-pod contract with crafted packets (BPF_PROG_TEST_RUN), in a pod's namespace that has listeners
// with the proxy's mark, and for the host's side in the node's. The pod holds an outside address on lo, so that a
// connection of its own to it looks as one does that a transparent proxy has taken.

import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { Endpoint } from '../../conformance/e2e/endpoint.ts';
import { Testbed } from '../../conformance/netns.ts';
import { loadNative } from '../../plugin/addon.ts';
import type { State } from '../../plugin/native.ts';
import { ACK, type End, macText, mapped, type TcpFields, tcpFrame, type Wire } from './frames.ts';
import { families, ifindexOf, MARKS, Runner, VERDICT } from './node.ts';

const native = loadNative();
const PROXY_MARK = 0x539;
const FOREIGN = 0x1234;
const POD_MAC = '02:00:5e:81:00:02';
const GATEWAY_MAC = '02:00:5e:81:00:01';
const ELSEWHERE_MAC = '02:00:5e:81:00:ee';
/** Inside the pod the id and the device's index have nothing to do with each other. */
const ID = 0x80001234;
const PORTS = { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008, dns: 15053 };
const UNMARKED = 16001;
const DEAF = 16999;
const APP = 8080;
const SIGN_PROBE = 10;

const its = {
  4: { pod: '10.81.0.2', taken: '203.0.113.7', outside: '203.0.113.9', istio: '169.254.7.127', loopback: '127.0.0.1' },
  6: {
    pod: 'fd81::2',
    taken: '2001:db8:7::7',
    outside: '2001:db8:7::9',
    istio: 'fd16:9254:7127:1337:ffff:ffff:ffff:ffff',
    loopback: '::1',
  },
} as const;

const out: Wire = { source: POD_MAC, destination: GATEWAY_MAC };
const within: Wire = { source: GATEWAY_MAC, destination: POD_MAC };
const own: Wire = { source: POD_MAC, destination: POD_MAC };

let testbed: Testbed;
let directory: string;
let state: State;
let inPod: Runner;
let onNode: Runner;
let endpoint: Endpoint;
let hostIfindex: number;
let podIfindex: number;
let nsid: number;
let port = 20_000;
const nextPort = () => {
  port += 1;
  return port;
};

beforeAll(async () => {
  testbed = Testbed.open();
  directory = join(testbed.bpffs('bpf'), 'state');
  native.makeDirectory(directory, 0o700);
  const wanted = { maxPods: 16, maxFlows: 4096, directFlowsPerPod: 1024, marks: MARKS, variant: 0 };
  native.createState(directory, wanted);
  state = native.openState(directory);
  testbed.defer(() => native.closeState(state));
  native.loadPrograms(state, directory, 'test');
  const [node, pod] = [testbed.namespace('node'), testbed.namespace('pod')];
  testbed.veth(
    { namespace: node, ifname: 'pod0' },
    { namespace: pod, ifname: 'eth0', mac: POD_MAC, addresses: ['10.81.0.2/24', 'fd81::2/64'] },
  );
  for (const family of families) {
    pod.ip('addr', 'add', `${its[family].taken}/${family === 4 ? 32 : 128}`, 'dev', 'lo');
  }
  hostIfindex = ifindexOf(node, 'pod0');
  podIfindex = ifindexOf(pod, 'eth0');
  inPod = new Runner(testbed, pod);
  onNode = new Runner(testbed, node);
  nsid = await onNode.netnsId(pod);
  endpoint = new Endpoint(testbed, pod, 'pod');
  for (const wanted of [PORTS.outbound, PORTS.inboundPlaintext, PORTS.inboundHBONE]) {
    await endpoint.listen(wanted, PROXY_MARK);
  }
  for (const other of [APP, UNMARKED]) await endpoint.listen(other);
});
afterAll(() => testbed?.close());

interface Enrolment {
  flags?: string[];
  ports?: Partial<typeof PORTS>;
  id?: number;
}

function enrol({ flags = ['STRICT'], ports = {}, id = ID }: Enrolment = {}): void {
  const bits = ['ENROLLED', 'IN_POD', ...flags].reduce(
    (sum, name) => sum | (native.flags[`INTERFACE_${name}`] ?? 0),
    0,
  );
  native.putInterface(state, id, {
    podMac: POD_MAC,
    gatewayMac: GATEWAY_MAC,
    flags: bits,
    podIfindex,
    nsid,
    master: 0,
    ports: { ...PORTS, ...ports },
    address4: mapped(its[4].pod),
    address6: mapped(its[6].pod),
  });
  for (const family of families) {
    native.putEndpoint(state, mapped(its[family].pod), { ifindex: id, flags: bits, podMac: POD_MAC }, false);
  }
}

beforeEach(() => {
  native.deleteDirectFlows(state, ID);
  native.deleteDirectFlows(state, hostIfindex);
  native.deleteExclusions(state, ID);
  native.deleteInterface(state, hostIfindex);
  enrol();
});

interface Skb {
  mark?: number;
  ingressIfindex?: number;
  id?: number;
}

async function run(program: string, packet: Uint8Array, skb: Skb = {}) {
  const host = program === 'inpod_sign' || program === 'inpod_guard';
  const id = host ? hostIfindex : (skb.id ?? ID);
  native.deleteCounters(state, id);
  const result = await (host ? onNode : inPod).testRun({
    path: join(directory, 'programs/test', program),
    packet,
    skb: {
      mark: skb.mark ?? FOREIGN,
      ingressIfindex: skb.ingressIfindex ?? 0,
      ifindex: host ? hostIfindex : podIfindex,
      interfaceId: host ? 0 : id,
    },
  });
  const counted = native.counters(state).filter((one) => one.ifindex === id && one.program === program);
  return {
    verdict: result.verdict,
    reason: counted.map(({ reason, packets }) => (packets === 1n ? reason : `${packets} ${reason}`)).join() || null,
    destination: macText(result.packet.subarray(0, 6)),
    source: macText(result.packet.subarray(6, 12)),
    mark: result.mark,
  };
}

const PASS = VERDICT.PASS;
const DROP = VERDICT.DROP;
const looped = (reason: string) => ({
  verdict: VERDICT.REDIRECT,
  reason,
  destination: POD_MAC,
  source: POD_MAC,
  mark: MARKS.tproxy,
});

describe.each(families)('IPv%i', (family) => {
  const { pod, taken, outside, istio, loopback } = its[family];
  const fromPod = (fields: TcpFields = {}, to: End = { address: outside, port: 80 }, from?: End) =>
    tcpFrame(out, from ?? { address: pod, port: nextPort() }, to, fields);
  const toPod = (fields: TcpFields = {}, wire = within, from?: End, to?: End) =>
    tcpFrame(wire, from ?? { address: outside, port: nextPort() }, to ?? { address: pod, port: APP }, fields);

  describe('inpod_egress', () => {
    test('a SYN is looped to its own ingress', async () => {
      expect(await run('inpod_egress', fromPod())).toEqual(looped('redirected_outbound'));
    });

    test.each([
      ['nobody listens', { ports: { outbound: DEAF } }, DROP, 'drop_no_listener'],
      ['only somebody else’s listener', { ports: { outbound: UNMARKED } }, DROP, 'drop_no_listener'],
      ['open', { flags: ['POLICY_OPEN'], ports: { outbound: DEAF } }, PASS, 'pass_failure_policy_open'],
      ['draining', { flags: ['DRAINING'] }, PASS, 'pass_draining'],
      ['not wanted', { flags: ['NO_OUTBOUND'] }, PASS, 'pass_not_wanted'],
    ] as [string, Enrolment, number, string][])('a SYN, %s', async (_, enrolment, verdict, reason) => {
      enrol(enrolment);
      expect(await run('inpod_egress', fromPod())).toMatchObject({ verdict, reason, mark: FOREIGN });
    });

    test('closedAction reset: the RST goes back into the pod', async () => {
      enrol({ flags: ['STRICT', 'CLOSED_RESET'], ports: { outbound: DEAF } });
      expect(await run('inpod_egress', fromPod())).toEqual(looped('reset_no_listener'));
    });

    test('what was let go direct stays so', async () => {
      enrol({ flags: ['STRICT', 'POLICY_OPEN'], ports: { outbound: DEAF } });
      const from = { address: pod, port: nextPort() };
      const to = { address: outside, port: 80 };
      await run('inpod_egress', fromPod({}, to, from));
      enrol();
      const data = fromPod({ flags: ACK, payload: Buffer.from('x') }, to, from);
      expect(await run('inpod_egress', data)).toMatchObject({ verdict: PASS, reason: 'pass_direct' });
    });

    test('the proxy’s end of a connection is here: looped', async () => {
      const from = { address: pod, port: nextPort() };
      await endpoint.connect(taken, APP, { source: pod, sourcePort: from.port });
      const data = fromPod({ flags: ACK }, { address: taken, port: APP }, from);
      expect(await run('inpod_egress', data)).toEqual(looped('to_proxy_established'));
    });

    test('its proxy died: looped for its RST, or by the policy', async () => {
      const from = { address: pod, port: nextPort() };
      const to = { address: outside, port: 80 };
      await run('inpod_egress', fromPod({}, to, from));
      const data = fromPod({ flags: ACK }, to, from);
      expect(await run('inpod_egress', data)).toEqual(looped('to_proxy_orphaned'));
      enrol({ ports: { outbound: DEAF } });
      expect(await run('inpod_egress', data)).toMatchObject({ verdict: DROP, reason: 'drop_no_listener' });
    });

    test('a segment that nobody knows', async () => {
      expect(await run('inpod_egress', fromPod({ flags: ACK }))).toMatchObject({
        verdict: DROP,
        reason: 'drop_orphaned_flow',
      });
      enrol({ flags: [] });
      expect(await run('inpod_egress', fromPod({ flags: ACK }))).toMatchObject({
        verdict: PASS,
        reason: 'pass_no_proxy_socket',
      });
    });

    test('the proxy’s own', async () => {
      const result = await run('inpod_egress', fromPod(), { mark: PROXY_MARK });
      expect(result).toMatchObject({ verdict: PASS, reason: 'pass_proxy_own', mark: PROXY_MARK });
    });

    test('a source that is not the pod’s, and loopback', async () => {
      for (const address of [outside, loopback]) {
        const frame = fromPod({}, { address: outside, port: 80 }, { address, port: 1 });
        expect(await run('inpod_egress', frame)).toMatchObject({ verdict: DROP, reason: 'drop_spoofed_source' });
      }
    });

    test('an interface that is not known is nobody’s', async () => {
      expect(await run('inpod_egress', fromPod(), { id: 77 })).toMatchObject({ verdict: PASS, reason: null });
    });
  });

  describe('inpod_ingress', () => {
    const LOOPED = { mark: MARKS.tproxy };
    const toTaken = (fields: TcpFields, from: End) => tcpFrame(own, from, { address: taken, port: APP }, fields);

    test('a looped SYN gets the listener, a looped segment its connection', async () => {
      const frame = tcpFrame(own, { address: pod, port: nextPort() }, { address: outside, port: 80 });
      expect(await run('inpod_ingress', frame, LOOPED)).toMatchObject({
        verdict: PASS,
        reason: 'proxy_assigned',
        mark: MARKS.tproxy,
      });
      const from = { address: pod, port: nextPort() };
      await endpoint.connect(taken, APP, { source: pod, sourcePort: from.port });
      expect(await run('inpod_ingress', toTaken({ flags: ACK }, from), LOOPED)).toMatchObject({
        verdict: PASS,
        reason: 'proxy_delivered',
      });
    });

    test('the mark alone is no loop, and marks from outside are cleared', async () => {
      for (const mark of [MARKS.tproxy, FOREIGN]) {
        expect(await run('inpod_ingress', toPod(), { mark })).toMatchObject({
          verdict: PASS,
          reason: 'redirected_inbound',
          mark: 0,
        });
      }
    });

    test.each([
      ['nobody listens', { ports: { inboundPlaintext: DEAF } }, DROP, 'drop_no_listener'],
      ['somebody else listens', { ports: { inboundPlaintext: UNMARKED } }, DROP, 'drop_no_listener'],
      ['open', { flags: ['POLICY_OPEN'], ports: { inboundPlaintext: DEAF } }, PASS, 'pass_failure_policy_open'],
      ['draining', { flags: ['DRAINING'] }, PASS, 'pass_draining'],
      ['not wanted', { flags: ['NO_PLAINTEXT'] }, PASS, 'pass_not_wanted'],
    ] as [string, Enrolment, number, string][])('a SYN, %s', async (_, enrolment, verdict, reason) => {
      enrol(enrolment);
      expect(await run('inpod_ingress', toPod())).toMatchObject({ verdict, reason, mark: 0 });
    });

    test('15008 is reached by itself', async () => {
      const frame = toPod({}, within, undefined, { address: pod, port: PORTS.inboundHBONE });
      expect(await run('inpod_ingress', frame)).toMatchObject({ verdict: PASS, reason: 'proxy_delivered' });
    });

    test('what comes for somebody else, from the pod itself, or for loopback', async () => {
      const other = toPod({}, { source: GATEWAY_MAC, destination: ELSEWHERE_MAC });
      expect(await run('inpod_ingress', other)).toMatchObject({ verdict: PASS, reason: 'pass_other_host' });
      const itself = toPod({}, within, { address: pod, port: 1 });
      expect(await run('inpod_ingress', itself)).toMatchObject({ verdict: DROP, reason: 'drop_spoofed_source' });
      if (family === 6) return;
      const local = toPod({}, within, undefined, { address: loopback, port: PORTS.dns });
      expect(await run('inpod_ingress', local)).toMatchObject({ verdict: DROP, reason: 'drop_not_our_address' });
    });

    test('probes: by the sign, which is none where there is no host side, and by Istio’s address', async () => {
      const sign = macText(Uint8Array.from([...native.settings(state).sign, SIGN_PROBE]));
      const signed = toPod({}, { source: sign, destination: POD_MAC });
      expect(await run('inpod_ingress', signed)).toMatchObject({ reason: 'redirected_inbound' });
      enrol({ id: 4242 });
      expect(await run('inpod_ingress', signed, { id: 4242 })).toMatchObject({
        verdict: PASS,
        reason: 'pass_host_socket',
      });
      enrol();
      const from = toPod({}, within, { address: istio, port: nextPort() });
      expect(await run('inpod_ingress', from)).toMatchObject({ verdict: PASS, reason: 'pass_host_socket' });
    });

    test('a segment for a socket of the pod whose peer is the proxy comes from nobody', async () => {
      const from = { address: pod, port: nextPort() };
      await endpoint.connect(taken, APP, { source: pod, sourcePort: from.port });
      const forged = toPod({ flags: ACK, payload: Buffer.from('x') }, within, { address: taken, port: APP }, from);
      enrol({ flags: [] });
      expect(await run('inpod_ingress', forged)).toMatchObject({ verdict: DROP, reason: 'drop_orphaned_flow' });
    });
  });

  describe('the host’s side', () => {
    beforeEach(() => enrol({ id: hostIfindex }));

    test('inpod_sign: what was born here gets the sign, nothing else, and nobody brings it', async () => {
      const sign = macText(Uint8Array.from([...native.settings(state).sign, SIGN_PROBE]));
      expect(await run('inpod_sign', toPod())).toMatchObject({
        verdict: PASS,
        reason: 'pass_host_socket',
        source: sign,
      });
      expect(await run('inpod_sign', toPod(), { ingressIfindex: 1 })).toMatchObject({
        verdict: PASS,
        reason: null,
        source: GATEWAY_MAC,
      });
      const forged = toPod({}, { source: sign, destination: POD_MAC });
      expect(await run('inpod_sign', forged, { ingressIfindex: 1 })).toMatchObject({ reason: 'drop_forged_sign' });
      const from = toPod({}, within, { address: istio, port: 1 });
      expect(await run('inpod_sign', from, { ingressIfindex: 1 })).toMatchObject({ reason: 'drop_forged_sign' });
    });

    test('inpod_guard: only what the pod’s namespace accounts for', async () => {
      const data = { flags: ACK, payload: Buffer.from('x') };
      expect(await run('inpod_guard', fromPod())).toMatchObject({ verdict: DROP, reason: 'drop_unjudged' });
      expect(await run('inpod_guard', fromPod(data))).toMatchObject({ verdict: DROP, reason: 'drop_unjudged' });
      expect(await run('inpod_guard', fromPod({ flags: ACK }))).toMatchObject({ verdict: PASS, reason: null });
      // An unmarked connection of the pod's: its own segments are to be looped.
      const from = { address: pod, port: nextPort() };
      await endpoint.connect(taken, APP, { source: pod, sourcePort: from.port });
      const unmarked = fromPod(data, { address: taken, port: APP }, from);
      expect(await run('inpod_guard', unmarked)).toMatchObject({ verdict: DROP, reason: 'drop_unjudged' });
      const marked = { address: pod, port: nextPort() };
      await endpoint.connect(taken, APP, { source: pod, sourcePort: marked.port, mark: PROXY_MARK });
      const proxys = fromPod(data, { address: taken, port: APP }, marked);
      expect(await run('inpod_guard', proxys)).toMatchObject({ verdict: PASS, reason: null });
    });
  });
});

describe('whose stub it is', () => {
  test('a stub says its id and goes on; where nothing is to go on to, it does as told', () => {
    const ids = [1, 0x7fffffff, 0x80000000, 0xffffffff];
    for (const program of ['inpod_egress', 'inpod_ingress', 'inpod_lookup'] as const) {
      expect(native.jumpTarget(state, program)).toBeGreaterThan(0);
      for (const id of ids) {
        const fd = native.loadStub(state, program, id, 'drop');
        expect(native.programInfo(fd).name).toBe(program);
        native.close(fd);
      }
    }
    native.deleteCounters(state, 0xfffffffe);
    const fd = native.loadStub(state, 'inpod_egress', 0xfffffffe, 'drop');
    const tagged = Buffer.concat([Buffer.alloc(12, 2), Buffer.from('81000000', 'hex'), Buffer.alloc(60)]);
    enrol({ id: 0xfffffffe });
    expect(native.testRun(fd, tagged).verdict).toBe(DROP);
    native.close(fd);
    const counted = native.counters(state).filter(({ ifindex }) => ifindex === 0xfffffffe);
    expect(counted).toMatchObject([{ program: 'inpod_egress', reason: 'drop_vlan_tagged', packets: 1n }]);
  });
});
