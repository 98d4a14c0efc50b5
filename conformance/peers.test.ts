// SPDX-License-Identifier: Apache-2.0
// peers.md promises a test for each defect of the peers, or says why there is none. A promise that no test keeps fails.

import { existsSync, globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';

const ROOT = join(import.meta.dirname, '..');
const ROWS = 45;

interface Row {
  number: number;
  cells: string[];
  /** "FILE: TITLE" */
  tests: string[];
  /** "n/a: REASON" */
  reason: string | undefined;
}

function readRows(text: string): Row[] {
  return text
    .split('\n')
    .filter((line) => /^\| *\d+ *\|/.test(line))
    .map((line) => {
      const cells = line
        .split(/(?<!\\)\|/)
        .slice(1, -1)
        .map((cell) => cell.trim());
      const shown = cells.at(-1) ?? '';
      return {
        number: Number(cells[0]),
        cells,
        tests: [...shown.matchAll(/`([^`]+)`/g)].map(([, id]) => id ?? ''),
        reason: /^n\/a: (.+)$/.exec(shown)?.[1],
      };
    });
}

/** Titles as they stand in the source: of tests and groups, and of rows of tables that give a test its title. */
function titlesOf(source: string): Set<string> {
  const places = [
    // test('…'  describe('…'  test.each(hooks)('…'  test.each<[…]>([ … ])('…'
    /(?:\b(?:test|describe)(?:\.each\([^\n]*\))?|\))\(\s*(['"`])((?:\\.|(?!\1).)+)\1,/g,
    // ['…', { … }],  of a table
    /^\s*\[\s*(['"])((?:\\.|(?!\1).)+)\1,/gm,
  ];
  return new Set(
    places.flatMap((place) => [...source.matchAll(place)].map(([, , title]) => (title ?? '').replace(/\\(.)/g, '$1'))),
  );
}

const rows = readRows(readFileSync(join(ROOT, 'conformance/peers.md'), 'utf8'));

test('every row is there once', () => {
  expect(rows.map(({ number }) => number)).toEqual(Array.from({ length: ROWS }, (_, i) => i + 1));
});

describe.each(rows)('row $number', ({ cells, tests, reason }) => {
  test('says what goes wrong, what is done here, and what shows it', () => {
    expect(cells.length).toBe(4);
    for (const cell of cells) expect(cell.length).toBeGreaterThan(0);
    expect({ tests: tests.length > 0, reason: reason !== undefined }).toEqual({
      tests: reason === undefined,
      reason: reason !== undefined,
    });
  });

  test('names tests that exist', () => {
    const unknown = tests.filter((id) => {
      const [, file = '', title = ''] = /^(\S+\.test\.ts): (.+)$/.exec(id) ?? [];
      const path = join(ROOT, file);
      return !existsSync(path) || !titlesOf(readFileSync(path, 'utf8')).has(title);
    });
    expect(unknown).toEqual([]);
  });
});

describe('the reader of titles', () => {
  const titles = titlesOf(
    "test('a', () => {\n  describe.each(hooks)(\"b 'c'\", (x) => {\n test.each([1, 2])('d %i', async () => {\n  ['e', { f: 'g' }],\n  h('i');\n const j = 'k';\n])('l', (m) => {",
  );
  test('knows titles from other text', () => {
    expect([...titles].sort()).toEqual(['a', "b 'c'", 'd %i', 'e', 'l']);
  });
});

test('every file of bpf/ that becomes part of the kernel is under both licences', () => {
  const files = globSync('bpf/*.{c,h}', { cwd: ROOT });
  expect(files.length).toBeGreaterThan(3);
  const others = files.filter(
    (file) =>
      !/^\/[/*] SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause\b/.test(readFileSync(join(ROOT, file), 'utf8')),
  );
  expect(others).toEqual([]);
});
