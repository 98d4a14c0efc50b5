// SPDX-License-Identifier: Apache-2.0
// Standard input to its end, without ever blocking the event loop: a signal must be able to end the wait. A blocking
// read would defer it, and one on a libuv thread makes exit(3) wait for that thread.

import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';

/** Far above any network configuration; libcni caches Results of a few kilobytes. */
const MAX_BYTES = 8 << 20;

const POLL_MILLISECONDS = 2;

/** Rejects with Node's error if stdin cannot be read, or if it does not end before MAX_BYTES. */
export async function readStdin(): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let total = 0;
  for await (const chunk of openStdin()) {
    total += chunk.length;
    if (total > MAX_BYTES) throw new Error(`stdin is longer than ${MAX_BYTES} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

/** A person's terminal: nothing will come unless it is typed. */
export function stdinIsDevice(): boolean {
  return fstatSync(0).isCharacterDevice();
}

function openStdin(): AsyncIterable<Buffer> {
  const stat = fstatSync(0);
  if (stat.isSocket()) return readSocket();
  return readDescriptor(stat.isFIFO() || stat.isCharacterDevice());
}

/** Sockets cannot be opened again through /proc. Node's own stream costs 3 ms, so it is loaded for them alone. */
async function* readSocket(): AsyncGenerator<Buffer> {
  const { Socket } = await import('node:net');
  yield* new Socket({ fd: 0, readable: true, writable: false }) as AsyncIterable<Buffer>;
}

async function* readDescriptor(mayBlock: boolean): AsyncGenerator<Buffer> {
  // O_NONBLOCK on descriptor 0 itself would change it for whoever shares it.
  const fd = mayBlock ? openNonBlocking() : 0;
  try {
    for (;;) {
      const chunk = Buffer.allocUnsafe(65536);
      let count: number;
      try {
        count = readSync(fd, chunk);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error;
        await new Promise((resolve) => setTimeout(resolve, POLL_MILLISECONDS));
        continue;
      }
      if (count === 0) return;
      yield chunk.subarray(0, count);
    }
  } finally {
    if (fd !== 0) closeSync(fd);
  }
}

/** Descriptor 0 where it may not be opened again (not root, /proc absent): the read then blocks, signals wait. */
function openNonBlocking(): number {
  try {
    return openSync('/proc/self/fd/0', constants.O_RDONLY | constants.O_NONBLOCK);
  } catch {
    return 0;
  }
}
