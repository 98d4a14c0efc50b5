// SPDX-License-Identifier: Apache-2.0
//
// What bpf/parse.h makes of a frame, for the programs that judge every frame of a pod. `from` and `to` are the ends of
// the frame's packet as the caller wants them.

import {
  ACK,
  arpFrame,
  authenticationHeader,
  type End,
  ETH_P_8021AD,
  ETH_P_8021Q,
  ETH_P_ARP,
  ETH_P_IP,
  ETH_P_IPV6,
  type Extension,
  ethernetFrame,
  fragmentHeader,
  IPPROTO_DSTOPTS,
  IPPROTO_HOPOPTS,
  IPPROTO_ICMP,
  IPPROTO_ICMPV6,
  IPPROTO_ROUTING,
  IPPROTO_SCTP,
  IPPROTO_TCP,
  IPPROTO_UDP,
  icmpMessage,
  ipFrame,
  ipPacket,
  ipv4Packet,
  ipv6Packet,
  optionsHeader,
  SYN,
  tcpFrame,
  tcpSegment,
  udpDatagram,
  type Wire,
} from './frames.ts';
import { drop, type Family, type Outcome, pass } from './node.ts';

export interface FrameCase {
  name: string;
  frame: Buffer;
}

const bytes = (length: number) => Buffer.alloc(length, 0x5a);

/** Frames that no program of ours has anything to say about. */
export function notTcp(family: Family, wire: Wire, from: End, to: End): FrameCase[] {
  const packet = (protocol: number, payload: Uint8Array, fields = {}) =>
    ipFrame(wire, ipPacket(from.address, to.address, protocol, payload, fields));
  const icmp = (type: number, body: Uint8Array, code = 0, cut?: number) => {
    const protocol = family === 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
    return packet(protocol, icmpMessage(from.address, to.address, type, body, code).subarray(0, cut));
  };
  const unreachable = family === 4 ? 3 : 1;
  const quote = (protocol: number, payload: Uint8Array, fields = {}) =>
    ipPacket(to.address, from.address, protocol, payload, fields);
  const tcp = tcpSegment(to, from);
  const cases: FrameCase[] = [
    { name: 'UDP', frame: packet(IPPROTO_UDP, udpDatagram(from, to)) },
    { name: 'SCTP', frame: packet(IPPROTO_SCTP, bytes(32)) },
    { name: 'an unknown EtherType', frame: ethernetFrame(wire, 0x88b5, bytes(46)) },
    { name: 'nothing behind the Ethernet header', frame: ethernetFrame(wire, ETH_P_ARP, bytes(0)) },
    { name: 'ICMP that ends before its type', frame: icmp(unreachable, bytes(0), 0, 0) },
    { name: 'an ICMP error that quotes less than an IP header', frame: icmp(unreachable, bytes(8)) },
    { name: 'an ICMP error about UDP', frame: icmp(unreachable, quote(IPPROTO_UDP, udpDatagram(to, from))) },
    {
      name: 'an ICMP error that ends before the ports of its quote',
      frame: icmp(unreachable, quote(IPPROTO_TCP, tcp.subarray(0, 3))),
    },
  ];
  if (family === 4) {
    cases.push(
      { name: 'ARP', frame: arpFrame(wire, from.address, to.address) },
      { name: 'an echo request', frame: icmp(8, bytes(8)) },
      { name: 'an echo reply', frame: icmp(0, bytes(8)) },
      { name: 'a redirect about TCP', frame: icmp(5, quote(IPPROTO_TCP, tcp)) },
      { name: 'a source quench about TCP', frame: icmp(4, quote(IPPROTO_TCP, tcp)) },
      {
        name: 'a later fragment of ICMP',
        frame: packet(IPPROTO_ICMP, icmpMessage(from.address, to.address, 3, quote(IPPROTO_TCP, tcp)), {
          fragmentOffset: 8,
        }),
      },
      {
        name: 'ICMP with a header length below 5 words',
        frame: packet(IPPROTO_ICMP, icmpMessage(from.address, to.address, 3, quote(IPPROTO_TCP, tcp)), { ihl: 4 }),
      },
      {
        name: 'an ICMP error that quotes another IP version',
        frame: icmp(3, quote(IPPROTO_TCP, tcp, { version: 6 })),
      },
      {
        name: 'an ICMP error that quotes a header length below 5 words',
        frame: icmp(3, quote(IPPROTO_TCP, tcp, { ihl: 4 })),
      },
      {
        name: 'an ICMP error that quotes a later fragment',
        frame: icmp(3, quote(IPPROTO_TCP, tcp, { fragmentOffset: 8 })),
      },
      { name: 'a later fragment of UDP', frame: packet(IPPROTO_UDP, bytes(24), { fragmentOffset: 8 }) },
    );
  } else {
    cases.push(
      { name: 'a neighbour solicitation', frame: icmp(135, bytes(20)) },
      { name: 'an echo request', frame: icmp(128, bytes(8)) },
      { name: 'the reserved ICMPv6 type 0', frame: icmp(0, quote(IPPROTO_TCP, tcp)) },
      { name: 'ICMPv6 type 5 about TCP', frame: icmp(5, quote(IPPROTO_TCP, tcp)) },
      { name: 'no next header (59)', frame: packet(59, bytes(8)) },
      {
        name: 'UDP behind options',
        frame: packet(IPPROTO_UDP, udpDatagram(from, to), { extensions: [optionsHeader(IPPROTO_DSTOPTS)] }),
      },
      {
        name: 'a later fragment of UDP',
        frame: packet(IPPROTO_UDP, bytes(24), { extensions: [fragmentHeader(8, false)] }),
      },
      {
        name: 'a later fragment of ICMPv6',
        frame: packet(IPPROTO_ICMPV6, bytes(24), { extensions: [fragmentHeader(8, true)] }),
      },
      {
        name: 'ICMPv6 in a first fragment',
        frame: packet(IPPROTO_ICMPV6, icmpMessage(from.address, to.address, 128, bytes(16)), {
          extensions: [fragmentHeader(0, true)],
        }),
      },
    );
  }
  return cases.map(({ name, frame }) => ({ name: `IPv${family}: ${name}`, frame }));
}

/** Frames that claim to be TCP and must be stopped, with the reason. */
export function unreadable(family: Family, wire: Wire, from: End, to: End): (FrameCase & { outcome: Outcome })[] {
  const type = family === 4 ? ETH_P_IP : ETH_P_IPV6;
  const tcp = tcpSegment(from, to, { payload: bytes(16) });
  const frame = (payload: Uint8Array, fields = {}) =>
    ipFrame(wire, ipPacket(from.address, to.address, IPPROTO_TCP, payload, fields), type);
  const fragment = (payload: Uint8Array, offset: number, more: boolean) =>
    family === 4
      ? frame(payload, { fragmentOffset: offset, moreFragments: more })
      : frame(payload, { extensions: [fragmentHeader(offset, more)] });
  const flagged = (flags: number) => tcpSegment(from, to, { flags, payload: bytes(12) });
  const malformed = drop('drop_malformed');
  const short = drop('drop_short_first_fragment');
  const later = drop('drop_fragment');
  const cases: (FrameCase & { outcome: Outcome })[] = [
    { name: 'TCP cut before its flags', frame: frame(tcp.subarray(0, 13)), outcome: malformed },
    { name: 'TCP cut to nothing', frame: frame(tcp.subarray(0, 0)), outcome: malformed },
    { name: 'a first fragment of 8 bytes', frame: fragment(tcp.subarray(0, 8), 0, true), outcome: short },
    { name: 'a later fragment', frame: fragment(tcp.subarray(8, 32), 8, true), outcome: later },
    { name: 'the last fragment', frame: fragment(tcp.subarray(8), 8, false), outcome: later },
    { name: 'a SYN with more fragments', frame: fragment(flagged(SYN), 0, true), outcome: drop('drop_syn_fragment') },
    {
      name: 'a SYN-ACK with more fragments',
      frame: fragment(flagged(SYN | ACK), 0, true),
      outcome: drop('drop_syn_fragment'),
    },
  ];
  if (family === 4) {
    cases.push(
      { name: 'another IP version', frame: frame(tcp, { version: 5 }), outcome: malformed },
      { name: 'a header length below 5 words', frame: frame(tcp, { ihl: 4 }), outcome: malformed },
      {
        name: 'a total length that ends before the flags, in a padded frame',
        frame: frame(tcp, { totalLength: 33 }),
        outcome: malformed,
      },
      { name: 'a total length below the header length', frame: frame(tcp, { totalLength: 19 }), outcome: malformed },
      {
        name: 'a first fragment whose total length ends before the flags, in a padded frame',
        frame: frame(tcp, { totalLength: 28, moreFragments: true }),
        outcome: short,
      },
      {
        name: 'options that reach over the end of the frame',
        frame: frame(bytes(0), { ihl: 15, totalLength: 200 }),
        outcome: malformed,
      },
    );
  } else {
    const options = optionsHeader(IPPROTO_DSTOPTS);
    const bad = (fields: object, cut?: number) =>
      ipFrame(wire, ipv6Packet(from.address, to.address, IPPROTO_TCP, tcp, fields).subarray(0, cut));
    cases.push(
      {
        name: 'a payload length that ends before the flags, in a padded frame',
        frame: bad({ payloadLength: 13 }),
        outcome: malformed,
      },
      { name: 'an extension header cut short', frame: bad({ extensions: [options] }, 43), outcome: malformed },
      {
        name: 'an extension that reaches over the payload length',
        frame: bad({ extensions: [options], payloadLength: 4 }),
        outcome: malformed,
      },
      {
        name: 'seven extension headers',
        frame: bad({ extensions: new Array<Extension>(7).fill(options) }),
        outcome: malformed,
      },
      {
        name: 'a later fragment that begins with options',
        frame: ipFrame(
          wire,
          ipv6Packet(from.address, to.address, IPPROTO_DSTOPTS, bytes(24), { extensions: [fragmentHeader(16, false)] }),
        ),
        outcome: later,
      },
      {
        name: 'a SYN with more fragments by the outer of two fragment headers',
        frame: tcpFrame(wire, from, to, {}, { extensions: [fragmentHeader(0, true), fragmentHeader(0, false)] }),
        outcome: drop('drop_syn_fragment'),
      },
      {
        name: 'a first fragment that ends within its extension headers, with UDP in the padding',
        frame: paddedFirstFragment(wire, from, to),
        outcome: short,
      },
    );
  }
  return cases.map((one) => ({ ...one, name: `IPv${family}: ${one.name}` }));
}

/**
 * A first fragment that holds destination options only, which say that more options follow: those are in the second
 * fragment, where TCP may follow them. Behind the end of this fragment the frame goes on with options that say UDP.
 */
function paddedFirstFragment(wire: Wire, from: End, to: End): Buffer {
  const [first, second] = [optionsHeader(IPPROTO_DSTOPTS), optionsHeader(IPPROTO_DSTOPTS)];
  const padding = second.bytes(IPPROTO_UDP);
  const packet = ipv6Packet(from.address, to.address, IPPROTO_DSTOPTS, padding, {
    extensions: [fragmentHeader(0, true), first],
    payloadLength: 16,
  });
  return ipFrame(wire, packet);
}

/** Frames with VLAN tags, one to three, of both kinds: dropped whatever is in them. */
export function tagged(wire: Wire, from: End, to: End): FrameCase[] {
  return [ETH_P_8021Q, ETH_P_8021AD].flatMap((protocol) =>
    [1, 2, 3].map((count) => ({
      name: `${count} tag${count === 1 ? '' : 's'} of type 0x${protocol.toString(16)}`,
      frame: tcpFrame({ ...wire, tags: new Array(count).fill({ protocol, id: 0 }) }, from, to, { flags: ACK }),
    })),
  );
}

/** Ways to write the same TCP segment that must all be read as TCP. */
export function readable(family: Family, wire: Wire, from: End, to: End, flags: number): FrameCase[] {
  const segment = tcpSegment(from, to, { flags });
  const frame = (fields: object) => tcpFrame(wire, from, to, { flags }, fields);
  const cases: FrameCase[] = [
    { name: 'no payload', frame: frame({}) },
    { name: 'Ethernet padding', frame: Buffer.concat([frame({}), bytes(32)]) },
    { name: 'a payload', frame: tcpFrame(wire, from, to, { flags, payload: bytes(1000) }) },
  ];
  if (family === 4) {
    cases.push(
      { name: '4 bytes of options', frame: frame({ options: Buffer.from([1, 1, 1, 0]) }) },
      { name: '40 bytes of options', frame: frame({ options: Buffer.alloc(40, 1) }) },
      { name: 'total length 0 (BIG TCP)', frame: frame({ totalLength: 0 }) },
      {
        name: '16 bytes of TCP, as far as the flags',
        frame: ipFrame(wire, ipv4Packet(from.address, to.address, IPPROTO_TCP, segment.subarray(0, 16))),
      },
    );
  } else {
    const options = optionsHeader(IPPROTO_DSTOPTS);
    const chains: Record<string, Extension[]> = {
      'hop-by-hop options': [optionsHeader(IPPROTO_HOPOPTS)],
      'long destination options': [optionsHeader(IPPROTO_DSTOPTS, 3)],
      'a routing header': [optionsHeader(IPPROTO_ROUTING, 2)],
      'an atomic fragment header': [fragmentHeader(0, false)],
      'an authentication header': [authenticationHeader()],
      'one of each': [
        optionsHeader(IPPROTO_HOPOPTS),
        options,
        optionsHeader(IPPROTO_ROUTING),
        fragmentHeader(0, false),
        authenticationHeader(),
        options,
      ],
    };
    for (const [name, extensions] of Object.entries(chains)) cases.push({ name, frame: frame({ extensions }) });
    cases.push(
      { name: 'payload length 0 (jumbogram)', frame: frame({ payloadLength: 0 }) },
      {
        name: '16 bytes of TCP, as far as the flags',
        frame: ipFrame(wire, ipv6Packet(from.address, to.address, IPPROTO_TCP, segment.subarray(0, 16))),
      },
    );
  }
  return cases.map((one) => ({ ...one, name: `IPv${family}: ${one.name}` }));
}

export const NOT_TCP = pass('pass_not_tcp');
export const TAGGED = drop('drop_vlan_tagged');
