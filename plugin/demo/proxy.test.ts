// SPDX-License-Identifier: Apache-2.0
// The proxy in a namespace with nothing but loopback: every 127.x is local there, so that clients have addresses of
// their own. What needs redirection is demo.test.ts.

import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buffer } from 'node:stream/consumers';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { loadNative } from '../addon.ts';
import type { DemoNative } from './native-topology.ts';
import { listenOn, TransparentProxy, unmapped } from './proxy.ts';

const PORTS = { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008 };
const native = loadNative() as DemoNative;
const directory = mkdtempSync(join(tmpdir(), 'ambient-redirect-proxy-'));
let netns: number;
let proxy: TransparentProxy;
let servers: Server[];
let sockets: Socket[];

beforeAll(() => {
  native.createNetns(join(directory, 'netns'));
  netns = native.openNetns(join(directory, 'netns'));
  native.setLinkUp(netns, 'lo');
});
afterAll(() => {
  native.close(netns);
  native.deleteNetns(join(directory, 'netns'));
  rmSync(directory, { recursive: true });
});
beforeEach(async () => {
  servers = [];
  sockets = [];
  proxy = await TransparentProxy.start(native, { netns, address: '::', ports: PORTS });
});
afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  await proxy.close();
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
});

async function listen(port: number, serve: (socket: Socket) => void): Promise<void> {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.push(socket);
    socket.on('error', () => {});
    serve(socket);
  });
  await listenOn(server, native.listenPlain(netns, { address: '::', port, backlog: 16 }));
  servers.push(server);
}

async function connect(source: string, destination: string, port: number): Promise<Socket> {
  const fd = await native.connectTransparent(netns, {
    source,
    sourcePort: 0,
    destination,
    port,
    mark: 0,
    timeoutMs: 2_000,
  });
  const socket = new Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
  sockets.push(socket);
  return socket;
}

/** Everything that came until the end, or the error's code. */
async function received(socket: Socket): Promise<string> {
  try {
    return (await buffer(socket)).toString();
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? String(error);
  }
}

describe.each([
  ['IPv4', '127.0.0.3', '127.0.0.2', '127.0.0.2:8080'],
  ['IPv6', '::1', '::1', '[::1]:8080'],
])('a tunnel over %s', (_family, client, server, authority) => {
  test('goes on to the named port from the client’s own address, half-closed ends included', async () => {
    let source: string | undefined;
    await listen(8080, async (socket) => {
      source = unmapped(socket.remoteAddress);
      // Answers only after the client's end has come all the way.
      socket.end(await buffer(socket));
    });
    const body = randomBytes(300_000);
    const socket = await connect(client, server, PORTS.inboundHBONE);
    socket.write(`CONNECT ${authority} HTTP/1.1\r\nHost: ${authority}\r\n\r\n`);
    socket.end(body);
    const answer = await buffer(socket);
    expect(answer.subarray(0, 19).toString()).toBe('HTTP/1.1 200 OK\r\n\r\n');
    expect(answer.subarray(19).equals(body)).toBe(true);
    expect(source).toBe(client);
    expect(proxy.seen).toEqual([
      { listener: 'inboundHBONE', source: client, destination: server, port: PORTS.inboundHBONE },
    ]);
  });

  test('to a port where nobody listens', async () => {
    const socket = await connect(client, server, PORTS.inboundHBONE);
    socket.end(`CONNECT ${authority} HTTP/1.1\r\n\r\n`);
    expect(await received(socket)).toBe('HTTP/1.1 503 Service Unavailable\r\n\r\n');
  });
});

describe('a preamble that is refused', () => {
  test.each([
    ['another host than the one connected to', 'CONNECT 127.0.0.9:8080 HTTP/1.1\r\n\r\n'],
    ['no CONNECT', 'GET / HTTP/1.1\r\nHost: 127.0.0.2\r\n\r\n'],
    ['port 0', 'CONNECT 127.0.0.2:0 HTTP/1.1\r\n\r\n'],
    ['a port too high', 'CONNECT 127.0.0.2:65536 HTTP/1.1\r\n\r\n'],
  ])('%s', async (_name, preamble) => {
    const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
    socket.write(preamble);
    expect(await received(socket)).toBe('HTTP/1.1 400 Bad Request\r\n\r\n');
  });

  test('too long', async () => {
    const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
    socket.write('x'.repeat(5_000));
    expect(await received(socket)).toBe('ECONNRESET');
  });

  test('cut off', async () => {
    const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
    socket.end('CONNECT 127.0.0.2');
    expect(await received(socket)).toBe('ECONNRESET');
  });
});

test('a preamble in pieces is the same preamble', async () => {
  await listen(8080, (socket) => socket.pipe(socket));
  const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
  socket.setNoDelay(true);
  for (const piece of ['CONN', 'ECT 127.0.0.2:8080 HTTP/1.1\r', '\n\r\nhel', 'lo']) {
    await new Promise((resolve) => socket.write(piece, resolve));
  }
  socket.end();
  expect(await received(socket)).toBe('HTTP/1.1 200 OK\r\n\r\nhello');
});

test('a server that has said all it has still hears the client out', async () => {
  const heard = new Promise<Buffer>((resolve, reject) => {
    listen(8080, (socket) => {
      socket.end('farewell');
      buffer(socket).then(resolve, reject);
    });
  });
  const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
  socket.write('CONNECT 127.0.0.2:8080 HTTP/1.1\r\n\r\n');
  expect(await received(socket)).toBe('HTTP/1.1 200 OK\r\n\r\nfarewell');
  const body = randomBytes(100_000);
  socket.end(body);
  expect((await heard).equals(body)).toBe(true);
});

test('a reset at the server’s end is a reset at the client’s', async () => {
  await listen(8080, (socket) => socket.once('data', () => socket.resetAndDestroy()));
  const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
  socket.write('CONNECT 127.0.0.2:8080 HTTP/1.1\r\n\r\nhello');
  expect(await received(socket)).toBe('ECONNRESET');
});

test('a reset at the client’s end is a reset at the server’s', async () => {
  const failed = new Promise<unknown>((resolve) => {
    listen(8080, (socket) => {
      socket.write('welcome');
      socket.once('error', resolve);
    });
  });
  const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
  socket.write('CONNECT 127.0.0.2:8080 HTTP/1.1\r\n\r\n');
  let answer = '';
  while (!answer.endsWith('welcome')) answer += (await once(socket, 'data')).toString();
  socket.resetAndDestroy();
  expect(await failed).toMatchObject({ code: 'ECONNRESET' });
});

test('connecting to the listener itself leads nowhere, and not in circles', async () => {
  // The reset may come before the connection is handed over.
  const end = connect('127.0.0.3', '127.0.0.2', PORTS.outbound).then(received, ({ code }) => code);
  expect(await end).toBe('ECONNRESET');
  expect(proxy.seen).toHaveLength(1);
});

test('close() resets what is open and gives the ports back', async () => {
  await listen(8080, (socket) => socket.pipe(socket));
  const socket = await connect('127.0.0.3', '127.0.0.2', PORTS.inboundHBONE);
  socket.write('CONNECT 127.0.0.2:8080 HTTP/1.1\r\n\r\n');
  await once(socket, 'data');
  const end = received(socket);
  await proxy.close();
  expect(await end).toBe('ECONNRESET');
  expect(native.listeners(netns).filter(({ port }) => port !== 8080)).toEqual([]);
  proxy = await TransparentProxy.start(native, { netns, address: '::', ports: PORTS });
});

test('a port that is taken is an error, and no listener is left', async () => {
  await proxy.close();
  await listen(PORTS.inboundHBONE, (socket) => socket.destroy());
  await expect(TransparentProxy.start(native, { netns, address: '::', ports: PORTS })).rejects.toMatchObject({
    code: 'EADDRINUSE',
  });
  expect(native.listeners(netns).map(({ port }) => port)).toEqual([PORTS.inboundHBONE]);
});

test('a port of 0 has no listener', async () => {
  await proxy.close();
  proxy = await TransparentProxy.start(native, { netns, address: '0.0.0.0', ports: { ...PORTS, inboundPlaintext: 0 } });
  const listeners = native.listeners(netns).sort((a, b) => a.port - b.port);
  expect(listeners).toMatchObject([
    { family: 4, port: PORTS.outbound, transparent: true },
    { family: 4, port: PORTS.inboundHBONE, transparent: true },
  ]);
});
