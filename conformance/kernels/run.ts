// SPDX-License-Identifier: Apache-2.0
// The guest's tests on one kernel, and their counts by group (the outermost describe).

import { dirname } from 'node:path';
import type { Kernel } from './debian.ts';
import { boot } from './machine.ts';

const ROOT = dirname(dirname(import.meta.dirname));

export interface Group {
  name: string;
  passed: number;
  failed: number;
  skipped: number;
  /** Full names and first lines of what went wrong. */
  failures: string[];
}

export interface Run {
  groups: Group[];
  /** Why there are no results; undefined if there are. */
  trouble?: string;
  /** All that the tests printed. */
  output: string;
}

type Report = {
  testResults: {
    name: string;
    status: string;
    message?: string;
    assertionResults: {
      ancestorTitles: string[];
      title: string;
      status: string;
      failureMessages?: string[];
    }[];
  }[];
};

/** `sites`: "VARIANT PRIMARY HOOK" (guest.ts), and nothing else with `waysOnly`. `limit`: ms for the whole machine. */
export async function runOn(kernel: Kernel, sites: readonly string[], limit: number, waysOnly = false): Promise<Run> {
  const vitest = ['node', 'node_modules/vitest/vitest.mjs', 'run', '--config', 'conformance/kernels/guest.config.ts'];
  const reporters = ['--reporter=default', '--reporter=json', '--outputFile.json=$REPORT'];
  const command = [...vitest, ...reporters].join(' ');
  const settings = `AMBIENT_REDIRECT_SITES='${sites.join(',')}'${waysOnly ? ' AMBIENT_REDIRECT_WAYS_ONLY=1' : ''}`;
  const ended = await boot(kernel, ROOT, `export ${settings}\n${command}`, limit);
  const { output } = ended;
  if (ended.report === '') {
    const how = ended.status === null ? 'the machine ended before the tests did' : `vitest: exit ${ended.status}`;
    const last = (text: string) => text.trimEnd().split('\n').slice(-15).join('\n');
    return { groups: [], trouble: `${how}\n${last(output)}\n${last(ended.console)}`, output };
  }
  const groups = groupsOf(JSON.parse(ended.report) as Report);
  const failed = groups.some((group) => group.failed > 0);
  if (groups.length > 0 && (ended.status === 0 || failed)) return { groups, output };
  return { groups, trouble: `no test failed, but vitest ended with ${ended.status}\n${output.slice(-1000)}`, output };
}

function groupsOf(report: Report): Group[] {
  const groups = new Map<string, Group>();
  const group = (name: string): Group => {
    const known = groups.get(name) ?? { name, passed: 0, failed: 0, skipped: 0, failures: [] };
    groups.set(name, known);
    return known;
  };
  for (const file of report.testResults) {
    const path = file.name.slice(ROOT.length + 1);
    // A file that could not be loaded, and what failed outside a test.
    if (file.status === 'failed' && file.assertionResults.every(({ status }) => status !== 'failed')) {
      const one = group(path);
      one.failed += 1;
      one.failures.push(`${path}: ${file.message?.split('\n')[0]}`);
    }
    for (const { ancestorTitles, title, status, failureMessages } of file.assertionResults) {
      const one = group(ancestorTitles[0] ?? path);
      if (status === 'passed') one.passed += 1;
      else if (status === 'failed') {
        one.failed += 1;
        one.failures.push(`${[...ancestorTitles, title].join(' > ')}: ${failureMessages?.[0]?.split('\n')[0]}`);
      } else one.skipped += 1;
    }
  }
  return [...groups.values()];
}
