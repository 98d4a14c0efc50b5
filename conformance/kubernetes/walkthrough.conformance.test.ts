// SPDX-License-Identifier: Apache-2.0
//
// The walk-through of the README: the script as a person runs it, and what it prints is what the README shows.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { exec } from '../netns.ts';
import { missingControlPlane } from './build.ts';

const ROOT = join(import.meta.dirname, '../..');

/** What differs from run to run: ports, times, versions of Debian's packages. */
function steady(text: string): string[] {
  return text
    .trim()
    .split('\n')
    .map((line) =>
      line
        .trim()
        .replace(/127\.0\.0\.1:\d+/, '127.0.0.1:PORT')
        .replace(/containerd [^;]+;/, 'containerd VERSION;')
        .replace(/trace: \S+ from/, 'trace: TIME from')
        .replace(/(10\.88\.0\.\d+):\d{5} >/, '$1:PORT >'),
    );
}

describe.runIf(missingControlPlane() === undefined)(
  'walk-through with kube-apiserver and containerd (optional)',
  () => {
    test('does what it says, and the README shows it', { timeout: 180_000 }, async () => {
      const outcome = await exec([process.execPath, join(import.meta.dirname, 'walkthrough.ts')], { timeout: 170_000 });
      expect(outcome.stderr).toBe('');
      expect(outcome.status).toBe(0);
      const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
      const shown = /```text\n( 1 {2}etcd and kube-apiserver [\s\S]*?)```/.exec(readme)?.[1] ?? '';
      expect(steady(shown)).toEqual(steady(outcome.stdout));
    });
  },
);
