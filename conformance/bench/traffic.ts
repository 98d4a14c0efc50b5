// SPDX-License-Identifier: Apache-2.0
// One bench from plan to tables: a directory below results/ holds the plan, a line for each run, a file for each other
// part, and in the end the result.

import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { benchAdd } from './add.ts';
import type { Programs } from './load.ts';
import { type Machine, machine } from './machine.ts';
import { cells, PROFILES, type Profile, type ProfileName, steps } from './plan.ts';
import { svg } from './plots.ts';
import { FORTIO_VERSION, fortio, peer } from './programs.ts';
import { measurePrograms } from './programs-cost.ts';
import { Progress } from './progress.ts';
import { benchmarks, plots, type Result, report } from './report.ts';
import { readRuns, runSteps } from './run.ts';
import { givenZtunnel } from './ztunnel.ts';

export const RESULTS = join(import.meta.dirname, '../../results');

export interface BenchOptions {
  profile: ProfileName;
  /** Regular expression: cells and parts (`programs`, `add`) whose names match are measured, the rest is left out. */
  only?: string;
  /** Go on with the newest one of this profile that did not come to its end. */
  resume: boolean;
}

interface Plan {
  profile: ProfileName;
  only?: string;
  seed: number;
  begun: string;
  machine: Machine;
}

/** Where BENCHMARKS.md and its plots go. */
const ROOT = join(import.meta.dirname, '../..');
const PLOTS = 'conformance/bench/plots';

const planFile = (directory: string) => join(directory, 'plan.json');
const resultFile = (directory: string) => join(directory, 'result.json');

function unfinished(profile: ProfileName): string | undefined {
  if (!existsSync(RESULTS)) return undefined;
  return readdirSync(RESULTS)
    .filter((name) => name.endsWith(`-${profile}`))
    .sort()
    .map((name) => join(RESULTS, name))
    .filter((directory) => existsSync(planFile(directory)) && !existsSync(resultFile(directory)))
    .at(-1);
}

/** What a part measured, from its file if it was measured before. */
async function part<T>(directory: string, name: string, measure: () => Promise<T>): Promise<T> {
  const path = join(directory, `${name}.json`);
  if (existsSync(path)) return JSON.parse(readFileSync(path, 'utf8')) as T;
  const value = await measure();
  writeFileSync(`${path}.new`, JSON.stringify(value));
  renameSync(`${path}.new`, path);
  return value;
}

/** Seconds that the parts after the traffic are thought to take, on a machine with nothing else to do. */
function partSeconds(profile: Profile, wants: (name: string) => boolean): number {
  const programs = profile.programRounds * (6 * (profile.shortSeconds + 0.7) + 12);
  const levels = profile.attachments.length;
  const add =
    Math.max(...profile.attachments) * 0.08 + levels * (profile.addRounds * 0.8 + 15) + profile.atOnceRounds * 20;
  return (wants('programs') ? programs * 2 : 0) + (wants('add') ? add : 0);
}

export interface Finished {
  directory: string;
  result: Result;
}

export async function benchTraffic(options: BenchOptions): Promise<Finished> {
  const ztunnel = givenZtunnel();
  const programs: Programs = { peer: await peer(), fortio: await fortio(), ...(ztunnel && { ztunnel }) };
  let directory = options.resume ? unfinished(options.profile) : undefined;
  let plan: Plan;
  if (directory === undefined) {
    if (options.resume) process.stderr.write(`nothing to resume in ${RESULTS}: begun anew\n`);
    const begun = new Date().toISOString();
    directory = join(RESULTS, `${begun.replaceAll(/[-:]|\.\d+/g, '')}-${options.profile}`);
    plan = {
      profile: options.profile,
      ...(options.only !== undefined && { only: options.only }),
      seed: Math.floor(Math.random() * 2 ** 31),
      begun,
      machine: machine({
        fortio: programs.fortio === undefined ? 'absent (no Go)' : FORTIO_VERSION,
        node: process.version,
      }),
    };
    mkdirSync(directory, { recursive: true });
    writeFileSync(planFile(directory), JSON.stringify(plan));
  } else {
    plan = JSON.parse(readFileSync(planFile(directory), 'utf8')) as Plan;
  }
  const profile = PROFILES[plan.profile];
  const only = plan.only === undefined ? /^/ : new RegExp(plan.only);
  const wants = (name: string) => only.test(name);
  const all = cells(profile, programs).filter(({ name }) => wants(name));
  const order = steps(profile, all, plan.seed);
  const progress = new Progress(
    order.map(({ cell }) => cell.load.seconds),
    partSeconds(profile, wants),
  );
  process.stderr.write(`${order.length} runs, results in ${directory}\n`);
  const note = (text: string) => progress.note(text);
  const result: Result = {
    profile: plan.profile,
    ...(plan.only !== undefined && { only: plan.only }),
    seed: plan.seed,
    begun: plan.begun,
    took: 0,
    machine: plan.machine,
    cells: all.map(({ name, load }) => ({ name, title: load.title })),
    runs: [],
  };
  try {
    await runSteps(order, programs, directory, progress);
    if (wants('programs')) {
      result.programs = await part(directory, 'programs', () =>
        measurePrograms(programs, {
          ...profile,
          rounds: profile.programRounds,
          seconds: profile.shortSeconds,
          note,
        }),
      );
    }
    if (wants('add')) {
      result.add = await part(directory, 'add', () =>
        benchAdd(programs, { ...profile, rounds: profile.addRounds, seconds: profile.seconds / 2, note }),
      );
    }
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new Error(`${why}\nwhat was measured so far is in ${directory}; --resume goes on with it`, { cause: error });
  } finally {
    progress.close();
    result.runs = readRuns(directory);
    result.took = (Date.now() - Date.parse(plan.begun)) / 1000;
    writeFileSync(join(directory, 'tables.md'), report(result));
  }
  writeFileSync(resultFile(directory), JSON.stringify(result, null, 1));
  for (const plot of plots(result)) writeFileSync(join(directory, `${plot.name}.svg`), await svg(plot));
  return { directory, result };
}

/** The newest result that may be published, or the one in `directory`. */
export function finished(directory?: string): Finished {
  const names = existsSync(RESULTS) ? readdirSync(RESULTS).sort().reverse() : [];
  const candidates = directory === undefined ? names.map((name) => join(RESULTS, name)) : [directory];
  for (const candidate of candidates.filter((one) => existsSync(resultFile(one)))) {
    const result = JSON.parse(readFileSync(resultFile(candidate), 'utf8')) as Result;
    if (directory !== undefined || publishable(result) === null) return { directory: candidate, result };
  }
  throw new Error(`no whole result of the default or the full profile in ${directory ?? RESULTS}`);
}

/** Why a result must not stand in BENCHMARKS.md, or null. */
export function publishable(result: Result): string | null {
  if (result.profile === 'quick') return 'the quick profile measures too little';
  if (result.only !== undefined) return `only ${result.only} was measured`;
  return null;
}

/** Writes BENCHMARKS.md and its plots; returns the paths. */
export async function publish(result: Result, root: string = ROOT): Promise<string[]> {
  const reason = publishable(result);
  if (reason !== null) throw new Error(`not published: ${reason}`);
  const directory = join(root, PLOTS);
  rmSync(directory, { recursive: true, force: true });
  mkdirSync(directory, { recursive: true });
  const text = join(root, 'BENCHMARKS.md');
  writeFileSync(text, benchmarks(result, PLOTS));
  const paths = [text];
  for (const plot of plots(result)) {
    const path = join(directory, `${plot.name}.svg`);
    writeFileSync(path, await svg(plot));
    paths.push(path);
  }
  return paths;
}
