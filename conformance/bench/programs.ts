// SPDX-License-Identifier: Apache-2.0
// The programs that the bench measures with: fortio from the Go module proxy where there is Go, and our own small one
// in C. Both are built once and kept outside the checkout.

import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { delimiter, join } from 'node:path';
import { exec } from '../netns.ts';

/** The newest that the Go of this kind of machine builds. */
export const FORTIO_VERSION = 'v1.63.0';
const SOURCE = join(import.meta.dirname, 'native/peer.c');

export function onPath(name: string): string | undefined {
  return (process.env.PATH ?? '')
    .split(delimiter)
    .map((directory) => join(directory, name))
    .find(existsSync);
}

/** Path of `name`, made by `make` into an empty directory unless it was made before with the same `key`. */
async function cached(key: string, name: string, make: (directory: string) => Promise<void>): Promise<string> {
  const cache = process.env.XDG_CACHE_HOME ?? (process.getuid?.() === 0 ? '/var/cache' : join(homedir(), '.cache'));
  const directory = join(cache, 'ambient-redirect', key);
  const program = join(directory, name);
  if (existsSync(program)) return program;
  const fresh = `${directory}.${process.pid}`;
  mkdirSync(fresh, { recursive: true });
  try {
    await make(fresh);
    // Somebody else may have been quicker.
    if (!existsSync(directory)) renameSync(fresh, directory);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
  return program;
}

async function built(argv: string[], env?: Record<string, string>): Promise<void> {
  const outcome = await exec(argv, { ...(env && { env }), timeout: 300_000 });
  if (outcome.status !== 0) throw new Error(`${argv.join(' ')}: exit ${outcome.status}: ${outcome.stderr.trim()}`);
}

/** Path of fortio, or undefined where there is no Go to build it with. */
export async function fortio(): Promise<string | undefined> {
  if (onPath('go') === undefined) return undefined;
  const { GOFLAGS: _, ...env } = process.env;
  return await cached(`fortio-${FORTIO_VERSION}`, 'fortio', (directory) =>
    built(['go', 'install', `fortio.org/fortio@${FORTIO_VERSION}`], {
      ...(env as Record<string, string>),
      GOBIN: directory,
      HOME: homedir(),
    }),
  );
}

/** Path of the native proxy, server and load generator, built from native/peer.c as it is now. */
export async function peer(): Promise<string> {
  const digest = createHash('sha256').update(readFileSync(SOURCE)).digest('hex').slice(0, 16);
  return await cached(`bench-peer-${digest}`, 'peer', (directory) =>
    built(['gcc', '-O2', '-Wall', '-Wextra', '-Wconversion', '-Werror', '-o', join(directory, 'peer'), SOURCE]),
  );
}
