// SPDX-License-Identifier: Apache-2.0
// The plugin's own keys of the conflist entry, validated once. What comes out has every default filled in, and later
// code trusts it.

import { type IpPrefix, parsePrefix } from '../cni/address.ts';
import { CniError, Code, quote } from '../cni/errors.ts';
import type { NetConf } from '../cni/netconf.ts';
import { LOG_LEVELS, type LogLevel } from '../log.ts';

export interface RedirectConfig {
  enrollment: Enrollment;
  proxy: {
    contract: Contract;
    /** whose ADD makes the proxy; `name` and `serviceAccount` may have `*` for any characters */
    match: { namespace: string; name: string; serviceAccount: string };
    /** 0: no such listener, nothing of that kind is redirected */
    ports: ProxyPorts;
  };
  failurePolicy: 'closed' | 'open';
  closedAction: 'drop' | 'reset';
  podOverrides: PodOverrides;
  dnsCapture: boolean;
  exclude: Exclusions;
  excludeNamespaces: readonly string[];
  maxPods: number;
  /** entries of the map of redirected flows */
  maxFlows: number;
  /** entries of each pod's own map of flows that were let go direct */
  directFlowsPerPod: number;
  hook: 'auto' | 'tcx' | 'clsact';
  order: 'first' | 'last';
  /** null: nobody has said; that of the state, and auto for a new one */
  variant: Variant | null;
  /** 32-bit values, compared whole, never 0, all different */
  marks: Marks;
  stateDir: string;
  runDir: string;
  logLevel: LogLevel;
}

export type Enrollment = 'annotation' | 'all' | 'agent';
export type Contract = 'shared' | 'in-pod';
export type PodOverrides = 'all' | 'enroll' | 'exclusions' | 'none';
export type Variant = (typeof VARIANTS)[number];

export interface ProxyPorts {
  outbound: number;
  inboundPlaintext: number;
  inboundHBONE: number;
  dns: number;
}

export interface Marks {
  /** host's netns: another program of ours has decided on this packet */
  bypass: number;
  /** host's netns: on its way to the proxy */
  toProxy: number;
  /** proxy's netns: route to the local socket */
  tproxy: number;
}

/** Inclusive at both ends. */
export interface PortRange {
  from: number;
  to: number;
}

export interface Exclusions {
  inboundPorts: readonly PortRange[];
  outboundPorts: readonly PortRange[];
  /**
   * Host bits are zero. Lengths are in 128-bit space; note that a short prefix of family 6 ("::/0") also covers the
   * v4-mapped range but does not mean it.
   */
  outboundCIDRs: readonly IpPrefix[];
}

export const DEFAULT_STATE_DIR = '/sys/fs/bpf/ambient-redirect';
export const DEFAULT_RUN_DIR = '/run/ambient-redirect';

export const VARIANTS = ['auto', 'no-redirect-peer', 'no-sk-lookup', 'no-sk-assign', 'full-sockets-only'] as const;

/**
 * Clear of what node components look for in marks: kube-proxy 0x4000 and 0x8000, portmap 0x2000, AWS 0x80, Cilium's
 * magic in 0xf00, Istio's 0x400, 0x111 and 0x539 under 0xfff, Calico's 0xffff0000.
 */
const DEFAULT_MARKS: Marks = { bypass: 0x1041, toProxy: 0x1042, tproxy: 0x1043 };

/** Pods of Istio's DaemonSet. */
const ZTUNNEL = 'ztunnel-*';

/** Keys that belong to CNI and libcni, beside every `cni.dev/...`. */
const CNI_KEYS = [
  'name',
  'type',
  'cniVersion',
  'prevResult',
  'runtimeConfig',
  'args',
  'capabilities',
  'ipam',
  'dns',
  'ipMasq',
];

/** sizeof(sun_path) - 1 */
const SOCKET_PATH_BYTES = 107;

/** Validates the whole entry. Throws CniError 2 for a key that is not known, 7 for a value that will not do. */
export function parseConfig(raw: NetConf['raw']): RedirectConfig {
  const entry = new Section(
    Object.fromEntries(Object.entries(raw).filter(([key]) => !CNI_KEYS.includes(key) && !key.startsWith('cni.dev/'))),
    '',
  );
  const proxy = entry.section('proxy');
  const match = proxy.section('match');
  const ports = proxy.section('ports');
  const exclude = entry.section('exclude');
  const marks = entry.section('marks');
  // No pattern for the namespace: it is what makes the proxy trusted.
  const namespace = match.string('namespace', 'istio-system', isNamespace, 'the name of a namespace');
  const name = match.string('name', ZTUNNEL, isNamePattern, 'a pod name, in which * stands for any characters');
  const config: RedirectConfig = {
    enrollment: entry.oneOf('enrollment', ['annotation', 'all', 'agent']),
    proxy: {
      contract: proxy.oneOf('contract', ['shared', 'in-pod']),
      match: {
        namespace,
        name,
        // ztunnel's chart gives it this one; what another proxy has nobody can know.
        serviceAccount: match.string(
          'serviceAccount',
          name === ZTUNNEL ? 'ztunnel' : '*',
          isNamePattern,
          'a service account, in which * stands for any characters',
        ),
      },
      ports: {
        outbound: ports.integer('outbound', 15001, 0, 65535),
        inboundPlaintext: ports.integer('inboundPlaintext', 15006, 0, 65535),
        inboundHBONE: ports.integer('inboundHBONE', 15008, 0, 65535),
        dns: ports.integer('dns', 15053, 0, 65535),
      },
    },
    failurePolicy: entry.oneOf('failurePolicy', ['closed', 'open']),
    closedAction: entry.oneOf('closedAction', ['drop', 'reset']),
    podOverrides: entry.oneOf('podOverrides', ['all', 'enroll', 'exclusions', 'none']),
    dnsCapture: entry.boolean('dnsCapture', false),
    exclude: {
      inboundPorts: exclude.list('inboundPorts', [], parsePortRange, 'a port or a range "from-to", 1 to 65535'),
      outboundPorts: exclude.list('outboundPorts', [], parsePortRange, 'a port or a range "from-to", 1 to 65535'),
      outboundCIDRs: exclude.list('outboundCIDRs', [], parseCidr, 'an IP prefix in CIDR notation'),
    },
    excludeNamespaces: entry.list(
      'excludeNamespaces',
      ['kube-system', 'istio-system'],
      (value) => (typeof value === 'string' && isNamespace(value) ? value : undefined),
      'the name of a namespace',
    ),
    maxPods: entry.integer('maxPods', 4096, 1, 1 << 17),
    maxFlows: entry.integer('maxFlows', 65536, 64, 1 << 24),
    directFlowsPerPod: entry.integer('directFlowsPerPod', 1024, 16, 1 << 20),
    hook: entry.oneOf('hook', ['auto', 'tcx', 'clsact']),
    order: entry.oneOf('order', ['first', 'last']),
    variant: entry.oneOf('variant', VARIANTS),
    marks: {
      bypass: marks.integer('bypass', DEFAULT_MARKS.bypass, 1, 0xffffffff),
      toProxy: marks.integer('toProxy', DEFAULT_MARKS.toProxy, 1, 0xffffffff),
      tproxy: marks.integer('tproxy', DEFAULT_MARKS.tproxy, 1, 0xffffffff),
    },
    stateDir: entry.string('stateDir', DEFAULT_STATE_DIR, isDirectoryPath, DIRECTORY_PATH),
    runDir: entry.string('runDir', DEFAULT_RUN_DIR, isRunDirectory, RUN_DIRECTORY),
    logLevel: entry.oneOf('logLevel', ['info', ...LOG_LEVELS]),
  };
  for (const section of [entry, proxy, match, ports, exclude, marks]) section.refuseRest();

  if (new Set(Object.values(config.marks)).size !== 3) {
    throw invalidField('marks', config.marks, 'three different values');
  }
  if (config.dnsCapture && config.proxy.ports.dns === 0) {
    throw invalidField('dnsCapture', true, 'false, because proxy.ports.dns is 0');
  }
  return config;
}

export interface StateLocation {
  stateDir: string;
  runDir: string;
  logLevel: LogLevel;
  /** values that were there and could not be used; the default stands in for each */
  ignored: readonly CniError[];
}

/**
 * Where the state is, for DEL: an entry that was broken by an edit after ADD must not keep a pod from being deleted.
 * Never throws.
 */
export function locateState(raw: NetConf['raw']): StateLocation {
  const entry = new Section(raw, '');
  const ignored: CniError[] = [];
  const lenient = <T>(read: () => T, fallback: T): T => {
    try {
      return read();
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
      ignored.push(error);
      return fallback;
    }
  };
  return {
    stateDir: lenient(
      () => entry.string('stateDir', DEFAULT_STATE_DIR, isDirectoryPath, DIRECTORY_PATH),
      DEFAULT_STATE_DIR,
    ),
    runDir: lenient(() => entry.string('runDir', DEFAULT_RUN_DIR, isRunDirectory, RUN_DIRECTORY), DEFAULT_RUN_DIR),
    logLevel: lenient<LogLevel>(() => entry.oneOf('logLevel', ['info', ...LOG_LEVELS]), 'info'),
    ignored,
  };
}

/** Whether the entry asks the runtime for `capability`. A runtime may strip the key, and then proves it by sending. */
export function declaresCapability(conf: Pick<NetConf, 'raw' | 'runtimeConfig'>, capability: string): boolean {
  const { capabilities } = conf.raw;
  const declared = typeof capabilities === 'object' && capabilities !== null && Reflect.get(capabilities, capability);
  return declared === true || conf.runtimeConfig[capability] !== undefined;
}

/**
 * Whether the runtime handed on rate limits for the pod (capability "bandwidth", kubelet's annotations): the plugin
 * of that name may follow in the chain and put a queue on the host-side veth.
 */
export function isRateLimited(runtimeConfig: NetConf['runtimeConfig']): boolean {
  return hasLimit(runtimeConfig, 'ingressRate') || isEgressLimited(runtimeConfig);
}

/** Whether what the pod sends is to be limited: for that the bandwidth plugin makes an ingress qdisc on the host side. */
export function isEgressLimited(runtimeConfig: NetConf['runtimeConfig']): boolean {
  return hasLimit(runtimeConfig, 'egressRate');
}

/** Whatever is no 0 is taken as a limit: that costs speed, the opposite mistake costs the limit. */
function hasLimit({ bandwidth }: NetConf['runtimeConfig'], key: string): boolean {
  if (typeof bandwidth !== 'object' || bandwidth === null) return false;
  return ![0, null, undefined].includes(Reflect.get(bandwidth, key));
}

/** 8080, "8080" or "8000-8100"; undefined for anything else. */
export function parsePortRange(value: unknown): PortRange | undefined {
  const match = /^([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?$/.exec(
    typeof value === 'number' ? String(value) : typeof value === 'string' ? value : '',
  );
  if (match === null) return undefined;
  const from = Number(match[1]);
  const to = Number(match[2] ?? match[1]);
  return from <= to && to <= 65535 ? { from, to } : undefined;
}

/** undefined for anything but a prefix in CIDR notation. */
export function parseCidr(value: unknown): IpPrefix | undefined {
  const prefix = typeof value === 'string' ? parsePrefix(value) : undefined;
  if (prefix === undefined) return undefined;
  const bytes = prefix.bytes.map((byte, i) => {
    const bits = Math.min(8, Math.max(0, prefix.length - 8 * i));
    return byte & (0xff00 >> bits);
  });
  return { ...prefix, bytes };
}

/** A node of the configuration. Reading a key marks it as known. */
class Section {
  readonly #values: Readonly<Record<string, unknown>>;
  readonly #path: string;
  readonly #known = new Set<string>();

  constructor(values: Readonly<Record<string, unknown>>, path: string) {
    this.#values = values;
    this.#path = path;
  }

  section(key: string): Section {
    const value = this.#read(key) ?? {};
    if (typeof value !== 'object' || Array.isArray(value)) throw invalidField(this.#name(key), value, 'an object');
    return new Section(value as Readonly<Record<string, unknown>>, `${this.#name(key)}.`);
  }

  /** The first of `allowed` is the default. */
  oneOf<const T extends string>(key: string, allowed: readonly [T, ...T[]]): T {
    const value = this.#read(key) ?? allowed[0];
    const found = allowed.find((word) => word === value);
    if (found !== undefined) return found;
    const words = [...new Set(allowed)].map((word) => JSON.stringify(word)).join(', ');
    throw invalidField(this.#name(key), value, `one of ${words}`);
  }

  boolean(key: string, fallback: boolean): boolean {
    const value = this.#read(key) ?? fallback;
    if (typeof value !== 'boolean') throw invalidField(this.#name(key), value, 'true or false');
    return value;
  }

  integer(key: string, fallback: number, minimum: number, maximum: number): number {
    const value = this.#read(key) ?? fallback;
    if (typeof value !== 'number' || !Number.isInteger(value) || value < minimum || value > maximum) {
      throw invalidField(this.#name(key), value, `an integer, ${minimum} to ${maximum}`);
    }
    return value;
  }

  string(key: string, fallback: string, accepts: (value: string) => boolean, expected: string): string {
    const value = this.#read(key) ?? fallback;
    if (typeof value !== 'string' || !accepts(value)) throw invalidField(this.#name(key), value, expected);
    return value;
  }

  /** `parse` returns undefined for what it refuses. */
  list<T>(
    key: string,
    fallback: readonly T[],
    parse: (value: unknown) => T | undefined,
    expected: string,
  ): readonly T[] {
    const values = this.#read(key);
    if (values === undefined) return fallback;
    if (!Array.isArray(values)) throw invalidField(this.#name(key), values, 'a list');
    return values.map((value: unknown, i) => {
      const parsed = parse(value);
      if (parsed === undefined) throw invalidField(`${this.#name(key)}[${i}]`, value, expected);
      return parsed;
    });
  }

  /** Throws CniError 2 for a key that was never asked for. */
  refuseRest(): void {
    for (const [key, value] of Object.entries(this.#values)) {
      if (!this.#known.has(key)) {
        // SPEC: the message has the key and the value.
        throw new CniError(Code.UNSUPPORTED_FIELD, `unsupported field "${this.#name(key)}" = ${quote(value)}`);
      }
    }
  }

  #read(key: string): unknown {
    this.#known.add(key);
    if (!Object.hasOwn(this.#values, key)) return undefined;
    const value = this.#values[key];
    if (value === null) throw invalidField(this.#name(key), value, 'a value; leave the key out for its default');
    return value;
  }

  #name(key: string): string {
    return `${this.#path}${key}`;
  }
}

function invalidField(path: string, value: unknown, expected: string): CniError {
  return new CniError(Code.INVALID_NETWORK_CONFIG, `invalid field "${path}" = ${quote(value)}`, `expected ${expected}`);
}

/** A DNS label, as Kubernetes requires. */
function isNamespace(value: string): boolean {
  return value.length <= 63 && /^[a-z0-9]([a-z0-9-]*[a-z0-9])?$/.test(value);
}

function isNamePattern(value: string): boolean {
  return value.length <= 253 && /^[a-z0-9.*-]+$/.test(value);
}

const DIRECTORY_PATH = 'an absolute path other than /, without ".." or empty parts';

function isDirectoryPath(value: string): boolean {
  const parts = value.replace(/\/$/, '').split('/');
  return (
    parts.length > 1 &&
    parts.shift() === '' &&
    parts.every((part) => !['', '.', '..'].includes(part) && !part.includes('\0')) &&
    Buffer.byteLength(value) <= 255
  );
}

const RUN_DIRECTORY = `${DIRECTORY_PATH}, short enough for a socket in it`;

function isRunDirectory(value: string): boolean {
  return isDirectoryPath(value) && Buffer.byteLength(`${value}/agent.sock`) <= SOCKET_PATH_BYTES;
}
