// SPDX-License-Identifier: Apache-2.0
// What is compared with what, and by which numbers.

import type { Run } from './run.ts';
import { FEWEST_PAIRS, pairedRatio, type Ratio, type Summary, summary } from './statistics.ts';

export interface Measure {
  title: string;
  /** Cells whose pairs are taken together. */
  cells: RegExp;
  metric: string;
  better: 'higher' | 'lower';
}

/** Everything of it on one proxy; the second one has its own lines. */
export const MEASURES: readonly Measure[] = [
  { title: 'requests/s, fortio -qps 0', cells: /^fortio-max-\d+-v4$/, metric: 'qps', better: 'higher' },
  { title: 'p50, fortio -qps 0', cells: /^fortio-max-\d+-v4$/, metric: 'p50', better: 'lower' },
  { title: 'p99, fortio -qps 0', cells: /^fortio-max-\d+-v4$/, metric: 'p99', better: 'lower' },
  { title: 'p50, fortio -qps 8000', cells: /^fortio-8000-\d+-v4$/, metric: 'p50', better: 'lower' },
  { title: 'p99, fortio -qps 8000', cells: /^fortio-8000-\d+-v4$/, metric: 'p99', better: 'lower' },
  { title: 'CPU per request, fortio -qps 8000', cells: /^fortio-8000-\d+-v4$/, metric: 'cpu', better: 'lower' },
  { title: 'requests/s, wrk', cells: /^wrk-\d+-v[46]$/, metric: 'qps', better: 'higher' },
  { title: 'CPU per request, wrk', cells: /^wrk-\d+-v[46]$/, metric: 'cpu', better: 'lower' },
  { title: 'p50 of one byte there and back', cells: /^rr-1-v[46]$/, metric: 'p50', better: 'lower' },
  { title: 'CPU per byte there and back', cells: /^rr-1-v[46]$/, metric: 'cpu', better: 'lower' },
  { title: 'new connections/s', cells: /^crr-\d+-v[46]$/, metric: 'qps', better: 'higher' },
  { title: 'CPU per new connection', cells: /^crr-\d+-v[46]$/, metric: 'cpu', better: 'lower' },
  { title: 'throughput', cells: /^iperf-\d+(-reverse)?-v[46]$/, metric: 'gbps', better: 'higher' },
  { title: 'CPU per gigabit', cells: /^iperf-\d+(-reverse)?-v[46]$/, metric: 'cpu', better: 'lower' },
  { title: 'transactions/s, many open connections', cells: /^hold-/, metric: 'qps', better: 'higher' },
  { title: 'requests/s, wrk, HAProxy', cells: /^wrk-\d+-v[46]\+haproxy$/, metric: 'qps', better: 'higher' },
  { title: 'throughput, HAProxy', cells: /^iperf-.*\+haproxy$/, metric: 'gbps', better: 'higher' },
];

/** [subject, baseline]: names of modes. */
export const COMPARISONS: readonly (readonly [string, string])[] = [
  ['tcx', 'iptables'],
  ['tcx', 'iptables-vxlan'],
  ['tcx', 'iptables-vxlan-all'],
  ['tcx', 'fixed'],
  ['clsact', 'iptables'],
  ['clsact', 'tcx'],
  ['iptables-vxlan', 'iptables'],
  ['in-pod', 'iptables-in-pod'],
  ['in-pod', 'fixed-in-pod'],
  ['iptables-in-pod', 'fixed-in-pod'],
];

/** Pairs of values of the same cell, round and repeat, both valid. */
export function pairsOf(
  runs: readonly Run[],
  { cells, metric }: Pick<Measure, 'cells' | 'metric'>,
  subject: string,
  baseline: string,
): [number, number][] {
  const key = ({ cell, round, repeat }: Run) => `${cell} ${round} ${repeat}`;
  const good = runs.filter((run) => run.invalid === undefined && cells.test(run.cell));
  const base = new Map(good.filter((run) => run.mode === baseline).map((run) => [key(run), run.metrics[metric]]));
  return good.flatMap((run) => {
    const [a, b] = [run.metrics[metric], base.get(key(run))];
    return run.mode === subject && a !== undefined && b !== undefined ? [[a, b] as [number, number]] : [];
  });
}

export interface Comparison {
  subject: string;
  baseline: string;
  measure: Measure;
  ratio: Ratio;
  /** In words, from the subject's point of view. */
  verdict: 'better' | 'worse' | 'no difference shown' | 'too few pairs';
}

export function compare(runs: readonly Run[]): Comparison[] {
  return COMPARISONS.flatMap(([subject, baseline]) =>
    MEASURES.flatMap((measure) => {
      const pairs = pairsOf(runs, measure, subject, baseline);
      if (pairs.length === 0) return [];
      const ratio = pairedRatio(pairs);
      const verdict =
        ratio.verdict === 'higher' || ratio.verdict === 'lower'
          ? ratio.verdict === measure.better
            ? 'better'
            : 'worse'
          : ratio.verdict;
      return [{ subject, baseline, measure, ratio, verdict }];
    }),
  );
}

/** By metric. */
export type ModeSummary = { mode: string; valid: number; invalid: number; metrics: Record<string, Summary> };

/** A row for each mode that the cell was measured in, in the order of `modes`. */
export function summarize(runs: readonly Run[], cell: string, modes: readonly string[]): ModeSummary[] {
  return modes.flatMap((mode) => {
    const all = runs.filter((run) => run.cell === cell && run.mode === mode);
    if (all.length === 0) return [];
    const valid = all.filter((run) => run.invalid === undefined);
    const names = [...new Set(valid.flatMap((run) => Object.keys(run.metrics)))];
    const metrics = Object.fromEntries(
      names.map((name) => [name, summary(valid.map((run) => run.metrics[name] ?? Number.NaN).filter(Number.isFinite))]),
    );
    return [{ mode, valid: valid.length, invalid: all.length - valid.length, metrics }];
  });
}

export interface Aim {
  text: string;
  subject: string;
  baseline: string;
  /** Title of a measure. */
  measure: string;
  /** What the ratio is to be: at least, or at most. */
  least?: number;
  most?: number;
}

const aim = (text: string, subject: string, baseline: string, measure: string, bound: Pick<Aim, 'least' | 'most'>) => ({
  text,
  subject,
  baseline,
  measure,
  ...bound,
});

/** What the project sets out to reach. */
export const AIMS: readonly Aim[] = [
  ...['requests/s, wrk', 'requests/s, fortio -qps 0'].flatMap((measure) => [
    aim('against iptables in-pod', 'in-pod', 'iptables-in-pod', measure, { least: 1.3 }),
    aim('against iptables with a tunnel for openings', 'tcx', 'iptables-vxlan', measure, { least: 1.4 }),
    aim('against iptables with a tunnel for all packets', 'tcx', 'iptables-vxlan-all', measure, { least: 1.4 }),
    aim('against the proxy reached directly', 'tcx', 'fixed', measure, { least: 0.97 }),
  ]),
  ...['CPU per request, wrk', 'CPU per request, fortio -qps 8000', 'p99, fortio -qps 8000'].flatMap((measure) => [
    aim('not above iptables', 'tcx', 'iptables', measure, { most: 1 }),
    aim('not above iptables in-pod', 'in-pod', 'iptables-in-pod', measure, { most: 1 }),
  ]),
];

export type Reached = 'reached' | 'missed' | 'not decided' | 'too few pairs';

/** Decided only where the whole interval is on one side of the bound. */
export function reached({ low, high, pairs }: Ratio, { least, most }: Pick<Aim, 'least' | 'most'>): Reached {
  if (pairs < FEWEST_PAIRS) return 'too few pairs';
  if (least !== undefined) return low >= least ? 'reached' : high < least ? 'missed' : 'not decided';
  const bound = most ?? Number.NaN;
  return high <= bound ? 'reached' : low > bound ? 'missed' : 'not decided';
}

/** Each aim whose modes were measured, with its ratio. */
export function aims(runs: readonly Run[]): { aim: Aim; ratio: Ratio }[] {
  return AIMS.flatMap((one) => {
    const measure = MEASURES.find(({ title }) => title === one.measure);
    if (measure === undefined) throw new Error(`no measure "${one.measure}"`);
    const pairs = pairsOf(runs, measure, one.subject, one.baseline);
    return pairs.length === 0 ? [] : [{ aim: one, ratio: pairedRatio(pairs) }];
  });
}
