// SPDX-License-Identifier: Apache-2.0
//
// A pod of the in-pod contract whose programs are run one packet at a time: its namespace has listeners with the
// proxy's mark, and for the host's side there is the node's. The pod holds an outside address on lo, so that a
// connection of its own to it looks as one does that a transparent proxy has taken.

import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { Endpoint } from '../../conformance/e2e/endpoint.ts';
import { must, type Namespace, Testbed } from '../../conformance/netns.ts';
import { loadNative } from '../../plugin/addon.ts';
import type { ExclusionRule, Native, ProgramName } from '../../plugin/native.ts';
import { mapped, type Wire } from './frames.ts';
import { FOREIGN_MARK, families, ifindexOf, Loaded, type Outcome, Runner } from './node.ts';

export const PROXY_MARK = 0x539;
export const POD_MAC = '02:00:5e:81:00:02';
export const GATEWAY_MAC = '02:00:5e:81:00:01';
export const ELSEWHERE_MAC = '02:00:5e:81:00:ee';
/** Inside the pod the id and the device's index have nothing to do with each other. */
export const ID = 0x80001234;
export const PORTS = { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008, dns: 15053 };
/** A listener without the proxy's mark, and a port that nobody listens on. */
export const UNMARKED = 16001;
export const DEAF = 16999;
/** The proxy's DNS listener of one family alone, on loopback alone. */
export const DNS_OF = { 4: 15054, 6: 15056 } as const;
export const APP = 8080;
export const SIGN_PROBE = 10;

export const its = {
  4: {
    pod: '10.81.0.2',
    second: '10.81.0.3',
    node: '10.81.0.1',
    taken: '203.0.113.7',
    outside: '203.0.113.9',
    istio: '169.254.7.127',
    loopback: '127.0.0.1',
  },
  6: {
    pod: 'fd81::2',
    second: 'fd81::3',
    node: 'fd81::1',
    taken: '2001:db8:7::7',
    outside: '2001:db8:7::9',
    istio: 'fd16:9254:7127:1337:ffff:ffff:ffff:ffff',
    loopback: '::1',
  },
} as const;

/** The wire of what the pod sends, of what it gets, and of what was looped. */
export const out: Wire = { source: POD_MAC, destination: GATEWAY_MAC };
export const within: Wire = { source: GATEWAY_MAC, destination: POD_MAC };
export const own: Wire = { source: POD_MAC, destination: POD_MAC };

/** Namespaces, devices and sockets. */
export class InPodNode {
  readonly native: Native = loadNative();
  readonly testbed: Testbed;
  readonly bpffs: string;
  readonly node: Namespace;
  readonly pod: Namespace;
  readonly hostIfindex: number;
  readonly podIfindex: number;
  readonly inPod: Runner;
  readonly onNode: Runner;
  /** In the pod, and outside. */
  readonly endpoint: Endpoint;
  readonly peer: Endpoint;
  /** Id of the cgroup that the programs take the packets of inPod for. */
  readonly cgroup: bigint;
  nsid = -1;
  #port = 20_000;

  private constructor(testbed: Testbed) {
    this.testbed = testbed;
    this.bpffs = testbed.bpffs('bpf');
    this.node = testbed.namespace('node');
    this.pod = testbed.namespace('pod');
    testbed.veth(
      { namespace: this.node, ifname: 'pod0', mac: GATEWAY_MAC, addresses: ['10.81.0.1/24', 'fd81::1/64'] },
      {
        namespace: this.pod,
        ifname: 'eth0',
        mac: POD_MAC,
        addresses: ['10.81.0.2/24', '10.81.0.3/24', 'fd81::2/64', 'fd81::3/64'],
        gateways: ['10.81.0.1', 'fd81::1'],
      },
    );
    for (const family of families) {
      this.pod.ip('addr', 'add', `${its[family].taken}/${family === 4 ? 32 : 128}`, 'dev', 'lo');
      this.pod.ip('neighbour', 'replace', its[family].node, 'lladdr', GATEWAY_MAC, 'dev', 'eth0');
    }
    this.hostIfindex = ifindexOf(this.node, 'pod0');
    this.podIfindex = ifindexOf(this.pod, 'eth0');
    this.inPod = new Runner(testbed, this.pod);
    this.onNode = new Runner(testbed, this.node);
    this.endpoint = new Endpoint(testbed, this.pod, 'pod');
    this.peer = new Endpoint(testbed, this.node, 'node');
    this.cgroup = ownCgroup(testbed);
  }

  static async open(): Promise<InPodNode> {
    const testbed = Testbed.open();
    try {
      const node = new InPodNode(testbed);
      node.nsid = await node.onNode.netnsId(node.pod);
      const { outbound, inboundPlaintext, inboundHBONE, dns } = PORTS;
      await Promise.all([
        ...[outbound, inboundPlaintext, inboundHBONE, dns].map((port) => node.endpoint.listen(port, PROXY_MARK)),
        ...[APP, UNMARKED].map((port) => node.endpoint.listen(port)),
        node.endpoint.serveUDP(dns, PROXY_MARK),
        node.endpoint.serveUDP(UNMARKED),
        ...families.map((family) => node.endpoint.serveUDP(DNS_OF[family], PROXY_MARK, [its[family].loopback])),
        node.peer.listen(APP),
      ]);
      return node;
    } catch (error) {
      testbed.close();
      throw error;
    }
  }

  close(): void {
    this.testbed.close();
  }

  get lastPort(): number {
    return this.#port;
  }

  /** A port that no other test uses. */
  port(): number {
    this.#port += 1;
    return this.#port;
  }
}

/** Of the version 2 hierarchy, this process's. */
function ownCgroup(testbed: Testbed): bigint {
  const path = /^0::(.*)$/m.exec(readFileSync('/proc/self/cgroup', 'utf8'))?.[1];
  if (path === undefined) throw new Error('/proc/self/cgroup: no line for the version 2 hierarchy');
  const mount = testbed.directory('cgroup');
  must(['mount', '-t', 'cgroup2', 'none', mount]);
  testbed.defer(() => {
    must(['umount', mount]);
  });
  return statSync(join(mount, path), { bigint: true }).ino;
}

export interface Enrolment {
  flags?: string[];
  ports?: Partial<typeof PORTS>;
  id?: number;
}

interface Skb {
  mark?: number;
  ingressIfindex?: number;
  id?: number;
}

/** The programs of one state directory. */
export class InPodDatapath extends Loaded {
  readonly node: InPodNode;
  readonly seen: Set<string>;
  readonly sign: Uint8Array;

  constructor(node: InPodNode, seen: Set<string>, label: string) {
    super(node.native, node.bpffs, label, 0, 1024);
    this.node = node;
    this.seen = seen;
    this.sign = node.native.settings(this.state).sign;
  }

  /** The pod enrolled by its own ADD, and nothing known of it. */
  reset(): void {
    const { native, hostIfindex } = this.node;
    for (const id of [ID, hostIfindex]) {
      native.deleteDirectFlows(this.state, id);
      native.deleteExclusions(this.state, id);
    }
    native.deleteInterface(this.state, hostIfindex);
    native.setCheckCgroups(this.state, false);
    this.enrol();
  }

  enrol({ flags = ['STRICT'], ports = {}, id = ID }: Enrolment = {}): void {
    const { native, podIfindex, nsid } = this.node;
    const bits = ['ENROLLED', 'IN_POD', ...flags].reduce((sum, name) => {
      const bit = native.flags[`INTERFACE_${name}`];
      if (bit === undefined) throw new TypeError(`no flag INTERFACE_${name} in redirect.h`);
      return sum | bit;
    }, 0);
    native.putInterface(this.state, id, {
      podMac: POD_MAC,
      gatewayMac: GATEWAY_MAC,
      flags: bits,
      podIfindex,
      nsid,
      master: 0,
      ports: { ...PORTS, ...ports },
      address4: mapped(its[4].pod),
      address6: mapped(its[6].pod),
    });
    for (const family of families) {
      for (const address of [its[family].pod, its[family].second]) {
        native.putEndpoint(this.state, mapped(address), { ifindex: id, flags: bits, podMac: POD_MAC }, false);
      }
    }
  }

  exclude(...rules: ExclusionRule[]): void {
    this.node.native.putExclusions(this.state, ID, rules);
  }

  async check(program: ProgramName, frame: Uint8Array, outcome: Outcome, skb: Skb = {}): Promise<void> {
    const { native, inPod, onNode, hostIfindex, podIfindex } = this.node;
    const host = program === 'inpod_sign' || program === 'inpod_guard';
    const id = host ? hostIfindex : (skb.id ?? ID);
    const mark = skb.mark ?? FOREIGN_MARK;
    native.deleteCounters(this.state, id);
    const result = await (host ? onNode : inPod).testRun({
      path: this.pathOf(program),
      packet: frame,
      skb: {
        mark,
        ingressIfindex: skb.ingressIfindex ?? 0,
        ifindex: host ? hostIfindex : podIfindex,
        interfaceId: host ? 0 : id,
      },
    });
    for (const { program, reason } of this.counters(id)) this.seen.add(`${program} ${reason}`);
    this.expectOutcome(program, id, frame, result, outcome, mark);
    // Another's program behind ours shares the control block.
    expect(result.interfaceId).toBe(0);
  }
}
