// SPDX-License-Identifier: Apache-2.0
// Medians, ratios of paired runs, and how sure they are.

/** A generator of its own, so that an order or an interval can be had again: Mulberry32. Numbers in [0, 1). */
export function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A new list in random order (Fisher and Yates). */
export function shuffled<T>(items: readonly T[], random: () => number): T[] {
  const result = [...items];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [result[i], result[j]] = [result[j] as T, result[i] as T];
  }
  return result;
}

export function median(values: readonly number[]): number {
  return quantile(values, 0.5);
}

/** Linear interpolation between the neighbours; NaN of nothing. */
export function quantile(values: readonly number[], q: number): number {
  if (values.length === 0) return Number.NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const position = (sorted.length - 1) * q;
  const below = sorted[Math.floor(position)] as number;
  const above = sorted[Math.ceil(position)] as number;
  return below + (above - below) * (position - Math.floor(position));
}

export interface Summary {
  median: number;
  min: number;
  max: number;
  count: number;
}

export function summary(values: readonly number[]): Summary {
  return { median: median(values), min: Math.min(...values), max: Math.max(...values), count: values.length };
}

export interface Ratio {
  /** Median of the pairs' ratios. */
  ratio: number;
  /** 95 % interval of that median: percentile bootstrap over the pairs. */
  low: number;
  high: number;
  pairs: number;
  verdict: 'higher' | 'lower' | 'no difference shown' | 'too few pairs';
}

/**
 * With so few pairs chance alone puts all of them on one side too often: of five pairs in 1 of 16 cases, of six in 1 of
 * 32 (sign test, both sides).
 */
export const FEWEST_PAIRS = 6;
const RESAMPLES = 10_000;

/** Of values that were measured right after each other: [subject, baseline]. */
export function pairedRatio(pairs: readonly (readonly [number, number])[]): Ratio {
  const ratios = pairs.filter(([a, b]) => a > 0 && b > 0).map(([a, b]) => a / b);
  const count = ratios.length;
  if (count === 0) return { ratio: Number.NaN, low: Number.NaN, high: Number.NaN, pairs: 0, verdict: 'too few pairs' };
  const random = generator(count);
  const medians = Array.from({ length: RESAMPLES }, () =>
    median(Array.from({ length: count }, () => ratios[Math.floor(random() * count)] as number)),
  );
  const low = quantile(medians, 0.025);
  const high = quantile(medians, 0.975);
  const verdict =
    count < FEWEST_PAIRS ? 'too few pairs' : low > 1 ? 'higher' : high < 1 ? 'lower' : 'no difference shown';
  return { ratio: median(ratios), low, high, pairs: count, verdict };
}
