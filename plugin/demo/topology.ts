// SPDX-License-Identifier: Apache-2.0
// Throw-away namespaces: a node that routes, three pods behind ptp-style veths, a machine outside.
//
//   client 192.0.2.2 ──┐
//   server 192.0.2.3 ──┤ node 192.0.2.1, 198.51.100.1 ── outside 198.51.100.2
//   proxy  192.0.2.4 ──┘      (the same with 2001:db8:1:: and 2001:db8:2::)
//
// Everything lives under one directory, /run/NAME: the namespaces' mount points, a bpffs of its own with the pinned
// state, the plugin's run directory. Addresses are those set aside for documentation (RFC 5737, RFC 3849).

import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { DemoNative } from './native-topology.ts';

export const PODS = ['client', 'server', 'proxy'] as const;
export type PodName = (typeof PODS)[number];
export type PlaceName = PodName | 'node' | 'outside';
export type Family = 4 | 6;

export interface Place {
  name: PlaceName;
  /** bind-mounted namespace */
  path: string;
  /** descriptor of it */
  netns: number;
  /** what others reach it at; the node's is what its own sockets get as source towards a pod */
  address: Readonly<Record<Family, string>>;
}

export interface Paths {
  name: string;
  base: string;
  /** mount point of a bpffs */
  bpffs: string;
  stateDir: string;
  runDir: string;
  /** owner.json: who made it */
  owner: string;
}

/** How a pod's ptp-style link looks from the node. */
export const GATEWAY: Readonly<Record<Family, string>> = { 4: '192.0.2.1', 6: '2001:db8:1::1' };
const OUTSIDE_GATEWAY: Readonly<Record<Family, string>> = { 4: '198.51.100.1', 6: '2001:db8:2::1' };
const BITS: Readonly<Record<Family, number>> = { 4: 32, 6: 128 };
const ANY: Readonly<Record<Family, string>> = { 4: '0.0.0.0', 6: '::' };

const ADDRESSES: Readonly<Record<PlaceName, Readonly<Record<Family, string>>>> = {
  node: GATEWAY,
  client: { 4: '192.0.2.2', 6: '2001:db8:1::2' },
  server: { 4: '192.0.2.3', 6: '2001:db8:1::3' },
  proxy: { 4: '192.0.2.4', 6: '2001:db8:1::4' },
  outside: { 4: '198.51.100.2', 6: '2001:db8:2::2' },
};

const RUN = '/run';
const NAME = /^ambient-redirect-demo-[0-9]+$/;

export function pathsOf(name: string): Paths {
  if (!NAME.test(name)) throw new Error(`${JSON.stringify(name)} is no name of a demo (ambient-redirect-demo-NUMBER)`);
  const base = join(RUN, name);
  const bpffs = join(base, 'bpf');
  return {
    name,
    base,
    bpffs,
    stateDir: join(bpffs, 'state'),
    runDir: join(base, 'run'),
    owner: join(base, 'owner.json'),
  };
}

/** Names of the demos on this machine, whether their makers live or not. */
export function listDemos(): string[] {
  return readdirSync(RUN).filter((name) => NAME.test(name));
}

/** Name of the host-side interface of a pod. */
export function hostInterface(pod: PodName): string {
  return `veth-${pod}`;
}

export class Topology {
  readonly paths: Paths;
  readonly places: Readonly<Record<PlaceName, Place>>;
  readonly #native: DemoNative;

  private constructor(native: DemoNative, paths: Paths, places: Record<PlaceName, Place>) {
    this.#native = native;
    this.paths = paths;
    this.places = places;
  }

  /** Makes everything. Whatever was made when it throws goes with removeTopology(native, name). */
  static create(native: DemoNative, name: string, families: readonly Family[]): Topology {
    const paths = pathsOf(name);
    mkdirSync(paths.base, { mode: 0o700 });
    writeOwner(paths, false);
    mkdirSync(paths.bpffs, { mode: 0o700 });
    native.mountBpffs(paths.bpffs);
    mkdirSync(paths.runDir, { mode: 0o700 });
    for (const place of Object.keys(ADDRESSES)) native.createNetns(join(paths.base, place));
    const topology = Topology.open(native, name);
    topology.#configure(families);
    return topology;
  }

  /** One that exists already. */
  static open(native: DemoNative, name: string): Topology {
    const paths = pathsOf(name);
    const place = (of: PlaceName): Place => {
      const path = join(paths.base, of);
      return { name: of, path, netns: native.openNetns(path), address: ADDRESSES[of] };
    };
    return new Topology(native, paths, {
      node: place('node'),
      client: place('client'),
      server: place('server'),
      proxy: place('proxy'),
      outside: place('outside'),
    });
  }

  #configure(families: readonly Family[]): void {
    const { node, outside } = this.places;
    for (const place of Object.values(this.places)) {
      this.#native.inNetns(place.netns, () => setSysctls(place === node, families));
      this.#native.setLinkUp(place.netns, 'lo');
    }
    for (const pod of PODS) {
      const { netns, address } = this.places[pod];
      const host = hostInterface(pod);
      this.#native.createVeth(node.netns, host, netns, 'eth0');
      for (const family of families) {
        // As the ptp plugin: the gateway is on every host-side interface, the pod behind it is a route.
        this.#native.addAddress(node.netns, host, GATEWAY[family], BITS[family]);
        this.#native.addRoute(node.netns, host, address[family], BITS[family], null);
        this.#native.addAddress(netns, 'eth0', address[family], BITS[family]);
        this.#native.addRoute(netns, 'eth0', ANY[family], 0, GATEWAY[family]);
      }
    }
    this.#native.createVeth(node.netns, 'eth0', outside.netns, 'eth0');
    for (const family of families) {
      const prefix = family === 4 ? 24 : 64;
      this.#native.addAddress(node.netns, 'eth0', OUTSIDE_GATEWAY[family], prefix);
      this.#native.addAddress(outside.netns, 'eth0', outside.address[family], prefix);
      this.#native.addRoute(outside.netns, 'eth0', ANY[family], 0, OUTSIDE_GATEWAY[family]);
    }
  }

  /** The Result that the primary plugin of the chain would have printed for a pod. */
  previousResult(pod: PodName, families: readonly Family[], cniVersion: string): Record<string, unknown> {
    const { netns, path, address } = this.places[pod];
    const host = hostInterface(pod);
    return {
      cniVersion,
      interfaces: [
        { name: host, mac: this.#mac(this.places.node.netns, host) },
        { name: 'eth0', mac: this.#mac(netns, 'eth0'), sandbox: path },
      ],
      ips: families.map((family) => ({
        interface: 1,
        address: `${address[family]}/${BITS[family]}`,
        gateway: GATEWAY[family],
      })),
      routes: families.map((family) => ({ dst: `${ANY[family]}/0`, gw: GATEWAY[family] })),
    };
  }

  /** Closes the descriptors; the namespaces stay. */
  close(): void {
    for (const { netns } of Object.values(this.places)) this.#native.close(netns);
  }

  #mac(netns: number, ifname: string): string {
    const link = this.#native.linkByName(netns, ifname);
    if (link === null) throw new Error(`interface ${ifname} is gone`);
    return link.mac;
  }
}

/** Takes away whatever of a demo is there; repeating it does nothing. Continues past failures and throws them together. */
export function removeTopology(native: DemoNative, name: string): void {
  const paths = pathsOf(name);
  const errors: unknown[] = [];
  const attempt = (step: () => void, ...harmless: string[]) => {
    try {
      step();
    } catch (error) {
      if (!['ENOENT', ...harmless].includes((error as NodeJS.ErrnoException).code ?? '')) errors.push(error);
    }
  };
  // A namespace that a shell or a dying socket still holds would keep its interfaces: take the veths away first.
  attempt(() => {
    const netns = native.openNetns(join(paths.base, 'node'));
    try {
      for (const ifname of [...PODS.map(hostInterface), 'eth0']) native.deleteLink(netns, ifname);
    } finally {
      native.close(netns);
    }
    // EINVAL: killed between making the file and mounting the namespace on it.
  }, 'EINVAL');
  for (const place of Object.keys(ADDRESSES)) attempt(() => native.deleteNetns(join(paths.base, place)));
  attempt(() => {
    // Own mount, own instance: what is pinned goes with it. rm would fail there, the directory is a mount point.
    if (native.isBpffs(paths.bpffs)) native.unmount(paths.bpffs);
  });
  if (errors.length === 0) attempt(() => rmSync(paths.base, { recursive: true, force: true }));
  if (errors.length > 0) throw new AggregateError(errors, `demo ${name}: ${errors.map(String).join('; ')}`);
}

/** Who serves a demo. A process id alone is used again, so its start time (clock ticks since boot, proc(5)) is with it. */
interface Owner {
  pid: number;
  started: string;
  kept: boolean;
}

export function writeOwner(paths: Paths, kept: boolean): void {
  const owner: Owner = { pid: process.pid, started: startTime(process.pid) ?? '', kept };
  writeFileSync(paths.owner, JSON.stringify(owner), { mode: 0o600 });
}

/** Process id of whoever serves the demo; undefined if nobody does any more. */
export function livingOwner(paths: Paths): number | undefined {
  const owner = readOwner(paths);
  return owner !== undefined && startTime(owner.pid) === owner.started ? owner.pid : undefined;
}

/** Nobody serves it, and nobody wanted it kept: its process was killed. */
export function isAbandoned(paths: Paths): boolean {
  const owner = readOwner(paths);
  // The directory is there before the file in it is.
  if (owner === undefined) return startTime(Number(paths.name.split('-').at(-1))) === undefined;
  return !owner.kept && livingOwner(paths) === undefined;
}

function readOwner(paths: Paths): Owner | undefined {
  try {
    return JSON.parse(readFileSync(paths.owner, 'utf8')) as Owner;
  } catch {
    return undefined;
  }
}

function startTime(pid: number): string | undefined {
  try {
    // The command name in field 2 may hold spaces and parentheses; field 22 is the 20th after it.
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch {
    return undefined;
  }
}

function setSysctls(isNode: boolean, families: readonly Family[]): void {
  const set = (name: string, value: number) => writeFileSync(`/proc/sys/net/${name}`, `${value}\n`);
  if (isNode) {
    // Strict: what leaves the proxy with a foreign source must come in where that source lives.
    for (const scope of ['all', 'default']) set(`ipv4/conf/${scope}/rp_filter`, 1);
    set('ipv4/ip_forward', 1);
  }
  if (!families.includes(6)) return;
  for (const scope of ['all', 'default']) {
    set(`ipv6/conf/${scope}/disable_ipv6`, 0);
    // Link-local addresses have to be usable at once too: without one no neighbour can be asked for.
    set(`ipv6/conf/${scope}/accept_dad`, 0);
    if (isNode) set(`ipv6/conf/${scope}/forwarding`, 1);
  }
}
