// SPDX-License-Identifier: Apache-2.0
// npm run mutate:bpf [-- --minutes N] [--only TEXT] [--list] [--anew] [--table]: changes one thing in bpf/ at a time, and
// runs the BPF-level suite (bpf/test) on the result. Each change that no test notices is printed with its place. Exit
// code 1 for one that explained.json does not explain. Reasons are tried first, then conditions and comparisons, then
// numbers, each in an order that is mixed but always the same, so that any part of a run is a fair sample. --table writes
// which test each reason has (reasons.json).
//
// What was found out is kept in build/mutate/. "Killed" stands as long as the function and the test that did it are as
// they were, whatever else has changed; all else as long as nothing has. --anew forgets it.
//
// A mutant needs no new addon: that of the fault injection takes the programs from $AMBIENT_REDIRECT_OBJECT. Only the
// programs that the function is in are compiled and loaded again. Nor a new vitest: the tests of bpf/test/suite.ts and
// in-pod.ts are run in one process (worker.ts), the others (AT_HOOKS) only on what they let live.

import { type ChildProcess, fork, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { appendFileSync, existsSync, globSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { parseArgs } from 'node:util';
import { applied, type Mutant, mutantsOf } from './mutants.ts';
import { compile, programHashes } from './object.ts';
import { only, Programs } from './programs.ts';
import type { Order, Ready, Verdict } from './worker.ts';

/**
 * killed: a test failed. refused: the verifier does not load it. same: clang makes the same code of it. not C: clang
 * refuses it. survived: every test passed.
 */
type Fate = 'killed' | 'refused' | 'same' | 'not C' | 'survived';

/**
 * A survivor that may survive: found by file, function and both forms of the line, because line numbers move; without
 * `to` every change of that line, without both every change of that function.
 */
interface Explained {
  file: string;
  function: string;
  from?: string;
  to?: string;
  why: string;
}

const ROOT = dirname(dirname(import.meta.dirname));
const WORK = join(ROOT, 'build/mutate');
const AT_HOOKS = ['bpf/test/hooks.test.ts', 'bpf/test/in-pod-hooks.test.ts', 'bpf/test/direct.test.ts'];
const RUNS_OF_A_WORKER = 300;

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '600' },
    only: { type: 'string', default: '' },
    list: { type: 'boolean', default: false },
    anew: { type: 'boolean', default: false },
    table: { type: 'boolean', default: false },
  },
});
process.chdir(ROOT);
const sources = new Map(globSync('bpf/*.{h,c}').map((file) => [file, readFileSync(file, 'utf8')]));
const reasons = [...(sources.get('bpf/redirect.h') ?? '').matchAll(/^\t(REASON_\w+) = \d+,/gm)]
  .map(([, name = '']) => name)
  .filter((name) => name !== 'REASON_MAX');
const explained = JSON.parse(readFileSync(join(import.meta.dirname, 'explained.json'), 'utf8')) as Explained[];

const all = [...sources].flatMap(([file, source]) => mutantsOf(file, source, reasons));
const wanted = mixed(all).filter((mutant) => describe(mutant).includes(values.only));
const programs = new Programs(sources);

/** What was found out about a change. */
interface Found {
  fate: Fate;
  /** The test that killed it: its name, and its fingerprint. */
  test?: string | undefined;
  killer?: string | undefined;
  /** AT_HOOKS was run on it too. */
  hooks?: boolean;
}
interface Line extends Found {
  key: string;
  /** Digests of bpf/, and of that and the tests. */
  sources: string;
  everything: string;
}

mkdirSync(WORK, { recursive: true });
const journal = join(WORK, 'verdicts.jsonl');
const found = new Map<string, Found>();
const now = {
  sources: digestOf([...sources.keys()]),
  everything: digestOf([...sources.keys(), ...globSync('bpf/test/*'), ...globSync('conformance/mutate/*.ts')]),
};

function digestOf(files: string[]): string {
  const digest = createHash('sha256');
  for (const file of files.sort()) digest.update(readFileSync(file));
  return digest.digest('hex').slice(0, 16);
}

/** Of a change, wherever its function has been moved to. */
function keyOf({ file, function: name, body, within, text }: Mutant): string {
  return createHash('sha256').update([file, name, body, within, text].join('\0')).digest('hex').slice(0, 24);
}

/** What is known from earlier runs and still holds. `tests`: fingerprints. */
function recall(tests: ReadonlySet<string>): void {
  if (values.anew || !existsSync(journal)) return;
  for (const line of readFileSync(journal, 'utf8').trimEnd().split('\n')) {
    const { key, sources, everything, ...rest } = JSON.parse(line) as Line;
    const holds =
      rest.fate === 'killed' && rest.killer !== undefined
        ? tests.has(rest.killer)
        : rest.fate === 'killed' || rest.fate === 'survived'
          ? everything === now.everything
          : sources === now.sources;
    if (holds) found.set(key, rest);
  }
}

function record(mutant: Mutant, what: Found): void {
  const key = keyOf(mutant);
  found.set(key, what);
  appendFileSync(journal, `${JSON.stringify({ key, ...what, ...now } satisfies Line)}\n`);
}

interface Compiled {
  mutant: Mutant;
  /** Names of the programs that are other code now. Undefined: clang refuses it. */
  changed: string[] | undefined;
  object: string;
  slot: number;
}

async function run(): Promise<void> {
  const judge = new Judge();
  const started = performance.now();
  const end = started + Number(values.minutes) * 60_000;
  // From an object that was compiled here, as every change is: the constants in it have to be where the addon writes them.
  const whole = join(WORK, 'unchanged');
  if ((await compileIn(whole, programs.names)) === undefined) throw new Error('clang refuses the sources as they are');
  const order = { object: join(whole, 'redirect.bpf.o'), changed: [...programs.names], place: '' };
  const unchanged = await judge.judge(order);
  if (unchanged.fate !== 'survived') throw new Error(`the suite fails without any change: ${unchanged.failure}`);
  console.error(`${wanted.length} mutants; the suite alone: ${((performance.now() - started) / 1000).toFixed(1)} s`);
  recall(judge.tests);

  const todo = wanted.filter((mutant) => !found.has(keyOf(mutant)));
  console.error(`${wanted.length - todo.length} known from earlier runs`);
  const prepare = async (mutant: Mutant | undefined, slot: number): Promise<Compiled | undefined> => {
    if (mutant === undefined) return undefined;
    const concerned = programs.with(mutant.function);
    const directory = join(WORK, String(slot));
    const hashes = await compileIn(directory, concerned, mutant);
    const original = await unchangedHashes(concerned);
    const changed = hashes && concerned.filter((name) => hashes.get(name) !== original.get(name));
    return { mutant, changed, object: join(directory, 'redirect.bpf.o'), slot };
  };
  // Two are compiled ahead while one is judged.
  const slots = 3;
  const ahead = Array.from({ length: slots }, (_, slot) => prepare(todo[slot], slot));
  let tried = 0;
  for (; performance.now() < end; tried++) {
    const begun = performance.now();
    const compiled = await ahead[tried % slots];
    if (compiled === undefined) break;
    const { mutant, slot } = compiled;
    const what = await fateOf(compiled, judge);
    ahead[slot] = prepare(todo[tried + slots], slot);
    record(mutant, what);
    const seconds = ((performance.now() - begun) / 1000).toFixed(1).padStart(5);
    console.error(`${what.fate.padEnd(8)} ${seconds} s  ${place(mutant)}: ${change(mutant)}`);
  }
  await Promise.all(ahead);
  judge.close();
  for (const mutant of wanted) {
    const known = found.get(keyOf(mutant));
    if (known?.fate !== 'survived' || known.hooks || explanation(mutant) !== undefined) continue;
    if (performance.now() > end) break;
    const directory = join(WORK, 'hooks');
    await compileIn(directory, programs.names, mutant);
    const fate = hooks(join(directory, 'redirect.bpf.o'));
    record(mutant, { fate, hooks: true, ...(fate === 'killed' && { test: AT_HOOKS.join() }) });
    console.error(`at the hooks: ${fate}  ${place(mutant)}: ${change(mutant)}`);
  }
  summary(tried, performance.now() - started);
  if (values.table) writeTable();
}

/** With these programs only; the sources as they are where there is no mutant. Undefined: clang refuses it. */
async function compileIn(
  directory: string,
  wanted: readonly string[],
  mutant?: Mutant,
): Promise<Map<string, string> | undefined> {
  for (const [file, source] of sources) {
    mkdirSync(dirname(join(directory, file)), { recursive: true });
    writeFileSync(join(directory, file), only(mutant?.file === file ? applied(source, mutant) : source, wanted));
  }
  const object = join(directory, 'redirect.bpf.o');
  if (!(await compile(join(directory, 'bpf/redirect.bpf.c'), object))) return undefined;
  return programHashes(object);
}

/** By set of programs: what clang makes of a function depends on who calls it. */
const originals = new Map<string, Promise<Map<string, string>>>();
function unchangedHashes(wanted: readonly string[]): Promise<Map<string, string>> {
  const key = wanted.join();
  const known = originals.get(key);
  if (known !== undefined) return known;
  const made = compileIn(join(WORK, `original-${originals.size}`), wanted).then((hashes) => {
    if (hashes === undefined) throw new Error('clang refuses the sources as they are');
    return hashes;
  });
  originals.set(key, made);
  return made;
}

async function fateOf({ mutant, changed, object }: Compiled, judge: Judge): Promise<Found> {
  if (changed === undefined) return { fate: 'not C' };
  if (changed.length === 0) return { fate: 'same' };
  const order = { object, changed, place: mutant.function };
  let verdict = await judge.judge(order);
  // Once more, with nothing that an earlier run may have left: then it was the change.
  if (verdict.fate === 'disturbed') {
    console.error(`once more: ${verdict.failure}`);
    judge.close();
    verdict = await judge.judge(order);
  }
  const { test, killer } = verdict;
  return { fate: verdict.fate === 'disturbed' ? 'killed' : verdict.fate, test, killer };
}

/** What BPF_PROG_TEST_RUN cannot show, for those that got that far: last, because it takes longest. */
function hooks(object: string): Fate {
  const { status } = spawnSync(
    process.execPath,
    ['node_modules/vitest/vitest.mjs', 'run', '--config', 'conformance/vitest.config.ts', '--bail=1', ...AT_HOOKS],
    { env: environment(object), stdio: 'ignore' },
  );
  return status === 0 ? 'survived' : 'killed';
}

function environment(object = ''): NodeJS.ProcessEnv {
  return {
    ...process.env,
    AMBIENT_REDIRECT_ADDON: join(ROOT, 'build/Release/ambient_redirect_faults.node'),
    AMBIENT_REDIRECT_OBJECT: object,
  };
}

/** A worker, and the next one when it has loaded enough programs: those that its own processes hold open stay loaded. */
class Judge {
  /** Fingerprints of its tests. */
  tests: ReadonlySet<string> = new Set();
  #worker: ChildProcess | undefined;
  #left = 0;

  /** Again with another worker where the first one fails for a reason of its own. */
  async judge(order: Order): Promise<Verdict> {
    try {
      return await this.#judge(order);
    } catch (error) {
      console.error(`again: ${error instanceof Error ? error.message : String(error)}`);
      this.close();
      return await this.#judge(order);
    }
  }

  async #judge(order: Order): Promise<Verdict> {
    if (!this.#worker?.connected || this.#left === 0) await this.#start();
    this.#left -= 1;
    this.#worker?.send(order);
    const verdict = await this.#answer<Verdict>();
    if (verdict.spent) this.close();
    return verdict;
  }

  async #start(): Promise<void> {
    this.close();
    this.#left = RUNS_OF_A_WORKER;
    this.#worker = fork(join(import.meta.dirname, 'worker.ts'), [join(WORK, `learned-${now.everything}.json`)], {
      execArgv: ['--import', join(import.meta.dirname, 'hooks.ts')],
      env: environment(),
    });
    this.tests = new Set((await this.#answer<Ready>()).tests);
  }

  #answer<T>(): Promise<T> {
    const worker = this.#worker;
    return new Promise((resolve, reject) => {
      const ended = (code: number | null) => reject(new Error(`the worker ended with ${code}`));
      worker?.once('exit', ended);
      worker?.once('message', (message) => {
        worker.off('exit', ended);
        resolve(message as T);
      });
    });
  }

  close(): void {
    if (this.#worker?.connected) this.#worker.disconnect();
    this.#worker = undefined;
  }
}

function summary(tried: number, ms: number): void {
  const counts = new Map<Fate, number>();
  let unexplained = 0;
  for (const mutant of wanted) {
    const fate = found.get(keyOf(mutant))?.fate;
    if (fate === undefined) continue;
    counts.set(fate, (counts.get(fate) ?? 0) + 1);
    if (fate !== 'survived') continue;
    const why = explanation(mutant);
    if (why === undefined) unexplained += 1;
    console.log(`${place(mutant)}: ${change(mutant)}\n    ${why ?? 'UNEXPLAINED'}`);
  }
  for (const one of explained) {
    if (all.some((mutant) => explains(one, mutant))) continue;
    unexplained += 1;
    console.log(`explained.json: no such change any more: ${JSON.stringify(one)}`);
  }
  const fates = [...counts].map(([fate, count]) => `${count} ${fate}`).join(', ');
  const open = wanted.length - [...counts.values()].reduce((sum, count) => sum + count, 0);
  console.log(`${wanted.length} mutants: ${fates}; ${open} not tried yet; ${unexplained} unexplained`);
  console.log(`${tried} tried now in ${(ms / 60_000).toFixed(1)} minutes`);
  if (unexplained > 0) process.exitCode = 1;
}

/** Of each reason a test that fails where the programs count another one in its place. */
function writeTable(): void {
  const table: Record<string, Record<string, string>> = {};
  for (const mutant of wanted) {
    const reason = reasonAt(mutant);
    const { fate, test } = found.get(keyOf(mutant)) ?? {};
    if (reason === undefined || fate !== 'killed' || test === undefined) continue;
    const rows = table[reason] ?? {};
    table[reason] = rows;
    rows[mutant.function] ??= test;
  }
  const sorted = Object.fromEntries(
    Object.entries(table)
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([reason, rows]) => [reason, Object.fromEntries(Object.entries(rows).sort(([a], [b]) => (a < b ? -1 : 1)))]),
  );
  writeFileSync(join(import.meta.dirname, 'reasons.json'), `${JSON.stringify(sorted, undefined, 2)}\n`);
}

/** The one that is changed; of those that stand in the map of exclusions the lookup is, which has no name for them. */
function reasonAt({ file, function: name, start, from }: Mutant): string | undefined {
  if (name === 'rule_for_port') return 'pass_excluded_port';
  if (name === 'excluded' && from.includes('*found')) return 'pass_excluded_cidr';
  return /^REASON_(\w+)/.exec(sources.get(file)?.slice(start) ?? '')?.[1]?.toLowerCase();
}

function explains(one: Explained, mutant: Mutant): boolean {
  if (one.file !== mutant.file || one.function !== mutant.function) return false;
  return (one.from ?? mutant.from) === mutant.from && (one.to ?? mutant.to) === mutant.to;
}

function explanation(mutant: Mutant): string | undefined {
  return explained.find((one) => explains(one, mutant))?.why;
}

function place({ file, line, function: name }: Mutant): string {
  return `${file}:${line} ${name}`;
}

function change({ from, to }: Mutant): string {
  return `${from}  =>  ${to}`;
}

function describe(mutant: Mutant): string {
  return `${place(mutant)}: ${change(mutant)} @${mutant.start}`;
}

function mixed(mutants: readonly Mutant[]): Mutant[] {
  const key = (mutant: Mutant) => createHash('sha256').update(describe(mutant)).digest('hex');
  return mutants
    .map((mutant) => ({ mutant, key: key(mutant) }))
    .sort((a, b) => rank(a.mutant) - rank(b.mutant) || (a.key < b.key ? -1 : 1))
    .map(({ mutant }) => mutant);
}

function rank({ text, constant }: Mutant): number {
  if (text.startsWith('REASON_')) return 0;
  return constant ? 2 : 1;
}

if (values.list) {
  for (const mutant of wanted) console.log(describe(mutant));
  console.log(`${wanted.length} of ${all.length}`);
} else await run();
