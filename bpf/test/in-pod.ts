// SPDX-License-Identifier: Apache-2.0
// The programs of the in-pod contract, one packet at a time. What needs a socket that a packet comes from is in
// conformance/e2e/inpod*.

import { join } from 'node:path';
import { describe, test } from 'vitest';
import { until } from '../../conformance/netns.ts';
import type { ExclusionRule } from '../../plugin/native.ts';
import {
  ACK,
  type End,
  FIN,
  fragmentHeader,
  type IPFields,
  IPPROTO_ICMP,
  IPPROTO_ICMPV6,
  IPPROTO_TCP,
  IPPROTO_UDP,
  icmpMessage,
  ipFrame,
  ipPacket,
  mac,
  macText,
  mapped,
  RST,
  SYN,
  type TcpFields,
  tcpFrame,
  tcpSegment,
  udpDatagram,
  type Wire,
} from './frames.ts';
import {
  APP,
  its as addresses,
  DEAF,
  DNS_OF,
  ELSEWHERE_MAC,
  type Enrolment,
  GATEWAY_MAC,
  ID,
  type InPodDatapath,
  out,
  own,
  POD_MAC,
  PORTS,
  PROXY_MARK,
  SIGN_PROBE,
  UNMARKED,
  within,
} from './in-pod-node.ts';
import { forgetListeners, inPodLookup } from './lookup.ts';
import { drop, type Family, families, MARKS, type Outcome, pass, VERDICT } from './node.ts';
import { NOT_TCP, notTcp, readable, TAGGED, tagged, unreadable } from './parse-cases.ts';

const LOOPED = { mark: MARKS.tproxy };
const LO = '00:00:00:00:00:00';
/** Of lo's MACs, which are zero. */
const toLo: Wire = { source: LO, destination: LO };
/** One byte for each 32-bit word of the header. */
const PAYLOAD = { payload: Buffer.from('hello') };
const SYN_WITH_PAYLOAD = { flags: SYN, ...PAYLOAD };

/** To its own ingress. */
const looped = (reason: string, frame?: Uint8Array): Outcome => ({
  verdict: VERDICT.REDIRECT,
  reason,
  destination: POD_MAC,
  source: POD_MAC,
  mark: MARKS.tproxy,
  ...(frame && { frame }),
});

/** The two or more fragments of one datagram or segment, cut at `cuts`. */
function pieces(
  family: Family,
  wire: Wire,
  from: End,
  to: End,
  protocol: number,
  whole: Buffer,
  cuts: number[],
  id = 1,
): Buffer[] {
  return [0, ...cuts].map((start, index) => {
    const end = cuts[index] ?? whole.length;
    const more = end < whole.length;
    const fields: IPFields =
      family === 4 ? { fragmentOffset: start, moreFragments: more, id } : { extensions: [fragmentHeader(start, more)] };
    const frame = ipFrame(wire, ipPacket(from.address, to.address, protocol, whole.subarray(start, end), fields));
    if (family === 6) frame.writeUInt32BE(id, 14 + 40 + 4);
    return frame;
  });
}

function udpFrame(wire: Wire, from: End, to: End, fields: IPFields = {}): Buffer {
  return ipFrame(wire, ipPacket(from.address, to.address, IPPROTO_UDP, udpDatagram(from, to), fields));
}

function portRule(kind: 'inbound_port' | 'outbound_port', port: number): ExclusionRule {
  return {
    kind,
    value: Uint8Array.from({ length: 16 }, (_, i) => [port >> 8, port & 0xff][i] ?? 0),
    length: 16,
    excluded: true,
  };
}

export function inPod(datapath: () => InPodDatapath): void {
  const check =
    (program: Parameters<InPodDatapath['check']>[0]) =>
    (...rest: [Uint8Array, Outcome, Parameters<InPodDatapath['check']>[3]?]) =>
      datapath().check(program, ...rest);
  const egress = check('inpod_egress');
  const ingress = check('inpod_ingress');
  const sign = check('inpod_sign');
  const guard = check('inpod_guard');
  const enrol = (enrolment?: Enrolment) => datapath().enrol(enrolment);
  const nextPort = () => datapath().node.port();
  const signed = (meaning = SIGN_PROBE): Wire => ({
    source: macText(Uint8Array.from([...datapath().sign, meaning])),
    destination: POD_MAC,
  });
  inPodLookup(datapath);

  let fragment = 100;
  const nextId = () => {
    fragment += 1;
    return fragment;
  };

  describe.each(families)('in-pod, IPv%i', (family) => {
    const its = addresses[family];
    const { pod, taken, outside } = its;
    const web: End = { address: outside, port: 80 };
    const mine = (address: string = pod): End => ({ address, port: nextPort() });
    const fromPod = (fields: TcpFields = {}, to: End = web, from: End = mine()) => tcpFrame(out, from, to, fields);
    const toPod = (
      fields: TcpFields = {},
      wire: Wire = within,
      from: End = { address: outside, port: nextPort() },
      to: End = { address: pod, port: APP },
    ) => tcpFrame(wire, from, to, fields);
    /** A connection inside the pod, of which one end has an outside address: as the proxy's. */
    const proxied = async (mark = 0): Promise<[client: End, server: End]> => {
      const client = mine();
      await datapath().node.endpoint.connect(taken, APP, { source: pod, sourcePort: client.port, mark });
      return [client, { address: taken, port: APP }];
    };
    /** A connection of the pod's with somebody outside. */
    const connected = async (mark = 0): Promise<[client: End, server: End]> => {
      const client = mine();
      await datapath().node.endpoint.connect(its.node, APP, { source: pod, sourcePort: client.port, mark });
      return [client, { address: its.node, port: APP }];
    };
    const icmp = (from: string, to: string, quoted: Uint8Array) =>
      ipPacket(
        from,
        to,
        family === 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6,
        icmpMessage(from, to, family === 4 ? 3 : 2, quoted, family === 4 ? 4 : 0, 1400),
      );

    describe('inpod_egress', () => {
      describe('frames', () => {
        const ends: [End, End] = [
          { address: pod, port: 19_999 },
          { address: outside, port: 443 },
        ];
        test.each(notTcp(family, out, ...ends))('$name passes', ({ frame }) => egress(frame, NOT_TCP));
        test.each(unreadable(family, out, ...ends))('$name: $outcome.reason', ({ frame, outcome }) =>
          egress(frame, outcome),
        );
        test.each(tagged(out, ...ends))('$name: dropped', ({ frame }) => egress(frame, TAGGED));
        test.each(readable(family, out, ...ends, SYN))('a SYN with $name is looped', ({ frame }) =>
          egress(frame, looped('redirected_outbound')),
        );
        test('an ICMP error about TCP passes', () =>
          egress(
            ipFrame(out, icmp(pod, outside, ipPacket(outside, pod, IPPROTO_TCP, tcpSegment(web, mine())))),
            NOT_TCP,
          ));
        if (family === 6) {
          test.each([
            ['fe80::2', outside],
            [pod, 'fe80::1'],
          ])('link-local addresses pass: %s to %s', (from, to) =>
            egress(fromPod({}, { address: to, port: 80 }, mine(from)), pass('pass_link_local')),
          );
        }
      });

      test('an interface that is not known is nobody’s', () => egress(fromPod(), pass(null), { id: 77 }));

      test('a SYN is looped to its own ingress, from each of the pod’s addresses', async () => {
        await egress(fromPod(), looped('redirected_outbound'));
        await egress(fromPod({}, web, mine(its.second)), looped('redirected_outbound'));
      });

      test.each([
        ['nobody listens', { ports: { outbound: DEAF } }, drop('drop_no_listener')],
        ['none is wanted', { ports: { outbound: 0 } }, drop('drop_no_listener')],
        ['only somebody else’s listener', { ports: { outbound: UNMARKED } }, drop('drop_no_listener')],
        ['open', { flags: ['POLICY_OPEN'], ports: { outbound: DEAF } }, pass('pass_failure_policy_open')],
        ['draining', { flags: ['DRAINING'] }, pass('pass_draining')],
        ['not wanted', { flags: ['NO_OUTBOUND'] }, pass('pass_not_wanted')],
        ['inbound not wanted', { flags: ['NO_PLAINTEXT', 'NO_HBONE'] }, looped('redirected_outbound')],
        [
          'no other listener',
          { ports: { inboundPlaintext: DEAF, inboundHBONE: DEAF, dns: DEAF } },
          looped('redirected_outbound'),
        ],
      ] as [string, Enrolment, Outcome][])('a SYN, %s', async (_, enrolment, outcome) => {
        enrol(enrolment);
        const flow: [End, End] = [web, mine()];
        await egress(fromPod({}, ...flow), outcome);
        if (outcome.verdict !== VERDICT.PASS) return;
        // What was let go direct stays so.
        enrol();
        await egress(fromPod({ flags: ACK, ...PAYLOAD }, ...flow), pass('pass_direct'));
      });

      test('a SYN that a rule excludes, and later segments of it', async () => {
        const flow: [End, End] = [web, mine()];
        datapath().exclude(portRule('outbound_port', web.port), portRule('inbound_port', 22));
        await egress(fromPod({}, ...flow), pass('pass_excluded_port'));
        await egress(fromPod({}, { ...web, port: 22 }), looped('redirected_outbound'));
        await egress(fromPod({}, { ...web, port: 22 }, { ...mine(), port: 22 }), looped('redirected_outbound'));
        // One that is older than the rule, of either direction.
        await egress(fromPod({ flags: ACK }), pass('pass_excluded_port'));
        await egress(
          fromPod({ flags: ACK }, { ...web, port: 23 }, { address: pod, port: 22 }),
          pass('pass_excluded_port'),
        );
        await egress(fromPod({ flags: ACK }, { ...web, port: 22 }), drop('drop_orphaned_flow'));
        datapath().exclude();
        await egress(fromPod({ flags: ACK }, ...flow), pass('pass_direct'));
      });

      test('closedAction reset: the RST goes back into the pod', async () => {
        enrol({ flags: ['STRICT', 'CLOSED_RESET'], ports: { outbound: DEAF } });
        const from = mine();
        const answer = tcpFrame(
          own,
          web,
          from,
          { flags: RST | ACK, seq: 0, ack: 0x12345679, window: 0 },
          { id: 0, dontFragment: true },
        );
        await egress(fromPod({}, web, from), looped('reset_no_listener', answer));
      });

      test('a RST that the bypass mark is on and that a socket sends is judged', () =>
        egress(fromPod({ flags: RST }), drop('drop_orphaned_flow'), { mark: MARKS.bypass }));

      test('the proxy’s end of a connection is here: looped', async () => {
        const [client, server] = await proxied();
        await egress(fromPod({ flags: ACK }, server, client), looped('to_proxy_established'));
        await egress(fromPod({ flags: ACK, ...PAYLOAD }, server, client), looped('to_proxy_established'));
      });

      test('its proxy died: looped for its RST, or by the policy', async () => {
        const flow: [End, End] = [web, mine()];
        await egress(fromPod({}, ...flow), looped('redirected_outbound'));
        await egress(fromPod({ flags: ACK }, ...flow), looped('to_proxy_orphaned'));
        enrol({ ports: { outbound: DEAF } });
        await egress(fromPod({ flags: ACK }, ...flow), drop('drop_no_listener'));
        enrol({ flags: ['STRICT', 'POLICY_OPEN'], ports: { outbound: DEAF } });
        await egress(fromPod({ flags: ACK }, ...flow), pass('pass_failure_policy_open'));
        enrol();
        await egress(fromPod({ flags: ACK }, ...flow), pass('pass_direct'));
        // Until it begins anew.
        await egress(fromPod({}, ...flow), looped('redirected_outbound'));
        await egress(fromPod({ flags: ACK }, ...flow), looped('to_proxy_orphaned'));
      });

      test('another pod’s flow of the same tuple is not this one’s', async () => {
        const flow: [End, End] = [web, mine()];
        enrol({ id: 4242 });
        await egress(fromPod({}, ...flow), looped('redirected_outbound'), { id: 4242 });
        enrol();
        await egress(fromPod({ flags: ACK }, ...flow), drop('drop_orphaned_flow'));
      });

      test('a segment that nobody knows', async () => {
        await egress(fromPod({ flags: ACK }), drop('drop_orphaned_flow'));
        enrol({ flags: [] });
        await egress(fromPod({ flags: ACK }), pass('pass_no_proxy_socket'));
      });

      test.each([PROXY_MARK, 0x1539, 0xfffff539])('the proxy’s own by its mark %i, segments too', async (mark) => {
        for (const flags of [SYN, ACK]) await egress(fromPod({ flags }), pass('pass_proxy_own'), { mark });
        await egress(udpFrame(out, mine(), { ...web, port: 53 }), NOT_TCP, { mark });
      });
      test.each([0x538, 0x439, 0x139, 0])('not by the mark %i', (mark) =>
        egress(fromPod(), looped('redirected_outbound'), { mark }),
      );

      test('where cgroups are checked: by the mark and the cgroup, none without the other', async () => {
        const { node, state } = datapath();
        node.native.setCheckCgroups(state, true);
        const mark = PROXY_MARK;
        node.native.deleteProxyCgroup(state, node.cgroup);
        await egress(fromPod(), looped('redirected_outbound'), { mark });
        await egress(fromPod({ flags: ACK }), drop('drop_orphaned_flow'), { mark });
        node.native.putProxyCgroup(state, node.cgroup + 4096n);
        await egress(fromPod(), looped('redirected_outbound'), { mark });
        node.native.putProxyCgroup(state, node.cgroup);
        await egress(fromPod(), pass('pass_proxy_own'), { mark });
        await egress(fromPod(), looped('redirected_outbound'));
      });

      test('a source that is not the pod’s, and loopback', async () => {
        for (const address of [outside, its.loopback]) {
          const from = { address, port: 1 };
          await egress(fromPod({}, web, from), drop('drop_spoofed_source'));
          await egress(fromPod({ flags: ACK }, web, from), drop('drop_spoofed_source'));
        }
        const udp = udpFrame(out, { address: its.loopback, port: 1 }, web);
        await egress(udp, drop('drop_spoofed_source'));
      });

      test('an address that only the pod knows of may answer on a flow that went direct', async () => {
        enrol({ flags: ['DRAINING'] });
        const [client, vip] = [
          { address: outside, port: nextPort() },
          { address: taken, port: 1 },
        ];
        await ingress(toPod({}, within, client, vip), pass('pass_draining', 0));
        enrol();
        await egress(fromPod({ flags: SYN | ACK }, client, vip), pass('pass_direct'));
        await egress(fromPod({ flags: SYN | ACK }, client, { ...vip, port: 2 }), drop('drop_spoofed_source'));
      });

      test('an address that only the pod knows of answers the proxy’s end of a connection, and nobody else', async () => {
        const { node, state } = datapath();
        const client = mine(its.second);
        const vip = { address: taken, port: APP };
        await node.endpoint.connect(taken, APP, { source: client.address, sourcePort: client.port });
        // The client's address is the pod's own: no proxy speaks from that.
        await egress(fromPod({ flags: ACK }, client, vip), drop('drop_spoofed_source'));
        node.native.deleteEndpoint(state, mapped(client.address));
        for (const flags of [ACK, SYN | ACK]) {
          await egress(fromPod({ flags }, client, vip), looped('to_proxy_established'));
        }
        await egress(fromPod({ flags: ACK }, mine(its.second), vip), drop('drop_spoofed_source'));
        await egress(fromPod({}, client, vip), drop('drop_spoofed_source'));
      });

      test('the ACK of a SYN cookie is looped, any other is not', async () => {
        const { node, state } = datapath();
        // As if the pod had the address from which the listener that makes the cookie is asked.
        const client = { address: its.node, port: nextPort() };
        const server = { address: pod, port: APP };
        const record = { ifindex: ID, flags: 0, podMac: POD_MAC };
        node.native.putEndpoint(state, mapped(client.address), record, false);
        try {
          const numbers = cookie(node, family, client, server, PORTS.outbound);
          const ack = (fields: TcpFields) => fromPod({ flags: ACK, ...numbers, ...fields }, server, client);
          await egress(ack({}), looped('to_proxy_cookie'));
          await egress(ack({ seq: numbers.seq + 1 }), drop('drop_orphaned_flow'));
          await egress(ack({ flags: ACK | FIN | SYN }), drop('drop_orphaned_flow'));
          enrol({ flags: ['STRICT', 'DNS'] });
          await egress(ack({}), looped('to_proxy_cookie'));
          enrol({ ports: { outbound: 0 } });
          await egress(ack({}), drop('drop_orphaned_flow'));
          enrol({ ports: { outbound: UNMARKED } });
          await egress(ack({}), drop('drop_orphaned_flow'));
        } finally {
          node.native.deleteEndpoint(state, mapped(client.address));
        }
      });

      describe('fragments', () => {
        const segment = (from: End, to: End) => tcpSegment(from, to, { flags: ACK, payload: Buffer.alloc(60, 7) });
        const cut = (from: End, to: End, id = nextId()) =>
          pieces(family, out, from, to, IPPROTO_TCP, segment(from, to), [32, 56], id);

        test('of the proxy’s connection: all are looped', async () => {
          const [client, server] = await proxied();
          for (const piece of cut(client, server)) await egress(piece, looped('to_proxy_established'));
        });
        test('of what passes: all pass', async () => {
          const [first, ...later] = cut(mine(), web);
          const mark = PROXY_MARK;
          await egress(first ?? Buffer.alloc(0), pass('pass_proxy_own'), { mark });
          for (const piece of later) await egress(piece, pass('pass_fragment'), { mark });
        });
        test('of what was dropped, and before their first one: dropped', async () => {
          const [first, ...later] = cut(mine(), web);
          for (const piece of later) await egress(piece, drop('drop_fragment'));
          await egress(first ?? Buffer.alloc(0), drop('drop_orphaned_flow'));
          for (const piece of later) await egress(piece, drop('drop_fragment'));
        });
        test('later ones from a loopback address', async () => {
          const from = { address: its.loopback, port: 1 };
          const [, tcp] = cut(from, web);
          await egress(tcp ?? Buffer.alloc(0), drop('drop_spoofed_source'));
          const [, udp] = pieces(
            family,
            out,
            from,
            web,
            IPPROTO_UDP,
            udpDatagram(from, web, Buffer.alloc(60)),
            [32],
            nextId(),
          );
          await egress(udp ?? Buffer.alloc(0), drop('drop_spoofed_source'));
        });
      });

      describe('DNS', () => {
        const resolver = { address: outside, port: 53 };
        const listener = { address: its.loopback, port: PORTS.dns };
        const capture = (enrolment: Enrolment = {}) =>
          enrol({ ...enrolment, flags: ['STRICT', 'DNS', ...(enrolment.flags ?? [])] });
        /** As the listener gets it: from the resolver to its own loopback address. */
        const captured = (from: End, reason = 'dns_captured'): Outcome => {
          const frame = udpFrame(family === 4 ? own : toLo, { address: outside, port: from.port }, listener);
          return family === 4 ? looped(reason, frame) : { ...looped(reason, frame), source: LO, destination: LO };
        };
        const capturedTcp = (from: End, fields: TcpFields, reason: string, asked: string = outside): Outcome => {
          const frame = tcpFrame(family === 4 ? own : toLo, { address: asked, port: from.port }, listener, fields);
          return family === 4 ? looped(reason, frame) : { ...looped(reason, frame), source: LO, destination: LO };
        };
        const ask = (from: End, to: End = resolver, fields: IPFields = {}) => udpFrame(out, from, to, fields);
        /** What the listener sends, and what it becomes. */
        const answer = (to: End) => udpFrame(out, listener, to);

        test('a query goes to the listener, its answer comes from the resolver to who asked', async () => {
          capture();
          for (const address of [pod, its.second, pod]) {
            const from = { address, port: 30_000 };
            await egress(ask(from), captured(from));
            const wanted = udpFrame(own, resolver, from);
            await egress(answer({ address: outside, port: from.port }), looped('dns_answered', wanted), {
              mark: PROXY_MARK,
            });
          }
        });

        test('only to port 53, only where it is asked for, and no fragments', async () => {
          await egress(ask(mine()), NOT_TCP);
          capture();
          await egress(ask(mine(), { ...resolver, port: 54 }), NOT_TCP);
          const more: IPFields = family === 4 ? { moreFragments: true } : { extensions: [fragmentHeader(0, true)] };
          await egress(ask(mine(), resolver, more), NOT_TCP);
        });

        test.each([
          ['draining', { flags: ['DRAINING'] }, pass('pass_draining')],
          ['nobody listens', { ports: { dns: DEAF } }, drop('drop_no_listener')],
          ['none is wanted', { ports: { dns: 0 } }, drop('drop_no_listener')],
          ['somebody else listens', { ports: { dns: UNMARKED } }, drop('drop_no_listener')],
          ['open', { flags: ['POLICY_OPEN'], ports: { dns: DEAF } }, pass('pass_failure_policy_open')],
        ] as [string, Enrolment, Outcome][])('%s', async (_, enrolment, outcome) => {
          capture(enrolment);
          await egress(ask(mine()), outcome);
        });

        test('a listener of the other family alone', async () => {
          capture({ ports: { dns: DNS_OF[family === 4 ? 6 : 4] } });
          await egress(ask(mine()), drop('drop_no_listener'));
        });

        test('excluded or spoofed', async () => {
          capture();
          await egress(ask({ address: outside, port: 1 }), drop('drop_spoofed_source'));
          datapath().exclude(portRule('outbound_port', 53));
          await egress(ask(mine()), pass('pass_excluded_port'));
        });

        test('what comes from loopback is an answer only if the listener sent it', async () => {
          capture();
          const to = { address: outside, port: 30_001 };
          await egress(answer(to), drop('drop_spoofed_source'));
          const mark = PROXY_MARK;
          await egress(udpFrame(out, { ...listener, port: 15054 }, to), drop('drop_spoofed_source'), { mark });
          capture({ ports: { dns: 0 } });
          await egress(udpFrame(out, { ...listener, port: 0 }, to), drop('drop_spoofed_source'), { mark });
        });

        test('what ends before its checksum cannot be changed: dropped', async () => {
          capture();
          const failed = drop('drop_redirect_failed');
          const cut = (protocol: number, from: End, to: End, whole: Buffer, length: number) =>
            ipFrame(out, ipPacket(from.address, to.address, protocol, whole.subarray(0, length)));
          const from = mine();
          await egress(cut(IPPROTO_UDP, from, resolver, udpDatagram(from, resolver), 7), failed);
          await egress(cut(IPPROTO_TCP, from, resolver, tcpSegment(from, resolver), 16), failed);
          const to = { address: outside, port: from.port };
          await egress(cut(IPPROTO_UDP, listener, to, udpDatagram(listener, to), 7), failed, { mark: PROXY_MARK });
        });

        test('an answer in fragments: all of them come from the resolver', async () => {
          capture();
          const from = { address: its.second, port: 30_002 };
          await egress(ask(from), captured(from));
          const [to, payload, id] = [{ address: outside, port: from.port }, Buffer.alloc(60, 3), nextId()];
          const cut = (wire: Wire, source: End, target: End) =>
            pieces(family, wire, source, target, IPPROTO_UDP, udpDatagram(source, target, payload), [32, 56], id);
          const wanted = cut(own, resolver, from);
          for (const [index, piece] of cut(out, listener, to).entries()) {
            await egress(piece, looped('dns_answered', wanted[index]), { mark: PROXY_MARK });
          }
        });

        test('over TCP: a SYN, and what follows when its connection is gone', async () => {
          capture({ flags: ['NO_OUTBOUND'], ports: { outbound: DEAF } });
          const from = mine();
          const send = (flags: number) => fromPod({ flags }, resolver, from);
          await egress(send(SYN), capturedTcp(from, { flags: SYN }, 'dns_captured'));
          await egress(send(ACK), capturedTcp(from, { flags: ACK }, 'to_proxy_orphaned'));
          await egress(fromPod({}, web), pass('pass_not_wanted'));
          capture({ ports: { dns: DEAF } });
          await egress(send(ACK), drop('drop_no_listener'));
          await egress(fromPod({}, resolver), drop('drop_no_listener'));
          enrol();
          await egress(fromPod({}, resolver), looped('redirected_outbound'));
        });

        test('over TCP: a segment of a connection that the listener has', async () => {
          capture();
          const from = mine();
          await datapath().node.endpoint.connect(its.loopback, PORTS.dns, { source: taken, sourcePort: from.port });
          const segment = { flags: ACK, ...PAYLOAD };
          await egress(
            fromPod(segment, { address: taken, port: 53 }, from),
            capturedTcp(from, segment, 'to_proxy_established', taken),
          );
          await egress(fromPod(segment, { address: taken, port: 54 }, from), drop('drop_orphaned_flow'));
          // Its answer.
          const answer = tcpFrame(out, listener, { address: taken, port: from.port }, segment);
          const wanted = tcpFrame(own, { address: taken, port: 53 }, from, segment);
          await egress(answer, looped('dns_answered', wanted), { mark: PROXY_MARK });
        });
      });
    });

    describe('inpod_ingress', () => {
      const toTaken = (fields: TcpFields, from: End) => tcpFrame(own, from, { address: taken, port: APP }, fields);
      const delivered = pass('proxy_delivered');

      describe('frames', () => {
        const ends: [End, End] = [
          { address: outside, port: 19_998 },
          { address: pod, port: APP },
        ];
        const cleared = (outcome: Outcome): Outcome => ({ ...outcome, mark: 0 });
        test.each(notTcp(family, within, ...ends))('$name passes', ({ frame }) => ingress(frame, cleared(NOT_TCP)));
        test.each(unreadable(family, within, ...ends))('$name: $outcome.reason', ({ frame, outcome }) =>
          ingress(frame, cleared(outcome)),
        );
        test.each(tagged(within, ...ends))('$name: dropped', ({ frame }) => ingress(frame, cleared(TAGGED)));
        test.each(readable(family, within, ...ends, SYN))('a SYN with $name gets the listener', ({ frame }) =>
          ingress(frame, pass('redirected_inbound', 0)),
        );
        test('an ICMP error about TCP passes', () =>
          ingress(
            ipFrame(within, icmp(outside, pod, ipPacket(pod, outside, IPPROTO_TCP, tcpSegment(mine(), web)))),
            pass('pass_not_tcp', 0),
          ));
        if (family === 6) {
          test('link-local addresses pass', () =>
            ingress(toPod({}, within, { address: 'fe80::1', port: 1 }), pass('pass_link_local', 0)));
        }
      });

      test('an interface that is not known is nobody’s', () => ingress(toPod(), pass(null), { id: 77 }));

      describe('what was looped', () => {
        test('a SYN gets the listener, whoever else listens there', async () => {
          await ingress(tcpFrame(own, mine(), web), pass('proxy_assigned'), LOOPED);
          await ingress(toTaken({}, mine()), pass('proxy_assigned'), LOOPED);
          await ingress(tcpFrame(own, mine(), web, { flags: ACK }), pass('proxy_assigned'), LOOPED);
        });
        test('no listener any more', async () => {
          enrol({ ports: { outbound: DEAF } });
          await ingress(tcpFrame(own, mine(), web), drop('drop_no_listener'), LOOPED);
        });
        test('a segment gets its connection, and so does what is for the pod itself', async () => {
          const [client] = await proxied();
          for (const flags of [ACK, SYN, FIN | ACK]) await ingress(toTaken({ flags }, client), delivered, LOOPED);
          for (const flags of [ACK, SYN, RST]) {
            await ingress(tcpFrame(own, web, mine(), { flags }), delivered, LOOPED);
          }
        });
        test('what is not TCP, and what is for loopback', async () => {
          await ingress(udpFrame(own, mine(), web), delivered, LOOPED);
          await ingress(tcpFrame(own, mine(), { address: its.loopback, port: PORTS.dns }), delivered, LOOPED);
        });
        test('a SYN whose tuple is in TIME_WAIT; an ACK is left to that', async () => {
          const { endpoint, pod: namespace } = datapath().node;
          const client = mine();
          const connection = await endpoint.connect(taken, APP, { source: pod, sourcePort: client.port });
          await endpoint.request(connection, 'quit\n');
          const filter = `( sport = :${APP} and dport = :${client.port} )`;
          await until('TIME_WAIT in the pod', () =>
            namespace.run(['ss', '-Htan', 'state', 'time-wait', filter]).includes(`:${client.port}`),
          );
          await ingress(toTaken({ flags: ACK }, client), delivered, LOOPED);
          await ingress(toTaken({}, client), pass('proxy_time_wait'), LOOPED);
        });
        test.each([0, 1, 2, 3, 4, 5])('by the mark, and a source MAC that is the pod’s: byte %i', async (byte) => {
          const source = mac(POD_MAC);
          source.writeUInt8((source[byte] ?? 0) ^ 1, byte);
          const frame = tcpFrame({ source: macText(source), destination: POD_MAC }, web, { address: pod, port: APP });
          await ingress(frame, pass('redirected_inbound', 0), LOOPED);
        });
        test('not by another mark', () =>
          ingress(tcpFrame(own, web, { address: pod, port: APP }), pass('redirected_inbound', 0), {
            mark: MARKS.bypass,
          }));
      });

      test.each([MARKS.tproxy, 0x1234, 0, PROXY_MARK])('marks from outside are cleared: %i', (mark) =>
        ingress(toPod(), pass('redirected_inbound', 0), { mark }),
      );

      test.each([
        ['nobody listens', { ports: { inboundPlaintext: DEAF } }, drop('drop_no_listener')],
        ['none is wanted', { ports: { inboundPlaintext: 0 } }, drop('drop_no_listener')],
        ['somebody else listens', { ports: { inboundPlaintext: UNMARKED } }, drop('drop_no_listener')],
        ['open', { flags: ['POLICY_OPEN'], ports: { inboundPlaintext: DEAF } }, pass('pass_failure_policy_open')],
        ['draining', { flags: ['DRAINING'] }, pass('pass_draining')],
        ['not wanted', { flags: ['NO_PLAINTEXT'] }, pass('pass_not_wanted')],
        ['others not wanted', { flags: ['NO_HBONE', 'NO_OUTBOUND'] }, pass('redirected_inbound')],
        ['no other listener', { ports: { outbound: DEAF, inboundHBONE: DEAF } }, pass('redirected_inbound')],
      ] as [string, Enrolment, Outcome][])('a SYN, %s', async (_, enrolment, outcome) => {
        enrol(enrolment);
        const client = { address: outside, port: nextPort() };
        await ingress(toPod({}, within, client), { ...outcome, mark: 0 });
        enrol();
        const later = outcome.reason === 'redirected_inbound' ? 'to_proxy_orphaned' : 'pass_direct';
        await ingress(
          toPod({ flags: ACK }, within, client),
          outcome.verdict === VERDICT.DROP ? drop('drop_orphaned_flow') : pass(later),
          { mark: 0 },
        );
      });

      test('closedAction reset: the RST leaves the pod', async () => {
        enrol({ flags: ['STRICT', 'CLOSED_RESET'], ports: { inboundPlaintext: DEAF } });
        const client = { address: outside, port: nextPort() };
        const answer = tcpFrame(
          out,
          { address: pod, port: APP },
          client,
          { flags: RST | ACK, seq: 0, ack: 0x12345679, window: 0 },
          { id: 0, dontFragment: true },
        );
        // A test run's packet has a socket, as the node's own: a clone of it leaves. Others: in-pod-hooks.test.ts.
        await ingress(toPod({}, within, client), {
          verdict: VERDICT.DROP,
          reason: 'reset_no_listener',
          mark: MARKS.bypass,
          frame: answer,
        });
      });

      test('a listener too many to pick: dropped', async () => {
        const d = datapath();
        const { native } = d.node;
        const id = 0x80005000;
        const outcomes = { verdict: VERDICT.DROP, reason: 'drop_redirect_failed', mark: 0 };
        const capacity = native.mapUsage(d.state).find(({ map }) => map === 'listeners')?.capacity ?? 0;
        forgetListeners(d);
        try {
          // Each under the id of another interface.
          for (let other = 0; other < capacity; other++) {
            native.deleteInterface(d.state, id + other - 1);
            enrol({ id: id + other });
            await ingress(toPod(), pass('redirected_inbound', 0), { id: id + other });
          }
          native.deleteInterface(d.state, id + capacity - 1);
          enrol({ id: id + capacity });
          await ingress(toPod(), outcomes, { id: id + capacity });
          native.deleteInterface(d.state, id + capacity);
        } finally {
          forgetListeners(d);
        }
      });

      test('an excluded port', async () => {
        datapath().exclude(portRule('inbound_port', APP), portRule('outbound_port', 22));
        await ingress(toPod(), pass('pass_excluded_port', 0));
        await ingress(toPod({}, within, undefined, { address: pod, port: 22 }), pass('redirected_inbound', 0));
        await ingress(toPod({ flags: ACK }), pass('pass_excluded_port', 0));
      });

      describe('15008', () => {
        const hbone = (fields: TcpFields = {}) =>
          toPod(fields, within, undefined, { address: pod, port: PORTS.inboundHBONE });
        test('is reached by itself, segments too', async () => {
          for (const flags of [SYN, ACK]) await ingress(hbone({ flags }), pass('proxy_delivered', 0));
        });
        test.each([
          [
            'nobody listens on another',
            { ports: { inboundPlaintext: DEAF, outbound: DEAF } },
            pass('proxy_delivered', 0),
          ],
          ['not wanted', { flags: ['NO_HBONE'] }, pass('pass_not_wanted', 0)],
          ['another port not wanted', { flags: ['NO_PLAINTEXT'] }, pass('proxy_delivered', 0)],
          [
            'is plaintext where there is no such listener',
            { ports: { inboundHBONE: 0 } },
            pass('redirected_inbound', 0),
          ],
        ] as [string, Enrolment, Outcome][])('%s', async (_, enrolment, outcome) => {
          enrol(enrolment);
          await ingress(hbone(), outcome);
        });
        test('another port of the proxy’s: nobody listens, or a stranger', async () => {
          for (const port of [DEAF, UNMARKED]) {
            enrol({ ports: { inboundHBONE: port } });
            const to = { address: pod, port };
            await ingress(toPod({}, within, undefined, to), { ...drop('drop_no_listener'), mark: 0 });
            await ingress(toPod({ flags: ACK }, within, undefined, to), { ...drop('drop_orphaned_flow'), mark: 0 });
          }
        });
      });

      test.each([0, 1, 2, 3, 4, 5])('for another MAC, byte %i: untouched', async (byte) => {
        const destination = mac(POD_MAC);
        destination.writeUInt8((destination[byte] ?? 0) ^ 1, byte);
        const wire = { source: GATEWAY_MAC, destination: macText(destination) };
        await ingress(toPod({}, wire), pass('pass_other_host', 0));
      });
      test('tagged, for somebody else', () =>
        ingress(
          toPod({}, { source: GATEWAY_MAC, destination: ELSEWHERE_MAC, tags: [{ protocol: 0x8100, id: 0 }] }),
          pass('pass_other_host', 0),
        ));

      test('from the pod itself, to and from loopback', async () => {
        const spoofed = { ...drop('drop_spoofed_source'), mark: 0 };
        const inside = { ...drop('drop_not_our_address'), mark: 0 };
        for (const address of [pod, its.second]) {
          await ingress(toPod({}, within, { address, port: 1 }), spoofed);
          await ingress(toPod({ flags: ACK }, within, { address, port: 1 }), spoofed);
          await ingress(udpFrame(within, { address, port: 1 }, { address: pod, port: 1 }), spoofed);
        }
        const ping = ipFrame(
          within,
          ipPacket(
            pod,
            its.second,
            family === 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6,
            icmpMessage(pod, its.second, family === 4 ? 8 : 128, Buffer.alloc(8)),
          ),
        );
        await ingress(ping, family === 4 ? spoofed : pass('pass_not_tcp', 0));
        if (family === 6) return;
        for (const loopback of ['127.0.0.1', '127.255.0.1']) {
          await ingress(toPod({}, within, undefined, { address: loopback, port: PORTS.dns }), inside);
          await ingress(toPod({}, within, { address: loopback, port: 1 }), inside);
          await ingress(udpFrame(within, { address: outside, port: 1 }, { address: loopback, port: 1 }), inside);
          await ingress(udpFrame(within, { address: loopback, port: 1 }, { address: pod, port: 1 }), inside);
        }
        await ingress(toPod({}, within, { address: '128.0.0.1', port: 1 }), pass('redirected_inbound', 0));
        await ingress(toPod({}, within, { address: '126.0.0.1', port: 1 }), pass('redirected_inbound', 0));
      });

      if (family === 6) {
        test('to ::1: left to the stack, which takes it on lo alone', () =>
          ingress(toPod({}, within, undefined, { address: '::1', port: APP }), pass('redirected_inbound', 0)));
      }
      test('an ICMP error about what was sent to the pod is not from the pod', () =>
        ingress(
          ipFrame(within, icmp(outside, pod, ipPacket(outside, pod, IPPROTO_TCP, tcpSegment(web, mine())))),
          pass('pass_not_tcp', 0),
        ));

      describe('probes', () => {
        test('by the sign, and their answers; there is none where there is no host side', async () => {
          await ingress(toPod({}, signed()), pass('redirected_inbound', 0));
          enrol({ id: 4242 });
          const probe = { address: outside, port: nextPort() };
          await ingress(toPod({}, signed(), probe), pass('pass_host_socket', 0), { id: 4242 });
          await ingress(toPod({ flags: ACK }, signed(), probe), pass('pass_host_socket', 0), { id: 4242 });
          await egress(fromPod({ flags: SYN | ACK }, probe, { address: pod, port: APP }), pass('pass_direct'), {
            id: 4242,
          });
          // The end of a connection that began before the enrolment.
          const older = { address: outside, port: nextPort() };
          await ingress(toPod({ flags: ACK }, signed(), older), pass('pass_host_socket', 0), { id: 4242 });
          await egress(fromPod({ flags: ACK }, older, { address: pod, port: APP }), pass('pass_direct'), { id: 4242 });
        });
        test.each([0, 1, 2, 3, 4, 5])('not by a sign with another byte %i', async (byte) => {
          enrol({ id: 4242 });
          const source = mac(signed().source);
          source.writeUInt8((source[byte] ?? 0) ^ 4, byte);
          const wire = { source: macText(source), destination: POD_MAC };
          await ingress(toPod({}, wire), pass('redirected_inbound', 0), { id: 4242 });
        });
        const near =
          family === 4
            ? ['169.254.7.126', '169.254.6.127', '169.253.7.127', '168.254.7.127']
            : [
                'fd15:9254:7127:1337:ffff:ffff:ffff:ffff',
                'fd16:9254:7127:1336:ffff:ffff:ffff:ffff',
                'fd16:9254:7126:1337:ffff:ffff:ffff:ffff',
                'fd16:9254:7127:1337:ffff:fffe:ffff:ffff',
                'fd16:9254:7127:1337:ffff:ffff:ffff:fffe',
              ];
        test('by Istio’s address, and by none that is near it', async () => {
          await ingress(toPod({}, within, { address: its.istio, port: nextPort() }), pass('pass_host_socket', 0));
          for (const address of near) {
            await ingress(toPod({}, within, { address, port: nextPort() }), pass('redirected_inbound', 0));
          }
        });
      });

      describe('segments', () => {
        const orphaned = { ...drop('drop_orphaned_flow'), mark: 0 };
        test('for a socket of the proxy’s', async () => {
          const [client, server] = await connected(PROXY_MARK);
          await ingress(toPod({ flags: ACK }, within, server, client), pass('to_proxy_established', 0));
        });
        test('for one that shows no mark: TIME_WAIT', async () => {
          const { peer, pod: namespace } = datapath().node;
          const client = { address: its.node, port: nextPort() };
          const connection = await peer.connect(pod, APP, { source: its.node, sourcePort: client.port });
          await peer.request(connection, 'quit\n');
          const filter = `( sport = :${APP} and dport = :${client.port} )`;
          await until('TIME_WAIT in the pod', () =>
            namespace.run(['ss', '-Htan', 'state', 'time-wait', filter]).includes(`:${client.port}`),
          );
          await ingress(toPod({ flags: ACK }, within, client), pass('to_proxy_established', 0));
        });
        test('for a socket of the pod’s own with somebody outside', async () => {
          const [client, server] = await connected();
          await ingress(toPod({ flags: ACK }, within, server, client), orphaned);
          enrol({ flags: [] });
          await ingress(toPod({ flags: ACK }, within, server, client), pass('pass_no_proxy_socket', 0));
        });
        test('for a socket of the pod whose peer is the proxy: from nobody', async () => {
          const [client, server] = await proxied();
          enrol({ flags: [] });
          await ingress(toPod({ flags: ACK, ...PAYLOAD }, within, server, client), orphaned);
        });
        test('for a flow that was redirected and whose socket is gone: the listener, or the policy', async () => {
          const client = { address: outside, port: nextPort() };
          await ingress(toPod({}, within, client), pass('redirected_inbound', 0));
          await ingress(toPod({ flags: ACK }, within, client), pass('to_proxy_orphaned', 0));
          enrol({ ports: { inboundPlaintext: DEAF } });
          await ingress(toPod({ flags: ACK }, within, client), { ...drop('drop_no_listener'), mark: 0 });
        });
        test('begins anew and is redirected: not direct any more', async () => {
          const client = { address: outside, port: nextPort() };
          enrol({ flags: ['DRAINING'] });
          await ingress(toPod({}, within, client), pass('pass_draining', 0));
          enrol();
          await ingress(toPod({}, within, client), pass('redirected_inbound', 0));
          await ingress(toPod({ flags: ACK }, within, client), pass('to_proxy_orphaned', 0));
        });
        test('that nobody knows', async () => {
          await ingress(toPod({ flags: ACK }), orphaned);
          enrol({ flags: [] });
          await ingress(toPod({ flags: ACK }), pass('pass_no_proxy_socket', 0));
        });
        test('the ACK of a SYN cookie gets the listener, any other does not', async () => {
          const { node } = datapath();
          // A tuple for which a listener of the pod's says what its cookie is.
          const client = { address: its.node, port: nextPort() };
          const server = { address: pod, port: APP };
          const numbers = cookie(node, family, client, server, PORTS.inboundPlaintext);
          await ingress(toPod({ flags: ACK, ...numbers }, within, client, server), pass('to_proxy_cookie', 0));
          await ingress(toPod({ flags: ACK, ...numbers, seq: numbers.seq + 1 }, within, client, server), orphaned);
          enrol({ ports: { inboundPlaintext: 0 } });
          await ingress(toPod({ flags: ACK, ...numbers }, within, client, server), orphaned);
        });
      });

      describe('fragments', () => {
        const segment = (from: End, to: End) => tcpSegment(from, to, { flags: ACK, payload: Buffer.alloc(60, 7) });
        test('later ones pass behind a first one that passed, and only those', async () => {
          const [client, server] = await connected(PROXY_MARK);
          const [first, ...later] = pieces(
            family,
            within,
            server,
            client,
            IPPROTO_TCP,
            segment(server, client),
            [32, 56],
            nextId(),
          );
          for (const piece of later) await ingress(piece, { ...drop('drop_fragment'), mark: 0 });
          await ingress(first ?? Buffer.alloc(0), pass('to_proxy_established', 0));
          for (const piece of later) await ingress(piece, pass('pass_fragment', 0));
        });
      });
    });

    describe('the host’s side', () => {
      const onHost = () => datapath().node.hostIfindex;
      const enrolHost = (enrolment: Enrolment = {}) => enrol({ ...enrolment, id: onHost() });
      const forged = drop('drop_forged_sign');
      const data: TcpFields = { flags: ACK, ...PAYLOAD };
      const segment = (from: End, to: End) => tcpSegment(from, to, { flags: ACK, payload: Buffer.alloc(60, 7) });

      test('an interface that is not known is nobody’s', async () => {
        await sign(toPod({}, signed()), pass(null));
        await guard(fromPod(), pass(null));
      });

      test('inpod_sign: what was born here gets the sign', async () => {
        enrolHost();
        const born: Outcome = { ...pass('pass_host_socket'), source: signed().source };
        for (const flags of [SYN, ACK]) await sign(toPod({ flags }), born);
        const from = { address: its.node, port: nextPort() };
        const to = { address: pod, port: APP };
        for (const piece of pieces(family, within, from, to, IPPROTO_TCP, segment(from, to), [32], nextId())) {
          await sign(piece, born);
        }
      });

      test('inpod_sign: nothing else does', async () => {
        enrolHost();
        await sign(toPod(), pass(null), { ingressIfindex: 1 });
        await sign(udpFrame(within, web, { address: pod, port: 1 }), pass(null));
        await sign(toPod({}, { source: GATEWAY_MAC, destination: ELSEWHERE_MAC }), pass(null));
        for (const { frame } of unreadable(family, within, web, { address: pod, port: APP }).slice(0, 2)) {
          await sign(frame, pass(null));
        }
      });

      test('inpod_sign: nobody brings it, nor Istio’s address', async () => {
        enrolHost();
        for (const ingressIfindex of [0, 1]) await sign(toPod({}, signed()), forged, { ingressIfindex });
        await sign(toPod({}, signed(3)), forged, { ingressIfindex: 1 });
        const istio = toPod({}, within, { address: its.istio, port: 1 });
        await sign(istio, forged, { ingressIfindex: 1 });
        await sign(istio, { ...pass('pass_host_socket'), source: signed().source });
      });

      test('inpod_guard: frames', async () => {
        enrolHost();
        const ends: [End, End] = [mine(), web];
        for (const { frame } of notTcp(family, out, ...ends)) await guard(frame, pass(null));
        for (const { frame } of tagged(out, ...ends)) await guard(frame, TAGGED);
        for (const { frame, outcome, name } of unreadable(family, out, ...ends)) {
          // Its namespace's own program has said more exactly why.
          if (name.includes('SYN')) await guard(frame, drop('drop_unjudged'));
          else await guard(frame, outcome.reason === 'drop_fragment' ? outcome : drop('drop_malformed'));
        }
        await guard(tcpFrame({ ...out, source: signed().source }, ...ends), forged);
        if (family === 6) await guard(fromPod({}, { address: 'fe80::1', port: 1 }), pass(null));
      });

      test('inpod_guard: only what the pod’s namespace accounts for', async () => {
        enrolHost();
        await guard(fromPod(), drop('drop_unjudged'));
        await guard(fromPod(data), drop('drop_unjudged'));
        await guard(fromPod({ flags: FIN | ACK }), drop('drop_unjudged'));
        await guard(fromPod({ flags: ACK }), pass(null));
        await guard(fromPod({ flags: RST }), pass(null));
        await guard(fromPod({ flags: RST, ...PAYLOAD }), drop('drop_unjudged'));
        await guard(fromPod(SYN_WITH_PAYLOAD), drop('drop_unjudged'));
      });

      test('inpod_guard: connections', async () => {
        enrolHost();
        // An unmarked connection of the pod's: its own segments are to be looped.
        const [client, server] = await proxied();
        await guard(fromPod(data, server, client), drop('drop_unjudged'));
        await guard(fromPod({ flags: ACK }, server, client), drop('drop_unjudged'));
        const marked = await proxied(PROXY_MARK);
        await guard(fromPod(data, marked[1], marked[0]), pass(null));
        // The mark of a socket that no packet of the proxy's cgroup came from.
        const { node, state } = datapath();
        node.native.setCheckCgroups(state, true);
        await guard(fromPod(data, marked[1], marked[0]), drop('drop_unjudged'));
        // A listener is no connection.
        await guard(fromPod(data, web, { address: pod, port: PORTS.outbound }), drop('drop_unjudged'));
        await guard(fromPod({ flags: SYN | ACK }, web, { address: pod, port: PORTS.outbound }), pass(null));
      });

      test('inpod_guard: what shows no mark may go without data', async () => {
        enrolHost();
        const { peer, pod: namespace } = datapath().node;
        const client = { address: its.node, port: nextPort() };
        const server = { address: pod, port: APP };
        const connection = await peer.connect(pod, APP, { source: its.node, sourcePort: client.port });
        await peer.request(connection, 'quit\n');
        const filter = `( sport = :${APP} and dport = :${client.port} )`;
        await until('TIME_WAIT in the pod', () =>
          namespace.run(['ss', '-Htan', 'state', 'time-wait', filter]).includes(`:${client.port}`),
        );
        await guard(fromPod({ flags: ACK }, client, server), pass(null));
        await guard(fromPod(data, client, server), drop('drop_unjudged'));
      });

      test('inpod_guard: what was let go direct, before the enrolment, or by a rule', async () => {
        const flow: [End, End] = [web, mine()];
        enrolHost({ flags: ['DRAINING', 'STRICT'] });
        await egress(fromPod({}, ...flow), pass('pass_draining'), { id: onHost() });
        enrolHost();
        await guard(fromPod({}, ...flow), pass(null));
        await guard(fromPod(data, ...flow), pass(null));
        const { node, state } = datapath();
        node.native.putExclusions(state, onHost(), [portRule('outbound_port', 81), portRule('inbound_port', 22)]);
        await guard(fromPod(data, { ...web, port: 81 }), pass(null));
        await guard(fromPod(data, web, { address: pod, port: 22 }), pass(null));
        await guard(fromPod({}, { ...web, port: 81 }), drop('drop_unjudged'));
        node.native.deleteExclusions(state, onHost());
        enrolHost({ flags: [] });
        await guard(fromPod(data), pass(null));
        await guard(fromPod(), drop('drop_unjudged'));
      });

      test('inpod_guard: later fragments of what the pod’s program let pass', async () => {
        enrolHost();
        const from = mine();
        const cut = pieces(family, out, from, web, IPPROTO_TCP, segment(from, web), [32, 56], nextId());
        const [first = Buffer.alloc(0), ...later] = cut;
        for (const piece of later) await guard(piece, drop('drop_fragment'));
        await egress(first, pass('pass_proxy_own'), { id: onHost(), mark: PROXY_MARK });
        for (const piece of later) await guard(piece, pass(null));
        const [client, server] = await proxied();
        const looping = pieces(family, out, client, server, IPPROTO_TCP, segment(client, server), [32], nextId());
        await egress(looping[0] ?? first, looped('to_proxy_established'), { id: onHost() });
        await guard(looping[1] ?? first, drop('drop_fragment'));
      });
    });
  });
}

/** As Node.cookie(): numbers of an ACK that a listener of the pod's takes for the answer to a cookie of its own. */
function cookie(
  node: InPodDatapath['node'],
  family: Family,
  client: End,
  server: End,
  listener: number,
): { seq: number; ack: number } {
  const seq = 0x1000_0000 + client.port;
  const ask = (port: number) => {
    const frame = tcpFrame(within, client, { ...server, port }, { seq });
    const answer = ['python3', join(import.meta.dirname, 'answer.py'), 'pod0', frame.toString('hex')];
    return Buffer.from(node.node.run(answer).trim(), 'hex');
  };
  node.pod.run(['sysctl', '-qw', 'net.ipv4.tcp_syncookies=2']);
  try {
    ask(listener);
    const answer = ask(server.port);
    return { seq: seq + 1, ack: (answer.readUInt32BE((family === 4 ? 34 : 54) + 4) + 1) >>> 0 };
  } finally {
    node.pod.run(['sysctl', '-qw', 'net.ipv4.tcp_syncookies=1']);
  }
}
