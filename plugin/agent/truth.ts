// SPDX-License-Identifier: Apache-2.0
// Holds what is recorded against what the kernel has, names each difference and puts it right: whenever the agent asks,
// and when the kernel tells that a link of the node, its qdiscs or filters have changed. The record is the measure, so
// that nothing depends on the API: what it says is made again as it was.

import { hex } from '../attachments.ts';
import { listenerState, listenersWithin } from '../cli/survey.ts';
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
import { endDrainSteps, isDraining } from '../drain.ts';
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
  /** how often compare() is called for everything */
  periodMs: number;
  onDrift: (drift: Drift) => void;
  onRepaired: (record: AttachmentRecord) => void;
  /** its interface is gone while its namespace is not: it is recorded as one that is not enrolled */
  onForgotten: (record: AttachmentRecord) => void;
  /** it stays as it is until the next comparison */
  onUnrepaired: (record: AttachmentRecord, error: Error) => void;
  /** ztunnel has acknowledged a pod of the contract "in-pod", and so has listeners there */
  isServed: (record: AttachmentRecord) => boolean;
  /** has ztunnel open its listeners in a pod anew; rejects where it does not */
  serveAgain: (record: AttachmentRecord) => Promise<void>;
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
/**
 * Periods between two times that ztunnel is to open its listeners in one pod anew, which ends what the pod has open
 * through it: after the first time, and at most. A pod that was whole for as long as the latter begins anew.
 */
const RENEWAL_PERIODS = [4, 20] as const;

export class Truth {
  readonly #options: TruthOptions;
  /** "KEY PORT FAMILY" of listeners that were there when last looked at */
  readonly #listening = new Set<string>();
  /** by key, of pods whose listeners ztunnel was to open anew; times of performance.now() */
  readonly #renewals = new Map<string, { last: number; waitMs: number }>();
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
        await this.#compareListenersInPods(state, records);
        onCompared?.((performance.now() - started) / 1000, records.length);
      }
    } finally {
      native.closeState(state);
    }
  }

  async #suspects(state: State, records: readonly Recorded[]): Promise<Recorded[]> {
    const suspects: Recorded[] = [];
    await this.#eachInSlices(records, (recorded) => {
      if (this.#findings(state, recorded).length > 0) suspects.push(recorded);
    });
    return suspects;
  }

  async #eachInSlices(records: readonly Recorded[], look: (recorded: Recorded) => void): Promise<void> {
    let slice = performance.now();
    for (const recorded of records) {
      if (performance.now() - slice > SLICE_MS) {
        await new Promise(setImmediate);
        slice = performance.now();
      }
      try {
        look(recorded);
      } catch (error) {
        // One pod that cannot be looked at is no reason not to look at the others.
        this.#options.onUnrepaired(recorded.record, error as Error);
      }
    }
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

  /**
   * ztunnel opens a pod's listeners when it is told of the pod. Where one is gone although it has acknowledged the pod,
   * it is told to forget the pod and then of it anew; other pods are not touched.
   */
  async #compareListenersInPods(state: State, records: readonly Recorded[]): Promise<void> {
    const suspects: Recorded[] = [];
    await this.#eachInSlices(records, (recorded) => {
      if (this.#missingListeners(state, recorded).length > 0) suspects.push(recorded);
      else this.#forgetRenewal(hex(recorded.key));
    });
    if (suspects.length === 0) return;
    // ztunnel may be about to end, or to be told that the pod has gone.
    await new Promise((resolve) => setTimeout(resolve, SECOND_LOOK_MS));
    for (const { key } of suspects) await this.#renewListeners(state, key);
  }

  async #renewListeners(state: State, key: AttachmentKey): Promise<void> {
    const { native, onDrift, onRepaired, onUnrepaired, serveAgain } = this.#options;
    await new Promise(setImmediate);
    const record = native.getAttachment(state, key);
    if (this.#stopped || record === null) return;
    const missing = this.#missingListeners(state, { key, record });
    if (missing.length === 0 || !this.#mayRenew(hex(key))) return;
    for (const port of missing) {
      onDrift({
        kind: 'listener',
        pod: describePod(record),
        object: `listener on port ${port}`,
        expected: 'listening',
        found: 'missing',
      });
    }
    try {
      await serveAgain(record);
      const still = this.#missingListeners(state, { key, record });
      if (still.length > 0) throw new Error(`ztunnel has acknowledged it anew and does not listen on ${still.join()}`);
      onRepaired(record);
    } catch (error) {
      onUnrepaired(record, error as Error);
    }
  }

  /** Ports that ztunnel is to listen on in a pod, and does in neither family. Which families it serves is its own affair. */
  #missingListeners(state: State, { record }: Recorded): number[] {
    const { native, isServed } = this.#options;
    const isPod = record.contract === 'in-pod' && record.role === 'pod' && record.state === 'attached';
    if (!isPod || isDraining(native, record) || !isServed(record)) return [];
    return listenersWithin(native, state, record)
      .filter(({ ipv4, ipv6 }) => ipv4 === 'missing' && ipv6 === 'missing')
      .map(({ port }) => port);
  }

  get #renewalMs(): [first: number, longest: number] {
    const [first, longest] = RENEWAL_PERIODS;
    return [first * this.#options.periodMs, longest * this.#options.periodMs];
  }

  #mayRenew(id: string): boolean {
    const [first, longest] = this.#renewalMs;
    const before = this.#renewals.get(id);
    const now = performance.now();
    if (before !== undefined && now - before.last < before.waitMs) return false;
    const waitMs = before === undefined ? first : Math.min(longest, before.waitMs * 2);
    this.#renewals.set(id, { last: now, waitMs });
    return true;
  }

  #forgetRenewal(id: string): void {
    const before = this.#renewals.get(id);
    if (before !== undefined && performance.now() - before.last > this.#renewalMs[1]) this.#renewals.delete(id);
  }

  /**
   * Shared contract: only the proxy can open its listeners, and whoever runs it starts it again. One that has gone is
   * named and counted once.
   */
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
