// SPDX-License-Identifier: Apache-2.0
// The executable among the runtime's plugins, with the addon beside it for nodes where every directory is noexec
// (plugin/addon.ts). At each moment of an upgrade there is a whole executable, and an addon file that belongs to it.

import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { getRawAsset, isSea } from 'node:sea';
import { ADDON_ASSET, addonFileName } from '../addon.ts';
import { PLUGIN_TYPE } from './conflist.ts';
import { removeFile, removeUnfinished, replaceFile, type Step } from './files.ts';

export interface Executable {
  path: string;
  addon: Buffer;
}

/** The one that runs. Throws if it is Node with the sources. */
export function ownExecutable(): Executable {
  if (!isSea()) throw new Error('only the built executable can install itself (npm run build makes it)');
  return { path: process.execPath, addon: Buffer.from(getRawAsset(ADDON_ASSET)) };
}

/** Puts it into `directory`. true: something was written. The caller holds the install lock. */
export function placeExecutable({ path, addon }: Executable, directory: string, step: Step): boolean {
  if (!existsSync(directory)) {
    throw new Error(`${directory} does not exist: it has to be where the runtime looks for plugins (bin_dir)`);
  }
  removeUnfinished(directory);
  const target = join(directory, PLUGIN_TYPE);
  const versioned = join(directory, addonFileName(addon));
  const plain = join(directory, ADDON_ASSET);
  const sameExecutable = isSameFile(path, target);
  if (sameExecutable && hasContents(plain, addon)) {
    for (const name of versionedAddons(directory)) removeFile(join(directory, name), step);
    return false;
  }
  const owner = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
  // The new executable finds this one while the plain name still has the old addon.
  if (!hasContents(versioned, addon)) replaceFile(versioned, addon, { ...owner, mode: 0o644 }, step);
  if (!sameExecutable) replaceFile(target, { copyOf: path }, { ...owner, mode: 0o755 }, step);
  replaceFile(plain, addon, { ...owner, mode: 0o644 }, step);
  for (const name of versionedAddons(directory)) removeFile(join(directory, name), step);
  return true;
}

/** What was found: in a container the directory may be one that it was not given. */
export type Removal = 'removed' | 'absent' | 'no directory';

/** The executable goes last: while it is there a runtime can call it. */
export function removeExecutable(directory: string, step: Step): Removal {
  let names: string[];
  try {
    names = readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return 'no directory';
    throw error;
  }
  removeUnfinished(directory);
  for (const name of [...versionedAddons(directory), ADDON_ASSET, PLUGIN_TYPE]) {
    if (names.includes(name)) removeFile(join(directory, name), step);
  }
  return names.includes(PLUGIN_TYPE) ? 'removed' : 'absent';
}

function versionedAddons(directory: string): string[] {
  return readdirSync(directory).filter((name) => /^ambient-redirect-[0-9a-f]{16}\.node$/.test(name));
}

/** The same inode, or the same bytes in a file that root alone can write. */
function isSameFile(path: string, target: string): boolean {
  try {
    const a = statSync(path, { bigint: true });
    const b = statSync(target, { bigint: true });
    if ((b.mode & 0o7777n) !== 0o755n) return false;
    return (
      (a.dev === b.dev && a.ino === b.ino) || (a.size === b.size && readFileSync(path).equals(readFileSync(target)))
    );
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

function hasContents(path: string, contents: Buffer): boolean {
  try {
    const { mode, size } = statSync(path);
    return (mode & 0o7777) === 0o644 && size === contents.length && readFileSync(path).equals(contents);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}
