// SPDX-License-Identifier: Apache-2.0
//
// What the programs cost by themselves: nanoseconds per packet by BPF_PROG_TEST_RUN on the programs that are attached,
// with the maps and sockets of a connection that is open, and under load by the kernel's own clock (BPF_ENABLE_STATS);
// with trace off and on. Instructions are the program's size after verification: the machine's counters would say how
// many are executed, where it has them.

import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { counters, increases } from '../e2e/counters.ts';
import { executable, type Family } from '../e2e/topology.ts';
import { must, type Running, until } from '../netns.ts';
import { iperfLoad, type Load, type Programs, rrLoad, wrkLoad } from './load.ts';
import { type Case, type ProgramRow, packetCases, programOf, programsIn, testRun } from './packets.ts';
import { generator, type Summary, shuffled, summary } from './statistics.ts';
import { type Mode, modeNamed, World } from './world.ts';

/** Few enough that all events of a traced run fit into the ring buffer. */
const REPEAT = 5000;
const TC_ACT_UNSPEC = -1;

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

/** Nanoseconds per packet; throws if not every packet was judged as it should be. */
function judgedRun(world: World, one: Case, program: readonly string[]): number {
  const before = counters(world.topology.stateDir);
  const { ns, verdict } = testRun(world, one, program, REPEAT);
  const counted = increases(before, counters(world.topology.stateDir));
  const right = one.reason === null ? verdict === TC_ACT_UNSPEC : counted[`${one.program} ${one.reason}`] === REPEAT;
  if (!right) throw new Error(`${one.program}, ${one.packet}: ${REPEAT} runs counted as ${JSON.stringify(counted)}`);
  return ns;
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
  const all = await packetCases(world, programs);
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
            entry.ns.push(judgedRun(world, one, programOfCase.get(one.program) ?? []));
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
    reason: one.reason ?? 'not counted',
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
  const modes = options.modes
    .map((name): Mode => modeNamed(name))
    .filter(({ wiring }) => wiring.ours !== undefined && wiring.proxies !== 'ztunnel');
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
