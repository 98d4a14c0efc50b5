// SPDX-License-Identifier: Apache-2.0
//
// In the place of vitest (hooks.ts) where a suite is run many times in one process: collects its tests when they are
// declared, and runs them until one fails. beforeAll is run once, before its scope's first test of the first run.

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
  /** What it runs; empty until it has been run once. */
  programs: Set<string>;
  /** Kills so far: those that find much come first. */
  kills: number;
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
function rows(declareOne: (name: string, body: () => void) => void) {
  return (table: readonly unknown[]) =>
    (name: string, body: Body): void => {
      table.forEach((row, index) => {
        const args = (Array.isArray(row) ? row : [row]) as never[];
        declareOne(`${name} [${index}]`, () => body(...args));
      });
    };
}

/** The value of the body matters: a test is over when its promise is. */
function collect(name: string, body: () => unknown): void {
  tests.push({ name: [...names, name].join(' > '), scope, body, programs: new Set(), kills: 0 });
}

export const describe = Object.assign(declare, { each: rows(declare) });
export const test = Object.assign(collect, {
  each: (table: readonly unknown[]) => (name: string, body: Body) => {
    table.forEach((row, index) => {
      const args = (Array.isArray(row) ? row : [row]) as never[];
      collect(`${name} [${index}]`, () => body(...args));
    });
  },
});

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

let current: Collected | undefined;

/** The test that is running runs this program. */
export function usesProgram(name: string): void {
  current?.programs.add(name);
}

/**
 * Runs what was collected, `prepare` before each test, the best killers first; tests that are known to run none of the
 * `changed` programs are left out. Returns the first failure, or undefined. Throws what is neither a mismatch nor `isKnown`.
 */
export async function runCollected(
  changed: readonly string[],
  prepare: () => void,
  isKnown: (error: unknown) => boolean,
): Promise<string | undefined> {
  const concerned = tests.filter(({ programs }) => programs.size === 0 || changed.some((one) => programs.has(one)));
  for (const one of concerned.sort((a, b) => b.kills - a.kills)) {
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
    } catch (error) {
      const message = `${one.name}: ${error instanceof Error ? error.message : String(error)}`;
      if (!(error instanceof Mismatch || isKnown(error))) throw new Error(message);
      one.kills += 1;
      return message;
    }
  }
  return undefined;
}
