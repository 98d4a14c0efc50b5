// SPDX-License-Identifier: Apache-2.0
//
// Other people's Go programs, built once from the module proxy into a cache outside the checkout: one directory for each
// program and version. Where there is no Go, what needs them is not run, and that is said.

import { existsSync, mkdirSync, renameSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { delimiter, join } from 'node:path';
import { exec } from './netns.ts';

/** Minutes that a build with nothing in Go's own cache may take on a busy machine. */
const BUILD_TIMEOUT_MS = 45 * 60_000;

export const NO_GO = 'no "go" in PATH to build it with';

export function haveGo(env: NodeJS.ProcessEnv = process.env): boolean {
  return (env.PATH ?? '').split(delimiter).some((directory) => existsSync(join(directory, 'go')));
}

/** `name` has the version in it. */
export function peerDirectory(name: string, env: NodeJS.ProcessEnv = process.env): string {
  const cache = env.XDG_CACHE_HOME ?? (process.getuid?.() === 0 ? '/var/cache' : join(homedir(), '.cache'));
  return join(cache, 'ambient-redirect', name);
}

/** Runs a command where the build is made; resolves to its stdout. Throws with its stderr if it fails. */
export type Build = (argv: readonly string[]) => Promise<string>;

/**
 * Fills `directory` by `build`, which works in a directory that is renamed to it at the end: what was cut short is not
 * taken for the result. Nothing is done if it is there.
 */
export async function buildOnce(
  directory: string,
  build: (go: Build, fresh: string) => Promise<void>,
  outer: NodeJS.ProcessEnv = process.env,
): Promise<void> {
  if (existsSync(directory)) return;
  mkdirSync(join(directory, '..'), { recursive: true });
  const fresh = `${directory}.${process.pid}`;
  mkdirSync(fresh);
  try {
    const { GOFLAGS: _, ...rest } = outer;
    const env = { HOME: homedir(), ...(rest as Record<string, string>), GOBIN: fresh, CGO_ENABLED: '0' };
    await build(async (argv) => {
      const outcome = await exec(argv, { cwd: fresh, env, timeout: BUILD_TIMEOUT_MS });
      if (outcome.status !== 0) throw new Error(`${argv.join(' ')}: exit ${outcome.status}: ${outcome.stderr}`);
      return outcome.stdout;
    }, fresh);
    // Somebody else may have been quicker.
    if (!existsSync(directory)) renameSync(fresh, directory);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
}
