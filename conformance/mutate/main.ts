// SPDX-License-Identifier: Apache-2.0
// npm run mutate:bpf [-- --minutes N] [--only TEXT] [--list]: changes one thing in bpf/ at a time, and runs the BPF-level
// suite (bpf/test) on the result. Each change that no test notices is printed with its place. Exit code 1 for one that
// explained.json does not explain. What was found out is kept in build/mutate/, so that a run goes on where the last
// one ended; it begins anew when the sources or the tests have changed. Conditions, comparisons and reasons are tried
// before numbers, in an order that is mixed but always the same, so that any part of a run is a fair sample.
//
// A mutant needs no new addon: that of the fault injection takes the programs from $AMBIENT_REDIRECT_OBJECT. Nor a new
// vitest: the tests of bpf/test/suite.ts are run in one process (worker.ts), hooks.test.ts only on what they let live.

import { type ChildProcess, fork, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { appendFileSync, existsSync, globSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { parseArgs } from 'node:util';
import { applied, type Mutant, mutantsOf } from './mutants.ts';
import { compile, programHashes } from './object.ts';
import type { Order, Verdict } from './worker.ts';

/**
 * killed: a test failed. refused: the verifier does not load it. same: clang makes the same code of it. not C: clang
 * refuses it. survived: every test passed.
 */
type Fate = 'killed' | 'refused' | 'same' | 'not C' | 'survived';

/** A survivor that may survive: found by file, function and both forms of the line, because line numbers move. */
interface Explained {
  file: string;
  function: string;
  from: string;
  to: string;
  why: string;
}

const ROOT = dirname(dirname(import.meta.dirname));
const WORK = join(ROOT, 'build/mutate');
const AT_HOOKS = ['bpf/test/hooks.test.ts'];
const RUNS_OF_A_WORKER = 80;

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '600' },
    only: { type: 'string', default: '' },
    list: { type: 'boolean', default: false },
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

const digest = createHash('sha256');
for (const file of [...sources.keys(), ...globSync('bpf/test/*'), ...globSync('conformance/mutate/*.ts')].sort()) {
  digest.update(readFileSync(file));
}
mkdirSync(WORK, { recursive: true });
const journal = join(WORK, `${digest.digest('hex').slice(0, 16)}.jsonl`);
const known = new Map<string, Fate>();
/** Survivors of suite.ts that hooks.test.ts was run on. */
const atHooks = new Set<string>();
if (existsSync(journal)) {
  for (const line of readFileSync(journal, 'utf8').trimEnd().split('\n')) {
    const { id, fate, hooks } = JSON.parse(line) as { id: string; fate: Fate; hooks?: boolean };
    known.set(id, fate);
    if (hooks) atHooks.add(id);
  }
}

interface Compiled {
  mutant: Mutant;
  /** Undefined: clang refuses it. */
  changed: string[] | undefined;
  object: string;
  slot: number;
}

async function run(): Promise<void> {
  const original = await compileIn(0, undefined);
  const judge = new Judge();
  const started = performance.now();
  const end = started + Number(values.minutes) * 60_000;
  const unchanged = await judge.judge({ object: join(WORK, '0', 'redirect.bpf.o'), changed: [] });
  if (unchanged.fate !== 'survived') throw new Error(`the suite fails without any change: ${unchanged.failure}`);
  console.error(`${wanted.length} mutants; the suite alone: ${((performance.now() - started) / 1000).toFixed(1)} s`);

  const todo = wanted.filter((mutant) => !known.has(describe(mutant)));
  const prepare = async (mutant: Mutant | undefined, slot: number): Promise<Compiled | undefined> => {
    if (mutant === undefined || original === undefined) return undefined;
    const hashes = await compileIn(slot, mutant);
    const changed = hashes && [...hashes].filter(([name, hash]) => hash !== original.get(name)).map(([name]) => name);
    return { mutant, changed, object: join(WORK, String(slot), 'redirect.bpf.o'), slot };
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
    const fate = await fateOf(compiled, judge);
    ahead[slot] = prepare(todo[tried + slots], slot);
    const id = describe(mutant);
    known.set(id, fate);
    appendFileSync(journal, `${JSON.stringify({ id, fate })}\n`);
    const seconds = ((performance.now() - begun) / 1000).toFixed(1).padStart(5);
    console.error(`${fate.padEnd(8)} ${seconds} s  ${place(mutant)}: ${change(mutant)}`);
  }
  await Promise.all(ahead);
  judge.close();
  for (const mutant of wanted) {
    const id = describe(mutant);
    if (known.get(id) !== 'survived' || atHooks.has(id) || explanation(mutant) !== undefined) continue;
    if (performance.now() > end) break;
    await compileIn(0, mutant);
    const fate = hooks(join(WORK, '0', 'redirect.bpf.o'));
    known.set(id, fate);
    atHooks.add(id);
    appendFileSync(journal, `${JSON.stringify({ id, fate, hooks: true })}\n`);
    console.error(`at the hooks: ${fate}  ${place(mutant)}: ${change(mutant)}`);
  }
  summary(tried, performance.now() - started);
}

/** In a directory of its own; the unchanged sources where there is no mutant. */
async function compileIn(slot: number, mutant: Mutant | undefined): Promise<Map<string, string> | undefined> {
  const directory = join(WORK, String(slot));
  for (const [file, source] of sources) {
    mkdirSync(dirname(join(directory, file)), { recursive: true });
    writeFileSync(join(directory, file), mutant?.file === file ? applied(source, mutant) : source);
  }
  const hashes = new Map<string, string>();
  for (const file of sources.keys()) {
    if (!file.endsWith('.bpf.c')) continue;
    const object = join(directory, basename(file).replace(/c$/, 'o'));
    if (!(await compile(join(directory, file), object))) return undefined;
    for (const [program, hash] of programHashes(object)) hashes.set(program, hash);
  }
  return hashes;
}

async function fateOf({ changed, object }: Compiled, judge: Judge): Promise<Fate> {
  if (changed === undefined) return 'not C';
  if (changed.length === 0) return 'same';
  const { fate } = await judge.judge({ object, changed });
  return fate;
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
    const worker = this.#worker;
    worker?.send(order);
    return await this.#answer<Verdict>();
  }

  async #start(): Promise<void> {
    this.close();
    this.#left = RUNS_OF_A_WORKER;
    this.#worker = fork(join(import.meta.dirname, 'worker.ts'), [], {
      execArgv: ['--import', join(import.meta.dirname, 'hooks.ts')],
      env: environment(),
    });
    await this.#answer<string>();
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
    const fate = known.get(describe(mutant));
    if (fate === undefined) continue;
    counts.set(fate, (counts.get(fate) ?? 0) + 1);
    if (fate !== 'survived') continue;
    const why = explanation(mutant);
    if (why === undefined) unexplained += 1;
    console.log(`${place(mutant)}: ${change(mutant)}\n    ${why ?? 'UNEXPLAINED'}`);
  }
  for (const { file, from, to } of explained) {
    if (!all.some((mutant) => mutant.file === file && mutant.from === from && mutant.to === to)) {
      unexplained += 1;
      console.log(`explained.json: no such change any more: ${file}: ${from} => ${to}`);
    }
  }
  const known_ = [...counts].map(([fate, count]) => `${count} ${fate}`).join(', ');
  const open = wanted.length - [...counts.values()].reduce((sum, count) => sum + count, 0);
  console.log(`${wanted.length} mutants: ${known_}; ${open} not tried yet; ${unexplained} unexplained`);
  console.log(`${tried} tried now in ${(ms / 60_000).toFixed(1)} minutes`);
  if (unexplained > 0) process.exitCode = 1;
}

function explanation({ file, function: name, from, to }: Mutant): string | undefined {
  return explained.find((one) => one.file === file && one.function === name && one.from === from && one.to === to)?.why;
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
    .sort((a, b) => Number(a.mutant.constant) - Number(b.mutant.constant) || (a.key < b.key ? -1 : 1))
    .map(({ mutant }) => mutant);
}

if (values.list) {
  for (const mutant of wanted) console.log(describe(mutant));
  console.log(`${wanted.length} of ${all.length}`);
} else await run();
