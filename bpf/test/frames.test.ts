// SPDX-License-Identifier: Apache-2.0
// The frames of these tests as tcpdump(8) reads them: another implementation of the same formats.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { must, Testbed } from '../../conformance/netns.ts';
import {
  ACK,
  arpFrame,
  authenticationHeader,
  type End,
  fragmentHeader,
  IPPROTO_DSTOPTS,
  IPPROTO_HOPOPTS,
  IPPROTO_ICMP,
  IPPROTO_ICMPV6,
  IPPROTO_ROUTING,
  IPPROTO_TCP,
  IPPROTO_UDP,
  icmpMessage,
  ipFrame,
  ipPacket,
  optionsHeader,
  SYN,
  tcpFrame,
  tcpSegment,
  udpDatagram,
} from './frames.ts';
import { addresses, families, toPod } from './node.ts';

/** What `tcpdump -e -vv` says about one frame, in one line. */
function read(frame: Uint8Array): string {
  using testbed = Testbed.open();
  const file = join(testbed.directory('capture'), 'frame.pcap');
  const header = Buffer.alloc(40);
  header.writeUInt32LE(0xa1b2c3d4, 0); // pcap-savefile(5), microseconds
  header.writeUInt16LE(2, 4);
  header.writeUInt16LE(4, 6);
  header.writeUInt32LE(65535, 16);
  header.writeUInt32LE(1, 20); // LINKTYPE_ETHERNET
  header.writeUInt32LE(frame.length, 32);
  header.writeUInt32LE(frame.length, 36);
  writeFileSync(file, Buffer.concat([header, frame]));
  return must(['tcpdump', '-r', file, '-e', '-n', '-t', '-vv']).replaceAll(/\s+/g, ' ');
}

describe.each(families)('IPv%i', (family) => {
  const its = addresses[family];
  const from: End = { address: its.outside, port: 40_000 };
  const to: End = { address: its.pod, port: 8080 };
  const tuple = `${from.address}.40000 > ${to.address}.8080: `;
  const wire = `${toPod.source} > ${toPod.destination}, `;

  test.each([
    { name: 'SYN', fields: { flags: SYN }, says: 'Flags [S], cksum 0x' },
    {
      name: 'ACK with an odd payload',
      fields: { flags: ACK, payload: Buffer.from('odd') },
      says: 'Flags [.], cksum 0x',
    },
  ])('TCP: $name', ({ fields, says }) => {
    const text = read(tcpFrame(toPod, from, to, fields));
    expect(text).toContain(wire);
    expect(text).toContain(`${tuple}${says}`);
    expect(text).toContain('(correct)');
  });

  test('UDP', () => {
    const text = read(ipFrame(toPod, ipPacket(from.address, to.address, IPPROTO_UDP, udpDatagram(from, to))));
    expect(text).toContain(tuple);
    expect(text).toContain('udp sum ok');
  });

  test('an ICMP error that quotes TCP', () => {
    const quoted = ipPacket(to.address, from.address, IPPROTO_TCP, tcpSegment(to, from));
    const [type, protocol] = family === 4 ? [3, IPPROTO_ICMP] : [2, IPPROTO_ICMPV6];
    const body = icmpMessage(from.address, to.address, type, quoted, family === 4 ? 4 : 0, 1400);
    const text = read(ipFrame(toPod, ipPacket(from.address, to.address, protocol, body)));
    expect(text).toMatch(family === 4 ? /unreachable - need to frag \(mtu 1400\)/ : /packet too big, mtu 1400/);
    expect(text).toContain(family === 4 ? `${to.address}.8080 > ${from.address}.40000: ` : '[icmp6 sum ok]');
    expect(text).not.toMatch(/wrong|bad|incorrect/);
  });

  test('VLAN tags, outermost first', () => {
    const tags = [
      { protocol: 0x88a8, id: 7 },
      { protocol: 0x8100, id: 0 },
    ];
    const text = read(tcpFrame({ ...toPod, tags }, from, to));
    expect(text).toContain('ethertype 802.1Q-QinQ (0x88a8)');
    expect(text).toMatch(/vlan 7, .*vlan 0, /);
    expect(text).toContain(tuple);
  });
});

test('IPv4 options and fragments', () => {
  const { outside, pod } = addresses[4];
  const [from, to] = [
    { address: outside, port: 1 },
    { address: pod, port: 2 },
  ];
  expect(read(tcpFrame(toPod, from, to, {}, { options: Buffer.from([1, 1, 1, 0]) }))).toContain(
    'options (NOP,NOP,NOP,EOL))',
  );
  expect(read(tcpFrame(toPod, from, to, {}, { moreFragments: true }))).toContain('offset 0, flags [+]');
  expect(read(tcpFrame(toPod, from, to, {}, { fragmentOffset: 1480 }))).toContain('offset 1480, flags [none]');
});

test('IPv6 extension headers and fragments', () => {
  const { outside, pod } = addresses[6];
  const [from, to] = [
    { address: outside, port: 1 },
    { address: pod, port: 2 },
  ];
  const extensions = [
    optionsHeader(IPPROTO_HOPOPTS),
    optionsHeader(IPPROTO_DSTOPTS, 2),
    fragmentHeader(0, true),
    authenticationHeader(),
  ];
  const text = read(tcpFrame(toPod, from, to, {}, { extensions }));
  expect(text).toMatch(/HBH \(padn\) DSTOPT \(padn\) frag \(0x000004d2:0\|44\) /);
  const routed = read(tcpFrame(toPod, from, to, {}, { extensions: [optionsHeader(IPPROTO_ROUTING, 1)] }));
  expect(routed).toContain('RT6 (len=1, type=253, segleft=0');
  const signed = read(tcpFrame(toPod, from, to, {}, { extensions: [authenticationHeader()] }));
  expect(signed).toMatch(/AH\(length=4\(24-bytes\).*\): 1 > 2: Flags \[S\], cksum 0x[0-9a-f]+ \(correct\)/);
  const later = read(tcpFrame(toPod, from, to, {}, { extensions: [fragmentHeader(1480, false)] }));
  expect(later).toMatch(/frag \(0x000004d2:1480\|20\)/);
});

test('ARP', () => {
  const { host, pod } = addresses[4];
  expect(read(arpFrame(toPod, host, pod))).toContain(`Request who-has ${pod} tell ${host}`);
});
