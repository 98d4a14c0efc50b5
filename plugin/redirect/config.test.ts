// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { CniError } from '../cni/errors.ts';
import {
  declaresCapability,
  isEgressLimited,
  isRateLimited,
  locateState,
  parseConfig,
  parsePortRange,
} from './config.ts';

const error = (raw: Record<string, unknown>) => {
  try {
    parseConfig(raw);
  } catch (thrown) {
    if (thrown instanceof CniError) return { code: thrown.code, msg: thrown.msg, details: thrown.details };
    throw thrown;
  }
  return undefined;
};

/** [address in hexadecimal, prefix length in 128-bit space] */
const cidrs = (...texts: string[]) =>
  parseConfig({ exclude: { outboundCIDRs: texts } }).exclude.outboundCIDRs.map(({ bytes, length }) => [
    Buffer.from(bytes).toString('hex'),
    length,
  ]);

const DEFAULTS = {
  enrollment: 'annotation',
  proxy: {
    contract: 'shared',
    match: { namespace: 'istio-system', name: 'ztunnel-*', serviceAccount: 'ztunnel' },
    ports: { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008, dns: 15053 },
  },
  failurePolicy: 'closed',
  closedAction: 'drop',
  podOverrides: 'all',
  dnsCapture: false,
  exclude: { inboundPorts: [], outboundPorts: [], outboundCIDRs: [] },
  excludeNamespaces: ['kube-system', 'istio-system'],
  maxPods: 4096,
  maxFlows: 65536,
  directFlowsPerPod: 1024,
  hook: 'auto',
  order: 'first',
  variant: 'auto',
  marks: { bypass: 0x1041, toProxy: 0x1042, tproxy: 0x1043 },
  stateDir: '/sys/fs/bpf/ambient-redirect',
  runDir: '/run/ambient-redirect',
  logLevel: 'info',
};

test('every key has a default', () => {
  expect(parseConfig({ type: 'ambient-redirect' })).toEqual(DEFAULTS);
});

test('the example conflist is an entry of ours after a primary and portmap, and says the defaults', () => {
  const example = JSON.parse(readFileSync(join(import.meta.dirname, '../../cni-conf.example.json'), 'utf8'));
  expect(example.plugins.map(({ type }: { type: string }) => type)).toEqual(['bridge', 'portmap', 'ambient-redirect']);
  expect(example.cniVersion).toBe('1.0.0');
  expect(parseConfig(example.plugins[2])).toEqual(DEFAULTS);
});

test("the README's table has every key", () => {
  const readme = readFileSync(join(import.meta.dirname, '../../README.md'), 'utf8');
  const section = readme.slice(readme.indexOf('## The conflist entry'), readme.indexOf('## Command line'));
  const rows = [...section.matchAll(/^\| `([a-zA-Z.]+)` \|/gm)].map(([, key]) => key);
  const { proxy, ...others } = DEFAULTS;
  expect(rows.toSorted()).toEqual(
    [...Object.keys(proxy).map((key) => `proxy.${key}`), ...Object.keys(others)].toSorted(),
  );
});

test('keys of CNI are never refused', () => {
  const cni = { name: 1, type: 1, cniVersion: 1, prevResult: 1, runtimeConfig: 1, args: 1, capabilities: 1, ipam: 1 };
  expect(parseConfig({ ...cni, dns: 1, ipMasq: 1, 'cni.dev/attachments': 1, 'cni.dev/what-comes': 1 })).toEqual(
    DEFAULTS,
  );
});

test.each([
  [{ enrollment: 'all' }, { enrollment: 'all' }],
  [{ enrollment: 'agent' }, { enrollment: 'agent' }],
  [{ failurePolicy: 'open' }, { failurePolicy: 'open' }],
  [{ closedAction: 'reset' }, { closedAction: 'reset' }],
  [{ podOverrides: 'none' }, { podOverrides: 'none' }],
  [{ dnsCapture: true }, { dnsCapture: true }],
  [{ excludeNamespaces: [] }, { excludeNamespaces: [] }],
  [
    { hook: 'clsact', order: 'last' },
    { hook: 'clsact', order: 'last' },
  ],
  [{ variant: 'no-sk-assign' }, { variant: 'no-sk-assign' }],
  [
    { maxPods: 8, maxFlows: 1024, directFlowsPerPod: 64 },
    { maxPods: 8, maxFlows: 1024, directFlowsPerPod: 64 },
  ],
  [{ marks: { bypass: 4294967295 } }, { marks: { ...DEFAULTS.marks, bypass: 4294967295 } }],
  [
    { stateDir: '/sys/fs/bpf/a b/', runDir: '/run/x' },
    { stateDir: '/sys/fs/bpf/a b/', runDir: '/run/x' },
  ],
  [{ logLevel: 'debug' }, { logLevel: 'debug' }],
  [
    { proxy: { contract: 'in-pod', match: { name: 'z-*' }, ports: { dns: 0, outbound: 15101 } } },
    {
      proxy: {
        contract: 'in-pod',
        match: { namespace: 'istio-system', name: 'z-*', serviceAccount: '*' },
        ports: { ...DEFAULTS.proxy.ports, dns: 0, outbound: 15101 },
      },
    },
  ],
  [
    { exclude: { inboundPorts: [22, '80', '8000-8100'] } },
    {
      exclude: {
        ...DEFAULTS.exclude,
        inboundPorts: [
          { from: 22, to: 22 },
          { from: 80, to: 80 },
          { from: 8000, to: 8100 },
        ],
      },
    },
  ],
])('%j', (raw, expected) => {
  expect(parseConfig(raw)).toEqual({ ...DEFAULTS, ...expected });
});

test('prefixes are masked and in one space', () => {
  expect(cidrs('10.1.2.3/8', '10.1.2.3/20', '0.0.0.0/0', '10.1.2.3/32', '::/0', 'fd12:3456::1/12', '::1/128')).toEqual([
    ['00000000000000000000ffff0a000000', 104],
    ['00000000000000000000ffff0a010000', 116],
    ['00000000000000000000ffff00000000', 96],
    ['00000000000000000000ffff0a010203', 128],
    ['00000000000000000000000000000000', 0],
    ['fd100000000000000000000000000000', 12],
    ['00000000000000000000000000000001', 128],
  ]);
});

describe('refuses', () => {
  const directory = 'expected an absolute path other than /, without ".." or empty parts';
  const port = 'expected a port or a range "from-to", 1 to 65535';
  test.each([
    [{ enrollment: 'some' }, 'enrollment" = "some"', 'expected one of "annotation", "all", "agent"'],
    [{ enrollment: null }, 'enrollment" = null', 'expected a value; leave the key out for its default'],
    [{ proxy: [] }, 'proxy" = []', 'expected an object'],
    [{ proxy: { contract: 1 } }, 'proxy.contract" = 1', 'expected one of "shared", "in-pod"'],
    [{ proxy: { match: 'x' } }, 'proxy.match" = "x"', 'expected an object'],
    [{ proxy: { match: { namespace: '*' } } }, 'proxy.match.namespace" = "*"', 'expected the name of a namespace'],
    [
      { proxy: { match: { serviceAccount: 'a b' } } },
      'proxy.match.serviceAccount" = "a b"',
      'expected a service account, in which * stands for any characters',
    ],
    [
      { proxy: { match: { name: 'z_?' } } },
      'proxy.match.name" = "z_?"',
      'expected a pod name, in which * stands for any characters',
    ],
    [{ proxy: { ports: { outbound: 70000 } } }, 'proxy.ports.outbound" = 70000', 'expected an integer, 0 to 65535'],
    [{ proxy: { ports: { dns: '53' } } }, 'proxy.ports.dns" = "53"', 'expected an integer, 0 to 65535'],
    [{ failurePolicy: true }, 'failurePolicy" = true', 'expected one of "closed", "open"'],
    [{ closedAction: 'x' }, 'closedAction" = "x"', 'expected one of "drop", "reset"'],
    [{ podOverrides: 'x' }, 'podOverrides" = "x"', 'expected one of "all", "enroll", "exclusions", "none"'],
    [{ dnsCapture: 'true' }, 'dnsCapture" = "true"', 'expected true or false'],
    [
      { dnsCapture: true, proxy: { ports: { dns: 0 } } },
      'dnsCapture" = true',
      'expected false, because proxy.ports.dns is 0',
    ],
    [{ exclude: { inboundPorts: 80 } }, 'exclude.inboundPorts" = 80', 'expected a list'],
    [{ exclude: { inboundPorts: [0] } }, 'exclude.inboundPorts[0]" = 0', port],
    [{ exclude: { outboundPorts: [80, '90-80'] } }, 'exclude.outboundPorts[1]" = "90-80"', port],
    [
      { exclude: { outboundCIDRs: ['10.0.0.0'] } },
      'exclude.outboundCIDRs[0]" = "10.0.0.0"',
      'expected an IP prefix in CIDR notation',
    ],
    [{ excludeNamespaces: ['A'] }, 'excludeNamespaces[0]" = "A"', 'expected the name of a namespace'],
    [{ maxPods: 0 }, 'maxPods" = 0', 'expected an integer, 1 to 131072'],
    [{ maxPods: 1.5 }, 'maxPods" = 1.5', 'expected an integer, 1 to 131072'],
    [{ maxFlows: 1 }, 'maxFlows" = 1', 'expected an integer, 64 to 16777216'],
    [{ directFlowsPerPod: 1 }, 'directFlowsPerPod" = 1', 'expected an integer, 16 to 1048576'],
    [{ hook: 'xdp' }, 'hook" = "xdp"', 'expected one of "auto", "tcx", "clsact"'],
    [{ order: 'x' }, 'order" = "x"', 'expected one of "first", "last"'],
    [
      { variant: 'x' },
      'variant" = "x"',
      'expected one of "auto", "no-redirect-peer", "no-sk-lookup", "no-sk-assign", "full-sockets-only"',
    ],
    [{ marks: { bypass: 0 } }, 'marks.bypass" = 0', 'expected an integer, 1 to 4294967295'],
    [{ marks: { tproxy: 2 ** 32 } }, 'marks.tproxy" = 4294967296', 'expected an integer, 1 to 4294967295'],
    [
      { marks: { bypass: 1, toProxy: 1 } },
      'marks" = {"bypass":1,"toProxy":1,"tproxy":4163}',
      'expected three different values',
    ],
    [{ stateDir: 'x' }, 'stateDir" = "x"', directory],
    [{ stateDir: '/' }, 'stateDir" = "/"', directory],
    [{ stateDir: '/a/../b' }, 'stateDir" = "/a/../b"', directory],
    [
      { runDir: `/${'r'.repeat(96)}` },
      `runDir" = "/${'r'.repeat(96)}"`,
      `${directory}, short enough for a socket in it`,
    ],
    [{ logLevel: 'loud' }, 'logLevel" = "loud"', 'expected one of "info", "error", "warn", "debug"'],
  ])('%j', (raw, msg, details) => {
    expect(error(raw)).toEqual({ code: 7, msg: `invalid field "${msg}`, details });
  });

  test.each([
    [{ enrolment: 'all' }, 'unsupported field "enrolment" = "all"'],
    [{ Enrollment: 'all' }, 'unsupported field "Enrollment" = "all"'],
    [{ x: undefined }, 'unsupported field "x" = undefined'],
    [{ proxy: { ports: { inbound: 1 } } }, 'unsupported field "proxy.ports.inbound" = 1'],
    [{ proxy: { match: { label: { a: 'b' } } } }, 'unsupported field "proxy.match.label" = {"a":"b"}'],
    [{ exclude: { ports: [] } }, 'unsupported field "exclude.ports" = []'],
    [{ marks: { x: 1 } }, 'unsupported field "marks.x" = 1'],
    [JSON.parse('{"__proto__":{"enrollment":"all"}}'), 'unsupported field "__proto__" = {"enrollment":"all"}'],
    [{ constructor: 1 }, 'unsupported field "constructor" = 1'],
  ])('unknown key %j', (raw, msg) => {
    expect(error(raw)).toEqual({ code: 2, msg, details: '' });
  });

  test('a long value is cut in the message', () => {
    const { msg } = error({ x: 'y'.repeat(1000) }) ?? {};
    expect(msg).toBe(`unsupported field "x" = "${'y'.repeat(199)}... (1002 characters)`);
  });
});

test.each([
  [8080, { from: 8080, to: 8080 }],
  ['8080', { from: 8080, to: 8080 }],
  ['1-65535', { from: 1, to: 65535 }],
  ['0', undefined],
  ['65536', undefined],
  ['08', undefined],
  ['1-', undefined],
  ['-1', undefined],
  ['1-2-3', undefined],
  [' 80', undefined],
  [80.5, undefined],
  [-80, undefined],
  [Number.NaN, undefined],
  [true, undefined],
  [['80'], undefined],
])('port range %j', (value, expected) => {
  expect(parsePortRange(value)).toEqual(expected);
});

describe('DEL finds the state', () => {
  test('in an entry that is invalid', () => {
    const raw = { enrollment: 5, x: 1, stateDir: '/sys/fs/bpf/x', runDir: '/run/y', logLevel: 'debug' };
    expect(locateState(raw)).toEqual({ stateDir: '/sys/fs/bpf/x', runDir: '/run/y', logLevel: 'debug', ignored: [] });
  });

  test('by default where the entry does not say it in a usable way', () => {
    const { ignored, ...location } = locateState({ stateDir: 5, runDir: null, logLevel: {} });
    expect(location).toEqual({
      stateDir: '/sys/fs/bpf/ambient-redirect',
      runDir: '/run/ambient-redirect',
      logLevel: 'info',
    });
    expect(ignored.map(({ msg }) => msg)).toEqual([
      'invalid field "stateDir" = 5',
      'invalid field "runDir" = null',
      'invalid field "logLevel" = {}',
    ]);
  });
});

test.each([
  [{}, {}, false],
  [{ capabilities: { c: true } }, {}, true],
  [{ capabilities: { c: false } }, {}, false],
  [{ capabilities: { c: 'true' } }, {}, false],
  [{ capabilities: 'c' }, {}, false],
  [{ capabilities: { constructor: 1 } }, {}, false],
  [{}, { c: {} }, true],
])('%j with runtimeConfig %j declares c: %s', (raw, runtimeConfig, expected) => {
  expect(declaresCapability({ raw, runtimeConfig }, 'c')).toBe(expected);
});

test.each([
  [{}, false, false],
  [{ bandwidth: null }, false, false],
  [{ bandwidth: {} }, false, false],
  [{ bandwidth: { ingressRate: 0, egressRate: 0, ingressBurst: 5 } }, false, false],
  [{ bandwidth: { ingressRate: 1 } }, true, false],
  [{ bandwidth: { egressRate: 8000000, egressBurst: 1 } }, true, true],
  [{ bandwidth: { egressRate: { a: 1 } } }, true, true],
])('%j is rate limited: %s, in what the pod sends: %s', (runtimeConfig, limited, egress) => {
  expect(isRateLimited(runtimeConfig)).toBe(limited);
  expect(isEgressLimited(runtimeConfig)).toBe(egress);
});
