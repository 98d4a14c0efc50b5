// SPDX-License-Identifier: Apache-2.0
//
// In the place of vitest (hooks.ts) where a suite is run many times in one process: collects its tests when they are
// declared, and runs them until one fails. beforeAll is run once, before its scope's first test of the first run.

import { createHash } from 'node:crypto';
import { isDeepStrictEqual } from 'node:util';

type Body = (...args: never[]) => unknown;

interface Scope {
  before: { body: () => unknown; done: boolean }[];
  parent: Scope | undefined;
}

interface Collected {
  name: string;
  scope: Scope;
  body: () => unknown;
  /** What it runs, and whether that is all: it has passed once. */
  programs: Set<string>;
  complete: boolean;
  /** Of its name and its code: what it calls is not in it. */
  fingerprint: string;
  /** Kills so far, in all and by function that was changed: those that find much come first. */
  kills: number;
  killsIn: Map<string, number>;
}

/** The test that failed, and why. */
export interface Failure {
  test: string;
  fingerprint: string;
  error: unknown;
  /** By an expect(). */
  mismatch: boolean;
}

const tests: Collected[] = [];
let scope: Scope = { before: [], parent: undefined };
const names: string[] = [];

function declare(name: string, body: () => void): void {
  const outer = scope;
  scope = { before: [], parent: outer };
  names.push(name);
  body();
  names.pop();
  scope = outer;
}

/** One declaration for each row; an array's elements are the arguments. */
function rows(declareOne: (name: string, body: () => void, code: string) => void) {
  return (table: readonly unknown[]) =>
    (name: string, body: Body): void => {
      table.forEach((row, index) => {
        const args = (Array.isArray(row) ? row : [row]) as never[];
        declareOne(`${name} [${index}]`, () => body(...args), String(body));
      });
    };
}

/** The value of the body matters: a test is over when its promise is. */
function collect(last: string, body: () => unknown, code = String(body)): void {
  const name = [...names, last].join(' > ');
  const fingerprint = createHash('sha256').update(`${name}\n${code}`).digest('hex').slice(0, 16);
  tests.push({ name, scope, body, fingerprint, programs: new Set(), complete: false, kills: 0, killsIn: new Map() });
}

export const describe = Object.assign(declare, { each: rows(declare) });
export const test = Object.assign(collect, { each: rows(collect) });

/** Fingerprints of all tests. */
export function collected(): string[] {
  return tests.map(({ fingerprint }) => fingerprint);
}

export function beforeAll(body: () => unknown): void {
  scope.before.push({ body, done: false });
}

/** What vitest's toEqual takes for equal: a property that is undefined is as good as none. */
function defined(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(defined);
  if (value === null || typeof value !== 'object' || ArrayBuffer.isView(value)) return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, one]) => one !== undefined)
      .map(([key, one]) => [key, defined(one)]),
  );
}

/** What expect() throws: all else that fails is the test's own surroundings, which no change of a program reaches. */
class Mismatch extends Error {}

export function expect(actual: unknown) {
  const must = (holds: boolean, how: string, wanted: unknown) => {
    if (!holds) throw new Mismatch(`expected ${show(actual)} ${how} ${show(wanted)}`);
  };
  return {
    toBe: (wanted: unknown) => must(Object.is(actual, wanted), 'to be', wanted),
    toEqual: (wanted: unknown) => must(isDeepStrictEqual(defined(actual), defined(wanted)), 'to equal', wanted),
  };
}

function show(value: unknown): string {
  return JSON.stringify(value, (_, one) => (typeof one === 'bigint' ? `${one}n` : one));
}

/** What is known of the tests, for the next process. */
export interface Learned {
  [fingerprint: string]: { programs: string[]; complete: boolean; kills: number; killsIn: [string, number][] };
}

export function learned(): Learned {
  const entries = tests.map(({ fingerprint, programs, complete, kills, killsIn }) => [
    fingerprint,
    { programs: [...programs], complete, kills, killsIn: [...killsIn] },
  ]);
  return Object.fromEntries(entries) as Learned;
}

export function learn(from: Learned): void {
  for (const one of tests) {
    const known = from[one.fingerprint];
    if (known === undefined) continue;
    one.programs = new Set(known.programs);
    one.complete = known.complete;
    one.kills = known.kills;
    one.killsIn = new Map(known.killsIn);
  }
}

let current: Collected | undefined;

/** The test that is running runs this program. */
export function usesProgram(name: string): void {
  current?.programs.add(name);
}

/**
 * Runs what was collected, `prepare` before each test, the best killers first; tests that are known to run none of the
 * `changed` programs are left out. `place`: the function that was changed. Returns the first failure, or undefined.
 */
export async function runCollected(
  { changed, place }: { changed: readonly string[]; place: string },
  prepare: () => void,
): Promise<Failure | undefined> {
  const concerned = tests.filter(({ programs, complete }) => !complete || changed.some((one) => programs.has(one)));
  const here = (one: Collected) => one.killsIn.get(place) ?? 0;
  for (const one of concerned.sort((a, b) => here(b) - here(a) || b.kills - a.kills)) {
    const failure = await attempt(one, prepare);
    if (failure === undefined) continue;
    if (failure.mismatch) {
      one.kills += 1;
      one.killsIn.set(place, here(one) + 1);
    }
    return failure;
  }
  return undefined;
}

/** Runs the test of this fingerprint once more. */
export async function runAgain(fingerprint: string, prepare: () => void): Promise<Failure | undefined> {
  const one = tests.find((test) => test.fingerprint === fingerprint);
  return one && (await attempt(one, prepare));
}

async function attempt(one: Collected, prepare: () => void): Promise<Failure | undefined> {
  current = one;
  try {
    for (let outer: Scope | undefined = one.scope; outer !== undefined; outer = outer.parent) {
      for (const before of outer.before) {
        if (before.done) continue;
        before.done = true;
        await before.body();
      }
    }
    prepare();
    await one.body();
    one.complete = true;
    return undefined;
  } catch (error) {
    return { test: one.name, fingerprint: one.fingerprint, error, mismatch: error instanceof Mismatch };
  }
}
