// SPDX-License-Identifier: Apache-2.0
// Tables in Markdown whose last column names tests, as `FILE: TITLE` with the title as it stands in the source, or says
// "n/a:" and why there can be none.

import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

const ROOT = join(import.meta.dirname, '..');

export interface Row {
  /** The first column. */
  id: string;
  cells: string[];
  /** "FILE: TITLE" */
  tests: string[];
  /** "n/a: REASON" */
  reason: string | undefined;
}

/** Of all tables of a file below conformance/; `id`: what the first column of a row is like. */
export function readRows(file: string, id: RegExp): Row[] {
  return readFileSync(join(import.meta.dirname, file), 'utf8')
    .split('\n')
    .filter((line) => line.startsWith('|'))
    .map((line) => {
      const cells = line
        .split(/(?<!\\)\|/)
        .slice(1, -1)
        .map((cell) => cell.trim());
      const shown = cells.at(-1) ?? '';
      return {
        id: cells[0] ?? '',
        cells,
        tests: [...shown.matchAll(/`([^`]+)`/g)].map(([, test]) => test ?? ''),
        reason: /^n\/a: (.+)$/.exec(shown)?.[1],
      };
    })
    .filter((row) => id.test(row.id));
}

/**
 * Titles as they stand in the source: of tests and groups, and of rows of tables that give a test its title, or its name
 * a part of it.
 */
export function titlesOf(source: string): Set<string> {
  const places = [
    // test('…'  describe('…'  test.each(hooks)('…'  test.each<[…]>([ … ])('…'
    /(?:\b(?:test|describe)(?:\.each\([^\n]*\))?|\))\(\s*(['"`])((?:\\.|(?!\1).)+)\1,/g,
    // ['…', { … }],  of a table
    /^\s*\[\s*(['"])((?:\\.|(?!\1).)+)\1,/gm,
    // name: '…',  of a table
    /^\s*\{?\s*name: (['"])((?:\\.|(?!\1).)+)\1,/gm,
  ];
  return new Set(
    places.flatMap((place) => [...source.matchAll(place)].map(([, , title]) => (title ?? '').replace(/\\(.)/g, '$1'))),
  );
}

/** Those that no file has. */
export function unknownTests({ tests }: Row): string[] {
  return tests.filter((id) => {
    const [, file = '', title = ''] = /^(\S+\.ts): (.+)$/.exec(id) ?? [];
    const path = join(ROOT, file);
    return !existsSync(path) || !titlesOf(readFileSync(path, 'utf8')).has(title);
  });
}
