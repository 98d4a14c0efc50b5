// SPDX-License-Identifier: Apache-2.0
// The node agent without Kubernetes. What other parts build on:
//
// - `new Agent(native, settings, log)`, then add to it, then `await agent.start()`.
// - `agent.directories`: who knows service accounts and who is in the mesh (PodDirectory); asked first to last. The file
//   of --workloads is one, a cache of the Kubernetes API another.
// - `agent.beforeSnapshot(promise)`: ztunnel is told of no pod before it resolves. The pods of the pinned state are known
//   before start() returns in any case.
// - `agent.enrol(pod)`, `agent.unenrol(pod)`: for pods that run already and that the plugin has recorded at their ADD.
//   enrol() resolves when ztunnel has acknowledged the pod (contract "in-pod") or its programs are attached ("shared").
// - `agent.announce(record)`, `agent.withdraw(record)`: for those who attach and detach by themselves.
// - `agent.events`: "enrolled" when that has happened, by whatever way (ADD, enrol(), a reconciliation), "unenrolled"
//   when a pod has left. Truth about a pod for annotations is told here and nowhere else.
// - `agent.registry`: the pods of the contract "in-pod" as ztunnel is to know them. It follows the attachments in the
//   pinned state; nobody else writes to it.
// - `agent.readiness.add(name, condition)`, `agent.metrics.registry`, `agent.log`: for /readyz, /metrics and the log.
// - `agent.reconcile(cause)`: compares state, kernel and ztunnel now. Runs by itself every settings.reconcileSeconds.
//
// The truth is the pinned state, which the plugin writes and which survives every process. What the agent holds follows
// from it, so that a restart loses nothing: it takes the lock, reads the state, and only then listens for ztunnel.

import { EventEmitter } from 'node:events';
import {
  existsSync,
  type FSWatcher,
  ftruncateSync,
  mkdirSync,
  readFileSync,
  statSync,
  watch,
  writeSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import type { AttachBody, AttachmentName, Decision } from '../agent-client.ts';
import { attachmentKey, hex } from '../attachments.ts';
import { CniError, Code } from '../cni/errors.ts';
import { decide as decideTarget, enrolmentOf } from '../commands/target.ts';
import { attachSteps, describePod, isDead, sweepDead, type Target, targetOf } from '../datapath.ts';
import { beginDrain, endDrainSteps, isDraining, tryEndDrains } from '../drain.ts';
import { isUninstalled, rememberedInstall } from '../install/entry.ts';
import { migrateAll, NO_CAPACITY } from '../migrate.ts';
import type { AttachmentKey, AttachmentRecord, Native, State } from '../native.ts';
import { countPending, listPending, type PendingPod, removePending } from '../pending.ts';
import { parseConfig, type RedirectConfig } from '../redirect/config.ts';
import { type PodIdentity, podIdentity } from '../redirect/enrolment.ts';
import {
  assertVariantInUse,
  enterBeside,
  hasCode,
  isNativeError,
  kernelReason,
  openState,
  supersededBy,
} from '../state.ts';
import { StepQueue } from '../steps.ts';
import { ZdsError, ZdsServer } from '../zds/server.ts';
import { type CgroupFinding, cgroupOf, isGone } from './cgroups.ts';
import { entrySettings } from './entry-settings.ts';
import type { AgentLog } from './log.ts';
import { AgentMetrics } from './metrics.ts';
import { openWorkloadNetns } from './netns.ts';
import { Readiness } from './readiness.ts';
import { type Workload, WorkloadRegistry } from './registry.ts';
import type { AgentSettings } from './settings.ts';
import { Truth } from './truth.ts';

/** What a directory says of a pod that it knows. */
export interface PodEntry {
  /** Kubernetes UID; "" if unknown */
  uid: string;
  serviceAccount: string;
  enrol: boolean;
  /** a phrase for logs: why it is in the mesh or not */
  reason: string;
}

export interface PodDirectory {
  /** undefined: this one does not know the pod */
  find(pod: PodIdentity): PodEntry | undefined | Promise<PodEntry | undefined>;
}

export interface EnrolledPod extends PodIdentity {
  serviceAccount: string;
  contract: AttachmentRecord['contract'];
}

export interface AgentEvents {
  enrolled: [pod: EnrolledPod];
  unenrolled: [pod: EnrolledPod];
  /** one has its snapshot and hears of pods from now on */
  ztunnel: [];
  /** the state is gone, or another one is in its place: no pod is redirected that was not attached since */
  lost: [];
}

interface Recorded {
  key: AttachmentKey;
  record: AttachmentRecord;
}

/** Of agent.sock when the plugin names none, and of what the agent begins by itself. */
const DEADLINE_MS = 10_000;

/** How long DEL waits for ztunnel's answer. */
const DEL_WAIT_MS = 500;

/** Fewer than the map holds: those of ztunnels that an agent before this one knew are not known to be gone. */
const MAX_PROXY_CGROUPS = 48;

/** Another agent runs with this runDir. */
export class AgentRunsError extends Error {
  override name = 'AgentRunsError';
}

export class Agent {
  readonly native: Native;
  readonly settings: AgentSettings;
  readonly log: AgentLog;
  readonly metrics = new AgentMetrics();
  readonly readiness = new Readiness();
  readonly registry = new WorkloadRegistry();
  readonly events = new EventEmitter<AgentEvents>();
  readonly directories: PodDirectory[] = [];
  /** of everything in this process that attaches and detaches */
  readonly steps = new StepQueue();
  readonly #barriers: Promise<unknown>[] = [];
  readonly #acknowledged = new Set<string>();
  readonly #counted = new Map<string, { packets: bigint; bytes: bigint }>();
  #zds: ZdsServer | undefined;
  #truth: Truth | undefined;
  #compared = false;
  #lock: number | undefined;
  #timer: NodeJS.Timeout | undefined;
  #reconciling: Promise<void> | undefined;
  #stopped = false;

  constructor(native: Native, settings: AgentSettings, log: AgentLog) {
    this.native = native;
    this.settings = settings;
    this.log = log;
    this.readiness.add('state', () => (this.#compared ? null : 'state and kernel have not been compared yet'));
    this.readiness.add('build', () => this.#superseded());
    this.readiness.add('variant', () => this.#otherVariant());
    this.readiness.add('zds', () => (this.#zds === undefined ? `${settings.zdsSocket} is not served yet` : null));
  }

  get zds(): ZdsServer | undefined {
    return this.#zds;
  }

  beforeSnapshot(known: Promise<unknown>): void {
    this.#barriers.push(known);
  }

  /** Throws AgentRunsError, CniError, NativeError, or Error where the ZDS socket is somebody else's. */
  async start(): Promise<void> {
    this.#takeLock();
    try {
      assertSharedBpffs(this.settings.stateDir);
      this.#migrate();
      await this.#rebuild();
      this.#withState((state) => this.#countPackets(state, true));
      this.#truth = this.#holdToTheTruth();
      mkdirSync(dirname(this.settings.zdsSocket), { recursive: true, mode: 0o755 });
      this.#zds = this.#serveZds();
    } catch (error) {
      await this.#truth?.stop();
      this.#releaseLock();
      throw error;
    }
    this.#schedule();
  }

  /** The data path stays as it is. */
  async stop(): Promise<void> {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#watched?.watcher.close();
    this.#zds?.close();
    await this.#truth?.stop();
    await this.#reconciling;
    this.#releaseLock();
  }

  // ---- pods --------------------------------------------------------------------------------------------------------

  /** Throws CniError: 11, 107, 108 or what attaching throws; the pod is then as it was. */
  async enrol(pod: PodIdentity): Promise<void> {
    const found = this.#recordsOf(pod);
    if (found.length === 0) {
      throw new CniError(
        Code.SANDBOX_NOT_FOUND,
        `${pod.namespace}/${pod.name} has no attachment`,
        `the plugin has recorded none in ${this.settings.stateDir}`,
      );
    }
    const pending = new Map(this.#pending().map((one) => [hex(one.key), one]));
    for (const { key, record } of found) await this.#enrolOne(key, record, pending.get(hex(key)));
  }

  /** New connections go direct at once; with `drain` those that the proxy has stay until they end. */
  async unenrol(pod: PodIdentity, { drain }: { drain: boolean } = { drain: true }): Promise<void> {
    const dirs = this.#directories();
    for (const { key, record } of this.#recordsOf(pod)) {
      removePending(dirs.runDir, key);
      if (record.state !== 'attached' || record.role !== 'pod') continue;
      if (drain) this.#withState((state) => beginDrain(this.native, dirs, state, key, record));
      else await this.#takeOut(key);
    }
    await this.reconcile('unenrol');
  }

  /** POST /v1/attach: the plugin has attached and recorded, and waits. Throws CniError 11, 107, 108. */
  async attached(body: AttachBody): Promise<void> {
    const key = attachmentKey(this.native, body.network, body.containerId, body.ifname);
    const record = this.#recordFor(key, body);
    if (record.contract === 'shared') {
      this.events.emit('enrolled', podOf(record));
      return;
    }
    await this.#tell(key, record, body.deadlineMs);
  }

  /** POST /v1/detach: the plugin has detached. Does not wait long for ztunnel. */
  async detached(body: AttachmentName): Promise<void> {
    const key = attachmentKey(this.native, body.network, body.containerId, body.ifname);
    removePending(this.settings.runDir, key);
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, DEL_WAIT_MS);
    await Promise.race([this.#leave(hex(key)), promise]).finally(() => clearTimeout(timer));
  }

  /**
   * For those who attach in this process: tells ztunnel of an attachment that is recorded as "attached", or in the
   * shared contract nobody. "pending": ztunnel does not serve it yet, which a reconciliation will see to. Throws CniError
   * 108 for a pod that it can never serve as it is recorded.
   */
  async announce(record: AttachmentRecord): Promise<'acknowledged' | 'pending'> {
    if (record.contract === 'shared') return 'acknowledged';
    const key = attachmentKey(this.native, record.network, record.containerId, record.ifname);
    const uid = await this.#register(key, record);
    try {
      await this.#zds?.add(uid, { waitMs: 0, deadlineMs: DEADLINE_MS });
    } catch (error) {
      if (!(error instanceof ZdsError)) throw error;
      if (error.reason === 'unfit') throw cniErrorOf(error, describePod(record));
      return 'pending';
    }
    if (this.#zds === undefined) return 'pending';
    this.#announce(uid);
    return 'acknowledged';
  }

  /** The other way, when the programs are gone. */
  async withdraw(record: Pick<AttachmentRecord, 'network' | 'containerId' | 'ifname'>): Promise<void> {
    await this.#leave(hex(attachmentKey(this.native, record.network, record.containerId, record.ifname)));
  }

  /** POST /v1/decide: is this pod in the mesh. Throws CniError 108 if nobody knows it. */
  async decide(pod: PodIdentity): Promise<Decision> {
    for (const directory of this.directories) {
      const entry = await directory.find(pod);
      if (entry !== undefined) {
        return { enrol: entry.enrol, reason: entry.reason, serviceAccount: entry.serviceAccount };
      }
    }
    const asked = this.directories.length === 0 ? 'it was given none (--workloads)' : 'it is in none of them';
    return { enrol: false, reason: `the agent has no list of pods that names it: ${asked}`, serviceAccount: '' };
  }

  async #enrolOne(key: AttachmentKey, record: AttachmentRecord, pending: PendingPod | undefined): Promise<void> {
    if (isUninstalled(this.settings.runDir)) {
      throw new CniError(Code.TRY_AGAIN_LATER, 'uninstall was run on this node', 'install undoes it');
    }
    const inMesh = record.state === 'attached' && record.role === 'pod' && !isDraining(this.native, record);
    const { target, config } = pending === undefined ? this.#targetOf(key, record) : await this.#replay(pending);
    if (target.role !== 'pod') {
      removePending(this.settings.runDir, key);
      this.log.info({ pod: describePod(record) }, 'is not to be in the mesh after all');
      return;
    }
    if (!inMesh) {
      if (config.proxy.contract === 'in-pod' && this.#zds?.isLive !== true) throw this.#noZtunnel();
      await this.steps.run(attachSteps(this.native, config, { ...target, resident: true, recorded: true }));
    }
    removePending(this.settings.runDir, key);
    const now = this.#withState((state) => this.native.getAttachment(state, key)) ?? record;
    if (now.contract === 'shared') {
      if (!inMesh) this.log.info({ pod: describePod(now) }, 'enrolled late');
      this.events.emit('enrolled', podOf(now));
      return;
    }
    try {
      await this.#tell(key, now, DEADLINE_MS);
      if (!inMesh) this.log.info({ pod: describePod(now) }, 'enrolled late');
    } catch (error) {
      if (!inMesh) await this.#takeOut(key);
      throw error;
    }
  }

  /** Puts the pod into the registry and waits for ztunnel's Ack; takes it out again on failure. Throws CniError. */
  async #tell(key: AttachmentKey, record: AttachmentRecord, deadlineMs: number): Promise<void> {
    const id = hex(key);
    const uid = await this.#register(key, record);
    const zds = this.#zds;
    if (zds === undefined) throw this.#noZtunnel();
    try {
      await zds.add(uid, { waitMs: this.settings.ztunnelWaitSeconds * 1_000, deadlineMs });
    } catch (error) {
      if (!(error instanceof ZdsError)) throw error;
      // One that was served stays: it is for a reconciliation to get it back.
      if (!this.#acknowledged.has(uid)) await this.#leave(id);
      throw cniErrorOf(error, describePod(record));
    }
    // The plugin may have given up meanwhile, and undone what it did.
    const still = this.#withState((state) => this.native.getAttachment(state, key));
    if (still?.state !== 'attached') await this.#leave(id);
    else this.#announce(uid);
  }

  async #register(key: AttachmentKey, record: AttachmentRecord): Promise<string> {
    const pod = podOf(record);
    let { serviceAccount } = record;
    let uid = record.podUid;
    if (serviceAccount === '' || uid === '') {
      for (const directory of this.directories) {
        const entry = await directory.find(pod);
        if (entry === undefined) continue;
        serviceAccount ||= entry.serviceAccount;
        uid ||= entry.uid;
        break;
      }
    }
    if (serviceAccount === '') {
      throw new CniError(
        Code.AGENT_REFUSED,
        `the service account of ${describePod(record)} is not known`,
        'ztunnel serves no pod without it: it comes from agent --workloads, from enroll --service-account, or from Kubernetes',
      );
    }
    if (serviceAccount !== record.serviceAccount) {
      // So that an agent that starts without a directory tells ztunnel the same.
      this.#withState((state) => {
        const now = this.native.getAttachment(state, key);
        if (now !== null) this.native.replaceAttachment(state, key, { ...now, serviceAccount });
      });
    }
    this.#writeCgroups();
    const id = hex(key);
    uid ||= id;
    const names = { name: pod.name, namespace: pod.namespace, serviceAccount };
    const change = this.registry.put({ key: id, uid, names, netns: { ...record.netns, path: record.netnsPath } });
    if (change === 'new') this.#acknowledged.delete(uid);
    return uid;
  }

  async #leave(key: string): Promise<void> {
    const known = this.registry.uidOf(key);
    const workload = known === undefined ? undefined : this.registry.get(known);
    const uid = this.registry.delete(key);
    if (uid === undefined || workload === undefined) return;
    this.#acknowledged.delete(uid);
    this.events.emit('unenrolled', enrolledOf(workload));
    await this.#zds?.del(uid);
  }

  /** ztunnel serves it. Said once for each time that it begins to. */
  #announce(uid: string): void {
    const workload = this.registry.get(uid);
    if (workload === undefined || this.#acknowledged.has(uid)) return;
    this.#acknowledged.add(uid);
    this.events.emit('enrolled', enrolledOf(workload));
  }

  // ---- state -------------------------------------------------------------------------------------------------------

  #superseded(): string | null {
    try {
      return this.#withState((state) => supersededBy(this.native, state, this.settings.stateDir)) ?? null;
    } catch (error) {
      return messageOf(error);
    }
  }

  /** No pod can be enrolled with what the entry says. */
  #otherVariant(): string | null {
    try {
      assertVariantInUse(this.native, this.config);
      return null;
    } catch (error) {
      return error instanceof CniError ? `${error.msg}: ${error.details}` : messageOf(error);
    }
  }

  /** What `install` does too: a node may get a new agent without it, and it may have been cut short. */
  #migrate(): void {
    // Where nobody has said what the plugin's entry is, the room that there is stays.
    const installed = rememberedInstall(this.settings.runDir);
    const { maxPods, maxFlows, directFlowsPerPod } =
      this.settings.conf !== undefined ? this.config : installed ? parseConfig(installed.wanted.entry) : NO_CAPACITY;
    for (const [stateDir, { attachments, capacity }] of migrateAll(this.native, {
      ...this.#directories(),
      ...{ maxPods, maxFlows, directFlowsPerPod },
    })) {
      if (attachments > 0) this.log.info({ stateDir, attachments }, 'attachments got the programs of this build');
      if (capacity !== undefined) this.log.info({ stateDir, ...capacity }, 'the maps have room for more');
    }
  }

  /** Every pod that the plugin has attached in this contract is known afterwards. */
  async #rebuild(): Promise<void> {
    let known = 0;
    for (const { key, record } of this.#records()) {
      if (!isServed(record)) continue;
      try {
        await this.#register(key, record);
        known++;
      } catch (error) {
        this.log.error({ pod: describePod(record), error: messageOf(error) }, 'a recorded pod cannot be served');
      }
    }
    this.log.info({ pods: known, stateDir: this.settings.stateDir }, 'the recorded pods are known');
  }

  /** Names, counts and mends what the kernel has otherwise than recorded at these host-side interfaces. */
  async compare(ifindexes: ReadonlySet<number>): Promise<void> {
    await this.#truth?.compare(ifindexes);
  }

  reconcile(cause: string): Promise<void> {
    this.metrics.reconcileEvents.inc({ type: cause });
    const before = this.#reconciling ?? Promise.resolve();
    const run = before
      .then(() => this.#reconcile())
      .then(() => {
        this.#compared = true;
      })
      .catch((error: unknown) => {
        this.log.error({ cause, error: messageOf(error) }, 'state and kernel could not be compared');
      });
    this.#reconciling = run;
    return run;
  }

  /** struct settings.sign of the state, which is made with it and stays over a migration; undefined: there was none */
  #sign: string | undefined;

  /** Somebody has removed the state that there was, and not by uninstall. */
  #isStateLost(): boolean {
    const sign = this.#withState((state) => hex(this.native.settings(state).sign));
    const before = this.#sign;
    this.#sign = sign;
    return before !== undefined && sign !== before && !isUninstalled(this.settings.runDir);
  }

  #watched: { watcher: FSWatcher; parent: string } | undefined;

  /**
   * Links end with their last pin: whoever removes the state directory is noticed at once, and not within a period. The
   * bpffs that it is in may be mounted later, or anew.
   */
  #watchState(): void {
    const { stateDir } = this.settings;
    const found = statSync(dirname(stateDir), { bigint: true, throwIfNoEntry: false });
    const parent = found === undefined ? '' : `${found.dev} ${found.ino}`;
    if (this.#watched?.parent === parent) return;
    this.#watched?.watcher.close();
    this.#watched = undefined;
    if (found === undefined) return;
    try {
      const watcher = watch(dirname(stateDir), { persistent: false }, (_, name) => {
        if (name === basename(stateDir) && !existsSync(stateDir)) void this.reconcile('state');
      });
      watcher.on('error', () => watcher.close());
      this.#watched = { watcher, parent };
    } catch (error) {
      // Most likely the node has no inotify watch left: then it is noticed within a period.
      this.log.warn({ stateDir, error: messageOf(error) }, 'the state directory cannot be watched');
    }
  }

  async #reconcile(): Promise<void> {
    if (this.#stopped) return;
    this.#watchState();
    if (this.#isStateLost()) {
      this.metrics.drift.inc({ kind: 'state' });
      const { stateDir } = this.settings;
      this.log.error({ stateDir }, 'the state was removed: its pods are not redirected until they are attached again');
      // ztunnel is not told that they are gone: what it has of them goes on when they are attached.
      this.events.emit('lost');
      return;
    }
    const dirs = this.#directories();
    const undrained = tryEndDrains(this.native, dirs);
    if (undrained !== null) this.log.warn({ error: undrained }, 'a drained pod keeps its programs');
    this.#withState((state) => {
      const swept = sweepDead(this.native, dirs, state);
      if (swept > 0) this.log.info({ attachments: swept }, 'attachments of pods that are gone were removed');
    });
    const served = this.#records().filter(({ record }) => isServed(record));
    const wanted = new Set(served.map(({ key }) => hex(key)));
    for (const key of [...this.registry.keys()].filter((key) => !wanted.has(key))) {
      this.metrics.drift.inc({ kind: 'pod_gone' });
      await this.#leave(key);
    }
    for (const { key, record } of served) {
      if (this.registry.uidOf(hex(key)) === undefined) {
        try {
          await this.#register(key, record);
          this.metrics.drift.inc({ kind: 'pod_unknown' });
        } catch (error) {
          this.log.warn({ pod: describePod(record), error: messageOf(error) }, 'a recorded pod cannot be served');
        }
      }
    }
    this.#writeCgroups();
    await this.#truth?.compare();
    await this.#tellUnacknowledged();
    await this.#enrolPending();
  }

  /** ztunnel tries a pod that it refused again by itself, and does not say when it has worked: asking again does. */
  async #tellUnacknowledged(): Promise<void> {
    if (this.#zds?.isLive !== true) return;
    for (const { uid } of [...this.registry.values()]) {
      if (this.#zds.answerOf(uid) === null) {
        this.#announce(uid);
        continue;
      }
      try {
        await this.#zds.add(uid, { waitMs: 0, deadlineMs: DEADLINE_MS });
        this.#announce(uid);
      } catch (error) {
        this.metrics.drift.inc({ kind: 'pod_unacknowledged' });
        this.log.warn({ uid, error: messageOf(error) }, 'ztunnel does not serve a pod');
      }
    }
  }

  async #enrolPending(): Promise<void> {
    for (const pending of this.#pending()) {
      const record = this.#withState((state) => this.native.getAttachment(state, pending.key));
      // Its DEL could not reach this agent.
      if (record === null || record === undefined || isDead(this.native, record)) {
        removePending(this.settings.runDir, pending.key);
        continue;
      }
      try {
        await this.#enrolOne(pending.key, record, pending);
      } catch (error) {
        this.log.debug({ pod: describePod(record), error: messageOf(error) }, 'cannot be enrolled yet');
      }
    }
  }

  #holdToTheTruth(): Truth {
    const { native, log, metrics } = this;
    const uidOf = ({ network, containerId, ifname }: AttachmentName) =>
      this.registry.uidOf(hex(attachmentKey(native, network, containerId, ifname)));
    const truth = new Truth({
      native,
      steps: this.steps,
      config: this.config,
      periodMs: this.settings.reconcileSeconds * 1_000,
      onDrift: ({ kind, ...what }) => {
        metrics.drift.inc({ kind });
        log.error({ kind, ...what }, 'the kernel is not as recorded');
      },
      onRepaired: (record) => log.info({ pod: describePod(record) }, 'made again as recorded'),
      onForgotten: (record) => {
        log.warn({ pod: describePod(record) }, 'has no interface any more and is not enrolled');
        if (record.contract === 'shared') this.events.emit('unenrolled', podOf(record));
        else void this.withdraw(record);
      },
      onUnrepaired: (record, error) =>
        log.error({ pod: describePod(record), error: error.message }, 'could not be made again'),
      isServed: (record) => {
        const uid = uidOf(record);
        return uid !== undefined && this.#zds?.isLive === true && this.#zds.answerOf(uid) === null;
      },
      serveAgain: async (record) => {
        const uid = uidOf(record);
        if (uid !== undefined) await this.#zds?.renew(uid, { deadlineMs: DEADLINE_MS });
      },
      onTrouble: (error) => log.error({ error: error.message }, 'state and kernel could not be compared'),
    });
    truth.follow();
    return truth;
  }

  /** What /metrics shows beside what is counted as it happens. */
  refreshMetrics(): void {
    const { metrics } = this;
    metrics.ztunnelConnected.set(this.#zds?.connections.length ?? 0);
    metrics.workloads.set(this.registry.size);
    metrics.unacknowledged.set(
      [...this.registry.values()].filter(({ uid }) => this.#zds?.answerOf(uid) !== null).length,
    );
    metrics.pendingPods.set(countPending(this.settings.runDir));
    metrics.markForgeable.set(this.forgeable === null ? 0 : 1);
    metrics.ready.reset();
    for (const [condition, reason] of this.readiness.all()) metrics.ready.set({ condition }, reason === null ? 1 : 0);
    metrics.attachments.reset();
    this.#withState((state) => {
      for (const { record } of this.native.listAttachments(state)) {
        metrics.attachments.inc({ contract: record.contract, role: record.role, state: record.state });
      }
      for (const { map, entries, capacity } of this.native.mapUsage(state)) {
        metrics.mapEntries.set({ map }, entries);
        metrics.mapCapacity.set({ map }, capacity);
      }
      this.#countPackets(state);
    });
  }

  /**
   * The kernel's counters go with their pod; these do not. What was counted before this process (`isFirst`) is no
   * increase: Prometheus takes a counter that starts anew for one that starts at 0.
   */
  #countPackets(state: State, isFirst = false): void {
    const seen = new Set<string>();
    for (const { ifindex, program, reason, packets, bytes } of this.native.counters(state)) {
      const key = `${ifindex} ${program} ${reason}`;
      seen.add(key);
      const last = isFirst ? { packets, bytes } : this.#counted.get(key);
      // A smaller number: they were counted anew, for another pod or since this one was detached.
      const isAnew = last === undefined || last.packets > packets || last.bytes > bytes;
      const before = isAnew ? { packets: 0n, bytes: 0n } : last;
      this.metrics.packets.inc({ program, reason }, Number(packets - before.packets));
      this.metrics.bytes.inc({ program, reason }, Number(bytes - before.bytes));
      this.#counted.set(key, { packets, bytes });
    }
    for (const key of this.#counted.keys()) if (!seen.has(key)) this.#counted.delete(key);
  }

  #schedule(): void {
    if (this.#stopped) return;
    this.#timer = setTimeout(() => {
      this.reconcile('periodic').finally(() => this.#schedule());
    }, this.settings.reconcileSeconds * 1_000);
  }

  #serveZds(): ZdsServer {
    const { native, settings, metrics, registry } = this;
    const workload = (found: Workload) => ({
      uid: found.uid,
      names: found.names,
      netns: found.netns,
      openNetns: () => openWorkloadNetns(native, found.netns),
    });
    return ZdsServer.start(native, {
      path: settings.zdsSocket,
      workloads: () => [...registry.values()].map(workload),
      workload: (uid) => {
        const found = registry.get(uid);
        return found === undefined ? undefined : workload(found);
      },
      known: Promise.all(this.#barriers),
      events: {
        log: (level, text, fields) => this.log[level](fields ?? {}, text),
        message: (kind, result, seconds) => {
          metrics.zdsMessages.inc({ kind, result });
          metrics.zdsSeconds.observe({ kind }, seconds);
        },
        connected: ({ pid }) => this.#trust(pid),
        changed: () => {
          // During start() the server is not there yet.
          if (this.#zds?.isLive === true && !this.#stopped) this.#whenLive();
        },
      },
    });
  }

  /** by process; of ztunnels that are connected, or were while this agent has been running */
  readonly #cgroups = new Map<number, CgroupFinding>();

  /** Why the proxy's mark can be forged: how many ztunnels' cgroups are not known. null: it cannot. */
  get forgeable(): string | null {
    const connected = new Set(this.#zds?.connections.map(({ pid }) => pid));
    for (const [pid, finding] of this.#cgroups) {
      if (connected.has(pid) && 'unusable' in finding) return finding.unusable;
    }
    return null;
  }

  #trust(pid: number): void {
    const finding = cgroupOf(pid);
    this.#cgroups.set(pid, finding);
    if ('unusable' in finding) {
      this.log.warn({ pid, reason: finding.unusable }, 'pods with CAP_NET_RAW can forge the mark of ztunnel');
    }
    this.#writeCgroups();
  }

  /**
   * Whose sockets may use the proxy's mark. There is no state before the first pod, and without a ztunnel what is
   * written stays in force: one that lost its agent goes on serving.
   */
  #writeCgroups(): void {
    if (this.#cgroups.size === 0) return;
    const forgeable = this.forgeable !== null;
    const connected = new Set(this.#zds?.connections.map(({ pid }) => pid));
    this.#withState((state) => {
      const present = this.native.listProxyCgroups(state);
      for (const [pid, finding] of this.#cgroups) {
        // One that drains has left, and has sockets.
        if (!connected.has(pid) && ('unusable' in finding || isGone(finding))) {
          this.#cgroups.delete(pid);
          if ('id' in finding) this.native.deleteProxyCgroup(state, finding.id);
        } else if ('id' in finding && !present.includes(finding.id)) {
          if (present.length >= MAX_PROXY_CGROUPS) this.native.deleteProxyCgroup(state, present.shift() ?? 0n);
          this.native.putProxyCgroup(state, finding.id);
        }
      }
      if (this.native.settings(state).checkCgroups === forgeable) this.native.setCheckCgroups(state, !forgeable);
    });
  }

  #wasLive = new Set<number>();

  /** A ztunnel has its snapshot: what waited for one can go on. */
  #whenLive(): void {
    const live = new Set(
      this.#zds?.connections.filter(({ phase }) => phase === 'live').map(({ since, pid }) => since + pid),
    );
    const isNew = [...live].some((one) => !this.#wasLive.has(one));
    this.#wasLive = live;
    if (!isNew) return;
    this.events.emit('ztunnel');
    this.reconcile('ztunnel').catch(() => {});
  }

  #withState<T>(body: (state: State) => T): T | undefined {
    const state = openState(this.native, this.settings.stateDir);
    if (state === null) return undefined;
    try {
      return body(state);
    } finally {
      this.native.closeState(state);
    }
  }

  #records(): Recorded[] {
    return this.#withState((state) => this.native.listAttachments(state)) ?? [];
  }

  #recordsOf({ namespace, name, uid }: PodIdentity): Recorded[] {
    return this.#records().filter(
      ({ record }) =>
        record.role !== 'proxy' &&
        record.podNamespace === namespace &&
        record.podName === name &&
        (uid === '' || record.podUid === '' || record.podUid === uid),
    );
  }

  /** Throws CniError 108 where what the plugin says is not what is recorded. */
  #recordFor(key: AttachmentKey, body: AttachBody): AttachmentRecord {
    const refuse = (details: string) =>
      new CniError(Code.AGENT_REFUSED, `the node agent does not know ${body.ifname} of ${body.containerId}`, details);
    if (body.stateDir !== this.settings.stateDir) {
      throw refuse(`the plugin's stateDir is ${body.stateDir}, the agent's ${this.settings.stateDir}`);
    }
    const record = this.#withState((state) => this.native.getAttachment(state, key));
    if (record === undefined || record === null) throw refuse(`nothing is recorded in ${body.stateDir}`);
    if (record.role !== 'pod' || record.state !== 'attached') {
      throw refuse(`it is recorded as ${record.role}, ${record.state}`);
    }
    const { dev, ino, cookie } = record.netns;
    if (`${dev}` !== body.netns.dev || `${ino}` !== body.netns.ino || `${cookie}` !== body.netns.cookie) {
      throw refuse(`${body.netns.path} is net:[${body.netns.ino}], recorded is net:[${ino}]`);
    }
    return record;
  }

  /** For pods that the agent enrols by itself. Throws CniError 2, 6 or 7, or what reading the file throws. */
  get config(): RedirectConfig {
    return entrySettings(this.settings).config;
  }

  #directories(): { stateDir: string; runDir: string } {
    const { stateDir, runDir } = this.settings;
    return { stateDir, runDir };
  }

  #pending(): PendingPod[] {
    return listPending(this.settings.runDir, (path, error) => {
      this.log.error({ path, error: error.message }, 'a request that cannot be read was removed');
    });
  }

  /** A request that ADD could not fulfil, as it is decided now. */
  async #replay({ request }: PendingPod): Promise<{ target: Target; config: RedirectConfig }> {
    const config = parseConfig(request.conf.raw);
    let answer: Decision | undefined;
    if (enrolmentOf(request, config).role === 'undecided') {
      answer = await this.decide(podIdentity(request.args) ?? { namespace: '', name: '', uid: '' });
    }
    const netns = this.native.openNetns(request.netns);
    try {
      const { target, config: wanted } = decideTarget(this.native, request, netns, config, answer?.enrol);
      const pod = { ...target.pod, serviceAccount: answer?.serviceAccount ?? target.pod.serviceAccount };
      return { target: { ...target, pod, strict: false }, config: wanted };
    } finally {
      this.native.close(netns);
    }
  }

  #targetOf(key: AttachmentKey, record: AttachmentRecord): { target: Target; config: RedirectConfig } {
    return { target: targetOf(key, record, 'pod'), config: this.config };
  }

  /** Programs off; the pod stays recorded as one that is not enrolled. */
  async #takeOut(key: AttachmentKey): Promise<void> {
    const dirs = this.#directories();
    const leave = enterBeside(this.native, dirs.runDir);
    const state = openState(this.native, dirs.stateDir);
    try {
      const record = state === null ? null : this.native.getAttachment(state, key);
      if (state !== null && record !== null) {
        await this.steps.run(endDrainSteps(this.native, dirs, state, key, record));
      }
    } finally {
      if (state !== null) this.native.closeState(state);
      leave();
    }
  }

  #noZtunnel(): CniError {
    return cniErrorOf(new ZdsError('absent', `no ztunnel is connected to ${this.settings.zdsSocket}`), 'the pod');
  }

  // ---- one agent a runDir --------------------------------------------------------------------------------------------

  #takeLock(): void {
    const { runDir } = this.settings;
    const path = join(runDir, 'agent.lock');
    mkdirSync(runDir, { recursive: true, mode: 0o700 });
    try {
      this.#lock = this.native.lockFile(path, 0);
    } catch (error) {
      if (!hasCode(error, 'ETIMEDOUT')) throw error;
      throw new AgentRunsError(`another agent (process ${readPid(path)}) runs with ${runDir}`);
    }
    ftruncateSync(this.#lock);
    writeSync(this.#lock, `${process.pid}\n`, 0);
  }

  #releaseLock(): void {
    if (this.#lock === undefined) return;
    this.native.close(this.#lock);
    this.#lock = undefined;
  }
}

/** ztunnel is to serve it; a draining pod too, until its programs are gone. */
function isServed({ contract, role, state }: AttachmentRecord): boolean {
  return contract === 'in-pod' && role === 'pod' && state === 'attached';
}

function podOf(record: AttachmentRecord): EnrolledPod {
  return {
    // Outside Kubernetes ztunnel has to be told something all the same.
    name: record.podName === '' ? record.containerId : record.podName,
    namespace: record.podNamespace,
    uid: record.podUid,
    serviceAccount: record.serviceAccount,
    contract: record.contract,
  };
}

function enrolledOf({ uid, names }: Workload): EnrolledPod {
  return { ...names, uid, contract: 'in-pod' };
}

function cniErrorOf(error: ZdsError, pod: string): CniError {
  const code = {
    absent: Code.TRY_AGAIN_LATER,
    silent: Code.TRY_AGAIN_LATER,
    refused: Code.PROXY_NOT_READY,
    unfit: Code.AGENT_REFUSED,
  };
  return new CniError(code[error.reason], `ztunnel does not serve ${pod}`, error.message, { cause: error });
}

/**
 * Every mount of a bpffs is an instance of its own: pins in a private one are not the plugin's. Throws Error. Where this
 * process does not see the node's processes there is nothing to compare with.
 */
function assertSharedBpffs(stateDir: string): void {
  const parent = dirname(stateDir);
  let theirs: bigint;
  let ours: bigint;
  try {
    theirs = statSync(join('/proc/1/root', parent), { bigint: true }).dev;
    ours = statSync(parent, { bigint: true }).dev;
  } catch {
    return;
  }
  if (ours !== theirs) {
    throw new Error(
      `${parent} is another filesystem here than for process 1: mount the node's bpffs into this container (HostToContainer)`,
    );
  }
}

function readPid(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim() || 'unknown';
  } catch {
    return 'unknown';
  }
}

function messageOf(error: unknown): string {
  return isNativeError(error) ? kernelReason(error) : error instanceof Error ? error.message : String(error);
}
