// SPDX-License-Identifier: Apache-2.0
//
// node conformance/noleak/main.ts [--long] [--minutes N] [--variant NAME]... [--churn N] [--seed N]
//   [--primary bridge|ptp] [--hook tcx|clsact] [--small-maps]
//
// Traffic, trouble and a judge on a throw-away node (README, "Develop and test"). Exit code 0: nothing went around the
// proxy. With --variant: 0 if the judge caught that leaky build. --long: every topology, 200 pods churned, one run after
// the other with a new seed for an hour (--minutes: for that long), then every variant.

import { parseArgs } from 'node:util';
import { executable, requireExecutable } from '../e2e/topology.ts';
import { type Options, type Report, run } from './scenario.ts';
import { buildVariant, type Variant, variants } from './variants.ts';

const say = (line: string) => process.stderr.write(`${line}\n`);

/** Lines for people. */
export function text(report: Report, examples = true): string[] {
  const { verdict, checks, flows, seconds } = report;
  const counts = (of: Record<string, number>) =>
    Object.entries(of)
      .sort(([, a], [, b]) => b - a)
      .map(([kind, packets]) => `  ${String(packets).padStart(7)}  ${kind}`);
  const failed = checks.filter(({ ok }) => !ok);
  return [
    `flows: ${Object.entries(flows)
      .map(([what, { begun, completed }]) => `${begun} ${what}${completed > 0 ? ` (${completed} completed)` : ''}`)
      .join(', ')}`,
    `TCP packets judged: ${verdict.packets}`,
    ...counts(verdict.explained),
    `around the proxy: ${Object.values(verdict.leaks).reduce((sum, packets) => sum + packets, 0)}`,
    ...counts(verdict.leaks),
    ...Object.entries(examples ? verdict.examples : {}).flatMap(([kind, lines]) =>
      lines.map((line) => `    ${kind}: ${line}`),
    ),
    `payloads of completed flows seen on their way: ${verdict.seen} of ${verdict.completed}`,
    `checks: ${checks.length - failed.length} passed, ${failed.length} failed`,
    ...failed.map(({ name, details }) => `  ${name}: ${details.trim()}`),
    `${seconds.toFixed(1)} s`,
  ];
}

export function clean({ verdict, checks }: Report): boolean {
  return Object.keys(verdict.leaks).length === 0 && verdict.completed > 0 && checks.every(({ ok }) => ok);
}

/** Runs a leaky build; the report, and whether the judge called each leak by its name. */
export async function tryVariant(variant: Variant, seed: number): Promise<{ report: Report; caught: boolean }> {
  const built = buildVariant(variant, say);
  const { hook = 'tcx' } = variant;
  const report = await run({ executable: built, primary: 'bridge', hook, churn: 0, seed, say: () => {} });
  const kinds = Object.keys(report.verdict.leaks);
  return { report, caught: variant.caughtAs.every((name) => kinds.some((kind) => name.test(kind))) };
}

/** Each of `runs` once, and again with other seeds until the time is over. */
async function runAll(runs: readonly Options[], minutes: number): Promise<boolean> {
  const end = performance.now() + minutes * 60_000;
  const total = { runs: 0, failed: 0, packets: 0, flows: 0, churned: 0 };
  for (let round = 0; round === 0 || performance.now() < end; round++) {
    for (const base of runs) {
      if (round > 0 && performance.now() >= end) break;
      const options = { ...base, seed: base.seed + round };
      const report = await run(options);
      const maps = options.smallMaps ? ', small maps' : '';
      console.log(`\n${options.primary}, ${options.hook}, ${options.churn} pods churned${maps}, seed ${options.seed}`);
      console.log(text(report).join('\n'));
      total.runs += 1;
      total.failed += clean(report) ? 0 : 1;
      total.packets += report.verdict.packets;
      total.flows += Object.values(report.flows).reduce((sum, { begun }) => sum + begun, 0);
      total.churned += options.churn;
    }
  }
  console.log(
    `\n${total.runs} runs, ${total.failed} failed: ${total.churned} pods churned, ${total.flows} flows, ${total.packets} TCP packets judged`,
  );
  return total.failed === 0;
}

async function main(): Promise<boolean> {
  const { values } = parseArgs({
    options: {
      long: { type: 'boolean', default: false },
      minutes: { type: 'string' },
      variant: { type: 'string', multiple: true, default: [] },
      churn: { type: 'string', default: '10' },
      'small-maps': { type: 'boolean', default: false },
      primary: { type: 'string', default: 'bridge' },
      hook: { type: 'string', default: 'tcx' },
      seed: { type: 'string', default: String(Date.now() % 1_000_000) },
    },
  });
  const seed = Number(values.seed);
  const minutes = Number(values.minutes ?? (values.long ? 60 : 0));
  if (!(minutes >= 0)) throw new Error(`--minutes ${values.minutes}: not a number of minutes`);
  const chosen = values.variant.map((name) => {
    const variant = variants.find((one) => one.name === name);
    if (!variant) throw new Error(`no variant ${name}; there are ${variants.map((one) => one.name).join(', ')}`);
    return variant;
  });
  let good = true;
  if (chosen.length === 0) {
    requireExecutable();
    const short: Options = {
      executable,
      primary: values.primary === 'ptp' ? 'ptp' : 'bridge',
      hook: values.hook === 'clsact' ? 'clsact' : 'tcx',
      churn: Number(values.churn),
      smallMaps: values['small-maps'],
      seed,
      say,
    };
    const runs: Options[] = [short];
    if (values.long) {
      runs.length = 0;
      for (const primary of ['bridge', 'ptp'] as const) {
        for (const hook of ['tcx', 'clsact'] as const) runs.push({ ...short, primary, hook, churn: 50 });
      }
      runs.push({ ...short, churn: 10, smallMaps: true });
    }
    good = await runAll(runs, minutes);
  }
  for (const variant of values.long && chosen.length === 0 ? variants : chosen) {
    const { report, caught } = await tryVariant(variant, seed);
    console.log(`\nvariant ${variant.name}: ${caught ? 'caught' : 'NOT CAUGHT'}`);
    console.log(text(report, false).join('\n'));
    good &&= caught;
  }
  console.log(good ? '\nas it should be' : '\nFAILED');
  return good;
}

if (import.meta.main) process.exitCode = (await main()) ? 0 : 1;
