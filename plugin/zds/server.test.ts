// SPDX-License-Identifier: Apache-2.0
// The server against a raw client, which sees every byte, and against the stand-in, which is as strict as ztunnel.

import { existsSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Namespace, Testbed } from '../../conformance/netns.ts';
import { native } from '../../native/native.testing.ts';
import { StandInZtunnel, type ZtunnelOptions } from '../demo/ztunnel.ts';
import { SeqpacketConnection } from './connection.ts';
import { decodeRequest, encodeAck, encodeHello } from './messages.ts';
import { ZdsError, ZdsServer, type ZdsServerOptions, type ZdsWorkload } from './server.ts';

let bed: Testbed;
let path: string;
let pods: Map<string, ZdsWorkload>;
let logged: string[];
let messages: string[];
const closing: (() => void | Promise<void>)[] = [];

beforeEach(() => {
  bed = Testbed.open();
  path = join(bed.directory('zds'), 's');
  pods = new Map();
  logged = [];
  messages = [];
});
afterEach(async () => {
  for (const close of closing.splice(0).toReversed()) await close();
  bed.close();
});

function serve(options: Partial<ZdsServerOptions> = {}): ZdsServer {
  const server = ZdsServer.start(native, {
    path,
    workloads: () => [...pods.values()],
    workload: (uid) => pods.get(uid),
    known: Promise.resolve(),
    events: {
      log: (level, text, fields) => logged.push(`${level} ${text} ${fields?.reason ?? fields?.error ?? ''}`.trim()),
      message: (kind, result) => messages.push(`${kind} ${result}`),
      connected: () => {},
      changed: () => {},
    },
    deadlineMs: 2_000,
    acceptsPerSecond: 100,
    ...options,
  });
  closing.push(() => server.close());
  return server;
}

function pod(uid: string, namespace: Namespace | null, names: Partial<ZdsWorkload['names']> = {}): ZdsWorkload {
  const identity = { dev: 0n, ino: 0n };
  if (namespace !== null) {
    const fd = native.openNetns(namespace.path);
    Object.assign(identity, native.netnsIdentity(fd));
    native.close(fd);
  }
  const workload: ZdsWorkload = {
    uid,
    names: { name: uid, namespace: 'default', serviceAccount: 'sa', ...names },
    netns: identity,
    openNetns: () => (namespace === null ? null : native.openNetns(namespace.path)),
  };
  pods.set(uid, workload);
  return workload;
}

/** A client that answers only what it is told to, and notes what it gets: "add u +1", "snapshotSent". */
class Raw {
  readonly got: string[] = [];
  ended: string | undefined;
  readonly #connection: SeqpacketConnection;
  #changed: (() => void)[] = [];
  answer: ((got: string) => Uint8Array | undefined) | undefined;

  constructor(hello: Uint8Array | null = encodeHello()) {
    this.#connection = new SeqpacketConnection(native, native.connectSeqpacket(path), {
      onDatagram: (datagram) => {
        const request = decodeRequest(datagram.bytes);
        const fds = datagram.fdCount > 0 ? ` +${datagram.fdCount}` : '';
        const line = `${request.kind}${'uid' in request ? ` ${request.uid}` : ''}${fds}`;
        this.got.push(line);
        this.wake();
        const bytes = this.answer?.(line);
        if (bytes !== undefined) this.#connection.send(bytes);
      },
      onEnd: (reason) => {
        this.ended = reason;
        this.wake();
      },
    });
    closing.push(() => this.close());
    if (hello !== null) this.send(hello);
  }

  static acking(): Raw {
    const raw = new Raw();
    raw.answer = () => encodeAck(null);
    return raw;
  }

  send(bytes: Uint8Array, fd?: number): void {
    this.#connection.send(bytes, fd);
  }

  ack(error: string | null = null): void {
    this.send(encodeAck(error));
  }

  close(): void {
    this.#connection.close();
  }

  wake(): void {
    for (const wake of this.#changed.splice(0)) wake();
  }

  async until(condition: () => boolean): Promise<void> {
    const deadline = performance.now() + 20_000;
    while (!condition()) {
      if (performance.now() > deadline) throw new Error(`${JSON.stringify(this.got)}, ended: ${this.ended}`);
      await new Promise<void>((resolve) => {
        this.#changed.push(resolve);
        setTimeout(resolve, 50);
      });
    }
  }

  /** Waits for exactly these messages, and for no other in some turns of the event loop after them. */
  async gets(expected: string[]): Promise<void> {
    await this.until(() => this.got.length >= expected.length || this.ended !== undefined);
    await turns();
    expect(this.got).toEqual(expected);
  }
}

async function turns(): Promise<void> {
  for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve));
}

async function until(condition: () => boolean): Promise<void> {
  const deadline = performance.now() + 20_000;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`in vain: ${condition}, log ${JSON.stringify(logged)}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

async function failureOf(promise: Promise<unknown>): Promise<ZdsError> {
  try {
    await promise;
  } catch (error) {
    expect(error).toBeInstanceOf(ZdsError);
    return error as ZdsError;
  }
  throw new Error('it did not fail');
}

const WAIT = { waitMs: 5_000, deadlineMs: 5_000 };

function namespacesOfThisProcess(): number {
  return readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return statSync(`/proc/self/fd/${fd}`, { bigint: true }).dev === netnsDevice();
    } catch {
      return false;
    }
  }).length;
}
const netnsDevice = () => statSync('/proc/self/ns/net', { bigint: true }).dev;

describe('the socket', () => {
  test('is root only', () => {
    serve();
    expect(statSync(path).mode & 0o777).toBe(0o600);
  });

  test('one that answers is never taken away', async () => {
    const first = serve();
    expect(() => serve()).toThrow(
      `${path} is served already, by process ${process.pid}: only one node agent can speak to ztunnel (is istio-cni-node running?)`,
    );
    new Raw();
    await until(() => first.connections.length === 1);
  });

  test('neither is one of another type, nor what is no socket', async () => {
    const other = createServer();
    await new Promise<void>((resolve) => other.listen({ path }, resolve));
    expect(() => serve()).toThrow('by a socket of another type');
    expect(existsSync(path)).toBe(true);
    await new Promise((resolve) => other.close(resolve));
    writeFileSync(path, 'mine');
    expect(() => serve()).toThrow(`${path} is there and is no socket`);
  });

  test('what a killed agent left is replaced; closing removes the own one and no other', () => {
    native.close(native.listenSeqpacket(path, { mode: 0o600, backlog: 1 }));
    const server = serve();
    server.close();
    expect(existsSync(path)).toBe(false);
    const second = serve();
    native.removeFile(path);
    const third = serve();
    second.close();
    expect(existsSync(path)).toBe(true);
    third.close();
    expect(existsSync(path)).toBe(false);
  });

  test('connections are taken at a limited rate, and none is lost', async () => {
    const server = serve({ acceptsPerSecond: 5 });
    const begun = performance.now();
    const clients = Array.from({ length: 11 }, () => Raw.acking());
    await until(() => server.connections.length === 5);
    await turns();
    expect(server.connections.length).toBe(5);
    for (const client of clients) await client.until(() => client.got.length === 1);
    // 5 in each second.
    expect(performance.now() - begun).toBeGreaterThan(2_000);
  });
});

describe('Hello and snapshot', () => {
  test('nothing is sent before Hello', async () => {
    pod('a', bed.namespace('a'));
    serve();
    const client = new Raw(null);
    await turns();
    expect(client.got).toEqual([]);
    client.send(encodeHello());
    await client.gets(['add a +1']);
  });

  test('every pod is told of, one message at a time, and then that it was all', async () => {
    for (const uid of ['a', 'b', 'c']) pod(uid, bed.namespace(uid));
    const server = serve();
    const client = new Raw();
    for (const expected of [
      ['add a +1'],
      ['add a +1', 'add b +1'],
      ['add a +1', 'add b +1', 'add c +1'],
      ['add a +1', 'add b +1', 'add c +1', 'snapshotSent'],
    ]) {
      await client.gets(expected);
      expect(server.isLive).toBe(false);
      client.ack();
    }
    await until(() => server.isLive);
    expect(server.connections).toEqual([
      { pid: process.pid, phase: 'live', pods: 3, newest: true, since: expect.any(Number) },
    ]);
    expect(messages).toEqual(['add ack', 'add ack', 'add ack', 'snapshotSent ack']);
  });

  test('a pod whose namespace nobody finds any more is kept', async () => {
    pod('a', null);
    serve();
    await Raw.acking().gets(['keep a', 'snapshotSent']);
  });

  test('a pod that ztunnel refuses does not stop the others', async () => {
    for (const uid of ['a', 'b']) pod(uid, bed.namespace(uid));
    const server = serve();
    const client = new Raw();
    client.answer = (line) => encodeAck(line.startsWith('add a') ? 'no room' : null);
    await client.gets(['add a +1', 'add b +1', 'snapshotSent']);
    expect(server.answerOf('a')).toBe('no room');
    expect(server.answerOf('b')).toBeNull();
    expect(logged).toContain('warn ztunnel refused a pod no room');
  });

  test('no snapshot before the pods are known', async () => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const server = serve({ known: promise });
    const client = Raw.acking();
    await until(() => server.connections.length === 1);
    await turns();
    expect(client.got).toEqual([]);
    pod('a', bed.namespace('a'));
    resolve();
    await client.gets(['add a +1', 'snapshotSent']);
  });

  test('what comes and goes while the snapshot is on its way', async () => {
    for (const uid of ['a', 'b', 'c']) pod(uid, bed.namespace(uid));
    const server = serve();
    const client = new Raw();
    await client.gets(['add a +1']);
    pods.delete('a');
    const gone = server.del('a');
    pods.delete('c');
    pod('d', bed.namespace('d'));
    const added = server.add('d', WAIT);
    client.answer = () => encodeAck(null);
    client.ack();
    await Promise.all([gone, added]);
    // c was not sent yet; a's Del, which the snapshot's end asks for too, goes out once.
    await client.gets(['add a +1', 'add b +1', 'snapshotSent', 'del a', 'add d +1']);
    expect(server.answerOf('a')).toBeUndefined();
  });

  test('a message that would not fit into the buffer of ztunnel is never sent', async () => {
    pod('a', bed.namespace('a'), { name: 'n'.repeat(1_024) });
    pod('b', bed.namespace('b'));
    const server = serve();
    await Raw.acking().gets(['add b +1', 'snapshotSent']);
    expect(logged).toContainEqual(
      expect.stringMatching(/^error a pod was left out of the snapshot .*reads at most 1024/),
    );
    expect(await failureOf(server.add('a', WAIT))).toMatchObject({ reason: 'unfit' });
  });

  test.each<[string, () => Raw, string]>([
    ['another version', () => new Raw(encodeHello(2)), 'Hello with version 2; this agent speaks version 1'],
    ['no Hello', () => new Raw(encodeAck(null)), 'does not speak ZDS'],
    ['bytes that are none', () => new Raw(Uint8Array.from([0xff])), 'no Hello can be read from 1 bytes'],
    ['too many bytes', () => new Raw(new Uint8Array(65_537)), 'a message of more than 65536 bytes'],
  ])('%s: the connection is closed, and the next one served', async (_, connect, reason) => {
    serve();
    const client = connect();
    await client.until(() => client.ended !== undefined);
    expect(client.got).toEqual([]);
    expect(logged.join('\n')).toContain(reason);
    await Raw.acking().gets(['snapshotSent']);
  });

  test('silence instead of Hello, and instead of an answer, ends the connection in time', async () => {
    pod('a', bed.namespace('a'));
    serve({ deadlineMs: 100 });
    const silent = new Raw(null);
    await silent.until(() => silent.ended !== undefined);
    expect(logged).toContain('warn ztunnel disconnected no Hello within 0.1 s');
    const mute = new Raw();
    await mute.until(() => mute.ended !== undefined);
    expect(mute.got).toEqual(['add a +1']);
    expect(logged).toContain('warn ztunnel disconnected no answer to add within 0.1 s');
    expect(messages).toEqual(['add timeout']);
  });

  test('an answer to nothing, a descriptor, garbage end the connection', async () => {
    const server = serve();
    for (const disturb of [
      (client: Raw) => client.ack(),
      (client: Raw) => {
        const fd = native.openNetns('/proc/self/ns/net');
        client.send(encodeAck(null), fd);
        native.close(fd);
      },
      (client: Raw) => client.send(Uint8Array.from([0x0a, 0x7f])),
    ]) {
      const before = namespacesOfThisProcess();
      const client = Raw.acking();
      await client.gets(['snapshotSent']);
      disturb(client);
      await client.until(() => client.ended !== undefined);
      await until(() => server.connections.length === 0);
      expect(namespacesOfThisProcess()).toBe(before);
    }
  });

  test('a peer that is refused hears nothing', async () => {
    serve({ refusePeer: ({ pid }) => `process ${pid} is not ztunnel` });
    const client = new Raw();
    await client.until(() => client.ended !== undefined);
    expect(client.got).toEqual([]);
    expect(logged).toContain(`warn a connection was refused process ${process.pid} is not ztunnel`);
  });
});

describe('changes', () => {
  test('a pod is acknowledged, or refused in the words of ztunnel', async () => {
    const server = serve();
    const client = Raw.acking();
    await client.gets(['snapshotSent']);
    pod('a', bed.namespace('a'));
    await server.add('a', WAIT);
    expect(server.answerOf('a')).toBeNull();
    pod('b', bed.namespace('b'));
    const long = `AddrInUse ${'x'.repeat(3_000)}`;
    client.answer = () => encodeAck(long);
    expect(await failureOf(server.add('b', WAIT))).toMatchObject({
      reason: 'refused',
      message: `ztunnel (process ${process.pid}) refused b: ${long}`,
    });
    client.answer = () => encodeAck(null);
    pods.delete('a');
    await server.del('a');
    expect(client.got).toEqual(['snapshotSent', 'add a +1', 'add b +1', 'del a']);
  });

  test('one message is outstanding, however many pods come at once', async () => {
    const server = serve();
    const client = new Raw();
    await client.gets(['snapshotSent']);
    client.ack();
    const namespace = bed.namespace('a');
    const added = ['a', 'b', 'c'].map((uid) => {
      pod(uid, namespace);
      return server.add(uid, WAIT);
    });
    await client.gets(['snapshotSent', 'add a +1']);
    client.ack();
    await client.gets(['snapshotSent', 'add a +1', 'add b +1']);
    client.ack();
    await client.gets(['snapshotSent', 'add a +1', 'add b +1', 'add c +1']);
    client.ack();
    await Promise.all(added);
  });

  test('no ztunnel: known at once or after the wait; one that comes meanwhile is used', async () => {
    const server = serve();
    pod('a', bed.namespace('a'));
    expect(await failureOf(server.add('a', { waitMs: 0, deadlineMs: 5_000 }))).toMatchObject({
      reason: 'absent',
      message: `no ztunnel is connected to ${path}`,
    });
    const added = server.add('a', WAIT);
    const client = Raw.acking();
    await added;
    expect(client.got.slice(0, 2)).toEqual(['add a +1', 'snapshotSent']);
  });

  test('a ztunnel that does not answer is told from one that is not there, and reconnecting helps', async () => {
    const server = serve();
    const mute = new Raw();
    await mute.gets(['snapshotSent']);
    mute.ack();
    pod('a', bed.namespace('a'));
    expect(await failureOf(server.add('a', { waitMs: 0, deadlineMs: 200 }))).toMatchObject({ reason: 'silent' });
    // It is asked again by a connection that does answer.
    const added = server.add('a', WAIT);
    mute.close();
    Raw.acking();
    await added;
  });

  test('no Keep after the snapshot: a pod without a namespace is an error here, and nothing is sent', async () => {
    const server = serve();
    const client = Raw.acking();
    await client.gets(['snapshotSent']);
    pod('a', null);
    expect(await failureOf(server.add('a', WAIT))).toMatchObject({
      reason: 'unfit',
      message: 'the network namespace net:[0] of a is gone',
    });
    await client.gets(['snapshotSent']);
  });

  test('a Del of a pod that came back meanwhile is not sent', async () => {
    const server = serve();
    const client = Raw.acking();
    pod('a', bed.namespace('a'));
    await client.gets(['add a +1', 'snapshotSent']);
    pods.delete('a');
    pod('a', bed.namespace('b'));
    await Promise.all([server.del('a'), server.add('a', WAIT)]);
    expect(client.got).toEqual(['add a +1', 'snapshotSent', 'add a +1']);
  });
});

describe('several ztunnels', () => {
  test('the newest gets Adds, all get Dels; when it goes, the one before learns what it has missed', async () => {
    const server = serve();
    pod('a', bed.namespace('a'));
    const old = Raw.acking();
    await old.gets(['add a +1', 'snapshotSent']);
    const young = Raw.acking();
    await young.gets(['add a +1', 'snapshotSent']);
    pod('b', bed.namespace('b'));
    pod('c', bed.namespace('c'));
    await Promise.all([server.add('b', WAIT), server.add('c', WAIT)]);
    pods.delete('a');
    pods.delete('c');
    await Promise.all([server.del('a'), server.del('c')]);
    await young.gets(['add a +1', 'snapshotSent', 'add b +1', 'add c +1', 'del a', 'del c']);
    // c was never told to it.
    await old.gets(['add a +1', 'snapshotSent', 'del a']);
    expect(server.connections.map(({ newest }) => newest)).toEqual([false, true]);
    young.close();
    await old.gets(['add a +1', 'snapshotSent', 'del a', 'add b +1']);
    expect(server.answerOf('b')).toBeNull();
  });

  test('an Add that the newest never answered goes to the one before', async () => {
    const server = serve();
    const old = Raw.acking();
    await old.gets(['snapshotSent']);
    const young = new Raw();
    await young.gets(['snapshotSent']);
    young.ack();
    pod('a', bed.namespace('a'));
    const added = server.add('a', WAIT);
    await young.gets(['snapshotSent', 'add a +1']);
    young.close();
    await added;
    expect(old.got.slice(0, 2)).toEqual(['snapshotSent', 'add a +1']);
  });
});

describe('with the stand-in', () => {
  function ztunnel(options: Partial<ZtunnelOptions> = {}): StandInZtunnel {
    const started = StandInZtunnel.start(native, { socket: path, xds: [], ...options });
    closing.push(() => started.kill());
    return started;
  }

  test('pods get their listeners, and lose them; no descriptor stays', async () => {
    const before = namespacesOfThisProcess();
    const server = serve();
    const client = ztunnel();
    const [a, b] = [bed.namespace('a'), bed.namespace('b')];
    pod('a', a);
    await server.add('a', WAIT);
    pod('b', b);
    await server.add('b', WAIT);
    for (const { path } of [a, b]) {
      const netns = native.openNetns(path);
      const ports = native.listeners(netns).map(({ port, address }) => `${address} ${port}`);
      native.close(netns);
      expect(ports.sort()).toEqual(['127.0.0.1 15053', ':: 15001', ':: 15006', ':: 15008', '::1 15053']);
    }
    for (const uid of ['a', 'b']) {
      pods.delete(uid);
      await server.del(uid);
    }
    expect(client.served).toEqual([]);
    expect(namespacesOfThisProcess()).toBe(before);
  });

  test('renewed: the listeners of one pod are opened anew, those of others stay', async () => {
    const server = serve();
    const client = ztunnel();
    for (const uid of ['a', 'b']) {
      pod(uid, bed.namespace(uid));
      await server.add(uid, WAIT);
    }
    const [a, b] = [client.pod('a')?.proxy, client.pod('b')?.proxy];
    client.goDeaf('a');
    await server.add('a', WAIT);
    expect(client.pod('a')?.proxy).toBe(a);
    await server.renew('a', WAIT);
    expect(client.pod('a')?.proxy).not.toBe(a);
    expect(client.pod('b')?.proxy).toBe(b);
    expect(client.log.filter((line) => /^(add|del)/.test(line))).toEqual(['add a', 'add b', 'del a', 'add a']);
    expect(server.answerOf('a')).toBeNull();
  });

  test('the same uid in a new namespace', async () => {
    const server = serve();
    const client = ztunnel();
    const first = pod('a', bed.namespace('a'));
    await server.add('a', WAIT);
    expect(client.pod('a')?.ino).toBe(first.netns.ino);
    const second = pod('a', bed.namespace('b'));
    await server.add('a', WAIT);
    expect(client.pod('a')?.ino).toBe(second.netns.ino);
    expect(client.log.filter((line) => line.startsWith('add'))).toEqual(['add a', 'add a']);
  });

  test('an agent that comes back keeps what is served', async () => {
    const server = serve();
    const client = ztunnel();
    pod('a', bed.namespace('a'));
    await server.add('a', WAIT);
    const served = client.pod('a')?.proxy;
    server.close();
    await until(() => !client.connected);
    expect(client.served).toEqual(['a']);
    serve();
    await until(() => client.ready);
    expect(client.pod('a')?.proxy).toBe(served);
  });
});
