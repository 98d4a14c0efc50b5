// SPDX-License-Identifier: Apache-2.0
// Stands in for ztunnel of the contract "in-pod", on machines that have none: connects to the agent, enters the network
// namespaces that it is handed, opens ztunnel's listeners there. Without TLS and without authorisation, but on the ZDS
// socket as strict as the real one was seen to be, for what a test passes here must pass there.

import type { Native } from '../native.ts';
import { SeqpacketConnection } from '../zds/connection.ts';
import {
  decodeRequest,
  encodeAck,
  encodeHello,
  REQUEST_LIMIT,
  type WorkloadNames,
  ZdsMessageError,
} from '../zds/messages.ts';
import { DnsListeners } from './dns.ts';
import { type ListenerName, type SeenConnection, TransparentProxy } from './proxy.ts';

/** SO_MARK of every socket that ztunnel has in a pod. */
export const ZTUNNEL_MARK = 0x539;

export const ZTUNNEL_PORTS = {
  outbound: 15_001,
  inboundPlaintext: 15_006,
  inboundHBONE: 15_008,
  dns: 15_053,
} as const satisfies Record<ListenerName | 'dns', number>;

/** A workload as XDS would name it. */
export interface KnownWorkload extends WorkloadNames {
  /** what others reach it at */
  addresses: readonly string[];
}

/** Ways in which it can misbehave; each is something that a real process does or that an attacker could. */
export interface Misbehaviour {
  /** Hello with another version */
  version?: number;
  /** reads and never answers */
  hang?: true;
  /** answers every Add with this error */
  nack?: string;
  /** sends these bytes instead of Hello, or after the first Add */
  garbage?: { instead: 'hello' | 'ack'; bytes: Uint8Array };
}

export interface ZtunnelOptions {
  socket: string;
  /** what XDS has told so far; a function is asked each time */
  xds: readonly KnownWorkload[] | (() => readonly KnownWorkload[]);
  onSeen?: (uid: string, connection: SeenConnection) => void;
  onFailed?: (error: Error) => void;
  /** IPv4 addresses of names in the mesh */
  names?: ReadonlyMap<string, string>;
  /** false: no DNS listeners, ISTIO_META_DNS_CAPTURE=false */
  dns?: boolean;
  misbehaviour?: Misbehaviour;
  /** how long connections may live after SIGTERM; 5 s */
  drainMs?: number;
  /** between tries to open listeners that could not be opened; 5 s */
  retryMs?: number;
}

interface Pod {
  uid: string;
  names: WorkloadNames;
  netns: number;
  ino: bigint;
  proxy: TransparentProxy;
  dns: DnsListeners | undefined;
}

/** A pod whose listeners could not be opened. */
interface Pending {
  uid: string;
  names: WorkloadNames;
  netns: number;
  ino: bigint;
}

const RECONNECT_FIRST_MS = 10;
const RECONNECT_LAST_MS = 15_000;
const RETRY_MS = 5_000;
const DRAIN_MS = 5_000;

export class StandInZtunnel {
  /** Resolves with the exit code when a process would have ended: 1 after a message that a ztunnel does not survive. */
  readonly exited: Promise<number>;
  /** every message in order, as ztunnel's log would have them */
  readonly log: string[] = [];
  readonly #native: Native;
  readonly #options: ZtunnelOptions;
  readonly #pods = new Map<string, Pod>();
  readonly #pending = new Map<string, Pending>();
  /** Of pods that were seen before the agent went, until its next snapshot is complete. */
  #named: Set<string> | undefined;
  #connection: SeqpacketConnection | undefined;
  #reconnectMs = RECONNECT_FIRST_MS;
  #timer: NodeJS.Timeout | undefined;
  #retry: NodeJS.Timeout;
  #handling: Promise<void> = Promise.resolve();
  #exit: (code: number) => void;
  #ended = false;
  #changed: (() => void)[] = [];

  private constructor(native: Native, options: ZtunnelOptions) {
    this.#native = native;
    this.#options = options;
    const { promise, resolve } = Promise.withResolvers<number>();
    this.exited = promise;
    this.#exit = resolve;
    this.#retry = setInterval(() => this.#retryPending(), options.retryMs ?? RETRY_MS);
    this.#retry.unref();
  }

  /** Connects, and again and again until it can. */
  static start(native: Native, options: ZtunnelOptions): StandInZtunnel {
    const ztunnel = new StandInZtunnel(native, options);
    ztunnel.#connect();
    return ztunnel;
  }

  /** uids of pods that are served */
  get served(): string[] {
    return [...this.#pods.keys()];
  }

  /** uids of pods whose listeners could not be opened; workload_manager_pending_proxy_count is their number */
  get pending(): string[] {
    return [...this.#pending.keys()];
  }

  get connected(): boolean {
    return this.#connection?.open === true;
  }

  /** /healthz/ready: a snapshot is complete, the agent is there, and no pod is pending. */
  get ready(): boolean {
    return this.connected && this.#snapshotDone;
  }

  #snapshotDone = false;

  pod(uid: string): Pick<Pod, 'names' | 'ino' | 'proxy' | 'dns'> | undefined {
    return this.#pods.get(uid);
  }

  /** Resolves at the next change of what the getters say. */
  change(): Promise<void> {
    return new Promise((resolve) => this.#changed.push(resolve));
  }

  /** What SIGTERM does: no new connections, the open ones may end by themselves, then they are ended. */
  async terminate(): Promise<void> {
    if (this.#ended) return;
    this.#ended = true;
    this.#disconnect();
    // What has connected by now is accepted first: the kernel resets what waits at a listener that is closed.
    await new Promise((resolve) => setImmediate(resolve));
    for (const { proxy } of this.#pods.values()) proxy.stopListening();
    const deadline = performance.now() + (this.#options.drainMs ?? DRAIN_MS);
    const open = () => [...this.#pods.values()].some(({ proxy }) => proxy.connections > 0);
    while (open() && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 20));
    await this.#dropAll();
    this.#exit(0);
  }

  /** What kill -9 does: everything is reset at once. */
  async kill(): Promise<void> {
    if (this.#ended) return;
    this.#ended = true;
    this.#disconnect();
    for (const { proxy } of this.#pods.values()) await proxy.close();
    await this.#dropAll();
    this.#exit(137);
  }

  /** Closes the listeners in a pod and goes on as if they were there, as a ztunnel does whose tasks for it have ended. */
  goDeaf(uid: string): void {
    this.#pods.get(uid)?.proxy.stopListening();
  }

  /** Closes the connection to the agent without more ado, and connects again. */
  dropConnection(): void {
    this.#connection?.close();
    this.#reconnect('dropped', 0);
  }

  // ---- connection ----------------------------------------------------------------------------------------------------

  #connect(): void {
    if (this.#ended) return;
    let fd: number;
    try {
      fd = this.#native.connectSeqpacket(this.#options.socket);
    } catch (error) {
      this.#reconnect((error as Error).message, this.#reconnectMs);
      this.#reconnectMs = Math.min(RECONNECT_LAST_MS, this.#reconnectMs * 2);
      return;
    }
    this.#reconnectMs = RECONNECT_FIRST_MS;
    // Requests are handled one after the other, also those that a connection which is gone by now has brought.
    this.#named = new Set();
    this.#snapshotDone = false;
    const connection = new SeqpacketConnection(this.#native, fd, {
      onDatagram: (datagram) => {
        const fd = datagram.takeFd();
        const { bytes, truncated, fdCount } = datagram;
        this.#handling = this.#handling.then(() => this.#handle(connection, bytes, truncated, fdCount, fd));
      },
      onEnd: (reason) => this.#reconnect(reason, 1),
    });
    this.#connection = connection;
    const { version, garbage } = this.#options.misbehaviour ?? {};
    connection.send(garbage?.instead === 'hello' ? garbage.bytes : encodeHello(version));
    this.#note('connected');
  }

  #reconnect(reason: string, ms: number): void {
    this.#note(`disconnected: ${reason}`);
    if (this.#ended) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#connect(), ms);
  }

  #disconnect(): void {
    clearTimeout(this.#timer);
    clearInterval(this.#retry);
    this.#connection?.close();
  }

  // ---- requests ------------------------------------------------------------------------------------------------------

  async #handle(
    connection: SeqpacketConnection,
    bytes: Uint8Array,
    truncated: boolean,
    fdCount: number,
    fd: number | null,
  ): Promise<void> {
    let unused = fd;
    try {
      if (this.#ended || !connection.open) return;
      const { misbehaviour } = this.#options;
      if (misbehaviour?.hang) return;
      // The real one reads into 1,024 bytes.
      if (truncated || bytes.length > REQUEST_LIMIT) return this.#breakOff(connection, 'message too long');
      let request: ReturnType<typeof decodeRequest>;
      try {
        request = decodeRequest(bytes);
      } catch (error) {
        if (!(error instanceof ZdsMessageError)) throw error;
        return this.#breakOff(connection, `failed to decode: ${error.message}`);
      }
      this.log.push(request.kind === 'snapshotSent' ? request.kind : `${request.kind} ${request.uid}`);
      if (misbehaviour?.garbage?.instead === 'ack') {
        connection.send(misbehaviour.garbage.bytes);
        return;
      }
      switch (request.kind) {
        case 'add': {
          if (request.workload === null) return await this.#die(connection, 'add without workload_info');
          if (unused === null) return this.#breakOff(connection, `add with ${fdCount} descriptors`);
          if (misbehaviour?.nack !== undefined) {
            connection.send(encodeAck(misbehaviour.nack));
            return;
          }
          const netns = unused;
          unused = null;
          await this.#add(connection, request.uid, request.workload, netns);
          break;
        }
        case 'keep':
          if (this.#snapshotDone) return await this.#die(connection, 'keep after the snapshot');
          if (!this.#pods.has(request.uid) && !this.#pending.has(request.uid)) {
            connection.send(encodeAck(`workload ${request.uid} is not known`));
            return;
          }
          this.#named?.add(request.uid);
          connection.send(encodeAck(null));
          break;
        case 'del':
          await this.#drop(request.uid);
          connection.send(encodeAck(null));
          break;
        case 'snapshotSent':
          if (this.#snapshotDone) return await this.#die(connection, 'a second snapshot');
          // Whatever the agent did not name is gone for it.
          for (const uid of [...this.#pods.keys(), ...this.#pending.keys()]) {
            if (!this.#named?.has(uid)) await this.#drop(uid);
          }
          this.#snapshotDone = true;
          connection.send(encodeAck(null));
          break;
      }
      this.#tellChange();
    } finally {
      if (unused !== null) this.#native.close(unused);
    }
  }

  async #add(connection: SeqpacketConnection, uid: string, names: WorkloadNames, netns: number): Promise<void> {
    let ino: bigint;
    try {
      ({ ino } = this.#native.netnsIdentity(netns));
    } catch {
      // Not a descriptor of a network namespace.
      this.#native.close(netns);
      this.#breakOff(connection, 'the descriptor is no network namespace');
      return;
    }
    this.#named?.add(uid);
    const known = this.#pods.get(uid);
    if (known?.ino === ino) {
      this.#native.close(netns);
      connection.send(encodeAck(null));
      return;
    }
    if (known !== undefined || this.#pending.has(uid)) await this.#drop(uid);
    try {
      await this.#serve({ uid, names, netns, ino });
      connection.send(encodeAck(null));
    } catch (error) {
      this.#pending.set(uid, { uid, names, netns, ino });
      const { code } = error as NodeJS.ErrnoException;
      const kind = code === 'EADDRINUSE' ? 'AddrInUse' : code;
      connection.send(
        encodeAck(`failed to start proxy: Os { code: ${(error as { errno?: number }).errno}, kind: ${kind} }`),
      );
    }
  }

  /** Every listener, or none and NativeError. Takes over `netns` where it succeeds. */
  async #serve({ uid, names, netns, ino }: Pending): Promise<void> {
    const isKnown = () =>
      this.#xds.some(
        (known) =>
          known.name === names.name &&
          known.namespace === names.namespace &&
          known.serviceAccount === names.serviceAccount,
      );
    const { dns: dnsPort, ...ports } = ZTUNNEL_PORTS;
    const inPod = { mark: ZTUNNEL_MARK, isKnown };
    const { onSeen, onFailed } = this.#options;
    const proxy = await TransparentProxy.start(this.#native, {
      netns,
      address: '::',
      ports,
      inPod,
      ...(onSeen !== undefined && { onSeen: (connection) => onSeen(uid, connection) }),
      ...(onFailed !== undefined && { onFailed }),
    });
    let dns: DnsListeners | undefined;
    try {
      if (this.#options.dns !== false) {
        const answers = this.#options.names ?? new Map();
        dns = await DnsListeners.start(this.#native, { netns, port: dnsPort, mark: ZTUNNEL_MARK, names: answers });
      }
    } catch (error) {
      await proxy.close();
      throw error;
    }
    this.#pods.set(uid, { uid, names, netns, ino, proxy, dns });
    this.learned();
  }

  get #xds(): readonly KnownWorkload[] {
    const { xds } = this.#options;
    return typeof xds === 'function' ? xds() : xds;
  }

  /** Between pods of the mesh that XDS knows, ztunnel speaks HBONE. To be called when `xds` says something else. */
  learned(): void {
    const reached = new Set(this.#xds.flatMap(({ addresses }) => addresses));
    for (const { proxy } of this.#pods.values()) proxy.secondLegTo = reached;
  }

  /** A pod that it could not serve: the try that works is told to nobody. */
  async #retryPending(): Promise<void> {
    this.#handling = this.#handling.then(async () => {
      for (const pending of [...this.#pending.values()]) {
        try {
          await this.#serve(pending);
          this.#pending.delete(pending.uid);
          this.#tellChange();
        } catch {
          // Still not.
        }
      }
    });
    await this.#handling;
  }

  async #drop(uid: string): Promise<void> {
    const pending = this.#pending.get(uid);
    if (pending !== undefined) {
      this.#pending.delete(uid);
      this.#native.close(pending.netns);
    }
    const pod = this.#pods.get(uid);
    if (pod === undefined) return;
    this.#pods.delete(uid);
    await Promise.all([pod.proxy.end(), pod.dns?.close()]);
    this.#native.close(pod.netns);
  }

  async #dropAll(): Promise<void> {
    for (const uid of [...this.#pods.keys(), ...this.#pending.keys()]) await this.#drop(uid);
  }

  /** Nack, and the stream is closed; the pods stay. */
  #breakOff(connection: SeqpacketConnection, reason: string): void {
    connection.send(encodeAck(reason));
    connection.close();
    this.#reconnect(reason, 1);
  }

  /** Nack, and the process ends, with every pod's proxy. */
  async #die(connection: SeqpacketConnection, reason: string): Promise<void> {
    this.#note(`exits: ${reason}`);
    connection.send(encodeAck(`protocol error: ${reason}`));
    this.#ended = true;
    this.#disconnect();
    await this.#dropAll();
    this.#exit(1);
  }

  #note(line: string): void {
    this.log.push(line);
    this.#tellChange();
  }

  #tellChange(): void {
    for (const wake of this.#changed.splice(0)) wake();
  }
}
