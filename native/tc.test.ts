// SPDX-License-Identifier: Apache-2.0
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { type Namespace, Testbed } from '../conformance/netns.ts';
import { cause, failure, native, opened, type StateFixture, stateDirectory } from './native.testing.ts';

const bed = Testbed.open();
afterAll(() => bed.close());

let node: Namespace;
let netns: number;
let state: StateFixture;
let egress: number;
let ingress: number;
beforeAll(() => {
  node = bed.namespace('node');
  netns = opened(bed, node);
  state = stateDirectory(bed);
  egress = state.program('pod_egress');
  ingress = state.program('pod_ingress');
});

let count = 0;
let device = '';
let ifindex = 0;
beforeEach(() => {
  device = `v${count++}`;
  node.ip('link', 'add', device, 'up', 'type', 'veth', 'peer', 'name', `${device}p`);
  ifindex = native.linkByName(netns, device)?.ifindex ?? 0;
});

const tc = (...args: string[]) => node.run(['tc', ...args]);
const OURS = { priority: 1, handle: 0xa3b1, name: 'pod_egress', replace: false };

describe('qdiscs', () => {
  test('of a new veth: its root', () => {
    expect(native.qdiscs(netns, ifindex)).toEqual([{ kind: 'noqueue', handle: 0, parent: 0xffffffff }]);
  });

  test('a queue and a clsact', () => {
    tc(
      'qdisc',
      'replace',
      'dev',
      device,
      'root',
      'handle',
      '5:',
      'tbf',
      'rate',
      '8mbit',
      'burst',
      '10kb',
      'latency',
      '1s',
    );
    expect(native.addClsact(netns, ifindex)).toBe(true);
    expect(native.qdiscs(netns, ifindex)).toEqual([
      { kind: 'tbf', handle: 0x50000, parent: 0xffffffff },
      { kind: 'clsact', handle: 0xffff0000, parent: 0xfffffff1 },
    ]);
  });

  test('of a device that is not there: ENODEV', () => {
    expect(cause(() => native.qdiscs(netns, 4711))).toEqual({ code: 'ENODEV', errno: 19, syscall: 'RTM_GETQDISC' });
  });
});

describe('addClsact', () => {
  test('once', () => {
    expect(native.addClsact(netns, ifindex)).toBe(true);
    expect(native.addClsact(netns, ifindex)).toBe(false);
    expect(tc('qdisc', 'show', 'dev', device)).toContain('clsact ffff:');
  });

  test("where bandwidth has an ingress qdisc: EBUSY, in the kernel's words", () => {
    tc('qdisc', 'add', 'dev', device, 'ingress');
    const before = tc('qdisc', 'show', 'dev', device);
    expect(failure(() => native.addClsact(netns, ifindex))).toMatchObject({
      code: 'EBUSY',
      syscall: 'RTM_NEWQDISC',
      kernelMessage: 'Exclusivity flag on, cannot modify',
      message: `RTM_NEWQDISC clsact on ifindex ${ifindex} in netns fd ${netns}, where a qdisc of kind ingress has its place: EBUSY, Exclusivity flag on, cannot modify`,
    });
    expect(tc('qdisc', 'show', 'dev', device)).toBe(before);
  });

  test('on a device that is not there: ENODEV', () => {
    expect(cause(() => native.addClsact(netns, 4711)).code).toBe('ENODEV');
  });
});

describe('filters', () => {
  test('without a clsact there are none', () => {
    expect(native.filters(netns, ifindex, 'ingress')).toEqual([]);
    expect(native.deleteFilter(netns, ifindex, 'ingress', OURS)).toBe(false);
  });

  test('ours is attached, listed as tc lists it, and deleted', () => {
    native.addClsact(netns, ifindex);
    native.attachFilter(netns, ifindex, 'ingress', egress, OURS);
    native.attachFilter(netns, ifindex, 'egress', ingress, { ...OURS, name: 'pod_ingress' });
    const expected = { kind: 'bpf', priority: 1, protocol: 3, handle: 0xa3b1, directAction: true };
    const [programId, other] = [egress, ingress].map((fd) => native.programInfo(fd).id);
    expect(native.filters(netns, ifindex, 'ingress')).toEqual([{ ...expected, programId, name: 'pod_egress' }]);
    expect(native.filters(netns, ifindex, 'egress')).toEqual([{ ...expected, programId: other, name: 'pod_ingress' }]);
    const shown = JSON.parse(tc('-j', 'filter', 'show', 'dev', device, 'ingress')) as { options?: unknown }[];
    expect(shown).toContainEqual(
      expect.objectContaining({
        protocol: 'all',
        pref: 1,
        kind: 'bpf',
        options: expect.objectContaining({
          handle: '0xa3b1',
          bpf_name: 'pod_egress',
          'direct-action': true,
          prog: expect.objectContaining({ id: programId, name: 'pod_egress' }),
        }),
      }),
    );
    expect(native.deleteFilter(netns, ifindex, 'ingress', OURS)).toBe(true);
    expect(native.deleteFilter(netns, ifindex, 'ingress', OURS)).toBe(false);
    expect(native.filters(netns, ifindex, 'ingress')).toEqual([]);
    expect(native.filters(netns, ifindex, 'egress')).toHaveLength(1);
  });

  test('a taken place is EEXIST unless it is to be replaced', () => {
    native.addClsact(netns, ifindex);
    native.attachFilter(netns, ifindex, 'ingress', egress, OURS);
    expect(cause(() => native.attachFilter(netns, ifindex, 'ingress', ingress, OURS))).toEqual({
      code: 'EEXIST',
      errno: 17,
      syscall: 'RTM_NEWTFILTER',
    });
    native.attachFilter(netns, ifindex, 'ingress', ingress, { ...OURS, name: 'other', replace: true });
    expect(native.filters(netns, ifindex, 'ingress')).toMatchObject([
      { programId: native.programInfo(ingress).id, name: 'other', handle: 0xa3b1 },
    ]);
  });

  test('of others are listed and left alone', () => {
    native.addClsact(netns, ifindex);
    tc(
      'filter',
      'add',
      'dev',
      device,
      'ingress',
      'pref',
      '2',
      'protocol',
      'ip',
      'u32',
      'match',
      'u32',
      '0',
      '0',
      'flowid',
      '1:1',
    );
    tc(
      'filter',
      'add',
      'dev',
      device,
      'ingress',
      'pref',
      '1',
      'bpf',
      'da',
      'pinned',
      `${state.dir}/programs/test/pod_ingress`,
    );
    native.attachFilter(netns, ifindex, 'ingress', egress, OURS);
    expect(native.filters(netns, ifindex, 'ingress')).toMatchObject([
      { kind: 'bpf', priority: 1, handle: 0xa3b1, name: 'pod_egress' },
      { kind: 'bpf', priority: 1, handle: 1, name: 'pod_ingress:[*fsobj]' },
      // u32's hash table has a handle as its filters do.
      { kind: 'u32', priority: 2, protocol: 0x0800, handle: 0x80000000 },
      { kind: 'u32', priority: 2, protocol: 0x0800, handle: 0x80000800, programId: 0, name: '', directAction: false },
    ]);
    expect(native.deleteFilter(netns, ifindex, 'ingress', OURS)).toBe(true);
    expect(native.deleteFilter(netns, ifindex, 'ingress', { priority: 3, handle: 1 })).toBe(false);
    const foreign = failure(() => native.deleteFilter(netns, ifindex, 'ingress', { priority: 2, handle: 1 }));
    expect(foreign).toMatchObject({ code: 'EINVAL', syscall: 'RTM_DELTFILTER' });
    expect(native.filters(netns, ifindex, 'ingress')).toHaveLength(3);
  });

  test('in an ingress qdisc of somebody else', () => {
    tc('qdisc', 'add', 'dev', device, 'ingress');
    native.attachFilter(netns, ifindex, 'ingress', egress, OURS);
    expect(native.filters(netns, ifindex, 'ingress')).toMatchObject([{ handle: 0xa3b1, name: 'pod_egress' }]);
    expect(native.deleteFilter(netns, ifindex, 'ingress', OURS)).toBe(true);
    expect(tc('qdisc', 'show', 'dev', device)).toContain('ingress ffff:');
  });

  test('more than one netlink message holds', () => {
    native.addClsact(netns, ifindex);
    for (let handle = 1; handle <= 300; handle++) {
      native.attachFilter(netns, ifindex, 'ingress', egress, { ...OURS, handle, name: 'x'.repeat(200) });
    }
    const found = new Set(native.filters(netns, ifindex, 'ingress').map((filter) => filter.handle));
    expect(found.size).toBe(300);
  });

  test('errors name the place', () => {
    expect(failure(() => native.attachFilter(netns, ifindex, 'ingress', egress, OURS)).message).toMatch(
      new RegExp(`^RTM_NEWTFILTER ingress filter pref 1 handle 0xa3b1 of ifindex ${ifindex} in netns fd \\d+: EINVAL`),
    );
    native.addClsact(netns, ifindex);
    expect(cause(() => native.attachFilter(netns, ifindex, 'ingress', 1_000_000, OURS)).code).toBe('EBADF');
    expect(cause(() => native.attachFilter(netns, 4711, 'ingress', egress, OURS)).code).toBe('ENODEV');
    expect(native.filters(netns, 4711, 'ingress')).toEqual([]);
    expect(native.deleteFilter(netns, 4711, 'ingress', OURS)).toBe(false);
  });
});
