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

/**
 * A tar archive of `members` of `directory`, with nothing in it that is not content or permission: everything is root's
 * and of one time (seconds since 1970). Compressed if the name says so.
 */
export function archive(directory: string, file: string, epoch: number, ...members: string[]): void {
  run([
    ...['tar', '--create', '--file', file, '--directory', directory],
    ...['--sort=name', '--format=posix', '--pax-option=delete=atime,delete=ctime', `--mtime=@${epoch}`],
    ...['--owner=0', '--group=0', '--numeric-owner', '--mode=u+rwX,go+rX,go-w'],
    // gzip would write down the time and the name.
    ...(/\.t?gz$/.test(file) ? ['--use-compress-program=gzip --no-name'] : []),
    ...members,
  ]);
}
