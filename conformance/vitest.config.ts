// SPDX-License-Identifier: Apache-2.0
// Three groups, one after the other:
//   unit         *.test.ts beside the modules
//   conformance  black-box tests in files that stand any other file running beside them
//   serial       *.serial.test.ts: one file at a time with nothing beside it, for what measures time or the whole machine
// A skipped test fails the run in CI, unless its title contains "(optional)".

import { dirname } from 'node:path';
import { defineConfig } from 'vitest/config';

const SERIAL = '**/*.serial.test.ts';

export default defineConfig({
  root: dirname(import.meta.dirname),
  test: {
    // Processes, not threads: tests open descriptors, use signals and load the addon.
    pool: 'forks',
    watch: false,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    teardownTimeout: 30_000,
    projects: [
      {
        extends: true,
        test: {
          name: 'unit',
          include: ['plugin/**/*.test.ts', 'native/**/*.test.ts', 'bpf/**/*.test.ts'],
          exclude: [SERIAL],
          maxWorkers: 2,
          sequence: { groupOrder: 1 },
        },
      },
      {
        extends: true,
        test: {
          name: 'conformance',
          include: ['conformance/**/*.test.ts'],
          exclude: [SERIAL],
          maxWorkers: 2,
          sequence: { groupOrder: 2 },
        },
      },
      {
        extends: true,
        test: {
          name: 'serial',
          include: [SERIAL],
          exclude: ['node_modules/**', 'build/**'],
          maxWorkers: 1,
          fileParallelism: false,
          sequence: { groupOrder: 3 },
        },
      },
    ],
  },
});
