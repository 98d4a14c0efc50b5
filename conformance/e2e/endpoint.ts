// SPDX-License-Identifier: Apache-2.0
//
// The application side of a test: one process (endpoint.py) in a network namespace that opens sockets as told.

import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { Namespace, Testbed } from '../netns.ts';

const program = join(import.meta.dirname, 'endpoint.py');

/** A call failed: `code` is the errno's name ("ECONNREFUSED"), "ETIMEDOUT" for any time limit that passed. */
export class EndpointError extends Error {
  readonly code: string;
  constructor(label: string, operation: string, code: string) {
    super(`${label}: ${operation}: ${code}`);
    this.code = code;
  }
}

export interface Connection {
  /** Number to use in later calls. */
  connection: number;
  local: string;
  localPort: number;
  /** Duration of connect(2) in milliseconds. */
  ms: number;
  /** Source address and port that the server saw. */
  seen: string;
  seenPort: number;
}

export interface ConnectOptions {
  source?: string;
  sourcePort?: number;
  /** Milliseconds, for connect(2) and the banner together; default 5,000. */
  timeout?: number;
  /** Interface for link-local addresses. */
  scope?: string;
  /** SO_MARK. */
  mark?: number;
  /** False where the server does not greet. */
  banner?: boolean;
}

/** Whom a connection past the IP stack is from and to. */
export interface RawClient {
  ifname: string;
  mac: string;
  /** MAC address of the next hop. */
  gateway: string;
  source: string;
  sourcePort: number;
  address: string;
  port: number;
}

/** What a server accepted: [source address, source port, address that was asked for]. */
export type Accepted = [source: string, sourcePort: number, address: string];

/** One byte stream in each direction at the same time: random bytes by `seed` from the server, by `seed` + 1 towards it. */
export interface StreamOptions {
  bytes: number;
  seed: number;
  /** Bytes of one write; default 65,536. */
  write?: number;
  /** Who half-closes first; default the client, when all has arrived. The server's FIN comes before the client's first byte. */
  first?: 'client' | 'server';
  sourcePort?: number;
  /** Milliseconds; default 20,000. */
  timeout?: number;
}

/** SHA-256 of what the client sent, got, and should have got. */
export interface StreamOutcome {
  localPort: number;
  sent: string;
  got: string;
  expected: string;
  /** ECN was negotiated; a packet that said so came. */
  ecn: boolean;
  ect: boolean;
}

type Answer = { id: number; result?: unknown; error?: string };

export class Endpoint {
  readonly label: string;
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, { resolve: (value: unknown) => void; reject: (error: Error) => void }>();
  readonly #operations = new Map<number, string>();
  #last = 0;
  #stderr = '';

  /** `privileges`: options of setpriv(1). */
  constructor(testbed: Testbed, namespace: Namespace, label: string, privileges: readonly string[] = []) {
    this.label = label;
    const setpriv = ['setpriv', '--pdeathsig', 'KILL', ...privileges, '--'];
    const [file = '', ...rest] = namespace.argv([...setpriv, '/usr/bin/python3', program]);
    this.#child = spawn(file, rest, { stdio: ['pipe', 'pipe', 'pipe'] });
    testbed.defer(() => this.#child.kill('SIGKILL'));
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr += text;
    });
    const { stdout } = this.#child;
    if (stdout === null) throw new Error(`${label}: no pipe`);
    createInterface({ input: stdout }).on('line', (line) => this.#take(JSON.parse(line) as Answer));
    this.#child.once('close', () => {
      for (const { reject } of this.#waiting.values()) reject(new Error(`${label}: ended: ${this.#stderr}`));
      this.#waiting.clear();
    });
  }

  #take(answer: Answer): void {
    const waiting = this.#waiting.get(answer.id);
    const operation = this.#operations.get(answer.id) ?? '';
    this.#waiting.delete(answer.id);
    this.#operations.delete(answer.id);
    if (answer.error === undefined) waiting?.resolve(answer.result);
    else waiting?.reject(new EndpointError(this.label, operation, answer.error));
  }

  #call<T>(operation: string, args: object): Promise<T> {
    this.#last += 1;
    const id = this.#last;
    this.#operations.set(id, `${operation} ${JSON.stringify(args).slice(0, 200)}`);
    const promise = new Promise<unknown>((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
    this.#child.stdin?.write(`${JSON.stringify({ id, operation, arguments: args })}\n`);
    return promise as Promise<T>;
  }

  /** Listens on all addresses of both families. `mark`: SO_MARK; `transparent`: IP_TRANSPARENT. */
  async listen(port: number, mark = 0, transparent = false): Promise<void> {
    await Promise.all([
      this.#call('listen', { address: '0.0.0.0', port, mark, transparent }),
      this.#call('listen', { address: '::', port, mark, transparent }),
    ]);
  }

  /** Everything that listen(port) accepted so far in one family. */
  async seen(port: number, family: 4 | 6): Promise<Accepted[]> {
    return (await this.#call<{ seen: Accepted[] }>('seen', { port, family })).seen;
  }

  connect(address: string, port: number, options: ConnectOptions = {}): Promise<Connection> {
    return this.#call('connect', { address, port, ...options });
  }

  /** Sends that many bytes and expects them back. */
  async exchange(connection: Connection, bytes: number, timeout = 5_000): Promise<void> {
    await this.#call('exchange', { connection: connection.connection, bytes, timeout });
  }

  /** Writes and does not wait for an answer. */
  async send(connection: Connection, text: string): Promise<void> {
    await this.#call('send', { connection: connection.connection, text });
  }

  /** Sends FIN; returns what the peer sent until its own. */
  async finish(connection: Connection): Promise<string> {
    return (await this.#call<{ rest: string }>('finish', { connection: connection.connection })).rest;
  }

  /** Writes; returns what the peer sent until it closed. */
  async request(connection: Connection, text: string): Promise<string> {
    return (await this.#call<{ rest: string }>('request', { connection: connection.connection, text })).rest;
  }

  async close(connection: Connection): Promise<void> {
    await this.#call('close', { connection: connection.connection });
  }

  /** Closes with RST. */
  async abort(connection: Connection): Promise<void> {
    await this.#call('abort', { connection: connection.connection });
  }

  /** `count` connections at once, all held until each has been greeted or the limit has passed. */
  many(
    address: string,
    port: number,
    count: number,
    timeout: number,
  ): Promise<{ answered: number; failures: Record<string, number>; sources: string[] }> {
    return this.#call('many', { address, port, count, timeout });
  }

  /** Serves streams on all addresses of both families. */
  async serveStreams(port: number): Promise<void> {
    await this.#call('stream_serve', { port });
  }

  stream(address: string, port: number, options: StreamOptions): Promise<StreamOutcome> {
    return this.#call('stream', { address, port, ...options });
  }

  /** What serveStreams() got on the stream with that seed; waits for its end. `end`: FIN or an errno's name. */
  streamResult(port: number, seed: number): Promise<{ bytes: number; sha256: string; end: string }> {
    return this.#call('stream_result', { port, seed });
  }

  /** `count` streams, all open before one of them goes on; their seeds are seed, seed + 2, ... */
  streams(
    address: string,
    port: number,
    options: { count: number; bytes: number; seed: number; timeout: number },
  ): Promise<{ open: number; right: number; failures: Record<string, number>; sent: string }> {
    return this.#call('streams', { address, port, ...options });
  }

  /** The digest of what serveStreams() got on them, to compare with `sent`. */
  async streamResults(port: number, seed: number, count: number): Promise<string> {
    return (await this.#call<{ got: string }>('stream_results', { port, seed, count })).got;
  }

  /** Has the kernel probe an idle connection every second. */
  async keepalive(connection: Connection): Promise<void> {
    await this.#call('keepalive', { connection: connection.connection });
  }

  async ping(address: string, size = 16): Promise<void> {
    await this.#call('ping', { address, size });
  }

  /**
   * A TCP connection past the IP stack. Sends 64 bytes once for each of `orders`, cut into three fragments that are sent
   * in that order, and waits for their echo. `greeting`: the server's first line.
   */
  segments(where: RawClient, orders: readonly (readonly number[])[]): Promise<{ greeting: string; echo: string }> {
    return this.#call('segments', { ...where, orders });
  }

  /** The first fragment of a segment with `flags`, with its first `size` bytes. */
  async loneFragment(where: RawClient, flags: number, size: number): Promise<void> {
    await this.#call('lone_fragment', { ...where, flags, size });
  }

  /** Sends Ethernet frames, past the IP stack (packet(7)). `bypass`: past the egress hook too (PACKET_QDISC_BYPASS). */
  async frame(ifname: string, bytes: Uint8Array, count = 1, bypass = false): Promise<void> {
    await this.#call('frame', { ifname, hex: Buffer.from(bytes).toString('hex'), count, bypass });
  }

  /** Asks resolvers from one socket. A question: [resolver, name, transaction id]. Answers as they come. */
  async dns(
    questions: readonly [resolver: string, name: string, id: number][],
    options: {
      source?: string;
      sourcePort?: number;
      transport?: 'udp' | 'tcp';
      timeout?: number;
      checksum?: boolean;
    } = {},
  ): Promise<[resolver: string, id: number, text: string][]> {
    return (await this.#call<{ answers: [string, number, string][] }>('dns', { questions, ...options })).answers;
  }

  /** Turns offloads of an interface on or off, as ethtool -K does. */
  async offload(ifname: string, wanted: Partial<Record<'checksum' | 'tso' | 'gso' | 'gro', boolean>>): Promise<void> {
    await this.#call('offload', { ifname, ...wanted });
  }

  async serveUDP(port: number, mark = 0, addresses: readonly string[] = ['0.0.0.0', '::']): Promise<void> {
    await Promise.all(addresses.map((address) => this.#call('udp_serve', { address, port, mark })));
  }

  /** The answer of serveUDP: the source address it saw, a space, `text`. */
  async udp(address: string, port: number, text: string): Promise<string> {
    return (await this.#call<{ answer: string }>('udp', { address, port, text })).answer;
  }
}
