// SPDX-License-Identifier: Apache-2.0
//
// npm run conformance: what it prints and how it ends.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { exec, Testbed } from './netns.ts';

const testbed = Testbed.open();
afterAll(() => testbed.close());
const directory = testbed.directory('conf');
const PLUGIN = join(import.meta.dirname, 'plugins', 'passthrough');

function conf(content: string): string {
  const file = join(directory, 'conf.json');
  writeFileSync(file, content);
  return file;
}

const run = (...args: string[]) => exec([process.execPath, join(import.meta.dirname, 'cli.ts'), ...args]);

test('a line for each rule, the sum, and 0 where all are kept', async () => {
  const file = conf('{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"ptp"},{"type":"passthrough"}]}');
  const { status, stdout, stderr } = await run('--plugin', PLUGIN, '--conf', file, '--rules', 'A1.4,A4.2');
  expect([status, stderr]).toEqual([0, '']);
  expect(stdout.split('\n').map((line) => line.slice(0, 18))).toEqual([
    'pass  A1.4        ',
    'pass  A4.2   0.3.1',
    'pass  A4.2   0.4.0',
    'pass  A4.2   1.0.0',
    'pass  A4.2   1.1.0',
    '',
    '5 passed, 0 failed',
    '',
  ]);
});

test('--json: one document; 1 where a rule is broken', async () => {
  const file = conf('{"type":"bandwidth","ingressRate":1000000,"ingressBurst":1000000}');
  const { status, stdout } = await run(
    '--plugin',
    '/usr/lib/cni/bandwidth',
    '--conf',
    file,
    '--rules',
    'A1.7',
    '--json',
  );
  expect(status).toBe(1);
  expect(JSON.parse(stdout)).toMatchObject({
    plugin: '/usr/lib/cni/bandwidth',
    passed: 0,
    failed: 1,
    notApplicable: 0,
    findings: [{ id: 'A1.7', level: 'MUST', verdict: 'fail', reason: expect.stringContaining('CNI_CONTAINERID') }],
  });
});

test('--list needs no plugin', async () => {
  const { status, stdout } = await run('--list');
  expect(status).toBe(0);
  expect(stdout).toMatch(/^A4\.13 +MUST/m);
});

test.each([
  ['nothing', [], /--plugin and --conf are needed/],
  ['an unknown rule', ['--rules', 'A99'], /no such rule: A99/],
  ['a file that is no JSON', ['--plugin', PLUGIN, '--conf', PLUGIN], /passthrough: .*JSON/],
  [
    'a plugin that is not there',
    ['--plugin', '/proc/nonexistent', '--conf', 'x'],
    /\/proc\/nonexistent: no such executable/,
  ],
])('%s: 2, and why', async (_what, args, message) => {
  const { status, stdout, stderr } = await run(...args);
  expect([status, stdout]).toEqual([2, '']);
  expect(stderr).toMatch(message);
});
