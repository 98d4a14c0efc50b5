// SPDX-License-Identifier: Apache-2.0
// The whole thing in throw-away namespaces: pods get their networks from this file, ADD and DEL are the executable's
// own, called as a container runtime calls them, and the traffic is real. Nothing outside the namespaces is touched.

import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { isSea } from 'node:sea';
import { text } from 'node:stream/consumers';
import { formatTable } from '../cli/table.ts';
import type { Terminal } from '../cli/terminal.ts';
import type { Counter } from '../native.ts';
import { type DemoContract, type Mesh, NAMESPACES, startMesh } from './mesh.ts';
import type { DemoNative } from './native-topology.ts';
import {
  direct,
  HTTP_PORT,
  IN_POD,
  judge,
  PORTS,
  REDIRECTED,
  REQUESTS,
  type Scenario,
  tellingCount,
} from './scenarios.ts';
import {
  type Family,
  hostInterface,
  isAbandoned,
  listDemos,
  livingOwner,
  type PlaceName,
  PODS,
  type PodName,
  pathsOf,
  removeTopology,
  Topology,
  writeOwner,
} from './topology.ts';
import { EchoServer, requestEcho } from './traffic.ts';

export interface DemoOptions {
  contract: DemoContract;
  families: readonly Family[];
  keep: boolean;
}

const CNI_VERSION = '1.1.0';
const NETWORK = 'demo';

interface Row {
  scenario: Scenario;
  family: Family;
  answered: number;
  seen: number;
  sources: readonly string[];
  packets: bigint;
  counted: string;
  /** empty: as it has to be */
  wrong: readonly string[];
}

/** @returns the exit code: 0 if every row is right, 128 and the signal's number if one came */
export async function demo(native: DemoNative, terminal: Terminal, options: DemoOptions): Promise<number> {
  sweep(native);
  const name = `ambient-redirect-demo-${process.pid}`;
  // Synchronous, so that it also runs when the process ends by an uncaught error.
  const remove = () => removeTopology(native, name);
  process.once('exit', remove);
  const signals = catchSignals();
  let kept = false;
  try {
    const run = await Run.start(native, name, options);
    const played = (async () => {
      const right = await run.show(terminal);
      if (options.keep) await run.enrolAll();
      return right ? 0 : 1;
    })();
    // After a signal it fails on what close() took away, and nobody is there any more to hear of it.
    played.catch(() => {});
    const code = await Promise.race([played, signals.first]).finally(() => run.close());
    if (!options.keep || code >= 128) return code;

    await serveDetached(name, options);
    kept = true;
    terminal.out(lookInside(name, options.families));
    return code;
  } finally {
    signals.stop();
    process.off('exit', remove);
    if (!kept) remove();
  }
}

/** `first`: 128 and the number of the first signal that asks this process to end. */
function catchSignals(): { first: Promise<number>; stop(): void } {
  const numbers = { SIGHUP: 1, SIGINT: 2, SIGTERM: 15 } as const;
  const { promise, resolve } = Promise.withResolvers<number>();
  const caught = (signal: NodeJS.Signals) => resolve(128 + numbers[signal as keyof typeof numbers]);
  for (const signal of Object.keys(numbers)) process.on(signal, caught);
  return {
    first: promise,
    stop: () => {
      for (const signal of Object.keys(numbers)) process.off(signal, caught);
    },
  };
}

/** `demo --remove NAME`: whatever is left of that demo, whoever made it. */
export async function removeDemo(native: DemoNative, name: string): Promise<void> {
  const paths = pathsOf(name);
  if (!listDemos().includes(name)) {
    const others = listDemos();
    throw new Error(`no demo ${name} on this machine${others.length > 0 ? `; there is ${others.join(', ')}` : ''}`);
  }
  const owner = livingOwner(paths);
  if (owner !== undefined) {
    process.kill(owner, 'SIGTERM');
    const deadline = performance.now() + 5_000;
    while (livingOwner(paths) !== undefined && performance.now() < deadline) {
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
  removeTopology(native, name);
}

/** The process behind `demo --keep`: servers and proxy of an existing topology until SIGTERM. */
export async function serveDemo(
  native: DemoNative,
  name: string,
  options: Pick<DemoOptions, 'contract' | 'families'>,
): Promise<void> {
  const topology = Topology.open(native, name);
  const servers = await startServers(native, topology, options);
  writeOwner(topology.paths, true);
  process.send?.('serving');
  process.disconnect?.();
  await new Promise<void>((resolve) => process.once('SIGTERM', () => resolve()));
  await servers.close();
  topology.close();
}

/** What is left of demos that were killed. */
function sweep(native: DemoNative): void {
  for (const name of listDemos()) if (isAbandoned(pathsOf(name))) removeTopology(native, name);
}

interface Servers {
  mesh: Mesh;
  echoes: Readonly<Partial<Record<PlaceName, EchoServer>>>;
  close(): Promise<void>;
}

async function startServers(
  native: DemoNative,
  topology: Topology,
  { contract, families }: Pick<DemoOptions, 'contract' | 'families'>,
): Promise<Servers> {
  const address = families.includes(6) ? '::' : '0.0.0.0';
  const { server, outside } = topology.places;
  const opened: { close(): Promise<void> }[] = [];
  const close = async () => {
    for (const each of opened.splice(0)) await each.close();
  };
  try {
    const echoes: Partial<Record<PlaceName, EchoServer>> = {};
    for (const place of [server, outside]) {
      const echo = await EchoServer.start(native, place.netns, address, HTTP_PORT);
      opened.push(echo);
      echoes[place.name] = echo;
    }
    const mesh = await startMesh(native, topology, families, contract, self());
    opened.push(mesh);
    return { mesh, echoes, close };
  } catch (error) {
    await close();
    throw error;
  }
}

class Run {
  readonly #native: DemoNative;
  readonly #topology: Topology;
  readonly #contract: DemoContract;
  readonly #families: readonly Family[];
  readonly #servers: Servers;
  #open = true;
  /** the plugin, while it runs */
  #child: { kill: () => void; ended: Promise<unknown> } | undefined;

  private constructor(native: DemoNative, topology: Topology, options: DemoOptions, servers: Servers) {
    this.#native = native;
    this.#topology = topology;
    this.#contract = options.contract;
    this.#families = options.families;
    this.#servers = servers;
  }

  static async start(native: DemoNative, name: string, options: DemoOptions): Promise<Run> {
    const topology = Topology.create(native, name, options.families);
    return new Run(native, topology, options, await startServers(native, topology, options));
  }

  async close(): Promise<void> {
    if (!this.#open) return;
    this.#open = false;
    this.#child?.kill();
    await this.#child?.ended.catch(() => {});
    await this.#servers.close();
    this.#topology.close();
  }

  async show(terminal: Terminal): Promise<boolean> {
    const inPod = this.#contract === 'in-pod';
    terminal.out(
      `Namespaces: node, client pod, server pod, proxy pod, outside. ${inPod ? 'An agent, and a ztunnel that it hands the pods to. ' : ''}ADD for each pod, then HTTP requests.\n\n`,
    );
    await this.enrolAll();
    const scenarios = inPod ? IN_POD : REDIRECTED;
    const redirected = await this.#play(scenarios);
    terminal.out(report(redirected, terminal));
    terminal.out('\nDEL for each pod, then the same requests.\n\n');
    for (const pod of PODS) await this.#plugin('DEL', pod);
    const afterwards = await this.#play(direct(scenarios));
    terminal.out(report(afterwards, terminal));
    const leftovers = this.#leftovers();
    for (const leftover of leftovers) terminal.out(`left behind by DEL: ${leftover}\n`);
    const wrong = [...redirected, ...afterwards].filter((row) => row.wrong.length > 0).length;
    const total = redirected.length + afterwards.length;
    terminal.out(
      `\n${total - wrong} of ${total} rows right${leftovers.length > 0 ? ', DEL left something behind' : ''}.\n`,
    );
    return wrong === 0 && leftovers.length === 0;
  }

  /** ADD for the proxy and the pods. */
  async enrolAll(): Promise<void> {
    for (const pod of ['proxy', 'client', 'server'] as const) await this.#plugin('ADD', pod);
  }

  async #play(scenarios: readonly Scenario[]): Promise<Row[]> {
    const rows: Row[] = [];
    for (const family of this.#families) {
      for (const scenario of scenarios) rows.push(await this.#row(scenario, family));
    }
    return rows;
  }

  async #row(scenario: Scenario, family: Family): Promise<Row> {
    const from = this.#topology.places[scenario.from];
    const to = this.#topology.places[scenario.to];
    const echo = this.#servers.echoes[scenario.to];
    if (echo === undefined) throw new Error(`no server in ${scenario.to}`);
    const { mesh } = this.#servers;
    mesh.aimAt(scenario.twoLegs ? [to.address[family]] : []);
    mesh.seen.length = 0;
    echo.sources.length = 0;
    const before = this.#counters();

    const failures: string[] = [];
    for (let i = 0; i < REQUESTS; i++) {
      this.#assertOpen();
      try {
        await requestEcho(this.#native, from.netns, to.address[family], HTTP_PORT);
      } catch (error) {
        failures.push(`request ${i + 1}: ${error instanceof Error ? error.message : String(error)}`);
      }
    }

    this.#assertOpen();
    const counted = difference(before, this.#counters());
    const wrong = judge(scenario, {
      from: from.address[family],
      to: to.address[family],
      failures,
      sources: echo.sources,
      seen: mesh.seen,
      counted,
    });
    return {
      scenario,
      family,
      answered: REQUESTS - failures.length,
      seen: mesh.seen.length,
      sources: [...new Set(echo.sources)],
      packets: counted.reduce((sum, { packets }) => sum + packets, 0n),
      counted: tellingCount(counted, scenario),
      wrong,
    };
  }

  /** Descriptors are closed by then, and their numbers may be somebody else's. */
  #assertOpen(): void {
    if (!this.#open) throw new Error('the demo was interrupted');
  }

  #counters(): Counter[] {
    const state = this.#native.openState(this.#topology.paths.stateDir);
    try {
      return this.#native.counters(state);
    } finally {
      this.#native.closeState(state);
    }
  }

  /** What DEL of every pod must have taken away. */
  #leftovers(): string[] {
    const { node, client, server, proxy } = this.#topology.places;
    const inside = this.#contract === 'in-pod' ? [client, server] : [proxy];
    const found: string[] = [];
    const state = this.#native.openState(this.#topology.paths.stateDir);
    try {
      const count = (what: string, entries: readonly unknown[]) => {
        if (entries.length > 0) found.push(`${entries.length} entries in ${what}`);
      };
      count('attachments', this.#native.listAttachments(state));
      count('interfaces', this.#native.listInterfaces(state));
      count('endpoints', this.#native.listEndpoints(state));
      count('proxies', this.#native.getProxies(state).proxies);
    } finally {
      this.#native.closeState(state);
    }
    const hooks = [
      ...PODS.map((pod) => ({ place: node, ifname: hostInterface(pod) })),
      ...inside.map((place) => ({ place, ifname: 'eth0' })),
    ];
    const hasTcx = this.#native.features().tcx === true;
    for (const { place, ifname } of hooks) {
      const link = this.#native.linkByName(place.netns, ifname);
      if (link === null) {
        found.push(`${ifname} in ${place.name} is gone`);
        continue;
      }
      for (const direction of ['ingress', 'egress'] as const) {
        const where = `${direction} of ${ifname} in ${place.name}`;
        if (hasTcx && this.#native.queryTcx(place.netns, link.ifindex, direction).length > 0) {
          found.push(`a TCX program on ${where}`);
        }
        if (this.#native.filters(place.netns, link.ifindex, direction).length > 0) found.push(`a filter on ${where}`);
      }
    }
    // RTPROT_KERNEL is 2: the three rules that every namespace is born with.
    for (const place of inside) {
      for (const family of this.#families) {
        const rules = this.#native.rules(place.netns, family).filter(({ protocol }) => protocol !== 2);
        if (rules.length > 0) found.push(`${rules.length} IPv${family} routing rules in ${place.name}`);
      }
      const link = this.#native.linkByName(place.netns, 'eth0');
      if (link !== null && this.#native.acceptLocal(place.netns, link.ifindex)) {
        found.push(`accept_local of eth0 in ${place.name}`);
      }
    }
    return found;
  }

  /** One call of the plugin as a runtime makes it, with the node's namespace as the host's. */
  async #plugin(command: 'ADD' | 'DEL', pod: PodName): Promise<void> {
    this.#assertOpen();
    const { node, [pod]: place } = this.#topology.places;
    const { stateDir, runDir, base } = this.#topology.paths;
    const [file = '', ...args] = self();
    const child = this.#native.inNetns(node.netns, () =>
      spawn(file, args, {
        stdio: 'pipe',
        env: {
          PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin',
          CNI_COMMAND: command,
          CNI_CONTAINERID: `${pod}-${process.pid}`,
          CNI_NETNS: place.path,
          CNI_IFNAME: 'eth0',
          CNI_PATH: base,
          CNI_ARGS: `IgnoreUnknown=1;K8S_POD_NAMESPACE=${NAMESPACES[pod]};K8S_POD_NAME=${pod};K8S_POD_INFRA_CONTAINER_ID=${pod}-${process.pid}`,
        },
      }),
    );
    const ended = new Promise<number | null>((resolve, reject) => {
      child.once('error', reject).once('close', (code) => resolve(code));
    });
    this.#child = { kill: () => child.kill('SIGKILL'), ended };
    // A plugin that fails before it reads leaves a broken pipe here; its answer says why.
    child.stdin.on('error', () => {});
    child.stdin.end(
      JSON.stringify({
        cniVersion: CNI_VERSION,
        name: NETWORK,
        type: 'ambient-redirect',
        enrollment: 'all',
        proxy: { contract: this.#contract, match: { namespace: NAMESPACES.proxy, name: 'proxy' }, ports: PORTS },
        excludeNamespaces: [],
        stateDir,
        runDir,
        prevResult: this.#topology.previousResult(pod, this.#families, CNI_VERSION),
      }),
    );
    const [stdout, stderr, code] = await Promise.all([text(child.stdout), text(child.stderr), ended]);
    this.#child = undefined;
    if (code !== 0) throw new Error(`${command} of pod ${pod} failed: ${stderr.trim() || stdout.trim()}`);
  }
}

/** The command that starts this program again. */
function self(): string[] {
  return isSea() ? [process.execPath] : [process.execPath, join(import.meta.dirname, '../main.ts')];
}

/** Starts the process that goes on serving, and waits until it does. */
async function serveDetached(name: string, { contract, families }: DemoOptions): Promise<void> {
  const [file = '', ...args] = self();
  const child = spawn(
    file,
    [
      ...args,
      ...['demo', '--serve', name, '--contract', contract],
      ...['--family', families.length > 1 ? 'both' : `${families[0]}`],
    ],
    {
      detached: true,
      cwd: '/',
      stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
    },
  );
  await new Promise<void>((resolve, reject) => {
    child.once('message', () => resolve());
    child.once('error', reject);
    child.once('exit', (code) => reject(new Error(`the process that keeps serving ended at once (exit ${code})`)));
  });
  child.removeAllListeners();
  child.unref();
}

function lookInside(name: string, families: readonly Family[]): string {
  const { base, stateDir, runDir } = pathsOf(name);
  const server = families.includes(4) ? '192.0.2.3' : '[2001:db8:1::3]';
  const executable = self().join(' ');
  return [
    '',
    `Kept: ${base}/{node,client,server,outside,proxy} are network namespaces; servers and proxy go on running.`,
    `  nsenter --net=${base}/client curl -d hello http://${server}:${HTTP_PORT}/`,
    `  nsenter --net=${base}/node ${executable} status --state-dir ${stateDir} --run-dir ${runDir}`,
    `  nsenter --net=${base}/node ${executable} counters --state-dir ${stateDir}`,
    'Remove it with:',
    `  ${executable} demo --remove ${name}`,
    '',
  ].join('\n');
}

/** What was counted between two readings. A counter that was forgotten in between and begun again counts whole. */
function difference(before: readonly Counter[], after: readonly Counter[]): Counter[] {
  const key = ({ ifindex, program, reason }: Counter) => `${ifindex} ${program} ${reason}`;
  const old = new Map(before.map((counter) => [key(counter), counter]));
  return after
    .map((counter) => {
      const previous = old.get(key(counter));
      if (previous === undefined || previous.packets > counter.packets) return counter;
      return { ...counter, packets: counter.packets - previous.packets, bytes: counter.bytes - previous.bytes };
    })
    .filter(({ packets }) => packets > 0n);
}

function report(rows: readonly Row[], terminal: Terminal): string {
  const table = formatTable(
    [
      'DIRECTION',
      'IP',
      'REQUESTS',
      'SEEN BY PROXY',
      'SOURCE SEEN BY SERVER',
      'COUNTED IN KERNEL',
      'PACKETS',
      'VERDICT',
    ],
    rows.map((row) => [
      row.scenario.direction,
      `v${row.family}`,
      `${row.answered}/${REQUESTS}`,
      `${row.seen}`,
      row.sources.join(' ') || '-',
      row.counted || '-',
      `${row.packets}`,
      row.wrong.length === 0 ? terminal.green('right') : terminal.red('WRONG'),
    ]),
  );
  const reasons = rows.flatMap((row) =>
    [...new Set(row.wrong)].map((reason) => `  ${row.scenario.direction}, IPv${row.family}: ${reason}\n`),
  );
  return table + reasons.join('');
}
