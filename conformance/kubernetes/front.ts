// SPDX-License-Identifier: Apache-2.0
//
// What stands between the agent and the real API server: it hands requests on as they are, also into a network
// namespace where the API server's loopback is not reachable, and does to some of them what networks, load balancers
// and API servers do now and then.

import { readFileSync } from 'node:fs';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { Agent, createServer, request, type Server } from 'node:https';
import type { Duplex } from 'node:stream';
import { loadNative } from '../../plugin/addon.ts';
import type { Namespace, Testbed } from '../netns.ts';
import type { ControlPlane } from './control-plane.ts';

export interface Asked {
  method: string;
  path: string;
  query: URLSearchParams;
  watch: boolean;
}

export type Fault =
  /** a Status with this code instead of an answer */
  | { status: number; reason?: string; retryAfterSeconds?: number }
  /** 200, then one ERROR event with this code in the stream, then its end */
  | { watchStatus: number }
  /** the connection breaks before there is an answer */
  | { cut: true }
  /** it is open, and nothing comes */
  | { silent: true }
  | { delayMs: number };

const PORT = 6443;

export class Front {
  /** Every request, in order. */
  readonly asked: Asked[] = [];
  /** Every answer that the API server gave. */
  readonly answered: (Asked & { status: number })[] = [];
  /** Looked at for each request. */
  fault: (asked: Asked) => Fault | undefined = () => undefined;
  readonly #plane: ControlPlane;
  readonly #server: Server;
  readonly #upstream: Agent;
  readonly #sockets = new Set<Duplex>();
  /** Ends the forwarding of a response without closing its connection. */
  readonly #forwarded = new Map<Duplex, IncomingMessage>();

  private constructor(plane: ControlPlane) {
    this.#plane = plane;
    const { certFile, keyFile } = plane.server;
    this.#upstream = new Agent({ keepAlive: true, ca: readFileSync(plane.caFile) });
    this.#server = createServer({ cert: readFileSync(certFile), key: readFileSync(keyFile) }, (asking, answer) =>
      this.#serve(asking, answer),
    );
    this.#server.on('connection', (socket) => {
      this.#sockets.add(socket);
      socket.on('close', () => this.#sockets.delete(socket));
    });
    // A client that goes away in the middle of a handshake is no trouble of the test's.
    this.#server.on('tlsClientError', () => {});
  }

  /** Listens on the namespace's loopback, port 6443; without one on this process's, any port. */
  static async start(testbed: Testbed, plane: ControlPlane, namespace?: Namespace): Promise<Front> {
    const front = new Front(plane);
    const server = front.#server;
    const native = loadNative();
    const netns = namespace && native.openNetns(namespace.path);
    const where =
      netns === undefined
        ? { host: '127.0.0.1', port: 0 }
        : { fd: native.listenPlain(netns, { address: '127.0.0.1', port: PORT, backlog: 128 }) };
    if (netns !== undefined) native.close(netns);
    await new Promise<void>((resolve, reject) => server.once('error', reject).listen(where, resolve));
    testbed.defer(() => front.close());
    return front;
  }

  get url(): string {
    const { port } = this.#server.address() as { port: number };
    return `https://127.0.0.1:${port}`;
  }

  /** Breaks every connection that is open. */
  cutAll(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  /** From now on nothing comes on the streams that are open, and their connections stay. */
  silence(): void {
    for (const response of this.#forwarded.values()) response.unpipe().resume();
  }

  requests(matches: (asked: Asked) => boolean): number {
    return this.asked.filter(matches).length;
  }

  close(): void {
    this.#server.close();
    this.cutAll();
    this.#upstream.destroy();
  }

  #serve(asking: IncomingMessage, answer: ServerResponse): void {
    const url = new URL(asking.url ?? '/', this.#plane.url);
    const asked = {
      method: asking.method ?? '',
      path: url.pathname,
      query: url.searchParams,
      watch: url.searchParams.get('watch') === 'true',
    };
    this.asked.push(asked);
    // It may change what is asked for.
    const fault = this.fault(asked);
    if (fault === undefined) this.#forward(asked, asking, answer, url);
    else if ('delayMs' in fault) setTimeout(() => this.#forward(asked, asking, answer, url), fault.delayMs);
    else if ('cut' in fault) asking.socket.destroy();
    else if ('status' in fault) {
      const { status: code, reason, retryAfterSeconds } = fault;
      answer.writeHead(code, {
        'content-type': 'application/json',
        ...(retryAfterSeconds !== undefined && { 'retry-after': String(retryAfterSeconds) }),
      });
      answer.end(status(code, reason, retryAfterSeconds));
    } else if ('watchStatus' in fault) {
      answer.writeHead(200, { 'content-type': 'application/json' });
      answer.end(
        `{"type":"ERROR","object":${status(fault.watchStatus, fault.watchStatus === 410 ? 'Expired' : '')}}\n`,
      );
    }
  }

  #forward(asked: Asked, asking: IncomingMessage, answer: ServerResponse, url: URL): void {
    const sent = request(
      url,
      { method: asking.method, headers: { ...asking.headers, host: url.host }, agent: this.#upstream },
      (response) => {
        this.answered.push({ ...asked, status: response.statusCode ?? 502 });
        answer.writeHead(response.statusCode ?? 502, response.headers);
        answer.flushHeaders();
        this.#forwarded.set(asking.socket, response);
        response.once('close', () => {
          this.#forwarded.delete(asking.socket);
          // The API server was killed in the middle of it.
          if (!response.complete) asking.socket.destroy();
        });
        response.pipe(answer);
      },
    );
    sent.on('error', () => asking.socket.destroy());
    answer.once('close', () => sent.destroy());
    asking.pipe(sent);
  }
}

function status(code: number, reason = '', retryAfterSeconds?: number): string {
  return JSON.stringify({
    kind: 'Status',
    apiVersion: 'v1',
    status: 'Failure',
    message: 'injected',
    reason,
    code,
    ...(retryAfterSeconds !== undefined && { details: { retryAfterSeconds } }),
  });
}
