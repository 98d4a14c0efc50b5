// SPDX-License-Identifier: Apache-2.0
// Each kernel call of each function fails once: the error names it, no descriptor is left open, the thread is in its
// own namespace, and afterwards the function works.

import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Namespace, Testbed } from '../conformance/netns.ts';
import type { DemoNative } from '../plugin/demo/native-topology.ts';
import type { State } from '../plugin/native.ts';
import {
  address,
  attachmentRecord,
  bytes,
  currentNetns,
  descriptors,
  endpointRecord,
  failure,
  interfaceRecord,
  native as ordinary,
  WANTED,
} from './native.testing.ts';

const ADDON = join(import.meta.dirname, '../build/Release/ambient_redirect_faults.node');
const loaded = { exports: {} as DemoNative };
process.dlopen(loaded, ADDON);
const native = loaded.exports as DemoNative & Required<Pick<DemoNative, 'failKernelCall' | 'kernelCalls'>>;

const bed = Testbed.open();
afterAll(() => bed.close());

let node: Namespace;
let pod: Namespace;
let netns: number;
let podFd: number;
let ifindex: number;
let dir: string;
let links: string;
let state: State;
let program: number;
let importer: number;
let lock: string;

const EIO = 5;

/** Fails each kernel call of `act` in turn, until it makes fewer. Returns the names of the calls. */
function failEach(act: () => unknown, undo: () => void = () => undefined): string[] {
  const here = currentNetns();
  const names: string[] = [];
  for (let n = 1; ; n++) {
    if (n > 200) throw new Error('it makes more than 200 kernel calls');
    const before = native.kernelCalls().length;
    const open = descriptors();
    native.failKernelCall(n, EIO);
    let error: unknown;
    try {
      act();
    } catch (caught) {
      error = caught;
    }
    native.failKernelCall(0, 0);
    const made = native.kernelCalls().slice(before);
    if (made.length < n) {
      expect(error).toBeUndefined();
      undo();
      return names;
    }
    names.push(made[n - 1] ?? '');
    const what = `call ${n}, ${made[n - 1]}`;
    expect(error, what).toMatchObject({ code: 'EIO', errno: EIO, syscall: expect.any(String) });
    expect(made.length, `${what}: goes on after a failure`).toBe(n);
    expect(currentNetns(), what).toBe(here);
    expect(descriptors().length, what).toBe(open.length);
    undo();
  }
}

beforeAll(() => {
  [node, pod] = [bed.namespace('node'), bed.namespace('pod')];
  bed.veth({ namespace: node, ifname: 'veth0' }, { namespace: pod, ifname: 'eth0', addresses: ['192.0.2.2/24'] });
  netns = ordinary.openNetns(node.path);
  podFd = ordinary.openNetns(pod.path);
  bed.defer(() => {
    ordinary.close(netns);
    ordinary.close(podFd);
  });
  ifindex = native.linkByName(netns, 'veth0')?.ifindex ?? 0;
  dir = join(bed.bpffs('bpf'), 'state');
  links = join(dir, 'links');
  lock = join(bed.directory('d'), 'lock');
  native.makeDirectory(dir, 0o700);
});

const FLOW = { source: address(1), sourcePort: 1, destination: address(2), destinationPort: 2 };

test('the ordinary build has nothing to make calls fail', () => {
  expect('failKernelCall' in ordinary || 'kernelCalls' in ordinary).toBe(false);
});

describe('every kernel call fails once', () => {
  // In this order: features() and the number of CPUs are asked of the kernel once in a process.
  test('features', () => {
    const calls = failEach(() => native.features());
    expect(calls).toContain('bpf(BPF_LINK_CREATE)');
    expect(calls.filter((name) => name === 'bpf(BPF_PROG_LOAD)').length).toBeGreaterThan(5);
  });

  test('createState: whatever was left, the next one completes it', () => {
    expect(failEach(() => native.createState(dir, WANTED)).length).toBeGreaterThan(20);
    expect(readdirSync(dir)).toContain('settings');
  });

  test('openState', () => {
    failEach(() => native.closeState(native.openState(dir)));
    state = native.openState(dir);
    bed.defer(() => native.closeState(state));
  });

  test('loadPrograms: whatever was left, the next one completes it', () => {
    failEach(() => native.loadPrograms(state, dir, 'test'));
    expect(readdirSync(join(dir, 'programs/test')).sort()).toEqual(
      [...Object.keys(native.programs), 'direct_import'].sort(),
    );
    program = native.openProgram(join(dir, 'programs/test/pod_egress'));
    importer = native.openProgram(join(dir, 'programs/test/direct_import'));
    bed.defer(() => {
      native.close(program);
      native.close(importer);
    });
    native.makeDirectory(links, 0o700);
    // Half of its calls fail after the verifier has done its work.
  }, 180_000);

  test('larger maps in the place of these', () => {
    const next = join(dir, 'next');
    native.makeDirectory(next, 0o700);
    const clear = () => {
      for (const name of readdirSync(next)) native.removeFile(join(next, name));
    };
    const larger = { ...WANTED, maxPods: 64 };
    failEach(() => native.growState(state, next, larger), clear);
    const grown = ['interfaces', 'endpoints', 'direct', 'exclusions', 'listeners', 'counters', 'attachments'];
    expect(native.growState(state, next, larger)).toEqual([...grown, 'settings']);
    clear();
    const more = { ...WANTED, maxFlows: WANTED.maxFlows * 2, directFlowsPerPod: WANTED.directFlowsPerPod * 2 };
    expect(native.growState(state, next, more)).toEqual(['flows', 'direct', 'settings']);
    const other = native.openStateOver(dir, next);
    expect(native.settings(other)).toEqual({ ...native.settings(state), ...more, layout: native.layoutVersion });
    failEach(() => native.copyFlows(state, other));
    native.closeState(other);
    clear();
    native.growState(state, next, larger);
    failEach(() => native.closeState(native.openStateOver(dir, next)));
    const to = native.openStateOver(dir, next);
    const [key, id] = [bytes(32, 7), 7];
    native.putAttachment(state, key, attachmentRecord());
    native.putInterface(state, id, interfaceRecord());
    native.putEndpoint(state, address(7), endpointRecord(), true);
    native.importDirectFlow(importer, id, FLOW);
    native.putInterface(to, 8, interfaceRecord());
    native.putExclusions(to, 8, []);
    failEach(() => native.copyRecords(state, to));
    failEach(() => native.copyTraffic(state, to, id));
    expect(native.listAttachments(to)).toEqual(native.listAttachments(state));
    expect(native.listInterfaces(to)).toEqual([{ ifindex: id, record: interfaceRecord() }]);
    expect(native.getEndpoint(to, address(7))).toEqual(endpointRecord());
    expect(native.listExclusions(to)).toEqual([]);
    expect(native.directFlows(to, id)).toEqual([FLOW]);
    failEach(() => native.jumpToPrograms(to, join(dir, 'programs/test')));
    failEach(() => native.waitForPrograms());
    failEach(() => native.writeCapacity(to));
    native.closeState(to);
    expect(native.mapUsage(state).find(({ map }) => map === 'interfaces')?.capacity).toBe(WANTED.maxPods);
    failEach(() => native.writeCapacity(state));
    native.deleteAttachment(state, key);
    native.deleteInterface(state, id);
    native.deleteEndpoint(state, address(7));
    native.deleteDirectFlows(state, id);
    clear();
    native.removeDirectory(next);
  });

  const key = bytes(32);
  const rule = { family: 4, priority: 100, mark: 1, table: 100, protocol: 163 } as const;
  const route = { family: 4, table: 100, protocol: 163 } as const;
  const filter = { priority: 1, handle: 1, name: 'n', replace: false };
  const packet = new Uint8Array(64);
  const pin = () => join(links, 'pin');
  const attach = () => native.attachTcx(netns, ifindex, 'ingress', program, 'first', pin());
  const put = () => native.attachFilter(netns, ifindex, 'ingress', program, filter);
  const listen = { family: 6, address: '::', port: 15001, backlog: 1, reusePort: true, v6only: true, mark: 1 } as const;

  const cases: Record<string, { act: () => unknown; undo?: () => void; before?: () => void }> = {
    openNetns: { act: () => native.close(native.openNetns(pod.path)) },
    netnsIdentity: { act: () => native.netnsIdentity(podFd) },
    'netnsIdentity of HOST': { act: () => native.netnsIdentity(-1) },
    netnsId: { act: () => native.inNetns(netns, () => native.netnsId(podFd, true)) },
    lockFile: { act: () => native.close(native.lockFile(lock, 0)) },
    lockShared: { act: () => native.close(native.lockShared(lock, 0)) },
    renameFile: { act: () => native.renameFile(lock, lock) },
    isBpffs: { act: () => native.isBpffs(dir) },
    mountBpffs: {
      act: () => native.mountBpffs(join(dir, '../../mnt')),
      before: () => native.makeDirectory(join(dir, '../../mnt'), 0o700),
      undo: () => unmountAll(join(dir, '../../mnt')),
    },
    makeDirectory: { act: () => native.makeDirectory(links, 0o700) },
    removeDirectory: { act: () => native.removeDirectory(join(dir, 'absent')) },
    removeFile: { act: () => native.removeFile(join(dir, 'absent')) },
    capabilities: { act: () => native.capabilities() },
    linkByName: { act: () => native.linkByName(podFd, 'eth0') },
    linkByIndex: { act: () => native.linkByIndex(podFd, 4711) },
    linkAddresses: { act: () => native.linkAddresses(podFd, 1) },
    acceptLocal: { act: () => native.acceptLocal(podFd, 1) },
    setAcceptLocal: {
      act: () => native.setAcceptLocal(podFd, 1, true),
      undo: () => native.setAcceptLocal(podFd, 1, false),
    },
    migrateRequests: { act: () => native.migrateRequests(podFd) },
    setMigrateRequests: {
      act: () => native.setMigrateRequests(podFd, true),
      undo: () => native.setMigrateRequests(podFd, false),
    },
    qdiscs: { act: () => native.qdiscs(netns, ifindex) },
    addRule: { act: () => native.addRule(podFd, rule), undo: () => native.deleteRule(podFd, rule) },
    'addRule again': { before: () => native.addRule(podFd, rule), act: () => native.addRule(podFd, rule) },
    rules: { act: () => native.rules(podFd, 6) },
    deleteRule: { act: () => native.deleteRule(podFd, rule), undo: () => native.addRule(podFd, rule) },
    addLocalRoute: {
      act: () => native.addLocalRoute(podFd, route),
      undo: () => native.deleteLocalRoute(podFd, route),
    },
    'addLocalRoute again': {
      before: () => native.addLocalRoute(podFd, route),
      act: () => native.addLocalRoute(podFd, route),
    },
    localRoutes: { act: () => native.localRoutes(podFd, 4, 100) },
    deleteLocalRoute: {
      act: () => native.deleteLocalRoute(podFd, route),
      undo: () => native.addLocalRoute(podFd, route),
    },
    putAttachment: { act: () => native.putAttachment(state, key, attachmentRecord()) },
    replaceAttachment: { act: () => native.replaceAttachment(state, key, attachmentRecord()) },
    getAttachment: { act: () => native.getAttachment(state, key) },
    listAttachments: { act: () => native.listAttachments(state) },
    deleteAttachment: { act: () => native.deleteAttachment(state, key) },
    putInterface: { act: () => native.putInterface(state, 1, interfaceRecord()) },
    getInterface: { act: () => native.getInterface(state, 1) },
    listInterfaces: { act: () => native.listInterfaces(state) },
    putEndpoint: { act: () => native.putEndpoint(state, address(1), endpointRecord(), false) },
    getEndpoint: { act: () => native.getEndpoint(state, address(1)) },
    listEndpoints: { act: () => native.listEndpoints(state) },
    deleteEndpoint: { act: () => native.deleteEndpoint(state, address(1)) },
    putProxies: { act: () => native.putProxies(state, 1, []) },
    getProxies: { act: () => native.getProxies(state) },
    importDirectFlow: { act: () => native.importDirectFlow(importer, 1, FLOW) },
    listDirectFlows: { act: () => native.listDirectFlows(state) },
    directFlows: { act: () => native.directFlows(state, 1) },
    testRun: { act: () => native.testRun(program, packet) },
    counters: { act: () => native.counters(state) },
    mapUsage: { act: () => native.mapUsage(state) },
    deleteDirectFlows: { act: () => native.deleteDirectFlows(state, 1) },
    deleteFlows: { act: () => native.deleteFlows(state, 1) },
    deleteCounters: { act: () => native.deleteCounters(state, 1) },
    deleteInterface: { act: () => native.deleteInterface(state, 1) },
    openProgram: { act: () => native.close(native.openProgram(join(dir, 'programs/test/pod_egress'))) },
    programInfo: { act: () => native.programInfo(program) },
    programById: { act: () => native.programById(native.programInfo(program).id) },
    attachTcx: { act: attach, undo: () => native.detachLink(pin()) },
    queryTcx: { act: () => native.queryTcx(netns, ifindex, 'ingress') },
    linkInfo: { before: attach, act: () => native.linkInfo(pin()) },
    updateLink: { act: () => native.updateLink(pin(), program) },
    detachLink: { act: () => native.detachLink(pin()), undo: () => existsSync(pin()) || attach() },
    addClsact: { act: () => native.addClsact(netns, ifindex) },
    'addClsact again': { act: () => native.addClsact(netns, ifindex) },
    attachFilter: { act: put, undo: () => native.deleteFilter(netns, ifindex, 'ingress', filter) },
    filters: { before: put, act: () => native.filters(netns, ifindex, 'ingress') },
    deleteFilter: {
      act: () => native.deleteFilter(netns, ifindex, 'ingress', filter),
      undo: () => native.filters(netns, ifindex, 'ingress').length > 0 || put(),
    },
    listenTransparent: { act: () => native.close(native.listenTransparent(podFd, listen)) },
    listenPlain: { act: () => native.close(native.listenPlain(podFd, { address: '::1', port: 1, backlog: 1 })) },
    listeners: { act: () => native.listeners(podFd) },
  };

  test.each(Object.entries(cases))('%s', (name, { act, undo, before }) => {
    before?.();
    const calls = failEach(act, undo);
    expect(calls.length, `${name} makes no kernel call`).toBeGreaterThan(0);
  });

  test('a failed attachTcx leaves no program on the device', () => {
    native.detachLink(pin());
    native.failKernelCall(5, EIO);
    expect(failure(attach)).toMatchObject({ code: 'EIO', syscall: 'bpf(BPF_OBJ_PIN)' });
    native.failKernelCall(0, 0);
    expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([]);
  });

  test('what is made on another thread rejects, and leaves nothing', async () => {
    native.detachLink(pin());
    const attachAside = () => native.attachTcxAside(netns, ifindex, 'ingress', program, 'first', pin());
    const detachAside = () => native.detachLinkAside(pin());
    for (const [act, undo] of [
      [attachAside, () => native.detachLink(pin())],
      [detachAside, () => existsSync(pin()) || attach()],
    ] as const) {
      for (let n = 1; ; n++) {
        undo();
        const before = native.kernelCalls().length;
        const open = descriptors().length;
        native.failKernelCall(n, EIO);
        const error = await act().then(
          () => undefined,
          (error: unknown) => error,
        );
        native.failKernelCall(0, 0);
        if (native.kernelCalls().length - before < n) {
          expect(error).toBeUndefined();
          expect(n).toBeGreaterThan(2);
          break;
        }
        expect(error).toMatchObject({ code: 'EIO' });
        expect(descriptors().length).toBe(open);
        if (act === attachAside) expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([]);
      }
    }
  });

  test('connectTransparent rejects', async () => {
    const options = {
      source: '192.0.2.2',
      sourcePort: 0,
      destination: '192.0.2.2',
      port: 9,
      mark: 1,
      timeoutMs: 1_000,
    };
    for (let n = 1; ; n++) {
      const before = native.kernelCalls().length;
      const open = descriptors().length;
      native.failKernelCall(n, EIO);
      const error = await native.connectTransparent(podFd, options).then(
        () => undefined,
        (error: unknown) => error,
      );
      native.failKernelCall(0, 0);
      if (native.kernelCalls().length - before < n) {
        expect(error).toMatchObject({ code: 'ECONNREFUSED' });
        expect(n).toBeGreaterThan(6);
        break;
      }
      expect(error).toMatchObject({ code: 'EIO' });
      await expect.poll(() => descriptors().length).toBe(open);
    }
  });
});

describe('by environment', () => {
  const script = `
    const m = { exports: {} };
    process.dlopen(m, ${JSON.stringify(ADDON)});
    try { m.exports.linkByName(-1, 'lo'); console.log('ok'); } catch (error) { console.log(error.code); }`;
  const run = (env: Record<string, string>) => {
    const file = join(bed.directory(`calls${Math.random()}`), 'calls');
    const { status, signal, stdout } = spawnSync(process.execPath, ['-e', script], {
      encoding: 'utf8',
      env: { ...process.env, AMBIENT_REDIRECT_CALLS_FILE: file, ...env },
    });
    return { status, signal, stdout: stdout.trim(), calls: readFileSync(file, 'utf8').trim().split('\n') };
  };

  test('calls are listed', () => {
    writeFileSync(lock, '');
    const { stdout, calls } = run({});
    expect(stdout).toBe('ok');
    expect(calls).toEqual(['socket', 'setsockopt', 'setsockopt', 'setsockopt', 'RTM_GETLINK', 'recv', 'recv']);
  });

  test('one of them fails, with ENOMEM or as told', () => {
    expect(run({ AMBIENT_REDIRECT_FAIL_CALL: '5' })).toMatchObject({ status: 0, stdout: 'ENOMEM' });
    expect(run({ AMBIENT_REDIRECT_FAIL_CALL: '5', AMBIENT_REDIRECT_FAIL_ERRNO: '1' }).stdout).toBe('EPERM');
    expect(run({ AMBIENT_REDIRECT_FAIL_CALL: '99' }).stdout).toBe('ok');
  });

  test('or kills', () => {
    const { signal, calls, stdout } = run({ AMBIENT_REDIRECT_KILL_CALL: '5' });
    expect({ signal, stdout }).toEqual({ signal: 'SIGKILL', stdout: '' });
    expect(calls).toHaveLength(5);
  });
});

function unmountAll(path: string): void {
  while (native.isBpffs(path)) native.unmount(path);
}
