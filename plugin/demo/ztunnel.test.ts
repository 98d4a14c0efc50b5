// SPDX-License-Identifier: Apache-2.0
// The stand-in alone, driven by a raw agent: each behaviour is one that the real ztunnel was seen to have. One that the
// stand-in had not would let an agent pass here that takes a node's proxy down.

import { once } from 'node:events';
import { Socket } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Namespace, Testbed } from '../../conformance/netns.ts';
import { native } from '../../native/native.testing.ts';
import { SeqpacketConnection } from '../zds/connection.ts';
import { decodeAck, decodeHello, encodeRequest, type ZdsRequest } from '../zds/messages.ts';
import { EchoServer } from './traffic.ts';
import { type Misbehaviour, StandInZtunnel, ZTUNNEL_MARK, ZTUNNEL_PORTS, type ZtunnelOptions } from './ztunnel.ts';

let bed: Testbed;
let agent: RawAgent;
const closing: (() => void | Promise<void>)[] = [];

beforeEach(() => {
  bed = Testbed.open();
  agent = new RawAgent(join(bed.directory('zds'), 's'));
});
afterEach(async () => {
  for (const close of closing.splice(0).toReversed()) await close();
  agent.close();
  bed.close();
});

const WORKLOAD = { name: 'n', namespace: 'ns', serviceAccount: 'sa' };
const XDS = [{ ...WORKLOAD, addresses: [] }];

function start(options: Partial<ZtunnelOptions> = {}): StandInZtunnel {
  const ztunnel = StandInZtunnel.start(native, { socket: agent.path, xds: XDS, ...options });
  closing.push(() => ztunnel.kill());
  return ztunnel;
}

/** Sends any bytes and waits for what comes back. */
class RawAgent {
  readonly path: string;
  connections = 0;
  hello: number | undefined;
  readonly #listener: number;
  readonly #stop: () => void;
  #connection: SeqpacketConnection | undefined;
  readonly #answers: (string | null)[] = [];
  ended = 0;

  constructor(path: string) {
    this.path = path;
    this.#listener = native.listenSeqpacket(path, { mode: 0o600, backlog: 8 });
    this.#stop = native.watchReadable(this.#listener, () => {
      const fd = native.acceptSeqpacket(this.#listener);
      if (fd === null) return;
      this.connections++;
      this.hello = undefined;
      this.#connection = new SeqpacketConnection(native, fd, {
        onDatagram: ({ bytes }) => {
          if (this.hello === undefined) this.hello = decodeHello(bytes);
          else this.#answers.push(decodeAck(bytes).error);
        },
        onEnd: () => {
          this.ended++;
        },
      });
    });
  }

  async ready(connection = 1): Promise<void> {
    await until(() => this.connections >= connection && this.hello !== undefined);
  }

  send(request: ZdsRequest | Uint8Array, namespace?: Namespace): void {
    const fd = namespace === undefined ? undefined : native.openNetns(namespace.path);
    this.#connection?.send(request instanceof Uint8Array ? request : encodeRequest(request), fd);
    if (fd !== undefined) native.close(fd);
  }

  async ask(request: ZdsRequest | Uint8Array, namespace?: Namespace): Promise<string | null> {
    this.send(request, namespace);
    await until(() => this.#answers.length > 0);
    return this.#answers.shift() as string | null;
  }

  add(uid: string, namespace: Namespace, workload = WORKLOAD): Promise<string | null> {
    return this.ask({ kind: 'add', uid, workload }, namespace);
  }

  get unread(): number {
    return this.#answers.length;
  }

  drop(): void {
    this.#connection?.close();
  }

  close(): void {
    this.drop();
    this.#stop();
    native.close(this.#listener);
  }
}

async function until(condition: () => boolean): Promise<void> {
  const deadline = performance.now() + 30_000;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`in vain: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** The pod's own network: an interface that is up, no other place. */
function lonePod(label: string): { namespace: Namespace; netns: number } {
  const namespace = bed.namespace(label);
  namespace.ip('link', 'set', 'lo', 'up');
  const netns = native.openNetns(namespace.path);
  closing.push(() => native.close(netns));
  return { namespace, netns };
}

async function connect(netns: number, destination: string, port: number): Promise<Socket> {
  const options = { source: null, sourcePort: 0, destination, port, mark: 0, timeoutMs: 5_000 };
  const socket = new Socket({ fd: await native.connectTransparent(netns, options), readable: true, writable: true });
  closing.push(() => {
    socket.destroy();
  });
  socket.on('error', () => {});
  return socket;
}

describe('messages', () => {
  test('Hello comes first, and nothing else by itself', async () => {
    start();
    await agent.ready();
    expect(agent.hello).toBe(1);
    expect(agent.unread).toBe(0);
  });

  test('Add opens every listener before its Ack: transparent ones shared and marked, DNS on loopback', async () => {
    start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    expect(await agent.add('a', namespace)).toBeNull();
    const { outbound, inboundPlaintext, inboundHBONE, dns } = ZTUNNEL_PORTS;
    const listeners = native.listeners(netns).map(({ address, port, v6only, transparent, mark }) => ({
      address,
      port,
      v6only,
      transparent,
      mark,
    }));
    const proxy = { address: '::', v6only: false, transparent: true, mark: ZTUNNEL_MARK };
    expect(listeners.toSorted((a, b) => a.port - b.port || a.address.localeCompare(b.address))).toEqual([
      { ...proxy, port: outbound },
      { ...proxy, port: inboundPlaintext },
      { ...proxy, port: inboundHBONE },
      // Bound to an address of IPv6, it takes no IPv4 either way.
      { address: '::1', port: dns, v6only: true, transparent: false, mark: ZTUNNEL_MARK },
      { address: '127.0.0.1', port: dns, v6only: false, transparent: false, mark: ZTUNNEL_MARK },
    ]);
    // Another ztunnel can be there at the same time, for an upgrade.
    const second = native.listenTransparent(netns, {
      family: 6,
      address: '::',
      port: outbound,
      backlog: 1,
      reusePort: true,
      v6only: false,
      mark: 0,
    });
    native.close(second);
    // UDP has no listeners that could be counted: nobody else gets the port.
    expect(() => native.listenDatagram(netns, { address: '127.0.0.1', port: dns, reusePort: false, mark: 0 })).toThrow(
      'EADDRINUSE',
    );
  });

  test('Add again for the same namespace changes nothing', async () => {
    const ztunnel = start();
    await agent.ready();
    const { namespace } = lonePod('a');
    await agent.add('a', namespace);
    const served = ztunnel.pod('a')?.proxy;
    expect(await agent.add('a', namespace)).toBeNull();
    expect(ztunnel.pod('a')?.proxy).toBe(served);
  });

  test('the same uid in another namespace: the old one is left', async () => {
    start();
    await agent.ready();
    const [old, young] = [lonePod('a'), lonePod('b')];
    await agent.add('a', old.namespace);
    expect(await agent.add('a', young.namespace)).toBeNull();
    expect(native.listeners(old.netns)).toEqual([]);
    expect(native.listeners(young.netns).length).toBe(5);
  });

  test('Del closes listeners, and held connections read an end at once', async () => {
    start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    const echo = await EchoServer.start(native, netns, '::', 8080);
    closing.push(() => echo.close());
    await agent.add('a', namespace);
    const held = await connect(netns, '127.0.0.1', ZTUNNEL_PORTS.dns);
    const through = await connect(netns, '127.0.0.1', ZTUNNEL_PORTS.inboundHBONE);
    through.write('CONNECT 127.0.0.1:8080 HTTP/1.1\r\n\r\n');
    await once(through, 'data');
    const ended = once(through.resume(), 'end');
    expect(await agent.ask({ kind: 'del', uid: 'a' })).toBeNull();
    await ended;
    held.destroy();
    expect(native.listeners(netns).map(({ port }) => port)).toEqual([8080]);
  });

  test('Del of what is not known is acknowledged', async () => {
    start();
    await agent.ready();
    expect(await agent.ask({ kind: 'del', uid: 'nobody' })).toBeNull();
  });
});

describe('what a ztunnel does not survive: it answers with an error and exits 1, with every pod', () => {
  test.each<[string, boolean, ZdsRequest | Uint8Array]>([
    ['Keep after the snapshot', true, { kind: 'keep', uid: 'a' }],
    ['a second SnapshotSent', true, { kind: 'snapshotSent' }],
    ['Add without workload_info', false, Uint8Array.from([0x0a, 0x03, 0x0a, 0x01, 0x61])],
    ['Add without workload_info after the snapshot', true, Uint8Array.from([0x0a, 0x03, 0x0a, 0x01, 0x61])],
  ])('%s', async (_, afterSnapshot, message) => {
    const ztunnel = start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace);
    if (afterSnapshot) await agent.ask({ kind: 'snapshotSent' });
    expect(await agent.ask(message, message instanceof Uint8Array ? namespace : undefined)).toMatch('protocol error');
    expect(await ztunnel.exited).toBe(1);
    expect(native.listeners(netns)).toEqual([]);
    await until(() => agent.ended === 1);
  });
});

describe('what it does survive: it answers with an error, connects again at once, and keeps its pods', () => {
  test.each<[string, Uint8Array]>([
    ['bytes that are no message', Uint8Array.from([0xff, 0xff])],
    ['an Add without a descriptor', encodeRequest({ kind: 'add', uid: 'b', workload: WORKLOAD })],
    ['more than 1,024 bytes', new Uint8Array(1_025).fill(0x0a)],
  ])('%s', async (_, message) => {
    const ztunnel = start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace);
    await agent.ask({ kind: 'snapshotSent' });
    expect(await agent.ask(message)).not.toBeNull();
    await agent.ready(2);
    expect(ztunnel.served).toEqual(['a']);
    expect(native.listeners(netns).length).toBe(5);
  });
});

describe('snapshots', () => {
  test('what it does not name is drained: with an empty one, every pod', async () => {
    const ztunnel = start();
    await agent.ready();
    const [a, b] = [lonePod('a'), lonePod('b')];
    await agent.add('a', a.namespace);
    await agent.add('b', b.namespace);
    await agent.ask({ kind: 'snapshotSent' });
    agent.drop();
    await agent.ready(2);
    expect(ztunnel.served).toEqual(['a', 'b']);
    expect(await agent.ask({ kind: 'snapshotSent' })).toBeNull();
    expect(ztunnel.served).toEqual([]);
    expect([...native.listeners(a.netns), ...native.listeners(b.netns)]).toEqual([]);
  });

  test('Keep and Add save what is served; Keep of what is not known is refused', async () => {
    const ztunnel = start();
    await agent.ready();
    const [a, b, c] = [lonePod('a'), lonePod('b'), lonePod('c')];
    for (const [uid, { namespace }] of Object.entries({ a, b, c })) await agent.add(uid, namespace);
    await agent.ask({ kind: 'snapshotSent' });
    const before = [ztunnel.pod('a')?.proxy, ztunnel.pod('b')?.proxy];
    agent.drop();
    await agent.ready(2);
    expect(await agent.ask({ kind: 'keep', uid: 'a' })).toBeNull();
    expect(await agent.add('b', b.namespace)).toBeNull();
    expect(await agent.ask({ kind: 'keep', uid: 'nobody' })).toMatch('not known');
    expect(await agent.ask({ kind: 'snapshotSent' })).toBeNull();
    expect(ztunnel.served).toEqual(['a', 'b']);
    expect([ztunnel.pod('a')?.proxy, ztunnel.pod('b')?.proxy]).toEqual(before);
  });

  test('it is ready when a snapshot is complete and while the agent is there', async () => {
    const ztunnel = start();
    await agent.ready();
    expect(ztunnel.ready).toBe(false);
    await agent.ask({ kind: 'snapshotSent' });
    expect(ztunnel.ready).toBe(true);
    agent.close();
    await until(() => !ztunnel.ready);
    agent = new RawAgent(join(bed.directory('other'), 's'));
  });
});

describe('a listener that cannot be opened', () => {
  test('is refused with AddrInUse, tried again in silence, and never acknowledged', async () => {
    const ztunnel = start({ retryMs: 50 });
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    const taken = native.listenPlain(netns, { address: '::', port: ZTUNNEL_PORTS.inboundPlaintext, backlog: 1 });
    expect(await agent.add('a', namespace)).toMatch('AddrInUse');
    await agent.ask({ kind: 'snapshotSent' });
    // Readiness does not tell of it; what does is the number of pending proxies.
    expect(ztunnel.ready).toBe(true);
    expect(ztunnel.pending).toEqual(['a']);
    expect(native.listeners(netns).length).toBe(1);
    native.close(taken);
    await until(() => ztunnel.served.includes('a'));
    expect(ztunnel.pending).toEqual([]);
    expect(agent.unread).toBe(0);
    // It says so only when asked.
    expect(await agent.add('a', namespace)).toBeNull();
  });
});

describe('connections', () => {
  test('of a workload that XDS does not know are held, and reset after 5 s', async () => {
    const ztunnel = start({ xds: [] });
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace);
    const begun = performance.now();
    const socket = await connect(netns, '127.0.0.1', ZTUNNEL_PORTS.inboundHBONE);
    const [error] = await once(socket, 'error');
    expect(error).toMatchObject({ code: 'ECONNRESET' });
    expect(performance.now() - begun).toBeGreaterThan(4_900);
    expect(ztunnel.pod('a')?.proxy.seen.length).toBe(1);
  });

  test('one of its three names suffices to be unknown', async () => {
    const ztunnel = start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace, { ...WORKLOAD, serviceAccount: 'other' });
    const socket = await connect(netns, '127.0.0.1', ZTUNNEL_PORTS.inboundHBONE);
    socket.write('CONNECT 127.0.0.1:8080 HTTP/1.1\r\n\r\n');
    const outcome = await new Promise<string>((resolve) => {
      socket.once('data', () => resolve('answered')).once('close', () => resolve('reset'));
    });
    expect(outcome).toBe('reset');
    expect(ztunnel.pod('a')?.proxy.seen.length).toBe(1);
  });

  test('a port of its own that somebody names is not gone on with', async () => {
    start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace);
    // Depending on who is faster the connect fails already.
    const reset = connect(netns, '127.0.0.1', ZTUNNEL_PORTS.outbound).then((socket) => once(socket, 'end'));
    await expect(reset).rejects.toMatchObject({ code: 'ECONNRESET' });
  });
});

describe('DNS', () => {
  test('names of the mesh are answered on the loopback, over UDP and TCP', async () => {
    const ztunnel = start({ names: new Map([['web.default.svc', '240.240.0.1']]) });
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace);
    const name = [...'web.default.svc'.split('.')]
      .map((label) => `${String.fromCharCode(label.length)}${label}`)
      .join('');
    const query = Buffer.from(`\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00${name}\x00\x00\x01\x00\x01`, 'latin1');
    const socket = await connect(netns, '127.0.0.1', ZTUNNEL_PORTS.dns);
    const size = Buffer.from([0, query.length]);
    socket.write(Buffer.concat([size, query]));
    const [answer] = (await once(socket, 'data')) as [Buffer];
    expect(answer.readUInt16BE(2)).toBe(0x1234);
    expect([...answer.subarray(-4)]).toEqual([240, 240, 0, 1]);
    expect(ztunnel.pod('a')?.dns?.seen).toEqual([{ name: 'web.default.svc', transport: 'tcp' }]);
  });
});

describe('ending', () => {
  test('SIGTERM: no new connections, open ones end after the drain', async () => {
    const ztunnel = start({ drainMs: 300 });
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    const echo = await EchoServer.start(native, netns, '::', 8080);
    closing.push(() => echo.close());
    await agent.add('a', namespace);
    const through = await connect(netns, '127.0.0.1', ZTUNNEL_PORTS.inboundHBONE);
    through.write('CONNECT 127.0.0.1:8080 HTTP/1.1\r\n\r\n');
    await once(through, 'data');
    const ended = once(through.resume(), 'end');
    const terminated = ztunnel.terminate();
    await until(() => native.listeners(netns).length === 3);
    await ended;
    await terminated;
    expect(await ztunnel.exited).toBe(0);
    expect(native.listeners(netns).map(({ port }) => port)).toEqual([8080]);
  });

  test('while the agent is away it goes on, and connects when it is back', async () => {
    const ztunnel = start();
    await agent.ready();
    const { namespace, netns } = lonePod('a');
    await agent.add('a', namespace);
    const { path } = agent;
    agent.close();
    native.removeFile(path);
    await until(() => !ztunnel.connected);
    expect(native.listeners(netns).length).toBe(5);
    agent = new RawAgent(path);
    await agent.ready();
    expect(ztunnel.served).toEqual(['a']);
  });
});

describe('misbehaviour, for tests of agents', () => {
  test.each<[string, Misbehaviour, string | undefined]>([
    ['another version', { version: 7 }, undefined],
    ['a Nack for every pod', { nack: 'x'.repeat(1_416) }, 'x'.repeat(1_416)],
  ])('%s', async (_, misbehaviour, nack) => {
    start({ misbehaviour });
    await agent.ready();
    expect(agent.hello).toBe(misbehaviour.version ?? 1);
    if (nack === undefined) return;
    expect(await agent.add('a', lonePod('a').namespace)).toBe(nack);
  });

  test('hanging', async () => {
    const ztunnel = start({ misbehaviour: { hang: true } });
    await agent.ready();
    agent.send({ kind: 'add', uid: 'a', workload: WORKLOAD }, lonePod('a').namespace);
    agent.send({ kind: 'snapshotSent' });
    await new Promise((resolve) => setImmediate(resolve));
    expect([agent.unread, ztunnel.served]).toEqual([0, []]);
  });
});
