// SPDX-License-Identifier: Apache-2.0
// Holds what is recorded against what the kernel has, names each difference and puts it right: whenever the agent asks,
// and when the kernel tells that a link of the node, its qdiscs or filters have changed. The record is the measure, so
// that nothing depends on the API: what it says is made again as it was.

import { hex } from '../attachments.ts';
import { listenerState } from '../cli/survey.ts';
import {
  attachSteps,
  describePod,
  type Finding,
  type FindingKind,
  inOwnNetns,
  isDead,
  targetOf,
  verify,
} from '../datapath.ts';
import { endDrainSteps } from '../drain.ts';
import { isUninstalled } from '../install/entry.ts';
import type { AttachmentKey, AttachmentRecord, Native, State } from '../native.ts';
import type { RedirectConfig } from '../redirect/config.ts';
import { openState } from '../state.ts';
import type { StepQueue } from '../steps.ts';

export type DriftKind = FindingKind | 'listener';

export interface Drift {
  kind: DriftKind;
  /** "NAMESPACE/NAME" */
  pod: string;
  object: string;
  expected: string;
  found: string;
}

export interface TruthOptions {
  native: Native;
  steps: StepQueue;
  config: RedirectConfig;
  onDrift: (drift: Drift) => void;
  onRepaired: (record: AttachmentRecord) => void;
  /** its interface is gone while its namespace is not: it is recorded as one that is not enrolled */
  onForgotten: (record: AttachmentRecord) => void;
  /** it stays as it is until the next comparison */
  onUnrepaired: (record: AttachmentRecord, error: Error) => void;
  /** a comparison could not be made */
  onTrouble: (error: Error) => void;
  /** a comparison has ended; seconds that it took */
  onCompared?: (seconds: number, attachments: number) => void;
}

interface Recorded {
  key: AttachmentKey;
  record: AttachmentRecord;
}

/**
 * A DEL takes the programs before the record, and an ADD writes the record before the programs: a difference counts if
 * it is there a second time, when both have ended.
 */
const SECOND_LOOK_MS = 300;
/** Several changes come at once. */
const EVENT_DELAY_MS = 50;
/** Kernel calls are synchronous: how long others wait at most. */
const SLICE_MS = 10;

export class Truth {
  readonly #options: TruthOptions;
  /** "KEY PORT FAMILY" of listeners that were there when last looked at */
  readonly #listening = new Set<string>();
  readonly #changed = new Set<number>();
  #running: Promise<unknown> = Promise.resolve();
  #eventTimer: NodeJS.Timeout | undefined;
  #unwatch: (() => void) | undefined;
  #stopped = false;

  constructor(options: TruthOptions) {
    this.#options = options;
  }

  /** Follows the kernel's events until stop(). */
  follow(): void {
    const { native } = this.#options;
    const socket = native.openLinkEvents();
    const unwatch = native.watchReadable(socket, () => this.#onEvents(native.readLinkEvents(socket)));
    this.#unwatch = () => {
      unwatch();
      native.close(socket);
    };
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    clearTimeout(this.#eventTimer);
    this.#unwatch?.();
    await this.#running;
  }

  /** Everything, or only attachments of these host-side interfaces. One comparison at a time. Never throws. */
  compare(ifindexes?: ReadonlySet<number>): Promise<void> {
    const run = this.#running
      .then(() => (this.#stopped ? undefined : this.#compare(ifindexes)))
      .catch((error: Error) => this.#options.onTrouble(error));
    this.#running = run;
    return run;
  }

  #onEvents(ifindexes: number[] | null): void {
    if (ifindexes === null) {
      void this.compare();
      return;
    }
    for (const ifindex of ifindexes) this.#changed.add(ifindex);
    this.#eventTimer ??= setTimeout(() => {
      this.#eventTimer = undefined;
      const changed = new Set(this.#changed);
      this.#changed.clear();
      void this.compare(changed);
    }, EVENT_DELAY_MS);
  }

  async #compare(ifindexes?: ReadonlySet<number>): Promise<void> {
    const { native, config, onCompared } = this.#options;
    const state = openState(native, config.stateDir);
    if (state === null) return;
    const started = performance.now();
    try {
      const records = native
        .listAttachments(state)
        .filter(
          ({ record }) => record.state === 'attached' && (ifindexes === undefined || ifindexes.has(record.hostIfindex)),
        );
      const suspects = await this.#suspects(state, records);
      if (suspects.length > 0) {
        await new Promise((resolve) => setTimeout(resolve, SECOND_LOOK_MS));
        for (const { key } of suspects) await this.#repair(state, key);
      }
      if (ifindexes === undefined) {
        this.#compareListeners(state, records);
        onCompared?.((performance.now() - started) / 1000, records.length);
      }
    } finally {
      native.closeState(state);
    }
  }

  async #suspects(state: State, records: readonly Recorded[]): Promise<Recorded[]> {
    const suspects: Recorded[] = [];
    let slice = performance.now();
    for (const recorded of records) {
      if (performance.now() - slice > SLICE_MS) {
        await new Promise(setImmediate);
        slice = performance.now();
      }
      try {
        if (this.#findings(state, recorded).length > 0) suspects.push(recorded);
      } catch (error) {
        // One pod that cannot be looked at is no reason not to look at the others.
        this.#options.onUnrepaired(recorded.record, error as Error);
      }
    }
    return suspects;
  }

  #findings(state: State, { key, record }: Recorded): Finding[] {
    const { native, config } = this.#options;
    return verify(native, state, config, key, record);
  }

  async #repair(state: State, key: AttachmentKey): Promise<void> {
    const { native, steps, config, onDrift, onRepaired, onForgotten, onUnrepaired } = this.#options;
    await new Promise(setImmediate);
    const record = native.getAttachment(state, key);
    if (record?.state !== 'attached' || isUninstalled(config.runDir)) return;
    const findings = this.#findings(state, { key, record });
    if (findings.length === 0 || isDead(native, record)) return;
    const pod = describePod(record);
    for (const { kind, object, expected, found } of findings) onDrift({ kind, pod, object, expected, found });
    try {
      if (record.role === 'pod' && record.hooks.length > 0 && !hasInterface(native, record)) {
        // Its programs went with the interface; what is left are entries for an index and addresses that others may get.
        await steps.run(endDrainSteps(native, config, state, key, record));
        onForgotten(record);
        return;
      }
      const wanted = { ...config, proxy: { ...config.proxy, contract: record.contract } };
      const target = { ...targetOf(key, record, 'pod'), role: record.role, asRecorded: true, resident: true };
      await steps.run(attachSteps(native, wanted, target));
      onRepaired(record);
    } catch (error) {
      onUnrepaired(record, error as Error);
    }
  }

  /** Whether a proxy listens is its own affair: a listener that has gone is named and counted once, not repaired. */
  #compareListeners(state: State, records: readonly Recorded[]): void {
    const { native, onDrift } = this.#options;
    const listed = native.getProxies(state).proxies;
    for (const { key, record } of records) {
      const ports = listed.find((proxy) => hex(proxy.key) === hex(key))?.ports;
      if (record.role !== 'proxy' || ports === undefined) continue;
      inOwnNetns(native, record, (netns) => {
        const listeners = native.listeners(netns);
        for (const port of [ports.outbound, ports.inboundPlaintext, ports.inboundHBONE]) {
          for (const family of [4, 6] as const) {
            const id = `${hex(key)} ${port} ${family}`;
            const found = listenerState(listeners, family, port);
            if (found === 'listening') this.#listening.add(id);
            else if (this.#listening.delete(id)) {
              onDrift({
                kind: 'listener',
                pod: describePod(record),
                object: `IPv${family} listener on port ${port}`,
                expected: 'listening',
                found,
              });
            }
          }
        }
      });
    }
  }
}

/** By its name: one that was made anew has another index, and is attached to. */
function hasInterface(native: Native, record: AttachmentRecord): boolean {
  let found = false;
  inOwnNetns(native, record, (netns) => {
    found = native.linkByName(netns, record.ifname) !== null;
  });
  return found;
}
