// SPDX-License-Identifier: Apache-2.0
//
// A node with pods, made as a container runtime makes them: a primary plugin of Debian's, then the plugin under test,
// as executables with stdin and environment. The node is a network namespace; behind it is an outsider on a subnet of
// its own. Dual stack.

import { randomUUID } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { must, type Namespace, type Outcome, Testbed } from '../netns.ts';
import { Endpoint } from './endpoint.ts';

export const executable = join(import.meta.dirname, '../../dist/ambient-redirect');
const debianPlugins = '/usr/lib/cni';
const network = 'pods';
const cniVersion = '1.0.0';

export type Family = 4 | 6;
export type Addresses = Record<Family, string>;
export const families = [4, 6] as const;

/** First addresses of the pods' subnet: the node's. */
export const gateway: Addresses = { 4: '10.88.0.1', 6: 'fd88::1' };
const podSubnets: Addresses = { 4: '10.88.0.0/24', 6: 'fd88::/64' };
export const outsiderAddress: Addresses = { 4: '10.99.0.2', 6: 'fd99::2' };
export const outsideGateway: Addresses = { 4: '10.99.0.1', 6: 'fd99::1' };
export const clusterAddress: Addresses = { 4: '10.96.0.10', 6: 'fd96::10' };
export const BRIDGE = 'cni0';

export interface TopologyOptions {
  primary: 'ptp' | 'bridge';
  hook: 'tcx' | 'clsact';
  rpFilter: 0 | 1;
  /** Keys for the bridge plugin's entry, over the defaults here. */
  bridge?: Record<string, unknown>;
  /** Keys for our conflist entry, over the defaults here. */
  entry?: Record<string, unknown>;
  /** Path of the plugin under test; null: the primary plugin alone. */
  plugin?: string | null;
}

export interface PodOptions {
  namespace?: string;
  /** Of the pod, where it is not the label. */
  name?: string;
  /** As the runtime has it, where the pod has one. */
  uid?: string;
  enroll?: boolean;
  /** Keys for our conflist entry, for this pod's ADD and DEL alone. */
  entry?: Record<string, unknown>;
}

type Result = {
  interfaces: { name: string; mac: string; sandbox?: string }[];
  ips: { address: string; interface?: number }[];
};

export class PluginError extends Error {
  readonly outcome: Outcome;
  constructor(what: string, outcome: Outcome) {
    super(`${what}: exit ${outcome.status ?? outcome.signal}: ${outcome.stdout.trim()} ${outcome.stderr.trim()}`);
    this.outcome = outcome;
  }
}

export class Pod {
  readonly label: string;
  readonly netns: Namespace;
  readonly containerId = randomUUID().replaceAll('-', '');
  readonly options: PodOptions;
  readonly #testbed: Testbed;
  #endpoint: Endpoint | undefined;
  prevResult: Result | undefined;
  hostIfname = '';
  hostIfindex = 0;
  addresses: Addresses = { 4: '', 6: '' };
  mac = '';
  /** Of whom the pod's frames are addressed to: the host veth, or the bridge. */
  gatewayMac = '';

  constructor(testbed: Testbed, netns: Namespace, label: string, options: PodOptions) {
    this.label = label;
    this.netns = netns;
    this.options = options;
    this.#testbed = testbed;
  }

  get endpoint(): Endpoint {
    this.#endpoint ??= new Endpoint(this.#testbed, this.netns, this.label);
    return this.#endpoint;
  }
}

export class Topology {
  readonly testbed: Testbed;
  readonly options: TopologyOptions;
  readonly node: Namespace;
  readonly outside: Namespace;
  /** Sockets of the node itself: kubelet, host processes. */
  readonly host: Endpoint;
  readonly outsider: Endpoint;
  /** bpffs of this topology alone, and the state directory in it. */
  readonly bpffs: string;
  readonly stateDir: string;
  readonly runDir: string;
  readonly #ipamDir: string;
  #services = 0;

  constructor(options: TopologyOptions) {
    this.options = options;
    this.testbed = Testbed.open();
    try {
      this.bpffs = this.testbed.bpffs('bpffs');
      this.stateDir = join(this.bpffs, 'ambient-redirect');
      this.runDir = join(this.testbed.directory('run'), 'ambient-redirect');
      this.#ipamDir = this.testbed.directory('ipam');
      this.node = this.namespace('node');
      sysctl(this.node, { 'net.ipv4.ip_forward': 1, 'net.ipv6.conf.all.forwarding': 1 });
      this.outside = this.namespace('outside');
      this.testbed.veth(
        { namespace: this.node, ifname: 'outside0', addresses: [`${outsideGateway[4]}/24`, `${outsideGateway[6]}/64`] },
        {
          namespace: this.outside,
          ifname: 'eth0',
          addresses: [`${outsiderAddress[4]}/24`, `${outsiderAddress[6]}/64`],
          gateways: [outsideGateway[4], outsideGateway[6]],
        },
      );
      for (const family of families) {
        this.node.ip(`-${family}`, 'route', 'add', 'default', 'via', outsiderAddress[family]);
      }
      this.host = new Endpoint(this.testbed, this.node, 'host');
      this.outsider = new Endpoint(this.testbed, this.outside, 'outsider');
    } catch (error) {
      this.testbed.close();
      throw error;
    }
  }

  /** A namespace with this topology's rp_filter, and without the seconds of IPv6 duplicate address detection. */
  namespace(label: string): Namespace {
    const namespace = this.testbed.namespace(label);
    const { rpFilter } = this.options;
    sysctl(namespace, {
      'net.ipv4.conf.all.rp_filter': rpFilter,
      'net.ipv4.conf.default.rp_filter': rpFilter,
      'net.ipv6.conf.all.accept_dad': 0,
      'net.ipv6.conf.default.accept_dad': 0,
    });
    return namespace;
  }

  /** A process that acts in a namespace of this topology. */
  endpoint(namespace: Namespace, label: string, privileges: readonly string[] = []): Endpoint {
    return new Endpoint(this.testbed, namespace, label, privileges);
  }

  /** A pod's namespace and its endpoint process; not on the network yet. */
  pod(label: string, options: PodOptions = {}): Pod {
    return new Pod(this.testbed, this.namespace(label), label, options);
  }

  /** Our entry of the conflist for `pod`, with what libcni puts in. */
  entry(pod: Pod): Record<string, unknown> {
    return {
      cniVersion,
      name: network,
      type: 'ambient-redirect',
      enrollment: 'annotation',
      proxy: { contract: 'shared', match: { namespace: 'istio-system', name: 'ztunnel-*' } },
      hook: this.options.hook,
      stateDir: this.stateDir,
      runDir: this.runDir,
      capabilities: { 'io.kubernetes.cri.pod-annotations': true },
      runtimeConfig: {
        'io.kubernetes.cri.pod-annotations': pod.options.enroll ? { 'ambient-redirect/enroll': 'true' } : {},
      },
      ...this.options.entry,
      ...pod.options.entry,
      ...(pod.prevResult && { prevResult: pod.prevResult }),
    };
  }

  #primaryEntry(): Record<string, unknown> {
    const ipam = {
      type: 'host-local',
      dataDir: this.#ipamDir,
      ranges: families.map((family) => [{ subnet: podSubnets[family], gateway: gateway[family] }]),
      routes: [{ dst: '0.0.0.0/0' }, { dst: '::/0' }],
    };
    const { primary, bridge } = this.options;
    // hairpinMode: bridge netfilter rewrites and bridges at once, so a pod's call of its own service leaves by the port
    // that it came by. Kubernetes sets it for the same reason.
    const own =
      primary === 'bridge' ? { bridge: BRIDGE, isGateway: true, hairpinMode: true, ...bridge } : { ipMasq: false };
    return { cniVersion, name: network, type: primary, ...own, ipam };
  }

  environment(command: string, pod: Pod): Record<string, string> {
    return {
      PATH: process.env.PATH ?? '/usr/sbin:/usr/bin:/sbin:/bin',
      CNI_COMMAND: command,
      CNI_CONTAINERID: pod.containerId,
      CNI_NETNS: pod.netns.path,
      CNI_IFNAME: 'eth0',
      CNI_PATH: debianPlugins,
      CNI_ARGS: [
        'IgnoreUnknown=1',
        `K8S_POD_NAMESPACE=${pod.options.namespace ?? 'default'}`,
        `K8S_POD_NAME=${pod.options.name ?? pod.label}`,
        `K8S_POD_INFRA_CONTAINER_ID=${pod.containerId}`,
        ...(pod.options.uid === undefined ? [] : [`K8S_POD_UID=${pod.options.uid}`]),
      ].join(';'),
    };
  }

  async #plugin(path: string, command: string, pod: Pod, entry: Record<string, unknown>): Promise<string> {
    const outcome = await this.node.exec([path], { env: this.environment(command, pod), input: JSON.stringify(entry) });
    if (outcome.status !== 0) throw new PluginError(`${path} ${command} ${pod.label}`, outcome);
    return outcome.stdout;
  }

  get #path(): string | null {
    return this.options.plugin === undefined ? executable : this.options.plugin;
  }

  /** ADD of the primary plugin. */
  async addPrimary(pod: Pod): Promise<void> {
    const stdout = await this.#plugin(join(debianPlugins, this.options.primary), 'ADD', pod, this.#primaryEntry());
    const result = JSON.parse(stdout) as Result;
    pod.prevResult = result;
    for (const { address } of result.ips) pod.addresses[address.includes(':') ? 6 : 4] = address.replace(/\/.*/, '');
    const hosts = result.interfaces.filter((one) => !one.sandbox && one.name !== BRIDGE);
    pod.hostIfname = hosts[0]?.name ?? '';
    this.#look(pod);
  }

  /** What a primary plugin leaves behind, without one: a veth pair and a Result. `number` 2 to 250. */
  wire(pod: Pod, number: number): void {
    this.testbed.veth({ namespace: this.node, ifname: `veth${number}` }, { namespace: pod.netns, ifname: 'eth0' });
    this.adopt(pod, number);
  }

  /** The addresses and the Result for a veth pair that is there. */
  adopt(pod: Pod, number: number): void {
    pod.hostIfname = `veth${number}`;
    pod.addresses = { 4: `10.88.0.${number}`, 6: `fd88::${number.toString(16)}` };
    const addresses = [`${pod.addresses[4]}/24`, `${pod.addresses[6]}/64`];
    for (const address of addresses) {
      pod.netns.ip('address', 'add', address, 'dev', 'eth0', ...(address.includes(':') ? ['nodad'] : []));
    }
    this.#look(pod);
    pod.prevResult = {
      interfaces: [
        { name: pod.hostIfname, mac: pod.gatewayMac },
        { name: 'eth0', mac: pod.mac, sandbox: pod.netns.path },
      ],
      ips: addresses.map((address) => ({ interface: 1, address })),
    };
  }

  /** Not from /sys: that shows the network namespace of its mount. */
  #look(pod: Pod): void {
    const links: unknown = JSON.parse(this.node.ip('-j', 'link', 'show', 'dev', pod.hostIfname));
    pod.hostIfindex = (links as { ifindex: number }[])[0]?.ifindex ?? 0;
    pod.mac = pod.netns.mac('eth0');
    pod.gatewayMac = this.node.mac(this.options.primary === 'bridge' ? BRIDGE : pod.hostIfname);
  }

  /** ADD of the plugin under test. */
  async addOurs(pod: Pod): Promise<void> {
    if (this.#path !== null) await this.#plugin(this.#path, 'ADD', pod, this.entry(pod));
  }

  /** CHECK of the plugin under test. */
  async checkOurs(pod: Pod): Promise<void> {
    if (this.#path !== null) await this.#plugin(this.#path, 'CHECK', pod, this.entry(pod));
  }

  /** The chain's ADD. */
  async add(...pods: Pod[]): Promise<void> {
    for (const pod of pods) {
      await this.addPrimary(pod);
      await this.addOurs(pod);
    }
  }

  /** DEL of the plugin under test. */
  async deleteOurs(pod: Pod): Promise<void> {
    if (this.#path !== null) await this.#plugin(this.#path, 'DEL', pod, this.entry(pod));
  }

  async deletePrimary(pod: Pod): Promise<void> {
    await this.#plugin(join(debianPlugins, this.options.primary), 'DEL', pod, this.#primaryEntry());
    pod.prevResult = undefined;
  }

  /** The chain's DEL, last plugin first. */
  async delete(pod: Pod): Promise<void> {
    await this.deleteOurs(pod);
    await this.deletePrimary(pod);
  }

  /** What kube-proxy does for a service with one endpoint: destination NAT, and masquerade where it calls itself. */
  service(address: Addresses, port: number, pod: Pod, targetPort: number): void {
    this.#services += 1;
    for (const family of families) {
      const ip = family === 4 ? 'ip' : 'ip6';
      const to = family === 4 ? `${pod.addresses[4]}:${targetPort}` : `[${pod.addresses[6]}]:${targetPort}`;
      const rule = `${ip} daddr ${address[family]} tcp dport ${port} dnat to ${to}`;
      must(
        this.node.argv(['nft', '-f', '-']),
        `table ${ip} service${this.#services} {
           chain prerouting { type nat hook prerouting priority dstnat; ${rule}; }
           chain output { type nat hook output priority -100; ${rule}; }
           chain postrouting { type nat hook postrouting priority srcnat;
             ct status dnat ${ip} saddr ${pod.addresses[family]} ${ip} daddr ${pod.addresses[family]} masquerade; }
         }\n`,
      );
    }
  }

  close(): void {
    this.testbed.close();
  }
}

export function sysctl(namespace: Namespace, values: Record<string, number>): void {
  namespace.run(['sysctl', '-q', '-w', ...Object.entries(values).map(([key, value]) => `${key}=${value}`)]);
}

export function requireExecutable(): void {
  if (!existsSync(executable)) throw new Error(`${executable} is missing: node .ci/build.mjs executable`);
}
