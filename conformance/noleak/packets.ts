// SPDX-License-Identifier: Apache-2.0
//
// Frames that no socket would send: what is made of one of tcpFrame()'s.

function withChecksum(header: Buffer): Buffer {
  header.writeUInt16BE(0, 10);
  let sum = 0;
  for (let at = 0; at < header.length; at += 2) sum += header.readUInt16BE(at);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  header.writeUInt16BE(~sum & 0xffff, 10);
  return header;
}

/**
 * An untagged TCP frame as two fragments (RFC 791, RFC 8200 section 4.5): the first one with `length` bytes of TCP, a
 * multiple of 8, the second one with the rest.
 */
export function fragments(frame: Uint8Array, length: number, identification: number): [Uint8Array, Uint8Array] {
  const bytes = Buffer.from(frame);
  const ethernet = bytes.subarray(0, 14);
  if (bytes.readUInt16BE(12) === 0x0800) {
    const tcp = bytes.subarray(34);
    const part = (offset: number, content: Buffer, more: boolean) => {
      const header = Buffer.from(bytes.subarray(14, 34));
      header.writeUInt16BE(20 + content.length, 2);
      header.writeUInt16BE(identification & 0xffff, 4);
      header.writeUInt16BE((more ? 0x2000 : 0) | (offset / 8), 6);
      return Buffer.concat([ethernet, withChecksum(header), content]);
    };
    return [part(0, tcp.subarray(0, length), true), part(length, tcp.subarray(length), false)];
  }
  const tcp = bytes.subarray(54);
  const part = (offset: number, content: Buffer, more: boolean) => {
    const header = Buffer.from(bytes.subarray(14, 54));
    header.writeUInt16BE(8 + content.length, 4);
    header.writeUInt8(44, 6);
    const extension = Buffer.alloc(8);
    extension.writeUInt8(6, 0);
    extension.writeUInt16BE(offset | (more ? 1 : 0), 2);
    extension.writeUInt32BE(identification, 4);
    return Buffer.concat([ethernet, header, extension, content]);
  };
  return [part(0, tcp.subarray(0, length), true), part(length, tcp.subarray(length), false)];
}

/** An untagged IPv6 TCP frame with `count` destination options headers in front of TCP, filled with PadN. */
export function withExtensions(frame: Uint8Array, count: number): Uint8Array {
  const bytes = Buffer.from(frame);
  if (bytes.readUInt16BE(12) !== 0x86dd) throw new TypeError('not an IPv6 frame');
  const header = Buffer.from(bytes.subarray(0, 54));
  header.writeUInt16BE(header.readUInt16BE(18) + 8 * count, 18);
  header.writeUInt8(60, 20);
  const options = Array.from({ length: count }, (_, index) =>
    Buffer.from([index === count - 1 ? 6 : 60, 0, 1, 4, 0, 0, 0, 0]),
  );
  return Buffer.concat([header, ...options, bytes.subarray(54)]);
}
