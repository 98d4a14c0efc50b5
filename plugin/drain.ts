// SPDX-License-Identifier: Apache-2.0
// Leaving without cutting: new connections of a draining pod go direct, those that the proxy has stay with it, and the
// programs go when it has none of them any more. Nothing of ours may be running then, so that whatever runs next looks.

import { mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { hex } from './attachments.ts';
import { detachRecordSteps, inOwnNetns, notEnrolled } from './datapath.ts';
import type { AttachmentKey, AttachmentRecord, Native, State } from './native.ts';
import { beside, type Directories, openState } from './state.ts';
import { runHere, type Steps } from './steps.ts';

/**
 * A SYN that was redirected the moment before is no socket of the proxy's yet: whoever looks for sockets at once finds
 * none, takes the programs away, and the handshake ends in a RST. Softirqs are late on a busy node.
 */
export const DRAIN_SETTLE_MS = 200;

/** Exists while a pod drains, so that a run that has nothing to do finds out by one system call. */
function marker({ runDir }: Directories): string {
  return join(runDir, 'draining');
}

export function isDraining(native: Native, record: AttachmentRecord): boolean {
  return record.role === 'pod' && (record.flags & (native.flags.INTERFACE_DRAINING ?? 0)) !== 0;
}

/** From now on new connections of the pod go direct. Nothing is done for one whose DEL has run meanwhile. */
export function beginDrain(
  native: Native,
  dirs: Directories,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
): void {
  const flags = record.flags | (native.flags.INTERFACE_DRAINING ?? 0);
  mkdirSync(dirs.runDir, { recursive: true, mode: 0o700 });
  writeFileSync(marker(dirs), '', { mode: 0o600 });
  if (!native.replaceAttachment(state, key, { ...record, flags })) return;
  const entry = native.getInterface(state, record.interfaceId);
  if (entry !== null) native.putInterface(state, record.interfaceId, { ...entry, flags });
  for (const address of record.addresses) {
    const endpoint = native.getEndpoint(state, address);
    if (endpoint?.ifindex !== record.interfaceId) continue;
    native.putEndpoint(state, address, { ...endpoint, flags }, false);
  }
}

/** Connections of the pod that a proxy has at this moment: both ends of each, where it has both. */
export function proxiedConnections(native: Native, state: State, record: AttachmentRecord): number {
  const own = new Set(record.addresses.map(hex));
  let found = 0;
  if (record.contract === 'in-pod') {
    // The proxy's ends have addresses of others: of whom the pod talks to.
    inOwnNetns(native, record, (netns) => {
      found = native
        .connections(netns)
        .filter(({ local, remote }) => !own.has(hex(local)) && own.has(hex(remote))).length;
    });
    return found;
  }
  for (const proxy of native.getProxies(state).proxies) {
    const attachment = native.getAttachment(state, proxy.key);
    if (attachment === null) continue;
    inOwnNetns(native, attachment, (netns) => {
      found += native
        .connections(netns)
        .filter(({ local, remote }) => own.has(hex(local)) || own.has(hex(remote))).length;
    });
  }
  return found;
}

/** Begins, waits for what is under way, and returns how many sockets of the proxy's are left; 0: it can be detached. */
export function startDrain(native: Native, dirs: Directories, key: AttachmentKey, record: AttachmentRecord): number {
  const state = openState(native, dirs.stateDir);
  if (state === null) return 0;
  try {
    beginDrain(native, dirs, state, key, record);
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, DRAIN_SETTLE_MS);
    return proxiedConnections(native, state, record);
  } finally {
    native.closeState(state);
  }
}

/** Takes the programs away; the pod stays recorded as one that is not enrolled while it is there. */
export function endDrain(
  native: Native,
  dirs: Directories,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
): void {
  runHere(endDrainSteps(native, dirs, state, key, record));
}

export function* endDrainSteps(
  native: Native,
  dirs: Directories,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
): Steps<void> {
  yield* detachRecordSteps(native, dirs, state, key, record, () => {
    let left: AttachmentRecord | null = null;
    inOwnNetns(native, record, () => {
      left = notEnrolled(record);
    });
    return left;
  });
}

/**
 * Takes a pod out now, draining or not. It stays recorded at each moment, as one that is not enrolled from some point on.
 * Throws NativeError, or CniError 103 or 104.
 */
export function takeOut(native: Native, dirs: Directories, key: AttachmentKey): void {
  beside(native, dirs.runDir, () => {
    const state = openState(native, dirs.stateDir);
    if (state === null) return;
    try {
      const record = native.getAttachment(state, key);
      if (record !== null) endDrain(native, dirs, state, key, record);
    } finally {
      native.closeState(state);
    }
  });
}

/** Ends every drain that is over. Throws NativeError, or CniError 103 or 104; what is left is for the next run. */
export function endDrains(native: Native, dirs: Directories): void {
  const began = statSync(marker(dirs), { throwIfNoEntry: false })?.mtimeMs;
  if (began === undefined) return;
  const age = Date.now() - began;
  if (age >= 0 && age < DRAIN_SETTLE_MS) return;
  beside(native, dirs.runDir, () => endDrainsBeside(native, dirs));
}

function endDrainsBeside(native: Native, dirs: Directories): void {
  const state = openState(native, dirs.stateDir);
  try {
    let left = 0;
    for (const { key, record } of state === null ? [] : native.listAttachments(state)) {
      if (state === null || !isDraining(native, record)) continue;
      if (proxiedConnections(native, state, record) > 0) left++;
      else endDrain(native, dirs, state, key, record);
    }
    if (left === 0) rmSync(marker(dirs), { force: true });
  } finally {
    if (state !== null) native.closeState(state);
  }
}

/** For the verbs, whose own work does not depend on it: the error's text, or null. */
export function tryEndDrains(native: Native, dirs: Directories): string | null {
  try {
    endDrains(native, dirs);
    return null;
  } catch (error) {
    if (error instanceof Error) return error.message;
    throw error;
  }
}
