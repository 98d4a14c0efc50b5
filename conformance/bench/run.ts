// SPDX-License-Identifier: Apache-2.0
// Runs the steps of a plan, each checked, and writes each result down before the next begins.

import { appendFileSync, existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { judge } from './judge.ts';
import type { Metrics, Programs } from './load.ts';
import { elapsedTime, type ProcessorTime, processorTime } from './machine.ts';
import { type Step, stepKey } from './plan.ts';
import type { Progress } from './progress.ts';
import { type Mode, World } from './world.ts';

export interface Run {
  round: number;
  repeat: number;
  cell: string;
  mode: string;
  place: number;
  /** When it began. */
  at: string;
  metrics: Metrics;
  units: number;
  seconds: number;
  /** Of the whole machine, while the load ran. */
  processor: ProcessorTime;
  /** Why it does not count. */
  invalid?: string;
}

const FILE = 'runs.jsonl';

export function readRuns(directory: string): Run[] {
  const path = join(directory, FILE);
  if (!existsSync(path)) return [];
  const lines = readFileSync(path, 'utf8').split('\n');
  // A kill may have left half a line at the end.
  return lines.filter((line) => line.startsWith('{') && line.endsWith('}')).map((line) => JSON.parse(line) as Run);
}

/** One run of a step's load in its mode's world. Never throws for what the load or the traffic did. */
export async function measure(world: World, step: Step): Promise<Run> {
  const base = {
    round: step.round,
    repeat: step.repeat,
    cell: step.cell.name,
    mode: step.mode.name,
    place: step.place,
    at: new Date().toISOString(),
  };
  const nothing = { metrics: {}, units: 0, seconds: 0, processor: { busy: 0, interrupts: 0, stolen: 0 } };
  try {
    await world.useProxy(step.cell.proxy);
    const before = world.evidence();
    const idle = processorTime();
    const { metrics, traffic, units, seconds, failure } = await step.cell.load.run(world);
    const processor = elapsedTime(idle, processorTime());
    const reason = failure ?? judge(step.mode.expectation, before, world.evidence(), traffic);
    const cpu = units > 0 ? { cpu: (processor.busy * 1e6) / units } : {};
    return {
      ...base,
      metrics: { ...metrics, ...cpu },
      units,
      seconds,
      processor,
      ...(reason !== null && { invalid: reason }),
    };
  } catch (error) {
    return { ...base, ...nothing, invalid: error instanceof Error ? error.message : String(error) };
  }
}

export async function runSteps(
  steps: readonly Step[],
  programs: Programs,
  directory: string,
  progress: Progress,
): Promise<void> {
  const done = new Set(readRuns(directory).map(stepKey));
  const open = steps.filter(
    ({ round, repeat, cell, mode }) => !done.has(stepKey({ round, repeat, cell: cell.name, mode: mode.name })),
  );
  progress.skip(steps.length - open.length);
  const worlds = new Map<Mode, World>();
  try {
    for (const mode of new Set(open.map((step) => step.mode))) {
      progress.note(`making the world of "${mode.title}"`);
      worlds.set(mode, await World.open(mode, programs));
    }
    for (const step of open) {
      const world = worlds.get(step.mode);
      if (world === undefined) throw new Error(`no world for ${step.mode.name}`);
      progress.begin(
        `round ${step.round + 1}: ${step.cell.load.title}${step.cell.proxy === 'native' ? '' : `, ${step.cell.proxy}`}, IPv${step.cell.load.family}, ${step.mode.title}`,
      );
      const run = await measure(world, step);
      appendFileSync(join(directory, FILE), `${JSON.stringify(run)}\n`);
      if (run.invalid !== undefined) {
        progress.warn(`invalid: ${step.mode.title}, ${step.cell.name}, round ${step.round + 1}: ${run.invalid}`);
      }
      progress.end(step.cell.load.seconds);
    }
  } finally {
    for (const world of worlds.values()) world.close();
  }
}
