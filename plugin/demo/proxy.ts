// SPDX-License-Identifier: Apache-2.0
// A transparent proxy in a network namespace, as `demo` needs one: it stands where ztunnel or HAProxy stands on a node,
// or, with `inPod`, where ztunnel stands in every pod.
// It keeps the original destination (the local address of what it accepts) and the client's address (the source of
// what it opens). No TLS, no authorisation: HBONE's port is served with a plaintext CONNECT.

import { createServer, isIPv6, type Server, Socket } from 'node:net';
import type { Native } from '../native.ts';

/** The listeners of the shared contract, by their keys in `proxy.ports`. */
export type ListenerName = 'outbound' | 'inboundPlaintext' | 'inboundHBONE';

export interface ProxyOptions {
  /** a descriptor of openNetns() */
  netns: number;
  /** :: takes IPv4 too */
  address: '::' | '0.0.0.0';
  /** host order; a port of 0 gets no listener */
  ports: Readonly<Record<ListenerName, number>>;
  inPod?: InPodOptions;
  onSeen?: (connection: SeenConnection) => void;
  /** one that was accepted and then reset, since its other leg could not be had */
  onFailed?: (error: Error) => void;
}

/** How ztunnel's sockets in a pod differ: they share their ports with another ztunnel's, and are told by their mark. */
export interface InPodOptions {
  mark: number;
  /** the workload is known from XDS; connections of one that is not are held and then reset */
  isKnown: () => boolean;
}

/** One accepted connection. Addresses are text, IPv4 never mapped. */
export interface SeenConnection {
  listener: ListenerName;
  source: string;
  /** what the client meant to reach */
  destination: string;
  port: number;
}

const CONNECT_TIMEOUT_MS = 5_000;
/** How long ztunnel waits for XDS to name the workload of a connection that it has accepted. */
const UNKNOWN_WORKLOAD_MS = 5_000;
/** For a CONNECT and its answer: the process at the other end may be late on a busy machine. */
const PREAMBLE_TIMEOUT_MS = 30_000;
const PREAMBLE_LIMIT = 1_024;
const BACKLOG = 128;
const LISTENERS: readonly ListenerName[] = ['outbound', 'inboundPlaintext', 'inboundHBONE'];

export class TransparentProxy {
  /** Accepted connections in order; the owner may empty it. */
  readonly seen: SeenConnection[] = [];
  /**
   * Destinations that are reached through their port inboundHBONE instead of directly, as ztunnel 1.22 does for pods of
   * its own node; the programs send that SYN back to this proxy.
   */
  secondLegTo: ReadonlySet<string> = new Set();

  readonly #native: Native;
  readonly #options: ProxyOptions;
  readonly #servers: Server[] = [];
  readonly #sockets = new Set<Socket>();

  private constructor(native: Native, options: ProxyOptions) {
    this.#native = native;
    this.#options = options;
  }

  /** Returns when every listener exists. Throws NativeError if one cannot be made; then none is left. */
  static async start(native: Native, options: ProxyOptions): Promise<TransparentProxy> {
    const proxy = new TransparentProxy(native, options);
    try {
      for (const name of LISTENERS) if (options.ports[name] !== 0) await proxy.#listen(name);
    } catch (error) {
      await proxy.close();
      throw error;
    }
    return proxy;
  }

  /** Closes the listeners, and ends what is open as a process that drains does: the peers read an end, not a reset. */
  async end(): Promise<void> {
    for (const socket of this.#sockets) socket.destroySoon();
    await Promise.all(this.#servers.splice(0).map((server) => new Promise((resolve) => server.close(resolve))));
  }

  /** No new connections; those that are open go on. */
  stopListening(): void {
    for (const server of this.#servers) server.close();
  }

  get connections(): number {
    return this.#sockets.size;
  }

  /** Closes the listeners and resets what is open. */
  async close(): Promise<void> {
    for (const socket of this.#sockets) reset(socket);
    await Promise.all(this.#servers.splice(0).map((server) => new Promise((resolve) => server.close(resolve))));
  }

  async #listen(name: ListenerName): Promise<void> {
    const fd = this.#native.listenTransparent(this.#options.netns, {
      family: this.#options.address === '::' ? 6 : 4,
      address: this.#options.address,
      port: this.#options.ports[name],
      backlog: BACKLOG,
      reusePort: this.#options.inPod !== undefined,
      v6only: false,
      mark: this.#options.inPod?.mark ?? 0,
    });
    // allowHalfOpen: a client that has sent all it has may still be waiting for the answer.
    const server = createServer({ allowHalfOpen: true, pauseOnConnect: true }, (socket) => {
      this.#own(socket);
      this.#serve(name, socket).catch((error: Error) => {
        this.#options.onFailed?.(error);
        reset(socket);
      });
    });
    this.#servers.push(server);
    await listenOn(server, fd);
  }

  async #serve(listener: ListenerName, downstream: Socket): Promise<void> {
    const source = unmapped(downstream.remoteAddress);
    const destination = unmapped(downstream.localAddress);
    const port = downstream.localPort;
    // A peer that is gone already has no address any more.
    if (source === undefined || destination === undefined || port === undefined) return reset(downstream);
    const connection = { listener, source, destination, port };
    this.seen.push(connection);
    this.#options.onSeen?.(connection);

    if (this.#options.inPod?.isKnown() === false) {
      const held = setTimeout(() => reset(downstream), UNKNOWN_WORKLOAD_MS);
      downstream.once('close', () => clearTimeout(held));
      return;
    }
    if (listener === 'inboundHBONE') return this.#acceptTunnel(downstream, source, destination);
    // Nothing was redirected: the client named the listener itself, and going on would lead here again.
    if (port === this.#options.ports[listener]) return reset(downstream);
    const upstream =
      listener === 'outbound' && this.secondLegTo.has(destination)
        ? await this.#openTunnel(source, destination, port)
        : await this.#connect(source, destination, port);
    join(downstream, upstream);
  }

  async #acceptTunnel(downstream: Socket, source: string, destination: string): Promise<void> {
    const request = await readPreamble(downstream);
    const port = connectPort(request, destination);
    if (port === undefined) {
      downstream.end('HTTP/1.1 400 Bad Request\r\n\r\n');
      return;
    }
    let upstream: Socket;
    try {
      upstream = await this.#connect(source, destination, port);
    } catch {
      downstream.end('HTTP/1.1 503 Service Unavailable\r\n\r\n');
      return;
    }
    downstream.write('HTTP/1.1 200 OK\r\n\r\n');
    join(downstream, upstream);
  }

  async #openTunnel(source: string, destination: string, port: number): Promise<Socket> {
    const socket = await this.#connect(source, destination, this.#options.ports.inboundHBONE);
    const authority = `${isIPv6(destination) ? `[${destination}]` : destination}:${port}`;
    socket.write(`CONNECT ${authority} HTTP/1.1\r\nHost: ${authority}\r\n\r\n`);
    const answer = await readPreamble(socket);
    if (!answer.startsWith('HTTP/1.1 200 ')) {
      reset(socket);
      throw new Error(`CONNECT ${authority}: ${answer.split('\r\n', 1)[0]}`);
    }
    return socket;
  }

  async #connect(source: string, destination: string, port: number): Promise<Socket> {
    const fd = await this.#native.connectTransparent(this.#options.netns, {
      source,
      sourcePort: 0,
      destination,
      port,
      mark: this.#options.inPod?.mark ?? 0,
      timeoutMs: CONNECT_TIMEOUT_MS,
    });
    return this.#own(new Socket({ fd, readable: true, writable: true, allowHalfOpen: true }));
  }

  #own(socket: Socket): Socket {
    this.#sockets.add(socket);
    socket.once('close', () => this.#sockets.delete(socket));
    socket.on('error', () => {});
    return socket;
  }
}

/** Resolves when `server` accepts on `fd`, a listening socket that it owns from then on. */
export function listenOn(server: Server, fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen({ fd }, () => {
      server.off('error', reject);
      resolve();
    });
  });
}

/** "::ffff:192.0.2.1", as a dual-stack socket has it, is 192.0.2.1. */
export function unmapped(address: string | undefined): string | undefined {
  return address?.replace(/^::ffff:(?=\d+\.)/i, '');
}

/** Bytes both ways. pipe() hands on each end's FIN by itself; what it does not hand on is a reset. */
function join(a: Socket, b: Socket): void {
  for (const [from, to] of [
    [a, b],
    [b, a],
  ] as const) {
    if (from.destroyed) {
      reset(to);
      return;
    }
    from.once('close', (failed) => {
      if (failed || !from.readableEnded) reset(to);
    });
  }
  a.pipe(b);
  b.pipe(a);
}

function reset(socket: Socket): void {
  if (!socket.destroyed) socket.resetAndDestroy();
}

/** Reads up to and including the first empty line; what follows stays in the socket. */
function readPreamble(socket: Socket): Promise<string> {
  return new Promise((resolve, reject) => {
    let text = '';
    const finish = (error: Error | undefined) => {
      clearTimeout(timer);
      socket.off('readable', read).off('end', ended).off('close', ended);
      if (error) reject(error);
      else resolve(text);
    };
    const timer = setTimeout(() => finish(new Error('no preamble in time')), PREAMBLE_TIMEOUT_MS);
    const ended = () => finish(new Error('closed within the preamble'));
    const read = () => {
      for (let chunk = socket.read(); chunk !== null; chunk = socket.read()) {
        const end = (text + chunk.toString('latin1')).indexOf('\r\n\r\n');
        if (end < 0) {
          text += chunk.toString('latin1');
          if (text.length > PREAMBLE_LIMIT) return finish(new Error('preamble too long'));
          continue;
        }
        const rest = chunk.subarray(end + 4 - text.length);
        text = (text + chunk.toString('latin1')).slice(0, end + 4);
        finish(undefined);
        if (rest.length > 0) socket.unshift(rest);
        return;
      }
    };
    socket.on('readable', read).once('end', ended).once('close', ended);
    read();
  });
}

/** The port of "CONNECT HOST:PORT HTTP/1.1" if HOST is where the connection was going anyway. */
function connectPort(request: string, destination: string): number | undefined {
  const match = /^CONNECT (?:\[([0-9a-f:.]+)\]|([0-9.]+)):([0-9]{1,5}) HTTP\/1\.1\r\n/i.exec(request);
  const port = Number(match?.[3]);
  return match && (match[1] ?? match[2]) === destination && port >= 1 && port <= 65_535 ? port : undefined;
}
