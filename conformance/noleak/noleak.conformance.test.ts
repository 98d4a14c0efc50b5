// SPDX-License-Identifier: Apache-2.0
//
// The no-leak harness, short: one topology, ten pods churned, and the leaky builds that it must catch.
// AMBIENT_REDIRECT_LONG=1: every topology, more pods, every leaky build. AMBIENT_REDIRECT_SEED repeats a run.

import { describe, expect, test } from 'vitest';
import { executable, requireExecutable } from '../e2e/topology.ts';
import { clean, text, tryVariant } from './main.ts';
import { run } from './scenario.ts';
import { together, variants } from './variants.ts';

const long = process.env.AMBIENT_REDIRECT_LONG === '1';
const seed = Number(process.env.AMBIENT_REDIRECT_SEED ?? Date.now() % 1_000_000);
const say = (line: string) => process.stderr.write(`${line}\n`);

describe('no packet of an enrolled pod goes around the proxy (HAProxy)', () => {
  const topologies = [
    { primary: 'bridge', hook: 'tcx' },
    { primary: 'bridge', hook: 'clsact' },
    { primary: 'ptp', hook: 'tcx' },
    { primary: 'ptp', hook: 'clsact' },
  ] as const;
  test.each(long ? topologies : topologies.slice(0, 1))(
    '$primary, $hook: with the plugin and the proxy killed, pods churned, maps full',
    { timeout: 600_000 },
    async ({ primary, hook }) => {
      requireExecutable();
      const report = await run({ executable, primary, hook, churn: long ? 50 : 10, seed, say });
      expect(clean(report), `seed ${seed}\n${text(report).join('\n')}`).toBe(true);
    },
  );

  test('with maps of flows that are too small', { timeout: 600_000 }, async () => {
    requireExecutable();
    const options = {
      executable,
      primary: 'ptp',
      hook: 'clsact',
      churn: long ? 10 : 0,
      smallMaps: true,
      seed,
      say,
    } as const;
    const report = await run(options);
    expect(clean(report), `seed ${seed}\n${text(report).join('\n')}`).toBe(true);
  });
});

describe('the harness fails on a leaky build', () => {
  const quick = [
    together(['orphans-passed', 'two-tags-passed', 'short-fragment-passed', 'forged-sign-obeyed']),
    ...variants.filter(({ name }) => name === 'add-before-attach'),
  ];
  test.each(long ? variants : quick)('$name', { timeout: 600_000 }, async (variant) => {
    const { report, caught } = await tryVariant(variant, seed);
    expect(caught, `seed ${seed}\n${text(report).join('\n')}`).toBe(true);
  });
});
