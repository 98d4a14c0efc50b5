// SPDX-License-Identifier: Apache-2.0
// npm run coexistence [-- --full] [--only TEXT]: every combination on a line, with how it ended. Exit code 1 if one is
// not as it has to be. AMBIENT_REDIRECT_LONG=1 is --full. --only: those whose line has TEXT in it.

import { parseArgs } from 'node:util';
import { always, type Combination, describeCombination, pairwise, product } from './combinations.ts';
import { Site } from './site.ts';

const { values } = parseArgs({
  options: { full: { type: 'boolean', default: false }, only: { type: 'string', default: '' } },
});
const all = product();
const full = values.full || process.env.AMBIENT_REDIRECT_LONG === '1';
const selection = full ? all : pairwise(all, always);
const combinations = selection.filter((one) => describeCombination(one).includes(values.only));
if (combinations.length === 0) throw new Error(`no combination has "${values.only}" in its description`);
/** A pod's processes stay until its site closes. */
const PODS_OF_A_SITE = 20;

const started = performance.now();
const counts = new Map<string, number>();
const groups = Map.groupBy(combinations, ({ primary, hook }) => `${primary} ${hook}`);
for (const group of groups.values()) {
  for (let from = 0; from < group.length; from += PODS_OF_A_SITE)
    await runGroup(group.slice(from, from + PODS_OF_A_SITE));
}
const seconds = ((performance.now() - started) / 1000).toFixed(1);
const summary = [...counts].map(([ending, count]) => `${count} ${ending}`).join(', ');
console.log(`${combinations.length} of ${all.length} combinations in ${seconds} s: ${summary}`);

async function runGroup(group: readonly Combination[]): Promise<void> {
  const [first] = group;
  if (first === undefined) return;
  const site = new Site(first.primary, first.hook);
  try {
    await site.start();
    for (const combination of group) {
      const begun = performance.now();
      const ending = await site.run(combination).catch((error: unknown) => {
        process.exitCode = 1;
        return `FAILED: ${error instanceof Error ? error.message : String(error)}`;
      });
      const key = ending.startsWith('FAILED') ? 'failed' : ending;
      counts.set(key, (counts.get(key) ?? 0) + 1);
      console.log(`${describeCombination(combination)}: ${ending} (${(performance.now() - begun).toFixed(0)} ms)`);
    }
  } finally {
    site.close();
  }
}
