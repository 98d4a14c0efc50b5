// SPDX-License-Identifier: Apache-2.0
// What each row of README "Kernels" promises: on the oldest kernel of the row the programs call no helper, and use no map
// or program type, that came later; they stay below the verifier's limit, and load where BTF is refused.
//
// The object is loaded here with the constants that native/programs.cc would set there, so that this kernel's verifier
// removes the dead branches, and the instructions that it kept are read back (bpftool prog dump xlated). The versions in
// the tables are those of the kernel's own history.

import { copyFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { exec, must, Testbed } from '../../conformance/netns.ts';
import { stateDirectory } from '../../native/native.testing.ts';
import { loadNative } from '../../plugin/addon.ts';

const ROOT = dirname(dirname(import.meta.dirname));
const OBJECT = join(ROOT, 'build/skeletons/redirect.bpf.o');

/** Constants of bpf/maps.h, and the kernel from which on programs.cc sets them. */
const SINCE: Record<string, string> = {
  use_redirect_peer: '5.10',
  use_check_mtu: '5.12',
  use_check_syncookie: '5.2',
  use_sk_assign: '5.7',
  use_sk_lookup: '5.10',
  use_ringbuf: '5.8',
  use_spin_lock: '5.5',
};

/** A call as the verifier leaves it, and the kernel that brought the helper: for programs of type sched_cls. */
const HELPERS: Record<string, string> = {
  // Maps: 3.18 and 3.19; the verifier puts the map's own function in the place of the call.
  __htab_map_lookup_elem: '3.19',
  htab_map_update_elem: '3.19',
  htab_lru_map_update_elem: '4.10',
  htab_lru_map_delete_elem: '4.10',
  htab_percpu_map_update_elem: '4.6',
  trie_lookup_elem: '4.11',
  // Of a sockmap, from tc.
  sock_map_update_elem: '5.10',
  bpf_ktime_get_ns: '4.1',
  bpf_skb_store_bytes: '4.1',
  bpf_l3_csum_replace: '4.1',
  bpf_l4_csum_replace: '4.1',
  bpf_clone_redirect: '4.2',
  bpf_redirect: '4.4',
  bpf_skb_event_output: '4.4',
  bpf_skb_load_bytes: '4.5',
  bpf_csum_diff: '4.6',
  bpf_skb_change_type: '4.8',
  bpf_skb_change_tail: '4.9',
  bpf_skb_adjust_room: '4.13',
  bpf_tc_sk_lookup_tcp: '4.20',
  bpf_tc_sk_lookup_udp: '4.20',
  bpf_sk_release: '4.20',
  bpf_skb_cgroup_id: '4.18',
  bpf_sk_fullsock: '5.1',
  bpf_spin_lock: '5.1',
  bpf_spin_unlock: '5.1',
  bpf_sk_storage_get: '5.2',
  bpf_tc_skc_lookup_tcp: '5.2',
  bpf_tcp_check_syncookie: '5.2',
  bpf_sk_assign: '5.7',
  bpf_ringbuf_output: '5.8',
  // sk_lookup: the program type, looking up a map of sockets from it, and assigning.
  bpf_sk_lookup_assign: '5.9',
  sock_hash_lookup: '5.9',
  bpf_redirect_peer: '5.10',
  bpf_skb_check_mtu: '5.12',
};
const MAP_TYPES: Record<string, string> = {
  hash: '3.19',
  array: '3.19',
  perf_event_array: '4.3',
  percpu_hash: '4.6',
  percpu_array: '4.6',
  sk_storage: '5.2',
  lru_hash: '4.10',
  lpm_trie: '4.11',
  hash_of_maps: '4.12',
  sockhash: '4.18',
  ringbuf: '5.8',
};
const PROGRAM_TYPES: Record<string, string> = { sched_cls: '4.1', sk_lookup: '5.9' };

/** Oldest kernels of README's rows. */
const ROWS = ['6.6', '5.10', '5.7', '5.5'] as const;

/**
 * The object itself needs 5.5: read-only constants that the verifier follows into branches (BPF_F_RDONLY_PROG is 5.2).
 * It is also the version from which on no row has the 4,096 instructions of kernels before 5.2.
 */
const OBJECT_SINCE = '5.5';
const VERIFIED_LIMIT = 1_000_000;

const number = (version: string) => {
  const [major = 0, minor = 0] = version.split('.').map(Number);
  return major * 1000 + minor;
};
const isIn = (since: string | undefined, kernel: string) => since !== undefined && number(since) <= number(kernel);

interface Loaded {
  name: string;
  type: string;
  btf: boolean;
  calls: string[];
  instructions: number;
  /** instructions that the verifier went through */
  verified: number;
  maps: string[];
}

const native = loadNative();

let testbed: Testbed;
let bpffs: string;
let directory: string;
let noBtf: string;
let stateDir: string;

beforeAll(() => {
  testbed = Testbed.open();
  bpffs = testbed.bpffs('bpffs');
  directory = testbed.directory('objects');
  ({ dir: stateDir } = stateDirectory(testbed));
  noBtf = join(directory, 'no-btf.so');
  must(['gcc', '-shared', '-fPIC', '-O1', '-o', noBtf, join(import.meta.dirname, 'no-btf.c'), '-ldl']);
});
afterAll(() => testbed?.close());

/** Writes one-byte constants into .rodata. */
function withConstants(path: string, constants: Record<string, number>): void {
  copyFileSync(OBJECT, path);
  const symbols = must(['llvm-readelf-14', '-s', '-S', OBJECT]);
  const section = /\.rodata\s+PROGBITS\s+[0-9a-f]+ ([0-9a-f]+)/.exec(symbols)?.[1];
  if (section === undefined) throw new Error(`${OBJECT}: no .rodata`);
  const elf = readFileSync(path);
  for (const [name, value] of Object.entries(constants)) {
    const at = new RegExp(`: ([0-9a-f]+) +1 OBJECT .* ${name}\\b`).exec(symbols)?.[1];
    if (at === undefined) throw new Error(`${OBJECT}: no constant ${name}`);
    elf.writeUInt8(value, Number.parseInt(section, 16) + Number.parseInt(at, 16));
  }
  writeFileSync(path, elf);
}

async function load(label: string, constants: Record<string, number>, preload?: string) {
  const object = join(directory, `${label}.o`);
  // No dots: bpffs keeps those for itself.
  const pins = join(bpffs, label.replaceAll('.', '_'));
  mkdirSync(pins);
  withConstants(object, constants);
  // The map of events is of another type where there is no ring buffer.
  const events = `${pins}-events`;
  // Socket storage and locks need a description of their types; native/ makes these maps, and that without libbpf's.
  const reused = ['proxy_sockets', 'direct'].flatMap((map) => ['map', 'name', map, 'pinned', join(stateDir, map)]);
  if (constants.use_ringbuf === 0) {
    reused.push('map', 'name', 'events', 'pinned', events);
    const shape = ['type', 'perf_event_array', 'key', '4', 'value', '4', 'entries', '8', 'name', 'events'];
    must(['bpftool', 'map', 'create', events, ...shape]);
  }
  const programs = join(pins, 'programs');
  const outcome = await exec(['bpftool', 'prog', 'loadall', object, programs, ...reused], {
    env: { PATH: process.env.PATH ?? '', ...(preload && { LD_PRELOAD: preload }) },
    timeout: 60_000,
  });
  if (outcome.status !== 0) throw new Error(`bpftool prog loadall: ${(outcome.stdout + outcome.stderr).slice(-2000)}`);
  return { programs: readdirSync(programs).map((name) => read(join(programs, name))) };
}

function read(pin: string): Loaded {
  const shown: unknown = JSON.parse(must(['bpftool', '-j', 'prog', 'show', 'pinned', pin]));
  const program = shown as { name: string; type: string; btf_id?: number; bytes_xlated: number; map_ids?: number[] };
  const code = must(['bpftool', 'prog', 'dump', 'xlated', 'pinned', pin]);
  // A call of another function of the object is "call pc+N#..."; everything else is a helper's.
  const calls = [...code.matchAll(/\bcall (?!pc[+-])(\w+)#/g)].map(([, helper = '']) => helper);
  const maps = (program.map_ids ?? []).map((id) => {
    const map: unknown = JSON.parse(must(['bpftool', '-j', 'map', 'show', 'id', String(id)]));
    return (map as { type: string }).type;
  });
  return {
    name: program.name,
    type: program.type,
    btf: program.btf_id !== undefined,
    calls: [...new Set(calls)].sort(),
    instructions: program.bytes_xlated / 8,
    verified: verifiedInstructions(pin),
    maps: [...new Set(maps)].sort(),
  };
}

function verifiedInstructions(pin: string): number {
  const fd = native.openProgram(pin);
  try {
    return native.programInfo(fd).verified;
  } finally {
    native.close(fd);
  }
}

/** Not loaded without socket lookup programs: one itself, and the in-pod contract as a whole. */
function needsSocketLookup(name: string): boolean {
  return name === 'proxy_lookup' || name.startsWith('inpod_');
}

/** What native/programs.cc sets on that kernel. */
function constantsOn(kernel: string): Record<string, number> {
  const known = Object.entries(SINCE).map(([name, since]) => [name, isIn(since, kernel) ? 1 : 0]);
  return { ...Object.fromEntries(known), full_sockets_only: 0 };
}

/** "program: what" of everything that came after `kernel`, or that the tables do not know. */
function tooNew({ name, type, calls, maps }: Loaded, kernel: string): string[] {
  return [
    ...calls.filter((helper) => !isIn(HELPERS[helper], kernel)),
    ...maps.filter((map) => !isIn(MAP_TYPES[map], kernel)),
    ...(isIn(PROGRAM_TYPES[type], kernel) ? [] : [type]),
  ].map((what) => `${name}: ${what}`);
}

describe('README, Kernels', () => {
  test('its rows are those that are checked here', () => {
    const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
    const section = readme.slice(readme.indexOf('\n## Kernels'), readme.indexOf('\n## Limits'));
    expect([...section.matchAll(/^\| (\d+\.\d+)/gm)].map(([, since]) => since)).toEqual(ROWS);
    expect(section).toContain(`| before ${OBJECT_SINCE} | not supported`);
  });
  test('the oldest is one that can load the object', () => {
    expect(ROWS.every((row) => isIn(OBJECT_SINCE, row))).toBe(true);
  });
  test('the constants are those of bpf/maps.h', () => {
    const header = readFileSync(join(ROOT, 'bpf/maps.h'), 'utf8');
    const declared = [...header.matchAll(/^const volatile __u8 (\w+) = /gm)].map(([, name]) => name);
    expect(declared.sort()).toEqual([...Object.keys(SINCE), 'full_sockets_only'].sort());
  });
});

describe.each(ROWS)('what would be loaded on %s', (kernel) => {
  const constants = constantsOn(kernel);
  let loaded: Awaited<ReturnType<typeof load>>;
  beforeAll(async () => {
    loaded = await load(`v${kernel}`, constants);
  });
  const used = () => loaded.programs.filter(({ name }) => constants.use_sk_lookup === 1 || !needsSocketLookup(name));

  test('is not newer than that', () => {
    expect(used().length).toBeGreaterThan(4);
    expect(used().flatMap((program) => tooNew(program, kernel))).toEqual([]);
  });
  test('takes less than the verifier’s million instructions', () => {
    for (const { verified } of loaded.programs) {
      expect(verified).toBeGreaterThan(0);
      expect(verified).toBeLessThan(VERIFIED_LIMIT);
    }
  });
  test('loads where BTF is refused', async () => {
    const { programs } = await load(`v${kernel}-no-btf`, constants, noBtf);
    expect(programs.map(({ name, btf }) => ({ name, btf }))).toEqual(
      loaded.programs.map(({ name }) => ({ name, btf: false })),
    );
    expect(loaded.programs.every(({ btf }) => btf)).toBe(true);
  });
});

test('with full sockets only, no helper is newer than 4.20', async () => {
  const none = Object.fromEntries(Object.keys(SINCE).map((name) => [name, 0]));
  const { programs } = await load('full-sockets-only', { ...none, full_sockets_only: 1 });
  const used = programs.filter(({ name }) => !needsSocketLookup(name));
  expect(used.flatMap(({ calls }) => calls)).toContain('bpf_tc_sk_lookup_tcp');
  expect(used.flatMap((program) => tooNew(program, '4.20'))).toEqual([]);
});

test('a helper of a later kernel is noticed', async () => {
  const { programs } = await load('late', constantsOn('5.10'));
  expect(programs.flatMap((program) => tooNew(program, '5.7'))).toEqual(
    expect.arrayContaining(['pod_egress: bpf_redirect_peer', 'proxy_ingress: sock_map_update_elem']),
  );
});
