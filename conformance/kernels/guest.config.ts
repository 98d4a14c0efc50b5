// SPDX-License-Identifier: Apache-2.0
// vitest inside a machine with another kernel: started by run.ts, patient, one file after the other.

import { dirname } from 'node:path';
import { defineConfig } from 'vitest/config';
import { patience } from '../netns.ts';

export default defineConfig({
  root: dirname(dirname(import.meta.dirname)),
  test: {
    pool: 'forks',
    watch: false,
    fileParallelism: false,
    include: ['conformance/kernels/guest.ts', 'conformance/e2e/*.test.ts', 'bpf/test/*.test.ts'],
    testTimeout: 60_000 * patience,
    hookTimeout: 60_000 * patience,
    teardownTimeout: 30_000 * patience,
  },
});
