// SPDX-License-Identifier: Apache-2.0
// reasons.json (npm run mutate:bpf -- --table): of each reason, by the function that counts it, a test that failed when
// the program counted another one there.

import { globSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';

const ROOT = dirname(dirname(import.meta.dirname));
const table = JSON.parse(readFileSync(join(import.meta.dirname, 'reasons.json'), 'utf8')) as Record<
  string,
  Record<string, string>
>;
const tests = globSync('bpf/test/*.ts', { cwd: ROOT })
  .map((file) => readFileSync(join(ROOT, file), 'utf8'))
  .join('\n');
const programs = globSync('bpf/*.{c,h}', { cwd: ROOT })
  .map((file) => readFileSync(join(ROOT, file), 'utf8'))
  .join('\n');

describe('reasons', () => {
  test('each has a test that fails without it', () => {
    expect(Object.keys(table).sort()).toEqual(Object.keys(loadNative().reasons).sort());
  });
  test.each(Object.entries(table))('%s: functions and tests are there', (_, rows) => {
    expect(Object.keys(rows).length).toBeGreaterThan(0);
    for (const [name, test] of Object.entries(rows)) {
      expect(programs).toMatch(new RegExp(`\\b${name}\\(`));
      // "outer > inner > title [row]"; a file's name where it was run as a whole.
      const title =
        test
          .split(' > ')
          .at(-1)
          ?.replace(/ \[\d+\]$/, '') ?? '';
      if (!title.startsWith('bpf/test/')) expect(tests).toContain(title);
    }
  });
});
