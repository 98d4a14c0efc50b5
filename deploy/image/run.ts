// SPDX-License-Identifier: Apache-2.0

import { spawnSync } from 'node:child_process';

export interface RunOptions {
  cwd?: string;
  env?: NodeJS.ProcessEnv;
  /** Its stdout is returned whatever its exit status is. */
  mayFail?: boolean;
}

/** Runs a program to its end and returns its stdout. Throws with the end of its stderr if it fails. */
export function run(argv: readonly string[], { mayFail = false, ...options }: RunOptions = {}): string {
  const [file = '', ...args] = argv;
  const { status, signal, error, stdout, stderr } = spawnSync(file, args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 64 * 1024 * 1024,
    ...options,
  });
  if (error) throw new Error(`${file}: ${error.message}`, { cause: error });
  if (status === 0 || mayFail) return stdout;
  throw new Error(
    `${argv.join(' ')}: ${signal ?? `exit ${status}`}: ${stderr.trim().split('\n').slice(-5).join('\n')}`,
  );
}
