// SPDX-License-Identifier: Apache-2.0
import { isIP } from 'node:net';
import { describe, expect, test } from 'vitest';
import { formatAddress, parseAddress, parsePrefix } from './address.ts';
import { seededRandom } from './random.testing.ts';

const hex = (bytes: Uint8Array | undefined) => bytes && Buffer.from(bytes).toString('hex');

test.each([
  ['10.1.2.3', '00000000000000000000ffff0a010203', '10.1.2.3'],
  ['::', '00000000000000000000000000000000', '::'],
  ['::1', '00000000000000000000000000000001', '::1'],
  ['fd00:0:0:1::', 'fd000000000000010000000000000000', 'fd00:0:0:1::'],
  ['1:0:0:2:0:0:0:3', '00010000000000020000000000000003', '1:0:0:2::3'],
  ['1:2:3:4:5:6:7:0', '00010002000300040005000600070000', '1:2:3:4:5:6:7:0'],
  ['::ffff:192.0.2.1', '00000000000000000000ffffc0000201', '192.0.2.1'],
  ['64:ff9b::192.0.2.1', '0064ff9b0000000000000000c0000201', '64:ff9b::c000:201'],
  ['FE80::ABCD', 'fe80000000000000000000000000abcd', 'fe80::abcd'],
])('%s', (text, bytes, formatted) => {
  const address = parseAddress(text);
  expect(hex(address?.bytes)).toBe(bytes);
  expect(address && formatAddress(address.bytes)).toBe(formatted);
});

test.each([
  '',
  '1.2.3',
  '1.2.3.256',
  '01.2.3.4',
  '1.2.3.4 ',
  '1.2.3.-4',
  ':',
  ':::',
  '1::2::3',
  '1:2:3:4:5:6:7',
  '1:2:3:4:5:6:7:8:9',
  '1:2:3:4:5:6:7::8',
  '::12345',
  '::g',
  'fe80::1%eth0',
  '::1.2.3',
  '1.2.3.4::',
  '::1.2.3.4:5',
])('refuses %j', (text) => {
  expect(parseAddress(text)).toBeUndefined();
});

test.each([
  ['10.0.0.1/24', 4, 120],
  ['0.0.0.0/0', 4, 96],
  ['::/0', 6, 0],
  ['fd00::1/128', 6, 128],
] as const)('prefix %s', (text, family, length) => {
  expect(parsePrefix(text)).toMatchObject({ family, length });
});

test.each([
  '10.0.0.1',
  '10.0.0.1/33',
  '10.0.0.1/08',
  '10.0.0.1/',
  '::/129',
  '::/-1',
  '10.0.0.1/24/8',
  '/24',
  '10.0.0.1/ 8',
])('refuses prefix %j', (text) => {
  expect(parsePrefix(text)).toBeUndefined();
});

// node:net is an independent parser; it takes zones, which are refused here.
test('agrees with node:net on 20,000 texts', () => {
  const random = seededRandom(7);
  const tokens = ['0', '1', '9', '10', '255', '256', 'a', 'ff', 'ffff', 'fffff', ':', ':', ':', '::', '.', '.', '.'];
  for (let i = 0; i < 20_000; i++) {
    const text = Array.from({ length: 1 + random(16) }, () => tokens[random(tokens.length)]).join('');
    const address = parseAddress(text);
    expect([text, address?.family ?? 0]).toEqual([text, isIP(text)]);
    if (address) expect(hex(parseAddress(formatAddress(address.bytes))?.bytes)).toBe(hex(address.bytes));
  }
});

describe('random bytes', () => {
  test('survive formatting and parsing', () => {
    const random = seededRandom(8);
    for (let i = 0; i < 2_000; i++) {
      const bytes = Uint8Array.from({ length: 16 }, () => (random(2) === 0 ? 0 : random(256)));
      expect(hex(parseAddress(formatAddress(bytes))?.bytes)).toBe(hex(bytes));
    }
  });
});
