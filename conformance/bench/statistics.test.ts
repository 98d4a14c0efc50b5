// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { generator, median, pairedRatio, quantile, shuffled, summary } from './statistics.ts';

test('quantiles lie between neighbours', () => {
  expect(median([3, 1, 2])).toBe(2);
  expect(median([4, 1, 2, 3])).toBe(2.5);
  expect(quantile([10, 20], 0.25)).toBe(12.5);
  expect(median([])).toBeNaN();
  expect(summary([5, 1, 3])).toEqual({ median: 3, min: 1, max: 5, count: 3 });
});

describe('order', () => {
  test('the same seed gives the same order, another one another', () => {
    const items = Array.from({ length: 20 }, (_, i) => i);
    const first = shuffled(items, generator(7));
    expect(shuffled(items, generator(7))).toEqual(first);
    expect(shuffled(items, generator(8))).not.toEqual(first);
    expect([...first].sort((a, b) => a - b)).toEqual(items);
  });

  test('every item comes to every place', () => {
    const random = generator(1);
    const places = new Set<string>();
    for (let i = 0; i < 200; i++) {
      for (const [place, item] of shuffled(['a', 'b', 'c'], random).entries()) places.add(`${item}${place}`);
    }
    expect(places.size).toBe(9);
  });
});

describe('ratio of pairs', () => {
  const pairs = (...ratios: number[]): [number, number][] => ratios.map((ratio) => [ratio * 100, 100]);

  test('all pairs above 1: higher, and the interval holds the median', () => {
    const result = pairedRatio(pairs(1.2, 1.3, 1.25, 1.4, 1.1, 1.22));
    expect(result).toMatchObject({ verdict: 'higher', pairs: 6 });
    expect(result.ratio).toBeCloseTo(1.235);
    expect(result.low).toBeGreaterThan(1);
    expect(result.low).toBeLessThanOrEqual(result.ratio);
    expect(result.high).toBeGreaterThanOrEqual(result.ratio);
  });

  test('all pairs below 1: lower', () => {
    expect(pairedRatio(pairs(0.8, 0.9, 0.7, 0.85, 0.95, 0.9)).verdict).toBe('lower');
  });

  test('pairs on both sides: no difference shown, however good the median looks', () => {
    expect(pairedRatio(pairs(1.5, 1.6, 0.9, 1.4, 0.8, 1.3)).verdict).toBe('no difference shown');
  });

  test('five pairs are too few, even if they agree', () => {
    expect(pairedRatio(pairs(1.5, 1.5, 1.5, 1.5, 1.5)).verdict).toBe('too few pairs');
  });

  test('a pair without a value does not count', () => {
    expect(pairedRatio([...pairs(1.1), [0, 100], [Number.NaN, 100]]).pairs).toBe(1);
    expect(pairedRatio([])).toMatchObject({ pairs: 0, verdict: 'too few pairs' });
  });
});
