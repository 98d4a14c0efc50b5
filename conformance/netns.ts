// SPDX-License-Identifier: Apache-2.0
//
// Throw-away kernel objects for tests: network namespaces, veth pairs, bridges, bpffs mounts, directories.
//
// A "node" in a test is one such namespace; the plugin under test is started in it with nsenter(1), so that everything
// it does on the host's side happens there. Never with `ip netns exec`: that remounts /sys and hides bpffs.
//
// Clean-up is registered when an object is made and runs last thing first on close(), when the process exits, and on
// SIGINT, SIGTERM and SIGHUP. It is synchronous for that reason. What a SIGKILL left is swept by the next open().

import { type ChildProcess, type SpawnSyncReturns, spawn, spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { existsSync, lstatSync, mkdirSync, mkdtempSync, readdirSync, rmdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { execa, type Options } from 'execa';

/** How many times as long as usual to wait before giving up: more than 1 on a machine that is emulated. */
export const patience = Number(process.env.AMBIENT_REDIRECT_PATIENCE ?? '1');

/** What a finished process left behind. `status` is null when a signal ended it. */
export interface Outcome {
  status: number | null;
  signal: string | null;
  stdout: string;
  stderr: string;
  /** Wall-clock time in milliseconds. */
  ms: number;
  /** The time limit passed and the process was killed. */
  timedOut: boolean;
}

export interface ExecOptions {
  /** The whole environment; default: this process's. */
  env?: Record<string, string>;
  input?: string | Uint8Array;
  /** Instead of `input`: a file to open as stdin. */
  inputFile?: string;
  cwd?: string;
  /** Milliseconds until SIGKILL, default 20,000; times patience. */
  timeout?: number;
}

/** Runs a command to its end and never throws for what the command did. */
export async function exec(argv: readonly string[], options: ExecOptions = {}): Promise<Outcome> {
  const [file, ...rest] = argv;
  if (file === undefined) throw new TypeError('exec: empty command');
  const execaOptions: Options = {
    reject: false,
    stripFinalNewline: false,
    timeout: (options.timeout ?? 20_000) * patience,
    killSignal: 'SIGKILL',
    extendEnv: options.env === undefined,
    ...(options.env && { env: options.env }),
    ...(options.cwd && { cwd: options.cwd }),
    ...(options.inputFile ? { inputFile: options.inputFile } : { input: options.input ?? '' }),
  };
  const result = await execa(file, rest, execaOptions);
  if (result.exitCode === undefined && result.signal === undefined && !result.timedOut) {
    throw new Error(`${file}: could not be started: ${result.message}`);
  }
  return {
    status: result.exitCode ?? null,
    signal: result.signal ?? null,
    stdout: String(result.stdout ?? ''),
    stderr: String(result.stderr ?? ''),
    ms: result.durationMs,
    timedOut: result.timedOut,
  };
}

/** Runs a command synchronously and returns its stdout; throws with its stderr if it fails. */
export function must(argv: readonly string[], input?: string): string {
  const result = sync(argv, input);
  if (result.status !== 0) {
    throw new Error(`${argv.join(' ')}: ${failure(result)}`);
  }
  return result.stdout;
}

function sync(argv: readonly string[], input?: string): SpawnSyncReturns<string> {
  const [file = '', ...rest] = argv;
  return spawnSync(file, rest, {
    encoding: 'utf8',
    maxBuffer: 64 << 20,
    timeout: 30_000 * patience,
    ...(input !== undefined && { input }),
  });
}

function failure(result: SpawnSyncReturns<string>): string {
  return result.error?.message ?? `exit ${result.status ?? result.signal}: ${result.stderr.trim()}`;
}

/** Polls `condition` every 10 ms until it is true; throws after `limit` milliseconds, times patience. */
export async function until(what: string, condition: () => boolean | Promise<boolean>, limit = 5_000): Promise<void> {
  const end = performance.now() + limit * patience;
  while (!(await condition())) {
    if (performance.now() > end) throw new Error(`${what}: not true within ${limit * patience} ms`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** A network namespace made with `ip netns add`. */
export class Namespace {
  readonly name: string;

  constructor(name: string) {
    this.name = name;
  }

  get path(): string {
    return `/run/netns/${this.name}`;
  }

  /** The command line that runs `argv` with this network namespace and everything else unchanged (the pid too). */
  argv(argv: readonly string[]): string[] {
    return ['nsenter', `--net=${this.path}`, '--', ...argv];
  }

  /** Runs a command in the namespace, synchronously; throws if it fails; returns its stdout. */
  run(argv: readonly string[], input?: string): string {
    return must(this.argv(argv), input);
  }

  /** Runs a command in the namespace and reports how it ended. */
  exec(argv: readonly string[], options?: ExecOptions): Promise<Outcome> {
    return exec(this.argv(argv), options);
  }

  /** `ip -n NAME ...`; throws if it fails. */
  ip(...args: string[]): string {
    return must(['ip', '-n', this.name, ...args]);
  }

  /** Interface names; a veth whose peer is gone does not count as it is gone too. */
  links(): string[] {
    const links: unknown = JSON.parse(this.ip('-j', 'link', 'show'));
    return (links as { ifname: string }[]).map((link) => link.ifname);
  }

  mac(ifname: string): string {
    const links: unknown = JSON.parse(this.ip('-j', 'link', 'show', 'dev', ifname));
    const mac = (links as { address?: string }[])[0]?.address;
    if (mac === undefined) throw new Error(`${this.name}: ${ifname} has no MAC address`);
    return mac;
  }
}

/** One end of a veth pair. Addresses in CIDR form; IPv6 ones are usable at once (nodad). */
export interface VethEnd {
  namespace: Namespace;
  ifname: string;
  addresses?: readonly string[];
  mac?: string;
  mtu?: number;
  /** Bridge in the same namespace that this end joins. */
  bridge?: string;
  /** Default gateways of either family, reached on-link through this end. */
  gateways?: readonly string[];
}

/** A process started by Testbed.start(). */
export class Running {
  /** stdout and stderr so far, as they came. */
  output = '';
  /** Resolves when the process has ended and its output is complete. */
  readonly ended: Promise<void>;
  readonly #argv: readonly string[];
  readonly #child: ChildProcess;

  constructor(argv: readonly string[], child: ChildProcess) {
    this.#argv = argv;
    this.#child = child;
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.output += text;
      });
    }
    this.ended = new Promise((resolve) => {
      child.once('close', () => resolve());
      child.once('error', (error) => {
        this.output += String(error);
        resolve();
      });
    });
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error(`${this.#argv.join(' ')}: not started: ${this.output}`);
    return this.#child.pid;
  }

  get alive(): boolean {
    return this.#child.pid !== undefined && this.#child.exitCode === null && this.#child.signalCode === null;
  }

  kill(signal: NodeJS.Signals): void {
    if (this.alive) this.#child.kill(signal);
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    this.kill(signal);
    await this.ended;
  }
}

const open = new Set<Testbed>();
const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

function closeAll(): void {
  for (const testbed of [...open]) {
    try {
      testbed.close();
    } catch (error) {
      process.stderr.write(`clean-up: ${error instanceof Error ? error.message : String(error)}\n`);
    }
  }
}

function onSignal(signal: NodeJS.Signals): void {
  closeAll();
  for (const name of signals) process.off(name, onSignal);
  process.kill(process.pid, signal);
}

/**
 * Names begin with a testbed's id (`ar`, the pid in base 36, a dot, six hex digits), so that leavings of a dead process can
 * be told, and are not taken for what somebody called "arm.txt".
 */
const owned = /^ar([0-9a-z]+)\.[0-9a-f]{6}(\.|-|$)/;

function deadOwner(name: string): boolean {
  const pid = owned.exec(name)?.[1];
  return pid !== undefined && !existsSync(`/proc/${Number.parseInt(pid, 36)}`);
}

function list(directory: string): string[] {
  return existsSync(directory) ? readdirSync(directory) : [];
}

function sweep(): void {
  for (const name of list('/run/netns').filter(deadOwner)) sync(['ip', 'netns', 'del', name]);
  for (const name of list(tmpdir()).filter(deadOwner)) removeTree(join(tmpdir(), name));
}

/** Unmounts what is mounted directly below `directory` (our bpffs mounts), then removes it. */
function removeTree(directory: string): void {
  const device = lstatSync(directory).dev;
  for (const name of readdirSync(directory)) {
    const path = join(directory, name);
    if (lstatSync(path).dev !== device) must(['umount', '--lazy', path]);
  }
  rmSync(directory, { recursive: true, force: true });
}

/** Everything one test (or one file of tests) makes. Use `using`, or close() in an afterEach/afterAll. */
export class Testbed {
  /** Prefix of every name, unique to this process and testbed: `ar<pid>.<random>`. */
  readonly id = `ar${process.pid.toString(36)}.${randomBytes(3).toString('hex')}`;
  readonly #undo: (() => void)[] = [];
  #directory: string | undefined;

  static open(): Testbed {
    if (process.getuid?.() !== 0) throw new Error('network namespaces need root');
    if (open.size === 0) {
      sweep();
      process.once('exit', closeAll);
      for (const signal of signals) process.on(signal, onSignal);
    }
    const testbed = new Testbed();
    open.add(testbed);
    return testbed;
  }

  /** Registers an undo step; close() runs them last first. */
  defer(undo: () => void): void {
    if (!open.has(this)) throw new Error(`testbed ${this.id} is closed`);
    this.#undo.push(undo);
  }

  /** A new network namespace, its loopback up. Deleting it elsewhere is fine (a test may play a pod's end). */
  namespace(label: string): Namespace {
    const namespace = new Namespace(`${this.id}.${label}`);
    this.defer(() => {
      if (existsSync(namespace.path)) removeNetns(namespace);
    });
    must(['ip', 'netns', 'add', namespace.name]);
    namespace.ip('link', 'set', 'lo', 'up');
    return namespace;
  }

  /** A new directory, mode 0700, removed with all it holds. */
  directory(label: string): string {
    if (this.#directory === undefined) {
      const made = mkdtempSync(join(tmpdir(), `${this.id}.`));
      this.#directory = made;
      this.defer(() => removeTree(made));
    }
    const path = join(this.#directory, label);
    mkdirSync(path, { mode: 0o700 });
    return path;
  }

  /** A mount of a bpf file system of its own (each mount is its own instance). Returns the mount point. */
  bpffs(label: string): string {
    const path = this.directory(label);
    must(['mount', '-t', 'bpf', '-o', 'mode=0700', 'bpf', path]);
    this.defer(() => {
      must(['umount', '--lazy', path]);
      rmdirSync(path);
    });
    return path;
  }

  /** A veth pair, made directly in the two namespaces (never in the host's), both ends up. */
  veth(a: VethEnd, b: VethEnd): void {
    must(
      ['ip', 'link', 'add', 'name', a.ifname, 'netns', a.namespace.name, ...linkOptions(a), 'type', 'veth'].concat(
        ['peer', 'name', b.ifname, 'netns', b.namespace.name],
        linkOptions(b),
      ),
    );
    configure(a);
    configure(b);
  }

  /** A bridge in a namespace, up. */
  bridge(namespace: Namespace, ifname: string, addresses: readonly string[] = []): void {
    namespace.ip('link', 'add', ifname, 'type', 'bridge');
    configure({ namespace, ifname, addresses });
  }

  /**
   * Starts a process that lives until stop(), close() or the death of this process (SIGKILL in the last two).
   * stdin is empty, its output is collected.
   */
  start(argv: readonly string[], env?: Record<string, string>): Running {
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...argv], {
      stdio: ['ignore', 'pipe', 'pipe'],
      ...(env && { env }),
    });
    const running = new Running(argv, child);
    this.defer(() => running.kill('SIGKILL'));
    return running;
  }

  /** Undoes everything, last first; tries every step, then throws if one failed. Repeating it does nothing. */
  close(): void {
    const errors: unknown[] = [];
    for (let undo = this.#undo.pop(); undo !== undefined; undo = this.#undo.pop()) {
      try {
        undo();
      } catch (error) {
        errors.push(error);
      }
    }
    this.#directory = undefined;
    open.delete(this);
    if (open.size === 0) {
      process.off('exit', closeAll);
      for (const signal of signals) process.off(signal, onSignal);
    }
    if (errors.length > 0) throw new AggregateError(errors, `testbed ${this.id}: ${errors.join('; ')}`);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** `ip netns del`, or a plain file where a test put one in the namespace's place. */
export function removeNetns(namespace: Namespace): void {
  const result = sync(['ip', 'netns', 'del', namespace.name]);
  if (existsSync(namespace.path)) rmSync(namespace.path, { recursive: true, force: true });
  if (existsSync(namespace.path)) throw new Error(`ip netns del ${namespace.name}: ${failure(result)}`);
}

function linkOptions(end: VethEnd): string[] {
  return [...(end.mac ? ['address', end.mac] : []), ...(end.mtu ? ['mtu', String(end.mtu)] : [])];
}

function configure(end: Pick<VethEnd, 'namespace' | 'ifname' | 'addresses' | 'bridge' | 'gateways'>): void {
  const { ifname } = end;
  const batch = [`link set dev ${ifname} up${end.bridge ? ` master ${end.bridge}` : ''}`];
  for (const address of end.addresses ?? []) {
    batch.push(`address add ${address} dev ${ifname}${address.includes(':') ? ' nodad' : ''}`);
  }
  for (const gateway of end.gateways ?? []) {
    const family = gateway.includes(':') ? 'inet6' : 'inet';
    batch.push(`route add default via ${family} ${gateway} dev ${ifname} onlink`);
  }
  must(['ip', '-n', end.namespace.name, '-batch', '-'], `${batch.join('\n')}\n`);
}
