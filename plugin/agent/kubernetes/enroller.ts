// SPDX-License-Identifier: Apache-2.0
// Pods into the mesh and out of it while they run. For each pod, in order: attach, verify, record, the proxy's
// acknowledgement, and only then the annotation by which the mesh sends HBONE to it. Leaving is the other way round: the
// annotation goes first, connections that the proxy has stay until they close, then the programs go.
//
// Everything follows from two copies of the API (this node's pods, all namespaces) and the records of the plugin. While
// the API is away the copies stay, so nothing is detached; a pod that a list does not name is asked for by itself
// before it is taken for gone.

import { attachmentKey, hex } from '../../attachments.ts';
import { withWishes } from '../../commands/target.ts';
import {
  attachSteps,
  describePod,
  detachRecordSteps,
  isDead,
  notEnrolled,
  type Target,
  verify,
} from '../../datapath.ts';
import { beginDrain, DRAIN_SETTLE_MS, endDrainSteps, isDraining, proxiedConnections } from '../../drain.ts';
import { isUninstalled } from '../../install/entry.ts';
import type { AttachmentRecord, ExclusionRule, Native, State } from '../../native.ts';
import { type TrafficAnnotations, trafficAnnotations } from '../../redirect/annotations.ts';
import type { RedirectConfig } from '../../redirect/config.ts';
import { exclusionRules } from '../../redirect/exclusions.ts';
import { podFlags, wishedFlags } from '../../redirect/plan.ts';
import type { EnablementSelector } from '../../redirect/selectors.ts';
import { isNobodyBeside } from '../../state.ts';
import type { StepQueue } from '../../steps.ts';
import { type Api, ApiError } from './api.ts';
import { enrolmentOf } from './enrolment.ts';
import { Mirror } from './mirror.ts';
import {
  identitiesOf,
  isSamePod,
  type KubernetesNamespace,
  type KubernetesPod,
  projectNamespace,
  projectPod,
  REDIRECTION,
} from './pods.ts';
import { WorkQueue } from './queue.ts';
import type { Attachment, PinnedState, Records } from './records.ts';
import { mismatch, type Sandbox, type SandboxSource } from './sandboxes.ts';

export type LogLine = (
  level: 'debug' | 'info' | 'warn' | 'error',
  text: string,
  fields?: Record<string, unknown>,
) => void;

export interface EnrollerOptions {
  native: Native;
  steps: StepQueue;
  config: RedirectConfig;
  /** `config` is what the plugin's entry in the conflist says too */
  knowsEntry: boolean;
  enablementSelectors?: readonly EnablementSelector[] | undefined;
  /** name of the network in the conflist: part of an attachment's key */
  network: string;
  pinned: PinnedState;
  api: Api;
  nodeName: string;
  /** asked in this order for the sandbox of a pod without a record */
  sandboxes: readonly SandboxSource[];
  log: LogLine;
  /** Names, counts and mends what of an attachment is not as recorded. */
  compare: (record: AttachmentRecord) => Promise<void>;
  /**
   * Tells the proxy of a pod that is attached, and resolves when the proxy has it; "pending" while it does not. Not
   * there in the shared contract, where the maps say all.
   */
  announce?: (attachment: Attachment, pod: KubernetesPod) => Promise<'acknowledged' | 'pending'>;
  /** Why no pod can be attached at this moment, or null: a running pod without a proxy would lose its connections. */
  proxyAbsent?: () => string | null;
  /** The programs of a pod are gone: the proxy is to forget it. */
  onDetached?: (record: AttachmentRecord) => void;
  /** seconds from the change to its being done, for each piece of work */
  onReconciled?: (seconds: number) => void;
}

export type Answer = { enrolled: boolean; reason: string; serviceAccount: string };

const INTERFACE = 'eth0';
const PARALLEL = 16;
/** How soon a pod that drains is looked at again. */
const DRAIN_CHECK_MS = 1_000;
/** A record says "attaching" for as long as an ADD runs; one that runs for longer was killed. */
const ADD_SECONDS = 30;
/** Failures of a pod before it gets an Event: shorter troubles are nobody's business. */
const TRIES_BEFORE_EVENT = 4;
const EVENT_INTERVAL_MS = 300_000;
const EVENT_RETRY_MS = 15_000;
/** metadata.uid is a UUID; this is what kubelet makes for a pod from a file. */
const STATIC_UID = /^[0-9a-f]{32}$/;

const ENROLMENT_EVENTS = ['attached', 'drained', 'detached', 'annotated', 'failed', 'found_open'] as const;
type EnrolmentEvent = (typeof ENROLMENT_EVENTS)[number];

/** Not a failure: what is waited for brings a change that comes here again. */
class NotYet extends Error {}

export class Enroller {
  readonly pods: Mirror<KubernetesPod>;
  readonly namespaces: Mirror<KubernetesNamespace>;
  readonly queue: WorkQueue;
  readonly counts = new Map<EnrolmentEvent, number>(ENROLMENT_EVENTS.map((event) => [event, 0]));
  readonly #options: EnrollerOptions;
  /** by UID; those of the API's copy */
  readonly #byUid = new Map<string, KubernetesPod>();
  /** by UID; deleted in the API, and not done with here */
  readonly #gone = new Map<string, KubernetesPod>();
  readonly #runs: Promise<void>[] = [];
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #waiting = new Set<() => void>();
  /** by UID: what the pod's annotations asked for when it was attached, or first seen to be */
  readonly #wishes = new Map<string, string>();
  /** UIDs that #tellGap has told of */
  readonly #gaps = new Set<string>();
  /** by key: performance.now() of their begin */
  readonly #drains = new Map<string, number>();
  readonly #lastEvent = new Map<string, { text: string; at: number }>();
  #lastTurn = Promise.resolve();
  #stopped = false;

  constructor(options: EnrollerOptions) {
    this.#options = options;
    const { api, nodeName, log } = options;
    this.pods = new Mirror({
      api,
      path: '/api/v1/pods',
      query: { fieldSelector: `spec.nodeName=${nodeName}` },
      project: projectPod,
      onChange: (before, after) => this.#podChanged(before, after),
      onSynced: () => this.#compare(),
      onTrouble: (error) => this.#trouble('pods', error),
    });
    this.namespaces = new Mirror({
      api,
      path: '/api/v1/namespaces',
      project: projectNamespace,
      onChange: (before, after) => this.#namespaceChanged(before, after),
      onSynced: () => this.#compare(),
      onTrouble: (error) => this.#trouble('namespaces', error),
    });
    this.queue = new WorkQueue({
      parallel: PARALLEL,
      retry: [5, 15_000],
      work: (uid) => this.#reconcile(uid),
      onDone: (uid, seconds) => {
        this.#lastEvent.delete(uid);
        this.#options.onReconciled?.(seconds);
      },
      onFailure: (uid, error, tries) => this.#failed(uid, error, tries),
    });
    log('info', `watching the pods of node ${nodeName}`);
  }

  start(): void {
    this.#runs.push(this.pods.run(), this.namespaces.run());
  }

  /** The programs stay. */
  async stop(): Promise<void> {
    this.#stopped = true;
    this.pods.stop();
    this.namespaces.stop();
    for (const timer of this.#timers) clearTimeout(timer);
    for (const wake of this.#waiting) wake();
    await Promise.all([...this.#runs, this.queue.stop()]);
  }

  #settled = false;

  /** Why the agent is not ready, as far as the API and the pods are concerned; [] if it is. */
  notReady(): string[] {
    const reasons: string[] = [];
    if (!this.#settled) {
      const { depth, failing } = this.queue;
      if (this.pods.synced && this.namespaces.synced && depth <= failing) this.#settled = true;
      else if (depth > failing) reasons.push(`${depth - failing} pods have not been looked at yet`);
    }
    for (const [what, mirror] of [
      ['pods', this.pods],
      ['namespaces', this.namespaces],
    ] as const) {
      if (!mirror.synced) reasons.push(`no list of ${what} yet${mirror.trouble ? `: ${mirror.trouble.message}` : ''}`);
    }
    return reasons;
  }

  pod(uid: string): KubernetesPod | undefined {
    return this.#byUid.get(uid);
  }

  /** Looks at a pod again: its record, its namespace or the proxy have changed. */
  look(uid: string): void {
    if (this.#byUid.has(uid) || this.#gone.has(uid)) this.queue.add(uid);
    else for (const [known, pod] of this.#byUid) if (identitiesOf(pod).includes(uid)) this.queue.add(known);
  }

  lookAtAll(): void {
    for (const uid of this.#byUid.keys()) this.queue.add(uid);
  }

  /**
   * What ADD asks with `enrollment: agent`. From the copy; a pod that it does not have yet is waited for, then asked for
   * by itself. Throws if nobody can tell.
   */
  async answer(
    asked: { namespace: string; name: string; uid: string; ifname: string },
    waitMs = 1_000,
  ): Promise<Answer> {
    const { api } = this.#options;
    const find = () => {
      const pod = this.pods.get(`${asked.namespace}/${asked.name}`);
      return pod !== undefined && (asked.uid === '' || identitiesOf(pod).includes(asked.uid)) ? pod : undefined;
    };
    const deadline = performance.now() + waitMs;
    let pod = find();
    while (pod === undefined && performance.now() < deadline && !this.#stopped) {
      await this.#change(deadline - performance.now());
      pod = find();
    }
    if (pod === undefined) {
      const object = await api.get(`/api/v1/namespaces/${asked.namespace}/pods/${asked.name}`);
      const found = object === null ? undefined : projectPod(object);
      if (found === undefined || (asked.uid !== '' && !identitiesOf(found).includes(asked.uid))) {
        return {
          enrolled: false,
          reason: STATIC_UID.test(asked.uid)
            ? 'a static pod that the API does not have yet'
            : `the API has no pod ${asked.namespace}/${asked.name} with UID ${asked.uid}`,
          serviceAccount: '',
        };
      }
      pod = found;
    }
    let namespace = this.namespaces.get(pod.namespace);
    if (namespace === undefined) {
      const object = await api.get(`/api/v1/namespaces/${pod.namespace}`);
      if (object !== null) namespace = projectNamespace(object);
    }
    const { role, reason } = this.#decide(pod, namespace, asked.ifname);
    return { enrolled: role === 'pod', reason, serviceAccount: pod.serviceAccount };
  }

  #decide(pod: KubernetesPod, namespace: KubernetesNamespace | undefined, ifname: string) {
    const { config, enablementSelectors } = this.#options;
    // Its annotation goes with the rest: uninstall itself may not be able to reach the API.
    if (isUninstalled(config.runDir)) return { role: 'none' as const, reason: 'uninstall was run on this node' };
    return enrolmentOf({ ...config, enablementSelectors }, pod, namespace, ifname);
  }

  // ---- changes ---------------------------------------------------------------------------------------------------

  #podChanged(before: KubernetesPod | null, after: KubernetesPod | null): void {
    if (after === null) {
      if (before === null) return;
      this.#byUid.delete(before.uid);
      this.#wishes.delete(before.uid);
      this.#gaps.delete(before.uid);
      this.#gone.set(before.uid, before);
      this.queue.add(before.uid);
      return;
    }
    this.#byUid.set(after.uid, after);
    for (const wake of this.#waiting) wake();
    if (before === null || !isSamePod(before, after)) this.queue.add(after.uid);
  }

  #namespaceChanged(before: KubernetesNamespace | null, after: KubernetesNamespace | null): void {
    const labels = (namespace: KubernetesNamespace | null) => JSON.stringify([...(namespace?.labels ?? [])].sort());
    if (labels(before) === labels(after)) return;
    // A namespace that is gone takes its pods with it; each is told by itself.
    const name = after?.name;
    if (name === undefined) return;
    for (const [uid, pod] of this.#byUid) if (pod.namespace === name) this.queue.add(uid);
  }

  /** After a list: every pod, and records of pods that it does not name. They went while nobody watched. */
  #compare(): void {
    if (!this.pods.synced || !this.namespaces.synced) return;
    this.lookAtAll();
    const known = new Set([...this.#byUid.values()].flatMap(identitiesOf));
    for (const { record } of this.#options.pinned.current()?.records.all() ?? []) {
      if (record.podUid === '' || known.has(record.podUid) || this.#gone.has(record.podUid)) continue;
      this.queue.add(record.podUid);
    }
  }

  #trouble(what: string, error: Error): void {
    const hint =
      error instanceof ApiError && error.status === 403
        ? '; the role of the agent is too small: it needs get, list and watch of pods and namespaces'
        : '';
    this.#options.log('warn', `${what} cannot be followed: ${error.message}${hint}`, { api: what });
  }

  /** Until something of the pods changes, at most `ms`. */
  #change(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        this.#waiting.delete(wake);
        resolve();
      };
      const timer = setTimeout(wake, ms);
      this.#waiting.add(wake);
    });
  }

  /** Throws NotYet if it is gone meanwhile. */
  #state(): { state: State; records: Records } {
    const opened = this.#options.pinned.current();
    if (opened === null) throw new NotYet('uninstall has removed the state');
    return opened;
  }

  // ---- one pod ---------------------------------------------------------------------------------------------------

  /**
   * Kernel calls are synchronous: between two pods everybody else has his turn. Immediates that are set at one time run
   * all together, so each is set when the one before has run.
   */
  #turn(): Promise<void> {
    this.#lastTurn = this.#lastTurn.then(() => new Promise<void>((resolve) => setImmediate(resolve)));
    return this.#lastTurn;
  }

  async #reconcile(uid: string): Promise<void> {
    // Nobody can tell yet what its namespace says.
    if (!this.pods.synced || !this.namespaces.synced) return;
    await this.#turn();
    const pod = this.#byUid.get(uid);
    if (pod === undefined) {
      await this.#forget(uid);
      return;
    }
    const namespace = this.namespaces.get(pod.namespace);
    if (namespace === undefined) throw new NotYet(`namespace ${pod.namespace} is not known yet`);
    const pinned = this.#options.pinned.current();
    if (pinned === null) {
      await this.#annotate(pod, null);
      return;
    }
    const attachments = pinned.records.of(identitiesOf(pod));
    const interfaces = attachments.length > 0 ? attachments.map(({ record }) => record.ifname) : [INTERFACE];
    let enrolled = 0;
    for (const [i, ifname] of interfaces.entries()) {
      const { role, reason } = this.#decide(pod, namespace, ifname);
      const attachment = attachments[i];
      if (role === 'none') {
        if (attachment?.record.role === 'pod') await this.#leave(pod, attachment, reason);
        // What drains needs the proxy still.
        else if (attachment?.record.role === 'proxy' && !isUninstalled(this.#options.config.runDir)) {
          await this.#dismiss(attachment, reason);
        }
        continue;
      }
      if ((await this.#enter(pod, attachment, ifname, role, reason)) && role === 'pod') enrolled++;
    }
    if (enrolled === 0) await this.#annotate(pod, null);
  }

  /** @returns false if there is nothing to attach to yet */
  async #enter(
    pod: KubernetesPod,
    attachment: Attachment | undefined,
    ifname: string,
    role: 'pod' | 'proxy',
    reason: string,
  ): Promise<boolean> {
    const { native, steps, config, log, announce, compare } = this.#options;
    const { state, records } = this.#state();
    // It runs in the pods themselves, and its own pod is one like any that is not enrolled.
    if (role === 'proxy' && config.proxy.contract === 'in-pod') return true;
    let record = attachment?.record;
    let key = attachment?.key;
    if (record?.state === 'attaching' && !(await this.#isAbandoned(record))) throw new NotYet('an ADD is at work');
    if (attachment !== undefined && record?.state === 'attached' && record.contract !== config.proxy.contract) {
      await this.#leave(pod, attachment, `the contract is "${config.proxy.contract}" now`);
      record = native.getAttachment(state, attachment.key) ?? undefined;
      // Looked at again when the other proxy has no connection of it any more.
      if (record?.state === 'attached') return false;
    }
    const wishes = trafficAnnotations(pod.annotations, config.podOverrides);
    const text = JSON.stringify(wishes);
    const inMesh = record?.state === 'attached' && record.role === role && !isDraining(native, record);
    if (inMesh && this.#wishes.get(pod.uid) === undefined && record !== undefined && role === 'pod') {
      // What it asks for may have changed while no agent was there to see it.
      if (this.#isAsWished(state, record, wishes)) this.#wishes.set(pod.uid, text);
      else log('info', `${describePod(record)} asks for something else than it has`, { uid: pod.uid });
    }
    const attached = inMesh && (role === 'proxy' || this.#wishes.get(pod.uid) === text);
    if (attached && attachment !== undefined && record !== undefined) {
      const findings = () => verify(native, state, config, attachment.key, attachment.record);
      if (findings().length > 0) await compare(attachment.record);
      const [finding] = findings();
      if (finding !== undefined) {
        throw new Error(`${finding.object}: expected ${finding.expected}, found ${finding.found}`);
      }
    } else {
      // Not worth the while any more, and in the way of its DEL.
      if (pod.deleting) return false;
      if (!inMesh) this.#tellGap(pod, attachment);
      // No connection that this pod may have is older than its enrolment: there is nothing to spare.
      const strict = attachment === undefined && config.failurePolicy === 'closed' && this.#wasEnrolled(pod);
      const absent = strict || inMesh ? null : (this.#options.proxyAbsent?.() ?? null);
      if (absent !== null) {
        await this.#annotate(pod, null);
        throw new NotYet(absent);
      }
      try {
        const place = attachment ?? (await this.#find(pod, ifname));
        if (place === null) return false;
        const target = {
          ...this.#target(pod, place, ifname, role),
          strict,
          bypassInbound: wishes.bypassInbound,
          resident: true,
        };
        record = await steps.run(attachSteps(native, withWishes(config, wishes), target));
        key = target.key;
        records.note(key, record);
      } catch (error) {
        // What says "enabled" and is not makes every peer of the mesh fail. One that was attached still is, as it was.
        if (!inMesh) await this.#annotate(pod, null).catch(() => {});
        throw error;
      }
      this.#count('attached');
      log('info', `attached ${describePod(record)}: ${reason}`, { uid: pod.uid, interface: record.hostIfname });
    }
    this.#wishes.set(pod.uid, text);
    this.#gaps.delete(pod.uid);
    if (role === 'proxy' || record === undefined || key === undefined) return true;
    let acknowledged: 'acknowledged' | 'pending' = 'acknowledged';
    try {
      if (announce !== undefined) acknowledged = await announce({ key, record }, pod);
    } catch (error) {
      await this.#annotate(pod, 'pending').catch(() => {});
      throw error;
    }
    await this.#annotate(pod, acknowledged === 'acknowledged' ? 'enabled' : 'pending');
    return true;
  }

  /** Without the node's own entry nobody can tell what a pod has by its annotations: then what it has is right. */
  #isAsWished(state: State, record: AttachmentRecord, wishes: TrafficAnnotations): boolean {
    const { native, config, knowsEntry } = this.#options;
    if (!knowsEntry) return true;
    const wanted = withWishes(config, wishes);
    const changeable = wishedFlags(native.flags);
    const flags = podFlags(wanted, false, false, wishes.bypassInbound, native.flags);
    const text = (rules: readonly ExclusionRule[]) =>
      rules
        .map(({ kind, value, length, excluded }) => `${kind} ${hex(value)}/${length} ${excluded}`)
        .sort()
        .join();
    return (
      (flags & changeable) === (record.flags & changeable) &&
      text(exclusionRules(wanted.exclude)) === text(native.getExclusions(state, record.interfaceId))
    );
  }

  /** Asked when no attach of this process is under way, which would be taken for somebody's ADD. */
  async #isAbandoned({ enrolledAt }: AttachmentRecord): Promise<boolean> {
    const { native, steps, config } = this.#options;
    if (Date.now() / 1000 - enrolledAt >= ADD_SECONDS) return true;
    return steps.between(() => isNobodyBeside(native, config.runDir, enrolledAt));
  }

  /** The mesh was told so, and since then nobody has taken the pod out of it. */
  #wasEnrolled({ uid }: KubernetesPod): boolean {
    return this.#gaps.has(uid) || this.#wishes.has(uid);
  }

  /**
   * The mesh has been told that the pod is redirected, and it is not: bpffs is empty after a reboot, or somebody has
   * removed the state. What it did until now went around the proxy, which cannot be undone, only said. With
   * failurePolicy "closed" what it has opened meanwhile ends here (see "strict" in #enter).
   */
  #tellGap(pod: KubernetesPod, attachment: Attachment | undefined): void {
    if (pod.annotations.get(REDIRECTION) !== 'enabled' || this.#gaps.has(pod.uid)) return;
    // One that this process has had attached, and that is recorded still, was taken out on purpose.
    if (attachment !== undefined && this.#wishes.has(pod.uid)) return;
    if (attachment !== undefined && this.#isInForce(attachment)) return;
    this.#gaps.add(pod.uid);
    this.#count('found_open');
    const after = this.#options.config.failurePolicy === 'closed' ? 'do not go on' : 'go on so';
    const text = `its annotation says that it is redirected, and it was not: connections opened until now were direct, and ${after}`;
    this.#options.log('warn', `${pod.namespace}/${pod.name}: ${text}`, { uid: pod.uid });
  }

  /** Whoever changed what it has was killed at that, and its programs went on. */
  #isInForce({ record }: Attachment): boolean {
    const { native } = this.#options;
    if (record.state !== 'attaching' || isDraining(native, record)) return false;
    return native.getInterface(this.#state().state, record.interfaceId)?.podMac === record.podMac;
  }

  /** Where the pod runs, if the plugin has not seen it. null: it has no network yet. */
  async #find(pod: KubernetesPod, ifname: string): Promise<(Sandbox & { network: string }) | null> {
    const { native, sandboxes, network } = this.#options;
    // The plugin will see it, or has been asked already.
    if (pod.ips.length === 0) return null;
    const refused: string[] = [];
    for (const source of sandboxes) {
      let found: Sandbox[];
      try {
        found = await source.sandboxesOf(identitiesOf(pod));
      } catch (error) {
        refused.push((error as Error).message);
        continue;
      }
      for (const sandbox of found) {
        const wrong = mismatch(native, sandbox.netnsPath, pod, ifname);
        if (wrong === null) return { ...sandbox, network };
        refused.push(wrong);
      }
    }
    throw new Error(
      `no network namespace found for ${pod.namespace}/${pod.name} (UID ${pod.uid})${refused.length > 0 ? `: ${refused.join('; ')}` : ''}`,
    );
  }

  #target(
    pod: KubernetesPod,
    place: Attachment | (Sandbox & { network: string }),
    ifname: string,
    role: 'pod' | 'proxy',
  ): Target {
    const { native } = this.#options;
    const known = 'record' in place ? place.record : undefined;
    const { network, containerId, netnsPath } = known ?? (place as Sandbox & { network: string });
    return {
      key: 'record' in place ? place.key : attachmentKey(native, network, containerId, ifname),
      network,
      containerId,
      ifname,
      netnsPath,
      resultAddresses: known?.addresses ?? [],
      pod: {
        name: pod.name,
        namespace: pod.namespace,
        uid: known?.podUid ?? pod.uid,
        serviceAccount: pod.serviceAccount,
      },
      role,
      strict: false,
      shaped: false,
      egressLimited: false,
      bypassInbound: false,
      recorded: 'record' in place,
    };
  }

  /** The annotation goes first; if it cannot, the pod leaves all the same, and the annotation is tried again. */
  async #leave(pod: KubernetesPod | null, attachment: Attachment, reason: string): Promise<void> {
    const { native, steps, config, log, onDetached } = this.#options;
    const { key } = attachment;
    if (pod !== null) {
      this.#wishes.delete(pod.uid);
      this.#gaps.delete(pod.uid);
    }
    const failure =
      pod === null
        ? null
        : await this.#annotate(pod, null).then(
            () => null,
            (error: Error) => error,
          );
    const { state } = this.#state();
    // As it is now: its DEL may have run while the API server was asked.
    let record = native.getAttachment(state, key);
    if (record?.role === 'pod' && !isDraining(native, record)) {
      beginDrain(native, config, state, key, record);
      this.#drains.set(hex(key), performance.now());
      this.#count('drained');
      log('info', `draining ${describePod(record)}: ${reason}`, { uid: record.podUid });
    }
    record = native.getAttachment(state, key);
    if (record !== null && isDraining(native, record)) {
      const settled = performance.now() - (this.#drains.get(hex(key)) ?? 0) > DRAIN_SETTLE_MS;
      if (!settled || proxiedConnections(native, state, record) > 0) {
        this.#later(pod?.uid ?? record.podUid, settled ? DRAIN_CHECK_MS : DRAIN_SETTLE_MS);
      } else {
        this.#drains.delete(hex(key));
        const end = pod === null ? detachRecordSteps : endDrainSteps;
        await steps.run(end(native, config, state, key, record));
        this.#count('detached');
        onDetached?.(record);
        log('info', `detached ${describePod(record)}`, { uid: record.podUid });
      }
    }
    if (failure !== null) throw failure;
  }

  /** The plugin, which knows a name only, has taken a pod for the proxy that is none. */
  async #dismiss({ key, record }: Attachment, reason: string): Promise<void> {
    const { native, steps, config, log } = this.#options;
    const { state } = this.#state();
    await steps.run(detachRecordSteps(native, config, state, key, record, () => notEnrolled(record)));
    this.#count('detached');
    log('error', `${describePod(record)} is not the proxy any more: ${reason}`, { uid: record.podUid });
  }

  /** A pod that the API does not have any more, or a record of one that this process has never seen. */
  async #forget(uid: string): Promise<void> {
    const { native, steps, config, api, pinned } = this.#options;
    if (pinned.current() === null) return;
    const gone = this.#gone.get(uid);
    const uids = gone === undefined ? [uid] : identitiesOf(gone);
    const attachments = this.#state().records.of(uids);
    for (const attachment of attachments) {
      const { key, record } = attachment;
      // A pod from a file is there without the API, too: its DEL says when it is not.
      if (gone === undefined && STATIC_UID.test(uid)) continue;
      if (isDead(native, record)) {
        await steps.run(detachRecordSteps(native, config, this.#state().state, key, record));
        continue;
      }
      const path = `/api/v1/namespaces/${record.podNamespace}/pods/${record.podName}`;
      const object = await api.get(path);
      if (object !== null && identitiesOf(projectPod(object)).includes(record.podUid)) continue;
      if (record.role === 'pod') await this.#leave(null, attachment, 'the pod is gone');
    }
    const left = this.#state().records.of(uids);
    if (!left.some(({ record }) => isDraining(native, record))) this.#gone.delete(uid);
  }

  #later(uid: string, ms: number): void {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      this.queue.add(uid);
    }, ms);
    this.#timers.add(timer);
  }

  /** null takes it away. A pod that is gone, or whose name is another's by now, is no failure. */
  async #annotate(pod: KubernetesPod, value: 'enabled' | 'pending' | null): Promise<void> {
    const now = this.#byUid.get(pod.uid) ?? pod;
    if ((now.annotations.get(REDIRECTION) ?? null) === value) return;
    const { api } = this.#options;
    try {
      await api.mergePatch(`/api/v1/namespaces/${pod.namespace}/pods/${pod.name}/status`, {
        metadata: { uid: pod.uid, annotations: { [REDIRECTION]: value } },
      });
      this.#count('annotated');
    } catch (error) {
      if (error instanceof ApiError && (error.status === 404 || error.status === 422)) return;
      throw error;
    }
  }

  // ---- failures --------------------------------------------------------------------------------------------------

  #failed(uid: string, error: Error, tries: number): void {
    if (error instanceof NotYet) return;
    this.#count('failed');
    const pod = this.#byUid.get(uid);
    const who = pod === undefined ? `pod ${uid}` : `${pod.namespace}/${pod.name}`;
    // 1, 2, 4, 8, ...: a pod that fails for ever does not fill the log.
    const level = Number.isInteger(Math.log2(tries)) ? 'warn' : 'debug';
    this.#options.log(level, `${who}: ${error.message}`, { uid, tries });
    if (pod !== undefined && tries >= TRIES_BEFORE_EVENT) void this.#event(pod, error.message);
  }

  /** What "kubectl describe pod" shows. One for each message, again after minutes. */
  async #event(pod: KubernetesPod, text: string): Promise<void> {
    const last = this.#lastEvent.get(pod.uid);
    const at = performance.now();
    if (last?.text === text && at - last.at < EVENT_INTERVAL_MS) return;
    this.#lastEvent.set(pod.uid, { text, at });
    const now = new Date().toISOString();
    const { api, nodeName, log } = this.#options;
    try {
      await api.create(`/api/v1/namespaces/${pod.namespace}/events`, {
        metadata: { generateName: `${pod.name.slice(0, 200)}.` },
        involvedObject: { apiVersion: 'v1', kind: 'Pod', namespace: pod.namespace, name: pod.name, uid: pod.uid },
        type: 'Warning',
        reason: 'AmbientRedirectionFailed',
        message: text.slice(0, 1_000),
        source: { component: 'ambient-redirect', host: nodeName },
        firstTimestamp: now,
        lastTimestamp: now,
        count: 1,
      });
    } catch (error) {
      // Tried again, but not with each try of the pod.
      this.#lastEvent.set(pod.uid, { text, at: at - EVENT_INTERVAL_MS + EVENT_RETRY_MS });
      log('warn', `the event for ${pod.namespace}/${pod.name} is lost: ${(error as Error).message}`);
    }
  }

  #count(event: EnrolmentEvent): void {
    this.counts.set(event, (this.counts.get(event) ?? 0) + 1);
  }
}
