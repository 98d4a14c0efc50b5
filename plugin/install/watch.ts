// SPDX-License-Identifier: Apache-2.0
// Keeps our entry in the node's conflist while the agent runs. Other tools write there too: the primary's daemon when
// it is upgraded, another chained plugin's, a person. Each change leads to a look, a look that finds the entry missing
// or changed to a repair, and repairs that follow each other quickly to longer and longer pauses: whoever wants the
// file otherwise for ever gets a log line and a slow argument, not a busy node.

import { EventEmitter } from 'node:events';
import { type FSWatcher, mkdirSync, statSync, watch } from 'node:fs';
import { join } from 'node:path';
import type { Native } from '../native.ts';
import {
  type Ensured,
  type EntryOptions,
  ensureEntry,
  InstallLockHeld,
  installLocked,
  isUninstalled,
  rememberedInstall,
} from './entry.ts';
import { findPrimary, readNetworkDirectory } from './network-directory.ts';

/** Milliseconds. */
export interface Pace {
  /** from a change to the look at it: who writes a file in pieces is left to finish */
  settle: number;
  /** from a repair to the next one; doubled with each that follows, up to `longest` */
  first: number;
  longest: number;
  /** without a repair, after which the next one is immediate again */
  quiet: number;
  /** between looks without a change: inotify tells nothing of a directory that is mounted over, or of a lost event */
  period: number;
}

const PACE: Pace = { settle: 50, first: 250, longest: 15_000, quiet: 60_000, period: 10_000 };

/** Repairs without a quiet time between them, after which somebody is taken to be working against us. */
const FIGHT = 5;

export interface WatchState {
  /**
   * there: the entry is in the file that the runtime reads. absent: no primary configuration is there. uninstalled:
   * nobody wants it there, see `reason`
   */
  entry: 'unknown' | 'there' | 'absent' | 'failed' | 'uninstalled';
  /** the file with the entry, or '' */
  file: string;
  /** why it is not there, or '' */
  reason: string;
  /** since start() */
  looks: number;
  repairs: number;
}

interface Events {
  /** the entry was put in, or put right */
  repaired: [Ensured];
  /** `state.entry` has another value */
  state: [WatchState];
  /** a sentence about what happens again and again, and who it may be */
  fighting: [string];
}

export class ConflistWatch extends EventEmitter<Events> {
  readonly #native: Native;
  readonly #runDir: string;
  readonly #pace: Pace;
  /** as the last install said */
  #options: EntryOptions | undefined;
  #watcher: FSWatcher | undefined;
  #runWatcher: FSWatcher | undefined;
  /** of the directory that is watched: one that is made anew has another */
  #directory = '';
  #timer: NodeJS.Timeout | undefined;
  #due = 0;
  #pause = 0;
  #lastRepair = Number.NEGATIVE_INFINITY;
  #inARow = 0;
  #state: WatchState = { entry: 'unknown', file: '', reason: '', looks: 0, repairs: 0 };
  #running = false;

  /** What to keep, and where, is what `install` with this runDir was told the last time. */
  constructor(native: Native, runDir: string, pace: Partial<Pace> = {}) {
    super();
    this.#native = native;
    this.#runDir = runDir;
    this.#pace = { ...PACE, ...pace };
  }

  /** uninstall was run: the node is to be without us */
  get left(): boolean {
    return isUninstalled(this.#runDir);
  }

  get state(): Readonly<WatchState> {
    return this.#state;
  }

  /** Looks at once, before it returns. */
  start(): void {
    this.#running = true;
    try {
      mkdirSync(this.#runDir, { recursive: true, mode: 0o700 });
      this.#runWatcher = watch(this.#runDir, (_event, name) => {
        if (name === 'uninstalled' || name === 'install.json') this.#schedule(this.#pace.settle);
      }).on('error', () => {});
    } catch {
      // The periodic look finds it.
    }
    this.#look();
  }

  /** Leaves everything as it is. */
  stop(): void {
    this.#running = false;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#watcher?.close();
    this.#runWatcher?.close();
    this.#watcher = undefined;
    this.#runWatcher = undefined;
  }

  #look(): void {
    if (!this.#running) return;
    this.#timer = undefined;
    this.#state = { ...this.#state, looks: this.#state.looks + 1 };
    let next = this.#pace.period;
    try {
      this.#options = rememberedInstall(this.#runDir);
      // Before the look, so that a change that comes during it leads to another.
      this.#watchDirectory();
      this.#ensure();
    } catch (error) {
      if (error instanceof InstallLockHeld) next = this.#pace.settle;
      else this.#change('failed', '', error instanceof Error ? error.message : String(error));
    }
    if (performance.now() - this.#lastRepair > this.#pace.quiet) {
      this.#pause = 0;
      this.#inARow = 0;
    }
    // A handler may have stopped it.
    if (this.#running) this.#schedule(next);
  }

  #ensure(): void {
    const options = this.#options;
    if (isUninstalled(this.#runDir)) {
      this.#change('uninstalled', '', 'uninstall was run on this node; install undoes it');
      return;
    }
    if (options === undefined) {
      this.#change('uninstalled', '', 'install was not run since this node booted');
      return;
    }
    // The event loop stands still while it waits for the lock.
    const ensured = installLocked(this.#native, this.#runDir, () => ensureEntry(options), 0);
    if (ensured === null) {
      const { netDir, confName } = options;
      this.#change(
        'absent',
        '',
        `${netDir} does not have ${confName ?? 'a network configuration'} of a primary plugin`,
      );
      return;
    }
    this.#change('there', ensured.name, '');
    if (ensured.notes.length === 0) return;
    this.#state = { ...this.#state, repairs: this.#state.repairs + 1 };
    this.#lastRepair = performance.now();
    this.#pause = this.#pause === 0 ? this.#pace.first : Math.min(this.#pause * 2, this.#pace.longest);
    this.#inARow += 1;
    this.emit('repaired', ensured);
    if (this.#inARow === FIGHT) this.emit('fighting', whoFights(options, ensured));
  }

  #change(entry: WatchState['entry'], file: string, reason: string): void {
    const before = this.#state;
    this.#state = { ...before, entry, file, reason };
    if (before.entry !== entry || before.reason !== reason) this.emit('state', this.#state);
  }

  /** The earlier of what is due already and `milliseconds` from now, but no repair before the pause is over. */
  #schedule(milliseconds: number): void {
    const now = performance.now();
    const due = Math.max(now + milliseconds, this.#lastRepair + this.#pause);
    if (this.#timer !== undefined && this.#due <= due) return;
    clearTimeout(this.#timer);
    this.#due = due;
    this.#timer = setTimeout(() => this.#look(), due - now);
  }

  /** inotify watches an inode, not a path. */
  #watchDirectory(): void {
    const netDir = this.#options?.netDir;
    let directory = '';
    try {
      if (netDir !== undefined) {
        const { dev, ino } = statSync(netDir, { bigint: true });
        directory = `${dev}:${ino}`;
      }
    } catch {
      // The look says why.
    }
    if (this.#watcher !== undefined && directory === this.#directory) return;
    this.#watcher?.close();
    this.#watcher = undefined;
    this.#directory = directory;
    if (directory === '' || netDir === undefined) return;
    try {
      this.#watcher = watch(netDir, { persistent: true }, () => this.#schedule(this.#pace.settle));
      this.#watcher.on('error', () => {
        this.#watcher?.close();
        this.#watcher = undefined;
      });
    } catch {
      // No inotify watch to be had (fs.inotify.max_user_watches): the periodic look is what there is.
    }
  }
}

function whoFights({ netDir, confName }: EntryOptions, { primary }: Ensured): string {
  const types = findPrimary(readNetworkDirectory(netDir), confName)?.file.plugins.map(({ type }) => type) ?? [];
  const suspects = [...new Set(types.flatMap((type) => WRITERS[type] ?? []))];
  const who = suspects.length > 0 ? suspects.join(', or ') : `whoever installs ${types[0] ?? 'the primary plugin'}`;
  return (
    `${join(netDir, primary)} was changed back ${FIGHT} times in a row: ${who} may write it again and again; ` +
    'repairs are slowed down. An owned conflist (ISTIO_OWNED_CNI_CONFIG=true) leaves the file to it'
  );
}

/** Who writes conflists with such an entry, by their own documentation. */
const WRITERS: Readonly<Record<string, string>> = {
  'cilium-cni': 'the Cilium agent (cni.exclusive=false keeps it from removing others)',
  'istio-cni': 'the istio-cni node agent',
  'kmesh-cni': 'the Kmesh daemon',
  'linkerd-cni': 'the linkerd-cni installer',
  'merbridge-cni': 'the Merbridge agent',
  calico: 'the Calico node (install-cni)',
  flannel: 'the flannel DaemonSet',
  multus: 'the multus DaemonSet',
  'aws-cni': 'the aws-node DaemonSet',
  antrea: 'the Antrea agent',
  'azure-vnet': 'the Azure CNI installer',
};
