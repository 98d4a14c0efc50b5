// SPDX-License-Identifier: Apache-2.0
// The directory where runtimes look for networks (/etc/cni/net.d), and which file of it is the node's.

import { readdirSync, readFileSync, type Stats, statSync } from 'node:fs';
import { join } from 'node:path';
import { CniError } from '../cni/errors.ts';
import {
  canBePrimary,
  isNetworkFileName,
  isOwned,
  type NetworkFile,
  PLUGIN_TYPE,
  readNetworkFile,
} from './conflist.ts';
import { ownershipOf, removeFile, replaceFile, type Step } from './files.ts';

/** A file whose name a runtime would look at. */
export interface FoundFile {
  name: string;
  bytes: Buffer;
  stats: Stats;
  /** undefined: no runtime takes it, see `reason` */
  file: NetworkFile | undefined;
  reason: string;
}

/** By name, as runtimes sort: in bytes. Files that vanish meanwhile are left out. Throws what reading a directory throws. */
export function readNetworkDirectory(directory: string): FoundFile[] {
  return readdirSync(directory)
    .filter(isNetworkFileName)
    .sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)))
    .flatMap((name) => readFound(directory, name) ?? []);
}

function readFound(directory: string, name: string): FoundFile | undefined {
  const path = join(directory, name);
  let bytes: Buffer;
  let stats: Stats;
  try {
    stats = statSync(path);
    bytes = readFileSync(path);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    // Gone again, a link to nowhere, a directory.
    if (code === 'ENOENT' || code === 'EISDIR' || code === 'ELOOP') return undefined;
    throw error;
  }
  try {
    return { name, bytes, stats, file: readNetworkFile(name, bytes), reason: '' };
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return { name, bytes, stats, file: undefined, reason: error.message };
  }
}

/** A file that is the node's network, as it stands there. */
export type PrimaryFile = FoundFile & { file: NetworkFile };

/**
 * Istio's rules: the file that was named, with the other of .conf and .conflist as good; without a name the first valid
 * one. undefined: there is none yet.
 */
export function findPrimary(found: readonly FoundFile[], named: string | undefined): PrimaryFile | undefined {
  const isPrimary = (each: FoundFile): each is PrimaryFile =>
    each.file !== undefined && canBePrimary(each.file) && !isOwned(each.file);
  if (named === undefined) return found.find(isPrimary);
  const names = [named, named.endsWith('.conf') ? `${named}list` : named.replace(/\.conflist$/, '.conf')];
  return names.flatMap((name) => found.filter((each) => each.name === name)).find(isPrimary);
}

/** Our entry is in it, or its text names us and nobody can tell whether as an entry. */
export function refersToUs({ file, bytes }: FoundFile): boolean {
  return file === undefined ? bytes.includes(PLUGIN_TYPE) : file.plugins.some(({ type }) => type === PLUGIN_TYPE);
}

/**
 * Names of files that still name the executable. libcni 1.3 also takes DIRECTORY/NETWORK/*.conf, which are added to the
 * list of that network.
 */
export function filesThatRefer(directory: string): string[] {
  const inside = (path: string) => readNetworkDirectory(path).filter(refersToUs);
  try {
    const below = readdirSync(directory, { withFileTypes: true }).filter((entry) => entry.isDirectory());
    return [
      ...inside(directory).map(({ name }) => name),
      ...below.flatMap((entry) => inside(join(directory, entry.name)).map(({ name }) => join(entry.name, name))),
    ];
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}

/** Somebody else wrote the file between our reading and our writing. */
export class ChangedMeanwhile extends Error {
  override readonly name = 'ChangedMeanwhile';
}

/** New files are root's alone unless the group is to read them. */
export function newFileOwnership(groupRead: boolean) {
  return { mode: groupRead ? 0o640 : 0o600, uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
}

/**
 * Writes `bytes` as `name` with mode and owner of `like`, or as a new file. Throws ChangedMeanwhile if `read` is not
 * what stands there any more.
 */
export function writeNetworkFile(
  directory: string,
  name: string,
  bytes: Buffer,
  { like, read, groupRead, step }: { like?: Stats; read?: FoundFile; groupRead?: boolean; step?: Step },
): void {
  const ownership = like === undefined ? newFileOwnership(groupRead ?? false) : ownershipOf(like);
  replaceFile(join(directory, name), bytes, ownership, step, () => {
    if (read !== undefined) assertUnchanged(directory, read);
  });
}

export function removeNetworkFile(directory: string, read: FoundFile, step?: Step): void {
  assertUnchanged(directory, read);
  removeFile(join(directory, read.name), step);
}

function assertUnchanged(directory: string, { name, bytes }: FoundFile): void {
  const path = join(directory, name);
  try {
    if (readFileSync(path).equals(bytes)) return;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  throw new ChangedMeanwhile(`${path} was changed while it was edited`);
}
