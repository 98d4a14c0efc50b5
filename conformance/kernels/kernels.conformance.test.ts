// SPDX-License-Identifier: Apache-2.0
// Debian 12's own kernel, with the executable as it is built; the others are run by npm run test:kernels.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { findKernel, NoKernel } from './debian.ts';
import { cannotBoot } from './machine.ts';
import { type Run, runOn } from './run.ts';

const RESULTS = join(import.meta.dirname, '../../build/test-results');
const SITES = ['auto ptp clsact'];
const GROUPS = [
  'doctor',
  'demo: shared',
  'demo: in-pod',
  'ADD, CHECK, DEL: shared, clsact',
  'ADD, CHECK, DEL: in-pod, clsact',
  'closedAction reset: ptp, clsact',
  'variant auto, ptp, clsact',
];

describe('Debian’s 6.1 under qemu', () => {
  let run: Run | undefined;
  let notRun = cannotBoot();

  beforeAll(async () => {
    let release = '6.1';
    try {
      if (notRun === undefined) {
        const kernel = await findKernel('bookworm');
        ({ release } = kernel);
        run = await runOn(kernel, SITES, 840_000);
      }
    } catch (error) {
      if (!(error instanceof NoKernel)) throw error;
      notRun = error.message;
    }
    // For the summary of .ci/test.mjs.
    mkdirSync(RESULTS, { recursive: true });
    writeFileSync(join(RESULTS, 'kernels.json'), JSON.stringify([{ release, notRun, groups: run?.groups ?? [] }]));
  }, 900_000);

  test.for(GROUPS)('%s (optional)', (name, { skip }) => {
    if (notRun !== undefined) skip(`not run: ${notRun}`);
    expect(run?.trouble).toBeUndefined();
    const group = run?.groups.find((one) => one.name === name);
    expect(group).toMatchObject({ failed: 0, skipped: 0, failures: [] });
    expect(group?.passed).toBeGreaterThan(0);
  });
});
