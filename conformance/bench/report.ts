// SPDX-License-Identifier: Apache-2.0
// Tables in Markdown and plots from a result. Nothing here is measured or rounded by hand.

import { ADD_CURVES, type AddCosts, type AddRow } from './add.ts';
import type { Machine } from './machine.ts';
import { type Aim, aims, compare, type Measure, type ModeSummary, reached, summarize } from './measures.ts';
import { PROFILES, type ProfileName } from './plan.ts';
import type { Plot, Point } from './plots.ts';
import { FORTIO_VERSION } from './programs.ts';
import type { ProgramCosts } from './programs-cost.ts';
import { duration } from './progress.ts';
import type { Run } from './run.ts';
import { FEWEST_PAIRS, type Ratio, type Summary } from './statistics.ts';
import { MODES } from './world.ts';

export interface Result {
  profile: ProfileName;
  only?: string;
  seed: number;
  begun: string;
  /** Seconds from its beginning to its end; breaks of a resumed one are in it. */
  took: number;
  machine: Machine;
  /** Name of each cell, and its title. */
  cells: { name: string; title: string }[];
  runs: Run[];
  programs?: ProgramCosts;
  add?: AddCosts;
}

const order = MODES.map(({ name }) => name);
const title = (mode: string) => MODES.find(({ name }) => name === mode)?.title ?? mode;

const METHOD = `Made by \`npm run bench -- --publish\`; nothing here is written by hand.

## Method

- **One node for each way** to the proxy, all on this machine, in network namespaces that the bench makes and takes away: a client pod, a server pod, and a proxy pod where there is one, on veth pairs that CNI's ptp plugin makes. Nothing of one (TIME_WAIT, conntrack, rules) is seen by another.
- **The same proxy everywhere**: a native one (\`conformance/bench/native/peer.c\`: one thread, epoll, no TLS), with the same settings in every mode, and HAProxy with one thread where that works (not inside pods: it cannot mark what it connects). The server behind it answers and does nothing else. With a ztunnel the proxy's own work is larger, and what redirection makes of the whole is smaller.
- **Published experiment**: fortio ${FORTIO_VERSION} client and server in two enrolled pods of one node, \`-uniform -qps 0\` and \`-qps 8000\`, with 10 µs wide latency buckets (its default of 1 ms is interpolated below that). Then wrk, iperf3, and loads of the native program: one byte there and back, new connections, many open connections.
- **Shuffled and paired**: for each load all modes run one right after the other, in an order of its own each time; ratios are of such neighbours. Their interval is a bootstrap over the pairs. Only an interval that leaves out 1, of ${FEWEST_PAIRS} pairs or more, gets a word.
- **New connections per second** without TIME_WAIT: the client ends each connection with RST, and the proxy does so on its other side, so no side keeps state and no port is waited for. Sockets in TIME_WAIT are counted; a run that made any is invalid.
- **Every run is checked**: the proxies must have accepted the connections and passed on the bytes that the load says it made, and no others; our programs must have redirected them, on the hooks that the mode names; the redirecting netfilter rules must have matched; the tunnel must have carried what it should. Else the run is invalid, listed below, and in no figure. \`npm test\` has a miswired twin of each mode, which this check must refuse.
- **CPU** is that of the whole machine from \`/proc/stat\`, interrupts and softirqs included: load generator, server, proxy and kernel. Whatever else runs on the machine is in it.
- **iptables, shared**: Istio 1.20's marks, chains, rules and tables, for both families, without its ipset (a pod is matched by its veth, which is cheaper). Istio had GENEVE tunnels between node and proxy; VXLAN stands in, which every kernel has; whether the measured one has GENEVE is said below. By Istio's rules only a connection's opening packets go through the tunnel, the later ones go by its connection mark: that is the mode “VXLAN for openings”. “VXLAN for all packets” leaves that rule out and is the encapsulation that descriptions of that mode suggest.
- **iptables, in-pod**: the rules of Istio 1.21 and later in each pod's namespace, plaintext between the pods.
- Reno as congestion control in every namespace, as it paces nothing and any namespace may have it. No processor is set apart for anything.

## Limits

- One machine, no wire: what a network card, its queues and its offloads do is not here, and client, server and proxies share its processors, so a cheaper path shows as more requests.
- Many comparisons are made at once, and an interval of 95 % is wrong in 1 of 20.
- Medians of few rounds: the least and the greatest are given, and are to be read.
- A virtual machine's processors are taken away now and then (\`steal\`); a pair sees that less than a run does.
- Instructions per packet are not measured (virtual machines seldom have the counters); nanoseconds per packet are.`;

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
    interval(ratio),
    String(ratio.pairs),
    words(measure, verdict),
  ]);
  return table(['', 'against', 'measure', 'ratio', 'pairs', ''], rows);
}

/** ADD's aims: ratios to bare Node's start. */
const ADD_AIMS = [{ command: 'ADD, clsact', most: 1.4 }];

function aimTable({ runs, add }: Result): string[] {
  const bound = ({ least, most }: Pick<Aim, 'least' | 'most'>) =>
    least === undefined ? `at most ${most}` : `at least ${least}`;
  const rows = aims(runs).map(({ aim, ratio }) => [
    `${aim.measure}, ${title(aim.subject)}, ${aim.text}`,
    bound(aim),
    interval(ratio),
    reached(ratio, aim),
  ]);
  for (const { attachments, command, ratio } of add?.rows ?? []) {
    const aim = ADD_AIMS.find((one) => one.command === command);
    if (aim === undefined || ratio === undefined) continue;
    rows.push([
      `${command}, to bare Node’s start, beside ${attachments} idle attachments`,
      bound(aim),
      interval(ratio),
      reached(ratio, aim),
    ]);
  }
  if (rows.length === 0) return [];
  return [
    '## Aims',
    'Of the project for a machine of this kind, as ratios of pairs. Reached or missed only where the whole interval is on one side.',
    table(['', 'aim', 'ratio', ''], rows),
  ];
}

function words(measure: Measure, verdict: string): string {
  if (verdict !== 'better' && verdict !== 'worse') return verdict;
  const cpu = measure.metric === 'cpu';
  if (verdict === 'better') return cpu ? '**cheaper**' : '**faster**';
  return cpu ? '**dearer**' : '**slower**';
}

function interval({ ratio, low, high }: Ratio): string {
  return `${ratio.toFixed(2)} [${low.toFixed(2)}..${high.toFixed(2)}]`;
}

function addRow(row: AddRow): string[] {
  return [
    String(row.attachments),
    row.command,
    range(row.ms),
    figure(row.p95),
    row.ratio === undefined ? '' : interval(row.ratio),
    row.rss === undefined ? '' : figure(row.rss),
  ];
}

export function addReport(costs: AddCosts): string {
  const header = ['idle attachments', 'command', 'ms', 'p95 ms', '× bare Node', 'peak RSS MiB'];
  const scale = costs.scale.map((row) => [
    String(row.attachments),
    range(row.ns),
    interval(row.nsRatio),
    range(row.p50),
    interval(row.p50Ratio),
    figure(row.mapBytes / 2 ** 20),
  ]);
  return `${[
    '## A pod’s start',
    `Whole processes, ${costs.rounds} rounds in shuffled order. Ratio: to bare Node 24 (\`-e 0\`) in the same round. Peak RSS below 14 MiB cannot be seen: it is that of the process that starts and measures.`,
    table(header, costs.rows.map(addRow)),
    'Twenty at once, until the last has answered:',
    table(
      ['idle attachments', 'command', 'ms'],
      costs.atOnce.map((row) => addRow(row).slice(0, 3)),
    ),
    '## Beside idle attachments',
    'One byte there and back between two enrolled pods. Ratios: to a node without the idle attachments, measured in turn.',
    table(['idle attachments', 'programs, ns', 'ratio', 'p50 µs', 'ratio', 'maps MiB'], scale),
  ].join('\n\n')}\n`;
}

function programReport(costs: ProgramCosts): string {
  const onOff = <T extends { trace: boolean }>(
    rows: readonly T[],
    key: (row: T) => string,
    ns: (row: T) => Summary,
  ) => {
    const keys = [...new Set(rows.map(key))].sort();
    return keys.map((one) => {
      const of = (trace: boolean) => rows.find((row) => key(row) === one && row.trace === trace);
      const [off, on] = [of(false), of(true)];
      return { off, cells: [off && range(ns(off)), on && range(ns(on))].map((cell) => cell ?? '–') };
    });
  };
  const packets = onOff(
    costs.packets,
    ({ program, packet, family }) => `${program} ${packet} ${family}`,
    ({ ns }) => ns,
  ).flatMap(({ off, cells }) => (off ? [[off.program, `${off.packet}, IPv${off.family}`, off.reason, ...cells]] : []));
  const loads = onOff(
    costs.loads,
    ({ mode, load, program }) => `${mode} ${load} ${program}`,
    ({ ns }) => ns,
  ).flatMap(({ off, cells }) =>
    off ? [[title(off.mode), off.load, off.program, ...cells, figure(off.packets.median)]] : [],
  );
  return [
    '## What the programs cost',
    'Per packet, by BPF_PROG_TEST_RUN on the attached programs with the maps and sockets of open connections; that every packet was judged as the third column says is checked on the counters. A large packet counts once.',
    table(['program', 'packet', 'judged', 'ns', 'ns, trace on'], packets),
    'Under load, by the kernel’s clock (BPF_ENABLE_STATS), which is itself in it; with trace on, `ambient-redirect trace` takes processor time too.',
    table(['mode', 'load', 'program', 'ns per packet', 'trace on', 'packets per request or gigabit'], loads),
    'Size after verification (helpers inlined), not what one packet executes: no processor counters here.',
    table(
      ['program', 'instructions', 'bytes of machine code'],
      costs.sizes.map(({ program, instructions, code }) => [program, String(instructions), String(code)]),
    ),
    ...costs.invalid.map((reason) => `- invalid: ${reason}`),
  ].join('\n\n');
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
  parts.push(...aimTable(result));
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
  if (result.programs) parts.push(programReport(result.programs));
  if (result.add) parts.push(addReport(result.add));
  return `${parts.join('\n\n').trimEnd()}\n`;
}

/** BENCHMARKS.md. `plotsIn`: the directory of the plots, from where it lies. */
export function benchmarks(result: Result, plotsIn: string): string {
  const images = plots(result).map((plot) => `![${plot.title}](${plotsIn}/${plot.name}.svg)`);
  return `# Benchmarks\n\n${METHOD}\n\n## Plots\n\n${images.join('\n\n')}\n\n${report(result).replace(/^/, '## Run\n\n')}`;
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

export function plots({ runs, add }: Result): Plot[] {
  const xTitle = 'connections';
  const load = runs.some(({ cell }) => cell.startsWith('fortio')) ? 'fortio -qps 0' : 'wrk';
  const all: Plot[] = [
    {
      name: 'qps',
      title: `Requests/s against connections (${load})`,
      xTitle,
      yTitle: 'requests/s',
      points: curve(runs, load === 'wrk' ? /^wrk-(\d+)-v4$/ : /^fortio-max-(\d+)-v4$/, 'qps'),
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
  const starts = (add?.rows ?? []).filter(({ command }) => ADD_CURVES.includes(command));
  all.push({
    name: 'add',
    title: 'ADD against attachments',
    xTitle: 'idle attachments',
    yTitle: 'ms',
    points: starts.map(({ attachments, command, ms }) => ({ x: attachments, series: command, ...ms })),
  });
  return all.filter(({ points }) => points.length > 0);
}
