// SPDX-License-Identifier: Apache-2.0
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { must, Testbed } from '../conformance/netns.ts';
import type { State } from '../plugin/native.ts';
import {
  bytes,
  cause,
  descriptors,
  failure,
  interfaceRecord,
  native,
  stateDirectory,
  WANTED,
} from './native.testing.ts';

let bed: Testbed;
beforeEach(() => {
  bed = Testbed.open();
});
afterEach(() => bed.close());

function open(dir: string): State {
  const state = native.openState(dir);
  bed.defer(() => native.closeState(state));
  return state;
}

/** An Ethernet frame of a UDP packet; no program judges it. */
const udp = Uint8Array.from(
  Buffer.from(
    '02005e100001' +
      '02005e100002' +
      '0800' +
      '4500001c000040004011' +
      '0000' +
      'c0000202' +
      'c0000203' +
      '1234567800080000',
    'hex',
  ),
);

const USED_BY_POD_EGRESS = [
  'interfaces',
  'endpoints',
  'proxies',
  'flows',
  'direct',
  'exclusions',
  'fragments',
  'resolvers',
  'trace',
  'events',
  'counters',
];

describe('loadPrograms', () => {
  test('pins every program under its tag, by its name', () => {
    const { dir } = stateDirectory(bed);
    const directory = join(dir, 'programs/test');
    const names = [...Object.keys(native.programs), 'direct_import'];
    expect(readdirSync(directory).sort()).toEqual([...names].sort());
    expect(statSync(directory).mode & 0o777).toBe(0o700);
    for (const name of names) {
      const fd = native.openProgram(join(directory, name));
      const info = native.programInfo(fd);
      native.close(fd);
      const shown = JSON.parse(must(['bpftool', '-j', 'prog', 'show', 'pinned', join(directory, name)])) as {
        id: number;
        tag: string;
        type: string;
      };
      expect(info).toEqual({ id: shown.id, name, tag: shown.tag, verified: expect.any(Number) });
      expect(info.verified).toBeGreaterThan(0);
      expect(shown.type).toBe(name.endsWith('_lookup') ? 'sk_lookup' : 'sched_cls');
      expect(native.programById(info.id)).toEqual(info);
    }
  });

  test('uses the maps of the state directory, for which no other is made', () => {
    const { dir } = stateDirectory(bed);
    const ids = new Set<number>();
    for (const name of USED_BY_POD_EGRESS) {
      ids.add((JSON.parse(must(['bpftool', '-j', 'map', 'show', 'pinned', join(dir, name)])) as { id: number }).id);
    }
    const { map_ids } = JSON.parse(
      must(['bpftool', '-j', 'prog', 'show', 'pinned', join(dir, 'programs/test/pod_egress')]),
    ) as { map_ids: number[] };
    // and one that libbpf made of the constants
    expect(map_ids.filter((id) => !ids.has(id))).toHaveLength(1);
    expect(map_ids.filter((id) => ids.has(id))).toHaveLength(ids.size);
  });

  test('again replaces the pins; a tag is a directory of its own', () => {
    const { dir } = stateDirectory(bed);
    const program = join(dir, 'programs/test/pod_egress');
    const id = () => {
      const fd = native.openProgram(program);
      try {
        return native.programInfo(fd).id;
      } finally {
        native.close(fd);
      }
    };
    const first = id();
    const state = open(dir);
    const before = descriptors();
    native.loadPrograms(state, dir, 'other');
    expect(id()).toBe(first);
    native.loadPrograms(state, dir, 'test');
    expect(id()).not.toBe(first);
    expect(descriptors()).toEqual(before);
    expect(readdirSync(join(dir, 'programs')).sort()).toEqual(['other', 'test']);
  });

  test.each([
    ['no-redirect-peer', 'VARIANT_NO_REDIRECT_PEER', 'bpf_redirect_peer'],
    ['no-sk-assign', 'VARIANT_NO_SK_ASSIGN', 'bpf_sk_assign'],
  ])('variant %s leaves the call out of the loaded code', (_, flag, helper) => {
    const calls = (variant: number) => {
      const { dir } = stateDirectory(bedFor(), { ...WANTED, variant });
      return readdirSync(join(dir, 'programs/test'))
        .map((name) => must(['bpftool', 'prog', 'dump', 'xlated', 'pinned', join(dir, 'programs/test', name)]))
        .join('\n');
    };
    const bedFor = () => {
      const other = Testbed.open();
      bed.defer(() => other.close());
      return other;
    };
    expect(calls(0)).toContain(`call ${helper}#`);
    expect(calls(native.flags[flag] ?? 0)).not.toContain(`call ${helper}#`);
  });

  test('what the verifier says comes with the error', () => {
    const dir = join(bed.bpffs('bpf'), 'state');
    native.makeDirectory(dir, 0o700);
    native.createState(dir, WANTED);
    // A map that does not say where in its values the lock is.
    const [direct, size] = [join(dir, 'direct'), String(native.sizes.direct_set)];
    native.removeFile(direct);
    must(
      ['bpftool', 'map', 'create', direct, 'type', 'hash', 'key', '8', 'value', size, 'entries', '16'].concat([
        'name',
        'direct',
        'flags',
        '1',
      ]),
    );
    const state = open(dir);
    const error = failure(() => native.loadPrograms(state, dir, 'test'));
    expect(error).toMatchObject({ syscall: 'bpf(BPF_PROG_LOAD)' });
    expect(error.verifierLog).toMatch(/\nmap 'direct' has to have BTF .*\nprocessed \d+ insns/);
    expect(error.kernelMessage).toMatch(/^map 'direct' has to have BTF .*; prog '\w+': BPF program load failed:/);
    expect(error.message).not.toContain('\n');
    expect(readdirSync(dir)).not.toContain('programs');
  });
});

describe('programs by path and id', () => {
  test('absent ones', () => {
    expect(cause(() => native.openProgram('/proc/nonexistent'))).toEqual({
      code: 'ENOENT',
      errno: 2,
      syscall: 'bpf(BPF_OBJ_GET)',
    });
    expect(native.programById(0xffffffff)).toBeNull();
    expect(native.programById(0)).toBeNull();
  });
});

describe('testRun', () => {
  test('passes on what is not ours and says so in the counters', () => {
    const { dir, program } = stateDirectory(bed);
    const state = open(dir);
    const fd = program('pod_egress');
    expect(native.testRun(fd, udp)).toMatchObject({ verdict: -1, packet: udp, mark: 0 });
    expect(native.counters(state)).toEqual([]);
    // A test run's device is lo unless told otherwise.
    native.putInterface(state, 1, interfaceRecord());
    expect(native.testRun(fd, udp, { mark: 7, repeat: 3 })).toMatchObject({ verdict: -1, packet: udp, mark: 7 });
    native.testRun(fd, udp);
    expect(native.counters(state)).toEqual([
      { ifindex: 1, program: 'pod_egress', reason: 'pass_not_tcp', packets: 4n, bytes: BigInt(4 * udp.length) },
    ]);
    native.testRun(fd, udp, { mark: WANTED.marks.bypass });
    expect(
      native
        .counters(state)
        .map(({ reason }) => reason)
        .sort(),
    ).toEqual(['pass_bypass', 'pass_not_tcp']);
    expect(native.mapUsage(state).find(({ map }) => map === 'counters')?.entries).toBe(2);
    expect(native.deleteCounters(state, 2)).toBe(0);
    expect(native.deleteCounters(state, 1)).toBe(2);
    expect(native.counters(state)).toEqual([]);
  });

  test('the mark of our constants is ours alone', () => {
    const { dir, program } = stateDirectory(bed, { ...WANTED, marks: { ...WANTED.marks, bypass: 0x1234 } });
    const state = open(dir);
    native.putInterface(state, 1, interfaceRecord());
    native.testRun(program('pod_egress'), udp, { mark: WANTED.marks.bypass });
    expect(native.counters(state)).toMatchObject([{ reason: 'pass_not_tcp' }]);
    expect(native.testRun(program('pod_egress'), udp, { mark: 0x1234 }).mark).toBe(0);
  });

  test('a device that is not there, a frame that is too short', () => {
    const fd = stateDirectory(bed).program('pod_egress');
    expect(cause(() => native.testRun(fd, udp, { ifindex: 4711 }))).toMatchObject({
      code: 'ENODEV',
      syscall: 'bpf(BPF_PROG_TEST_RUN)',
    });
    expect(cause(() => native.testRun(fd, bytes(4))).code).toBe('EINVAL');
  });
});

test('features are known by doing', () => {
  expect(native.features()).toEqual({
    tcx: true,
    redirectPeer: true,
    skAssign: true,
    skLookup: true,
    skcLookup: true,
    checkMtu: true,
    tcpCheckSyncookie: true,
    netnsCookie: true,
    btf: true,
  });
});
