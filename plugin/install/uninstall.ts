// SPDX-License-Identifier: Apache-2.0
// `uninstall`: the entry first, so that no pod comes in any more; then the pods that are in, drained; the state, the
// pods' annotations; the executable last, when no network names it. Every step looks at what is there, so that doing
// it again goes on after whatever cut it short.

import { existsSync, readdirSync, readFileSync, rmdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { describePod, detachRecord } from '../datapath.ts';
import { beginDrain, DRAIN_SETTLE_MS, endDrain, isDraining, proxiedConnections } from '../drain.ts';
import type { AttachmentKey, AttachmentRecord, Native, State } from '../native.ts';
import { type Directories, knownStateDirs, openState } from '../state.ts';
import { PLUGIN_TYPE } from './conflist.ts';
import { installLocked, isUninstalled, markUninstalled, removeEntries } from './entry.ts';
import { type Removal, removeExecutable } from './executable.ts';
import type { Step } from './files.ts';
import { filesThatRefer } from './network-directory.ts';

export interface UninstallOptions extends Directories {
  netDir: string;
  binDir: string;
  /** seconds that connections through the proxy may go on; 0: cut at once; Infinity: for ever */
  drainTimeout: number;
  /** seconds between the entry's end and the executable's */
  executableDelay: number;
  cniCacheDir: string;
  /** there on a node whose runtime calls DEL with the configuration in libcni's cache */
  crioSocket?: string;
  /** takes the pods' `ambient.istio.io/redirection` away */
  unannotate?: () => Promise<void>;
}

export interface Uninstalled {
  /** pods that were detached, by name */
  pods: string[];
  /** connections through the proxy that were cut */
  cut: number;
  /** what became of the executable, or why it stays */
  executable: Removal | { kept: string };
}

/** How often the proxy's sockets are looked at. */
const DRAIN_POLL_MILLISECONDS = 200;

const CRIO_SOCKET = '/var/run/crio/crio.sock';

/** `report` gets a line for each thing done. Throws CniError 103 or 104, or what the file system or `unannotate` throws. */
export async function uninstall(
  native: Native,
  options: UninstallOptions,
  report: (line: string) => void,
  step: Step = () => {},
): Promise<Uninstalled> {
  const { netDir, binDir, runDir, cniCacheDir, crioSocket = CRIO_SOCKET } = options;
  markUninstalled(runDir);
  step('marked');
  for (const note of installLocked(native, runDir, () => removeEntries(netDir, step))) report(note);
  const entryGone = performance.now();

  const outcome: Uninstalled = { pods: [], cut: 0, executable: 'absent' };
  const deadline = entryGone + options.drainTimeout * 1000;
  for (const stateDir of new Set([options.stateDir, ...knownStateDirs(runDir)])) {
    await leaveState(native, { stateDir, runDir }, deadline, outcome, report, step);
  }
  await options.unannotate?.();
  step('annotations removed');

  await delay(Math.max(0, options.executableDelay * 1000 - (performance.now() - entryGone)));
  // An ADD that had begun before the entry went may have made state since.
  for (const stateDir of new Set([options.stateDir, ...knownStateDirs(runDir)])) {
    await leaveState(native, { stateDir, runDir }, deadline, outcome, report, step);
  }
  outcome.executable = installLocked(native, runDir, () => {
    // In a container the socket is seen past process 1, where the node's processes are.
    const isCrio = [crioSocket, join('/proc/1/root', crioSocket)].some((path) => existsSync(path));
    const kept = whyExecutableStays(netDir, isCrio ? cniCacheDir : undefined);
    return kept === '' ? removeExecutable(binDir, step) : { kept };
  });
  for (const file of ['draining', 'state-dirs']) rmSync(join(runDir, file), { force: true });
  return outcome;
}

/** How long an install that nothing told of (the directory was made anew) goes unseen. */
const LOOK_MILLISECONDS = 1000;

/** true when install has been run since; false when `ended` is aborted. */
export async function installedAgain(runDir: string, ended: AbortSignal): Promise<boolean> {
  while (isUninstalled(runDir)) {
    if (ended.aborted) return false;
    await delay(LOOK_MILLISECONDS, undefined, { signal: ended }).catch(() => {});
  }
  return !ended.aborted;
}

/** Drains and detaches every pod, then the proxies, then removes the directory. */
async function leaveState(
  native: Native,
  dirs: Directories,
  deadline: number,
  outcome: Uninstalled,
  report: (line: string) => void,
  step: Step,
): Promise<void> {
  const state = openState(native, dirs.stateDir);
  if (state !== null) {
    try {
      await drainPods(native, dirs, state, deadline, outcome, report, step);
      for (const { key, record } of native.listAttachments(state)) {
        detachRecord(native, dirs, state, key, record);
        step(`detached ${describePod(record)}`);
      }
    } finally {
      native.closeState(state);
    }
  }
  if (!existsSync(dirs.stateDir)) return;
  removeStateDirectory(dirs.stateDir);
  report(`removed the state in ${dirs.stateDir}`);
  step(`removed ${dirs.stateDir}`);
}

async function drainPods(
  native: Native,
  dirs: Directories,
  state: State,
  deadline: number,
  outcome: Uninstalled,
  report: (line: string) => void,
  step: Step,
): Promise<void> {
  const pods = () => native.listAttachments(state).filter(({ record }) => record.role === 'pod');
  const finish = (key: AttachmentKey, record: AttachmentRecord) => {
    endDrain(native, dirs, state, key, record);
    outcome.pods.push(describePod(record));
    report(`unenrolled ${describePod(record)}`);
    step(`unenrolled ${describePod(record)}`);
  };
  for (const { key, record } of pods()) {
    if (!isDraining(native, record)) beginDrain(native, dirs, state, key, record);
  }
  step('draining');
  await delay(DRAIN_SETTLE_MS);
  for (let told = false; ; told = true) {
    const left = pods().flatMap((pod) => {
      const sockets = proxiedConnections(native, state, pod.record);
      if (sockets > 0) return [{ ...pod, sockets }];
      finish(pod.key, pod.record);
      return [];
    });
    if (left.length === 0) return;
    if (performance.now() >= deadline) {
      for (const { key, record, sockets } of left) {
        outcome.cut += sockets;
        finish(key, record);
      }
      return;
    }
    if (!told) report(`draining: ${left.map(({ record }) => describePod(record)).join(', ')}`);
    await delay(DRAIN_POLL_MILLISECONDS);
  }
}

/** Only pins and directories are there; anything else of somebody's keeps the directory. Programs end with their pins. */
function removeStateDirectory(directory: string): void {
  for (const entry of readdirSync(directory, { withFileTypes: true })) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) removeStateDirectory(path);
    else rmSync(path, { force: true });
  }
  rmdirSync(directory);
}

/** '': nothing names it. `cacheDir`: libcni's, where the runtime calls DEL with what is written there. */
function whyExecutableStays(netDir: string, cacheDir: string | undefined): string {
  const [file] = filesThatRefer(netDir);
  if (file !== undefined) return `${join(netDir, file)} still names it`;
  const cached = cacheDir === undefined ? [] : cachedThatRefer(join(cacheDir, 'results'));
  if (cached.length === 0) return '';
  return `CRI-O will call it for ${cached.length} pods that are still there (${cached[0]}); run uninstall again when they are gone`;
}

/** Attachments whose cached configuration, base64 in a JSON document, has our entry. */
function cachedThatRefer(directory: string): string[] {
  if (!existsSync(directory)) return [];
  return readdirSync(directory).filter((name) => {
    try {
      const { config } = JSON.parse(readFileSync(join(directory, name), 'utf8')) as { config?: unknown };
      return typeof config === 'string' && Buffer.from(config, 'base64').includes(`"${PLUGIN_TYPE}"`);
    } catch {
      return false;
    }
  });
}
