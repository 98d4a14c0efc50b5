// SPDX-License-Identifier: Apache-2.0
//
// A node of its own for each mode: client, server and proxy pods made as a runtime makes them (ptp), wired as the mode
// says. All of them stand side by side in network namespaces while the bench goes from one to the next; nothing of one
// (TIME_WAIT, conntrack entries, rules) is seen by another.

import { existsSync, mkdirSync } from 'node:fs';
import { createServer } from 'node:http';
import { join } from 'node:path';
import { counters, increases } from '../e2e/counters.ts';
import { executable, type Family, families, type Pod, type PodOptions, Topology } from '../e2e/topology.ts';
import { kernelState } from '../kernel-state.ts';
import { must, type Namespace, type Running, type Testbed, until } from '../netns.ts';
import { inPodRules, PROXY_TUNNEL, sharedRules, type Tunnel } from './iptables.ts';
import type { Evidence, Expectation } from './judge.ts';
import { type Listener, type ProxyKind, type RunningProxy, startProxy } from './proxies.ts';
import { startZtunnel, type Ztunnel } from './ztunnel.ts';

/** What the server pod listens on. */
export const PORTS = { http: 8080, echo: 8081, fortio: 8082, iperf: 5201 } as const;
/** A proxy with fixed destinations listens on a server's port plus this. */
const FIXED = 10_000;
/**
 * connect(2) takes every second port until those are used up, and is slow after that: twice as many as connections, and
 * twice that where a proxy is beside the client.
 */
const PROXY_PORTS = '1024 21000';
const CLIENT_PORTS = '21001 65535';

/** How a mode is wired. The expectation is written apart from it: `judge` compares what was wired with what was wanted. */
export interface Wiring {
  /** One proxy in a pod of its own, one inside each of the two pods, one ztunnel in both, or none. */
  proxies: 'none' | 'shared' | 'in-pod' | 'ztunnel';
  /** The client connects to the proxy by address, and the proxy is told where to go on to. */
  fixed?: boolean;
  /** This plugin, on these hooks. */
  ours?: 'tcx' | 'clsact';
  /** Istio's netfilter rules. */
  rules?: boolean;
  tunnel?: Tunnel;
}

export interface Mode {
  name: string;
  /** For tables and plots. */
  title: string;
  wiring: Wiring;
  expectation: Expectation;
}

const mode = (name: string, title: string, wiring: Wiring, chain: string[], more: Partial<Expectation> = {}): Mode => ({
  name,
  title,
  wiring,
  expectation: { chain, hook: null, rules: false, tunnel: 'none', ...more },
});

const sharedChain = ['shared outbound'];
const inPodChain = ['client outbound', 'server inbound'];

export const MODES: readonly Mode[] = [
  mode('direct', 'direct, no proxy', { proxies: 'none' }, []),
  mode('fixed', 'proxy reached directly', { proxies: 'shared', fixed: true }, ['shared fixed']),
  mode('tcx', 'ours, shared, TCX', { proxies: 'shared', ours: 'tcx' }, sharedChain, { hook: 'tcx' }),
  mode('clsact', 'ours, shared, clsact', { proxies: 'shared', ours: 'clsact' }, sharedChain, { hook: 'clsact' }),
  mode('iptables', 'iptables, shared, TPROXY', { proxies: 'shared', rules: true }, sharedChain, { rules: true }),
  mode(
    'iptables-vxlan',
    'iptables, shared, VXLAN for openings',
    { proxies: 'shared', rules: true, tunnel: 'openings' },
    sharedChain,
    { rules: true, tunnel: 'openings' },
  ),
  mode(
    'iptables-vxlan-all',
    'iptables, shared, VXLAN for all packets',
    { proxies: 'shared', rules: true, tunnel: 'all' },
    sharedChain,
    { rules: true, tunnel: 'all' },
  ),
  mode('fixed-in-pod', 'two proxies reached directly', { proxies: 'in-pod', fixed: true }, [
    'client fixed',
    'server fixed',
  ]),
  mode('in-pod', 'ours, in-pod, TCX', { proxies: 'in-pod', ours: 'tcx' }, inPodChain, { hook: 'tcx' }),
  mode('iptables-in-pod', 'iptables, in-pod, Istio’s rules', { proxies: 'in-pod', rules: true }, inPodChain, {
    rules: true,
  }),
  mode('ztunnel', 'ours, in-pod, ztunnel', { proxies: 'ztunnel', ours: 'tcx' }, inPodChain, { hook: 'tcx' }),
  mode('ztunnel-iptables', 'iptables, in-pod, ztunnel', { proxies: 'ztunnel', rules: true }, inPodChain, {
    rules: true,
  }),
];

export function modeNamed(name: string): Mode {
  const found = MODES.find((one) => one.name === name);
  if (found === undefined) throw new Error(`no mode "${name}": ${MODES.map((one) => one.name).join(', ')}`);
  return found;
}

export interface WorldOptions {
  /** Programs, see programs.ts. */
  peer: string;
  fortio: string | undefined;
  /** For the modes that need one. */
  ztunnel?: Ztunnel;
  /** Path of the plugin, default: this checkout's. */
  plugin?: string;
  /** Keys for our conflist entry. */
  entry?: Record<string, unknown>;
}

export class World {
  readonly mode: Mode;
  readonly topology: Topology;
  readonly client: Pod;
  readonly server: Pod;
  readonly proxy: Pod | undefined;
  readonly #options: WorldOptions;
  /** For files of whoever measures here. */
  readonly directory: string;
  #proxies: Record<string, RunningProxy> = {};
  #server: Running | undefined;
  #kind: ProxyKind | undefined;
  #hooks: string[] = [];

  private constructor(mode: Mode, options: WorldOptions) {
    this.mode = mode;
    this.#options = options;
    const { ours, proxies } = mode.wiring;
    const inPod = { proxy: { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } } };
    this.topology = new Topology({
      primary: 'ptp',
      hook: ours ?? 'tcx',
      rpFilter: 0,
      plugin: ours === undefined ? null : (options.plugin ?? executable),
      entry: { ...((proxies === 'in-pod' || proxies === 'ztunnel') && inPod), ...options.entry },
    });
    this.directory = this.topology.testbed.directory('bench');
    const enroll: PodOptions = { enroll: ours !== undefined };
    this.client = this.topology.pod('client', enroll);
    this.server = this.topology.pod('server', enroll);
    if (proxies === 'shared') this.proxy = this.topology.pod('ztunnel-1', { namespace: 'istio-system' });
  }

  /** Everything up, the native proxy running. */
  static async open(mode: Mode, options: WorldOptions): Promise<World> {
    const world = new World(mode, options);
    try {
      await world.#wire();
      return world;
    } catch (error) {
      world.close();
      throw error;
    }
  }

  close(): void {
    this.topology.close();
  }

  async #wire(): Promise<void> {
    const { topology, client, server } = this;
    const { wiring } = this.mode;
    const pods = [client, server, ...(this.proxy ? [this.proxy] : [])];
    if (wiring.ours !== undefined && this.proxy === undefined) await acknowledge(topology.testbed, topology.runDir);
    await topology.add(...pods);
    // The same on every machine, and not one that paces (bbr), which hides what the path costs. A namespace may have the
    // kernel's unrestricted ones only, and cubic need not be one.
    for (const pod of pods) pod.netns.run(['sysctl', '-qw', 'net.ipv4.tcp_congestion_control=reno']);
    // A proxy that keeps the client's address picks a port for it. Were it the client's own port, conntrack would take two
    // connections for one, and netfilter modes would lose a few of thousands: other ports than the client's, in every mode.
    for (const pod of pods) {
      pod.netns.run(['sysctl', '-qw', `net.ipv4.ip_local_port_range=${pod === client ? CLIENT_PORTS : PROXY_PORTS}`]);
    }
    if (wiring.rules) {
      if (this.proxy) sharedRules(topology, this.proxy, [client, server], wiring.tunnel ?? 'none');
      else for (const pod of [client, server]) inPodRules(pod);
    }
    await this.#serve();
    await this.useProxy('native');
    const state = await kernelState([topology.node, ...pods.map((pod) => pod.netns)], { sysctls: false });
    this.#hooks = hooksIn([...state.entries()]);
  }

  async #serve(): Promise<void> {
    const { netns } = this.server;
    const { peer, fortio } = this.#options;
    const start = (argv: string[]) => this.topology.testbed.start(netns.argv(argv));
    const counters = join(this.directory, 'server');
    this.#server = start([
      peer,
      'server',
      '--http',
      `${PORTS.http}`,
      '--echo',
      `${PORTS.echo}`,
      '--counters',
      counters,
    ]);
    start(['iperf3', '--server', '--port', `${PORTS.iperf}`]);
    const ports: number[] = [PORTS.http, PORTS.echo, PORTS.iperf];
    if (fortio !== undefined) {
      const off = ['grpc', 'redirect', 'tcp', 'udp'].flatMap((kind) => [`-${kind}-port`, 'disabled']);
      start([fortio, 'server', '-http-port', `${PORTS.fortio}`, ...off]);
      ports.push(PORTS.fortio);
    }
    await until(`servers listen in ${netns.name}`, () => allListen(netns, ports), 20_000);
  }

  /** Ends the native server. */
  async stopServer(): Promise<void> {
    await this.#server?.stop('SIGKILL');
  }

  /** Puts this kind of proxy in the place of the one that runs. */
  async useProxy(kind: ProxyKind): Promise<void> {
    const { proxies } = this.mode.wiring;
    if (this.#kind === kind || proxies === 'none') return;
    if (proxies === 'ztunnel') {
      const { ztunnel } = this.#options;
      if (ztunnel === undefined) throw new Error(`mode ${this.mode.name} needs a ztunnel (ZTUNNEL_BINARY)`);
      const { testbed, node } = this.topology;
      this.#proxies = await startZtunnel(ztunnel, testbed, node, this.directory, [this.client, this.server]);
      this.#kind = kind;
      return;
    }
    for (const proxy of Object.values(this.#proxies)) await proxy.stop();
    const start = (pod: Pod, label: 'shared' | 'client' | 'server', inPod: boolean) =>
      startProxy(kind, this.topology.testbed, pod.netns, this.directory, this.#options.peer, {
        listeners: this.#listeners(label),
        inPod,
      });
    if (this.proxy) {
      this.#proxies = { shared: await start(this.proxy, 'shared', false) };
    } else {
      this.#proxies = {
        client: await start(this.client, 'client', true),
        server: await start(this.server, 'server', true),
      };
    }
    this.#kind = kind;
  }

  #listeners(proxy: 'shared' | 'client' | 'server'): Listener[] {
    const inPod = proxy !== 'shared';
    if (!this.mode.wiring.fixed) {
      return [
        { name: 'outbound', port: 15_001, keepSource: !inPod },
        { name: 'inbound', port: 15_006, keepSource: true },
        { name: 'hbone', port: 15_008, keepSource: true },
      ];
    }
    // The client's proxy goes on to the server's, that one to the server itself.
    return Object.values(PORTS).flatMap((port) =>
      families.map((family) => {
        const server = this.server.addresses[family];
        const to =
          proxy === 'client' ? { address: server, port: this.#fixedPort(port, family) } : { address: server, port };
        return { name: `fixed-${port}-${family}`, port: this.#fixedPort(port, family), to };
      }),
    );
  }

  #fixedPort(port: number, family: Family): number {
    return port + FIXED + (family === 6 ? 1000 : 0);
  }

  /** Where the client has to connect to reach the server's `port` in this mode. */
  target(port: number, family: Family): { address: string; port: number } {
    const { fixed } = this.mode.wiring;
    if (!fixed) return { address: this.server.addresses[family], port };
    const address = this.proxy ? this.proxy.addresses[family] : { 4: '127.0.0.1', 6: '::1' }[family];
    return { address, port: this.#fixedPort(port, family) };
  }

  /** The command line that runs `argv` as the client, and ends with this process. */
  clientCommand(argv: readonly string[]): string[] {
    return this.client.netns.argv(['setpriv', '--pdeathsig', 'KILL', '--', ...argv]);
  }

  evidence(): Evidence {
    const { wiring } = this.mode;
    const { node, stateDir } = this.topology;
    const namespaces = [this.client, this.server, ...(this.proxy ? [this.proxy] : [])].map((pod) => pod.netns);
    return {
      proxies: Object.fromEntries(Object.entries(this.#proxies).map(([name, proxy]) => [name, proxy.count()])),
      ours: existsSync(join(stateDir, 'counters')) ? increases([], counters(stateDir)) : {},
      hooks: this.#hooks,
      rules: this.proxy
        ? matched([node], /--set-xmark 0x100\/0x100/)
        : leastOf([matched([this.client.netns], /--to-ports 15001/), matched([this.server.netns], /--to-ports 15006/)]),
      tunnel: this.proxy ? received(this.proxy.netns, PROXY_TUNNEL) : null,
      timeWait: namespaces.reduce((sum, namespace) => sum + timeWait(namespace), 0),
      ...(wiring.proxies === 'none' && { rules: matched([node], /-j/) }),
    };
  }
}

/** In the place of the node agent: says yes to every pod's ADD in the in-pod contract. */
export async function acknowledge(testbed: Testbed, runDir: string): Promise<void> {
  mkdirSync(runDir, { recursive: true, mode: 0o700 });
  const agent = createServer((request, response) => {
    request.resume().on('end', () => response.setHeader('content-type', 'application/json').end('{}'));
  });
  testbed.defer(() => {
    agent.close();
    agent.closeAllConnections();
  });
  await new Promise<void>((resolve, reject) => {
    agent.once('error', reject).listen(join(runDir, 'agent.sock'), resolve);
  });
}

function allListen(namespace: Namespace, ports: readonly number[]): boolean {
  const table = must(namespace.argv(['ss', '-Hltn']));
  return ports.every((port) => new RegExp(`:${port}\\s`).test(table));
}

/** Kinds of hooks with a program on them, of the rows of kernelState: "<node> tcx ..." and "<node> filter ...". */
export function hooksIn(rows: readonly (readonly [key: string, value: string])[]): string[] {
  const kinds = new Set<string>();
  for (const [key] of rows) {
    if (/^\S+ tcx /.test(key)) kinds.add('tcx');
    if (/^\S+ filter /.test(key)) kinds.add('clsact');
  }
  return [...kinds].sort();
}

/** Packets that the rules matched whose text fits, both families; null if there is no such rule. */
function matched(namespaces: readonly Namespace[], pattern: RegExp): number | null {
  let sum: number | null = null;
  for (const namespace of namespaces) {
    for (const command of ['iptables-save', 'ip6tables-save']) {
      for (const line of namespace.run([command, '-c']).split('\n')) {
        const packets = /^\[(\d+):\d+\] -A /.exec(line)?.[1];
        if (packets !== undefined && pattern.test(line)) sum = (sum ?? 0) + Number(packets);
      }
    }
  }
  return sum;
}

function leastOf(counts: readonly (number | null)[]): number | null {
  const known = counts.filter((count) => count !== null);
  if (known.length === 0) return null;
  return known.length < counts.length ? 0 : Math.min(...known);
}

function received(namespace: Namespace, ifname: string): { packets: number; bytes: number } | null {
  const links = JSON.parse(namespace.ip('-j', '-s', 'link', 'show')) as {
    ifname: string;
    stats64: { rx: { packets: number; bytes: number } };
  }[];
  const { packets, bytes } = links.find((link) => link.ifname === ifname)?.stats64.rx ?? {};
  return packets === undefined || bytes === undefined ? null : { packets, bytes };
}

function timeWait(namespace: Namespace): number {
  return Number(/^TCP: .* tw (\d+)/m.exec(namespace.run(['cat', '/proc/net/sockstat']))?.[1] ?? 0);
}
