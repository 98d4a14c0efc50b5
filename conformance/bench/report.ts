// SPDX-License-Identifier: Apache-2.0
// Tables in Markdown and plots from a result. Nothing here is measured or rounded by hand.

import type { Machine } from './machine.ts';
import { compare, type Measure, type ModeSummary, summarize } from './measures.ts';
import { PROFILES, type ProfileName } from './plan.ts';
import type { Plot, Point } from './plots.ts';
import { duration } from './progress.ts';
import type { Run } from './run.ts';
import { FEWEST_PAIRS, type Summary } from './statistics.ts';
import { MODES } from './world.ts';

export interface Result {
  profile: ProfileName;
  only?: string;
  seed: number;
  begun: string;
  /** Seconds; of all parts of a resumed one together. */
  took: number;
  machine: Machine;
  /** Name of each cell, and its title. */
  cells: { name: string; title: string }[];
  runs: Run[];
}

const order = MODES.map(({ name }) => name);
const title = (mode: string) => MODES.find(({ name }) => name === mode)?.title ?? mode;

/** Three significant digits; thousands as they are. */
export function figure(value: number): string {
  if (!Number.isFinite(value)) return '–';
  if (Math.abs(value) >= 1000) return String(Math.round(value));
  return String(Number(value.toPrecision(3)));
}

function range(summary: Summary | undefined): string {
  if (summary === undefined || summary.count === 0) return '–';
  return `${figure(summary.median)} [${figure(summary.min)}..${figure(summary.max)}]`;
}

export function table(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  return [line(header), line(header.map(() => '---')), ...rows.map(line)].join('\n');
}

const COLUMNS: readonly [metric: string, title: string][] = [
  ['qps', 'per second'],
  ['gbps', 'Gb/s'],
  ['p50', 'p50 µs'],
  ['p90', 'p90 µs'],
  ['p99', 'p99 µs'],
  ['p999', 'p99.9 µs'],
  ['cpu', 'CPU µs'],
];

function cellTable(rows: readonly ModeSummary[]): string {
  const columns = COLUMNS.filter(([metric]) => rows.some((row) => row.metrics[metric]));
  const counted = (row: ModeSummary) => (row.invalid > 0 ? `${row.valid}, ${row.invalid} invalid` : String(row.valid));
  return table(
    ['mode', ...columns.map(([, name]) => name), 'runs'],
    rows.map((row) => [title(row.mode), ...columns.map(([metric]) => range(row.metrics[metric])), counted(row)]),
  );
}

function comparisonTable(runs: readonly Run[]): string {
  const rows = compare(runs).map(({ subject, baseline, measure, ratio, verdict }) => [
    title(subject),
    title(baseline),
    measure.title,
    `${ratio.ratio.toFixed(2)} [${ratio.low.toFixed(2)}..${ratio.high.toFixed(2)}]`,
    String(ratio.pairs),
    words(measure, verdict),
  ]);
  return table(['', 'against', 'measure', 'ratio', 'pairs', ''], rows);
}

function words(measure: Measure, verdict: string): string {
  if (verdict !== 'better' && verdict !== 'worse') return verdict;
  const cpu = measure.metric === 'cpu';
  if (verdict === 'better') return cpu ? '**cheaper**' : '**faster**';
  return cpu ? '**dearer**' : '**slower**';
}

export function report(result: Result): string {
  const { machine, runs } = result;
  const profile = PROFILES[result.profile];
  const invalid = runs.filter((run) => run.invalid !== undefined);
  const versions = Object.entries(machine.versions).map(([name, version]) => `${name} ${version}`);
  const parts = [
    `Profile \`${result.profile}\`${result.only ? ` (only ${result.only})` : ''}, ${profile.rounds} rounds, ${runs.length} runs in ${duration(result.took)}, begun ${result.begun}, order from seed ${result.seed}.`,
    `${machine.cpus} × ${machine.cpu} (${machine.virtual}), ${machine.memoryGiB} GiB, Linux ${machine.kernel}, load average before: ${machine.load.toFixed(2)}. ${versions.join(', ')}.`,
  ];
  if (runs.length > 0) {
    parts.push(
      '## Ratios',
      `Median of the ratios of paired runs and its 95 % interval (bootstrap over the pairs). A word stands only where the interval leaves out 1 and there are at least ${FEWEST_PAIRS} pairs.`,
      comparisonTable(runs),
      '## Figures',
      'Median [least..greatest]. CPU: microseconds of all processors of the machine, interrupts and softirqs included, per request, connection or gigabit; the load generator and the server are in it.',
    );
    for (const { name, title: text } of result.cells) {
      const rows = summarize(runs, name, order);
      if (rows.length > 0) parts.push(`### ${text} (\`${name}\`)`, cellTable(rows));
    }
    parts.push(
      '## Runs that do not count',
      invalid.length === 0
        ? 'None: in every run the proxies, our programs, the netfilter rules and the tunnels counted what the mode says.'
        : invalid
            .map((run) => `- ${title(run.mode)}, \`${run.cell}\`, round ${run.round + 1}: ${run.invalid}`)
            .join('\n'),
    );
  }
  return `${parts.join('\n\n')}\n`;
}

function curve(runs: readonly Run[], pattern: RegExp, metric: string): Point[] {
  const cells = [...new Set(runs.map(({ cell }) => cell))].filter((cell) => pattern.test(cell));
  return order.flatMap((mode) =>
    cells
      .flatMap((cell) => {
        const summary = summarize(runs, cell, [mode])[0]?.metrics[metric];
        const x = Number(pattern.exec(cell)?.[1]);
        return summary === undefined || summary.count === 0 ? [] : [{ x, series: title(mode), ...summary }];
      })
      .sort((a, b) => a.x - b.x),
  );
}

export function plots({ runs }: Result): Plot[] {
  const xTitle = 'connections';
  const all: Plot[] = [
    {
      name: 'qps',
      title: 'Requests/s against connections (fortio -qps 0)',
      xTitle,
      yTitle: 'requests/s',
      points: curve(runs, /^fortio-max-(\d+)-v4$/, 'qps'),
    },
    ...(['p50', 'p99'] as const).flatMap((metric) => [
      {
        name: `latency-${metric}`,
        title: `Latency ${metric} against connections (fortio -qps 8000)`,
        xTitle,
        yTitle: `${metric}, µs`,
        logY: true,
        points: curve(runs, /^fortio-8000-(\d+)-v4$/, metric),
      },
    ]),
  ];
  return all.filter(({ points }) => points.length > 0);
}
