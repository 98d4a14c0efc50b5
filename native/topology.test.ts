// SPDX-License-Identifier: Apache-2.0
// The functions behind the demo's namespaces, against the real kernel.

import {
  closeSync,
  existsSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNative } from '../plugin/addon.ts';
import type { DemoNative } from '../plugin/demo/native-topology.ts';

const native = loadNative() as DemoNative;
const directory = mkdtempSync(join(tmpdir(), 'ambient-redirect-topology-'));
const [pathA, pathB] = [join(directory, 'a'), join(directory, 'b')];
let a: number;
let b: number;

beforeEach(() => {
  native.createNetns(pathA);
  native.createNetns(pathB);
  a = native.openNetns(pathA);
  b = native.openNetns(pathB);
});
afterEach(() => {
  native.close(a);
  native.close(b);
  native.deleteNetns(pathA);
  native.deleteNetns(pathB);
});
afterAll(() => rmSync(directory, { recursive: true }));

const ownNetns = () => readlinkSync('/proc/thread-self/ns/net');

test('a namespace is new, and the thread is back in its own', () => {
  const before = ownNetns();
  expect(native.netnsIdentity(a).ino).not.toBe(native.netnsIdentity(b).ino);
  expect(native.netnsIdentity(a).ino).not.toBe(native.netnsIdentity(-1).ino);
  expect(ownNetns()).toBe(before);
});

test('a path that is taken is left as it was', () => {
  const path = join(directory, 'file');
  writeFileSync(path, 'kept');
  expect(() => native.createNetns(path)).toThrow(expect.objectContaining({ code: 'EEXIST', syscall: 'open' }));
  expect(readFileSync(path, 'utf8')).toBe('kept');
});

test('deleteNetns says whether there was something, and takes a plain file too', () => {
  const path = join(directory, 'once');
  native.createNetns(path);
  expect(native.deleteNetns(path)).toBe(true);
  expect(native.deleteNetns(path)).toBe(false);
  writeFileSync(path, '');
  expect(native.deleteNetns(path)).toBe(true);
  expect(existsSync(path)).toBe(false);
});

describe('inNetns', () => {
  test('runs the callback there and gives its value back', () => {
    expect(native.inNetns(a, () => ownNetns())).toBe(`net:[${native.netnsIdentity(a).ino}]`);
    expect(native.inNetns(a, () => native.inNetns(b, () => ownNetns()))).toBe(`net:[${native.netnsIdentity(b).ino}]`);
  });

  test('comes back when the callback throws', () => {
    const before = ownNetns();
    expect(() =>
      native.inNetns(a, () => {
        throw new RangeError('thrown inside');
      }),
    ).toThrow(new RangeError('thrown inside'));
    expect(ownNetns()).toBe(before);
  });
});

test('a veth pair with addresses and routes of both families', () => {
  native.createVeth(a, 'veth0', b, 'eth0');
  for (const [family, one, other, any] of [
    [32, '192.0.2.1', '192.0.2.2', '0.0.0.0'],
    [128, '2001:db8::1', '2001:db8::2', '::'],
  ] as const) {
    native.addAddress(a, 'veth0', one, family);
    native.addRoute(a, 'veth0', other, family, null);
    native.addAddress(b, 'eth0', other, family);
    native.addRoute(b, 'eth0', any, 0, one);
  }
  const host = native.linkByName(a, 'veth0');
  const pod = native.linkByName(b, 'eth0');
  expect([host, pod]).toMatchObject([
    { kind: 'veth', up: true, peerIfindex: pod?.ifindex },
    { kind: 'veth', up: true, peerIfindex: host?.ifindex },
  ]);
  const own = native.linkAddresses(b, pod?.ifindex ?? 0).filter(({ scope }) => scope === 0);
  expect(own.map(({ prefix }) => prefix)).toEqual([128, 128]);
  const routes = native.inNetns(b, () => readFileSync('/proc/thread-self/net/route', 'utf8'));
  expect(routes).toMatch(/^eth0\t00000000\t010200C0\t/m);

  expect(native.deleteLink(a, 'veth0')).toBe(true);
  expect(native.deleteLink(a, 'veth0')).toBe(false);
  expect(native.linkByName(b, 'eth0')).toBe(null);
});

describe('what the kernel refuses says what, on which object and why', () => {
  beforeEach(() => native.createVeth(a, 'veth0', b, 'eth0'));
  const cases: readonly [string, () => void, object][] = [
    [
      'a second interface of that name',
      () => native.createVeth(a, 'veth0', b, 'eth1'),
      { code: 'EEXIST', syscall: 'RTM_NEWLINK' },
    ],
    ['an address on no interface', () => native.addAddress(a, 'gone', '192.0.2.1', 32), { code: 'ENODEV' }],
    ['a route on no interface', () => native.addRoute(a, 'gone', '192.0.2.1', 32, null), { code: 'ENODEV' }],
    ['bringing up no interface', () => native.setLinkUp(a, 'gone'), { code: 'ENODEV' }],
    [
      'host bits in a route',
      () => native.addRoute(a, 'veth0', '192.0.2.1', 8, null),
      { code: 'EINVAL', syscall: 'RTM_NEWROUTE', kernelMessage: 'Invalid prefix for given prefix length' },
    ],
    ['unmounting what is no mount', () => native.unmount(directory), { code: 'EINVAL', syscall: 'umount2' }],
    ['a directory that is not there', () => native.createNetns('/nowhere/netns'), { code: 'ENOENT' }],
  ];
  test.each(cases)('%s', (_name, call, fields) => {
    expect(call).toThrow(expect.objectContaining({ errno: expect.any(Number), ...fields }));
  });

  test('a descriptor that is closed, or none of a namespace', () => {
    const closed = openSync(pathA, 'r');
    closeSync(closed);
    // Not in the namespace of this process instead, whose descriptor might get the same number.
    for (const call of [
      () => native.setLinkUp(closed, 'lo'),
      () => native.createVeth(closed, 'veth1', b, 'eth1'),
      () => native.createVeth(a, 'veth1', closed, 'eth1'),
      () => native.linkByName(closed, 'lo'),
    ]) {
      expect(call).toThrow(expect.objectContaining({ code: 'EBADF', syscall: 'setns' }));
    }
    const file = openSync(import.meta.filename, 'r');
    expect(() => native.setLinkUp(file, 'lo')).toThrow(expect.objectContaining({ code: 'EINVAL', syscall: 'setns' }));
    closeSync(file);
  });
});

describe('wrong arguments are TypeErrors', () => {
  // biome-ignore lint/suspicious/noExplicitAny: what TypeScript would not let through is what is tested
  const untyped = native as any;
  const cases: readonly [string, () => void][] = [
    ['createNetns()', () => untyped.createNetns()],
    ['deleteNetns(1)', () => untyped.deleteNetns(1)],
    ['unmount({})', () => untyped.unmount({})],
    ['inNetns with no callback', () => untyped.inNetns(a)],
    ['inNetns with a fraction', () => untyped.inNetns(1.5, () => {})],
    ['inNetns with -2', () => untyped.inNetns(-2, () => {})],
    ['inNetns with NaN', () => untyped.inNetns(Number.NaN, () => {})],
    ['createVeth into the host', () => untyped.createVeth(a, 'veth0', -1, 'eth0')],
    ['createVeth with a long name', () => untyped.createVeth(a, 'sixteen-bytes-xx', b, 'eth0')],
    ['createVeth without a name', () => untyped.createVeth(a, '', b, 'eth0')],
    ['addAddress with a name for an address', () => untyped.addAddress(a, 'lo', 'localhost', 32)],
    ['addAddress with too long a prefix', () => untyped.addAddress(a, 'lo', '192.0.2.1', 33)],
    ['addAddress with a negative prefix', () => untyped.addAddress(a, 'lo', '192.0.2.1', -1)],
    ['addRoute with a gateway of the other family', () => untyped.addRoute(a, 'lo', '192.0.2.1', 32, '::1')],
  ];
  test.each(cases)('%s', (_name, call) => {
    const before = ownNetns();
    expect(call).toThrow(TypeError);
    expect(ownNetns()).toBe(before);
  });
});

test('a hundred rounds leave no descriptor behind', () => {
  const round = () => {
    const path = join(directory, 'round');
    native.createNetns(path);
    const netns = native.openNetns(path);
    native.createVeth(a, 'veth1', netns, 'eth0');
    expect(() => native.addAddress(netns, 'none', '::1', 128)).toThrow();
    native.deleteLink(a, 'veth1');
    native.close(netns);
    native.deleteNetns(path);
  };
  round();
  const before = readdirSync('/proc/self/fd').length;
  for (let i = 0; i < 100; i++) round();
  expect(readdirSync('/proc/self/fd')).toHaveLength(before);
});
