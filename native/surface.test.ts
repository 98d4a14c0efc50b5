// SPDX-License-Identifier: Apache-2.0
// The exports as a whole: none is missing, every argument and every field of a record is checked before any kernel
// call, and the words are those of bpf/redirect.h.

import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Testbed } from '../conformance/netns.ts';
import type { Native, State } from '../plugin/native.ts';
import {
  address,
  attachmentRecord,
  bytes,
  cause,
  currentNetns,
  endpointRecord,
  failure,
  interfaceRecord,
  native,
  proxyRecord,
  WANTED,
} from './native.testing.ts';

const header = readFileSync(join(import.meta.dirname, '../bpf/redirect.h'), 'utf8');

/** One kind of argument: a right value and wrong ones. `fields`: optional ones may be undefined. */
interface Kind {
  right: () => unknown;
  wrong: readonly unknown[];
  optionalFields?: boolean;
}

let state: State;
const bed = Testbed.open();
beforeAll(() => {
  const dir = join(bed.bpffs('bpf'), 'state');
  native.makeDirectory(dir, 0o700);
  native.createState(dir, WANTED);
  state = native.openState(dir);
});
afterAll(() => bed.close());

const never = [undefined, null, Symbol('x'), () => 0];
const objects = [{}, [], new Date()];
const numbers = [-2, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53, 1n, '1', true];
const netns: Kind = { right: () => -1, wrong: [...never, ...objects, ...numbers] };
const fd: Kind = { right: () => 1_000_000, wrong: [...never, ...objects, ...numbers, -1] };
const ifindex: Kind = { right: () => 1, wrong: [...never, ...objects, ...numbers, 0, -1, 2 ** 31] };
const u32: Kind = { right: () => 1, wrong: [...never, ...objects, ...numbers, -1, 2 ** 32] };
const positive: Kind = { right: () => 1, wrong: [...u32.wrong, 0] };
const timeout: Kind = { right: () => 1, wrong: [...never, ...objects, ...numbers, -1, 3_600_001] };
const mode: Kind = { right: () => 0o700, wrong: [...never, ...objects, ...numbers, -1, 0o10000] };
const path: Kind = { right: () => '/nonexistent', wrong: [...never, ...objects, 1, '', 'a\0b', 'x'.repeat(4096)] };
const name: Kind = { right: () => 'lo', wrong: [...never, ...objects, 1, '', 'a\0b', '0123456789abcdef'] };
const tag: Kind = { right: () => 'tag', wrong: [...never, ...objects, 1, '', 'a\0b', 'a/b', '..', 'x'.repeat(64)] };
const boolean: Kind = { right: () => true, wrong: [...never, ...objects, 0, 1, 'true', ''] };
const direction: Kind = { right: () => 'ingress', wrong: [...never, ...objects, 0, '', 'Ingress', 'both'] };
const order: Kind = { right: () => 'first', wrong: [...never, ...objects, 0, '', 'middle'] };
const family: Kind = { right: () => 4, wrong: [...never, ...objects, ...numbers, 0, 2, 10] };
const key: Kind = {
  right: () => bytes(32),
  wrong: [...never, ...objects, '', bytes(31), bytes(33), new Int8Array(32)],
};
const addressKey: Kind = { right: () => address(1), wrong: [...never, ...objects, '192.0.2.1', bytes(4), bytes(17)] };
const packet: Kind = { right: () => bytes(64), wrong: [...never, ...objects, '', new Uint16Array(64)] };
const stateKind: Kind = { right: () => state, wrong: [...never, ...objects, 1, ''] };
const object = (right: () => unknown, optionalFields = false): Kind => ({
  right,
  wrong: [...never, [], 1, '', true],
  optionalFields,
});
const rule = object(() => ({ family: 4, priority: 1, mark: 1, table: 1, protocol: 1 }));
const route = object(() => ({ family: 4, table: 1, protocol: 1 }));
const generation = u32;
const proxies: Kind = {
  right: () => [proxyRecord(), proxyRecord()],
  wrong: [...never, {}, 1, '', Array.from({ length: 5 }, () => proxyRecord())],
};

const exclusionRules: Kind = {
  right: () => [{ kind: 'inbound_port', value: bytes(16), length: 16, excluded: true }],
  wrong: [...never, {}, 1, '', [1], Array.from({ length: 4097 }, () => null)],
};
const cgroup: Kind = { right: () => 1n, wrong: [...never, ...objects, 1, '', -1n, 1n << 64n] };
const stubbed: Kind = { right: () => 'inpod_egress', wrong: [...never, ...objects, 1, '', 'pod_egress'] };
const interfaceId: Kind = { right: () => 0x80000001, wrong: [...never, ...objects, ...numbers, 0] };
const traceFilter: Kind = { right: () => ({ ifindex: 0, reason: null }), wrong: [undefined, 1, '', true] };
const socketPath: Kind = { right: () => '/nonexistent/s', wrong: [...path.wrong, `/${'x'.repeat(107)}`] };
const fdList: Kind = {
  right: () => [1_000_000],
  wrong: [...never, {}, 1, '', ['1'], [-1], [1.5], Array.from({ length: 254 }, () => 1_000_000)],
};
const callback: Kind = { right: () => () => {}, wrong: [undefined, null, {}, 1, ''] };

/** Every function of plugin/native.ts and its parameters in order. */
const functions: Record<
  {
    [K in keyof Native]-?: NonNullable<Native[K]> extends (...args: never[]) => unknown ? K : never;
  }[keyof Native],
  readonly [string, Kind][]
> = {
  close: [['fd', fd]],
  openNetns: [['path', path]],
  netnsIdentity: [['netns', netns]],
  netnsId: [
    ['netns', netns],
    ['allocate', boolean],
  ],
  lockFile: [
    ['path', path],
    ['timeoutMs', timeout],
  ],
  lockShared: [
    ['path', path],
    ['timeoutMs', timeout],
  ],
  isBpffs: [['path', path]],
  mountBpffs: [['path', path]],
  makeDirectory: [
    ['path', path],
    ['mode', mode],
  ],
  removeDirectory: [['path', path]],
  removeFile: [['path', path]],
  renameFile: [
    ['from', path],
    ['to', path],
  ],
  capabilities: [],
  linkByName: [
    ['netns', netns],
    ['name', name],
  ],
  linkByIndex: [
    ['netns', netns],
    ['ifindex', ifindex],
  ],
  linkAddresses: [
    ['netns', netns],
    ['ifindex', ifindex],
  ],
  acceptLocal: [
    ['netns', netns],
    ['ifindex', ifindex],
  ],
  setAcceptLocal: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['on', boolean],
  ],
  migrateRequests: [['netns', netns]],
  setMigrateRequests: [
    ['netns', netns],
    ['on', boolean],
  ],
  routeLocalnet: [
    ['netns', netns],
    ['ifindex', ifindex],
  ],
  setRouteLocalnet: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['on', boolean],
  ],
  qdiscs: [
    ['netns', netns],
    ['ifindex', ifindex],
  ],
  addRule: [
    ['netns', netns],
    ['rule', rule],
  ],
  deleteRule: [
    ['netns', netns],
    ['rule', rule],
  ],
  rules: [
    ['netns', netns],
    ['family', family],
  ],
  addLocalRoute: [
    ['netns', netns],
    ['route', route],
  ],
  deleteLocalRoute: [
    ['netns', netns],
    ['route', route],
  ],
  localRoutes: [
    ['netns', netns],
    ['family', family],
    ['table', positive],
  ],
  setCheckCgroups: [
    ['state', stateKind],
    ['on', boolean],
  ],
  putProxyCgroup: [
    ['state', stateKind],
    ['id', cgroup],
  ],
  deleteProxyCgroup: [
    ['state', stateKind],
    ['id', cgroup],
  ],
  listProxyCgroups: [['state', stateKind]],
  loadStub: [
    ['state', stateKind],
    ['program', stubbed],
    ['ifindex', interfaceId],
    ['otherwise', { right: () => 'drop', wrong: [...never, ...objects, 0, '', 'open'] }],
  ],
  jumpTarget: [
    ['state', stateKind],
    ['program', stubbed],
  ],
  createState: [
    ['dir', path],
    ['wanted', object(() => structuredClone(WANTED))],
  ],
  openState: [['dir', path]],
  openStateOver: [
    ['dir', path],
    ['over', path],
  ],
  growState: [
    ['state', stateKind],
    ['dir', path],
    ['wanted', object(() => ({ maxPods: 1, maxFlows: 1, directFlowsPerPod: 1 }))],
  ],
  copyRecords: [
    ['from', stateKind],
    ['to', stateKind],
  ],
  copyFlows: [
    ['from', stateKind],
    ['to', stateKind],
  ],
  copyTraffic: [
    ['from', stateKind],
    ['to', stateKind],
    ['ifindex', u32],
  ],
  writeCapacity: [['state', stateKind]],
  closeState: [['state', stateKind]],
  settings: [['state', stateKind]],
  getAttachment: [
    ['state', stateKind],
    ['key', key],
  ],
  putAttachment: [
    ['state', stateKind],
    ['key', key],
    ['record', object(attachmentRecord)],
  ],
  replaceAttachment: [
    ['state', stateKind],
    ['key', key],
    ['record', object(attachmentRecord)],
  ],
  deleteAttachment: [
    ['state', stateKind],
    ['key', key],
  ],
  listAttachments: [['state', stateKind]],
  getInterface: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  putInterface: [
    ['state', stateKind],
    ['ifindex', interfaceId],
    ['record', object(interfaceRecord)],
  ],
  deleteInterface: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  listInterfaces: [['state', stateKind]],
  getEndpoint: [
    ['state', stateKind],
    ['address', addressKey],
  ],
  putEndpoint: [
    ['state', stateKind],
    ['address', addressKey],
    ['record', object(endpointRecord)],
    ['exclusive', boolean],
  ],
  deleteEndpoint: [
    ['state', stateKind],
    ['address', addressKey],
  ],
  listEndpoints: [['state', stateKind]],
  getProxies: [['state', stateKind]],
  putProxies: [
    ['state', stateKind],
    ['generation', generation],
    ['proxies', proxies],
  ],
  directFlows: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  deleteDirectFlows: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  deleteFlows: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  importDirectFlow: [
    ['programFd', fd],
    ['ifindex', interfaceId],
    ['flow', object(() => ({ source: address(1), sourcePort: 1, destination: address(2), destinationPort: 2 }))],
  ],
  listDirectFlows: [['state', stateKind]],
  putExclusions: [
    ['state', stateKind],
    ['ifindex', interfaceId],
    ['rules', exclusionRules],
  ],
  deleteExclusions: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  getExclusions: [
    ['state', stateKind],
    ['ifindex', interfaceId],
  ],
  listExclusions: [['state', stateKind]],
  counters: [['state', stateKind]],
  deleteCounters: [
    ['state', stateKind],
    ['ifindex', u32],
  ],
  setTrace: [
    ['state', stateKind],
    ['filter', traceFilter],
  ],
  getTrace: [['state', stateKind]],
  followEvents: [
    ['state', stateKind],
    ['onEvents', callback],
  ],
  mapUsage: [['state', stateKind]],
  loadPrograms: [
    ['state', stateKind],
    ['dir', path],
    ['tag', tag],
  ],
  loadIdlePrograms: [
    ['state', stateKind],
    ['dir', path],
    ['tag', tag],
  ],
  jumpToPrograms: [
    ['state', stateKind],
    ['directory', path],
  ],
  waitForPrograms: [],
  openProgram: [['path', path]],
  programInfo: [['programFd', fd]],
  programById: [['id', u32]],
  testRun: [
    ['programFd', fd],
    ['packet', packet],
    [
      'skb',
      {
        ...object(() => ({ mark: 1, ingressIfindex: 1, ifindex: 1, repeat: 1, interfaceId: 1 }), true),
        wrong: [null, [], 1, ''],
      },
    ],
  ],
  attachTcx: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['direction', direction],
    ['programFd', fd],
    ['order', order],
    ['pinPath', path],
  ],
  attachTcxAside: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['direction', direction],
    ['programFd', fd],
    ['order', order],
    ['pinPath', path],
  ],
  attachLookup: [
    ['netns', fd],
    ['programFd', fd],
    ['pinPath', path],
  ],
  queryTcx: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['direction', direction],
  ],
  linkInfo: [['pinPath', path]],
  updateLink: [
    ['pinPath', path],
    ['programFd', fd],
  ],
  detachLink: [['pinPath', path]],
  detachLinkAside: [['pinPath', path]],
  addClsact: [
    ['netns', netns],
    ['ifindex', ifindex],
  ],
  filters: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['direction', direction],
  ],
  attachFilter: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['direction', direction],
    ['programFd', fd],
    ['filter', object(() => ({ priority: 1, handle: 1, name: 'n', replace: false }))],
  ],
  deleteFilter: [
    ['netns', netns],
    ['ifindex', ifindex],
    ['direction', direction],
    ['filter', object(() => ({ priority: 1, handle: 1 }))],
  ],
  listeners: [['netns', netns]],
  connections: [['netns', netns]],
  listenTransparent: [
    ['netns', netns],
    [
      'options',
      object(() => ({
        family: 4,
        address: '127.0.0.1',
        port: 0,
        backlog: 1,
        reusePort: false,
        v6only: false,
        mark: 0,
      })),
    ],
  ],
  connectTransparent: [
    ['netns', netns],
    [
      'options',
      object(() => ({ source: '127.0.0.1', sourcePort: 0, destination: '127.0.0.1', port: 1, mark: 0, timeoutMs: 1 })),
    ],
  ],
  listenPlain: [
    ['netns', netns],
    ['options', object(() => ({ address: '127.0.0.1', port: 0, backlog: 1 }))],
  ],
  listenDatagram: [
    ['netns', netns],
    ['options', object(() => ({ address: '127.0.0.1', port: 0, reusePort: false, mark: 0 }))],
  ],
  listenSeqpacket: [
    ['path', socketPath],
    ['options', object(() => ({ mode: 0o600, backlog: 1 }))],
  ],
  acceptSeqpacket: [['listener', fd]],
  connectSeqpacket: [['path', socketPath]],
  peerCredentials: [['socket', fd]],
  sendDatagram: [
    ['socket', fd],
    ['bytes', packet],
    ['fds', fdList],
  ],
  receiveDatagram: [['socket', fd]],
  openLinkEvents: [],
  readLinkEvents: [['socket', fd]],
  watchReadable: [
    ['fd', fd],
    ['onReadable', callback],
  ],
  sha256: [['bytes', packet]],
  features: [],
  // Only in the fault-injecting build.
  failKernelCall: [
    ['n', { right: () => 0, wrong: [...never, ...objects, ...numbers, -1] }],
    ['errno', { right: () => 0, wrong: [...never, ...objects, ...numbers, -1, 4096] }],
  ],
  kernelCalls: [],
};

/** Of native/topology.cc; plugin/demo tests them. */
const TOPOLOGY = [
  'createNetns',
  'deleteNetns',
  'unmount',
  'inNetns',
  'createVeth',
  'setLinkUp',
  'deleteLink',
  'addAddress',
  'addRoute',
];

type Call = (...args: unknown[]) => unknown;
const call = (name: string, args: unknown[]) => (native as unknown as Record<string, Call>)[name]?.(...args);

/** Paths of all leaves and inner objects of `value`, typed arrays being leaves. */
function* places(value: unknown, before: (string | number)[] = []): Generator<(string | number)[]> {
  if (typeof value !== 'object' || value === null || value instanceof Uint8Array) return;
  for (const name of Array.isArray(value) ? value.keys() : Object.keys(value)) {
    const place = [...before, name];
    yield place;
    yield* places((value as Record<string | number, unknown>)[name], place);
  }
}

function replaced(value: unknown, place: (string | number)[], by: unknown): unknown {
  const [first, ...rest] = place;
  if (first === undefined) return by;
  const copy = (Array.isArray(value) ? [...value] : { ...(value as object) }) as Record<string | number, unknown>;
  copy[first] = replaced(copy[first], rest, by);
  return copy;
}

const dotted = (place: (string | number)[]) =>
  place.map((part) => (typeof part === 'number' ? `[${part}]` : `.${part}`)).join('');

describe('exports', () => {
  test('are those of plugin/native.ts and no other', () => {
    const optional = native.kernelCalls ? [] : ['failKernelCall', 'kernelCalls'];
    const expected = [
      ...Object.keys(functions).filter((name) => !optional.includes(name)),
      ...['layoutVersion', 'objectId', 'reasons', 'programs', 'sizes', 'flags'],
      ...TOPOLOGY,
    ];
    expect(Object.keys(native).sort()).toEqual(expected.sort());
  });

  test('objectId is the SHA-256 of the BPF object', () => {
    const sum = execFileSync('sha256sum', [join(import.meta.dirname, '../build/skeletons/redirect.bpf.o')], {
      encoding: 'utf8',
    });
    expect(native.objectId).toBe(sum.slice(0, 16));
  });
});

describe('words of bpf/redirect.h', () => {
  test('every reason, by number', () => {
    const found: Record<string, number> = {};
    for (const [, word, number] of header.matchAll(/^\tREASON_(\w+) = (\d+),/gm)) {
      if (word !== undefined && word !== 'MAX') found[word.toLowerCase()] = Number(number);
    }
    expect(Object.keys(found).length).toBeGreaterThan(30);
    expect(native.reasons).toEqual(found);
    expect(Object.isFrozen(native.reasons)).toBe(true);
  });

  test('every program', () => {
    const body = /enum program \{([^}]*)\}/.exec(header)?.[1] ?? '';
    const found: Record<string, number> = {};
    for (const [, word, number] of body.matchAll(/^\t(\w+) = (\d+),/gm)) {
      if (word !== undefined) found[word.toLowerCase()] = Number(number);
    }
    expect(native.programs).toEqual(found);
  });

  test('every flag under its full name', () => {
    const found: Record<string, number> = {};
    for (const [, word, bit] of header.matchAll(/^#define ((?:INTERFACE|VARIANT)_\w+) \(1u << (\d+)\)/gm)) {
      if (word !== undefined) found[word] = 2 ** Number(bit);
    }
    expect(Object.keys(found).length).toBeGreaterThan(10);
    expect(native.flags).toEqual(found);
  });

  test('layout version', () => {
    expect(native.layoutVersion).toBe(Number(/#define LAYOUT_VERSION (\d+)/.exec(header)?.[1]));
  });
});

describe('a wrong argument is a TypeError that names it, before any kernel call', () => {
  for (const [name, parameters] of Object.entries(functions)) {
    if (!(name in native)) continue;
    for (const [index, [parameter, kind]] of parameters.entries()) {
      test(`${name}: ${parameter}`, () => {
        const before = parameters.slice(0, index).map(([, kind]) => kind.right());
        const after = parameters.slice(index + 1).map(([, kind]) => kind.right());
        const calls = native.kernelCalls?.().length;
        for (const wrong of kind.wrong) {
          const error = failure(() => call(name, [...before, wrong, ...after]));
          expect(error, `${name}(${String(wrong)})`).toBeInstanceOf(TypeError);
          expect(error.message).toMatch(`${name}: ${parameter}`);
        }
        const right = kind.right();
        for (const place of places(right)) {
          for (const wrong of kind.optionalFields ? [Symbol('x'), '1'] : [undefined, Symbol('x')]) {
            const error = failure(() => call(name, [...before, replaced(right, place, wrong), ...after]));
            expect(error, `${parameter}${dotted(place)}`).toBeInstanceOf(TypeError);
            expect(error.message.startsWith(`${name}: ${parameter}${dotted(place)}`), error.message).toBe(true);
          }
        }
        expect(native.kernelCalls?.().length).toBe(calls);
      });
    }
  }

  test.each<[string, () => unknown, string]>([
    [
      'strings that do not fit',
      () => native.putAttachment(state, bytes(32), { ...attachmentRecord(), ifname: '0123456789abcdef' }),
      'record.ifname',
    ],
    [
      'strings with NUL',
      () => native.putAttachment(state, bytes(32), { ...attachmentRecord(), podName: 'a\0b' }),
      'record.podName',
    ],
    [
      'too many addresses',
      () => native.putAttachment(state, bytes(32), { ...attachmentRecord(), addresses: Array(17).fill(address(1)) }),
      'record.addresses',
    ],
    [
      'a boot id without its dashes',
      () => native.putAttachment(state, bytes(32), { ...attachmentRecord(), bootId: '0'.repeat(36) }),
      'record.bootId',
    ],
    [
      'a MAC address with a digit missing',
      () => native.putInterface(state, 1, { ...interfaceRecord(), podMac: '02:00:5e:10:00:1' }),
      'record.podMac',
    ],
    [
      'another negative bigint',
      () => native.putProxies(state, 1, [{ ...proxyRecord(), netnsCookie: -1n }]),
      'proxies[0].netnsCookie',
    ],
    [
      'a bigint of 65 bits',
      () => native.putProxies(state, 1, [{ ...proxyRecord(), netnsIno: 1n << 64n }]),
      'proxies[0].netnsIno',
    ],
    [
      'an address of the other family',
      () =>
        native.listenTransparent(-1, {
          family: 6,
          address: '127.0.0.1',
          port: 0,
          backlog: 1,
          reusePort: false,
          v6only: false,
          mark: 0,
        }),
      'options.address',
    ],
    [
      'a source of the other family',
      () =>
        native.connectTransparent(-1, {
          source: '::1',
          sourcePort: 0,
          destination: '127.0.0.1',
          port: 1,
          mark: 0,
          timeoutMs: 1,
        }),
      'options.source',
    ],
    [
      'a mark that does not fit',
      () => native.listenPlain(-1, { address: '127.0.0.1', port: 0, backlog: 1, mark: 2 ** 32 }),
      'options.mark',
    ],
    ['a host name', () => native.listenPlain(-1, { address: 'localhost', port: 0, backlog: 1 }), 'options.address'],
  ])('%s', (_, action, place) => {
    const error = failure(action);
    expect(error).toBeInstanceOf(TypeError);
    expect(error.message).toContain(place);
  });
});

describe('a descriptor that is not open is EBADF', () => {
  const CLOSED = 1_000_000;
  const cases: Record<string, () => unknown> = {
    close: () => native.close(CLOSED),
    netnsIdentity: () => native.netnsIdentity(CLOSED),
    netnsId: () => native.netnsId(CLOSED, true),
    linkByName: () => native.linkByName(CLOSED, 'lo'),
    linkByIndex: () => native.linkByIndex(CLOSED, 1),
    linkAddresses: () => native.linkAddresses(CLOSED, 1),
    acceptLocal: () => native.acceptLocal(CLOSED, 1),
    setAcceptLocal: () => native.setAcceptLocal(CLOSED, 1, true),
    migrateRequests: () => native.migrateRequests(CLOSED),
    setMigrateRequests: () => native.setMigrateRequests(CLOSED, true),
    qdiscs: () => native.qdiscs(CLOSED, 1),
    addRule: () => native.addRule(CLOSED, { family: 4, priority: 1, mark: 1, table: 1, protocol: 1 }),
    deleteRule: () => native.deleteRule(CLOSED, { family: 4, priority: 1, mark: 1, table: 1, protocol: 1 }),
    rules: () => native.rules(CLOSED, 4),
    addLocalRoute: () => native.addLocalRoute(CLOSED, { family: 4, table: 1, protocol: 1 }),
    deleteLocalRoute: () => native.deleteLocalRoute(CLOSED, { family: 4, table: 1, protocol: 1 }),
    localRoutes: () => native.localRoutes(CLOSED, 4, 1),
    testRun: () => native.testRun(CLOSED, bytes(64)),
    attachTcx: () => native.attachTcx(CLOSED, 1, 'ingress', CLOSED, 'first', '/nonexistent'),
    queryTcx: () => native.queryTcx(CLOSED, 1, 'ingress'),
    addClsact: () => native.addClsact(CLOSED, 1),
    filters: () => native.filters(CLOSED, 1, 'ingress'),
    attachFilter: () =>
      native.attachFilter(CLOSED, 1, 'ingress', CLOSED, { priority: 1, handle: 1, name: '', replace: false }),
    deleteFilter: () => native.deleteFilter(CLOSED, 1, 'ingress', { priority: 1, handle: 1 }),
    listeners: () => native.listeners(CLOSED),
    connections: () => native.connections(CLOSED),
    attachLookup: () => native.attachLookup(CLOSED, CLOSED, '/sys/fs/bpf/none'),
    listenPlain: () => native.listenPlain(CLOSED, { address: '127.0.0.1', port: 0, backlog: 1 }),
    listenDatagram: () => native.listenDatagram(CLOSED, { address: '127.0.0.1', port: 0, reusePort: false, mark: 0 }),
    acceptSeqpacket: () => native.acceptSeqpacket(CLOSED),
    peerCredentials: () => native.peerCredentials(CLOSED),
    sendDatagram: () => native.sendDatagram(CLOSED, bytes(1), []),
    receiveDatagram: () => native.receiveDatagram(CLOSED),
    readLinkEvents: () => native.readLinkEvents(CLOSED),
    watchReadable: () => native.watchReadable(CLOSED, () => {}),
  };
  const here = currentNetns();
  test.each(Object.entries(cases))('%s', (_, action) => {
    expect(cause(action)).toMatchObject({ code: 'EBADF', errno: 9 });
    expect(currentNetns()).toBe(here);
  });

  test('connectTransparent', async () => {
    const connection = native.connectTransparent(CLOSED, {
      source: null,
      sourcePort: 0,
      destination: '127.0.0.1',
      port: 1,
      mark: 0,
      timeoutMs: 1,
    });
    await expect(connection).rejects.toMatchObject({ code: 'EBADF', syscall: 'setns' });
  });

  test('attachTcxAside', async () => {
    const attached = native.attachTcxAside(CLOSED, 1, 'ingress', CLOSED, 'first', '/nonexistent');
    await expect(attached).rejects.toMatchObject({ code: 'EBADF', syscall: 'setns' });
  });

  test('programInfo, where the kernel has a word of its own', () => {
    expect(cause(() => native.programInfo(CLOSED))).toMatchObject({ code: 'EBADFD', errno: 77 });
  });
});

test('a descriptor of another kind is refused', () => {
  const file = native.openNetns('/proc/self/ns/net');
  try {
    expect(cause(() => native.programInfo(file))).toMatchObject({ code: 'EINVAL' });
    native.close(file);
    expect(cause(() => native.close(file))).toEqual({ code: 'EBADF', errno: 9, syscall: 'close' });
  } finally {
    expect(failure(() => native.close(file)).code).toBe('EBADF');
  }
});
