// SPDX-License-Identifier: Apache-2.0
// The load generators: how each is run in a mode's client pod, and what its output says.

import type { Family } from '../e2e/topology.ts';
import { exec } from '../netns.ts';
import type { Traffic } from './judge.ts';
import { PORTS, type World } from './world.ts';
import type { Ztunnel } from './ztunnel.ts';

/** By name: `qps` and the like per second, `p50` to `p999` in microseconds, `gbps` in gigabits per second. */
export type Metrics = Record<string, number>;

export interface Measured {
  metrics: Metrics;
  traffic: Traffic;
  /** What processor time is divided by: requests, connections, or gigabits. */
  units: number;
  seconds: number;
  /** Set if the load itself failed. */
  failure?: string;
}

export interface Programs {
  peer: string;
  /** Without one the modes that need it are left out. */
  ztunnel?: Ztunnel;
  fortio: string | undefined;
}

export interface Load {
  /** Identifies the load within a profile: `fortio-max-64`. */
  name: string;
  title: string;
  family: Family;
  seconds: number;
  run(world: World): Promise<Measured>;
}

async function output(world: World, argv: readonly string[], seconds: number): Promise<string> {
  const outcome = await exec(world.clientCommand(argv), { timeout: seconds * 1000 + 30_000 });
  if (outcome.status !== 0) {
    const why = outcome.timedOut ? 'took 30 s longer than asked' : `exit ${outcome.status ?? outcome.signal}`;
    throw new Error(`${argv[0]}: ${why}: ${outcome.stderr.trim() || outcome.stdout.trim().slice(-300)}`);
  }
  return outcome.stdout;
}

const url = (address: string, port: number) => `http://${address.includes(':') ? `[${address}]` : address}:${port}/`;

interface FortioResult {
  ActualQPS: number;
  ActualDuration: number;
  DurationHistogram: { Count: number; Percentiles: { Percentile: number; Value: number }[] };
  RetCodes: Record<string, number>;
  SocketCount: number;
  BytesSent: number;
  BytesReceived: number;
  Sizes: { Sum: number };
}

export function parseFortio(text: string): Measured {
  const result = JSON.parse(text) as FortioResult;
  const us = (percentile: number) =>
    (result.DurationHistogram.Percentiles.find((one) => one.Percentile === percentile)?.Value ?? Number.NaN) * 1e6;
  const { Count: requests } = result.DurationHistogram;
  const good = result.RetCodes['200'] ?? 0;
  return {
    metrics: { qps: result.ActualQPS, p50: us(50), p90: us(90), p99: us(99), p999: us(99.9) },
    // A GET of fortio's has at least 40 bytes.
    traffic: { connections: result.SocketCount, bytes: result.Sizes.Sum, sent: requests * 40, packets: requests },
    units: requests,
    seconds: result.ActualDuration / 1e9,
    ...(good !== requests && { failure: `fortio: ${requests - good} of ${requests} requests failed` }),
  };
}

/** The published experiment. `qps` 0: as many as it can. */
export function fortioLoad(fortio: string, family: Family, connections: number, qps: number, seconds: number): Load {
  return {
    name: `fortio-${qps || 'max'}-${connections}-v${family}`,
    title: `fortio -qps ${qps} -c ${connections}`,
    family,
    seconds,
    run: async (world) => {
      const { address, port } = world.target(PORTS.fortio, family);
      // -r: buckets of 10 us; fortio's default of 1 ms is interpolated and says nothing of what takes less.
      const options = ['-p', '50,90,99,99.9', '-r', '0.00001', '-json', '-', '-quiet', '-loglevel', 'Error'];
      const load = ['-uniform', '-qps', `${qps}`, '-c', `${connections}`, '-t', `${seconds}s`];
      return parseFortio(await output(world, [fortio, 'load', ...load, ...options, url(address, port)], seconds));
    },
  };
}

/** wrk and iperf3 take whole seconds. */
const whole = (seconds: number) => Math.max(1, Math.round(seconds));

const SUFFIX: Record<string, number> = { '': 1, k: 1e3, M: 1e6, G: 1e9, us: 1, ms: 1e3, s: 1e6, m: 60e6 };
const BYTES: Record<string, number> = { B: 1, KB: 2 ** 10, MB: 2 ** 20, GB: 2 ** 30 };

export function parseWrk(text: string, connections: number): Measured {
  const latency = (percentile: string) => {
    const [, value, unit = ''] = new RegExp(`^ +${percentile}%\\s+([\\d.]+)(us|ms|s|m)`, 'm').exec(text) ?? [];
    return Number(value) * (SUFFIX[unit] ?? Number.NaN);
  };
  const [, count, seconds, amount, unit = ''] = /(\d+) requests in ([\d.]+)s, ([\d.]+)([KMG]?B) read/.exec(text) ?? [];
  const requests = Number(count);
  const bytes = Math.floor(Number(amount) * (BYTES[unit] ?? Number.NaN) * 0.99);
  const errors = /^ +Socket errors: (.*)$/m.exec(text)?.[1];
  const bad = /Non-2xx or 3xx responses: (\d+)/.exec(text)?.[1];
  return {
    metrics: {
      qps: Number(/Requests\/sec: +([\d.]+)/.exec(text)?.[1]),
      p50: latency('50'),
      p90: latency('90'),
      p99: latency('99'),
    },
    traffic: { connections, bytes, sent: requests * 40, packets: requests },
    units: requests,
    seconds: Number(seconds),
    ...((errors || bad) && { failure: `wrk: ${errors ?? `${bad} bad responses`}` }),
  };
}

/** Requests on connections that stay open, answered by a server that does nothing else. */
export function wrkLoad(family: Family, connections: number, seconds: number): Load {
  return {
    name: `wrk-${connections}-v${family}`,
    title: `wrk, ${connections} connections kept open`,
    family,
    seconds: whole(seconds),
    run: async (world) => {
      const { address, port } = world.target(PORTS.http, family);
      const argv = [
        'wrk',
        '-t',
        '1',
        '-c',
        `${connections}`,
        '-d',
        `${whole(seconds)}s`,
        '--latency',
        url(address, port),
      ];
      return parseWrk(await output(world, argv, seconds), connections);
    },
  };
}

export function parseIperf(text: string, streams: number, reverse: boolean): Measured {
  const result = JSON.parse(text) as {
    error?: string;
    end: { sum_received: { bytes: number; bits_per_second: number; seconds: number } };
  };
  if (result.error) throw new Error(`iperf3: ${result.error}`);
  const { bytes, bits_per_second, seconds } = result.end.sum_received;
  // 99 %: what was on the way when the time was up is counted by one side only.
  const moved = Math.floor(bytes * 0.99);
  return {
    metrics: { gbps: bits_per_second / 1e9 },
    traffic: {
      connections: streams + 1,
      bytes: moved,
      // A packet has at most 64 KiB before it is cut for a wire, and there is none here.
      ...(reverse ? { sent: 0, packets: 0 } : { sent: moved, packets: Math.floor(moved / 2 ** 16) }),
    },
    units: (bytes * 8) / 1e9,
    seconds,
  };
}

/** Throughput. `reverse`: from the server to the client. */
export function iperfLoad(family: Family, streams: number, reverse: boolean, seconds: number): Load {
  return {
    name: `iperf-${streams}${reverse ? '-reverse' : ''}-v${family}`,
    title: `iperf3, ${streams} stream${streams > 1 ? 's' : ''}, ${reverse ? 'server to client' : 'client to server'}`,
    family,
    seconds: whole(seconds),
    run: async (world) => {
      const { address, port } = world.target(PORTS.iperf, family);
      const options = ['--parallel', `${streams}`, '--time', `${whole(seconds)}`, ...(reverse ? ['--reverse'] : [])];
      const argv = ['iperf3', '--json', '--client', address, '--port', `${port}`, ...options];
      return parseIperf(await output(world, argv, seconds), streams, reverse);
    },
  };
}

export interface PeerResult {
  connections: number;
  failed: number;
  transactions: number;
  bytes: number;
  seconds: number;
  perSecond: number;
  p50Us: number;
  p90Us: number;
  p99Us: number;
  p999Us: number;
}

export function parsePeer(text: string, opensConnections: boolean): Measured {
  const result = JSON.parse(text) as PeerResult;
  return {
    metrics: {
      qps: result.perSecond,
      p50: result.p50Us,
      p90: result.p90Us,
      p99: result.p99Us,
      p999: result.p999Us,
    },
    traffic: {
      connections: result.connections,
      bytes: 2 * result.bytes,
      sent: result.bytes,
      packets: result.transactions,
      ...(opensConnections && { opensConnections: true }),
    },
    units: result.transactions,
    seconds: result.seconds,
    ...(result.failed > 0 && { failure: `${result.failed} of ${result.connections} connections failed` }),
  };
}

function peerLoad(
  peer: string,
  what: 'rr' | 'crr' | 'hold',
  title: string,
  family: Family,
  seconds: number,
  ...numbers: number[]
): Load {
  return {
    name: [what, ...numbers, `v${family}`].join('-'),
    title,
    family,
    seconds,
    run: async (world) => {
      const { address, port } = world.target(PORTS.echo, family);
      const argv = [peer, what, address, port, ...numbers, Math.round(seconds * 1000)].map(String);
      return parsePeer(await output(world, argv, seconds), what === 'crr');
    },
  };
}

/** One byte there and back, one at a time: netperf's TCP_RR. */
export function rrLoad(peer: string, family: Family, seconds: number): Load {
  return peerLoad(peer, 'rr', 'one byte there and back (TCP_RR)', family, seconds, 1);
}

/**
 * New connections, one byte there and back on each, `parallel` at once. The client ends each with a RST, and so does
 * the proxy on its other side: no socket is left in TIME_WAIT, so neither the ports nor the hash chains fill up while
 * it runs, and what one run left is not measured in the next. The bench counts TIME_WAIT and calls the run invalid if
 * there is any.
 */
export function crrLoad(peer: string, family: Family, parallel: number, seconds: number): Load {
  return peerLoad(peer, 'crr', `new connections, ${parallel} at once`, family, seconds, parallel);
}

/** `connections` open, of which `active` have a byte on the way at any time. */
export function holdLoad(peer: string, family: Family, connections: number, active: number, seconds: number): Load {
  return peerLoad(peer, 'hold', `${active} of ${connections} open connections`, family, seconds, connections, active);
}
