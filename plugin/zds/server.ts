// SPDX-License-Identifier: Apache-2.0
// The agent's end of ZDS. What must hold:
// - Nothing is sent that makes ztunnel exit, as every pod of the node would lose its proxy: no Keep after the snapshot,
//   no second SnapshotSent, no Add without the workload's names.
// - No snapshot before the pods are known: ztunnel drains every pod that a snapshot does not name.
// - One message is outstanding on a connection; ztunnel answers each within a deadline, or the connection is closed and
//   ztunnel connects again.
// - Several ztunnels while one is replaced: the newest gets Adds, all get Dels, and when the newest goes the one before
//   it is told what it has missed.

import { lstatSync, rmSync, statSync } from 'node:fs';
import type { Native } from '../native.ts';
import { SeqpacketConnection } from './connection.ts';
import {
  decodeAck,
  decodeHello,
  encodeRequest,
  VERSION,
  type WorkloadNames,
  ZdsMessageError,
  type ZdsRequest,
} from './messages.ts';

/** A pod in the mesh. */
export interface ZdsWorkload {
  /** free text; ztunnel knows the pod by it */
  uid: string;
  names: WorkloadNames;
  /** identifies the network namespace: another one under the same uid is another pod to ztunnel */
  netns: { dev: bigint; ino: bigint };
  /** A descriptor of that namespace, the caller's from now on; null if nobody knows any more where to find it. */
  openNetns(): number | null;
}

/** What happened to a message. "lost": the connection ended before its answer. */
export type ZdsResult = 'ack' | 'nack' | 'lost' | 'timeout';

export interface ZdsEvents {
  /** for the log; `level` as pino has them */
  log(level: 'debug' | 'info' | 'warn' | 'error', text: string, fields?: Record<string, unknown>): void;
  message(kind: ZdsRequest['kind'], result: ZdsResult, seconds: number): void;
  /** before the connection is told of anything */
  connected(peer: { pid: number; uid: number; gid: number }): void;
  /** connections came or went, or a snapshot is complete */
  changed(): void;
}

export interface ZdsServerOptions {
  path: string;
  /** every pod in the mesh at this moment; called when a snapshot begins */
  workloads(): Iterable<ZdsWorkload>;
  workload(uid: string): ZdsWorkload | undefined;
  /** resolves when workloads() is complete; no snapshot begins before */
  known: Promise<unknown>;
  /** null, or why this process must not connect; uid 0 is asked for in any case */
  refusePeer?(peer: { pid: number; uid: number; gid: number }): string | null;
  events: ZdsEvents;
  /** for Hello and for each answer; 5 s as in Istio */
  deadlineMs?: number;
  /** connections that are taken in a second; more wait in the socket's backlog */
  acceptsPerSecond?: number;
}

export interface ZdsConnectionState {
  pid: number;
  /** hello: nothing is known yet; snapshot: being told of every pod; live: told of each change */
  phase: 'hello' | 'snapshot' | 'live';
  /** pods that it has acknowledged */
  pods: number;
  newest: boolean;
  /** ms since 1970 */
  since: number;
}

/** Why a pod is not in a ztunnel. */
export class ZdsError extends Error {
  override name = 'ZdsError';
  /**
   * absent: no ztunnel is connected; refused: it answered, and with an error; silent: it did not answer in time;
   * unfit: it cannot be told of this pod
   */
  readonly reason: 'absent' | 'refused' | 'silent' | 'unfit';

  constructor(reason: ZdsError['reason'], message: string) {
    super(message);
    this.reason = reason;
  }
}

const DEADLINE_MS = 5_000;
const ACCEPTS_PER_SECOND = 5;
const BACKLOG = 64;

/** Throws Error if somebody serves `path` already or something else is there, NativeError. */
export function assertPathFree(native: Native, path: string): void {
  let isSocket: boolean;
  try {
    isSocket = lstatSync(path).isSocket();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw error;
  }
  if (!isSocket) throw new Error(`${path} is there and is no socket`);
  let served: string;
  try {
    const fd = native.connectSeqpacket(path);
    try {
      served = `process ${native.peerCredentials(fd).pid}`;
    } finally {
      native.close(fd);
    }
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    // Nobody listens: what a process that was killed left.
    if (code === 'ECONNREFUSED') {
      rmSync(path, { force: true });
      return;
    }
    if (code === 'ENOENT') return;
    if (code !== 'EAGAIN' && code !== 'EPROTOTYPE') throw error;
    served = code === 'EAGAIN' ? 'a process that is busy' : 'a process, by a socket of another type';
  }
  throw new Error(
    `${path} is served already, by ${served}: only one node agent can speak to ztunnel (is istio-cni-node running?)`,
  );
}

export class ZdsServer {
  readonly #native: Native;
  readonly #options: ZdsServerOptions;
  readonly #listener: number;
  readonly #inode: bigint;
  /** oldest first */
  readonly #peers: ZtunnelPeer[] = [];
  #stopAccepting: (() => void) | undefined;
  #resume: NodeJS.Timeout | undefined;
  #accepted: number[] = [];
  #waiting = new Set<() => void>();
  #closed = false;

  private constructor(native: Native, options: ZdsServerOptions, listener: number) {
    this.#native = native;
    this.#options = options;
    this.#listener = listener;
    this.#inode = statSync(options.path, { bigint: true }).ino;
  }

  /** Listens, mode 0600. Throws as assertPathFree() does, or NativeError. */
  static start(native: Native, options: ZdsServerOptions): ZdsServer {
    assertPathFree(native, options.path);
    const listener = native.listenSeqpacket(options.path, { mode: 0o600, backlog: BACKLOG });
    const server = new ZdsServer(native, options, listener);
    server.#accept();
    return server;
  }

  get connections(): ZdsConnectionState[] {
    const newest = this.#newest();
    return this.#peers.map((peer) => ({
      pid: peer.pid,
      phase: peer.phase,
      pods: peer.acknowledged,
      newest: peer === newest,
      since: peer.since,
    }));
  }

  /** a ztunnel has the whole snapshot */
  get isLive(): boolean {
    return this.#peers.some(({ phase }) => phase === 'live');
  }

  /** What the newest ztunnel answered about a pod last; null: acknowledged; undefined: it has not been told. */
  answerOf(uid: string): string | null | undefined {
    return this.#newest()?.answerOf(uid);
  }

  /**
   * Tells the newest ztunnel of a pod that workloads() has by now, and resolves when it has acknowledged it; one that
   * reconnects meanwhile hears of it in its snapshot. Waits `waitMs` for a ztunnel to be there, and `deadlineMs` in all.
   * Rejects with ZdsError.
   */
  async add(uid: string, { waitMs, deadlineMs }: { waitMs: number; deadlineMs: number }): Promise<void> {
    const begun = performance.now();
    const elapsed = () => performance.now() - begun;
    const workload = this.#options.workload(uid);
    if (workload === undefined) throw new ZdsError('unfit', `${uid} is not in the mesh any more`);
    assertFits(workload);
    let told = false;
    for (;;) {
      const newest = this.#newest();
      if (newest !== undefined) {
        told = true;
        const error = await newest.tell(uid, deadlineMs - elapsed());
        if (error === null) return;
        if (error instanceof ZdsError) throw error;
        // The connection went, and the one before it may be there.
        if (this.#newest() !== undefined) continue;
      }
      const limit = told ? deadlineMs : Math.min(waitMs, deadlineMs);
      if (this.#closed || elapsed() >= limit) break;
      await this.#changeWithin(limit - elapsed());
    }
    if (told) {
      throw new ZdsError('silent', `ztunnel did not acknowledge ${uid} within ${Math.round(deadlineMs / 100) / 10} s`);
    }
    throw new ZdsError('absent', `no ztunnel is connected to ${this.#options.path}`);
  }

  /**
   * Has the newest ztunnel forget a pod that it has acknowledged and open it anew, with a descriptor of its own: an Add
   * alone is nothing to it while it knows the namespace. The pod's connections through it end. Resolves when it has
   * acknowledged; rejects with ZdsError.
   */
  async renew(uid: string, { deadlineMs }: { deadlineMs: number }): Promise<void> {
    const newest = this.#newest();
    if (newest === undefined) throw new ZdsError('absent', `no ztunnel is connected to ${this.#options.path}`);
    const error = await newest.renew(uid, deadlineMs);
    if (error === null) return;
    if (error instanceof ZdsError) throw error;
    throw new ZdsError('silent', `the connection of ztunnel ended before it acknowledged ${uid}`);
  }

  /** Tells every ztunnel that a pod, which workloads() no longer has, is gone. Resolves when each has answered or left. */
  async del(uid: string): Promise<void> {
    // One that has not said Hello knows of none.
    const told = this.#peers.filter(({ phase }) => phase !== 'hello');
    await Promise.all(told.map((peer) => peer.forget(uid)));
  }

  /** Closes every connection; ztunnel and what it serves go on. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#resume);
    this.#stopAccepting?.();
    this.#native.close(this.#listener);
    for (const peer of [...this.#peers]) peer.close('the agent stops');
    try {
      // Somebody may have removed it and listen there now.
      if (statSync(this.#options.path, { bigint: true }).ino === this.#inode) rmSync(this.#options.path);
    } catch {
      // Gone already.
    }
    this.#changed();
  }

  #newest(): ZtunnelPeer | undefined {
    return this.#peers.findLast(({ phase }) => phase !== 'hello');
  }

  #accept(): void {
    this.#stopAccepting = this.#native.watchReadable(this.#listener, () => {
      const now = performance.now();
      const limit = this.#options.acceptsPerSecond ?? ACCEPTS_PER_SECOND;
      this.#accepted = this.#accepted.filter((time) => now - time < 1_000);
      const oldest = this.#accepted.at(-limit);
      if (oldest !== undefined) {
        this.#pause(1_000 - (now - oldest));
        return;
      }
      try {
        const fd = this.#native.acceptSeqpacket(this.#listener);
        if (fd === null) return;
        this.#accepted.push(now);
        this.#welcome(fd);
      } catch (error) {
        // Most likely no descriptor is left; the connection stays in the backlog, and asking at once would spin.
        this.#log('error', 'a connection could not be accepted', { error: (error as Error).message });
        this.#pause(1_000);
      }
    });
  }

  #pause(ms: number): void {
    this.#stopAccepting?.();
    this.#stopAccepting = undefined;
    this.#resume = setTimeout(() => this.#accept(), Math.max(1, ms));
    this.#resume.unref();
  }

  #welcome(fd: number): void {
    const options = this.#options;
    const peer = new ZtunnelPeer(this.#native, fd, options, {
      changed: () => this.#changed(),
      ended: (ended, reason) => {
        const wasNewest = ended === this.#newest();
        this.#peers.splice(this.#peers.indexOf(ended), 1);
        this.#log('warn', 'ztunnel disconnected', { pid: ended.pid, reason, connections: this.#peers.length });
        const heir = this.#newest();
        if (wasNewest && heir !== undefined && !this.#closed) heir.catchUp();
        this.#changed();
      },
    });
    this.#peers.push(peer);
    const { uid, pid } = peer.credentials;
    const refusal = uid === 0 ? options.refusePeer?.(peer.credentials) : `its user is ${uid}, not root`;
    if (refusal) {
      this.#log('warn', 'a connection was refused', { pid, uid, reason: refusal });
      peer.close(`refused: ${refusal}`);
      return;
    }
    this.#log('info', 'ztunnel connected', { pid, connections: this.#peers.length });
    options.events.connected(peer.credentials);
    this.#changed();
  }

  #changed(): void {
    const waiting = [...this.#waiting];
    this.#waiting.clear();
    for (const wake of waiting) wake();
    this.#options.events.changed();
  }

  #changeWithin(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        this.#waiting.delete(wake);
        resolve();
      };
      const timer = setTimeout(wake, Math.max(0, ms));
      this.#waiting.add(wake);
    });
  }

  #log(level: Parameters<ZdsEvents['log']>[0], text: string, fields?: Record<string, unknown>): void {
    this.#options.events.log(level, text, fields);
  }
}

/** Throws ZdsError if ztunnel could not read of the pod. */
export function assertFits(workload: Pick<ZdsWorkload, 'uid' | 'names'>): void {
  try {
    encodeRequest({ kind: 'add', uid: workload.uid, workload: workload.names });
  } catch (error) {
    if (error instanceof ZdsMessageError) throw new ZdsError('unfit', error.message);
    throw error;
  }
}

/** A message, and what is done with its answer; undefined: the connection ended first. */
interface Outgoing {
  /** null: there is nothing to send any more */
  prepare(): { request: ZdsRequest; fd?: number } | null;
  done(answer: { error: string | null } | undefined): void;
}

interface PeerOwner {
  changed(): void;
  ended(peer: ZtunnelPeer, reason: string): void;
}

/** What one ztunnel knows of a pod. */
interface Known {
  ino: bigint;
  /** null: acknowledged */
  error: string | null;
}

class ZtunnelPeer {
  readonly since = Date.now();
  phase: ZdsConnectionState['phase'] = 'hello';
  readonly #native: Native;
  readonly #options: ZdsServerOptions;
  readonly #owner: PeerOwner;
  readonly #connection: SeqpacketConnection;
  readonly #known = new Map<string, Known>();
  readonly #queue: Outgoing[] = [];
  #outstanding: { kind: ZdsRequest['kind']; sent: number; done: Outgoing['done'] } | undefined;
  #timer: NodeJS.Timeout | undefined;
  #ended = false;
  #greeted = false;

  constructor(native: Native, fd: number, options: ZdsServerOptions, owner: PeerOwner) {
    this.#native = native;
    this.#options = options;
    this.#owner = owner;
    this.#connection = new SeqpacketConnection(native, fd, {
      onDatagram: ({ bytes, truncated, fdCount }) => this.#receive(bytes, truncated, fdCount),
      onEnd: (reason) => this.close(reason),
    });
    this.#arm('no Hello');
  }

  get credentials(): { pid: number; uid: number; gid: number } {
    return this.#connection.peer;
  }

  get pid(): number {
    return this.credentials.pid;
  }

  get acknowledged(): number {
    let count = 0;
    for (const { error } of this.#known.values()) if (error === null) count++;
    return count;
  }

  answerOf(uid: string): string | null | undefined {
    return this.#known.get(uid)?.error;
  }

  /**
   * Resolves with null when this ztunnel has acknowledged the pod, with a ZdsError when it refused it, did not answer,
   * or cannot be told, and with "ended" when the connection ended first.
   */
  tell(uid: string, deadlineMs: number): Promise<null | ZdsError | 'ended'> {
    return new Promise((resolve) => {
      const timer = setTimeout(
        () => resolve(new ZdsError('silent', `ztunnel (process ${this.pid}) did not acknowledge ${uid} in time`)),
        Math.max(0, deadlineMs),
      );
      const settle = (result: null | ZdsError | 'ended') => {
        clearTimeout(timer);
        resolve(result);
      };
      this.#enqueueAdd(uid, settle);
    });
  }

  /** As tell(), for a pod that it knows already: a Del goes ahead, and nothing comes between the two. */
  renew(uid: string, deadlineMs: number): Promise<null | ZdsError | 'ended'> {
    this.#enqueue({
      prepare: () => (this.#known.has(uid) ? { request: { kind: 'del', uid } } : null),
      done: (answer) => {
        if (answer === undefined) return;
        this.#known.delete(uid);
        if (answer.error !== null) this.#log('warn', 'ztunnel refused to forget a pod', { uid, error: answer.error });
      },
    });
    return this.tell(uid, deadlineMs);
  }

  /** Sends a Del, if this ztunnel may know of the pod. */
  forget(uid: string): Promise<void> {
    return new Promise((resolve) => {
      this.#enqueue({
        prepare: () => {
          const again = this.#options.workload(uid);
          // It came back under the same uid meanwhile: its Add replaces what is there.
          if (again !== undefined || !this.#known.has(uid)) return null;
          return { request: { kind: 'del', uid } };
        },
        done: (answer) => {
          if (answer?.error === null) this.#known.delete(uid);
          else if (answer !== undefined) {
            this.#known.delete(uid);
            this.#log('warn', 'ztunnel refused to forget a pod', { uid, error: answer.error });
          }
          resolve();
        },
      });
    });
  }

  /** It is the newest again: whatever was told to the one that is gone only. */
  catchUp(): void {
    for (const workload of this.#options.workloads()) {
      const known = this.#known.get(workload.uid);
      if (known?.ino === workload.netns.ino && known.error === null) continue;
      this.#enqueueAdd(workload.uid, () => {});
    }
  }

  close(reason: string): void {
    if (this.#ended) return;
    this.#ended = true;
    clearTimeout(this.#timer);
    this.#connection.close();
    const outstanding = this.#outstanding;
    this.#outstanding = undefined;
    this.#owner.ended(this, reason);
    if (outstanding !== undefined) {
      const result = reason.startsWith(NO_ANSWER) ? 'timeout' : 'lost';
      this.#options.events.message(outstanding.kind, result, secondsSince(outstanding.sent));
      outstanding.done(undefined);
    }
    for (const { done } of this.#queue.splice(0)) done(undefined);
  }

  #enqueueAdd(uid: string, settle: (result: null | ZdsError | 'ended') => void): void {
    let ino = 0n;
    let unfit: ZdsError | null = null;
    let isKnown = false;
    this.#enqueue({
      prepare: () => {
        const workload = this.#options.workload(uid);
        if (workload === undefined) {
          unfit = new ZdsError('unfit', `${uid} has left the mesh`);
          return null;
        }
        const known = this.#known.get(uid);
        isKnown = known?.ino === workload.netns.ino && known.error === null;
        if (isKnown) return null;
        try {
          assertFits(workload);
        } catch (error) {
          unfit = error as ZdsError;
          return null;
        }
        const fd = workload.openNetns();
        if (fd === null) {
          // A Keep is understood within the snapshot only, and would end ztunnel now.
          unfit = new ZdsError('unfit', `the network namespace net:[${workload.netns.ino}] of ${uid} is gone`);
          return null;
        }
        ino = workload.netns.ino;
        return { request: { kind: 'add', uid, workload: workload.names }, fd };
      },
      done: (answer) => {
        if (unfit !== null) settle(unfit);
        else if (isKnown) settle(null);
        else if (answer === undefined) settle('ended');
        else {
          this.#known.set(uid, { ino, error: answer.error });
          if (answer.error !== null) this.#log('warn', 'ztunnel refused a pod', { uid, error: answer.error });
          if (answer.error === null) settle(null);
          else settle(new ZdsError('refused', `ztunnel (process ${this.pid}) refused ${uid}: ${answer.error}`));
        }
      },
    });
  }

  async #snapshot(): Promise<void> {
    await this.#options.known;
    if (this.#ended) return;
    this.phase = 'snapshot';
    this.#owner.changed();
    const begun = performance.now();
    const uids = [...this.#options.workloads()].map(({ uid }) => uid);
    // In front of what was wanted meanwhile, of which the snapshot then has told already.
    const later = this.#queue.splice(0);
    for (const uid of uids) this.#queue.push(this.#snapshotEntry(uid));
    this.#queue.push({
      prepare: () => ({ request: { kind: 'snapshotSent' } }),
      done: (answer) => {
        if (answer === undefined) return;
        if (answer.error !== null) {
          this.close(`ztunnel refused the snapshot: ${answer.error}`);
          return;
        }
        this.phase = 'live';
        const ms = Math.round(performance.now() - begun);
        this.#log('info', 'snapshot complete', { pid: this.pid, pods: this.acknowledged, ms });
        // A pod may have gone after it was told of, another may have come.
        for (const uid of [...this.#known.keys()]) if (this.#options.workload(uid) === undefined) this.forget(uid);
        this.catchUpOnNew();
        this.#owner.changed();
      },
    });
    this.#queue.push(...later);
    this.#pump();
  }

  /** Of what came while the snapshot went out and was not asked for by anybody. */
  catchUpOnNew(): void {
    for (const workload of this.#options.workloads()) {
      if (!this.#known.has(workload.uid)) this.#enqueueAdd(workload.uid, () => {});
    }
  }

  #snapshotEntry(uid: string): Outgoing {
    let ino = 0n;
    return {
      prepare: () => {
        const workload = this.#options.workload(uid);
        if (workload === undefined) return null;
        ino = workload.netns.ino;
        try {
          assertFits(workload);
        } catch (error) {
          this.#log('error', 'a pod was left out of the snapshot', { uid, error: (error as Error).message });
          return null;
        }
        const fd = workload.openNetns();
        if (fd === null) return { request: { kind: 'keep', uid } };
        return { request: { kind: 'add', uid, workload: workload.names }, fd };
      },
      done: (answer) => {
        if (answer === undefined || ino === 0n) return;
        this.#known.set(uid, { ino, error: answer.error });
        if (answer.error !== null) this.#log('warn', 'ztunnel refused a pod', { uid, error: answer.error });
      },
    };
  }

  #enqueue(outgoing: Outgoing): void {
    if (this.#ended) {
      outgoing.done(undefined);
      return;
    }
    this.#queue.push(outgoing);
    this.#pump();
  }

  /** Sends the next message if none is outstanding. */
  #pump(): void {
    while (!this.#ended && this.#outstanding === undefined && this.phase !== 'hello') {
      const next = this.#queue.shift();
      if (next === undefined) return;
      const prepared = next.prepare();
      if (prepared === null) {
        next.done(undefined);
        continue;
      }
      const { request, fd } = prepared;
      this.#outstanding = { kind: request.kind, sent: performance.now(), done: next.done };
      let sent: boolean;
      try {
        sent = this.#connection.send(encodeRequest(request), fd);
      } finally {
        if (fd !== undefined) this.#native.close(fd);
      }
      // After a failing send the connection has ended itself.
      if (!sent) this.close('ztunnel does not read');
      else this.#arm(`${NO_ANSWER} ${request.kind}`);
    }
  }

  #receive(bytes: Uint8Array, truncated: boolean, fdCount: number): void {
    clearTimeout(this.#timer);
    try {
      if (truncated) throw new ZdsMessageError(`a message of more than ${bytes.length} bytes`);
      if (fdCount > 0) throw new ZdsMessageError(`a message with ${fdCount} descriptors`);
      if (!this.#greeted) {
        this.#greet(decodeHello(bytes));
        return;
      }
      if (this.#outstanding === undefined) throw new ZdsMessageError('an answer to nothing');
      const answer = decodeAck(bytes);
      const { kind, sent, done } = this.#outstanding;
      this.#outstanding = undefined;
      this.#options.events.message(kind, answer.error === null ? 'ack' : 'nack', secondsSince(sent));
      done(answer);
    } catch (error) {
      if (!(error instanceof ZdsMessageError)) throw error;
      this.close(`it does not speak ZDS: ${error.message}`);
      return;
    }
    this.#pump();
  }

  #greet(version: number): void {
    if (version !== VERSION) {
      throw new ZdsMessageError(`Hello with version ${version}; this agent speaks version ${VERSION}`);
    }
    this.#greeted = true;
    this.#log('debug', 'Hello', { pid: this.pid, version });
    this.#snapshot().catch((error: unknown) => this.close(`no snapshot can be made: ${String(error)}`));
  }

  #arm(what: string): void {
    clearTimeout(this.#timer);
    const ms = this.#options.deadlineMs ?? DEADLINE_MS;
    this.#timer = setTimeout(() => this.close(`${what} within ${ms / 1_000} s`), ms);
  }

  #log(level: Parameters<ZdsEvents['log']>[0], text: string, fields?: Record<string, unknown>): void {
    this.#options.events.log(level, text, fields);
  }
}

const NO_ANSWER = 'no answer to';

function secondsSince(time: number): number {
  return (performance.now() - time) / 1_000;
}
