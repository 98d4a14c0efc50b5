// SPDX-License-Identifier: Apache-2.0
// One connection of type SOCK_SEQPACKET in Node's event loop. Owns its descriptor, and every descriptor that comes with
// a datagram until somebody takes it.

import type { Native } from '../native.ts';

/** A datagram that arrived. Descriptors that nobody has taken when the handler returns are closed. */
export interface Received {
  bytes: Uint8Array;
  truncated: boolean;
  /** how many came with it */
  fdCount: number;
  /** The one descriptor that came with it, the caller's from now on; null if there was none, or several. */
  takeFd(): number | null;
}

export interface ConnectionHandler {
  onDatagram(datagram: Received): void;
  /** The other end has gone, or the connection failed; not called after close(). Everything is closed already. */
  onEnd(reason: string): void;
}

/** Datagrams taken in one turn of the event loop: a peer that never stops sending must not stop everything else. */
const DATAGRAMS_PER_TURN = 32;

export class SeqpacketConnection {
  /** the process at the other end when it connected */
  readonly peer: { pid: number; uid: number; gid: number };
  readonly #native: Native;
  readonly #fd: number;
  readonly #handler: ConnectionHandler;
  #stop: (() => void) | undefined;

  /** Takes over `fd`, also when it throws NativeError. */
  constructor(native: Native, fd: number, handler: ConnectionHandler) {
    this.#native = native;
    this.#fd = fd;
    this.#handler = handler;
    try {
      this.peer = native.peerCredentials(fd);
      this.#stop = native.watchReadable(fd, () => this.#read());
    } catch (error) {
      native.close(fd);
      throw error;
    }
  }

  get open(): boolean {
    return this.#stop !== undefined;
  }

  /** false: it did not go out, as the connection is closed, broken or full. `fd` stays the caller's. */
  send(bytes: Uint8Array, fd?: number): boolean {
    if (!this.open) return false;
    try {
      return this.#native.sendDatagram(this.#fd, bytes, fd === undefined ? [] : [fd]);
    } catch (error) {
      this.#end(reasonOf(error));
      return false;
    }
  }

  close(): void {
    if (this.#stop === undefined) return;
    this.#stop();
    this.#stop = undefined;
    this.#native.close(this.#fd);
  }

  #read(): void {
    for (let count = 0; count < DATAGRAMS_PER_TURN && this.open; count++) {
      let datagram: ReturnType<Native['receiveDatagram']>;
      try {
        datagram = this.#native.receiveDatagram(this.#fd);
      } catch (error) {
        this.#end(reasonOf(error));
        return;
      }
      if (datagram === 'nothing') return;
      if (datagram === 'closed') {
        this.#end('closed by the other end');
        return;
      }
      this.#hand(datagram);
    }
  }

  #hand({ bytes, fds, truncated }: { bytes: Uint8Array; fds: number[]; truncated: boolean }): void {
    const left = [...fds];
    try {
      this.#handler.onDatagram({
        bytes,
        truncated,
        fdCount: fds.length,
        takeFd: () => (fds.length === 1 ? (left.pop() ?? null) : null),
      });
    } finally {
      for (const fd of left) this.#native.close(fd);
    }
  }

  #end(reason: string): void {
    if (!this.open) return;
    this.close();
    this.#handler.onEnd(reason);
  }
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
