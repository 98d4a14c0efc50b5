// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import {
  always,
  type Combination,
  endingOf,
  type Factor,
  factors,
  pairsOf,
  pairwise,
  product,
} from './combinations.ts';

const all = product();

test('the product has every combination once, and no position without a chained plugin', () => {
  expect(all).toHaveLength(2 * (1 + 5 * 2) * 5 * 2 * 2);
  expect(new Set(all.map((one) => JSON.stringify(one))).size).toBe(all.length);
});

test('the selection is of the product, and holds what is always wanted', () => {
  const known = new Set(all.map((one) => JSON.stringify(one)));
  const selection = pairwise(all, always);
  for (const one of selection) expect(known).toContain(JSON.stringify(one));
  expect(selection.slice(0, always.length)).toEqual(always);
  expect(selection.length).toBeLessThan(all.length / 10);
});

test('every two values occur together in the selection, but for a position of no plugin', () => {
  const selection = pairwise(all, always);
  const names = Object.keys(factors) as Factor[];
  const absent: string[] = [];
  for (const [index, first] of names.entries()) {
    for (const second of names.slice(index + 1)) {
      for (const a of factors[first]) {
        for (const b of factors[second]) {
          const has = (one: Combination) => one[first] === a && one[second] === b;
          if (!selection.some(has)) absent.push(`${first}=${a}, ${second}=${b}`);
        }
      }
    }
  }
  expect(absent).toEqual(['chained=none, position=before us']);
});

test('a pair that only one combination has brings that combination', () => {
  const [first, ...rest] = all as [Combination, ...Combination[]];
  const only = rest.filter((one) => one.primary !== first.primary);
  expect(pairwise([first, ...only]).map((one) => one.primary)).toContain(first.primary);
  expect(pairsOf(first)).toHaveLength(15);
});

test('what is refused and what is impossible', () => {
  const other = all.filter((one) => endingOf(one) !== 'redirected');
  expect(other.filter((one) => one.chained !== 'bandwidth' && one.foreign !== 'tcx behind')).toEqual([]);
  expect(other.filter((one) => one.hook === 'tcx').every((one) => endingOf(one) === 'impossible')).toBe(true);
  expect(other.filter((one) => one.hook === 'clsact').every((one) => endingOf(one) === 'refused')).toBe(true);
});
