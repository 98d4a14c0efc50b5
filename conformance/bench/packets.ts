// SPDX-License-Identifier: Apache-2.0
// The packets that programs are measured on one by one: of a connection that is open through the proxy of a world, of
// one that begins, and of what is none of the proxy's business; and how each program of that world is found.

import { readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { ACK, SYN, tcpFrame } from '../../bpf/test/frames.ts';
import { sign } from '../e2e/counters.ts';
import { type Family, families, gateway, outsiderAddress } from '../e2e/topology.ts';
import { must, type Namespace, until } from '../netns.ts';
import type { Programs } from './load.ts';
import { IN_POD_MARK } from './proxies.ts';
import { PORTS, type World } from './world.ts';

export interface ProgramRow {
  name: string;
  run_time_ns?: number;
  run_cnt?: number;
  bytes_xlated: number;
  bytes_jited: number;
}

/** Every program of a state directory, by name. */
export function programsIn(stateDir: string): Map<string, { path: string; row: ProgramRow }> {
  const builds = join(stateDir, 'programs');
  const paths = readdirSync(builds).flatMap((tag) =>
    readdirSync(join(builds, tag)).map((name) => join(builds, tag, name)),
  );
  return new Map(
    paths.map((path) => {
      const row = JSON.parse(must(['bpftool', '-j', 'prog', 'show', 'pinned', path])) as ProgramRow;
      return [row.name, { path, row }];
    }),
  );
}

/** struct __sk_buff as BPF_PROG_TEST_RUN takes it: mark, ingress_ifindex and ifindex, the rest zero. */
function skb({ ifindex, ingressIfindex = ifindex, mark = 0 }: Case): Buffer {
  const context = Buffer.alloc(192);
  context.writeUInt32LE(mark, 8);
  context.writeUInt32LE(ingressIfindex, 36);
  context.writeUInt32LE(ifindex, 40);
  return context;
}

export interface Case {
  program: string;
  packet: string;
  /** null: passed without being counted. */
  reason: string | null;
  family: Family;
  namespace: Namespace;
  ifindex: number;
  frame: Uint8Array;
  mark?: number;
  /** Default: `ifindex`. */
  ingressIfindex?: number;
}

/** Packets of a connection that is open from `port` of the client to the echo server, and of one that begins. */
function sharedCases(world: World, family: Family, port: number): Case[] {
  const { topology, client, server, proxy } = world;
  if (proxy === undefined) throw new Error('the mode has no shared proxy');
  const from = { address: client.addresses[family], port };
  const to = { address: server.addresses[family], port: PORTS.echo };
  const payload = Buffer.alloc(100);
  const mac = (last: number) =>
    [...sign(topology.stateDir), last].map((byte) => byte.toString(16).padStart(2, '0')).join(':');
  const sent = { source: client.mac, destination: client.gatewayMac };
  const answered = { source: proxy.mac, destination: proxy.gatewayMac };
  const node = topology.node;
  const eth0 = JSON.parse(proxy.netns.ip('-j', 'link', 'show', 'dev', 'eth0')) as { ifindex: number }[];
  const inside = { namespace: proxy.netns, ifindex: eth0[0]?.ifindex ?? 0 };
  // What a program sends on has other MACs in the next run, so of what is judged by them only what passes can be repeated.
  const prober = { address: gateway[family], port: 1024 };
  const outside = { address: outsiderAddress[family], port: 443 };
  return [
    {
      program: 'pod_egress',
      packet: 'data of a pod',
      reason: 'to_proxy_established',
      family,
      namespace: node,
      ifindex: client.hostIfindex,
      frame: tcpFrame(sent, from, to, { flags: ACK, payload }),
    },
    {
      program: 'pod_egress',
      packet: 'SYN of a pod',
      reason: 'redirected_outbound',
      family,
      namespace: node,
      ifindex: client.hostIfindex,
      frame: tcpFrame(sent, { ...from, port: 1024 }, to, { flags: SYN }),
    },
    {
      program: 'pod_ingress',
      packet: 'data of a probe',
      reason: 'pass_host_socket',
      family,
      namespace: node,
      ifindex: server.hostIfindex,
      ingressIfindex: 0,
      frame: tcpFrame({ source: server.gatewayMac, destination: server.mac }, prober, to, { flags: ACK, payload }),
    },
    {
      program: 'pod_egress',
      packet: 'data for the probe',
      reason: 'pass_direct',
      family,
      namespace: node,
      ifindex: server.hostIfindex,
      frame: tcpFrame({ source: server.mac, destination: server.gatewayMac }, to, prober, { flags: ACK, payload }),
    },
    {
      program: 'proxy_egress',
      packet: 'data of the proxy to outside',
      reason: 'from_proxy_reinjected',
      family,
      namespace: node,
      ifindex: proxy.hostIfindex,
      frame: tcpFrame(answered, from, outside, { flags: ACK, payload }),
    },
    {
      program: 'proxy_guard',
      packet: 'data of another pod',
      reason: null,
      family,
      namespace: node,
      ifindex: proxy.hostIfindex,
      frame: tcpFrame({ source: proxy.gatewayMac, destination: proxy.mac }, outside, from, { flags: ACK, payload }),
    },
    {
      program: 'proxy_egress',
      packet: 'data of the proxy to a local pod',
      reason: 'from_proxy_local',
      family,
      namespace: node,
      ifindex: proxy.hostIfindex,
      frame: tcpFrame(answered, to, from, { flags: ACK, payload }),
    },
    {
      program: 'proxy_ingress',
      packet: 'data of a pod',
      reason: 'proxy_delivered',
      family,
      ...inside,
      // SIGN_ESTABLISHED of redirect.h.
      frame: tcpFrame({ source: mac(3), destination: proxy.mac }, from, to, { flags: ACK, payload }),
    },
  ];
}

/** `marks.tproxy` of the settings, which looped packets carry inside a pod. */
const MARK_TPROXY = 0x1043;

/** The same inside the client's pod: `port` is the application's, and its proxy has gone on from `onward`. */
function inPodCases(world: World, family: Family, port: number, onward: number): Case[] {
  const { client, server } = world;
  const app = { address: client.addresses[family], port };
  const proxy = { address: client.addresses[family], port: onward };
  const to = { address: server.addresses[family], port: PORTS.echo };
  const payload = Buffer.alloc(100);
  const links = JSON.parse(client.netns.ip('-j', 'link', 'show', 'dev', 'eth0')) as { ifindex: number }[];
  const inside = { family, namespace: client.netns, ifindex: links[0]?.ifindex ?? 0 };
  const host = { family, namespace: world.topology.node, ifindex: client.hostIfindex };
  const data = { flags: ACK, payload };
  return [
    {
      ...inside,
      program: 'inpod_egress',
      packet: 'data of the app',
      reason: 'to_proxy_established',
      frame: tcpFrame({ source: client.mac, destination: client.gatewayMac }, app, to, data),
    },
    {
      ...inside,
      program: 'inpod_egress',
      packet: 'SYN of the app',
      reason: 'redirected_outbound',
      frame: tcpFrame({ source: client.mac, destination: client.gatewayMac }, { ...app, port: 1024 }, to, {
        flags: SYN,
      }),
    },
    {
      ...inside,
      program: 'inpod_egress',
      packet: 'data of the proxy',
      reason: 'pass_proxy_own',
      mark: IN_POD_MARK,
      frame: tcpFrame({ source: client.mac, destination: client.gatewayMac }, proxy, to, data),
    },
    {
      ...host,
      program: 'inpod_guard',
      packet: 'data of the proxy',
      reason: null,
      frame: tcpFrame({ source: client.mac, destination: client.gatewayMac }, proxy, to, data),
    },
    {
      ...host,
      program: 'inpod_sign',
      packet: 'data to the proxy, from the wire',
      reason: null,
      frame: tcpFrame({ source: client.gatewayMac, destination: client.mac }, to, proxy, data),
    },
    {
      ...inside,
      program: 'inpod_ingress',
      packet: 'data of the app, looped',
      reason: 'proxy_delivered',
      mark: MARK_TPROXY,
      frame: tcpFrame({ source: client.mac, destination: client.mac }, app, to, data),
    },
    {
      ...inside,
      program: 'inpod_ingress',
      packet: 'data to the proxy, from the wire',
      reason: 'to_proxy_established',
      frame: tcpFrame({ source: client.gatewayMac, destination: client.mac }, to, proxy, data),
    },
  ];
}

/**
 * How bpftool is to find a program: a shared one by its pin, an in-pod one by the link of the client's attachment, which
 * has a stub of its own before it. The attachment is told by its link to the namespace.
 */
export function programOf({ topology: { stateDir }, client }: World, name: string): string[] {
  if (!name.startsWith('inpod_')) return ['pinned', programsIn(stateDir).get(name)?.path ?? name];
  const { ino } = statSync(client.netns.path);
  const links = join(stateDir, 'links');
  const show = (key: string, link: string) =>
    JSON.parse(must(['bpftool', '-j', 'link', 'show', 'pinned', join(links, key, link)])) as {
      prog_id: number;
      netns_ino?: number;
    };
  const key = readdirSync(links).find((one) => show(one, 'inpod_lookup').netns_ino === ino);
  if (key === undefined) throw new Error(`no attachment in ${client.netns.name}`);
  return ['id', `${show(key, name).prog_id}`];
}

/** Opens a connection of each family, which stays, and returns the packets of it and around it. */
export async function packetCases(world: World, programs: Pick<Programs, 'peer'>): Promise<Case[]> {
  const all: Case[] = [];
  for (const family of families) {
    const { address, port } = world.target(PORTS.echo, family);
    world.topology.testbed.start(world.clientCommand([programs.peer, 'hold', address, `${port}`, '1', '0', '3600000']));
    const { client, proxy } = world;
    // The application's port, and inside a pod its proxy's, which alone has nobody opposite in the same namespace.
    let ends: number[] = [];
    await until(`a connection to ${address}`, () => {
      const table = client.netns.run(['ss', `-${family}Htn`, 'state', 'established', 'dport', '=', `:${port}`]);
      ends = [...table.matchAll(/:(\d+)\s+\S+:\d+\s*$/gm)].map(([, end]) => Number(end));
      return ends.length === (proxy === undefined ? 2 : 1);
    });
    if (proxy !== undefined) {
      all.push(...sharedCases(world, family, ends[0] ?? 0));
      continue;
    }
    const opposite = client.netns.run(['ss', '-Htn', 'state', 'established', 'sport', '=', `:${port}`]);
    const [app, onward] = [true, false].map((wanted) =>
      ends.find((end) => new RegExp(`:${end}\\s*$`, 'm').test(opposite) === wanted),
    );
    if (app === undefined || onward === undefined) throw new Error(`cannot tell the ends of ${opposite}`);
    all.push(...inPodCases(world, family, app, onward));
  }
  return all;
}

/** What a run of a program with a packet needs; `argv` behind `bpftool prog run`. */
export interface TestRun {
  /** Nanoseconds per packet. */
  ns: number;
  verdict: number;
}

/** Runs a program `repeat` times with this packet. `prefix`: what bpftool is started by (chrt, taskset). */
export function testRun(
  world: World,
  one: Case,
  program: readonly string[],
  repeat: number,
  prefix: readonly string[] = [],
): TestRun {
  const [frame, context] = [join(world.directory, 'frame'), join(world.directory, 'skb')];
  writeFileSync(frame, one.frame);
  writeFileSync(context, skb(one));
  const options = ['data_in', frame, 'ctx_in', context, 'repeat', `${repeat}`];
  const output = one.namespace.run([...prefix, 'bpftool', 'prog', 'run', ...program, ...options]);
  const [, verdict, ns] = /Return value: (\d+), duration \(average\): (\d+)ns/.exec(output) ?? [];
  if (verdict === undefined) throw new Error(`bpftool prog run: ${output.trim().slice(-200)}`);
  return { ns: Number(ns), verdict: Number(verdict) | 0 };
}
