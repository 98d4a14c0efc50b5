// SPDX-License-Identifier: Apache-2.0
// Textual IP addresses and prefixes <-> 16 bytes in network order, IPv4 as ::ffff:a.b.c.d.

export interface IpAddress {
  family: 4 | 6;
  bytes: Uint8Array;
}

export interface IpPrefix {
  /** of the text: ::ffff:0:0/96 is of family 6 */
  family: 4 | 6;
  /** as written, host bits included */
  bytes: Uint8Array;
  /** in 128-bit space: an IPv4 /24 is 120 */
  length: number;
}

/** undefined if the text is no address. Zones ("fe80::1%eth0") and leading zeros in IPv4 are refused. */
export function parseAddress(text: string): IpAddress | undefined {
  if (text.includes(':')) {
    const bytes = parseIpv6(text);
    return bytes && { family: 6, bytes };
  }
  const quad = parseIpv4(text);
  return quad && { family: 4, bytes: Uint8Array.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, ...quad]) };
}

/** "10.0.0.1/8", "fd00::/64"; undefined if the text is no prefix. */
export function parsePrefix(text: string): IpPrefix | undefined {
  const slash = text.indexOf('/');
  if (slash < 0) return undefined;
  const address = parseAddress(text.slice(0, slash));
  const digits = text.slice(slash + 1);
  if (address === undefined || !/^(0|[1-9][0-9]{0,2})$/.test(digits)) return undefined;
  const length = Number(digits);
  if (length > (address.family === 4 ? 32 : 128)) return undefined;
  return { ...address, length: address.family === 4 ? length + 96 : length };
}

/** Dotted quad for IPv4, RFC 5952 for IPv6. */
export function formatAddress(bytes: Uint8Array): string {
  const view = new DataView(bytes.buffer, bytes.byteOffset, 16);
  const groups = Array.from({ length: 8 }, (_, i) => view.getUint16(2 * i));
  if (groups.slice(0, 5).every((group) => group === 0) && groups[5] === 0xffff) return bytes.slice(12, 16).join('.');

  let zeros = { at: 8, count: 1 };
  for (let at = 0; at < 8; at++) {
    let count = 0;
    while (groups[at + count] === 0) count++;
    if (count > zeros.count) zeros = { at, count };
  }
  const hex = (part: readonly number[]) => part.map((group) => group.toString(16)).join(':');
  if (zeros.at === 8) return hex(groups);
  return `${hex(groups.slice(0, zeros.at))}::${hex(groups.slice(zeros.at + zeros.count))}`;
}

function parseIpv4(text: string): number[] | undefined {
  const parts = text.split('.');
  if (parts.length !== 4 || !parts.every((part) => /^(0|[1-9][0-9]{0,2})$/.test(part))) return undefined;
  const quad = parts.map(Number);
  return quad.every((byte) => byte <= 255) ? quad : undefined;
}

function parseIpv6(text: string): Uint8Array | undefined {
  const halves = text.split('::');
  if (halves.length > 2) return undefined;
  const head = parseGroups(halves[0] ?? '', halves.length === 1);
  const tail = halves.length === 2 ? parseGroups(halves[1] ?? '', true) : [];
  if (head === undefined || tail === undefined) return undefined;
  const given = head.length + tail.length;
  // "::" stands for at least one group.
  if (halves.length === 1 ? given !== 16 : given > 14) return undefined;
  const bytes = new Uint8Array(16);
  bytes.set(head);
  bytes.set(tail, 16 - tail.length);
  return bytes;
}

/** Bytes of colon-separated groups; the last may be a dotted quad if `last` (it ends the address). '' has none. */
function parseGroups(text: string, last: boolean): number[] | undefined {
  if (text === '') return [];
  const bytes: number[] = [];
  const groups = text.split(':');
  for (const [i, group] of groups.entries()) {
    if (last && i === groups.length - 1 && group.includes('.')) {
      const quad = parseIpv4(group);
      if (quad === undefined) return undefined;
      bytes.push(...quad);
    } else if (/^[0-9a-fA-F]{1,4}$/.test(group)) {
      const value = Number.parseInt(group, 16);
      bytes.push(value >> 8, value & 255);
    } else {
      return undefined;
    }
  }
  return bytes;
}
