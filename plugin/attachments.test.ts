// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { expect, test } from 'vitest';
import { loadNative } from './addon.ts';
import { attachmentKey, hex } from './attachments.ts';

const native = loadNative();

test.each([
  ['mesh', 'abc', 'eth0'],
  ['a'.repeat(300), 'b'.repeat(300), 'net1'],
  ['n', 'c', 'ü'],
])('the key of %j %j %j is the SHA-256 of the three, apart by NUL', (network, containerId, ifname) => {
  const expected = createHash('sha256').update(`${network}\0${containerId}\0${ifname}`).digest('hex');
  expect(hex(attachmentKey(native, network, containerId, ifname))).toBe(expected);
});

test('what is moved from one name to the next is another key', () => {
  expect(attachmentKey(native, 'ab', 'c', 'eth0')).not.toEqual(attachmentKey(native, 'a', 'bc', 'eth0'));
});
