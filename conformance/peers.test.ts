// SPDX-License-Identifier: Apache-2.0
// peers.md promises a test for each defect of the peers, or says why there is none. A promise that no test keeps fails.

import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { readRows, unknownTests } from './promises.ts';

const ROOT = join(import.meta.dirname, '..');
const ROWS = 45;

const rows = readRows('peers.md', /^\d+$/);

test('every row is there once', () => {
  expect(rows.map(({ id }) => id)).toEqual(Array.from({ length: ROWS }, (_, i) => String(i + 1)));
});

describe.each(rows)('row $id', (row) => {
  const { cells, tests, reason } = row;
  test('says what goes wrong, what is done here, and what shows it', () => {
    expect(cells.length).toBe(4);
    for (const cell of cells) expect(cell.length).toBeGreaterThan(0);
    expect({ tests: tests.length > 0, reason: reason !== undefined }).toEqual({
      tests: reason === undefined,
      reason: reason !== undefined,
    });
  });

  test('names tests that exist', () => {
    expect(unknownTests(row)).toEqual([]);
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
