// SPDX-License-Identifier: Apache-2.0
// npm run test:kernels [-- --suite bullseye,bookworm] [--quick] [--variant NAME,...] [--refresh]: boots Debian's kernels,
// the newest too, and prints a table of what was run on each, and one of kernels and variants. Exit code 1 if anything
// failed, or if nothing could be run. --quick: the variant that is chosen there alone. --variant: the ways through the node
// with these, and nothing else. --refresh looks for newer kernels on the mirror.

import { parseArgs } from 'node:util';
import { formatTable } from '../../plugin/cli/table.ts';
import { findKernel, type Kernel, NoKernel, SUITES, type Suite } from './debian.ts';
import { cannotBoot } from './machine.ts';
import { type Run, runOn } from './run.ts';

const LIMIT = 40 * 60_000;
const VARIANTS = ['auto', 'no-redirect-peer', 'no-sk-lookup', 'no-sk-assign', 'full-sockets-only'] as const;

const { values } = parseArgs({
  options: {
    suite: { type: 'string', default: Object.keys(SUITES).join(',') },
    quick: { type: 'boolean', default: false },
    variant: { type: 'string', default: '' },
    refresh: { type: 'boolean', default: false },
  },
});
const suites = values.suite.split(',').map((suite) => {
  if (!(suite in SUITES)) throw new Error(`--suite ${suite}: one of ${Object.keys(SUITES).join(', ')}`);
  return suite as Suite;
});

function hasTcx(kernel: Kernel): boolean {
  const [major = 0, minor = 0] = kernel.release.split('.').map(Number);
  return major > 6 || (major === 6 && minor >= 6);
}

const wanted = values.variant === '' ? [] : values.variant.split(',');
for (const variant of wanted) {
  if (!VARIANTS.some((known) => known === variant))
    throw new Error(`--variant ${variant}: one of ${VARIANTS.join(', ')}`);
}

function sitesOf(kernel: Kernel): string[] {
  if (wanted.length > 0) {
    return wanted.map((variant) => `${variant} ${hasTcx(kernel) ? 'ptp tcx' : 'bridge clsact'}`);
  }
  if (values.quick) return [`auto ptp ${hasTcx(kernel) ? 'tcx' : 'clsact'}`];
  const clsact = VARIANTS.map((variant) => `${variant} bridge clsact`);
  const tcx = hasTcx(kernel) ? VARIANTS.map((variant) => `${variant} ptp tcx`) : ['auto ptp clsact'];
  return [...tcx, ...clsact];
}

const rows: string[][] = [];
/** Kernel to variant to what it came to, where and how. */
const ways = new Map<string, Map<string, string[]>>();
const problems: string[] = [];
let ran = 0;
const missing = cannotBoot();
for (const suite of suites) {
  try {
    if (missing !== undefined) throw new NoKernel(missing);
    const kernel = await findKernel(suite, values);
    console.error(`${kernel.release} (${suite}, ${kernel.version}) ...`);
    const run = await runOn(kernel, sitesOf(kernel), LIMIT, wanted.length > 0);
    ran += 1;
    report(kernel, run);
  } catch (error) {
    if (!(error instanceof NoKernel)) throw error;
    rows.push([SUITES[suite], suite, '-', '-', `not run: ${error.message}`]);
  }
}
process.stdout.write(formatTable(['KERNEL', 'WHAT', 'PASSED', 'FAILED', ''], rows));
if (ways.size > 0) {
  const cells = [...ways].map(([kernel, by]) => [kernel, ...VARIANTS.map((one) => by.get(one)?.join(', ') ?? '-')]);
  process.stdout.write(`\n${formatTable(['KERNEL', ...VARIANTS], cells)}`);
}
for (const problem of problems) console.log(problem);
if (problems.length > 0 || ran === 0) process.exitCode = 1;

function report(kernel: Kernel, { groups, trouble, output }: Run): void {
  for (const { name, passed, failed, skipped, failures } of groups) {
    const right = failed === 0 && skipped === 0 && passed > 0;
    const [, variant = '', site = ''] = /^variant ([\w-]+), (.*)$/.exec(name) ?? [];
    if (variant !== '') {
      const by = ways.get(kernel.release) ?? new Map<string, string[]>();
      ways.set(kernel.release, by);
      by.set(variant, [
        ...(by.get(variant) ?? []),
        `${passed} of ${passed + failed + skipped} (${site.replace(', ', ' ')})`,
      ]);
    }
    rows.push([kernel.release, name, String(passed), String(failed), right ? 'ok' : 'FAILED']);
    problems.push(...failures.map((failure) => `${kernel.release}: ${failure}`));
    if (!right && failures.length === 0) problems.push(`${kernel.release}: ${name}: ${skipped} skipped`);
  }
  if (trouble !== undefined) {
    rows.push([kernel.release, '', '-', '-', 'FAILED']);
    problems.push(`${kernel.release}: ${trouble}`);
  }
  if (problems.length > 0 && process.env.AMBIENT_REDIRECT_VERBOSE === '1') console.error(output);
}
