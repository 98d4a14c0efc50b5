// SPDX-License-Identifier: Apache-2.0

import { expect, test } from 'vitest';
import { applied, mutantsOf } from './mutants.ts';

const SOURCE = `#define LIMIT 5
/* if (a == b) */
struct s { __u8 bytes[16]; };

static __always_inline int first(int a, int b)
{
	__u8 macs[12];
	int i = 0; // 1 == 1

	if (a == 3 && !b)
		return drop(r, REASON_TWO);
	if (a < b)
		return "7 == 7"[i];
	return a ? 1 : b->c;
}

int x = 4 == 4;
`;

const mutants = mutantsOf('f.h', SOURCE, ['REASON_ONE', 'REASON_TWO', 'REASON_THREE']);

test('conditions, comparisons, numbers and reasons of function bodies, and nothing else', () => {
  expect(mutants.map(({ line, from, to }) => `${line}: ${from} => ${to}`)).toEqual([
    '10: if (a == 3 && !b) => if (!(a == 3 && !b))',
    '10: if (a == 3 && !b) => if (a != 3 && !b)',
    '10: if (a == 3 && !b) => if (a == (3 + 1) && !b)',
    '10: if (a == 3 && !b) => if (a == 3 || !b)',
    '10: if (a == 3 && !b) => if (a == 3 && b)',
    '11: return drop(r, REASON_TWO); => return drop(r, REASON_THREE);',
    '12: if (a < b) => if (a <= b)',
    '14: return a ? 1 : b->c; => return !(a) ? 1 : b->c;',
    '14: return a ? 1 : b->c; => return a ? (1 + 1) : b->c;',
  ]);
  expect(mutants.every((mutant) => mutant.function === 'first' && mutant.file === 'f.h')).toBe(true);
  expect(mutants.filter(({ constant }) => constant).map(({ line }) => line)).toEqual([10, 14]);
});

test('each is one change of the source', () => {
  for (const mutant of mutants) {
    const changed = applied(SOURCE, mutant).split('\n');
    const differing = SOURCE.split('\n').filter((line, index) => line !== changed[index]);
    expect(differing.map((line) => line.trim())).toEqual([mutant.from]);
  }
});
