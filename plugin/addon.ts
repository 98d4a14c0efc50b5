// SPDX-License-Identifier: Apache-2.0
// The only file that finds and loads the addon (ambient_redirect.node).
//
// In the executable it is an asset of the SEA, and dlopen(3) wants a file. Node cannot make a memfd, but an unnamed
// file (O_TMPFILE) opened through /proc/self/fd does as well, and leaves nothing to verify or to clean up. Where every
// directory is read-only, noexec or without O_TMPFILE, a file beside the executable is used after comparing it with
// the asset. From source the addon is the one in build/.

import { closeSync, constants, fstatSync, openSync, readSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { getRawAsset, isSea } from 'node:sea';
import type { Native } from './native.ts';

/** Name of the SEA asset, and of the verified file beside the executable that `install` puts there. */
export const ADDON_ASSET = 'ambient-redirect.node';

/**
 * Name of that file while `install` replaces an executable whose addon has the plain name. node:crypto costs a start
 * 5 ms, so it is loaded only where it comes to this.
 */
export function addonFileName(asset: Uint8Array): string {
  const { createHash } = process.getBuiltinModule('node:crypto');
  return `ambient-redirect-${createHash('sha256').update(asset).digest('hex').slice(0, 16)}.node`;
}

/** O_TMPFILE of include/uapi/asm-generic/fcntl.h, which node:fs does not name. */
const O_TMPFILE = 0o20000000 | constants.O_DIRECTORY;

/** One place that was tried and why it did not do. */
export interface AddonAttempt {
  where: string;
  reason: string;
}

/** The addon could not be loaded from anywhere. `attempts` has every place in the order tried. */
export class AddonError extends Error {
  override name = 'AddonError';
  readonly attempts: readonly AddonAttempt[];

  constructor(attempts: readonly AddonAttempt[]) {
    super(`cannot load the addon: ${attempts.map(({ where, reason }) => `${where}: ${reason}`).join('; ')}`);
    this.attempts = attempts;
  }
}

let loaded: Native | undefined;

/** Loads the addon once per process. Throws AddonError. */
export function loadNative(): Native {
  loaded ??= isSea() ? loadAsset(new Uint8Array(getRawAsset(ADDON_ASSET))) : loadBuilt();
  return loaded;
}

function loadAsset(asset: Uint8Array): Native {
  const attempts: AddonAttempt[] = [];
  const beside = dirname(process.execPath);
  for (const directory of ['/dev/shm', beside, '/run', '/tmp', '/var/tmp']) {
    try {
      return loadUnnamed(directory, asset);
    } catch (error) {
      attempts.push({ where: directory, reason: reasonOf(error) });
    }
  }
  for (const name of [ADDON_ASSET, addonFileName(asset)]) {
    const file = join(beside, name);
    try {
      return loadVerified(file, asset);
    } catch (error) {
      attempts.push({ where: file, reason: reasonOf(error) });
    }
  }
  throw new AddonError(attempts);
}

function loadUnnamed(directory: string, asset: Uint8Array): Native {
  const fd = openSync(directory, O_TMPFILE | constants.O_RDWR, 0o600);
  try {
    for (let written = 0; written < asset.length; ) written += writeSync(fd, asset, written);
    return dlopen(`/proc/self/fd/${fd}`);
  } finally {
    closeSync(fd);
  }
}

/** Checks and loads through one descriptor, so that what was compared is what is mapped. */
function loadVerified(file: string, asset: Uint8Array): Native {
  const fd = openSync(file, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  try {
    const { uid, mode, size } = fstatSync(fd);
    if ((mode & constants.S_IFMT) !== constants.S_IFREG) throw new Error('not a regular file');
    if (uid !== 0) throw new Error(`owned by uid ${uid}, not by root`);
    if ((mode & 0o022) !== 0) throw new Error(`mode ${(mode & 0o7777).toString(8)} lets others write it`);
    if (size !== asset.length || !readAll(fd, size).equals(asset)) {
      throw new Error('differs from the addon inside the executable (left over from another version?)');
    }
    return dlopen(`/proc/self/fd/${fd}`);
  } finally {
    closeSync(fd);
  }
}

function readAll(fd: number, size: number): Buffer {
  const bytes = Buffer.allocUnsafe(size);
  let filled = 0;
  while (filled < size) {
    const count = readSync(fd, bytes, filled, size - filled, filled);
    if (count === 0) break;
    filled += count;
  }
  return bytes.subarray(0, filled);
}

/** AMBIENT_REDIRECT_ADDON selects another build (faults, ASan); the executable ignores it. */
function loadBuilt(): Native {
  const path =
    process.env.AMBIENT_REDIRECT_ADDON ?? join(import.meta.dirname, '../build/Release/ambient_redirect.node');
  try {
    return dlopen(path);
  } catch (error) {
    throw new AddonError([{ where: path, reason: reasonOf(error) }]);
  }
}

function dlopen(path: string): Native {
  const module = { exports: {} };
  process.dlopen(module, path);
  return module.exports as Native;
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
