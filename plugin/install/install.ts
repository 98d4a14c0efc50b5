// SPDX-License-Identifier: Apache-2.0
// `install`: the pinned state as this build needs it, the executable among the runtime's plugins, then our entry in the
// node's conflist. Each step is on disk before the next one begins, and doing it again after whatever cut it short ends
// the same way.

import { watch } from 'node:fs';
import { type Migrated, migrateAll } from '../migrate.ts';
import type { Native } from '../native.ts';
import { parseConfig } from '../redirect/config.ts';
import { assertVariantInUse } from '../state.ts';
import {
  type Ensured,
  type EntryOptions,
  ensureEntry,
  installLocked,
  rememberInstall,
  unmarkUninstalled,
} from './entry.ts';
import { type Executable, placeExecutable } from './executable.ts';
import type { Step } from './files.ts';

export interface InstallOptions extends EntryOptions {
  binDir: string;
  stateDir: string;
  runDir: string;
  /** seconds for a primary configuration to appear; Infinity: for ever */
  wait: number;
  executable: Executable;
}

export interface Installed extends Ensured {
  executableChanged: boolean;
  /** by state directory */
  migrated: Map<string, Migrated>;
}

/** A change that fs.watch does not tell of (a network file system, a directory that was made anew) is seen so late. */
const POLL_MILLISECONDS = 1000;

/**
 * `waiting` is called once, if there is no primary configuration yet. Throws what migrateState and ensureEntry do, or that
 * it never came.
 */
export async function install(
  native: Native,
  options: InstallOptions,
  waiting: () => void,
  step: Step = () => {},
): Promise<Installed> {
  const { stateDir, runDir, netDir, binDir, executable, wait } = options;
  const config = parseConfig(options.wanted.entry);
  // An entry with which each ADD would be refused.
  assertVariantInUse(native, { ...config, stateDir });
  // Before anything else is changed, so that an agent that runs does not take the node for one that is being left.
  unmarkUninstalled(runDir);
  const { maxPods, maxFlows, directFlowsPerPod } = config;
  const capacity = { stateDir, runDir, maxPods, maxFlows, directFlowsPerPod };
  const migrated = migrateAll(native, capacity);
  const executableChanged = installLocked(native, runDir, () => {
    const changed = placeExecutable(executable, binDir, step);
    const { confName, ownedName, wanted, groupRead } = options;
    rememberInstall(runDir, { netDir, confName, ownedName, wanted, groupRead });
    return changed;
  });
  // ADDs of the executable that was there until now may have loaded its programs again.
  for (const [dir, more] of migrateAll(native, capacity)) {
    const before = migrated.get(dir);
    migrated.set(dir, { ...before, ...more, attachments: more.attachments + (before?.attachments ?? 0) });
  }
  const deadline = performance.now() + wait * 1000;
  for (let first = true; ; first = false) {
    const changed = watchFor(netDir, Math.min(POLL_MILLISECONDS, deadline - performance.now()));
    try {
      const ensured = installLocked(native, runDir, () => ensureEntry(options, step));
      if (ensured !== null) return { ...ensured, executableChanged, migrated };
      if (performance.now() >= deadline) {
        const what = options.confName ?? 'a valid network configuration';
        throw new Error(`${netDir} does not have ${what} of a primary plugin after ${wait} s`);
      }
      if (first) waiting();
      await changed.promise;
    } finally {
      changed.stop();
    }
  }
}

/** Begins to watch at once, so that nothing between a look and the wait for it is missed. */
function watchFor(directory: string, milliseconds: number): { promise: Promise<void>; stop: () => void } {
  const { promise, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, Math.max(0, milliseconds));
  let watcher: ReturnType<typeof watch> | undefined;
  try {
    watcher = watch(directory, () => resolve()).on('error', () => resolve());
  } catch {
    // Not there yet: the timer looks again.
  }
  return {
    promise,
    stop: () => {
      clearTimeout(timer);
      watcher?.close();
    },
  };
}
