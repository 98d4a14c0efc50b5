// SPDX-License-Identifier: Apache-2.0
//
// What the programs cost by themselves: nanoseconds per packet by BPF_PROG_TEST_RUN on the programs that are attached,
// with the maps and sockets of a connection that is open, and under load by the kernel's own clock (BPF_ENABLE_STATS);
// with trace off and on. Instructions are the program's size after verification: the machine's counters would say how
// many are executed, where it has them.

import { readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { ACK, SYN, tcpFrame } from '../../bpf/test/frames.ts';
import { counters, increases, sign } from '../e2e/counters.ts';
import { executable, type Family, families } from '../e2e/topology.ts';
import { must, type Namespace, type Running, until } from '../netns.ts';
import { iperfLoad, type Load, type Programs, rrLoad, wrkLoad } from './load.ts';
import { generator, type Summary, shuffled, summary } from './statistics.ts';
import { type Mode, modeNamed, PORTS, World } from './world.ts';

/** Few enough that all events of a traced run fit into the ring buffer. */
const REPEAT = 5000;

export interface PacketCost {
  program: string;
  packet: string;
  reason: string;
  family: Family;
  trace: boolean;
  /** Nanoseconds per packet. */
  ns: Summary;
}

export interface LoadCost {
  mode: string;
  load: string;
  program: string;
  trace: boolean;
  /** Nanoseconds per packet, and packets per request (per gigabit for throughput). */
  ns: Summary;
  packets: Summary;
}

export interface ProgramSize {
  program: string;
  instructions: number;
  /** Bytes of machine code. */
  code: number;
}

export interface ProgramCosts {
  sizes: ProgramSize[];
  packets: PacketCost[];
  loads: LoadCost[];
  /** What did not go as it should have. */
  invalid: string[];
}

interface ProgramRow {
  name: string;
  run_time_ns?: number;
  run_cnt?: number;
  bytes_xlated: number;
  bytes_jited: number;
}

/** Every program of a state directory, by name. */
function programsIn(stateDir: string): Map<string, { path: string; row: ProgramRow }> {
  const builds = join(stateDir, 'programs');
  const paths = readdirSync(builds).flatMap((tag) =>
    readdirSync(join(builds, tag)).map((name) => join(builds, tag, name)),
  );
  return new Map(
    paths.map((path) => {
      const row = JSON.parse(must(['bpftool', '-j', 'prog', 'show', 'pinned', path])) as ProgramRow;
      return [row.name, { path, row }];
    }),
  );
}

interface RunTime {
  ns: number;
  count: number;
}

/**
 * How long and how often each program ran while BPF_ENABLE_STATS was on, by name. In-pod programs are reached through a
 * stub of each attachment, which a tail call leaves: the time counts for the stub, and that is found by its link.
 */
function runTimesByName(stateDir: string): Map<string, RunTime> {
  const rows = new Map<number, ProgramRow & { id: number }>();
  for (const { path } of programsIn(stateDir).values()) {
    const row = JSON.parse(must(['bpftool', '-j', 'prog', 'show', 'pinned', path])) as ProgramRow & { id: number };
    rows.set(row.id, row);
  }
  const links = join(stateDir, 'links');
  for (const key of readdirSync(links)) {
    for (const name of readdirSync(join(links, key))) {
      const link = JSON.parse(must(['bpftool', '-j', 'link', 'show', 'pinned', join(links, key, name)]));
      const { prog_id: id } = link as { prog_id: number };
      if (rows.has(id)) continue;
      const row = JSON.parse(must(['bpftool', '-j', 'prog', 'show', 'id', `${id}`])) as ProgramRow & { id: number };
      rows.set(id, { ...row, name });
    }
  }
  const result = new Map<string, RunTime>();
  for (const { name, run_time_ns: ns = 0, run_cnt: count = 0 } of rows.values()) {
    const known = result.get(name) ?? { ns: 0, count: 0 };
    result.set(name, { ns: known.ns + ns, count: known.count + count });
  }
  return result;
}

/** Nanoseconds that all programs of a state directory ran together. */
export function runTimes(stateDir: string): number {
  return [...runTimesByName(stateDir).values()].reduce((sum, { ns }) => sum + ns, 0);
}

/** struct __sk_buff as BPF_PROG_TEST_RUN takes it: mark, ingress_ifindex and ifindex, the rest zero. */
function skb(ifindex: number, mark = 0): Buffer {
  const context = Buffer.alloc(192);
  context.writeUInt32LE(mark, 8);
  context.writeUInt32LE(ifindex, 36);
  context.writeUInt32LE(ifindex, 40);
  return context;
}

interface Case {
  program: string;
  packet: string;
  reason: string;
  family: Family;
  namespace: Namespace;
  ifindex: number;
  frame: Uint8Array;
  mark?: number;
}

/** Packets of a connection that is open from `port` of the client to the echo server, and of one that begins. */
function cases(world: World, family: Family, port: number): Case[] {
  const { topology, client, server, proxy } = world;
  if (proxy === undefined) throw new Error('the mode has no shared proxy');
  const from = { address: client.addresses[family], port };
  const to = { address: server.addresses[family], port: PORTS.echo };
  const payload = Buffer.alloc(100);
  const mac = (last: number) =>
    [...sign(topology.stateDir), last].map((byte) => byte.toString(16).padStart(2, '0')).join(':');
  const sent = { source: client.mac, destination: client.gatewayMac };
  const answered = { source: proxy.mac, destination: proxy.gatewayMac };
  const node = topology.node;
  const eth0 = JSON.parse(proxy.netns.ip('-j', 'link', 'show', 'dev', 'eth0')) as { ifindex: number }[];
  const inside = { namespace: proxy.netns, ifindex: eth0[0]?.ifindex ?? 0 };
  return [
    {
      program: 'pod_egress',
      packet: 'data of a pod',
      reason: 'to_proxy_established',
      family,
      namespace: node,
      ifindex: client.hostIfindex,
      frame: tcpFrame(sent, from, to, { flags: ACK, payload }),
    },
    {
      program: 'pod_egress',
      packet: 'SYN of a pod',
      reason: 'redirected_outbound',
      family,
      namespace: node,
      ifindex: client.hostIfindex,
      frame: tcpFrame(sent, { ...from, port: 1024 }, to, { flags: SYN }),
    },
    {
      program: 'proxy_egress',
      packet: 'data of the proxy to a local pod',
      reason: 'from_proxy_local',
      family,
      namespace: node,
      ifindex: proxy.hostIfindex,
      frame: tcpFrame(answered, to, from, { flags: ACK, payload }),
    },
    {
      program: 'proxy_ingress',
      packet: 'data of a pod',
      reason: 'proxy_delivered',
      family,
      ...inside,
      // SIGN_ESTABLISHED of redirect.h.
      frame: tcpFrame({ source: mac(3), destination: proxy.mac }, from, to, { flags: ACK, payload }),
    },
  ];
}

/** `marks.tproxy` of the settings, which looped packets carry inside a pod. */
const MARK_TPROXY = 0x1043;

/** The same inside the client's pod: `port` is the application's, and its proxy has gone on from `onward`. */
function inPodCases(world: World, family: Family, port: number, onward: number): Case[] {
  const { client, server } = world;
  const app = { address: client.addresses[family], port };
  const proxy = { address: client.addresses[family], port: onward };
  const to = { address: server.addresses[family], port: PORTS.echo };
  const payload = Buffer.alloc(100);
  const links = JSON.parse(client.netns.ip('-j', 'link', 'show', 'dev', 'eth0')) as { ifindex: number }[];
  const inside = { family, namespace: client.netns, ifindex: links[0]?.ifindex ?? 0 };
  const data = { flags: ACK, payload };
  return [
    {
      ...inside,
      program: 'inpod_egress',
      packet: 'data of the app',
      reason: 'to_proxy_established',
      frame: tcpFrame({ source: client.mac, destination: client.gatewayMac }, app, to, data),
    },
    {
      ...inside,
      program: 'inpod_ingress',
      packet: 'the same, looped',
      reason: 'proxy_delivered',
      mark: MARK_TPROXY,
      frame: tcpFrame({ source: client.mac, destination: client.mac }, app, to, data),
    },
    {
      ...inside,
      program: 'inpod_ingress',
      packet: 'data to the proxy, from the wire',
      reason: 'to_proxy_established',
      frame: tcpFrame({ source: client.gatewayMac, destination: client.mac }, to, proxy, data),
    },
  ];
}

/**
 * How bpftool is to find a program: a shared one by its pin, an in-pod one by the link of the client's attachment, which
 * has a stub of its own before it. The attachment is told by its link to the namespace.
 */
function programOf({ topology: { stateDir }, client }: World, name: string): string[] {
  if (!name.startsWith('inpod_')) return ['pinned', programsIn(stateDir).get(name)?.path ?? name];
  const { ino } = statSync(client.netns.path);
  const links = join(stateDir, 'links');
  const show = (key: string, link: string) =>
    JSON.parse(must(['bpftool', '-j', 'link', 'show', 'pinned', join(links, key, link)])) as {
      prog_id: number;
      netns_ino?: number;
    };
  const key = readdirSync(links).find((one) => show(one, 'inpod_lookup').netns_ino === ino);
  if (key === undefined) throw new Error(`no attachment in ${client.netns.name}`);
  return ['id', `${show(key, name).prog_id}`];
}

/** Nanoseconds per packet; throws if not every packet was judged as it should be. */
function testRun(world: World, one: Case, program: readonly string[]): number {
  const directory = world.directory;
  const [frame, context] = [join(directory, 'frame'), join(directory, 'skb')];
  writeFileSync(frame, one.frame);
  writeFileSync(context, skb(one.ifindex, one.mark));
  const before = counters(world.topology.stateDir);
  const options = ['data_in', frame, 'ctx_in', context, 'repeat', `${REPEAT}`];
  const output = one.namespace.run(['bpftool', 'prog', 'run', ...program, ...options]);
  const counted = increases(before, counters(world.topology.stateDir));
  if (counted[`${one.program} ${one.reason}`] !== REPEAT) {
    throw new Error(`${one.program}, ${one.packet}: ${REPEAT} runs counted as ${JSON.stringify(counted)}`);
  }
  const ns = /duration \(average\): (\d+)ns/.exec(output)?.[1];
  if (ns === undefined) throw new Error(`bpftool prog run: ${output.trim().slice(-200)}`);
  return Number(ns);
}

/** `ambient-redirect trace` with nobody who reads its lines. */
async function startTrace(world: World): Promise<Running> {
  const { node, stateDir, runDir, testbed } = world.topology;
  const command = [
    'sh',
    '-c',
    'exec "$0" trace --state-dir "$1" --run-dir "$2" >/dev/null',
    executable,
    stateDir,
    runDir,
  ];
  const running = testbed.start(node.argv(command));
  await until('trace is on', () => {
    if (!running.alive) throw new Error(`trace ended: ${running.output}`);
    return traceMap(stateDir).on;
  });
  return running;
}

async function stopTrace(world: World, running: Running): Promise<void> {
  await running.stop('SIGINT');
  await until('trace is off', () => !traceMap(world.topology.stateDir).on);
}

/** struct trace of redirect.h. */
function traceMap(stateDir: string): { on: boolean; lost: number } {
  const dump = JSON.parse(must(['bpftool', '-j', 'map', 'dump', 'pinned', join(stateDir, 'trace')])) as {
    value: string[];
  }[];
  const bytes = Uint8Array.from(dump[0]?.value ?? [], (byte) => Number.parseInt(byte, 16));
  const view = new DataView(bytes.buffer);
  return { on: view.getUint32(0, true) !== 0, lost: view.getUint32(12, true) };
}

/** Runs `body` with trace on or off. */
async function traced<T>(world: World, on: boolean, body: () => Promise<T> | T): Promise<T> {
  if (!on) return await body();
  const running = await startTrace(world);
  try {
    return await body();
  } finally {
    await stopTrace(world, running);
  }
}

async function packetCosts(world: World, programs: Programs, rounds: number, invalid: string[]): Promise<PacketCost[]> {
  const all: Case[] = [];
  for (const family of families) {
    const { address, port } = world.target(PORTS.echo, family);
    world.topology.testbed.start(world.clientCommand([programs.peer, 'hold', address, `${port}`, '1', '0', '3600000']));
    const { client, proxy } = world;
    // The application's port, and inside a pod its proxy's, which alone has nobody opposite in the same namespace.
    let ends: number[] = [];
    await until(`a connection to ${address}`, () => {
      const table = client.netns.run(['ss', `-${family}Htn`, 'state', 'established', 'dport', '=', `:${port}`]);
      ends = [...table.matchAll(/:(\d+)\s+\S+:\d+\s*$/gm)].map(([, end]) => Number(end));
      return ends.length === (proxy === undefined ? 2 : 1);
    });
    if (proxy !== undefined) {
      all.push(...cases(world, family, ends[0] ?? 0));
      continue;
    }
    const opposite = client.netns.run(['ss', '-Htn', 'state', 'established', 'sport', '=', `:${port}`]);
    const [app, onward] = [true, false].map((wanted) =>
      ends.find((end) => new RegExp(`:${end}\\s*$`, 'm').test(opposite) === wanted),
    );
    if (app === undefined || onward === undefined) throw new Error(`cannot tell the ends of ${opposite}`);
    all.push(...inPodCases(world, family, app, onward));
  }
  const programOfCase = new Map(all.map(({ program }) => [program, programOf(world, program)]));
  const figures = new Map<string, { one: Case; trace: boolean; ns: number[] }>();
  const random = generator(rounds);
  for (let round = 0; round < rounds; round++) {
    for (const trace of shuffled([false, true], random)) {
      await traced(world, trace, () => {
        for (const one of shuffled(all, random)) {
          const key = `${one.program} ${one.packet} ${one.family} ${trace}`;
          const entry = figures.get(key) ?? { one, trace, ns: [] };
          figures.set(key, entry);
          try {
            entry.ns.push(testRun(world, one, programOfCase.get(one.program) ?? []));
          } catch (error) {
            invalid.push(error instanceof Error ? error.message : String(error));
          }
        }
      });
    }
  }
  return [...figures.values()].map(({ one, trace, ns }) => ({
    program: one.program,
    packet: one.packet,
    reason: one.reason,
    family: one.family,
    trace,
    ns: summary(ns),
  }));
}

async function loadCosts(world: World, loads: readonly Load[], rounds: number, invalid: string[]): Promise<LoadCost[]> {
  const { stateDir } = world.topology;
  const figures = new Map<string, { load: Load; program: string; trace: boolean; ns: number[]; packets: number[] }>();
  const random = generator(rounds + 1);
  const steps = loads.flatMap((load) => [false, true].map((trace) => ({ load, trace })));
  for (let round = 0; round < rounds; round++) {
    for (const { load, trace } of shuffled(steps, random)) {
      await traced(world, trace, async () => {
        const before = runTimesByName(stateDir);
        const { units, failure } = await load.run(world);
        if (failure !== undefined) invalid.push(`${load.name}: ${failure}`);
        for (const [program, { ns, count: all }] of runTimesByName(stateDir)) {
          const count = all - (before.get(program)?.count ?? 0);
          const time = ns - (before.get(program)?.ns ?? 0);
          // Programs that see a packet now and then (neighbour discovery) say nothing about a request.
          if (count < 100) continue;
          const key = `${load.name} ${program} ${trace}`;
          const entry = figures.get(key) ?? { load, program, trace, ns: [], packets: [] };
          figures.set(key, entry);
          entry.ns.push(time / count);
          entry.packets.push(count / units);
        }
      });
    }
  }
  return [...figures.values()].map(({ load, program, trace, ns, packets }) => ({
    mode: world.mode.name,
    load: load.title,
    program,
    trace,
    ns: summary(ns),
    packets: summary(packets),
  }));
}

export interface ProgramOptions {
  /** Modes of this plugin; of the others nothing can be measured here. */
  modes: readonly string[];
  rounds: number;
  /** Of each load. */
  seconds: number;
  note: (text: string) => void;
}

/** A world of its own for each mode, one after the other. */
export async function measurePrograms(programs: Programs, options: ProgramOptions): Promise<ProgramCosts> {
  const { rounds, seconds, note } = options;
  const result: ProgramCosts = { sizes: [], packets: [], loads: [], invalid: [] };
  const measured = new Set<string>();
  const modes = options.modes.map((name): Mode => modeNamed(name)).filter(({ wiring }) => wiring.ours !== undefined);
  for (const mode of modes) {
    note(`what the programs cost under load: ${mode.title}`);
    const world = await World.open(mode, programs);
    try {
      const clock = world.topology.testbed.start([programs.peer, 'stats']);
      await until('the kernel counts run time', () => {
        if (!clock.alive) throw new Error(clock.output);
        return clock.output.includes('on');
      });
      const loads = [rrLoad(programs.peer, 4, seconds), wrkLoad(4, 32, seconds), iperfLoad(4, 1, false, seconds)];
      result.loads.push(...(await loadCosts(world, loads, rounds, result.invalid)));
      await clock.stop('SIGTERM');
      const known = new Set(result.sizes.map(({ program }) => program));
      for (const [program, { row }] of programsIn(world.topology.stateDir)) {
        if (known.has(program)) continue;
        result.sizes.push({ program, instructions: row.bytes_xlated / 8, code: row.bytes_jited });
      }
      // On other hooks the same programs cost the same. Without the clock: it is part of what it measures.
      const contract = mode.wiring.proxies;
      if (measured.has(contract)) continue;
      measured.add(contract);
      note(`what the programs cost per packet: ${mode.title}`);
      result.packets.push(...(await packetCosts(world, programs, rounds * 3, result.invalid)));
    } finally {
      world.close();
    }
  }
  return result;
}
