// SPDX-License-Identifier: Apache-2.0
//
// Ethernet frames, byte by byte, for BPF_PROG_TEST_RUN. Every layer is a function from what it carries to its bytes, and
// every field that a test may want to be wrong (lengths, versions, fragment offsets) can be given; what is not given is
// right, checksums included.

export const FIN = 0x01;
export const SYN = 0x02;
export const RST = 0x04;
export const PSH = 0x08;
export const ACK = 0x10;

export const ETH_P_IP = 0x0800;
export const ETH_P_ARP = 0x0806;
export const ETH_P_8021Q = 0x8100;
export const ETH_P_IPV6 = 0x86dd;
export const ETH_P_8021AD = 0x88a8;

export const IPPROTO_HOPOPTS = 0;
export const IPPROTO_ICMP = 1;
export const IPPROTO_TCP = 6;
export const IPPROTO_UDP = 17;
export const IPPROTO_ROUTING = 43;
export const IPPROTO_FRAGMENT = 44;
export const IPPROTO_AH = 51;
export const IPPROTO_ICMPV6 = 58;
export const IPPROTO_DSTOPTS = 60;
export const IPPROTO_SCTP = 132;

/** One end of a TCP or UDP tuple. */
export interface End {
  address: string;
  port: number;
}

/** "02:00:5e:10:00:01" as six bytes. */
export function mac(text: string): Buffer {
  const bytes = Buffer.from(text.split(':').map((byte) => Number.parseInt(byte, 16)));
  if (bytes.length !== 6) throw new TypeError(`not a MAC address: ${text}`);
  return bytes;
}

export function macText(bytes: Uint8Array): string {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join(':');
}

/** 4 or 16 bytes in network order. */
export function address(text: string): Buffer {
  if (!text.includes(':')) {
    const bytes = Buffer.from(text.split('.').map(Number));
    if (bytes.length !== 4) throw new TypeError(`not an IPv4 address: ${text}`);
    return bytes;
  }
  const [head = '', tail] = text.split('::');
  const groups = (part: string | undefined) => (part ? part.split(':').map((group) => Number.parseInt(group, 16)) : []);
  const left = groups(head);
  const right = groups(tail);
  const zeroes = new Array<number>(tail === undefined ? 0 : 8 - left.length - right.length).fill(0);
  const bytes = Buffer.alloc(16);
  [...left, ...zeroes, ...right].forEach((group, i) => {
    bytes.writeUInt16BE(group, i * 2);
  });
  return bytes;
}

/** 16 bytes in network order, IPv4 as ::ffff:a.b.c.d: the form of bpf/redirect.h. */
export function mapped(text: string): Uint8Array {
  const bytes = address(text);
  return new Uint8Array(
    bytes.length === 16 ? bytes : Buffer.concat([Buffer.alloc(10), Buffer.from([255, 255]), bytes]),
  );
}

/** The Internet checksum (RFC 1071). */
function checksum(...parts: Uint8Array[]): number {
  const bytes = Buffer.concat(parts);
  let sum = 0;
  for (let at = 0; at < bytes.length; at += 2) sum += (bytes[at] ?? 0) * 256 + (bytes[at + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + Math.floor(sum / 0x10000);
  return ~sum & 0xffff;
}

/** Pseudo header of TCP, UDP and ICMPv6 (RFC 9293, RFC 8200 section 8.1). */
function pseudoHeader(source: string, destination: string, protocol: number, length: number): Buffer {
  const six = source.includes(':');
  const rest = Buffer.alloc(six ? 8 : 4);
  if (six) rest.writeUInt32BE(length, 0);
  else rest.writeUInt16BE(length, 2);
  rest.writeUInt8(protocol, six ? 7 : 1);
  return Buffer.concat([address(source), address(destination), rest]);
}

export interface TcpFields {
  /** Default SYN. */
  flags?: number;
  seq?: number;
  ack?: number;
  window?: number;
  /** A multiple of 4 bytes, 40 at most. */
  tcpOptions?: Uint8Array;
  /** Header length in 32-bit words as the header says it; default: what it is. */
  dataOffset?: number;
  payload?: Uint8Array;
}

export function tcpSegment(from: End, to: End, fields: TcpFields = {}): Buffer {
  const options = fields.tcpOptions ?? Buffer.alloc(0);
  const segment = Buffer.concat([Buffer.alloc(20), options, fields.payload ?? Buffer.alloc(0)]);
  segment.writeUInt16BE(from.port, 0);
  segment.writeUInt16BE(to.port, 2);
  segment.writeUInt32BE(fields.seq ?? 0x12345678, 4);
  segment.writeUInt32BE(fields.ack ?? 0, 8);
  segment.writeUInt8((fields.dataOffset ?? 5 + options.length / 4) << 4, 12);
  segment.writeUInt8(fields.flags ?? SYN, 13);
  segment.writeUInt16BE(fields.window ?? 0xfaf0, 14);
  const pseudo = pseudoHeader(from.address, to.address, IPPROTO_TCP, segment.length);
  segment.writeUInt16BE(checksum(pseudo, segment), 16);
  return segment;
}

export function udpDatagram(from: End, to: End, payload: Uint8Array = Buffer.from('ambient')): Buffer {
  const datagram = Buffer.concat([Buffer.alloc(8), payload]);
  datagram.writeUInt16BE(from.port, 0);
  datagram.writeUInt16BE(to.port, 2);
  datagram.writeUInt16BE(datagram.length, 4);
  const pseudo = pseudoHeader(from.address, to.address, IPPROTO_UDP, datagram.length);
  // 0 would mean "no checksum" (RFC 768).
  datagram.writeUInt16BE(checksum(pseudo, datagram) || 0xffff, 6);
  return datagram;
}

/** ICMP or, between IPv6 addresses, ICMPv6. `rest`: bytes 4 to 7. */
export function icmpMessage(
  source: string,
  destination: string,
  type: number,
  body: Uint8Array,
  code = 0,
  rest = 0,
): Buffer {
  const message = Buffer.concat([Buffer.alloc(8), body]);
  message.writeUInt8(type, 0);
  message.writeUInt8(code, 1);
  message.writeUInt32BE(rest, 4);
  const pseudo = source.includes(':')
    ? pseudoHeader(source, destination, IPPROTO_ICMPV6, message.length)
    : Buffer.alloc(0);
  message.writeUInt16BE(checksum(pseudo, message), 2);
  return message;
}

export interface IPv4Fields {
  version?: number;
  /** Header length in 32-bit words as the header says it; default: what it is. */
  ihl?: number;
  /** A multiple of 4 bytes, 40 at most. */
  options?: Uint8Array;
  totalLength?: number;
  id?: number;
  dontFragment?: boolean;
  moreFragments?: boolean;
  /** In bytes, a multiple of 8. */
  fragmentOffset?: number;
}

export function ipv4Packet(
  source: string,
  destination: string,
  protocol: number,
  payload: Uint8Array,
  fields: IPv4Fields = {},
): Buffer {
  const header = Buffer.concat([Buffer.alloc(20), fields.options ?? Buffer.alloc(0)]);
  header.writeUInt8(((fields.version ?? 4) << 4) | (fields.ihl ?? header.length / 4), 0);
  header.writeUInt16BE(fields.totalLength ?? header.length + payload.length, 2);
  header.writeUInt16BE(fields.id ?? 0x4d2, 4);
  const flags = (fields.dontFragment ? 0x4000 : 0) | (fields.moreFragments ? 0x2000 : 0);
  header.writeUInt16BE(flags | ((fields.fragmentOffset ?? 0) >> 3), 6);
  header.writeUInt8(64, 8);
  header.writeUInt8(protocol, 9);
  address(source).copy(header, 12);
  address(destination).copy(header, 16);
  header.writeUInt16BE(checksum(header), 10);
  return Buffer.concat([header, payload]);
}

/** An IPv6 extension header: its protocol number, and its bytes for the protocol number that follows it. */
export interface Extension {
  protocol: number;
  bytes: (next: number) => Buffer;
}

/** Hop-by-hop, routing (type 253, no segments left) or destination options of 8 + 8 * `units` bytes, padded. */
export function optionsHeader(protocol: number, units = 0): Extension {
  return {
    protocol,
    bytes(next) {
      const header = Buffer.alloc(8 + 8 * units);
      header.writeUInt8(next, 0);
      header.writeUInt8(units, 1);
      if (protocol === IPPROTO_ROUTING) header.writeUInt8(253, 2);
      else Buffer.from([1, header.length - 4]).copy(header, 2); // PadN
      return header;
    },
  };
}

/** An authentication header of 24 bytes (RFC 4302): its length field counts 32-bit words minus 2. */
export function authenticationHeader(): Extension {
  return {
    protocol: IPPROTO_AH,
    bytes(next) {
      const header = Buffer.alloc(24);
      header.writeUInt8(next, 0);
      header.writeUInt8(4, 1);
      return header;
    },
  };
}

/** `offset` in bytes, a multiple of 8. */
export function fragmentHeader(offset: number, moreFragments: boolean): Extension {
  return {
    protocol: IPPROTO_FRAGMENT,
    bytes(next) {
      const header = Buffer.alloc(8);
      header.writeUInt8(next, 0);
      header.writeUInt16BE(offset | (moreFragments ? 1 : 0), 2);
      header.writeUInt32BE(0x4d2, 4);
      return header;
    },
  };
}

export interface IPv6Fields {
  version?: number;
  extensions?: readonly Extension[];
  payloadLength?: number;
}

export function ipv6Packet(
  source: string,
  destination: string,
  protocol: number,
  payload: Uint8Array,
  fields: IPv6Fields = {},
): Buffer {
  const extensions = fields.extensions ?? [];
  const follows = (i: number) => extensions[i]?.protocol ?? protocol;
  const body = Buffer.concat([...extensions.map((extension, i) => extension.bytes(follows(i + 1))), payload]);
  const header = Buffer.alloc(40);
  header.writeUInt8((fields.version ?? 6) << 4, 0);
  header.writeUInt16BE(fields.payloadLength ?? body.length, 4);
  header.writeUInt8(follows(0), 6);
  header.writeUInt8(64, 7);
  address(source).copy(header, 8);
  address(destination).copy(header, 24);
  return Buffer.concat([header, body]);
}

/** Either family, by the addresses. */
export type IPFields = IPv4Fields & IPv6Fields;

export function ipPacket(
  source: string,
  destination: string,
  protocol: number,
  payload: Uint8Array,
  fields: IPFields = {},
): Buffer {
  const make = source.includes(':') ? ipv6Packet : ipv4Packet;
  return make(source, destination, protocol, payload, fields);
}

/** Ethernet addresses of a frame; VLAN tags outermost first. */
export interface Wire {
  source: string;
  destination: string;
  tags?: readonly { protocol: number; id: number }[];
}

export function ethernetFrame(wire: Wire, type: number, payload: Uint8Array): Buffer {
  const tags = Buffer.concat(
    (wire.tags ?? []).map(({ protocol, id }) => {
      const tag = Buffer.alloc(4);
      tag.writeUInt16BE(protocol, 0);
      tag.writeUInt16BE(id, 2);
      return tag;
    }),
  );
  const last = Buffer.alloc(2);
  last.writeUInt16BE(type, 0);
  return Buffer.concat([mac(wire.destination), mac(wire.source), tags, last, payload]);
}

/** An IP packet of either family in a frame of the type that its first byte says, or of `type`. */
export function ipFrame(wire: Wire, packet: Uint8Array, type?: number): Buffer {
  return ethernetFrame(wire, type ?? ((packet[0] ?? 0) >> 4 === 6 ? ETH_P_IPV6 : ETH_P_IP), packet);
}

export function tcpFrame(wire: Wire, from: End, to: End, tcp: TcpFields = {}, ip: IPFields = {}): Buffer {
  const packet = ipPacket(from.address, to.address, IPPROTO_TCP, tcpSegment(from, to, tcp), ip);
  return ipFrame(wire, packet, from.address.includes(':') ? ETH_P_IPV6 : ETH_P_IP);
}

/** ARP request: who has `target`, tell `sender`. */
export function arpFrame(wire: Wire, sender: string, target: string): Buffer {
  const body = Buffer.concat([
    Buffer.from([0, 1, 8, 0, 6, 4, 0, 1]),
    mac(wire.source),
    address(sender),
    Buffer.alloc(6),
    address(target),
  ]);
  return ethernetFrame(wire, ETH_P_ARP, body);
}
