// SPDX-License-Identifier: Apache-2.0

import { expect, test } from 'vitest';
import { formatTable } from './table.ts';
import { printable } from './terminal.ts';

test('columns are as wide as their widest cell, colour not counted, and lines end where their text does', () => {
  const table = formatTable(
    ['NAME', 'STATE', 'NOTE'],
    [
      ['a-long-name', '\u001b[32mright\u001b[39m', ''],
      ['b', 'x', 'why'],
    ],
  );
  expect(table).toBe(
    ['NAME         STATE  NOTE', 'a-long-name  \u001b[32mright\u001b[39m', 'b            x      why', ''].join('\n'),
  );
});

test('control characters in a name do not reach the terminal', () => {
  expect(printable('pod\u001b[2Jname\n')).toBe('pod\\x1b[2Jname\\x0a');
});
