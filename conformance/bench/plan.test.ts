// SPDX-License-Identifier: Apache-2.0
import { appendFileSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { Testbed } from '../netns.ts';
import { AIMS, COMPARISONS, compare, MEASURES, pairsOf, reached } from './measures.ts';
import { cells, PROFILES, stepKey, steps } from './plan.ts';
import { svg } from './plots.ts';
import { Progress } from './progress.ts';
import { plots, type Result, report } from './report.ts';
import { type Run, readRuns } from './run.ts';
import { publish } from './traffic.ts';
import { MODES } from './world.ts';

const programs = { peer: '/peer', fortio: '/fortio' };

describe.each(Object.values(PROFILES))('profile $name', (profile) => {
  const all = cells(profile, programs);
  const order = steps(profile, all, 1);

  test('every cell has every mode once in each round and repeat, one right after the other', () => {
    expect(new Set(all.map(({ name }) => name)).size).toBe(all.length);
    for (let at = 0; at < order.length; ) {
      const first = order[at];
      if (first === undefined) throw new Error('no step');
      const block = order.slice(at, at + first.cell.modes.length);
      expect(new Set(block.map(({ mode }) => mode))).toEqual(new Set(first.cell.modes));
      for (const { cell, round, repeat } of block) {
        expect([cell, round, repeat]).toEqual([first.cell, first.round, first.repeat]);
      }
      at += block.length;
    }
    const keys = order.map((step) => stepKey({ ...step, cell: step.cell.name, mode: step.mode.name }));
    expect(new Set(keys).size).toBe(keys.length);
  });

  test('the order of the modes differs from cell to cell, and comes again with the seed', () => {
    const names = (seed: number) => steps(profile, all, seed).map(({ cell, mode }) => `${cell.name} ${mode.name}`);
    expect(names(1)).toEqual(names(1));
    expect(names(1)).not.toEqual(names(2));
    const firsts = order.filter(({ place }) => place === 0).map(({ mode }) => mode.name);
    expect(new Set(firsts).size).toBeGreaterThan(1);
  });

  test('every cell is in a measure', () => {
    for (const { name } of all)
      expect(
        MEASURES.some((measure) => measure.cells.test(name)),
        name,
      ).toBe(true);
  });
});

test('the loads of a profile fit into its time on a machine with nothing else to do', () => {
  const seconds = ({ name }: (typeof PROFILES)[keyof typeof PROFILES]) => {
    const profile = PROFILES[name];
    return steps(profile, cells(profile, programs), 1).reduce((sum, { cell }) => sum + cell.load.seconds, 0);
  };
  expect(seconds(PROFILES.quick)).toBeLessThan(150);
  expect(seconds(PROFILES.default)).toBeLessThan(1800);
});

test('without fortio, wrk takes its place', () => {
  const names = cells(PROFILES.quick, { ...programs, fortio: undefined }).map(({ name }) => name);
  expect(names).toEqual(expect.arrayContaining(['wrk-1-v4', 'wrk-64-v4']));
  expect(names.filter((name) => name.startsWith('fortio'))).toEqual([]);
});

test('comparisons and aims name modes and measures that there are', () => {
  const names = MODES.map(({ name }) => name);
  for (const name of COMPARISONS.flat()) expect(names).toContain(name);
  for (const { subject, baseline, measure } of AIMS) {
    expect(names).toEqual(expect.arrayContaining([subject, baseline]));
    expect(MEASURES.map(({ title }) => title)).toContain(measure);
  }
});

test('an aim is decided where the whole interval is on one side of it', () => {
  const ratio = (low: number, high: number, pairs = 6) => ({ ratio: (low + high) / 2, low, high, pairs });
  const of = (low: number, high: number, bound: { least?: number; most?: number }, pairs?: number) =>
    reached({ ...ratio(low, high, pairs), verdict: 'higher' }, bound);
  expect(of(1.3, 1.5, { least: 1.3 })).toBe('reached');
  expect(of(1.1, 1.2, { least: 1.3 })).toBe('missed');
  expect(of(1.2, 1.5, { least: 1.3 })).toBe('not decided');
  expect(of(0.8, 1, { most: 1 })).toBe('reached');
  expect(of(1.01, 1.2, { most: 1 })).toBe('missed');
  expect(of(0.9, 1.2, { most: 1 })).toBe('not decided');
  expect(of(1.4, 1.5, { least: 1.3 }, 5)).toBe('too few pairs');
});

/** `qps` of each mode, with everything else the same. */
function runsOf(cell: string, qps: Record<string, (round: number) => number>): Run[] {
  return Object.entries(qps).flatMap(([mode, value]) =>
    Array.from({ length: 6 }, (_, round) => ({
      round,
      repeat: 0,
      cell,
      mode,
      place: 0,
      at: '2026-01-01T00:00:00Z',
      metrics: { qps: value(round), p50: 1e6 / value(round) },
      units: 1,
      seconds: 1,
      processor: { busy: 1, interrupts: 0, stolen: 0 },
    })),
  );
}

const runs = runsOf('fortio-max-64-v4', {
  tcx: (round) => 1300 + 10 * round,
  iptables: (round) => 1000 + 10 * round,
  clsact: (round) => (round % 2 ? 1400 : 600),
});

describe('comparison', () => {
  const of = (subject: string, metric: string) =>
    compare(runs).find(
      (one) => one.subject === subject && one.baseline === 'iptables' && one.measure.metric === metric,
    );

  test('pairs are of one round; an invalid run takes its pair away', () => {
    const measure = { cells: /^fortio-max/, metric: 'qps' };
    expect(pairsOf(runs, measure, 'tcx', 'iptables')[2]).toEqual([1320, 1020]);
    const broken = runs.map((run, i) => (i === 2 ? { ...run, invalid: 'went elsewhere' } : run));
    expect(pairsOf(broken, measure, 'tcx', 'iptables')).toHaveLength(5);
  });

  test('more requests and less latency are better', () => {
    expect(of('tcx', 'qps')).toMatchObject({ verdict: 'better' });
    expect(of('tcx', 'p50')).toMatchObject({ verdict: 'better' });
  });

  test('what is now above and now below is not called anything', () => {
    expect(of('clsact', 'qps')).toMatchObject({ verdict: 'no difference shown' });
  });
});

describe('report', () => {
  const result: Result = {
    profile: 'default',
    seed: 1,
    begun: '2026-01-01T00:00:00Z',
    took: 100,
    machine: { cpu: 'cpu', cpus: 2, memoryGiB: 4, kernel: '6.18', virtual: 'bare metal', load: 0, versions: {} },
    cells: [{ name: 'fortio-max-64-v4', title: 'fortio -qps 0 -c 64' }],
    runs,
  };

  test('says faster of what is, and nothing of what is not shown', () => {
    const text = report(result);
    expect(text).toMatch(/ours, shared, TCX \| iptables.* requests\/s, fortio -qps 0 \| 1\.29 \[.*\*\*faster\*\*/);
    expect(text).toMatch(/ours, shared, clsact \| iptables.* requests\/s.*no difference shown/);
    expect(text).toContain('1325 [1300..1350]');
  });

  test('says which runs do not count and why, and leaves them out', () => {
    const broken = runs.map((run, i) => (i === 0 ? { ...run, invalid: 'went elsewhere' } : run));
    const text = report({ ...result, runs: broken });
    expect(text).toContain('ours, shared, TCX, `fortio-max-64-v4`, round 1: went elsewhere');
    expect(text).toContain('| 5, 1 invalid |');
  });

  test('BENCHMARKS.md has method, limits, plots and tables, and comes from a whole result alone', async () => {
    using testbed = Testbed.open();
    const root = testbed.directory('root');
    const paths = await publish(result, root);
    const text = readFileSync(join(root, 'BENCHMARKS.md'), 'utf8');
    for (const heading of ['Method', 'Limits', 'Plots', 'Ratios', 'Figures'])
      expect(text).toContain(`\n## ${heading}\n`);
    const images = [...text.matchAll(/!\[.*?\]\((.*?)\)/g)].map(([, path = '']) => join(root, path));
    expect(images.length).toBeGreaterThan(0);
    expect(paths).toEqual([join(root, 'BENCHMARKS.md'), ...images]);
    for (const image of images) expect(readFileSync(image, 'utf8')).toMatch(/^<svg /);
    await expect(publish({ ...result, only: 'wrk' }, root)).rejects.toThrow('only wrk was measured');
    await expect(publish({ ...result, profile: 'quick' }, root)).rejects.toThrow('quick');
  });

  test('plots are SVG with a line for each mode', async () => {
    const [plot] = plots(result);
    if (plot === undefined) throw new Error('no plot');
    const image = await svg(plot);
    expect(image).toMatch(/^<svg /);
    for (const { title } of MODES.filter(({ name }) => ['tcx', 'iptables'].includes(name))) {
      expect(image).toContain(`>${title}</text>`);
    }
  });
});

test('a kill in the middle of a line costs that run alone', () => {
  using testbed = Testbed.open();
  const directory = testbed.directory('results');
  for (const run of runs.slice(0, 3)) appendFileSync(join(directory, 'runs.jsonl'), `${JSON.stringify(run)}\n`);
  appendFileSync(join(directory, 'runs.jsonl'), JSON.stringify(runs[3]).slice(0, 40));
  expect(readRuns(directory)).toEqual(runs.slice(0, 3));
  expect(readRuns(join(directory, 'none'))).toEqual([]);
});

test('time left: what is planned, then by what a second of load took', () => {
  const progress = new Progress([10, 10, 10, 10], 60);
  expect(progress.left).toBeCloseTo(40 * 1.4 + 60);
  progress.skip(2);
  expect(progress.left).toBeCloseTo(20 * 1.4 + 60);
});
