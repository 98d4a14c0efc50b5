// SPDX-License-Identifier: Apache-2.0
// npm run bench -- compare EXECUTABLE: what each program takes for each packet in this checkout's build and in another
// one's, each on a node of its own, by turns. Nanoseconds on this machine, or executed instructions.

import { dirname, join, relative, resolve } from 'node:path';
import { counters, increases } from '../e2e/counters.ts';
import { findKernel } from '../kernels/debian.ts';
import { boot } from '../kernels/machine.ts';
import { type Case, packetCases, programOf, testRun } from './packets.ts';
import { peer } from './programs.ts';
import { generator, median, pairedRatio, type Ratio, shuffled } from './statistics.ts';
import { modeNamed, World } from './world.ts';

const ROOT = dirname(dirname(import.meta.dirname));
const MODES = ['tcx', 'in-pod'];

export interface Compared {
  program: string;
  packet: string;
  family: number;
  /** Per packet, a pair for each round: [this build, the other]. */
  pairs: [number, number][];
}

export interface CompareOptions {
  /** Path of the other build. */
  other: string;
  rounds: number;
  /** Runs of a program at a time. */
  repeat: number;
  /** What bpftool is started by. */
  prefix: readonly string[];
  note: (text: string) => void;
}

interface Side {
  world: World;
  cases: Case[];
  /** Of each case. */
  programs: string[][];
}

/** Throws where a program did not judge a packet as it is to be judged. */
function assertJudged({ world, cases, programs }: Side, index: number): void {
  const one = cases[index] as Case;
  const { stateDir } = world.topology;
  const before = counters(stateDir);
  const { verdict } = testRun(world, one, programs[index] ?? [], 10);
  const counted = increases(before, counters(stateDir));
  const right = one.reason === null ? verdict === -1 : counted[`${one.program} ${one.reason}`] === 10;
  if (!right) throw new Error(`${one.program}, ${one.packet}: ${verdict}, counted as ${JSON.stringify(counted)}`);
}

export async function comparePackets(options: CompareOptions): Promise<Compared[]> {
  const { other, rounds, repeat, prefix, note } = options;
  const programs = { peer: await peer(), fortio: undefined };
  const result: Compared[] = [];
  for (const name of MODES) {
    const mode = modeNamed(name);
    note(`the worlds of "${mode.title}"`);
    const worlds: World[] = [];
    try {
      for (const plugin of [undefined, other]) {
        worlds.push(await World.open(mode, { ...programs, ...(plugin !== undefined && { plugin }) }));
      }
      const sides: Side[] = [];
      for (const world of worlds) {
        const cases = await packetCases(world, programs);
        const found = new Map(cases.map(({ program }) => [program, programOf(world, program)]));
        sides.push({ world, cases, programs: cases.map(({ program }) => found.get(program) ?? []) });
      }
      const rows = (sides[0] as Side).cases.map(({ program, packet, family }, index): Compared => {
        for (const side of sides) assertJudged(side, index);
        return { program, packet, family, pairs: [] };
      });
      const random = generator(rounds);
      for (let round = 0; round < rounds; round++) {
        for (const index of shuffled([...rows.keys()], random)) {
          const pair: [number, number] = [0, 0];
          for (const side of shuffled([0, 1] as const, random)) {
            const { world, cases, programs: found } = sides[side] as Side;
            pair[side] = testRun(world, cases[index] as Case, found[index] ?? [], repeat, prefix).ns;
          }
          (rows[index] as Compared).pairs.push(pair);
        }
      }
      result.push(...rows);
    } finally {
      for (const world of worlds) world.close();
    }
  }
  return result;
}

/**
 * In a machine whose clock goes on by a nanosecond with each instruction that it executes, what a run took is how many it
 * needed: the kernel's own among them, and the same every time.
 */
export async function compareInstructions(other: string): Promise<Compared[]> {
  const kernel = await findKernel('testing');
  const inside = ['node', relative(ROOT, join(import.meta.dirname, 'main.ts')), 'compare', resolve(other), '--inside'];
  const ended = await boot(kernel, ROOT, `${inside.join(' ')} >$REPORT`, 30 * 60_000, { countInstructions: true });
  if (ended.status !== 0)
    throw new Error(`in ${kernel.release}: exit ${ended.status}\n${ended.output}\n${ended.console}`);
  return JSON.parse(ended.report) as Compared[];
}

const percent = (ratio: number) => `${((ratio - 1) * 100).toFixed(1)} %`;

function interval({ ratio, low, high }: Ratio): string {
  return `${percent(ratio)} [${percent(low)}..${percent(high)}]`;
}

/** A Markdown table: medians and least of each side, and how the pairs differ. */
export function compareReport(rows: readonly Compared[], unit: string): string {
  const lines = rows.map(({ program, packet, family, pairs }) => {
    const [ours, others] = [pairs.map(([a]) => a), pairs.map(([, b]) => b)];
    const figure = (values: readonly number[]) => `${median(values)} (${Math.min(...values)})`;
    return `| ${[program, packet, `IPv${family}`, figure(others), figure(ours), interval(pairedRatio(pairs))].join(' | ')} |`;
  });
  return [
    `| program | packet | | other, ${unit}, median (least) | this build | difference of the pairs |`,
    '|---|---|---|---|---|---|',
    ...lines,
    '',
  ].join('\n');
}
