// SPDX-License-Identifier: Apache-2.0
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Server, Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Namespace, Testbed } from '../conformance/netns.ts';
import { cause, descriptors, native, opened } from './native.testing.ts';

let bed: Testbed;
let client: Namespace;
let server: Namespace;
let clientFd: number;
let serverFd: number;
const open = new Set<Server | Socket>();

beforeEach(() => {
  bed = Testbed.open();
  [client, server] = [bed.namespace('client'), bed.namespace('server')];
  bed.veth(
    { namespace: client, ifname: 'eth0', addresses: ['192.0.2.1/24', '2001:db8::1/64'] },
    {
      namespace: server,
      ifname: 'eth0',
      addresses: ['192.0.2.2/24', '2001:db8::2/64'],
      gateways: ['192.0.2.1', '2001:db8::1'],
    },
  );
  [clientFd, serverFd] = [opened(bed, client), opened(bed, server)];
});
afterEach(() => {
  for (const handle of open) handle instanceof Socket ? handle.destroy() : handle.close();
  open.clear();
  bed.close();
});

const LISTEN = { backlog: 16, reusePort: false, v6only: false, mark: 0 };

/** Serves a listening descriptor: answers each line with the addresses that the connection has. */
async function serve(fd: number): Promise<Server> {
  const listening = createServer((socket) => {
    open.add(socket);
    socket.on('error', () => socket.destroy());
    socket.on('data', (data) => {
      const { remoteAddress, remotePort, localAddress, localPort } = socket;
      socket.end(`${data}${remoteAddress} ${remotePort} ${localAddress} ${localPort}`);
    });
  });
  open.add(listening);
  listening.listen({ fd });
  await once(listening, 'listening');
  return listening;
}

async function exchange(fd: number): Promise<string[]> {
  const socket = new Socket({ fd });
  open.add(socket);
  let answer = '';
  socket.setEncoding('utf8').on('data', (text: string) => {
    answer += text;
  });
  socket.write('hello ');
  await once(socket, 'end');
  return answer.split(' ');
}

const FAMILIES = [
  { family: 4, own: '192.0.2.1', other: '192.0.2.2', foreign: '198.51.100.9', virtual: '203.0.113.5', any: '0.0.0.0' },
  {
    family: 6,
    own: '2001:db8::1',
    other: '2001:db8::2',
    foreign: '2001:db8:a::9',
    virtual: '2001:db8:b::5',
    any: '::',
  },
] as const;

describe.each(FAMILIES)('IPv$family', ({ family, own, other, foreign, virtual, any }) => {
  test('a plain listener and a plain connection carry data between namespaces', async () => {
    const fd = native.listenPlain(serverFd, { address: other, port: 8080, backlog: 4 });
    await serve(fd);
    const connection = await native.connectTransparent(clientFd, {
      source: null,
      sourcePort: 0,
      destination: other,
      port: 8080,
      mark: 0,
      timeoutMs: 5_000,
    });
    const [hello, remote, , local, port] = await exchange(connection);
    expect([hello, remote, local, port]).toEqual(['hello', own, other, '8080']);
  });

  test('both ends may have addresses that nobody has', async () => {
    // What a proxy's netns has: packets that arrive are local, whatever their destination.
    const prefix = family === 4 ? '203.0.113.0/24' : '2001:db8:b::/64';
    client.ip(`-${family}`, 'route', 'add', prefix, 'via', other);
    server.ip(`-${family}`, 'route', 'add', 'local', prefix, 'dev', 'lo');
    native.addLocalRoute(clientFd, { family, table: 100, protocol: 163 });
    client.ip(`-${family}`, 'rule', 'add', 'iif', 'eth0', 'lookup', '100');

    await serve(native.listenTransparent(serverFd, { ...LISTEN, family, address: any, port: 15001 }));
    const options = { source: foreign, sourcePort: 4242, destination: virtual, port: 15001, mark: 0, timeoutMs: 5_000 };
    const answer = await exchange(await native.connectTransparent(clientFd, options));
    expect(answer).toEqual(['hello', foreign, '4242', virtual, '15001']);
    // Another destination, the same source port: chosen or given, it need not be free in the namespace.
    const again = await exchange(await native.connectTransparent(clientFd, { ...options, sourcePort: 0 }));
    expect(again.slice(0, 2)).toEqual(['hello', foreign]);
  });

  test('a foreign address can be bound by a transparent listener only', () => {
    expect(cause(() => native.listenPlain(serverFd, { address: virtual, port: 80, backlog: 1 }))).toEqual({
      code: 'EADDRNOTAVAIL',
      errno: 99,
      syscall: 'bind',
    });
    native.close(native.listenTransparent(serverFd, { ...LISTEN, family, address: virtual, port: 80 }));
  });

  test('refused, unreachable and silent destinations', async () => {
    const options = { source: null, sourcePort: 0, destination: other, port: 9, mark: 0, timeoutMs: 5_000 };
    const before = descriptors();
    await expect(native.connectTransparent(clientFd, options)).rejects.toMatchObject({
      code: 'ECONNREFUSED',
      syscall: 'connect',
      message: expect.stringMatching(/^connect \[.*\]:9 from netns fd \d+: ECONNREFUSED$/),
    });
    await expect(native.connectTransparent(clientFd, { ...options, destination: virtual })).rejects.toMatchObject({
      code: 'ENETUNREACH',
    });
    // A neighbour that is not there and needs no asking: every SYN is lost.
    const silent = family === 4 ? '192.0.2.77' : '2001:db8::77';
    client.ip('neigh', 'add', silent, 'lladdr', '02:00:00:00:00:77', 'dev', 'eth0', 'nud', 'permanent');
    const begun = performance.now();
    await expect(
      native.connectTransparent(clientFd, { ...options, destination: silent, timeoutMs: 100 }),
    ).rejects.toMatchObject({ code: 'ETIMEDOUT' });
    expect(performance.now() - begun).toBeGreaterThan(95);
    expect(performance.now() - begun).toBeLessThan(900);
    await expect.poll(descriptors).toEqual(before);
  });
});

describe('listeners', () => {
  const find = (port: number) => native.listeners(serverFd).filter((listener) => listener.port === port);

  test('say what they are', () => {
    const fds = [
      native.listenTransparent(serverFd, { ...LISTEN, family: 4, address: '0.0.0.0', port: 15001, mark: 0x539 }),
      native.listenTransparent(serverFd, { ...LISTEN, family: 6, address: '::', port: 15006, v6only: false }),
      native.listenTransparent(serverFd, { ...LISTEN, family: 6, address: '::1', port: 15008, v6only: true }),
      native.listenPlain(serverFd, { address: '192.0.2.2', port: 8080, backlog: 1 }),
    ];
    try {
      const common = { uid: 0, inode: expect.any(Number) };
      expect(find(15001)).toEqual([
        { ...common, family: 4, address: '0.0.0.0', port: 15001, v6only: false, transparent: true, mark: 0x539 },
      ]);
      expect(find(15006)).toEqual([
        { ...common, family: 6, address: '::', port: 15006, v6only: false, transparent: true, mark: 0 },
      ]);
      expect(find(15008)).toEqual([
        { ...common, family: 6, address: '::1', port: 15008, v6only: true, transparent: true, mark: 0 },
      ]);
      expect(find(8080)).toEqual([
        { ...common, family: 4, address: '192.0.2.2', port: 8080, v6only: false, transparent: false, mark: 0 },
      ]);
      expect(native.listeners(clientFd)).toEqual([]);
    } finally {
      for (const fd of fds) native.close(fd);
    }
    expect(native.listeners(serverFd)).toEqual([]);
  });

  test('a dual-stack listener takes both families', async () => {
    await serve(native.listenTransparent(serverFd, { ...LISTEN, family: 6, address: '::', port: 15001 }));
    for (const [destination, seen] of [
      ['192.0.2.2', '::ffff:192.0.2.1'],
      ['2001:db8::2', '2001:db8::1'],
    ] as const) {
      const options = { source: null, sourcePort: 0, destination, port: 15001, mark: 0, timeoutMs: 5_000 };
      expect((await exchange(await native.connectTransparent(clientFd, options)))[1]).toBe(seen);
    }
  });

  test('share a port only if all want to', () => {
    const options = { ...LISTEN, family: 4, address: '0.0.0.0', port: 15001 } as const;
    const first = native.listenTransparent(serverFd, { ...options, reusePort: true });
    const second = native.listenTransparent(serverFd, { ...options, reusePort: true });
    expect(find(15001)).toHaveLength(2);
    const before = descriptors();
    expect(cause(() => native.listenTransparent(serverFd, options)).code).toBe('EADDRINUSE');
    expect(descriptors()).toEqual(before);
    native.close(first);
    native.close(second);
  });
});

test('the mark is on the packets before the connection is there', async () => {
  client.run(
    ['nft', '-f', '-'],
    'table inet t { chain o { type filter hook output priority 0; meta mark 0x7 counter; }; }\n',
  );
  const options = { source: null, sourcePort: 0, destination: '192.0.2.2', port: 9, mark: 7, timeoutMs: 5_000 };
  await expect(native.connectTransparent(clientFd, options)).rejects.toMatchObject({ code: 'ECONNREFUSED' });
  expect(client.run(['nft', 'list', 'table', 'inet', 't'])).toMatch(/counter packets [1-9]/);
});

test('many connections at once', async () => {
  const listening = await serve(native.listenPlain(serverFd, { address: '192.0.2.2', port: 8080, backlog: 128 }));
  expect((listening.address() as AddressInfo).port).toBe(8080);
  const options = { source: null, sourcePort: 0, destination: '192.0.2.2', port: 8080, mark: 0, timeoutMs: 5_000 };
  const answers = await Promise.all(
    Array.from({ length: 100 }, async () => exchange(await native.connectTransparent(clientFd, options))),
  );
  expect(new Set(answers.map(([, , port]) => port)).size).toBe(100);
});

test("this process's own namespace", async () => {
  const fd = native.listenPlain(-1, { address: '127.0.0.1', port: 0, backlog: 1 });
  const listening = await serve(fd);
  const socket = connect((listening.address() as AddressInfo).port, '127.0.0.1');
  open.add(socket);
  await once(socket, 'connect');
});
