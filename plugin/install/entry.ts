// SPDX-License-Identifier: Apache-2.0
// Our entry in the node's network directory: there once, in the right file, or nowhere. What `install` does, and what
// the agent does again whenever another tool has written there.

import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Code } from '../cni/errors.ts';
import type { Native } from '../native.ts';
import { hasCode, stepError } from '../state.ts';
import {
  type Edit,
  isAmbientIstio,
  isOwned,
  ownedList,
  PLUGIN_TYPE,
  RivalError,
  undoOf,
  type Wanted,
  withEntry,
  withoutEntry,
} from './conflist.ts';
import { removeUnfinished, replaceFile, type Step } from './files.ts';
import {
  ChangedMeanwhile,
  type FoundFile,
  findPrimary,
  type PrimaryFile,
  readNetworkDirectory,
  removeNetworkFile,
  writeNetworkFile,
} from './network-directory.ts';

export interface EntryOptions {
  netDir: string;
  /** the file to be in; undefined: the first valid one */
  confName?: string | undefined;
  /** name of a list of our own instead of an entry in the primary's; undefined: in the primary's */
  ownedName?: string | undefined;
  wanted: Wanted;
  groupRead: boolean;
}

export interface Ensured {
  /** the file with our entry */
  name: string;
  /** the primary's file: the same, or what the owned list was made from */
  primary: string;
  /** what was changed, for people; empty: nothing */
  notes: string[];
}

/** Other tools may write at the same moment; more often than this, they are at it all the time. */
const ATTEMPTS = 20;

/**
 * null: there is no primary configuration yet, and nothing was done. Throws RivalError, ChangedMeanwhile, or what the
 * file system throws. The caller holds the install lock.
 */
export function ensureEntry(options: EntryOptions, step: Step = () => {}): Ensured | null {
  return repeated(() => ensureOnce(options, step));
}

function ensureOnce(options: EntryOptions, step: Step): Ensured | null {
  const { netDir, confName, ownedName } = options;
  // Who installs the primary plugin may be the one who makes it.
  if (!existsSync(netDir)) return null;
  removeUnfinished(netDir);
  const found = readNetworkDirectory(netDir);
  const primary = findPrimary(found, confName);
  if (primary === undefined) return null;
  assertNoRival(found, primary, options);
  const notes: string[] = [];
  const name =
    ownedName === undefined
      ? ensureIn(options, primary, found, notes, step)
      : ensureOwned(options, ownedName, primary, found, notes, step);
  // Lists of ours under another name, from before a setting was changed; and our entry in what an owned list is read
  // instead of.
  for (const other of found) {
    if (other.file === undefined || other.name === name) continue;
    const hasEntry = other.file.plugins.some(({ type }) => type === PLUGIN_TYPE);
    if (isOwned(other.file) || (ownedName !== undefined && hasEntry)) {
      notes.push(...takeOut(netDir, other, found, step));
    }
  }
  return { name, primary: primary.name, notes };
}

/**
 * An istio-cni in ambient mode in another file than ours, which is the one that the runtime reads without us: Istio's own
 * list (02-istio-cni.conflist). One in the file that the entry goes into is found there.
 */
function assertNoRival(found: readonly FoundFile[], primary: PrimaryFile, { ownedName, wanted }: EntryOptions): void {
  const read = findPrimary(found, undefined);
  if (read === undefined || read.name === primary.name || !read.file.plugins.some(isAmbientIstio)) return;
  const where = `${read.name} is read before ${primary.name} and has an entry of istio-cni with ambient_enabled`;
  if (wanted.replaceIstio !== true) {
    throw new RivalError(
      `${where}: both would redirect the same pods; switch its ambient mode off, or let it be replaced (--replace-istio-cni)`,
    );
  }
  if (ownedName !== undefined && Buffer.compare(Buffer.from(ownedName), Buffer.from(read.name)) < 0) return;
  throw new RivalError(`${where}: an entry in ${primary.name} would never be called; name ${read.name}, or no file`);
}

/** Returns the name of the file that has the entry then. */
function ensureIn(
  { netDir, wanted }: EntryOptions,
  primary: PrimaryFile,
  found: readonly FoundFile[],
  notes: string[],
  step: Step,
): string {
  const edit = withEntry(primary.file, wanted);
  if (edit === null) return primary.name;
  writeEdit(netDir, edit, primary, found, step);
  notes.push(...edit.notes);
  return edit.name;
}

function ensureOwned(
  { netDir, wanted, groupRead }: EntryOptions,
  name: string,
  primary: PrimaryFile,
  found: readonly FoundFile[],
  notes: string[],
  step: Step,
): string {
  if (Buffer.compare(Buffer.from(name), Buffer.from(primary.name)) >= 0) {
    throw new Error(`${name} would be read after ${primary.name}: a list of our own needs a name that sorts before it`);
  }
  const current = found.find((each) => each.name === name);
  if (current?.file !== undefined && !isOwned(current.file)) {
    throw new Error(`${join(netDir, name)} is not ours, and the list of our own is to have that name`);
  }
  const edit = ownedList(primary.file, name, wanted, current?.bytes);
  if (edit === null) return name;
  const replaced = current === undefined ? {} : { like: current.stats, read: current };
  writeNetworkFile(netDir, name, edit.bytes, { ...replaced, groupRead, step });
  notes.push(...edit.notes);
  return name;
}

function writeEdit(netDir: string, edit: Edit, read: FoundFile, found: readonly FoundFile[], step: Step): void {
  if (edit.name !== read.name) assertReplaceable(netDir, edit.name, read.name, found);
  writeNetworkFile(netDir, edit.name, edit.bytes, { like: read.stats, read, step });
  // Until it is gone runtimes read it first, as it sorts before.
  if (edit.removes !== undefined) removeNetworkFile(netDir, read, step);
}

/** Beside 10-x.conf there may be a 10-x.conflist: one that was made of it before, or somebody else's. */
function assertReplaceable(netDir: string, name: string, from: string, found: readonly FoundFile[]): void {
  const there = found.find((each) => each.name === name);
  if (there === undefined) return;
  const ours = there.file?.plugins.some((plugin) => plugin.type === PLUGIN_TYPE && undoOf(plugin).single === from);
  if (ours !== true) {
    throw new Error(`${join(netDir, from)} cannot become ${name}: there is another file of that name`);
  }
}

/** Our entry out of every file, each as it was before. Returns what was changed. The caller holds the install lock. */
export function removeEntries(netDir: string, step: Step = () => {}): string[] {
  if (!existsSync(netDir)) return [];
  return repeated(() => {
    removeUnfinished(netDir);
    const found = readNetworkDirectory(netDir);
    return found.flatMap((each) => takeOut(netDir, each, found, step));
  });
}

function takeOut(netDir: string, read: FoundFile, found: readonly FoundFile[], step: Step): string[] {
  if (read.file === undefined) return [];
  const removal = withoutEntry(read.file);
  if (removal === null) return [];
  if (!('name' in removal)) {
    removeNetworkFile(netDir, read, step);
  } else if (removal.name === read.name) {
    writeNetworkFile(netDir, read.name, removal.bytes, { like: read.stats, read, step });
  } else {
    // The primary's installer may have written its lone configuration again meanwhile: then that one counts.
    if (!found.some(({ name }) => name === removal.name)) {
      writeNetworkFile(netDir, removal.name, removal.bytes, { like: read.stats, read, step });
    }
    removeNetworkFile(netDir, read, step);
  }
  return removal.notes;
}

function repeated<T>(body: () => T): T {
  for (let attempt = 1; ; attempt++) {
    try {
      return body();
    } catch (error) {
      if (!(error instanceof ChangedMeanwhile) || attempt === ATTEMPTS) throw error;
    }
  }
}

/** Longer than any edit, or the copy of the executable, takes. */
const LOCK_TIMEOUT_MILLISECONDS = 30_000;

/** Another install, uninstall or agent is editing at this moment. */
export class InstallLockHeld extends Error {
  override readonly name = 'InstallLockHeld';
}

/**
 * Runs `body` while no other install, uninstall or agent edits there; kill -9 releases it. Throws InstallLockHeld,
 * CniError 103 or 110.
 */
export function installLocked<T>(
  native: Native,
  runDir: string,
  body: () => T,
  timeoutMilliseconds: number = LOCK_TIMEOUT_MILLISECONDS,
): T {
  const path = join(runDir, 'install.lock');
  let fd: number;
  try {
    mkdirSync(runDir, { recursive: true, mode: 0o700 });
    fd = native.lockFile(path, timeoutMilliseconds);
  } catch (error) {
    if (hasCode(error, 'ETIMEDOUT')) {
      throw new InstallLockHeld(`${path} stays locked by another install, uninstall or agent`, { cause: error });
    }
    throw stepError(Code.STATE_FAILED, `lock ${path}`, error);
  }
  try {
    return body();
  } finally {
    native.close(fd);
  }
}

/**
 * While this file is there the node is to be without us: an agent that still runs neither repairs the conflist nor
 * attaches. It is in runDir, so that a reboot, after which whoever installs is asked anew, forgets it.
 */
export function uninstallMarker(runDir: string): string {
  return join(runDir, 'uninstalled');
}

export function isUninstalled(runDir: string): boolean {
  return existsSync(uninstallMarker(runDir));
}

/** From now on an agent does nothing any more for the entry, or for pods. */
export function markUninstalled(runDir: string): void {
  mkdirSync(runDir, { recursive: true, mode: 0o700 });
  writeFileSync(uninstallMarker(runDir), '', { mode: 0o600 });
  rmSync(installedFile(runDir), { force: true });
}

export function unmarkUninstalled(runDir: string): void {
  rmSync(uninstallMarker(runDir), { force: true });
}

/** What the last install was told, for the agent, which repairs what it made. */
function installedFile(runDir: string): string {
  return join(runDir, 'install.json');
}

/** The caller holds the install lock. */
export function rememberInstall(runDir: string, options: EntryOptions): void {
  const owner = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
  replaceFile(installedFile(runDir), Buffer.from(JSON.stringify(options)), { ...owner, mode: 0o600 });
}

/** undefined: install was not run since the node booted, or uninstall since. */
export function rememberedInstall(runDir: string): EntryOptions | undefined {
  try {
    return JSON.parse(readFileSync(installedFile(runDir), 'utf8')) as EntryOptions;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}
