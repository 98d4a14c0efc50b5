// SPDX-License-Identifier: Apache-2.0
//
// Ethernet frames with a TCP segment, byte by byte, for what no socket would send.

export interface Frame {
  /** MAC addresses, "02:00:..." */
  source: string;
  destination: string;
  /** VLAN tags, outermost first. */
  tags?: readonly { protocol: 0x8100 | 0x88a8; id: number }[];
  from: string;
  to: string;
  sourcePort: number;
  destinationPort: number;
  /** Default SYN. */
  flags?: number;
  payload?: string;
}

export const SYN = 0x02;
export const ACK = 0x10;

export function mac(text: string): Uint8Array {
  return Uint8Array.from(text.split(':'), (byte) => Number.parseInt(byte, 16));
}

export function macText(bytes: Uint8Array): string {
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join(':');
}

function address(text: string): Buffer {
  if (!text.includes(':')) return Buffer.from(text.split('.').map(Number));
  const [head = '', tail] = text.split('::');
  const groups = (part: string | undefined) => (part ? part.split(':') : []);
  const left = groups(head);
  const right = groups(tail);
  const zeroes = Array<string>(tail === undefined ? 0 : 8 - left.length - right.length).fill('0');
  return Buffer.from(
    [...left, ...zeroes, ...right].flatMap((group) => {
      const value = Number.parseInt(group, 16);
      return [value >> 8, value & 0xff];
    }),
  );
}

/** The Internet checksum (RFC 1071). */
function checksum(bytes: Buffer): number {
  let sum = 0;
  for (let at = 0; at < bytes.length; at += 2) sum += (bytes[at] ?? 0) * 256 + (bytes[at + 1] ?? 0);
  while (sum > 0xffff) sum = (sum & 0xffff) + Math.floor(sum / 0x10000);
  return ~sum & 0xffff;
}

/** One Ethernet frame with one TCP segment. */
export function tcpFrame(frame: Frame): Uint8Array {
  const from = address(frame.from);
  const to = address(frame.to);
  const tcp = Buffer.concat([Buffer.alloc(20), Buffer.from(frame.payload ?? '')]);
  tcp.writeUInt16BE(frame.sourcePort, 0);
  tcp.writeUInt16BE(frame.destinationPort, 2);
  tcp.writeUInt32BE(0x12345678, 4);
  tcp.writeUInt8(5 << 4, 12);
  tcp.writeUInt8(frame.flags ?? SYN, 13);
  tcp.writeUInt16BE(0xffff, 14);
  tcp.writeUInt16BE(checksum(Buffer.concat([from, to, Buffer.from([0, 6, 0, tcp.length]), tcp])), 16);

  const header = Buffer.alloc(from.length === 4 ? 20 : 40);
  if (from.length === 4) {
    header.writeUInt8(0x45, 0);
    header.writeUInt16BE(20 + tcp.length, 2);
    header.writeUInt8(64, 8);
    header.writeUInt8(6, 9);
    from.copy(header, 12);
    to.copy(header, 16);
    header.writeUInt16BE(checksum(header), 10);
  } else {
    header.writeUInt8(0x60, 0);
    header.writeUInt16BE(tcp.length, 4);
    header.writeUInt8(6, 6);
    header.writeUInt8(64, 7);
    from.copy(header, 8);
    to.copy(header, 24);
  }
  const tags = (frame.tags ?? []).flatMap(({ protocol, id }) => [protocol >> 8, protocol & 0xff, id >> 8, id & 0xff]);
  const type = from.length === 4 ? [0x08, 0x00] : [0x86, 0xdd];
  return Buffer.concat([mac(frame.destination), mac(frame.source), Buffer.from([...tags, ...type]), header, tcp]);
}
