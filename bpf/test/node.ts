// SPDX-License-Identifier: Apache-2.0
//
// A node in throw-away namespaces whose programs are run one packet at a time (BPF_PROG_TEST_RUN):
//
//   node   the namespace that the programs' devices are in: two pods' host-side veths and two proxies'
//   pod    the first pod, with an address and a listener of its own
//   old    a proxy that listens on 15001, 15006, 15008     both with real connections to
//   new    a newer proxy that does so too                  everybody else's addresses, which are in
//   far    whatever the proxies talk to, pods included: the programs ask for sockets of the proxies, not for their peers
//
// Some addresses exist on the far side and some in a proxy, so that a test can open a real connection whose proxy end is
// the server's (an accepted one) or the client's (an upstream one).

import { type ChildProcess, spawn } from 'node:child_process';
import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { Endpoint } from '../../conformance/e2e/endpoint.ts';
import { must, type Namespace, Testbed, until } from '../../conformance/netns.ts';
import { loadNative } from '../../plugin/addon.ts';
import type { Counter, EndpointRecord, Native, ProgramName, ProxyRecord, State } from '../../plugin/native.ts';
import { ACK, type End, macText, mapped, SYN, tcpFrame, type Wire } from './frames.ts';
import type { Answer, NetnsIdCall, TestRunCall, TestRunResult } from './runner.ts';

export const families = [4, 6] as const;
export type Family = (typeof families)[number];

/** What the addresses of one family are for. */
export interface Addresses {
  /** The enrolled pod's; the far side has it too, as the client of accepted connections and the server of inbound ones. */
  pod: string;
  /** The enrolled pod's; the old proxy has it and speaks from it to the outside. */
  podAtProxy: string;
  /** The enrolled pod's; nobody has it, so what is sent to it is never answered. */
  podSilent: string;
  /** The enrolled pod's; the host has it too. */
  podAtHost: string;
  /** The pod answers on it, `endpoints` does not know it; the far side has it. */
  vip: string;
  /** The second enrolled pod's. */
  otherPod: string;
  /** Outside, held by the far side. */
  outside: string;
  /** Outside, nobody has it: what is sent to it is never answered. */
  outsideSilent: string;
  /** Outside, held by the old and by the new proxy: servers whose connections the proxy took. */
  outsideAtOld: string;
  outsideAtNew: string;
  /** The host's, in the node's namespace. */
  host: string;
  linkLocal: string;
}

export const addresses: Record<Family, Addresses> = {
  4: {
    pod: '10.71.0.2',
    podAtProxy: '10.71.0.3',
    podSilent: '10.71.0.4',
    podAtHost: '10.71.0.5',
    vip: '10.96.0.10',
    otherPod: '10.71.0.9',
    outside: '203.0.113.1',
    outsideSilent: '203.0.113.9',
    outsideAtOld: '198.51.100.1',
    outsideAtNew: '198.51.100.2',
    host: '10.71.0.1',
    linkLocal: '169.254.1.1',
  },
  6: {
    pod: 'fd71::2',
    podAtProxy: 'fd71::3',
    podSilent: 'fd71::4',
    podAtHost: 'fd71::5',
    vip: 'fd96::10',
    otherPod: 'fd71::9',
    outside: '2001:db8:1::1',
    outsideSilent: '2001:db8:1::9',
    outsideAtOld: '2001:db8:2::1',
    outsideAtNew: '2001:db8:2::2',
    host: 'fd71::1',
    linkLocal: 'fe80::1',
  },
};

/** Last byte of the signed source MAC (bpf/redirect.h). */
export const SIGN = {
  OUTBOUND: 1,
  INBOUND: 2,
  ESTABLISHED: 3,
  COOKIE_OUTBOUND: 4,
  COOKIE_INBOUND: 5,
  ICMP: 6,
  DNS: 7,
  DNS_TCP: 8,
  COOKIE_DNS: 9,
} as const;

/** Ports on which far, old and new have servers. */
export const HTTP = 80;
export const APP = 8080;
/** Ports of the proxies' listeners, and one that nobody listens on. */
export const OUTBOUND = 15001;
export const PLAINTEXT = 15006;
export const HBONE = 15008;
export const DNS = 15053;
export const DEAF = 16999;
/** The old proxy's outbound listener takes what comes from the far side for this port. */
export const TAKEN = 4244;
/** The old proxy's DNS listener of one family alone, on loopback alone. */
export const DNS_OF = { 4: 15054, 6: 15056 } as const;
const LOOPBACK = { 4: '127.0.0.1', 6: '::1' } as const;

const DIRECT_FLOWS = 1024;

/** Of an interface in the shared contract. */
const NO_LISTENERS = {
  ports: { outbound: 0, inboundPlaintext: 0, inboundHBONE: 0, dns: 0 },
  address4: new Uint8Array(16),
  address6: new Uint8Array(16),
};

/** No device has this index. */
export const DEAD = 0x7ffffff0;

export const MARKS = { bypass: 0xa3b10001, toProxy: 0xa3b10002, tproxy: 0xa3b10400 };
/** A mark of somebody else's, on every packet unless a test says otherwise: tells "not touched" from "cleared". */
export const FOREIGN_MARK = 0x1234;

export const POD_MAC = '02:00:5e:71:00:02';
export const GATEWAY_MAC = '02:00:5e:71:00:01';
export const OTHER_POD_MAC = '02:00:5e:71:00:09';
export const OLD_MAC = '02:00:5e:71:01:0a';
export const NEW_MAC = '02:00:5e:71:01:0b';
const ELSEWHERE_MAC = '02:00:5e:71:00:ee';

/** The wire of a frame that the pod sends, that it receives, that a proxy sends. */
export const fromPod: Wire = { source: POD_MAC, destination: GATEWAY_MAC };
export const toPod: Wire = { source: GATEWAY_MAC, destination: POD_MAC };
export const fromProxy: Wire = { source: OLD_MAC, destination: ELSEWHERE_MAC };

export const VERDICT = { PASS: -1, DROP: 2, REDIRECT: 7 } as const;

/** What a run must have done. `reason` null: no packet counted. */
export interface Outcome {
  verdict: number;
  reason: string | null;
  /** Destination and source of the frame afterwards where they were rewritten. */
  destination?: string;
  source?: string;
  /** Default: the mark that the packet came with. */
  mark?: number;
  /** The whole frame afterwards where more than its addresses was rewritten; it is what is counted. */
  frame?: Uint8Array;
}

export const pass = (reason: string | null, mark?: number): Outcome => ({
  verdict: VERDICT.PASS,
  reason,
  ...(mark !== undefined && { mark }),
});
export const drop = (reason: string): Outcome => ({ verdict: VERDICT.DROP, reason });

/** Fields of struct interface; flags by the names of redirect.h without INTERFACE_, ENROLLED always. */
export interface Enrolment {
  flags?: readonly string[];
  nsid?: number;
}

interface SkbFields {
  mark?: number;
  ingressIfindex?: number;
  ifindex?: number;
}

/** A process (runner.ts) in one namespace. */
export class Runner {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, { resolve: (value: unknown) => void; reject: (error: Error) => void }>();
  #last = 0;

  constructor(testbed: Testbed, namespace: Namespace) {
    const program = join(import.meta.dirname, 'runner.ts');
    const [file = '', ...rest] = namespace.argv(['setpriv', '--pdeathsig', 'KILL', '--', process.execPath, program]);
    this.#child = spawn(file, rest, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'], serialization: 'advanced' });
    testbed.defer(() => this.#child.kill('SIGKILL'));
    this.#child.on('message', (answer: Answer) => {
      const waiting = this.#waiting.get(answer.id);
      this.#waiting.delete(answer.id);
      if ('error' in answer) waiting?.reject(new Error(answer.error));
      else waiting?.resolve(answer.result);
    });
    this.#child.once('close', (status) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(`runner in ${namespace.name}: exit ${status}`));
      this.#waiting.clear();
    });
  }

  testRun(call: Omit<TestRunCall, 'call'>): Promise<TestRunResult> {
    return this.#call({ call: 'testRun', ...call }) as Promise<TestRunResult>;
  }

  netnsId(namespace: Namespace): Promise<number> {
    return this.#call({ call: 'netnsId', path: namespace.path }) as Promise<number>;
  }

  #call(call: TestRunCall | NetnsIdCall): Promise<unknown> {
    this.#last += 1;
    const id = this.#last;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#child.send({ id, ...call });
    });
  }
}

/** Namespaces, devices and sockets. */
export class Node {
  readonly native: Native = loadNative();
  readonly testbed: Testbed;
  readonly bpffs: string;
  readonly namespaces: Record<'node' | 'pod' | 'old' | 'new' | 'far', Namespace>;
  readonly far: Endpoint;
  readonly old: Endpoint;
  readonly new: Endpoint;
  readonly inPod: Endpoint;
  readonly inNode: Endpoint;
  /** Runs programs where the host-side devices are. */
  readonly runner: Runner;
  /** Runs programs inside the old proxy. */
  readonly inOld: Runner;
  /** Host-side devices. */
  readonly ifindex: Record<'pod' | 'otherPod' | 'old' | 'new', number>;
  nsid: Record<'pod' | 'old' | 'new', number> = { pod: -1, old: -1, new: -1 };
  #port = 20_000;

  private constructor(testbed: Testbed) {
    this.testbed = testbed;
    this.bpffs = testbed.bpffs('bpf');
    const make = (label: string) => testbed.namespace(label);
    this.namespaces = { node: make('node'), pod: make('pod'), old: make('old'), new: make('new'), far: make('far') };
    const { node, pod, old, new: newer, far } = this.namespaces;

    testbed.veth(
      { namespace: node, ifname: 'pod0', addresses: ['10.71.0.1/24', 'fd71::1/64'] },
      { namespace: pod, ifname: 'eth0', mac: POD_MAC, addresses: ['10.71.0.2/24', 'fd71::2/64'] },
    );
    testbed.veth({ namespace: node, ifname: 'pod1' }, { namespace: node, ifname: 'pod1peer', mac: OTHER_POD_MAC });
    testbed.veth({ namespace: node, ifname: 'old0' }, { namespace: old, ifname: 'eth0', mac: OLD_MAC });
    testbed.veth({ namespace: node, ifname: 'new0' }, { namespace: newer, ifname: 'eth0', mac: NEW_MAC });
    testbed.veth(
      { namespace: far, ifname: 'toold', addresses: ['10.99.1.1/24', 'fd99:1::1/64'] },
      {
        namespace: old,
        ifname: 'far0',
        addresses: ['10.99.1.2/24', 'fd99:1::2/64'],
        gateways: ['10.99.1.1', 'fd99:1::1'],
      },
    );
    testbed.veth(
      { namespace: far, ifname: 'tonew', addresses: ['10.99.2.1/24', 'fd99:2::1/64'] },
      {
        namespace: newer,
        ifname: 'far0',
        addresses: ['10.99.2.2/24', 'fd99:2::2/64'],
        gateways: ['10.99.2.1', 'fd99:2::1'],
      },
    );
    for (const family of families) {
      const { pod: server, vip, outside, podAtProxy, podAtHost, outsideAtOld, outsideAtNew } = addresses[family];
      hold(node, [podAtHost]);
      hold(far, [server, vip, outside]);
      hold(old, [outsideAtOld, podAtProxy]);
      hold(newer, [outsideAtNew]);
      const gateway = family === 4 ? ['10.99.1.2', '10.99.2.2'] : ['fd99:1::2', 'fd99:2::2'];
      for (const address of [outsideAtOld, podAtProxy]) route(far, address, gateway[0]);
      route(far, outsideAtNew, gateway[1]);
    }

    must(
      old.argv(['nft', '-f', '-']),
      `table inet taken {
        chain prerouting {
          type filter hook prerouting priority mangle;
          meta nfproto ipv4 tcp dport ${TAKEN} tproxy ip to :${OUTBOUND} accept
          meta nfproto ipv6 tcp dport ${TAKEN} tproxy ip6 to :${OUTBOUND} accept
        }
      }`,
    );

    const endpoint = (label: keyof Node['namespaces']) => new Endpoint(testbed, this.namespaces[label], label);
    this.far = endpoint('far');
    this.old = endpoint('old');
    this.new = endpoint('new');
    this.inPod = endpoint('pod');
    this.inNode = endpoint('node');
    this.runner = new Runner(testbed, node);
    this.inOld = new Runner(testbed, old);
    const index = (name: string) => ifindexOf(node, name);
    this.ifindex = { pod: index('pod0'), otherPod: index('pod1'), old: index('old0'), new: index('new0') };
  }

  static async open(): Promise<Node> {
    const testbed = Testbed.open();
    try {
      const node = new Node(testbed);
      await Promise.all([
        ...[HTTP, APP].flatMap((port) => [node.far.listen(port), node.old.listen(port), node.new.listen(port)]),
        ...[OUTBOUND, PLAINTEXT, HBONE, DNS].flatMap((port) => [
          node.old.listen(port, 0, port === OUTBOUND),
          node.new.listen(port),
        ]),
        ...[node.old, node.new].map((proxy) => proxy.serveUDP(DNS)),
        ...families.map((family) => node.old.serveUDP(DNS_OF[family], 0, [LOOPBACK[family]])),
        node.inPod.listen(APP),
        node.inNode.listen(APP),
      ]);
      const { pod, old, new: newer } = node.namespaces;
      const [podId, oldId, newId] = await Promise.all([pod, old, newer].map((one) => node.runner.netnsId(one)));
      node.nsid = { pod: podId ?? -1, old: oldId ?? -1, new: newId ?? -1 };
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

  /** A connection, seen from the client: its tuple in the order in which the client sends. */
  async connect(
    client: Endpoint,
    source: string,
    server: string,
    port: number,
    sourcePort = this.port(),
  ): Promise<Tuple> {
    const connection = await client.connect(server, port, { source, sourcePort });
    return { client: { address: source, port: sourcePort }, server: { address: server, port }, connection };
  }

  /** A connection of which the old proxy has TIME_WAIT: it closed first. The server is one of the old proxy's. */
  async timeWait(
    family: Family,
    source = addresses[family].pod,
    server = addresses[family].outsideAtOld,
    port = HTTP,
    sourcePort = this.port(),
  ): Promise<Tuple> {
    const tuple = await this.connect(this.far, source, server, port, sourcePort);
    await this.far.request(tuple.connection, 'quit\n');
    const state = `( sport = :${port} and dport = :${tuple.client.port} )`;
    await until('TIME_WAIT in the old proxy', () =>
      this.namespaces.old.run(['ss', '-Htan', 'state', 'time-wait', state]).includes(`:${tuple.client.port}`),
    );
    return tuple;
  }

  /**
   * A connection of which the old proxy has a request socket: its SYN-ACK is never answered. `port`: HTTP, or
   * TAKEN.
   */
  async halfOpen(family: Family, port = HTTP): Promise<Omit<Tuple, 'connection'>> {
    const client = { address: addresses[family].podSilent, port: this.port() };
    const server = { address: addresses[family].outsideAtOld, port };
    await this.far.frame('toold', tcpFrame(this.#wireToOld(), client, server));
    const state = `( sport = :${port} and dport = :${client.port} )`;
    await until('SYN-RECV in the old proxy', () =>
      this.namespaces.old.run(['ss', '-Htan', 'state', 'syn-recv', state]).includes(`:${client.port}`),
    );
    return { client, server };
  }

  /**
   * Sequence numbers of an ACK that completes a handshake by SYN cookie, from `client` to `server`. The old proxy answers
   * a SYN for that tuple with a cookie, and its listener on `listener` too has to, else it accepts none.
   */
  async cookie(client: End, server: End, listener: number): Promise<{ seq: number; ack: number }> {
    const { old, far } = this.namespaces;
    const seq = 0x1000_0000 + client.port;
    const ask = (port: number) => {
      const frame = tcpFrame(this.#wireToOld(), client, { ...server, port }, { seq });
      const answer = ['python3', join(import.meta.dirname, 'answer.py'), 'toold', frame.toString('hex')];
      return Buffer.from(far.run(answer).trim(), 'hex');
    };
    old.run(['sysctl', '-qw', 'net.ipv4.tcp_syncookies=2']);
    try {
      ask(listener);
      const answer = ask(server.port);
      const tcp = client.address.includes(':') ? 54 : 34;
      expect(answer.readUInt8(tcp + 13) & (SYN | ACK)).toBe(SYN | ACK);
      return { seq: seq + 1, ack: (answer.readUInt32BE(tcp + 4) + 1) >>> 0 };
    } finally {
      old.run(['sysctl', '-qw', 'net.ipv4.tcp_syncookies=1']);
    }
  }

  #wireToOld(): Wire {
    const { far, old } = this.namespaces;
    return { source: far.mac('toold'), destination: old.mac('far0') };
  }
}

export interface Tuple {
  client: End;
  server: End;
  connection: Awaited<ReturnType<Endpoint['connect']>>;
}

function hold(namespace: Namespace, held: readonly string[]): void {
  for (const address of held) {
    const nodad = address.includes(':') ? ['nodad'] : [];
    namespace.ip('address', 'add', `${address}/${address.includes(':') ? 128 : 32}`, 'dev', 'lo', ...nodad);
  }
}

function route(namespace: Namespace, address: string, gateway: string | undefined): void {
  namespace.ip('route', 'add', address, 'via', gateway ?? '');
}

export function ifindexOf(namespace: Namespace, ifname: string): number {
  const links: unknown = JSON.parse(namespace.ip('-j', 'link', 'show', 'dev', ifname));
  const index = (links as { ifindex: number }[])[0]?.ifindex;
  if (index === undefined) throw new Error(`${namespace.name}: no ${ifname}`);
  return index;
}

/** A state directory with its programs, pinned below `parent`. */
export class Loaded {
  readonly native: Native;
  readonly state: State;
  readonly directory: string;
  readonly tag: string;
  #replaced: { tag: string; programs: readonly string[] } | undefined;

  constructor(native: Native, parent: string, tag: string, variant: number, directFlowsPerPod: number) {
    this.native = native;
    this.tag = tag;
    this.directory = join(parent, tag);
    native.makeDirectory(this.directory, 0o700);
    native.createState(this.directory, { maxPods: 16, maxFlows: 4096, directFlowsPerPod, marks: MARKS, variant });
    this.state = native.openState(this.directory);
    native.loadPrograms(this.state, this.directory, tag);
  }

  /** Where a program is pinned. */
  pathOf(program: ProgramName): string {
    const tag = this.#replaced?.programs.includes(program) ? this.#replaced.tag : this.tag;
    return join(this.directory, 'programs', tag, program);
  }

  /** Loads the programs again, as they are now, and runs these of them from then on. Stubs go on to the first ones. */
  replace(tag: string, programs: readonly string[]): void {
    this.native.loadIdlePrograms(this.state, this.directory, tag);
    this.#replaced = { tag, programs };
  }

  /** What was counted for a device; 0 stands for proxy_ingress. */
  counters(ifindex: number): Omit<Counter, 'ifindex'>[] {
    return this.native
      .counters(this.state)
      .filter((counter) => counter.ifindex === ifindex)
      .map(({ program, reason, packets, bytes }) => ({ program, reason, packets, bytes }));
  }

  /** What a program made of `frame`, and that exactly one packet was counted for `ifindex`, for that reason. */
  expectOutcome(
    program: ProgramName,
    ifindex: number,
    frame: Uint8Array,
    result: TestRunResult,
    outcome: Outcome,
    mark: number,
  ): void {
    const { reason, destination, source } = outcome;
    const left = outcome.frame ?? frame;
    const bytes = BigInt(left.length);
    expect({
      verdict: result.verdict,
      counters: this.counters(ifindex),
      destination: macText(result.packet.subarray(0, 6)),
      source: macText(result.packet.subarray(6, 12)),
      rest: Buffer.from(result.packet.subarray(12)).toString('hex'),
      mark: result.mark,
    }).toEqual({
      verdict: outcome.verdict,
      counters: reason === null ? [] : [{ program, reason, packets: 1n, bytes }],
      destination: destination ?? macText(left.subarray(0, 6)),
      source: source ?? macText(left.subarray(6, 12)),
      rest: Buffer.from(left.subarray(12)).toString('hex'),
      mark: outcome.mark ?? mark,
    });
  }

  /** Forgets what replace() loaded. */
  restore(): void {
    if (this.#replaced === undefined) return;
    rmSync(join(this.directory, 'programs', this.#replaced.tag), { recursive: true });
    this.#replaced = undefined;
  }
}

/** The programs of one state directory, and the maps they read. */
export class Datapath extends Loaded {
  readonly node: Node;
  readonly sign: Uint8Array;
  /** "program reason" of every packet counted so far. */
  readonly seen: Set<string>;

  /** `variant`: VARIANT_* names of redirect.h without the prefix. `label` tells two of the same variant apart. */
  constructor(
    node: Node,
    seen: Set<string>,
    variant: readonly string[] = [],
    label = 'run',
    directFlowsPerPod = DIRECT_FLOWS,
  ) {
    const { native } = node;
    const variantBits = bits(native, 'VARIANT_', variant);
    super(native, node.bpffs, `${label}-${variantBits}`, variantBits, directFlowsPerPod);
    this.node = node;
    this.seen = seen;
    this.sign = native.settings(this.state).sign;
  }

  /** Everything as at the beginning of most tests: the pod enrolled, a second one too, the old proxy listening. */
  reset(): void {
    this.enrol();
    this.enrolOther();
    this.proxies([this.old()]);
    for (const ifindex of [this.node.ifindex.pod, this.node.ifindex.otherPod]) {
      this.node.native.deleteExclusions(this.state, ifindex);
    }
  }

  /** The pod: its interface and its addresses (without the VIPs). */
  enrol({ flags = [], nsid = this.node.nsid.pod }: Enrolment = {}): void {
    const { native } = this.node;
    const ifindex = this.node.ifindex.pod;
    const all = bits(native, 'INTERFACE_', ['ENROLLED', ...flags]);
    const podIfindex = 2;
    const master = 0;
    native.putInterface(this.state, ifindex, {
      podMac: POD_MAC,
      gatewayMac: GATEWAY_MAC,
      flags: all,
      podIfindex,
      nsid,
      master,
      ...NO_LISTENERS,
    });
    for (const family of families) {
      const { pod, podAtProxy, podSilent, podAtHost } = addresses[family];
      for (const address of [pod, podAtProxy, podSilent, podAtHost]) {
        native.putEndpoint(this.state, mapped(address), { ifindex, flags: all, podMac: POD_MAC }, false);
      }
    }
  }

  enrolOther(flags: readonly string[] = []): void {
    const { native } = this.node;
    const ifindex = this.node.ifindex.otherPod;
    const all = bits(native, 'INTERFACE_', ['ENROLLED', ...flags]);
    native.putInterface(this.state, ifindex, {
      podMac: OTHER_POD_MAC,
      gatewayMac: GATEWAY_MAC,
      flags: all,
      podIfindex: 2,
      nsid: -1,
      master: 0,
      ...NO_LISTENERS,
    });
    for (const family of families) {
      const record = { ifindex, flags: all, podMac: OTHER_POD_MAC };
      native.putEndpoint(this.state, mapped(addresses[family].otherPod), record, false);
    }
  }

  putEndpoint(address: string, record: EndpointRecord): void {
    this.node.native.putEndpoint(this.state, mapped(address), record, false);
  }

  forgetInterface(): void {
    this.node.native.deleteInterface(this.state, this.node.ifindex.pod);
  }

  forgetDirectFlows(): void {
    this.node.native.deleteDirectFlows(this.state, this.node.ifindex.pod);
  }

  /** Newest first. */
  proxies(proxies: readonly ProxyRecord[]): void {
    this.node.native.putProxies(this.state, 1, [...proxies]);
  }

  /** No record at all, as before the first proxy came. */
  forgetProxies(): void {
    // The addon has no such call: a map that was written once stays written.
    must(['bpftool', 'map', 'delete', 'pinned', join(this.directory, 'proxies'), 'key', '0', '0', '0', '0']);
  }

  old(fields: Partial<Omit<ProxyRecord, 'ports'>> & { ports?: Partial<ProxyRecord['ports']> } = {}): ProxyRecord {
    return this.#proxy(this.node.ifindex.old, this.node.nsid.old, OLD_MAC, fields);
  }

  new(fields: Partial<Omit<ProxyRecord, 'ports'>> & { ports?: Partial<ProxyRecord['ports']> } = {}): ProxyRecord {
    return this.#proxy(this.node.ifindex.new, this.node.nsid.new, NEW_MAC, fields);
  }

  #proxy(
    hostIfindex: number,
    nsid: number,
    mac: string,
    fields: Partial<Omit<ProxyRecord, 'ports'>> & { ports?: Partial<ProxyRecord['ports']> },
  ): ProxyRecord {
    const { ports, ...rest } = fields;
    return {
      key: new Uint8Array(32),
      netnsCookie: 0n,
      netnsIno: 0n,
      hostIfindex,
      podIfindex: 2,
      nsid,
      master: 0,
      mac,
      ...rest,
      ports: { outbound: OUTBOUND, inboundPlaintext: PLAINTEXT, inboundHBONE: HBONE, dns: 0, ...ports },
    };
  }

  /** The frame goes to a proxy, signed with `meaning`. */
  toProxy(reason: string, proxy: ProxyRecord, meaning: number, mark = 0): Outcome {
    return { verdict: VERDICT.REDIRECT, reason, destination: proxy.mac, source: this.signed(meaning), mark };
  }

  signed(meaning: number): string {
    return macText(Uint8Array.from([...this.sign, meaning]));
  }

  /** Runs a program once. */
  run(program: ProgramName, frame: Uint8Array, skb: SkbFields = {}): Promise<TestRunResult> {
    const runner = program === 'proxy_ingress' ? this.node.inOld : this.node.runner;
    return runner.testRun({
      path: this.pathOf(program),
      packet: frame,
      skb: {
        mark: skb.mark ?? FOREIGN_MARK,
        ingressIfindex: skb.ingressIfindex ?? 0,
        ifindex: skb.ifindex ?? this.#device(program),
      },
    });
  }

  /** Runs a program once and asserts verdict, frame, mark, and that exactly one packet was counted, for that reason. */
  async check(program: ProgramName, frame: Uint8Array, outcome: Outcome, skb: SkbFields = {}): Promise<void> {
    // The device's index in the proxy's namespace means nothing on the node.
    const counted = program === 'proxy_ingress' ? 0 : (skb.ifindex ?? this.#device(program));
    this.node.native.deleteCounters(this.state, counted);
    const result = await this.run(program, frame, skb);
    for (const { program, reason } of this.counters(counted)) this.seen.add(`${program} ${reason}`);
    this.expectOutcome(program, counted, frame, result, outcome, skb.mark ?? FOREIGN_MARK);
  }

  #device(program: ProgramName): number {
    if (program === 'proxy_ingress') return 1;
    return program.startsWith('pod') ? this.node.ifindex.pod : this.node.ifindex.old;
  }
}

function bits(native: Native, prefix: string, names: readonly string[]): number {
  return names.reduce((all, name) => {
    const bit = native.flags[prefix + name];
    if (bit === undefined) throw new TypeError(`no flag ${prefix}${name} in redirect.h`);
    return all | bit;
  }, 0);
}
