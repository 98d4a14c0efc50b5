// SPDX-License-Identifier: Apache-2.0
//
// A runtime's side of CNI, by the letter of libcni 1.3 (api.go, pkg/invoke, pkg/types): what it injects into each
// plugin's configuration, the environment it sets, the order of plugins, what it caches and when, how it decodes and
// re-encodes Results between plugins (unknown keys are lost there), and what it makes of a failing plugin's output.
//
// It is deliberately no better than libcni: `capabilities` is not stripped, GC runs DEL for cached attachments first,
// DEL stops at the first failing plugin, environment variables that do not apply are sent empty rather than unset.

import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { join } from 'node:path';
import { type ExecOptions, exec, type Namespace, type Outcome } from './netns.ts';

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
export type JsonObject = { [key: string]: Json };

/** One entry of `plugins`. */
export type PluginConf = JsonObject & { type: string };

/** A conflist. */
export interface NetworkList {
  name: string;
  cniVersion: string;
  disableCheck?: boolean;
  disableGC?: boolean;
  plugins: PluginConf[];
}

/** libcni's RuntimeConf: one attachment of a container to a network. */
export interface RuntimeConf {
  containerId: string;
  /** Path of the network namespace; '' when the runtime no longer has one. */
  netns: string;
  ifname: string;
  /** CNI_ARGS in order. */
  args?: readonly (readonly [string, string])[];
  capabilityArgs?: JsonObject;
}

export interface GCAttachment {
  containerID: string;
  ifname: string;
}

/** One run of a plugin, as the runtime saw it. */
export interface Call {
  type: string;
  command: string;
  env: Record<string, string>;
  stdin: string;
  outcome: Outcome;
}

/** A plugin failed, or printed what libcni cannot decode. `code` is 0 when libcni made the message up. */
export class PluginError extends Error {
  readonly code: number;
  readonly details: string;
  readonly type: string;
  readonly call: Call;

  constructor(call: Call, code: number, msg: string, details = '') {
    super(`${call.type} ${call.command}: ${msg}${details === '' ? '' : `; ${details}`} (code ${code})`);
    this.code = code;
    this.details = details;
    this.type = call.type;
    this.call = call;
  }
}

export interface RuntimeOptions {
  /** CNI_PATH: directories searched for plugins, in order. */
  path: readonly string[];
  /** Where results are cached; libcni's default is /var/lib/cni. */
  cacheDir: string;
  /** Network namespace in which plugins run. */
  node?: Namespace;
  /** The runtime's own environment, which plugins inherit. Default: PATH only. */
  environment?: Record<string, string>;
  /** Milliseconds for each plugin. */
  timeout?: number;
}

const CACHE_KIND = 'cniCacheV1';

export class Runtime {
  /** Every plugin run so far, in order of their end. */
  readonly calls: Call[] = [];
  readonly options: RuntimeOptions;

  constructor(options: RuntimeOptions) {
    this.options = options;
  }

  /** AddNetworkList: runs the chain, caches and returns the last plugin's Result. On failure nothing is cached. */
  async add(list: NetworkList, rt: RuntimeConf): Promise<JsonObject> {
    let result: JsonObject | undefined;
    for (const plugin of list.plugins) {
      const call = await this.#call('ADD', plugin, buildOneConfig(list, plugin, result, rt), rt);
      result = decodeOutput(call, list.cniVersion);
    }
    const cached = {
      kind: CACHE_KIND,
      containerId: rt.containerId,
      config: Buffer.from(encode(list as unknown as JsonObject)).toString('base64'),
      ifName: rt.ifname,
      networkName: list.name,
      netns: rt.netns,
      cniArgs: rt.args ?? [],
      capabilityArgs: rt.capabilityArgs ?? {},
      result: result ?? {},
    };
    mkdirSync(join(this.options.cacheDir, 'results'), { recursive: true, mode: 0o700 });
    writeFileSync(this.cacheFile(list.name, rt), JSON.stringify(cached), { mode: 0o600 });
    return result ?? {};
  }

  /** CheckNetworkList; refused below 0.4.0. With no cached result, prevResult is absent. */
  async check(list: NetworkList, rt: RuntimeConf): Promise<void> {
    if (older(list.cniVersion, '0.4.0')) throw new Error(`configuration version ${list.cniVersion} has no CHECK`);
    if (list.disableCheck) return;
    const cached = this.#cachedResult(list, rt);
    for (const plugin of list.plugins) {
      await this.#call('CHECK', plugin, buildOneConfig(list, plugin, cached, rt), rt);
    }
  }

  /** DelNetworkList: last plugin first, stops at a failure; prevResult only from 0.4.0 on and if it was cached. */
  async del(list: NetworkList, rt: RuntimeConf): Promise<void> {
    let cached: JsonObject | undefined;
    if (!older(list.cniVersion, '0.4.0')) {
      try {
        cached = this.#cachedResult(list, rt);
      } catch {
        this.#forget(list.name, rt);
      }
    }
    for (const plugin of list.plugins.toReversed()) {
      await this.#call('DEL', plugin, buildOneConfig(list, plugin, cached, rt), rt);
    }
    this.#forget(list.name, rt);
  }

  /**
   * GCNetworkList in its four forms: a list, `[]`, `null` (GCArgs{}: both keys null) and `undefined` (no GCArgs, which
   * is what `cnitool gc` does: keys absent). DELs cached attachments that are not valid, then, from 1.1.0 on, runs GC
   * on every plugin; collects errors.
   */
  async gc(list: NetworkList, valid: readonly GCAttachment[] | null | undefined): Promise<void> {
    if (list.disableGC) return;
    const errors: unknown[] = [];
    for (const stale of this.cachedAttachments(list.name)) {
      if (valid?.some((one) => one.containerID === stale.containerId && one.ifname === stale.ifname)) continue;
      await this.del(list, stale).catch((error: unknown) => errors.push(error));
    }
    if (!older(list.cniVersion, '1.1.0')) {
      for (const plugin of list.plugins) {
        await this.#call('GC', plugin, gcConfig(list, plugin, valid)).catch((error: unknown) => errors.push(error));
      }
    }
    if (errors.length > 0) throw new AggregateError(errors, `gc ${list.name}: ${errors.join('; ')}`);
  }

  /** GetStatusNetworkList: nothing below 1.1.0; stops at the first plugin that is not ready. */
  async status(list: NetworkList): Promise<void> {
    if (older(list.cniVersion, '1.1.0')) return;
    for (const plugin of list.plugins) {
      await this.#call('STATUS', plugin, { ...plugin, name: list.name, cniVersion: list.cniVersion });
    }
  }

  /** GetVersionInfo: the versions a plugin says it supports. */
  async versions(type: string): Promise<string[]> {
    const dummies = { containerId: '', netns: 'dummy', ifname: 'dummy' };
    const call = await this.#call('VERSION', { type }, { cniVersion: '1.1.0' }, dummies, 'dummy');
    const reply = parseObject(call, call.outcome.stdout);
    const versions = reply.supportedVersions;
    if (typeof reply.cniVersion !== 'string' || reply.cniVersion === '') {
      throw new PluginError(call, 0, 'decoding version info: missing field cniVersion');
    }
    if (!Array.isArray(versions) || !versions.every((one) => typeof one === 'string')) {
      throw new PluginError(call, 0, 'decoding version info: supportedVersions is not a list of strings');
    }
    // "0.2.0" alone is assumed where the list is empty.
    return versions.length === 0 ? ['0.2.0'] : versions;
  }

  /** Attachments of a network that are in the cache. */
  cachedAttachments(network: string): RuntimeConf[] {
    const directory = join(this.options.cacheDir, 'results');
    let names: string[];
    try {
      names = readdirSync(directory).sort();
    } catch {
      return [];
    }
    return names.flatMap((name) => {
      const info = JSON.parse(readFileSync(join(directory, name), 'utf8')) as JsonObject;
      if (info.kind !== CACHE_KIND || info.networkName !== network) return [];
      return [
        {
          containerId: String(info.containerId),
          netns: String(info.netns ?? ''),
          ifname: String(info.ifName),
          args: info.cniArgs as [string, string][],
          capabilityArgs: info.capabilityArgs as JsonObject,
        },
      ];
    });
  }

  cacheFile(network: string, rt: RuntimeConf): string {
    return join(this.options.cacheDir, 'results', `${network}-${rt.containerId}-${rt.ifname}`);
  }

  /** The cached Result, converted to the list's version; undefined when there is none. */
  #cachedResult(list: NetworkList, rt: RuntimeConf): JsonObject | undefined {
    let text: string;
    try {
      text = readFileSync(this.cacheFile(list.name, rt), 'utf8');
    } catch {
      return undefined;
    }
    const info = JSON.parse(text) as { result: JsonObject };
    return convertResult(decodeResult(info.result), list.cniVersion);
  }

  #forget(network: string, rt: RuntimeConf): void {
    rmSync(this.cacheFile(network, rt), { force: true });
  }

  async #call(
    command: string,
    plugin: PluginConf,
    config: JsonObject,
    rt: RuntimeConf = { containerId: '', netns: '', ifname: '' },
    path = this.options.path.join(':'),
  ): Promise<Call> {
    const program = this.#find(plugin.type);
    const env = {
      ...(this.options.environment ?? { PATH: process.env.PATH ?? '' }),
      CNI_COMMAND: command,
      CNI_CONTAINERID: rt.containerId,
      CNI_NETNS: rt.netns,
      CNI_ARGS: (rt.args ?? []).map(([key, value]) => `${key}=${value}`).join(';'),
      CNI_IFNAME: rt.ifname,
      CNI_PATH: path,
    };
    const stdin = encode(config);
    const options: ExecOptions = { env, input: stdin, timeout: this.options.timeout ?? 20_000 };
    const argv = this.options.node ? this.options.node.argv([program]) : [program];
    const call: Call = { type: plugin.type, command, env, stdin, outcome: await exec(argv, options) };
    this.calls.push(call);
    if (call.outcome.status !== 0) throw pluginFailure(call);
    return call;
  }

  #find(type: string): string {
    if (type === '' || type.includes('/')) throw new Error(`invalid plugin name: ${type}`);
    for (const directory of this.options.path) {
      const candidate = join(directory, type);
      if (statSync(candidate, { throwIfNoEntry: false })?.isFile()) return candidate;
    }
    throw new Error(`failed to find plugin "${type}" in path [${this.options.path.join(' ')}]`);
  }
}

/** pkg/invoke/raw_exec.go, pluginErr: stderr is looked at only when stdout is empty. */
function pluginFailure(call: Call): PluginError {
  const { stdout, stderr, status, signal, timedOut } = call.outcome;
  if (stdout === '') {
    const end = timedOut ? 'timed out' : signal ? `signal: ${signal}` : `exit status ${status}`;
    const msg = stderr === '' ? `netplugin failed with no error message: ${end}` : `netplugin failed: ${stderr}`;
    return new PluginError(call, 0, msg);
  }
  let error: Json;
  try {
    error = JSON.parse(stdout) as Json;
    if (!isObject(error)) throw new SyntaxError('not an object');
    const { code = 0, msg = '', details = '' } = error;
    if (typeof code !== 'number' || !Number.isInteger(code) || code < 0) throw new SyntaxError(`code is ${code}`);
    if (typeof msg !== 'string' || typeof details !== 'string') throw new SyntaxError('msg or details is no string');
    return new PluginError(call, code, msg, details);
  } catch (cause) {
    return new PluginError(call, 0, `netplugin failed but error parsing its diagnostic message "${stdout}": ${cause}`);
  }
}

/** buildOneConfig and injectRuntimeConfig. `capabilities` stays, whatever SPEC says. */
function buildOneConfig(
  list: NetworkList,
  plugin: PluginConf,
  prevResult: JsonObject | undefined,
  rt: RuntimeConf,
): JsonObject {
  const config: JsonObject = { ...plugin, name: list.name, cniVersion: list.cniVersion };
  if (prevResult !== undefined) config.prevResult = prevResult;
  const wanted = Object.entries(isObject(plugin.capabilities) ? plugin.capabilities : {})
    .filter(([capability, supported]) => supported === true && rt.capabilityArgs?.[capability] !== undefined)
    .map(([capability]): [string, Json] => [capability, rt.capabilityArgs?.[capability] as Json]);
  if (wanted.length > 0) config.runtimeConfig = Object.fromEntries(wanted);
  return config;
}

/** The configuration of a GC call: both names of the key, or neither. */
export function gcConfig(
  list: Pick<NetworkList, 'name' | 'cniVersion'>,
  plugin: PluginConf,
  valid: readonly GCAttachment[] | null | undefined,
): JsonObject {
  const config: JsonObject = { ...plugin, name: list.name, cniVersion: list.cniVersion };
  if (valid !== undefined) {
    config['cni.dev/valid-attachments'] = valid as unknown as Json;
    config['cni.dev/attachments'] = valid as unknown as Json;
  }
  return config;
}

/** encoding/json: keys of maps sorted, and `<`, `>`, `&` and two line separators as escapes. */
export function encode(value: Json): string {
  const text = JSON.stringify(value, (_key, one: Json) => (isObject(one) ? sorted(one) : one));
  return text.replace(/[<>&\u2028\u2029]/g, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, '0')}`);
}

function sorted(object: JsonObject): JsonObject {
  return Object.fromEntries(Object.entries(object).sort(([a], [b]) => (a < b ? -1 : 1)));
}

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** Whether version `a` comes before `b`. */
export function older(a: string, b: string): boolean {
  const [x, y] = [a, b].map((version) => version.split('.').map(Number));
  for (let i = 0; i < 3; i++) {
    if ((x?.[i] ?? 0) !== (y?.[i] ?? 0)) return (x?.[i] ?? 0) < (y?.[i] ?? 0);
  }
  return false;
}

const FAMILY_0 = ['0.3.0', '0.3.1', '0.4.0'];
const FAMILY_1 = ['1.0.0', '1.1.0'];

function parseObject(call: Call, text: string): JsonObject {
  try {
    const value = JSON.parse(text) as Json;
    if (isObject(value)) return value;
  } catch {
    // Reported below, with the text.
  }
  throw new PluginError(call, 0, `output is not one JSON object: ${JSON.stringify(text)}`);
}

/** ExecPluginWithResult: fixupResultVersion, then the decoder of the Result's own version. */
function decodeOutput(call: Call, configVersion: string): JsonObject {
  const raw = parseObject(call, call.outcome.stdout);
  if (typeof raw.cniVersion !== 'string' || raw.cniVersion === '') raw.cniVersion = configVersion;
  try {
    return decodeResult(raw);
  } catch (cause) {
    throw new PluginError(call, 0, `${cause}`);
  }
}

/**
 * What is left of a Result after Go's types have read and written it: keys it does not know and empty values go.
 * Throws where Go does: wrong types, addresses that are not CIDR, gateways that are not IP addresses, unknown versions.
 */
export function decodeResult(raw: JsonObject): JsonObject {
  const version = raw.cniVersion;
  if (typeof version !== 'string' || ![...FAMILY_0, ...FAMILY_1].includes(version)) {
    throw new Error(`unsupported CNI result version ${JSON.stringify(version)}`);
  }
  const old = FAMILY_0.includes(version);
  const decoded = compact({
    cniVersion: version,
    interfaces: rows(raw.interfaces, 'interfaces').map((one) => ({
      name: text(one.name, 'name') ?? '',
      ...compact({ mac: text(one.mac, 'mac'), sandbox: text(one.sandbox, 'sandbox') }),
      ...(!old &&
        compact({
          mtu: integer(one.mtu, 'mtu'),
          socketPath: text(one.socketPath, 'socketPath'),
          pciID: text(one.pciID, 'pciID'),
        })),
    })),
    ips: rows(raw.ips, 'ips').map((one) => ({
      ...(old && { version: text(one.version, 'version') ?? '' }),
      ...(one.interface != null && { interface: integer(one.interface, 'interface') as number }),
      address: cidr(one.address, 'address'),
      ...compact({ gateway: address(one.gateway, 'gateway') }),
    })),
    routes: rows(raw.routes, 'routes').map((one) => ({
      dst: cidr(one.dst, 'dst'),
      ...compact({
        gw: address(one.gw, 'gw'),
        mtu: integer(one.mtu, 'mtu'),
        advmss: integer(one.advmss, 'advmss'),
        priority: integer(one.priority, 'priority'),
      }),
      // Pointers in Go: zero is kept.
      ...(one.table != null && { table: integer(one.table, 'table') as number }),
      ...(one.scope != null && { scope: integer(one.scope, 'scope') as number }),
    })),
    dns: dns(raw.dns),
  });
  // Only the types of 1.x leave out a DNS that is empty.
  return old ? { dns: {}, ...decoded } : decoded;
}

/** Result.GetAsVersion. Converting down drops what the older family has no place for. */
export function convertResult(result: JsonObject, version: string): JsonObject {
  const wasOld = FAMILY_0.includes(String(result.cniVersion));
  const old = FAMILY_0.includes(version);
  if (wasOld === old) return { ...result, cniVersion: version };
  const ips = rows(result.ips, 'ips').map(({ version: _version, ...ip }) =>
    old ? { version: String(ip.address).includes(':') ? '6' : '4', ...ip } : ip,
  );
  const interfaces = rows(result.interfaces, 'interfaces').map(({ name = '', mac, sandbox }) => ({
    name,
    ...compact({ mac, sandbox }),
  }));
  const { dns: given = {}, ...rest } = result;
  return {
    ...rest,
    cniVersion: version,
    ...compact({ ips, interfaces }),
    ...(old ? { dns: given } : compact({ dns: given })),
  };
}

/** Without keys whose value Go's `omitempty` leaves out. */
function compact(object: { [key: string]: Json | undefined }): JsonObject {
  const kept = Object.entries(object).filter(([, value]) => {
    if (value === undefined || value === null || value === '' || value === 0) return false;
    return Array.isArray(value) ? value.length > 0 : !isObject(value) || Object.keys(value).length > 0;
  });
  return Object.fromEntries(kept) as JsonObject;
}

function rows(value: Json | undefined, key: string): JsonObject[] {
  if (value === undefined || value === null) return [];
  if (!Array.isArray(value) || !value.every(isObject)) throw new Error(`${key} is not a list of objects`);
  return value;
}

function text(value: Json | undefined, key: string): string | undefined {
  if (value === undefined || value === null) return undefined;
  if (typeof value !== 'string') throw new Error(`${key} is not a string: ${JSON.stringify(value)}`);
  return value;
}

function integer(value: Json | undefined, key: string): number | undefined {
  if (value === undefined || value === null) return undefined;
  if (!Number.isSafeInteger(value)) throw new Error(`${key} is not an integer: ${JSON.stringify(value)}`);
  return value as number;
}

function address(value: Json | undefined, key: string): string | undefined {
  const one = text(value, key);
  if (one !== undefined && one !== '' && !isIP(one)) throw new Error(`${key}: invalid IP address: ${one}`);
  return one;
}

function cidr(value: Json | undefined, key: string): string {
  const one = text(value, key) ?? '';
  const [ip = '', length = '', ...rest] = one.split('/');
  const family = isIP(ip);
  const valid =
    family !== 0 && rest.length === 0 && /^\d+$/.test(length) && Number(length) <= (family === 4 ? 32 : 128);
  if (!valid) throw new Error(`${key}: invalid CIDR address: ${one}`);
  return one;
}

function dns(value: Json | undefined): JsonObject {
  if (value === undefined || value === null) return {};
  if (!isObject(value)) throw new Error('dns is not an object');
  const { nameservers, domain, search, options } = value;
  return compact({ nameservers, domain: text(domain, 'domain'), search, options });
}
