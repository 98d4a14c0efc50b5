// SPDX-License-Identifier: Apache-2.0
// invariants.md names, for each thing that must hold and for each way that a packet takes, tests that fail without it.

import { describe, expect, test } from 'vitest';
import { readRows, titlesOf, unknownTests } from './promises.ts';

const INVARIANTS = 8;
const PATHS = 15;

const rows = readRows('invariants.md', /^[IP]\d+$/);

test('every row is there once', () => {
  const numbered = (letter: string, length: number) => Array.from({ length }, (_, i) => `${letter}${i + 1}`);
  expect(rows.map(({ id }) => id)).toEqual([...numbered('I', INVARIANTS), ...numbered('P', PATHS)]);
});

describe.each(rows)('$id', (row) => {
  test('says what holds, and names tests that exist', () => {
    expect(row.cells.length).toBe(3);
    for (const cell of row.cells) expect(cell.length).toBeGreaterThan(0);
    expect(row.tests.length).toBeGreaterThan(0);
    expect(unknownTests(row)).toEqual([]);
  });
});

describe('the reader of titles', () => {
  const titles = titlesOf(
    "test('a', () => {\n  describe.each(hooks)(\"b 'c'\", (x) => {\n test.each([1, 2])('d %i', async () => {\n  ['e', { f: 'g' }],\n  h('i');\n const j = 'k';\n])('l', (m) => {\n  name: 'n',\n",
  );
  test('knows titles from other text', () => {
    expect([...titles].sort()).toEqual(['a', "b 'c'", 'd %i', 'e', 'l', 'n']);
  });
});
