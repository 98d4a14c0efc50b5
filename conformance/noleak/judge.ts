// SPDX-License-Identifier: Apache-2.0
//
// Who went around the proxy, told from packet captures and the generators' ledger alone. Nothing of the product, of its
// maps or of the other tests is imported here.
//
// Every client socket and every crafted frame has a source port of its own below the ephemeral range. The proxy opens
// its own connections from ephemeral ports. So a packet with a client's port that reaches a server, or leaves one, was
// carried by nobody; it is a leak unless the ledger lets that flow go direct, or neither end was enrolled at that time.

import { readFileSync } from 'node:fs';

/** One capture file (pcap, Ethernet), taken on the only interface of a namespace. */
export interface Vantage {
  name: string;
  file: string;
  /** Addresses of that namespace. */
  addresses: readonly string[];
}

export interface Flow {
  /** Address and port of the client's end; the port is used once in a run. */
  client: string;
  port: number;
  /** What generated it: "small", "tagged frame", ... A leak is counted under this name. */
  what: string;
  /** Each payload begins with it. */
  marker: string;
  /**
   * `proxied`: only by the proxy, as long as one of its ends is enrolled. `direct`: from and to a socket of the host,
   * begun before an enrolment, or between pods that are not enrolled. `nothing`: no packet of it may come anywhere.
   */
  may: 'proxied' | 'direct' | 'nothing';
  /** The generator has got its own payload back from the server. */
  completed?: boolean;
}

/** From when to when a pod's address was enrolled, in milliseconds of the epoch. `to` is absent if it still is. */
export interface Enrolment {
  address: string;
  from: number;
  to?: number;
}

export interface Ledger {
  /** First and last port that clients use. */
  ports: readonly [number, number];
  flows: readonly Flow[];
  enrolments: readonly Enrolment[];
  /** Addresses of the proxies, old and new. */
  proxies: readonly string[];
}

export interface Verdict {
  /** TCP packets judged, by why they may be there. */
  explained: Record<string, number>;
  /** TCP packets around the proxy, and whatever else nothing explains, by kind. */
  leaks: Record<string, number>;
  /** A few of each kind of leak. */
  examples: Record<string, string[]>;
  /** Completed flows of the ledger, and those of them whose payload was seen on its way to the server. */
  completed: number;
  seen: number;
  packets: number;
}

interface Packet {
  time: number;
  source: Buffer;
  destination: Buffer;
  sourcePort: number;
  destinationPort: number;
  /** TCP's flags; -1 where a fragment does not reach them. */
  flags: number;
  tags: number;
  fragment: '' | 'first' | 'later';
  payload: Buffer;
}

/** The 16 bytes of an address in text; IPv4 mapped. */
export function addressBytes(text: string): Buffer {
  const bytes = Buffer.alloc(16);
  if (!text.includes(':')) {
    bytes.fill(0xff, 10, 12);
    for (const [index, part] of text.split('.').entries()) bytes[12 + index] = Number(part);
    return bytes;
  }
  const [head = '', tail = ''] = text.split('::');
  for (const [index, group] of head.split(':').entries())
    bytes.writeUInt16BE(Number.parseInt(group || '0', 16), 2 * index);
  const last = tail === '' ? [] : tail.split(':');
  for (const [index, group] of last.entries()) {
    bytes.writeUInt16BE(Number.parseInt(group, 16), 16 - 2 * (last.length - index));
  }
  return bytes;
}

function addressText(bytes: Buffer): string {
  if (bytes.readUInt16BE(10) === 0xffff && bytes.readUInt32BE(0) === 0) return bytes.subarray(12).join('.');
  return (bytes.toString('hex').match(/.{4}/g) ?? []).map((group) => group.replace(/^0{1,3}/, '')).join(':');
}

/** The TCP packets of a capture, fragments too. Whatever is cut off or strange counts as TCP as far as it can be read. */
function* tcpPackets(file: string): Generator<Packet> {
  const bytes = readFileSync(file);
  if (bytes.length < 24 || bytes.readUInt32LE(0) !== 0xa1b2c3d4 || bytes.readUInt32LE(20) !== 1) {
    throw new Error(`${file}: not a capture of Ethernet frames`);
  }
  let at = 24;
  while (at + 16 <= bytes.length) {
    const time = bytes.readUInt32LE(at) * 1_000 + bytes.readUInt32LE(at + 4) / 1_000;
    const end = at + 16 + bytes.readUInt32LE(at + 8);
    if (end > bytes.length) throw new Error(`${file}: ends in the middle of a packet`);
    const packet = tcpPacket(bytes.subarray(at + 16, end), time);
    if (packet) yield packet;
    at = end;
  }
}

function tcpPacket(frame: Buffer, time: number): Packet | undefined {
  let at = 12;
  let tags = 0;
  while (frame.length >= at + 6 && [0x8100, 0x88a8].includes(frame.readUInt16BE(at))) {
    at += 4;
    tags += 1;
  }
  if (frame.length < at + 22) return undefined;
  const type = frame.readUInt16BE(at);
  at += 2;
  let protocol: number;
  let fragment = '' as Packet['fragment'];
  let source: Buffer;
  let destination: Buffer;
  let end: number;
  const fragmented = (offset: number, more: number) => {
    if (offset !== 0) fragment = 'later';
    else if (more !== 0) fragment = 'first';
  };
  if (type === 0x0800) {
    source = Buffer.concat([Buffer.alloc(10), Buffer.from([0xff, 0xff]), frame.subarray(at + 12, at + 16)]);
    destination = Buffer.concat([Buffer.alloc(10), Buffer.from([0xff, 0xff]), frame.subarray(at + 16, at + 20)]);
    protocol = frame[at + 9] ?? 0;
    const word = frame.readUInt16BE(at + 6);
    fragmented(word & 0x1fff, word & 0x2000);
    end = at + frame.readUInt16BE(at + 2);
    at += ((frame[at] ?? 0) & 15) * 4;
  } else if (type === 0x86dd && frame.length >= at + 40) {
    source = frame.subarray(at + 8, at + 24);
    destination = frame.subarray(at + 24, at + 40);
    protocol = frame[at + 6] ?? 0;
    end = at + 40 + frame.readUInt16BE(at + 4);
    at += 40;
    while ([0, 43, 44, 60].includes(protocol) && frame.length >= at + 8 && fragment !== 'later') {
      const next = frame[at] ?? 0;
      if (protocol === 44) {
        const word = frame.readUInt16BE(at + 2);
        fragmented(word & 0xfff8, word & 1);
        at += 8;
      } else {
        at += ((frame[at + 1] ?? 0) + 1) * 8;
      }
      protocol = next;
    }
  } else {
    return undefined;
  }
  if (protocol !== 6) return undefined;
  const tcp = frame.subarray(at, Math.max(at, Math.min(end, frame.length)));
  const ports = fragment !== 'later' && tcp.length >= 4;
  return {
    time,
    source,
    destination,
    sourcePort: ports ? tcp.readUInt16BE(0) : -1,
    destinationPort: ports ? tcp.readUInt16BE(2) : -1,
    flags: ports && tcp.length >= 14 ? (tcp[13] ?? 0) : -1,
    tags,
    fragment,
    payload: ports && tcp.length >= 13 ? tcp.subarray(((tcp[12] ?? 0) >> 4) * 4) : Buffer.alloc(0),
  };
}

function segment(packet: Packet): string {
  if (packet.fragment === 'later') return 'later fragment';
  const { flags } = packet;
  let name = 'ACK';
  if (flags < 0) name = 'short segment';
  else if ((flags & 0x12) === 0x12) name = 'SYN-ACK';
  else if (flags & 0x02) name = 'SYN';
  else if (flags & 0x04) name = 'RST';
  else if (packet.payload.length > 0) name = 'data';
  else if (flags & 0x01) name = 'FIN';
  return packet.fragment === 'first' ? `first fragment, ${name}` : name;
}

function describe(packet: Packet, vantage: Vantage): string {
  const end = (address: Buffer, port: number) => `${addressText(address)}${port < 0 ? '' : ` port ${port}`}`;
  const tags = packet.tags > 0 ? `, ${packet.tags} tags` : '';
  const from = end(packet.source, packet.sourcePort);
  const to = end(packet.destination, packet.destinationPort);
  return `${new Date(packet.time).toISOString()} at ${vantage.name}: ${from} > ${to}: ${segment(packet)}${tags}`;
}

export function judge(vantages: readonly Vantage[], ledger: Ledger): Verdict {
  const key = (bytes: Buffer) => bytes.toString('hex');
  const flows = new Map(ledger.flows.map((flow) => [flow.port, { ...flow, address: key(addressBytes(flow.client)) }]));
  const markers = new Map(ledger.flows.map((flow) => [flow.marker, flow]));
  const proxies = new Set(ledger.proxies.map((text) => key(addressBytes(text))));
  const enrolments = Map.groupBy(ledger.enrolments, ({ address }) => key(addressBytes(address)));
  const enrolled = (address: string, time: number) =>
    enrolments.get(address)?.some(({ from, to }) => time >= from && (to === undefined || time <= to)) ?? false;
  const [low, high] = ledger.ports;
  const own = (port: number) => port >= low && port <= high;

  const verdict: Verdict = { explained: {}, leaks: {}, examples: {}, completed: 0, seen: 0, packets: 0 };
  const explain = (why: string) => {
    verdict.explained[why] = (verdict.explained[why] ?? 0) + 1;
  };
  const leak = (kind: string, example: string) => {
    verdict.leaks[kind] = (verdict.leaks[kind] ?? 0) + 1;
    verdict.examples[kind] = [...(verdict.examples[kind] ?? []), example].slice(0, 3);
  };
  const seen = new Set<Flow>();

  for (const vantage of vantages) {
    const here = new Set(vantage.addresses.map((text) => key(addressBytes(text))));
    for (const packet of tcpPackets(vantage.file)) {
      verdict.packets += 1;
      const source = key(packet.source);
      const destination = key(packet.destination);
      const touched = enrolled(source, packet.time) || enrolled(destination, packet.time);
      const text = () => describe(packet, vantage);
      const note = /^noleak-\w+;/.exec(packet.payload.subarray(0, 40).toString('latin1'))?.[0];
      const marked = note === undefined ? undefined : markers.get(note);
      if (note !== undefined && marked === undefined) leak('payload that nobody sent', text());

      const byClient = own(packet.sourcePort);
      if (!byClient && !own(packet.destinationPort)) {
        // The proxy's own leg, or a fragment that does not say.
        if (packet.sourcePort < 0) {
          if (here.has(source) && !enrolled(source, packet.time)) explain('sent by the client');
          else if (touched) leak('fragment without ports', text());
          else explain('fragment between pods that are not enrolled');
        } else if (enrolments.has(source) || enrolments.has(destination)) {
          if (marked && marked.may !== 'nothing' && here.has(destination)) seen.add(marked);
          explain("the proxy's own leg");
        } else if (proxies.has(source) || proxies.has(destination)) {
          explain('the proxy itself');
        } else {
          leak('proxied though no end is enrolled', text());
        }
        continue;
      }

      const flow = flows.get(byClient ? packet.sourcePort : packet.destinationPort);
      const client = byClient ? source : destination;
      if (flow === undefined || flow.address !== client) {
        leak('flow of no generator', text());
        continue;
      }
      if (here.has(client)) {
        // The client's own side: it may send what it likes.
        if (byClient) explain('sent by the client');
        else if (flow.may === 'nothing') leak(`${flow.what}: answered, ${segment(packet)}`, text());
        else explain('answer to the client');
        continue;
      }
      if (marked && marked.port !== flow.port) leak("payload of another client's flow", text());
      if (marked && here.has(destination)) seen.add(marked);
      if (flow.may === 'direct') explain('direct: on the list');
      else if (flow.may === 'proxied' && !touched) explain('direct: neither end enrolled at that time');
      else leak(`${flow.what}: ${segment(packet)}${packet.tags > 0 ? ', tagged' : ''}`, text());
    }
  }
  for (const flow of ledger.flows) {
    if (!flow.completed) continue;
    verdict.completed += 1;
    if (seen.has(flow)) verdict.seen += 1;
    // A judge that does not see what certainly was there sees no leak either.
    else leak('completed, but in no capture', `${flow.what} ${flow.client} port ${flow.port}`);
  }
  return verdict;
}
