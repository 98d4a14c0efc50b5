// SPDX-License-Identifier: Apache-2.0
// The DNS listeners that ztunnel has in a pod: UDP and TCP on the loopback addresses, so that nothing but what the
// programs send there comes in. Answers A and AAAA from a table, as ztunnel does for names of the mesh; REFUSED else.

import { createSocket, type Socket as DatagramSocket } from 'node:dgram';
import { createServer, type Server, type Socket } from 'node:net';
import type { Native } from '../native.ts';
import { listenOn } from './proxy.ts';

export interface DnsOptions {
  /** a descriptor of openNetns() */
  netns: number;
  port: number;
  mark: number;
  /** IPv4 addresses by name, without the last dot */
  names: ReadonlyMap<string, string>;
}

const LOOPBACKS = ['127.0.0.1', '::1'] as const;
const BACKLOG = 128;
const TYPE_A = 1;
const CLASS_IN = 1;
const TTL_SECONDS = 30;

export class DnsListeners {
  /** Questions in order. */
  readonly seen: { name: string; transport: 'udp' | 'tcp' }[] = [];
  readonly #names: ReadonlyMap<string, string>;
  readonly #datagrams: DatagramSocket[] = [];
  readonly #servers: Server[] = [];
  readonly #sockets = new Set<Socket>();

  private constructor(names: ReadonlyMap<string, string>) {
    this.#names = names;
  }

  /** Throws NativeError if one cannot be made; then none is left. */
  static async start(native: Native, { netns, port, mark, names }: DnsOptions): Promise<DnsListeners> {
    const listeners = new DnsListeners(names);
    try {
      for (const address of LOOPBACKS) {
        const udp = native.listenDatagram(netns, { address, port, reusePort: true, mark });
        await listeners.#serveUdp(udp, address === '::1' ? 'udp6' : 'udp4');
        const tcp = native.listenPlain(netns, { address, port, backlog: BACKLOG, reusePort: true, mark });
        await listeners.#serveTcp(tcp);
      }
    } catch (error) {
      await listeners.close();
      throw error;
    }
    return listeners;
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await Promise.all([
      ...this.#datagrams.splice(0).map((socket) => new Promise<void>((resolve) => socket.close(resolve))),
      ...this.#servers.splice(0).map((server) => new Promise((resolve) => server.close(resolve))),
    ]);
  }

  async #serveUdp(fd: number, type: 'udp4' | 'udp6'): Promise<void> {
    const socket = createSocket(type);
    this.#datagrams.push(socket);
    socket.on('message', (query, { port, address }) => {
      const answer = this.#answer(query, 'udp');
      if (answer !== null) socket.send(answer, port, address);
    });
    await new Promise<void>((resolve, reject) => {
      socket.once('error', reject);
      socket.bind({ fd }, () => {
        socket.off('error', reject);
        socket.on('error', () => {});
        resolve();
      });
    });
  }

  async #serveTcp(fd: number): Promise<void> {
    const server = createServer((socket) => {
      this.#sockets.add(socket);
      socket.on('error', () => {}).once('close', () => this.#sockets.delete(socket));
      let bytes = Buffer.alloc(0);
      socket.on('data', (chunk) => {
        bytes = Buffer.concat([bytes, chunk]);
        while (bytes.length >= 2 && bytes.length >= 2 + bytes.readUInt16BE(0)) {
          const length = bytes.readUInt16BE(0);
          const answer = this.#answer(bytes.subarray(2, 2 + length), 'tcp');
          bytes = bytes.subarray(2 + length);
          if (answer === null) return socket.destroy();
          const size = Buffer.alloc(2);
          size.writeUInt16BE(answer.length);
          socket.write(Buffer.concat([size, answer]));
        }
      });
    });
    this.#servers.push(server);
    await listenOn(server, fd);
  }

  /** RFC 1035, section 4; null: no query. */
  #answer(query: Buffer, transport: 'udp' | 'tcp'): Buffer | null {
    const question = questionOf(query);
    if (question === null) return null;
    const { name, type, end } = question;
    this.seen.push({ name, transport });
    const address = this.#names.get(name);
    const found = address !== undefined && type === TYPE_A;
    const header = Buffer.from(query.subarray(0, 12));
    // Answer, recursion available; NOERROR for a known name (also without an address of that type), else REFUSED.
    header.writeUInt16BE(0x8180 | (header.readUInt16BE(2) & 0x0100) | (address === undefined ? 5 : 0), 2);
    header.writeUInt16BE(found ? 1 : 0, 6);
    header.writeUInt32BE(0, 8);
    const record = Buffer.alloc(found ? 16 : 0);
    if (found) {
      // The name is the question's, by a pointer.
      record.writeUInt16BE(0xc00c, 0);
      record.writeUInt16BE(TYPE_A, 2);
      record.writeUInt16BE(CLASS_IN, 4);
      record.writeUInt32BE(TTL_SECONDS, 6);
      record.writeUInt16BE(4, 10);
      record.set(address.split('.').map(Number), 12);
    }
    return Buffer.concat([header, query.subarray(12, end), record]);
  }
}

function questionOf(query: Buffer): { name: string; type: number; end: number } | null {
  if (query.length < 17 || (query[2] ?? 0) >= 0x80 || query.readUInt16BE(4) !== 1) return null;
  const labels: string[] = [];
  let at = 12;
  for (let length = query[at] ?? 0; length > 0; length = query[at] ?? 0) {
    if (length > 63 || at + 1 + length >= query.length) return null;
    labels.push(query.toString('latin1', at + 1, at + 1 + length));
    at += 1 + length;
  }
  if (at + 5 > query.length) return null;
  return { name: labels.join('.').toLowerCase(), type: query.readUInt16BE(at + 1), end: at + 5 };
}
