// SPDX-License-Identifier: Apache-2.0

import { expect, test } from 'vitest';
import type { Listener } from '../native.ts';
import { type ListenerState, listenerState } from './survey.ts';

const base: Listener = {
  family: 6,
  address: '::',
  port: 15001,
  v6only: false,
  transparent: true,
  uid: 0,
  inode: 1,
  mark: 0,
};
const ipv4: Partial<Listener> = { family: 4, address: '0.0.0.0' };

// What the programs find for a SYN of either family.
const cases: readonly [
  name: string,
  listeners: Partial<Listener>[] | undefined,
  ipv4: ListenerState,
  ipv6: ListenerState,
][] = [
  ['dual stack', [{}], 'listening', 'listening'],
  ['IPv6 only', [{ v6only: true }], 'missing', 'listening'],
  ['IPv4 only', [ipv4], 'listening', 'missing'],
  ['one socket for each family', [ipv4, { v6only: true }], 'listening', 'listening'],
  ['not transparent', [{ transparent: false }], 'not transparent', 'not transparent'],
  ['a kernel that does not tell', [{ transparent: undefined }], 'unknown', 'unknown'],
  ['another port', [{ port: 15006 }], 'missing', 'missing'],
  [
    'bound to an address that redirected packets do not look at',
    [{ ...ipv4, address: '192.0.2.4' }],
    'missing',
    'missing',
  ],
  ['nothing', [], 'missing', 'missing'],
  ['namespace gone', undefined, 'unknown', 'unknown'],
];

test.each(cases)('%s', (_name, listeners, expected4, expected6) => {
  const all = listeners?.map((listener) => ({ ...base, ...listener }));
  expect([listenerState(all, 4, 15001), listenerState(all, 6, 15001)]).toEqual([expected4, expected6]);
});
