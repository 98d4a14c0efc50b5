// SPDX-License-Identifier: Apache-2.0
import { existsSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { must, Testbed } from '../conformance/netns.ts';
import type { AttachmentRecord, ExclusionRule, State } from '../plugin/native.ts';
import {
  address,
  attachmentRecord,
  bytes,
  cause,
  descriptors,
  endpointRecord,
  failure,
  interfaceRecord,
  native,
  proxyRecord,
  WANTED,
} from './native.testing.ts';

const MAPS = [
  'attachments',
  'counters',
  'direct',
  'endpoints',
  'events',
  'exclusions',
  'flows',
  'fragments',
  'identity',
  'interfaces',
  'jump',
  'jump_lookup',
  'listeners',
  'proxies',
  'proxy_cgroups',
  'proxy_sockets',
  'resolvers',
  'settings',
  'steered',
  'trace',
];

let bed: Testbed;
let dir: string;
beforeEach(() => {
  bed = Testbed.open();
  dir = join(bed.bpffs('bpf'), 'state');
  native.makeDirectory(dir, 0o700);
});
afterEach(() => bed.close());

function open(): State {
  const state = native.openState(dir);
  bed.defer(() => native.closeState(state));
  return state;
}

function created(wanted = WANTED): State {
  native.createState(dir, wanted);
  return open();
}

const mapInfo = (name: string): Record<string, unknown> =>
  JSON.parse(must(['bpftool', '-j', 'map', 'show', 'pinned', join(dir, name)])) as Record<string, unknown>;

describe('createState', () => {
  test('pins every map, readable by root only, in its size and shape', () => {
    native.createState(dir, WANTED);
    expect(readdirSync(dir).sort()).toEqual(MAPS);
    for (const name of MAPS) expect(statSync(join(dir, name)).mode & 0o7777).toBe(0o600);
    const { sizes } = native;
    const noPrealloc = 1;
    expect(Object.fromEntries(MAPS.map((name) => [name, mapInfo(name)]))).toMatchObject({
      attachments: { type: 'hash', bytes_key: 32, bytes_value: sizes.attachment, max_entries: 32, flags: noPrealloc },
      counters: { type: 'percpu_hash', bytes_key: 8, bytes_value: 16, max_entries: 512, flags: noPrealloc },
      direct: { type: 'hash', bytes_key: 8, bytes_value: sizes.direct_set, max_entries: 128, flags: noPrealloc },
      endpoints: { type: 'hash', bytes_key: 16, bytes_value: sizes.endpoint, max_entries: 64, flags: noPrealloc },
      events: { type: 'ringbuf', max_entries: 1 << 20 },
      exclusions: { type: 'hash_of_maps', bytes_key: 4, max_entries: 16, flags: noPrealloc },
      fragments: { type: 'lru_hash', bytes_key: 40, bytes_value: 48, max_entries: 4096 },
      listeners: { type: 'sockhash', bytes_key: 8, bytes_value: 8, max_entries: 128 },
      resolvers: { type: 'lru_hash', bytes_key: 24, bytes_value: 16, max_entries: 16384 },
      steered: { type: 'lru_hash', bytes_key: 40, bytes_value: 16, max_entries: 16384 },
      proxy_cgroups: { type: 'hash', bytes_key: 8, bytes_value: 4, max_entries: 64, flags: noPrealloc },
      proxy_sockets: { type: 'sk_storage', bytes_key: 4, bytes_value: 4, max_entries: 0, flags: noPrealloc },
      identity: { type: 'percpu_array', bytes_key: 4, bytes_value: 4, max_entries: 1 },
      jump: { type: 'prog_array', bytes_key: 4, bytes_value: 4, max_entries: 2 },
      jump_lookup: { type: 'prog_array', bytes_key: 4, bytes_value: 4, max_entries: 1 },
      trace: { type: 'array', bytes_key: 4, bytes_value: 16, max_entries: 1 },
      flows: { type: 'lru_hash', bytes_key: sizes.tuple, bytes_value: sizes.flow, max_entries: 1024 },
      interfaces: { type: 'hash', bytes_key: 4, bytes_value: sizes.interface, max_entries: 16, flags: noPrealloc },
      proxies: { type: 'hash', bytes_key: 4, bytes_value: sizes.proxies, max_entries: 1, flags: noPrealloc },
      settings: { type: 'array', bytes_key: 4, bytes_value: sizes.settings, max_entries: 1 },
    });
  });

  test('settings are what was wanted, with a random sign and this boot', () => {
    const settings = native.settings(created({ ...WANTED, variant: 5 }));
    expect(settings).toMatchObject({ ...WANTED, variant: 5, layout: native.layoutVersion });
    expect(settings.sign).toHaveLength(5);
    expect(settings.sign[0]).toBe(2);
    expect(settings.bootId).toBe(must(['cat', '/proc/sys/kernel/random/boot_id']).trim());
    const other = join(bed.bpffs('other'), 'state');
    native.makeDirectory(other, 0o700);
    native.createState(other, WANTED);
    const state = native.openState(other);
    expect(Buffer.from(native.settings(state).sign)).not.toEqual(Buffer.from(settings.sign));
    native.closeState(state);
  });

  test('again changes nothing', () => {
    native.createState(dir, WANTED);
    const ids = MAPS.map((name) => mapInfo(name).id);
    const before = native.settings(open());
    native.createState(dir, { ...WANTED, maxPods: 99, variant: 1 });
    expect(MAPS.map((name) => mapInfo(name).id)).toEqual(ids);
    expect(native.settings(open())).toEqual(before);
  });

  test('completes what an interrupted creation left, in the size that is wanted now', () => {
    native.createState(dir, WANTED);
    for (const name of ['settings', 'flows', 'attachments']) native.removeFile(join(dir, name));
    expect(cause(() => native.openState(dir))).toMatchObject({ code: 'ENOENT', syscall: 'bpf(BPF_OBJ_GET)' });
    const kept = mapInfo('proxies').id;
    const state = created({ ...WANTED, maxPods: 20 });
    expect(native.settings(state).maxPods).toBe(20);
    expect(mapInfo('interfaces').max_entries).toBe(20);
    expect(mapInfo('attachments').max_entries).toBe(40);
    expect(mapInfo('proxies').id).toBe(kept);
  });

  test('a map that is missing beside finished settings gets the size which those say', () => {
    native.createState(dir, WANTED);
    native.removeFile(join(dir, 'endpoints'));
    expect(failure(() => native.openState(dir)).message).toBe(`bpf(BPF_OBJ_GET) ${dir}/endpoints: ENOENT`);
    created({ ...WANTED, maxPods: 20 });
    expect(mapInfo('endpoints').max_entries).toBe(64);
  });

  test('not on a bpffs: an error, nothing left', () => {
    const elsewhere = bed.directory('tmp');
    const before = descriptors();
    expect(cause(() => native.createState(elsewhere, WANTED))).toMatchObject({
      code: 'EPERM',
      syscall: 'bpf(BPF_OBJ_PIN)',
    });
    expect(readdirSync(elsewhere)).toEqual([]);
    expect(descriptors()).toEqual(before);
  });

  test("an impossible size is the kernel's error", () => {
    expect(cause(() => native.createState(dir, { ...WANTED, maxFlows: 0xffffffff }))).toMatchObject({
      syscall: 'bpf(BPF_MAP_CREATE)',
    });
    expect(existsSync(join(dir, 'settings'))).toBe(false);
  });
});

describe('openState', () => {
  test('without a state: ENOENT', () => {
    expect(cause(() => native.openState(dir))).toEqual({ code: 'ENOENT', errno: 2, syscall: 'bpf(BPF_OBJ_GET)' });
    expect(cause(() => native.openState('/nonexistent')).code).toBe('ENOENT');
  });

  const words = (size: number, first: number) => [
    'hex',
    ...Array.from({ length: size }, (_, i) => (i === 0 ? first.toString(16).padStart(2, '0') : '00')),
  ];
  function foreignSettings(size: number, layout: number): void {
    const path = join(dir, 'settings');
    native.removeFile(path);
    must([
      'bpftool',
      'map',
      'create',
      path,
      'type',
      'array',
      'key',
      '4',
      'value',
      String(size),
      'entries',
      '1',
      'name',
      's',
    ]);
    must([
      'bpftool',
      'map',
      'update',
      'pinned',
      path,
      'key',
      'hex',
      '00',
      '00',
      '00',
      '00',
      'value',
      ...words(size, layout),
    ]);
  }

  test.each([
    ['a later layout', native.layoutVersion + 1, 200, 'a newer version made it'],
    ['an earlier layout of another size', 0, 8, 'none of its versions is as old'],
  ])('%s: EPROTO that names found and wanted', (_, layout, size, why) => {
    native.createState(dir, WANTED);
    foreignSettings(size, layout);
    for (const action of [() => native.openState(dir), () => native.createState(dir, WANTED)]) {
      expect(failure(action)).toMatchObject({
        code: 'EPROTO',
        message: `bpf(BPF_OBJ_GET) ${dir}/settings has layout ${layout}, this program wants layout ${native.layoutVersion}: ${why}: EPROTO`,
      });
    }
  });

  test('a map of another shape: EPROTO that names found and wanted', () => {
    native.createState(dir, WANTED);
    const path = join(dir, 'endpoints');
    native.removeFile(path);
    must(['bpftool', 'map', 'create', path, 'type', 'hash', 'key', '4', 'value', '16', 'entries', '1', 'name', 'e']);
    for (const action of [() => native.openState(dir), () => native.createState(dir, WANTED)]) {
      expect(failure(action)).toMatchObject({
        code: 'EPROTO',
        message: `bpf(BPF_OBJ_GET) ${path} is a map of type 1, key 4, value 16; wanted is type 1, key 16, value 16: EPROTO`,
      });
    }
  });

  test('something else in the place of the settings', () => {
    native.createState(dir, WANTED);
    const path = join(dir, 'settings');
    native.removeFile(path);
    must(['bpftool', 'map', 'create', path, 'type', 'hash', 'key', '4', 'value', '56', 'entries', '1', 'name', 's']);
    expect(failure(() => native.openState(dir))).toMatchObject({ code: 'EPROTO' });
    native.removeFile(path);
    const state = join(dir, 'x');
    must(['mkdir', state, path]);
    expect(cause(() => native.openState(dir)).code).toBe('EACCES');
  });

  test('a closed state is EBADF, closing it twice is nothing', () => {
    const before = descriptors();
    native.createState(dir, WANTED);
    const state = native.openState(dir);
    expect(descriptors().length).toBe(before.length + MAPS.length);
    native.closeState(state);
    native.closeState(state);
    expect(descriptors()).toEqual(before);
    expect(cause(() => native.settings(state)).code).toBe('EBADF');
    expect(cause(() => native.listAttachments(state)).code).toBe('EBADF');
    expect(cause(() => native.putInterface(state, 1, interfaceRecord())).code).toBe('EBADF');
    expect(cause(() => native.loadPrograms(state, dir, 'x')).code).toBe('EBADF');
  });
});

describe('attachments', () => {
  const longest = (): AttachmentRecord => ({
    ...attachmentRecord(),
    state: 'recorded',
    role: 'none',
    contract: 'in-pod',
    addresses: Array.from({ length: 16 }, (_, i) => bytes(16, i)),
    hooks: Array.from({ length: 6 }, () => attachmentRecord().hooks[1]).filter((hook) => hook !== undefined),
    programTag: 't'.repeat(63),
    hostIfname: 'h'.repeat(15),
    ifname: 'i'.repeat(15),
    network: 'n'.repeat(255),
    containerId: 'c'.repeat(255),
    podName: 'p'.repeat(255),
    podNamespace: 'q'.repeat(63),
    podUid: 'u'.repeat(63),
    serviceAccount: 's'.repeat(255),
    netnsPath: `/${'é'.repeat(255)}`,
    enrolledAt: Number.MAX_SAFE_INTEGER,
  });
  const shortest = (): AttachmentRecord => ({
    ...attachmentRecord(),
    state: 'attaching',
    role: 'proxy',
    addresses: [],
    hooks: [],
    programTag: '',
    network: '',
    containerId: '',
    podName: '',
    podUid: '',
    serviceAccount: '',
    netnsPath: '',
  });

  test.each([
    ['usual', attachmentRecord],
    ['longest', longest],
    ['shortest', shortest],
  ])('the %s record comes back as it was', (_, record) => {
    const state = created();
    expect(native.getAttachment(state, bytes(32))).toBeNull();
    native.putAttachment(state, bytes(32), record());
    expect(native.getAttachment(state, bytes(32))).toEqual(record());
    expect(native.getAttachment(state, bytes(32, 2))).toBeNull();
    native.putAttachment(state, bytes(32), shortest());
    expect(native.getAttachment(state, bytes(32))).toEqual(shortest());
    expect(native.deleteAttachment(state, bytes(32))).toBe(true);
    expect(native.deleteAttachment(state, bytes(32))).toBe(false);
  });

  test('a record is replaced where it is there, and not made where it is not', () => {
    const state = created();
    expect(native.replaceAttachment(state, bytes(32), shortest())).toBe(false);
    expect(native.getAttachment(state, bytes(32))).toBeNull();
    native.putAttachment(state, bytes(32), attachmentRecord());
    expect(native.replaceAttachment(state, bytes(32), shortest())).toBe(true);
    expect(native.getAttachment(state, bytes(32))).toEqual(shortest());
    for (let i = 1; i < 32; i++) native.putAttachment(state, bytes(32, i), attachmentRecord());
    expect(native.replaceAttachment(state, bytes(32), attachmentRecord())).toBe(true);
    expect(native.replaceAttachment(state, bytes(32, 32), attachmentRecord())).toBe(false);
  });

  test('fill the map: E2BIG, and a place that is given back can be used', () => {
    const state = created();
    for (let i = 0; i < 32; i++) native.putAttachment(state, bytes(32, i), attachmentRecord());
    expect(failure(() => native.putAttachment(state, bytes(32, 32), attachmentRecord()))).toMatchObject({
      code: 'E2BIG',
      message: 'bpf(BPF_MAP_UPDATE_ELEM) map attachments, which is full: E2BIG',
    });
    native.putAttachment(state, bytes(32, 5), attachmentRecord());
    native.deleteAttachment(state, bytes(32, 5));
    native.putAttachment(state, bytes(32, 32), attachmentRecord());
    const keys = native.listAttachments(state).map(({ key }) => key[0]);
    expect(keys.sort((a, b) => Number(a) - Number(b))).toEqual([
      0,
      1,
      2,
      3,
      4,
      ...Array.from({ length: 27 }, (_, i) => 6 + i),
    ]);
  });

  test("are visible to another process and outlive this one's descriptors", () => {
    native.createState(dir, WANTED);
    const state = native.openState(dir);
    native.putAttachment(state, bytes(32), attachmentRecord());
    native.closeState(state);
    expect(native.listAttachments(open())).toEqual([{ key: bytes(32), record: attachmentRecord() }]);
  });

  test('a value that no version can have written is EPROTO', () => {
    const state = created();
    native.putAttachment(state, bytes(32), attachmentRecord());
    const hex = (data: Uint8Array) => Array.from(data, (byte) => byte.toString(16).padStart(2, '0'));
    const value = new Uint8Array(native.sizes.attachment ?? 0);
    value[4] = 9;
    must(
      ['bpftool', 'map', 'update', 'pinned', join(dir, 'attachments')].concat(
        ['key', 'hex', ...hex(bytes(32))],
        ['value', 'hex', ...hex(value)],
      ),
    );
    expect(failure(() => native.getAttachment(state, bytes(32))).message).toBe(
      'bpf(BPF_MAP_LOOKUP_ELEM) attachment.state is 9: EPROTO',
    );
  });
});

describe('listing while others write', () => {
  test('ends, repeats nothing, and has every entry that was there all the time', async () => {
    const state = created({ ...WANTED, maxPods: 512 });
    const steady = Array.from({ length: 300 }, (_, i) => 10_000 + i);
    for (const ifindex of steady) native.putInterface(state, ifindex, interfaceRecord());
    const worker = new Worker(
      `const { workerData, parentPort } = require('node:worker_threads');
       const m = { exports: {} };
       process.dlopen(m, workerData.addon);
       const native = m.exports;
       const state = native.openState(workerData.dir);
       let turning = true;
       parentPort.on('message', () => { turning = false; });
       (function turn() {
         for (let i = 1; i <= 150; i++) native.putInterface(state, i, workerData.record);
         for (let i = 1; i <= 150; i++) native.deleteInterface(state, i);
         if (turning) setImmediate(turn); else { native.closeState(state); parentPort.close(); }
       })();
       parentPort.postMessage('turning');`,
      {
        eval: true,
        workerData: {
          addon:
            process.env.AMBIENT_REDIRECT_ADDON ?? join(import.meta.dirname, '../build/Release/ambient_redirect.node'),
          dir,
          record: interfaceRecord(),
        },
      },
    );
    try {
      await new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
      for (let round = 0; round < 100; round++) {
        const found = native.listInterfaces(state).map(({ ifindex }) => ifindex);
        expect(new Set(found).size).toBe(found.length);
        expect(found.filter((ifindex) => ifindex >= 10_000)).toHaveLength(steady.length);
      }
    } finally {
      const ended = new Promise((resolve) => worker.once('exit', resolve));
      worker.postMessage('stop');
      await ended;
    }
    expect(native.listInterfaces(state)).toHaveLength(steady.length);
  });
});

describe('interfaces, endpoints, proxies', () => {
  test('interfaces', () => {
    const state = created();
    expect(native.getInterface(state, 7)).toBeNull();
    native.putInterface(state, 7, interfaceRecord());
    native.putInterface(state, 8, { ...interfaceRecord(), nsid: -1 });
    expect(native.getInterface(state, 7)).toEqual(interfaceRecord());
    expect(native.getInterface(state, 8)?.nsid).toBe(-1);
    expect(native.listInterfaces(state).sort((a, b) => a.ifindex - b.ifindex)).toEqual([
      { ifindex: 7, record: interfaceRecord() },
      { ifindex: 8, record: { ...interfaceRecord(), nsid: -1 } },
    ]);
    expect(native.deleteInterface(state, 7)).toBe(true);
    expect(native.deleteInterface(state, 7)).toBe(false);
  });

  test('an endpoint has one holder unless it is to be replaced', () => {
    const state = created();
    native.putEndpoint(state, address(1), endpointRecord(), true);
    expect(cause(() => native.putEndpoint(state, address(1), endpointRecord(), true))).toEqual({
      code: 'EEXIST',
      errno: 17,
      syscall: 'bpf(BPF_MAP_UPDATE_ELEM)',
    });
    native.putEndpoint(state, address(1), { ...endpointRecord(), ifindex: 9 }, false);
    expect(native.getEndpoint(state, address(1))).toEqual({ ...endpointRecord(), ifindex: 9 });
    expect(native.getEndpoint(state, address(2))).toBeNull();
    expect(native.listEndpoints(state)).toEqual([{ address: address(1), record: { ...endpointRecord(), ifindex: 9 } }]);
    expect(native.deleteEndpoint(state, address(1))).toBe(true);
    expect(native.deleteEndpoint(state, address(1))).toBe(false);
  });

  test('proxies are replaced as a whole', () => {
    const state = created();
    expect(native.getProxies(state)).toEqual({ generation: 0, proxies: [] });
    native.putProxies(state, 1, [proxyRecord(1), proxyRecord(2), proxyRecord(3), proxyRecord(4)]);
    expect(native.getProxies(state)).toEqual({
      generation: 1,
      proxies: [proxyRecord(1), proxyRecord(2), proxyRecord(3), proxyRecord(4)],
    });
    native.putProxies(state, 2, [proxyRecord(5)]);
    expect(native.getProxies(state)).toEqual({ generation: 2, proxies: [proxyRecord(5)] });
  });
});

describe('exclusions and usage', () => {
  test('exclusions are replaced whole and read back', () => {
    const state = created();
    const port = (number: number, length = 16): ExclusionRule => ({
      kind: 'inbound_port',
      value: bytes(16)
        .fill(0)
        .with(0, number >> 8)
        .with(1, number & 0xff),
      length,
      excluded: true,
    });
    const cidr: ExclusionRule = { kind: 'outbound_address', value: address(3), length: 128, excluded: false };
    expect(native.getExclusions(state, 7)).toEqual([]);
    native.putExclusions(state, 7, [port(80), port(0x2000, 3), cidr]);
    expect(native.getExclusions(state, 7)).toHaveLength(3);
    expect(native.getExclusions(state, 7)).toEqual(expect.arrayContaining([port(80), port(0x2000, 3), cidr]));
    native.putExclusions(state, 7, [port(443)]);
    native.putExclusions(state, 8, []);
    expect(native.getExclusions(state, 7)).toEqual([port(443)]);
    expect(native.listExclusions(state).sort()).toEqual([7, 8]);
    expect(native.deleteExclusions(state, 7)).toBe(true);
    expect(native.deleteExclusions(state, 7)).toBe(false);
    expect(native.getExclusions(state, 7)).toEqual([]);
  });

  test('usage counts entries and bytes, inner maps included', () => {
    const state = created();
    const usage = (name: string) => native.mapUsage(state).find(({ map }) => map === name);
    expect(native.mapUsage(state).map(({ map, entries, capacity }) => [map, entries, capacity])).toEqual([
      ['interfaces', 0, 16],
      ['endpoints', 0, 64],
      ['proxies', 0, 1],
      ['flows', 0, 1024],
      // Eight sets of eight for each pod.
      ['direct', 0, 16 * 8],
      ['exclusions', 0, 16],
      ['fragments', 0, 4096],
      ['resolvers', 0, 16384],
      ['listeners', 0, 128],
      ['steered', 0, 16384],
      ['proxy_cgroups', 0, 64],
      ['proxy_sockets', 0, 0],
      ['identity', 1, 1],
      ['jump', 2, 2],
      ['jump_lookup', 1, 1],
      ['trace', 1, 1],
      ['events', 0, 1 << 20],
      ['counters', 0, 512],
      ['attachments', 0, 32],
      ['settings', 1, 1],
    ]);
    for (let i = 1; i <= 13; i++) native.putInterface(state, i, interfaceRecord());
    for (let i = 0; i < 30; i++) native.putAttachment(state, bytes(32, i), attachmentRecord());
    native.putProxies(state, 1, []);
    expect(usage('interfaces')).toMatchObject({ entries: 13, capacity: 16 });
    expect(usage('attachments')?.entries).toBe(30);
    expect(usage('attachments')?.bytes).toBeGreaterThan(30 * 2304);
    expect(usage('proxies')?.entries).toBe(1);
    const empty = usage('exclusions')?.bytes ?? 0;
    native.putExclusions(state, 7, []);
    expect(usage('exclusions')?.entries).toBe(1);
    expect(usage('exclusions')?.bytes).toBeGreaterThan(empty);
  });
});
