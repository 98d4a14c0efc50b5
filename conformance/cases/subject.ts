// SPDX-License-Identifier: Apache-2.0
//
// The plugin under test, with a node and pods to use it on. It is only ever what a runtime sees: an executable, a
// configuration entry, environment and stdin in, exit status, stdout and stderr out, plus what the kernel shows.

import { rmSync, writeFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { type ExecOptions, exec, type Namespace, type Outcome, removeNetns, Testbed, until } from '../netns.ts';
import { encode, isObject, type JsonObject, older } from '../runtime.ts';

export const VERSIONS = ['0.3.1', '0.4.0', '1.0.0', '1.1.0'] as const;
export type Version = (typeof VERSIONS)[number];

/** The plugin broke the rule. */
export class Violation extends Error {}

/** The rule has nothing to say about this plugin; the reason is printed. */
export class NotApplicable extends Error {}

export interface SubjectOptions {
  /** Path of the executable. */
  plugin: string;
  /** Its entry of `plugins`; strings in it may hold ${DIR} and ${BPFFS}, a directory and a bpffs mount of the run. */
  entry: JsonObject;
  /** Capability arguments the runtime has, e.g. portMappings. */
  capabilityArgs?: JsonObject;
  /** Keys that make the entry invalid; without them the rules about that do not apply. */
  badKeys?: JsonObject;
  /** The plugin promises not to change the Result. */
  passThrough?: boolean;
  /** Only at these versions, of those that the plugin supports. Default: all. */
  versions?: readonly Version[];
  /** Added to the runtime's environment. */
  environment?: Record<string, string>;
  /** Keys of kernel state that packets change while a pod lives (counters). After DEL they count. */
  liveState?: RegExp;
}

export interface CallOptions {
  /** Environment of the call; undefined unsets. */
  env?: Record<string, string | undefined>;
  /** The configuration, or raw text. */
  stdin?: JsonObject | string;
  /** Milliseconds. */
  timeout?: number;
  /** Runs the plugin by `sh -c SCRIPT PLUGIN` instead; $0 is the plugin. */
  shell?: string;
  cwd?: string;
}

/** A pod: a network namespace with eth0, whose peer is on the node. */
export class Pod {
  readonly id: string;
  readonly namespace: Namespace;
  readonly ifname = 'eth0';
  readonly hostIfname: string;
  readonly hostMac: string;
  readonly mac: string;
  readonly addresses: readonly [v4: string, v6: string];
  readonly gateways: readonly [v4: string, v6: string];
  /** ADD ran and no DEL succeeded since: version of the ADD. */
  attached: Version | undefined;

  constructor(subject: Subject, number: number) {
    const { testbed, node } = subject;
    this.id = `${testbed.id.replaceAll('.', '-')}-${number}`;
    this.hostIfname = `veth${number}`;
    const octets = `${number >> 8}.${number & 255}`;
    this.addresses = [`10.88.${octets}/16`, `fd00:88::${number.toString(16)}/64`];
    this.gateways = ['10.88.255.254', 'fd00:88::ffff'];
    this.mac = macOf(2, number);
    this.hostMac = macOf(6, number);
    this.namespace = testbed.namespace(`pod${number}`);
    testbed.veth(
      { namespace: node, ifname: this.hostIfname, mac: this.hostMac },
      {
        namespace: this.namespace,
        ifname: this.ifname,
        mac: this.mac,
        addresses: this.addresses,
        gateways: this.gateways,
      },
    );
  }

  /** The Result of a primary plugin that made this pod. */
  result(version: string): JsonObject {
    const old = older(version, '1.0.0');
    return {
      cniVersion: version,
      interfaces: [
        { name: this.hostIfname, mac: this.hostMac },
        { name: this.ifname, mac: this.mac, sandbox: this.namespace.path },
      ],
      ips: this.addresses.map((address, index) => ({
        ...(old && { version: index === 0 ? '4' : '6' }),
        interface: 1,
        address,
        gateway: this.gateways[index] as string,
      })),
      routes: [{ dst: '0.0.0.0/0' }, { dst: '::/0' }],
      dns: { nameservers: ['10.88.255.53'], search: ['cluster.test'] },
    };
  }

  /** Ends the pod: the namespace's name goes and, soon after, its interfaces. */
  async vanish(node: Namespace): Promise<void> {
    removeNetns(this.namespace);
    await until(`${this.hostIfname} is gone`, () => !node.links().includes(this.hostIfname));
  }

  /** The pod's netns path becomes a plain file, as a crashed runtime may leave it. */
  async becomeFile(node: Namespace): Promise<void> {
    await this.vanish(node);
    writeFileSync(this.namespace.path, '');
  }
}

function macOf(first: number, number: number): string {
  const bytes = [first, 0, 0x5e, 0, number >> 8, number & 255];
  return bytes.map((byte) => byte.toString(16).padStart(2, '0')).join(':');
}

export class Subject {
  readonly testbed: Testbed;
  readonly node: Namespace;
  readonly options: SubjectOptions;
  readonly network: string;
  /** Versions of ours that the plugin advertises. */
  supported: Version[] = [];
  entry: JsonObject;
  #bpffs: string | undefined;
  #pods: Pod[] = [];
  #made = 0;
  #idle: Pod | undefined;
  #stateful: boolean | undefined;

  constructor(options: SubjectOptions) {
    this.options = options;
    this.testbed = Testbed.open();
    try {
      this.node = this.testbed.namespace('node');
      this.testbed.bridge(this.node, 'uplink', ['10.87.0.1/24', 'fd00:87::1/64']);
      this.network = `net-${this.testbed.id.replaceAll('.', '-')}`;
      this.entry = this.#render();
    } catch (error) {
      this.testbed.close();
      throw error;
    }
  }

  get name(): string {
    return basename(this.options.plugin);
  }

  get newest(): Version {
    const version = this.supported.at(-1);
    if (version === undefined) throw new NotApplicable('no version of ours is supported (see A8.1)');
    return version;
  }

  close(): void {
    this.testbed.close();
  }

  /** From now on a configuration with a new directory and bpffs: as on a node where the plugin never ran. */
  renew(): void {
    this.entry = this.#render();
    this.#stateful = undefined;
  }

  #render(): JsonObject {
    const number = ++this.#made;
    let text = JSON.stringify(this.options.entry);
    if (text.includes(`\${DIR}`)) text = text.replaceAll(`\${DIR}`, this.testbed.directory(`dir${number}`));
    if (text.includes(`\${BPFFS}`)) {
      this.#bpffs = this.testbed.bpffs(`bpffs${number}`);
      text = text.replaceAll(`\${BPFFS}`, this.#bpffs);
    }
    return JSON.parse(text) as JsonObject;
  }

  /** A new pod, ended (with DEL if it needs it) when the rule is over. */
  pod(): Pod {
    const pod = new Pod(this, ++this.#made);
    this.#pods.push(pod);
    return pod;
  }

  /** A pod for calls that must fail before anything happens to it; shared between rules. */
  idle(): Pod {
    this.#idle ??= new Pod(this, ++this.#made);
    return this.#idle;
  }

  /** After each rule: DEL for what is still attached, then the pods' end. */
  async tidy(): Promise<void> {
    const pods = this.#idle?.attached ? [...this.#pods, this.#idle] : this.#pods;
    this.#pods = [];
    if (this.#idle?.attached) this.#idle = undefined;
    for (const pod of pods) {
      if (pod.attached) await this.call('DEL', pod, pod.attached);
    }
    // Not left to the end of the namespaces, which the kernel takes its time for: the next rule compares states.
    await this.node.exec(['ip', '-force', '-batch', '-'], {
      input: pods.map((pod) => `link del ${pod.hostIfname}\n`).join(''),
    });
    const links = this.node.links();
    const left = pods.filter((pod) => links.includes(pod.hostIfname)).map((pod) => pod.hostIfname);
    if (left.length > 0) throw new Error(`not deleted: ${left.join(', ')}`);
    for (const pod of pods) {
      removeNetns(pod.namespace);
      rmSync(pod.namespace.path, { force: true });
    }
  }

  /** The configuration a runtime hands to the plugin. */
  config(version: string, more: JsonObject = {}): JsonObject {
    const capabilities = this.entry.capabilities;
    const given = Object.entries(this.options.capabilityArgs ?? {}).filter(
      ([key]) => isObject(capabilities) && capabilities[key] === true,
    );
    return {
      ...this.entry,
      type: this.name,
      name: this.network,
      cniVersion: version,
      ...(given.length > 0 && { runtimeConfig: Object.fromEntries(given) }),
      ...more,
    };
  }

  /** Keys that make the plugin's own configuration invalid. */
  badKeys(): JsonObject {
    if (!this.options.badKeys) throw new NotApplicable('no --bad-keys given');
    return this.options.badKeys;
  }

  /** The environment of a call for a pod, as libcni sets it. */
  env(command: string, pod?: Pod): Record<string, string> {
    return {
      PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin',
      ...this.options.environment,
      CNI_COMMAND: command,
      CNI_CONTAINERID: pod?.id ?? '',
      CNI_NETNS: pod?.namespace.path ?? '',
      CNI_IFNAME: pod?.ifname ?? '',
      CNI_ARGS: pod
        ? `IgnoreUnknown=1;K8S_POD_NAMESPACE=conformance;K8S_POD_NAME=${pod.id};K8S_POD_INFRA_CONTAINER_ID=${pod.id};K8S_POD_UID=${pod.id}`
        : '',
      CNI_PATH: dirname(this.options.plugin),
    };
  }

  /** Runs the plugin. Default stdin: the configuration with prevResult where the verb has one. */
  async call(
    command: string,
    pod: Pod | undefined,
    version: string,
    { env: overrides = {}, stdin, timeout = 30_000, shell, cwd }: CallOptions = {},
  ): Promise<Outcome> {
    const env: Record<string, string> = this.env(command, pod);
    for (const [key, value] of Object.entries(overrides)) {
      if (value === undefined) delete env[key];
      else env[key] = value;
    }
    const prevResult = command === 'ADD' || command === 'CHECK' || (command === 'DEL' && version !== '0.3.1');
    const config = stdin ?? this.config(version, pod && prevResult ? { prevResult: pod.result(version) } : {});
    const options: ExecOptions = {
      env,
      input: typeof config === 'string' ? config : encode(config),
      timeout,
      ...(cwd && { cwd }),
    };
    const argv = shell ? ['sh', '-c', shell, this.options.plugin] : [this.options.plugin];
    const outcome = await exec(this.node.argv(argv), options);
    if (outcome.timedOut) throw new Violation(`${command}: not ended within ${timeout} ms`);
    if (pod && env.CNI_CONTAINERID === pod.id) {
      const supported = this.supported.find((one) => one === version);
      if (command === 'ADD') pod.attached ??= supported ?? this.supported.at(-1);
      if (command === 'DEL' && outcome.status === 0) pod.attached = undefined;
    }
    return outcome;
  }

  /** ADD that must succeed. */
  async add(pod: Pod, version: string = this.newest): Promise<JsonObject> {
    return result(await this.call('ADD', pod, version), `ADD at ${version}`);
  }

  /** DEL that must succeed in silence. */
  async del(pod: Pod, version: string = this.newest, options?: CallOptions): Promise<void> {
    silent(await this.call('DEL', pod, version, options), `DEL at ${version}`);
  }

  /** CHECK that must succeed in silence. */
  async check(pod: Pod, version: string = this.newest): Promise<void> {
    silent(await this.call('CHECK', pod, version), `CHECK at ${version}`);
  }

  /** State of the node, the pods given and the private bpffs; without sysctls, which take as long as all the rest. */
  state(...pods: Pod[]): Promise<KernelState> {
    return this.#state(pods, false);
  }

  stateWithSysctls(...pods: Pod[]): Promise<KernelState> {
    return this.#state(pods, true);
  }

  #state(pods: readonly Pod[], sysctls: boolean): Promise<KernelState> {
    const pins = this.#bpffs ? [this.#bpffs] : [];
    return kernelState([this.node, ...pods.map((pod) => pod.namespace)], { sysctls, pins });
  }

  /** The same state, to the letter. */
  same(before: KernelState, after: KernelState, what: string): void {
    this.#compare(differences(before, after), what);
  }

  /** The same state but for what the packets of a pod that lives have changed, and for what is about `except`. */
  sameLive(before: KernelState, after: KernelState, what: string, except?: string): void {
    const lines = differences(before, after, this.options.liveState);
    this.#compare(except ? lines.filter((line) => !new RegExp(`\\b${except}\\b`).test(line)) : lines, what);
  }

  #compare(lines: readonly string[], what: string): void {
    if (lines.length > 0) throw new Violation(`${what}:\n      ${lines.slice(0, 12).join('\n      ')}`);
  }

  /**
   * Whether an ADD changes kernel state at all. Runs one ADD and DEL, after which shared objects (maps, chains that
   * all attachments use) exist: what they are is the plugin's own affair, that their contents return is not.
   */
  async stateful(): Promise<boolean> {
    if (this.#stateful === undefined) {
      const [first, second] = [this.pod(), this.pod()];
      await this.add(first);
      await this.call('DEL', first, this.newest);
      const before = await this.state(second);
      await this.add(second);
      this.#stateful = differences(before, await this.state(second)).length > 0;
      await this.call('DEL', second, this.newest);
    }
    return this.#stateful;
  }

  async needState(): Promise<void> {
    if (!(await this.stateful())) throw new NotApplicable('ADD changes nothing in the kernel');
  }
}

function shown(outcome: Outcome): string {
  const brief = (text: string) => (text.length > 300 ? `${text.slice(0, 300)}...` : text);
  return `exit ${outcome.status ?? outcome.signal}, stdout ${JSON.stringify(brief(outcome.stdout))}, stderr ${JSON.stringify(brief(outcome.stderr))}`;
}

/** Exit 0 and nothing on stdout. */
export function silent(outcome: Outcome, what: string): void {
  if (outcome.status !== 0) throw new Violation(`${what}: wanted success, got ${shown(outcome)}`);
  if (outcome.stdout !== '') throw new Violation(`${what}: wanted an empty stdout, got ${shown(outcome)}`);
}

/** Exit 0 and exactly one JSON object on stdout, which is returned. */
export function result(outcome: Outcome, what: string): JsonObject {
  if (outcome.status !== 0) throw new Violation(`${what}: wanted success, got ${shown(outcome)}`);
  return document(outcome, what);
}

function document(outcome: Outcome, what: string): JsonObject {
  try {
    const value: unknown = JSON.parse(outcome.stdout);
    if (isObject(value)) return value;
  } catch {
    // Reported below with the text.
  }
  throw new Violation(`${what}: wanted one JSON object on stdout, got ${shown(outcome)}`);
}

export interface CniFailure {
  code: number;
  msg: string;
  details: string;
  cniVersion: unknown;
}

/** Non-zero exit and exactly one error document on stdout, which is returned. `codes`: any of these if given. */
export function failed(outcome: Outcome, what: string, codes?: readonly number[]): CniFailure {
  if (outcome.status === 0) throw new Violation(`${what}: wanted an error, got ${shown(outcome)}`);
  if (outcome.status === null) throw new Violation(`${what}: wanted an error, died of a signal: ${shown(outcome)}`);
  const { code, msg, details = '', cniVersion } = document(outcome, what);
  if (typeof code !== 'number' || typeof msg !== 'string' || typeof details !== 'string') {
    throw new Violation(`${what}: code is to be a number, msg and details strings, got ${shown(outcome)}`);
  }
  if (codes && !codes.includes(code)) {
    throw new Violation(`${what}: wanted code ${codes.join(' or ')}, got ${code} ${JSON.stringify(msg)}`);
  }
  return { code, msg, details, cniVersion };
}

/** As failed(), and the text names `words`. */
export function failedNaming(outcome: Outcome, what: string, codes: readonly number[], words: readonly string[]): void {
  const { msg } = failed(outcome, what, codes);
  const missing = words.filter((word) => !msg.includes(word));
  if (missing.length > 0)
    throw new Violation(`${what}: msg is to name ${missing.join(', ')}, got ${JSON.stringify(msg)}`);
}
