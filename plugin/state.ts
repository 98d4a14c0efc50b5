// SPDX-License-Identifier: Apache-2.0
// The state directory on bpffs: pinned maps, programs and links. Opened by every verb, created by the first ADD.

import { appendFileSync, existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { CniError, Code } from './cni/errors.ts';
import type { Native, NativeError, State, StateSettings } from './native.ts';
import { type RedirectConfig, VARIANTS } from './redirect/config.ts';

/** Longer than any creation takes: map set-up and the verifier together need well under a second. */
const LOCK_TIMEOUT_MILLISECONDS = 10_000;
/** ADDs that come one after the other leave a gap between them. */
const MIGRATION_TIMEOUT_MILLISECONDS = 60_000;

export interface Directories {
  stateDir: string;
  runDir: string;
}

export function isNativeError(error: unknown): error is NativeError {
  return error instanceof Error && typeof (error as NativeError).syscall === 'string';
}

export function hasCode(error: unknown, ...codes: string[]): boolean {
  return isNativeError(error) && codes.includes(error.code);
}

/** "bpf(BPF_MAP_CREATE): EPERM, the kernel's words" */
export function kernelReason(error: unknown): string {
  if (!isNativeError(error)) return error instanceof Error ? error.message : String(error);
  const said = error.kernelMessage ? `, ${error.kernelMessage}` : '';
  const log = error.verifierLog ? `; verifier: ${lastLines(error.verifierLog, 3)}` : '';
  return `${error.syscall}: ${error.code}${said}${log}`;
}

/** A failed kernel call as the error of the step it belongs to; missing rights have their own code whatever the step. */
export function stepError(code: CniError['code'], step: string, error: unknown): CniError {
  if (error instanceof CniError) return error;
  if (!isNativeError(error)) throw error;
  const denied = error.code === 'EPERM' || error.code === 'EACCES';
  return new CniError(denied ? Code.NOT_PERMITTED : code, step, kernelReason(error), { cause: error });
}

/** Runs `body` holding the node's lock; kill -9 releases it. Throws CniError 103 when it stays held. */
export function locked<T>(native: Native, runDir: string, body: () => T): T {
  return holding(native, runDir, join(runDir, 'lock'), LOCK_TIMEOUT_MILLISECONDS, body);
}

function holding<T>(native: Native, runDir: string, path: string, timeout: number, body: () => T): T {
  let fd: number;
  try {
    makePath(native, runDir, 0o700);
    fd = native.lockFile(path, timeout);
  } catch (error) {
    throw stepError(Code.STATE_FAILED, `lock ${path}`, error);
  }
  try {
    return body();
  } finally {
    native.close(fd);
  }
}

/**
 * Runs `body` while no migration replaces maps and programs. A migration makes the directory of the lock: where there is
 * none, none is under way. Throws CniError 103 when one goes on for too long.
 */
export function beside<T>(native: Native, runDir: string, body: () => T): T {
  const leave = enterBeside(native, runDir);
  try {
    return body();
  } finally {
    leave();
  }
}

/** The same for what is not done in one go: until the function that it returns is called. */
export function enterBeside(native: Native, runDir: string): () => void {
  let fd: number | undefined;
  const path = migrationLock(runDir);
  try {
    fd = native.lockShared(path, LOCK_TIMEOUT_MILLISECONDS);
  } catch (error) {
    if (!hasCode(error, 'ENOENT')) throw stepError(Code.STATE_FAILED, `lock ${path}`, error);
  }
  return () => {
    if (fd !== undefined) native.close(fd);
  };
}

/** For whoever records that he is at work: the lock is there before the record is, so that it can be asked. */
export function enterToAttach(native: Native, runDir: string): () => void {
  try {
    makePath(native, runDir, 0o700);
  } catch (error) {
    throw stepError(Code.STATE_FAILED, `create ${runDir}`, error);
  }
  return enterBeside(native, runDir);
}

/** Runs `body` while nobody is in beside(). Throws CniError 103. */
export function alone<T>(native: Native, runDir: string, body: () => T): T {
  return holding(native, runDir, migrationLock(runDir), MIGRATION_TIMEOUT_MILLISECONDS, body);
}

/**
 * Nobody is in beside() at this moment, nor was anybody who began at `since` (seconds since the epoch): whoever wrote
 * then that he is at work was killed. false also where that cannot be told. Not to be asked from within beside().
 */
export function isNobodyBeside(native: Native, runDir: string, since: number): boolean {
  const path = migrationLock(runDir);
  // Builds that attached without it: before the lock was there nobody could hold it. Records have whole seconds.
  const made = statSync(path, { throwIfNoEntry: false })?.birthtimeMs;
  if (made === undefined || Math.floor(made / 1_000) > since) return false;
  try {
    native.close(native.lockFile(path, 0));
    return true;
  } catch (error) {
    if (hasCode(error, 'ETIMEDOUT')) return false;
    throw error;
  }
}

function migrationLock(runDir: string): string {
  return join(runDir, 'migration.lock');
}

/** Where a migration makes what is to replace the present maps and programs (migrate.ts). */
export function nextDirectory(stateDir: string): string {
  return join(stateDir, 'next');
}

/** The state at `dir`, or null if there is none. Throws CniError 103 or 104. */
export function openState(native: Native, dir: string): State | null {
  try {
    return native.openState(dir);
  } catch (error) {
    if (hasCode(error, 'ENOENT', 'ENOTDIR')) return null;
    if (hasCode(error, 'EPROTO')) {
      throw new CniError(Code.STATE_VERSION, `state in ${dir} has another layout`, (error as Error).message);
    }
    throw stepError(Code.STATE_FAILED, `open the state in ${dir}`, error);
  }
}

/**
 * Opens the state and makes what of it is missing: bpffs, directory, maps. `asItIs`: what is to be done is for pods that
 * are attached already, with the variant that they have. Throws CniError 7, 11, 103, 104, 110.
 */
export function ensureState(native: Native, config: RedirectConfig, asItIs = false): State {
  const { stateDir, runDir } = config;
  // Some pods have the programs of the next maps already, and would not know one that is only in these.
  const unfinished = join(nextDirectory(stateDir), 'complete');
  if (existsSync(unfinished)) {
    const details = `${unfinished} is there; "install" or the agent's start goes on with it`;
    throw new CniError(Code.TRY_AGAIN_LATER, `a migration of the state in ${stateDir} was cut short`, details);
  }
  const state = openState(native, stateDir) ?? locked(native, runDir, () => createState(native, config));
  try {
    const settings = native.settings(state);
    assertSameMarks(settings, config);
    if (!asItIs) assertSameVariant(native, settings, config);
  } catch (error) {
    native.closeState(state);
    throw stepError(Code.STATE_FAILED, `read the settings of ${stateDir}`, error);
  }
  return state;
}

/** The programs' directory name: which object, which forced variant. */
export function programTag(native: Native, settings: StateSettings): string {
  return settings.variant === 0 ? native.objectId : `${native.objectId}-v${settings.variant}`;
}

/**
 * Why a process of this build is to attach nothing here any more, or null: another build has put its programs in the
 * place of this one's, as `install` does before it places the executable. Whoever attaches this one's again would have
 * all pods of the contract in-pod go on with them, by the jump maps.
 */
export function supersededBy(native: Native, state: State, stateDir: string): string | null {
  const directory = join(stateDir, 'programs');
  const present = existsSync(directory) ? readdirSync(directory) : [];
  const own = programTag(native, native.settings(state));
  if (present.length === 0 || present.includes(own)) return null;
  return `${directory} has the programs of another build (${present.join(', ')}), this process is of ${own}: it is to be replaced, and attaches nothing until then`;
}

/** Programs are loaded once for a state directory and then only opened. Throws CniError 102, 103. */
export function ensurePrograms(native: Native, state: State, config: Directories): string {
  const tag = programTag(native, native.settings(state));
  // The last one that loadPrograms pins tells that all are there.
  const last = join(config.stateDir, 'programs', tag, 'proxy_ingress');
  if (isPinned(native, last)) return tag;
  locked(native, config.runDir, () => {
    if (isPinned(native, last)) return;
    try {
      makePath(native, join(config.stateDir, 'programs'), 0o700);
      native.loadPrograms(state, config.stateDir, tag);
    } catch (error) {
      throw stepError(Code.STATE_FAILED, `load the programs into ${config.stateDir}/programs/${tag}`, error);
    }
  });
  return tag;
}

/**
 * State directories that were in use since boot, from runDir: a DEL whose configuration names another directory than
 * its ADD's finds them here.
 */
export function knownStateDirs(runDir: string): string[] {
  try {
    return [...new Set(readFileSync(join(runDir, 'state-dirs'), 'utf8').split('\n'))].filter((dir) => dir !== '');
  } catch {
    return [];
  }
}

function createState(native: Native, config: RedirectConfig): State {
  const { stateDir, runDir } = config;
  try {
    // Another ADD may have made it while this one waited for the lock.
    const state = openState(native, stateDir);
    if (state !== null) return state;
    mountIfNeeded(native, stateDir);
    makePath(native, stateDir, 0o700);
    if (!knownStateDirs(runDir).includes(stateDir)) {
      appendFileSync(join(runDir, 'state-dirs'), `${stateDir}\n`, { mode: 0o600 });
    }
    native.createState(stateDir, {
      maxPods: config.maxPods,
      maxFlows: config.maxFlows,
      directFlowsPerPod: config.directFlowsPerPod,
      marks: config.marks,
      variant: variantBits(native, config.variant),
    });
    return native.openState(stateDir);
  } catch (error) {
    throw stepError(Code.STATE_FAILED, `create the state in ${stateDir}`, error);
  }
}

function mountIfNeeded(native: Native, stateDir: string): void {
  const parent = dirname(stateDir);
  if (native.isBpffs(parent)) return;
  if (parent !== '/sys/fs/bpf') {
    throw new CniError(Code.STATE_FAILED, `create the state in ${stateDir}`, `${parent} is not on a bpf file system`);
  }
  native.mountBpffs(parent);
}

function assertSameMarks(settings: StateSettings, config: RedirectConfig): void {
  for (const key of ['bypass', 'toProxy', 'tproxy'] as const) {
    if (settings.marks[key] === config.marks[key]) continue;
    const details =
      `marks.${key} = ${config.marks[key]}: the state in ${config.stateDir} was made with ${settings.marks[key]}, ` +
      'and programs of both would not understand each other';
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'marks differ from those in use', details);
  }
}

/**
 * Programs of another variant do not fit the pods that are there: they use other links, rules in the proxy's namespace
 * and locks, which no program can replace in place. Throws CniError 7.
 */
function assertSameVariant(native: Native, settings: StateSettings, { variant, stateDir }: RedirectConfig): void {
  if (variant === null || settings.variant === variantBits(native, variant)) return;
  const present = VARIANTS.find((one) => variantBits(native, one) === settings.variant) ?? settings.variant;
  const details =
    `variant = "${variant}": the state in ${stateDir} was made with "${present}", which its pods keep while they run; ` +
    'to change it run "uninstall", then "install" with the new one, and pods are drained and enrolled anew';
  throw new CniError(Code.INVALID_NETWORK_CONFIG, 'variant differs from the one in use', details);
}

/** Throws CniError 7 if there is a state at config.stateDir and it was made with another variant; 103, 104. */
export function assertVariantInUse(native: Native, config: RedirectConfig): void {
  const state = openState(native, config.stateDir);
  if (state === null) return;
  try {
    assertSameVariant(native, native.settings(state), config);
  } finally {
    native.closeState(state);
  }
}

/** VARIANT_* of bpf/redirect.h. */
function variantBits(native: Native, variant: RedirectConfig['variant']): number {
  if (variant === null || variant === 'auto') return 0;
  const name = `VARIANT_${variant.toUpperCase().replaceAll('-', '_')}`;
  const bit = native.flags[name];
  if (bit === undefined) throw new CniError(Code.INTERNAL, `the addon knows no ${name}`);
  return bit;
}

function isPinned(native: Native, path: string): boolean {
  try {
    native.close(native.openProgram(path));
    return true;
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return false;
    throw stepError(Code.STATE_FAILED, `open ${path}`, error);
  }
}

/** Every missing directory of `path`; only the last one gets `mode`. */
function makePath(native: Native, path: string, mode: number): void {
  try {
    native.makeDirectory(path, mode);
  } catch (error) {
    if (!hasCode(error, 'ENOENT') || dirname(path) === path) throw error;
    makePath(native, dirname(path), 0o755);
    native.makeDirectory(path, mode);
  }
}

function lastLines(text: string, count: number): string {
  return text.trimEnd().split('\n').slice(-count).join(' | ');
}
