// SPDX-License-Identifier: Apache-2.0
// Files that appear whole or not at all. Each is written beside its place under a name that nothing else looks at, and
// renamed: containerd notices a rename within its directory only, not one from elsewhere.

import {
  closeSync,
  constants,
  copyFileSync,
  fchmodSync,
  fchownSync,
  fsyncSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  type Stats,
  writeSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';

/** Called after each step that is on disk, with what it was. */
export type Step = (name: string) => void;

export interface Ownership {
  mode: number;
  uid: number;
  gid: number;
}

export function ownershipOf({ mode, uid, gid }: Stats): Ownership {
  return { mode: mode & 0o7777, uid, gid };
}

/** `.NAME.ambient-redirect.PID`: hidden, and without an extension that runtimes read. */
const UNFINISHED = /^\..+\.ambient-redirect\.[0-9]+$/;

function unfinishedName(path: string): string {
  return join(dirname(path), `.${basename(path)}.ambient-redirect.${process.pid}`);
}

/** Throws what the file system throws; then there is nothing new in the directory. `assertSame` is called last of all. */
export function replaceFile(
  path: string,
  contents: Buffer | { copyOf: string },
  ownership: Ownership,
  step: Step = () => {},
  assertSame: () => void = () => {},
): void {
  const unfinished = unfinishedName(path);
  try {
    const fd = create(unfinished, contents);
    try {
      fchownSync(fd, ownership.uid, ownership.gid);
      // After chown, which clears set-id bits.
      fchmodSync(fd, ownership.mode);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    step(`wrote ${path}, unnamed yet`);
    assertSame();
    renameSync(unfinished, path);
    syncDirectory(dirname(path));
    step(`renamed into ${path}`);
  } catch (error) {
    rmSync(unfinished, { force: true });
    throw error;
  }
}

function create(path: string, contents: Buffer | { copyOf: string }): number {
  rmSync(path, { force: true });
  if (!Buffer.isBuffer(contents)) {
    copyFileSync(contents.copyOf, path, constants.COPYFILE_EXCL | constants.COPYFILE_FICLONE);
    return openSync(path, constants.O_RDWR | constants.O_NOFOLLOW);
  }
  const fd = openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW, 0o600);
  try {
    for (let written = 0; written < contents.length; ) written += writeSync(fd, contents, written);
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

export function removeFile(path: string, step: Step = () => {}): void {
  rmSync(path, { force: true });
  syncDirectory(dirname(path));
  step(`removed ${path}`);
}

/** What a kill -9 left. Whoever calls it holds the lock under which these files are made. */
export function removeUnfinished(directory: string): void {
  for (const name of readdirSync(directory)) {
    if (UNFINISHED.test(name)) rmSync(join(directory, name), { force: true });
  }
}

/** So that the name is there after a power failure too. */
function syncDirectory(directory: string): void {
  const fd = openSync(directory, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}
