// SPDX-License-Identifier: Apache-2.0
// HTTP servers and requests in namespaces, all in this process: a socket keeps the namespace that it was made in.

import { randomBytes } from 'node:crypto';
import { createServer, request, type Server } from 'node:http';
import { Socket } from 'node:net';
import { buffer } from 'node:stream/consumers';
import type { Native } from '../native.ts';
import { unmapped } from './proxy.ts';

/** Answers every request with its own body and notes who asked. */
export class EchoServer {
  /** Source addresses of requests in order, IPv4 never mapped; the owner may empty it. */
  readonly sources: string[] = [];
  readonly #server: Server;

  private constructor() {
    this.#server = createServer((incoming, outgoing) => {
      this.sources.push(unmapped(incoming.socket.remoteAddress) ?? 'gone');
      outgoing.setHeader('connection', 'close');
      incoming.pipe(outgoing);
    });
  }

  static async start(native: Native, netns: number, address: '::' | '0.0.0.0', port: number): Promise<EchoServer> {
    const echo = new EchoServer();
    const fd = native.listenPlain(netns, { address, port, backlog: 64 });
    await new Promise<void>((resolve, reject) => {
      echo.#server.once('error', reject);
      echo.#server.listen({ fd }, () => resolve());
    });
    return echo;
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

/** Enough for several segments each way. */
const BODY_BYTES = 40_000;
const TIMEOUT_MS = 8_000;

/** One request on a connection of its own; throws unless the body came back as it was sent. */
export async function requestEcho(native: Native, netns: number, destination: string, port: number): Promise<void> {
  const fd = await native.connectTransparent(netns, {
    source: null,
    sourcePort: 0,
    destination,
    port,
    mark: 0,
    timeoutMs: TIMEOUT_MS,
  });
  const socket = new Socket({ fd, readable: true, writable: true });
  const sent = randomBytes(BODY_BYTES);
  const received = await new Promise<Buffer>((resolve, reject) => {
    socket.on('error', reject);
    const outgoing = request({
      // Only without an agent is this asked for a connection; an agent would make one in the host's namespace.
      createConnection: () => socket,
      host: destination,
      port,
      method: 'POST',
      headers: { 'content-length': sent.length },
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    outgoing.on('error', reject);
    outgoing.on('response', (answer) => buffer(answer).then(resolve, reject));
    outgoing.end(sent);
  }).finally(() => socket.destroy());
  if (!received.equals(sent)) {
    throw new Error(`sent ${sent.length} bytes, got ${received.length} back that are not the same`);
  }
}
