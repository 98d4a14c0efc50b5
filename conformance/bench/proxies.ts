// SPDX-License-Identifier: Apache-2.0
// The proxies that the bench compares with, as processes in a pod's network namespace, and what they count.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { must, type Namespace, type Running, type Testbed, until } from '../netns.ts';

export type ProxyKind = 'native' | 'haproxy';

/** One listener of a proxy. */
export interface Listener {
  name: string;
  port: number;
  /** Where its connections go on to; without it: to where the client wanted. */
  to?: { address: string; port: number };
  /** Go on with the client's address. */
  keepSource?: boolean;
}

export interface ProxyOptions {
  listeners: readonly Listener[];
  /** SO_MARK of every socket, and SO_REUSEPORT on the listeners, as a ztunnel inside a pod has them. Native only. */
  inPod?: boolean;
}

export interface ListenerCount {
  accepted: number;
  connected: number;
  failed: number;
  /** Payload bytes, both directions together; null: the proxy does not say. */
  bytes: number | null;
}

/** By name of the listener. */
export type ProxyCount = Record<string, ListenerCount>;

export const IN_POD_MARK = 0x539;

export interface RunningProxy {
  readonly pid: number;
  count(): ProxyCount;
  stop(): Promise<void>;
}

async function listening(what: string, namespace: Namespace, running: Running, ports: readonly number[]) {
  await until(`${what} listens in ${namespace.name}`, () => {
    if (!running.alive) throw new Error(`${what} ended: ${running.output}`);
    const table = must(namespace.argv(['ss', '-Hltn']));
    return ports.every((port) => new RegExp(`:${port}\\s`).test(table));
  });
}

/** 64-bit counters of a mapped file, see native/peer.c. */
export function counterFile(path: string): number[] {
  const bytes = readFileSync(path);
  return Array.from({ length: bytes.length / 8 }, (_, i) => Number(bytes.readBigUInt64LE(i * 8)));
}

/** Fields of a listener in the native proxy's counters. */
const FIELDS = 5;

/** What the native proxy has counted, by listener in the order of its options. */
export function nativeCount(counters: string, listeners: readonly string[]): ProxyCount {
  const values = counterFile(counters);
  return Object.fromEntries(
    listeners.map((name, i) => {
      const [accepted = 0, connected = 0, failed = 0, up = 0, down = 0] = values.slice(i * FIELDS);
      return [name, { accepted, connected, failed, bytes: up + down }];
    }),
  );
}

async function startNative(
  testbed: Testbed,
  namespace: Namespace,
  directory: string,
  peer: string,
  options: ProxyOptions,
): Promise<RunningProxy> {
  const counters = join(directory, `native.${namespace.name}`);
  writeFileSync(counters, '');
  const argv = [peer, 'proxy', '--counters', counters];
  for (const { name, port, to, keepSource } of options.listeners) {
    argv.push('--listen', [name, port, ...(to ? [to.address, to.port] : [])].join(','));
    if (keepSource) argv.push('--keep-source', name);
  }
  if (options.inPod) argv.push('--mark', String(IN_POD_MARK), '--reuseport');
  const running = testbed.start(namespace.argv(argv));
  const ports = options.listeners.map(({ port }) => port);
  await listening('the native proxy', namespace, running, ports);
  return {
    pid: running.pid,
    stop: () => running.stop('SIGKILL'),
    count: () =>
      nativeCount(
        counters,
        options.listeners.map(({ name }) => name),
      ),
  };
}

/** One thread, raw TCP, as few features as it has: what is compared is the way to it. */
export function haproxyConfiguration(options: ProxyOptions, socket: string): string {
  const sections = options.listeners.map(({ name, port, to, keepSource }) => {
    const transparent = to === undefined ? ' transparent' : '';
    const address = to === undefined ? '0.0.0.0:0' : to.address.includes(':') ? `[${to.address}]` : to.address;
    return `
listen ${name}
  bind :${port}${transparent} backlog 16384
  bind :::${port} v6only${transparent} backlog 16384
  ${keepSource ? 'source 0.0.0.0 usesrc clientip' : ''}
  server one ${to === undefined ? address : `${address}:${to.port}`}`;
  });
  return `
global
  stats socket ${socket} mode 600 level admin
  nbthread 1
  maxconn 9500
defaults
  mode tcp
  option nolinger
  timeout connect 5s
  timeout client 60s
  timeout server 60s
${sections.join('\n')}
`;
}

/** Of `show stat`: CSV, a line for each frontend and server. */
export function parseShowStat(csv: string): ProxyCount {
  const [head = '', ...lines] = csv.trim().split('\n');
  const columns = head.replace(/^# /, '').split(',');
  const result: ProxyCount = {};
  for (const line of lines) {
    const cells = line.split(',');
    const cell = (name: string): string => cells[columns.indexOf(name)] ?? '';
    const proxy = cell('pxname');
    result[proxy] ??= { accepted: 0, connected: 0, failed: 0, bytes: 0 };
    const count = result[proxy];
    if (cell('svname') === 'FRONTEND') {
      count.accepted = Number(cell('stot'));
      count.bytes = Number(cell('bin')) + Number(cell('bout'));
    } else if (cell('svname') === 'one') {
      count.connected = Number(cell('stot'));
      count.failed = Number(cell('econ'));
    }
  }
  return result;
}

async function startHaproxy(
  testbed: Testbed,
  namespace: Namespace,
  directory: string,
  options: ProxyOptions,
): Promise<RunningProxy> {
  if (options.inPod) throw new Error('HAProxy cannot mark the connections that it makes: not for in-pod modes');
  const file = join(directory, `haproxy.${namespace.name}.cfg`);
  const socket = join(directory, `haproxy.${namespace.name}.sock`);
  writeFileSync(file, haproxyConfiguration(options, socket));
  const running = testbed.start(namespace.argv(['haproxy', '-db', '-f', file]));
  const ports = options.listeners.map(({ port }) => port);
  await listening('haproxy', namespace, running, ports);
  return {
    pid: running.pid,
    stop: () => running.stop('SIGKILL'),
    count: () => {
      const script =
        'import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b"show stat\\n"); sys.stdout.write(s.makefile().read())';
      return parseShowStat(must(['python3', '-c', script, socket]));
    },
  };
}

export function startProxy(
  kind: ProxyKind,
  testbed: Testbed,
  namespace: Namespace,
  directory: string,
  peer: string,
  options: ProxyOptions,
): Promise<RunningProxy> {
  return kind === 'native'
    ? startNative(testbed, namespace, directory, peer, options)
    : startHaproxy(testbed, namespace, directory, options);
}
