// SPDX-License-Identifier: Apache-2.0
// vitest inside a machine with another kernel: started by run.ts, patient, one file after the other. In threads: a
// process more takes seconds to start there, and on a busy machine longer than vitest waits.

import { dirname } from 'node:path';
import { defineConfig } from 'vitest/config';
import { patience } from '../netns.ts';

export default defineConfig({
  root: dirname(dirname(import.meta.dirname)),
  test: {
    pool: 'threads',
    watch: false,
    fileParallelism: false,
    include: ['conformance/kernels/guest.ts'],
    testTimeout: 60_000 * patience,
    hookTimeout: 60_000 * patience,
    teardownTimeout: 30_000 * patience,
  },
});
