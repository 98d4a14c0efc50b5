// SPDX-License-Identifier: Apache-2.0
import { existsSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Testbed } from '../conformance/netns.ts';
import type { Datagram } from '../plugin/native.ts';
import { bytes, cause, descriptors, native } from './native.testing.ts';

let bed: Testbed;
let path: string;
let open: Set<number>;

beforeEach(() => {
  bed = Testbed.open();
  path = join(bed.directory('sockets'), 's');
  open = new Set();
});
afterEach(() => {
  for (const fd of open) native.close(fd);
  bed.close();
});

function own(fd: number): number {
  open.add(fd);
  return fd;
}

function close(fd: number): void {
  open.delete(fd);
  native.close(fd);
}

const listen = (mode = 0o600, backlog = 4) => own(native.listenSeqpacket(path, { mode, backlog }));

/** Both ends of a connection: the one that was accepted, the one that connected. */
function pair(): [number, number] {
  const listener = listen();
  const client = own(native.connectSeqpacket(path));
  const server = native.acceptSeqpacket(listener);
  if (server === null) throw new Error('nobody waits');
  return [own(server), client];
}

function received(socket: number): Datagram {
  const datagram = native.receiveDatagram(socket);
  if (typeof datagram === 'string') throw new Error(datagram);
  for (const fd of datagram.fds) own(fd);
  return datagram;
}

const flagsOf = (fd: number) => Number(/flags:\s+(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))?.[1]);
/** O_CLOEXEC and O_NONBLOCK as /proc prints them, in octal digits */
const CLOEXEC = 2_000_000;
const NONBLOCK = 4_000;

describe('listening', () => {
  test.each([0o600, 0o660, 0o000])('the socket has mode %o from its first moment', (mode) => {
    const umask = process.umask(0);
    try {
      listen(mode);
    } finally {
      process.umask(umask);
    }
    const found = statSync(path);
    expect(found.isSocket()).toBe(true);
    expect(found.mode & 0o777).toBe(mode);
  });

  test('a path that is taken is refused, and what has it stays', () => {
    const before = listen();
    expect(cause(() => native.listenSeqpacket(path, { mode: 0o600, backlog: 1 }))).toEqual({
      code: 'EADDRINUSE',
      errno: 98,
      syscall: 'bind',
    });
    own(native.connectSeqpacket(path));
    expect(native.acceptSeqpacket(before)).toSatisfy((fd: number) => open.add(fd).has(fd));
    expect(existsSync(path)).toBe(true);
  });

  test('descriptors are closed by exec and never block', () => {
    const listener = listen();
    const [client] = [own(native.connectSeqpacket(path))];
    const server = own(native.acceptSeqpacket(listener) ?? -1);
    for (const fd of [listener, client, server]) {
      expect(flagsOf(fd) % (10 * CLOEXEC), `fd ${fd}`).toBeGreaterThanOrEqual(CLOEXEC);
      expect(Math.floor((flagsOf(fd) % 10_000) / 1_000) & 4, `fd ${fd}`).toBe(NONBLOCK / 1_000);
    }
    expect(native.acceptSeqpacket(listener)).toBeNull();
  });

  test('connecting says why it does not work', () => {
    expect(cause(() => native.connectSeqpacket(path))).toMatchObject({ code: 'ENOENT', syscall: 'connect' });
    const listener = listen(0o600, 0);
    const first = own(native.connectSeqpacket(path));
    expect(cause(() => native.connectSeqpacket(path))).toMatchObject({ code: 'EAGAIN', syscall: 'connect' });
    close(first);
    close(listener);
    expect(cause(() => native.connectSeqpacket(path))).toMatchObject({ code: 'ECONNREFUSED', syscall: 'connect' });
  });
});

test('each end knows the process at the other', () => {
  const [server, client] = pair();
  const self = { pid: process.pid, uid: 0, gid: 0 };
  expect(native.peerCredentials(server)).toEqual(self);
  expect(native.peerCredentials(client)).toEqual(self);
});

describe('datagrams', () => {
  test('arrive one by one, whole and in order, both ways', () => {
    for (const [from, to] of [pair(), [...open].slice(1).toReversed()] as [number, number][]) {
      expect(native.receiveDatagram(to)).toBe('nothing');
      for (const length of [1, 1_024, 3]) expect(native.sendDatagram(from, bytes(length), [])).toBe(true);
      for (const length of [1, 1_024, 3]) {
        expect(received(to)).toEqual({ bytes: bytes(length), fds: [], truncated: false });
      }
      expect(native.receiveDatagram(to)).toBe('nothing');
    }
  });

  test('up to 64 KiB arrive, of a longer one it is known that it was cut', () => {
    const [server, client] = pair();
    native.sendDatagram(client, bytes(65_536), []);
    native.sendDatagram(client, bytes(65_537), []);
    native.sendDatagram(client, bytes(2), []);
    expect(received(server)).toEqual({ bytes: bytes(65_536), fds: [], truncated: false });
    expect(received(server)).toEqual({ bytes: bytes(65_536), fds: [], truncated: true });
    expect(received(server)).toEqual({ bytes: bytes(2), fds: [], truncated: false });
  });

  test('the end comes after what was sent before it', () => {
    const [server, client] = pair();
    native.sendDatagram(client, bytes(2), []);
    close(client);
    expect(received(server).bytes).toEqual(bytes(2));
    expect(native.receiveDatagram(server)).toBe('closed');
    expect(cause(() => native.sendDatagram(server, bytes(1), []))).toMatchObject({ code: 'EPIPE', syscall: 'sendmsg' });
  });

  test('an end that does not read is told by false, and nothing is lost', () => {
    const [server, client] = pair();
    let sent = 0;
    while (native.sendDatagram(client, bytes(1_000, sent), [])) sent++;
    expect(sent).toBeGreaterThan(10);
    for (let i = 0; i < sent; i++) expect(received(server).bytes).toEqual(bytes(1_000, i));
    expect(native.receiveDatagram(server)).toBe('nothing');
    expect(native.sendDatagram(client, bytes(1), [])).toBe(true);
  });

  test('an aborted peer is an error of the next call', () => {
    const [server, client] = pair();
    native.sendDatagram(server, bytes(1), []);
    // Closing with something unread resets the connection.
    close(client);
    expect(cause(() => native.receiveDatagram(server))).toMatchObject({ code: 'ECONNRESET', syscall: 'recvmsg' });
  });
});

describe('descriptors', () => {
  test('arrive as others of the same objects, closed by exec; the sender keeps its own', () => {
    const [server, client] = pair();
    const netns = own(native.openNetns('/proc/self/ns/net'));
    native.sendDatagram(server, bytes(1), [netns, netns]);
    const { fds, truncated } = received(client);
    expect(truncated).toBe(false);
    expect(new Set([netns, ...fds]).size).toBe(3);
    for (const fd of fds) {
      expect(native.netnsIdentity(fd)).toEqual(native.netnsIdentity(netns));
      expect(flagsOf(fd) % (10 * CLOEXEC)).toBeGreaterThanOrEqual(CLOEXEC);
    }
    expect(native.netnsIdentity(netns).ino).toBeGreaterThan(0n);
  });

  test('253 at once; one that is not open fails the whole and sends nothing', () => {
    const [server, client] = pair();
    const before = descriptors().length;
    native.sendDatagram(server, bytes(1), Array(253).fill(server));
    const { fds } = received(client);
    expect(fds.length).toBe(253);
    expect(descriptors().length).toBe(before + 253);
    for (const fd of fds) close(fd);
    expect(cause(() => native.sendDatagram(server, bytes(1), [server, 1_000_000]))).toMatchObject({
      code: 'EBADF',
      syscall: 'sendmsg',
    });
    expect(native.receiveDatagram(client)).toBe('nothing');
    expect(descriptors().length).toBe(before);
  });

  test('those of datagrams that nobody received go with the socket', () => {
    const [server, client] = pair();
    const before = descriptors().length;
    const netns = native.openNetns('/proc/self/ns/net');
    native.sendDatagram(server, bytes(1), [netns, netns]);
    native.close(netns);
    close(client);
    expect(descriptors().length).toBe(before - 1);
  });
});

describe('watching', () => {
  test('calls while there is something to read and not otherwise, and at the end', async () => {
    const [server, client] = pair();
    const seen: unknown[] = [];
    let notify = () => {};
    const stop = native.watchReadable(server, () => {
      const datagram = native.receiveDatagram(server);
      seen.push(typeof datagram === 'string' ? datagram : [...datagram.bytes]);
      notify();
    });
    const next = () => new Promise<void>((resolve) => (notify = resolve));
    try {
      native.sendDatagram(client, bytes(1), []);
      await next();
      native.sendDatagram(client, bytes(2), []);
      await next();
      close(client);
      await next();
      expect(seen).toEqual([[1], [1, 2], 'closed']);
    } finally {
      stop();
    }
    stop();
  });

  test('tells a listener of a connection', async () => {
    const listener = listen();
    const { promise, resolve } = Promise.withResolvers<void>();
    const stop = native.watchReadable(listener, resolve);
    try {
      own(native.connectSeqpacket(path));
      await promise;
    } finally {
      stop();
    }
    own(native.acceptSeqpacket(listener) ?? -1);
  });

  test('the callback may stop it, and another watch may follow', async () => {
    const [server, client] = pair();
    native.sendDatagram(client, bytes(1), []);
    for (let round = 0; round < 3; round++) {
      let calls = 0;
      await new Promise<void>((resolve) => {
        const stop = native.watchReadable(server, () => {
          calls++;
          stop();
          resolve();
        });
      });
      // A turn of the event loop in which it would be called again.
      await new Promise((resolve) => setImmediate(resolve));
      expect(calls).toBe(1);
    }
  });

  test('one watch a descriptor, and only of what can be waited for', () => {
    const [server] = pair();
    const stop = native.watchReadable(server, () => {});
    expect(cause(() => native.watchReadable(server, () => {}))).toMatchObject({ code: 'EEXIST', syscall: 'epoll' });
    stop();
    const file = own(native.openNetns('/proc/self/ns/net'));
    expect(cause(() => native.watchReadable(file, () => {}))).toMatchObject({ code: 'EPERM', syscall: 'epoll' });
  });
});
