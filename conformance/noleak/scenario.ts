// SPDX-License-Identifier: Apache-2.0
//
// Traffic on a throw-away node while things are done to the system. It keeps the ledger of what was sent and what may
// go direct, and hands it with the captures to the judge.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { Connection, Endpoint } from '../e2e/endpoint.ts';
import { ACK, type Frame, SYN, tcpFrame } from '../e2e/frames.ts';
import { HAProxy, INNER_PORT } from '../e2e/haproxy.ts';
import {
  type Addresses,
  type Family,
  families,
  gateway,
  outsideGateway,
  outsiderAddress,
  Pod,
  type PodOptions,
  sysctl,
  Topology,
} from '../e2e/topology.ts';
import { must, type Namespace, type Outcome, type Running, until } from '../netns.ts';
import { type Enrolment, type Flow, judge, type Vantage, type Verdict } from './judge.ts';
import { fragments, withExtensions } from './packets.ts';

const PORT = INNER_PORT;
const FIRST_PORT = 10_000;
const LAST_PORT = 32_767;
/** Flows after which small connections stop in the background, so that the steps do not run out of ports. */
const ENOUGH = 18_000;
const RST = 0x04;
const PSH = 0x08;

export interface Options {
  /** The executable under test. */
  executable: string;
  primary: 'ptp' | 'bridge';
  hook: 'tcx' | 'clsact';
  /** Pods that come and go. 0: only what shows leaky programs, without what is done to plugin and state. */
  churn: number;
  /** The maps of flows as small as they may be: connections that are open lose their entries. */
  smallMaps?: boolean;
  /** Reproduces a run's random choices. */
  seed: number;
  say: (line: string) => void;
}

/** Something that must hold besides the judge's verdict. */
export interface Check {
  name: string;
  ok: boolean;
  details: string;
}

export interface Report {
  verdict: Verdict;
  checks: Check[];
  /** Flows generated, and completed, by what generated them. */
  flows: Record<string, { begun: number; completed: number }>;
  seconds: number;
}

/** Who can open and accept connections. */
interface Actor {
  label: string;
  addresses: Addresses;
  endpoint: Endpoint;
  pod?: Pod;
}

interface Held {
  from: Actor;
  flow: Flow;
  connection: Connection;
}

/** Numbers in [0, 1) (mulberry32). */
function randomNumbers(from: number): () => number {
  let state = from;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}

/** Matches every packet, and no filter behind it is asked (TC_ACT_OK). */
const endOfChain = ['prio', '1', 'protocol', 'all', 'u32', 'match', 'u32', '0', '0', 'flowid', '1:1'];

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** tcpdump on eth0 of a namespace, both directions, whole headers and the beginning of the payload. */
class Recording {
  readonly vantage: Vantage;
  readonly #process: Running;

  private constructor(vantage: Vantage, process: Running) {
    this.vantage = vantage;
    this.#process = process;
  }

  static async start(topology: Topology, namespace: Namespace, name: string, addresses: Addresses): Promise<Recording> {
    const file = join(topology.testbed.directory(`recording.${name}`), 'packets');
    const argv = [
      'tcpdump',
      '-nn',
      '-U',
      '--immediate-mode',
      '-B',
      '32768',
      '-s',
      '256',
      '-Z',
      'root',
      '-i',
      'eth0',
      '-w',
      file,
    ];
    const process = topology.testbed.start(namespace.argv(argv));
    await until(`tcpdump at ${name}`, () => {
      if (!process.alive) throw new Error(`tcpdump at ${name} ended: ${process.output}`);
      return process.output.includes('listening on');
    });
    return new Recording({ name, file, addresses: Object.values(addresses) }, process);
  }

  /**
   * Ends it when `last`, a payload, is in the file: what came before it is too. Throws if the kernel had to drop packets,
   * because then nothing is proved.
   */
  async stop(last: string): Promise<Vantage> {
    await until(`the last packet at ${this.vantage.name}`, () => readFileSync(this.vantage.file).includes(last));
    await this.#process.stop('SIGINT');
    const dropped = /(\d+) packets? dropped by kernel/.exec(this.#process.output)?.[1];
    if (dropped !== '0') throw new Error(`tcpdump at ${this.vantage.name}: ${this.#process.output}`);
    return this.vantage;
  }
}

class Scenario {
  readonly options: Options;
  readonly topology: Topology;
  readonly flows: Flow[] = [];
  readonly enrolments: Enrolment[] = [];
  readonly proxies: string[] = [];
  readonly checks: Check[] = [];
  /** Plugin runs that were to be killed, and those that were killed before they had ended. */
  readonly kills = { tried: 0, done: 0 };
  readonly held: Held[] = [];
  readonly outsider: Actor;
  readonly host: Actor;
  readonly #random: () => number;
  readonly #current = new Map<Actor, Enrolment[]>();
  readonly #generators: Promise<void>[] = [];
  #stopping = false;

  constructor(options: Options) {
    this.options = options;
    this.#random = randomNumbers(options.seed);
    this.topology = new Topology({
      primary: options.primary,
      hook: options.hook,
      rpFilter: 1,
      entry: { maxPods: 16, ...(options.smallMaps && { maxFlows: 64, directFlowsPerPod: 16 }) },
      plugin: options.executable,
    });
    this.outsider = { label: 'outsider', addresses: outsiderAddress, endpoint: this.topology.outsider };
    this.host = { label: 'host', addresses: gateway, endpoint: this.topology.host };
  }

  async pod(label: string, options: PodOptions = {}): Promise<Actor> {
    const pod = this.topology.pod(label, options);
    await this.topology.addPrimary(pod);
    const actor = { label, addresses: pod.addresses, endpoint: pod.endpoint, pod };
    await this.topology.addOurs(pod);
    if (options.enroll) this.enrolled(actor);
    return actor;
  }

  enrolled(actor: Actor): void {
    const from = Date.now();
    const windows = families.map((family) => ({ address: actor.addresses[family], from }));
    this.enrolments.push(...windows);
    this.#current.set(actor, windows);
  }

  /** To be called before what ends the enrolment begins. */
  leaves(actor: Actor): void {
    const to = Date.now();
    for (const window of this.#current.get(actor) ?? []) window.to = to;
    this.#current.delete(actor);
  }

  remaining(): Actor[] {
    return [...this.#current.keys()];
  }

  isEnrolled(actor: Actor): boolean {
    return this.#current.has(actor);
  }

  flow(from: Actor, family: Family, what: string, may: Flow['may'], client = from.addresses[family]): Flow {
    const port = FIRST_PORT + this.flows.length;
    if (port > LAST_PORT) throw new Error('every source port has been used');
    const flow: Flow = { client, port, what, marker: `noleak-${port.toString(36)};`, may };
    this.flows.push(flow);
    return flow;
  }

  /** Between sockets: what the generator knows when it begins. */
  between(from: Actor, to: Actor, family: Family, what: string): Flow {
    const direct = from === this.host || !(this.isEnrolled(from) || this.isEnrolled(to));
    return this.flow(from, family, what, direct ? 'direct' : 'proxied');
  }

  connect(from: Actor, to: Actor, family: Family, flow: Flow, timeout: number): Promise<Connection> {
    return from.endpoint.connect(to.addresses[family], PORT, { sourcePort: flow.port, timeout });
  }

  /** A small connection. That it fails while nobody proxies is right; whether it was direct is for the judge. */
  async small(from: Actor, to: Actor, family: Family, timeout = 900): Promise<boolean> {
    const flow = this.between(from, to, family, 'small');
    return this.carry(from, to, family, flow, timeout);
  }

  async carry(from: Actor, to: Actor, family: Family, flow: Flow, timeout: number): Promise<boolean> {
    try {
      const connection = await this.connect(from, to, family, flow, timeout);
      await from.endpoint.send(connection, flow.marker);
      flow.completed = (await from.endpoint.finish(connection)).startsWith(flow.marker);
    } catch {
      return false;
    }
    return flow.completed;
  }

  pick<T>(list: readonly T[]): T {
    const item = list[Math.floor(this.#random() * list.length)];
    if (item === undefined) throw new Error('nothing to pick from');
    return item;
  }

  /** Small connections, one after the other, until stopTraffic(). */
  generate(from: Actor, to: readonly Actor[]): void {
    const loop = async () => {
      while (!this.#stopping && this.flows.length < ENOUGH) {
        await this.small(from, this.pick(to), this.pick(families));
        await pause(20);
      }
    };
    this.#generators.push(loop());
  }

  async stopTraffic(): Promise<void> {
    this.#stopping = true;
    await Promise.all(this.#generators);
  }

  /** Each of these must work: generators that cannot send would prove nothing. */
  async works(name: string, pairs: readonly (readonly [Actor, Actor])[]): Promise<void> {
    const failed: string[] = [];
    const tries = pairs.flatMap(([from, to]) =>
      families.map(async (family) => {
        if (!(await this.small(from, to, family, 5_000))) failed.push(`${from.label} to ${to.label}, IPv${family}`);
      }),
    );
    await Promise.all(tries);
    this.check(`${name}: connections work`, failed.length === 0, failed.join('; '));
  }

  check(name: string, ok: boolean, details: string): void {
    this.checks.push({ name, ok, details });
    if (!ok) this.options.say(`check failed: ${name}: ${details}`);
  }

  async hold(from: Actor, to: Actor): Promise<void> {
    for (const family of families) {
      const flow = this.between(from, to, family, 'held');
      this.held.push({ from, flow, connection: await this.connect(from, to, family, flow, 5_000) });
    }
    await this.poke();
  }

  /** Data on every held connection. An error is what happens to one whose proxy is gone. */
  async poke(): Promise<void> {
    await Promise.allSettled(
      this.held.map(({ from, flow, connection }) => from.endpoint.send(connection, flow.marker)),
    );
  }

  async frame(
    from: Actor,
    family: Family,
    what: string,
    may: Flow['may'],
    make: (base: Frame) => Uint8Array[],
    to: Actor,
  ): Promise<void> {
    const flow = this.flow(from, family, what, may);
    const { pod } = from;
    if (!pod) throw new Error(`${from.label} is no pod`);
    const neighbour = to.pod && this.options.primary === 'bridge' ? to.pod.mac : pod.gatewayMac;
    const frames = make({
      source: pod.mac,
      destination: neighbour,
      from: flow.client,
      to: to.addresses[family],
      sourcePort: flow.port,
      destinationPort: PORT,
    });
    for (const frame of frames) await from.endpoint.frame('eth0', frame);
  }

  /** Frames that try to get past the parser, from an enrolled pod and towards one. */
  async frames(enrolled: Actor, plain: Actor): Promise<void> {
    for (const family of families) {
      for (const [from, to] of [
        [enrolled, this.outsider],
        [enrolled, plain],
        [plain, enrolled],
      ] as const) {
        for (const protocols of [[0x8100], [0x8100, 0x8100], [0x88a8, 0x8100], [0x8100, 0x8100, 0x8100]] as const) {
          const tags = protocols.map((protocol) => ({ protocol, id: 0 }));
          await this.frame(from, family, 'tagged frame', 'proxied', (base) => [tcpFrame({ ...base, tags })], to);
        }
        for (const [flags, length] of [
          [SYN, 8],
          [ACK, 8],
          [SYN, 16],
          [ACK, 16],
        ] as const) {
          const id = this.flows.length;
          const cut = (base: Frame) => fragments(tcpFrame({ ...base, flags }), length, id);
          await this.frame(from, family, 'fragments', 'proxied', cut, to);
          await this.frame(from, family, 'fragments', 'proxied', (base) => cut(base).reverse(), to);
        }
        for (const flags of [SYN, SYN | ACK, ACK, ACK | PSH, ACK | 1, RST, RST | ACK, 0, 0x3f]) {
          await this.frame(from, family, 'segment of no flow', 'proxied', (base) => [tcpFrame({ ...base, flags })], to);
        }
        if (family === 4) continue;
        for (const count of [1, 3, 6, 7]) {
          const extended = (base: Frame) => [withExtensions(tcpFrame(base), count)];
          await this.frame(from, family, 'extension headers', 'proxied', extended, to);
        }
      }
      const spoofed = this.flow(enrolled, family, 'spoofed source', 'nothing', plain.addresses[family]);
      const base = { source: enrolled.pod?.mac ?? '', destination: enrolled.pod?.gatewayMac ?? '' };
      const ends = {
        from: spoofed.client,
        to: outsiderAddress[family],
        sourcePort: spoofed.port,
        destinationPort: PORT,
      };
      for (const flags of [SYN, ACK]) await enrolled.endpoint.frame('eth0', tcpFrame({ ...base, ...ends, flags }));
    }
  }

  /**
   * The programs tell each other about a frame by its source MAC. Whoever learns it must not be able to use it: what
   * arrives at the proxy's eth0 shows it, and another pod of the bridge sends the same.
   */
  async forge(proxy: Pod, enrolled: Actor, plain: Actor): Promise<void> {
    if (this.options.primary !== 'bridge') return; // from a ptp veth no frame reaches the proxy's
    const filter = `src host ${enrolled.addresses[4]} and dst port ${PORT} and tcp[tcpflags] & tcp-syn != 0`;
    const child = spawn('timeout', [
      '10',
      ...proxy.netns.argv(['tcpdump', '-lenn', '-c', '1', '-Q', 'in', '-i', 'eth0', filter]),
    ]);
    let text = '';
    child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
    });
    let listening = '';
    child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
      listening += chunk;
    });
    const ended = once(child, 'close');
    await until('tcpdump at the proxy', () => listening.includes('listening on'));
    await this.small(enrolled, this.outsider, 4, 5_000);
    await ended;
    const sign = /^\S+ ([0-9a-f:]{17}) > /m.exec(text)?.[1];
    if (sign === undefined) throw new Error(`no SYN of ${enrolled.label} at the proxy: ${text}${listening}`);
    for (const family of families) {
      for (const flags of [SYN, ACK]) {
        const flow = this.flow(plain, family, 'forged frame', 'nothing');
        const frame = tcpFrame({
          source: sign,
          destination: proxy.mac,
          from: flow.client,
          to: outsiderAddress[family],
          sourcePort: flow.port,
          destinationPort: PORT,
          flags,
        });
        await plain.endpoint.frame('eth0', frame);
      }
    }
  }

  /** A pod whose first connections begin in the moment in which ADD returns. */
  async newborn(peers: readonly Actor[]): Promise<void> {
    const pod = this.topology.pod('newborn', { enroll: true });
    await this.topology.addPrimary(pod);
    const actor: Actor = { label: pod.label, addresses: pod.addresses, endpoint: pod.endpoint, pod };
    // Its process runs before ADD does.
    await actor.endpoint.listen(PORT);
    await this.topology.addOurs(pod);
    this.enrolled(actor);
    const first = peers.flatMap((peer) => families.map((family) => this.small(actor, peer, family)));
    await Promise.all(first);
    this.leaves(actor);
    await this.topology.delete(pod);
  }

  /**
   * Somebody else's filter that ends the chain is on both hooks before ADD. On clsact it would run first, so ADD must
   * refuse; TCX programs run before any filter.
   */
  async crowded(peer: Actor): Promise<void> {
    const { topology } = this;
    const pod = topology.pod('crowded', { enroll: true });
    await topology.addPrimary(pod);
    const actor: Actor = { label: pod.label, addresses: pod.addresses, endpoint: pod.endpoint, pod };
    topology.node.run(['tc', 'qdisc', 'add', 'dev', pod.hostIfname, 'clsact']);
    for (const direction of ['ingress', 'egress']) {
      topology.node.run(['tc', 'filter', 'add', 'dev', pod.hostIfname, direction, ...endOfChain]);
    }
    const added = await this.verb('ADD', pod);
    if (this.options.hook === 'clsact') {
      const refused = added.status === 1 && /"code":\s*102/.test(added.stdout);
      this.check('ADD behind a filter that ends the chain is refused with code 102', refused, added.stdout);
    } else {
      this.check('ADD before a filter that ends the chain', added.status === 0, added.stdout);
    }
    if (added.status === 0) this.enrolled(actor);
    await Promise.all(families.map((family) => this.small(actor, peer, family, 5_000)));
    if (this.isEnrolled(actor)) this.leaves(actor);
    await topology.delete(pod);
  }

  async proxy(label: string, syncookies: 1 | 2): Promise<{ pod: Pod; haproxy: HAProxy }> {
    const pod = this.topology.pod(label, { namespace: 'istio-system' });
    // 2: every connection begins with a SYN cookie, as under a flood.
    sysctl(pod.netns, { 'net.ipv4.tcp_syncookies': syncookies });
    await this.topology.add(pod);
    this.proxies.push(...Object.values(pod.addresses));
    const haproxy = new HAProxy(this.topology.testbed, pod.netns, label);
    await haproxy.start();
    return { pod, haproxy };
  }

  /** A verb of the plugin under test. */
  async verb(
    command: string,
    pod: Pod,
    more: { timeout?: number; entry?: Record<string, unknown> } = {},
  ): Promise<Outcome> {
    return this.topology.node.exec([this.options.executable], {
      env: this.topology.environment(command, pod),
      input: JSON.stringify({ ...this.topology.entry(pod), ...more.entry }),
      ...(more.timeout !== undefined && { timeout: more.timeout }),
    });
  }

  command(...args: string[]): Promise<Outcome> {
    const { stateDir, runDir, node } = this.topology;
    return node.exec([this.options.executable, ...args, '--state-dir', stateDir, '--run-dir', runDir]);
  }

  /** One pod's life. Every third ADD and DEL is killed after a random time and done again, as a runtime does. */
  async life(number: number, slot: { netns: Namespace; endpoint: Endpoint }, peers: readonly Actor[]): Promise<void> {
    const { topology } = this;
    const pod = new Pod(topology.testbed, slot.netns, `churn${number}`, { enroll: true });
    await topology.addPrimary(pod);
    const actor: Actor = { label: pod.label, addresses: pod.addresses, endpoint: slot.endpoint, pod };
    const killed = async (verb: string) => {
      const outcome = await this.verb(verb, pod, { timeout: 10 + Math.floor(this.#random() * 250) });
      if (!outcome.timedOut) this.check(`${verb} of ${pod.label}`, outcome.status === 0, outcome.stdout);
      return outcome.timedOut;
    };
    if (number % 3 === 0) {
      this.kills.tried += 1;
      if (await killed('ADD')) this.kills.done += 1;
      const undone = await this.verb('DEL', pod);
      this.check(`DEL of ${pod.label} after a killed ADD`, undone.status === 0, undone.stdout);
    }
    await topology.addOurs(pod);
    this.enrolled(actor);
    const bursts = peers.flatMap((peer) => families.map((family) => this.small(actor, peer, family, 5_000)));
    const worked = await Promise.all(bursts);
    this.check(
      `${pod.label} is connected`,
      worked.every(Boolean),
      `${worked.filter(Boolean).length} of ${worked.length}`,
    );
    await this.frame(
      actor,
      this.pick(families),
      'segment of no flow',
      'proxied',
      (base) => [tcpFrame({ ...base, flags: ACK })],
      this.outsider,
    );
    const during = peers.map((peer) => this.small(actor, peer, this.pick(families)));
    this.leaves(actor);
    if (number % 3 === 1) {
      this.kills.tried += 1;
      if (await killed('DEL')) this.kills.done += 1;
    }
    await topology.deleteOurs(pod);
    await topology.deletePrimary(pod);
    await Promise.all(during);
  }
  async churn(count: number, peers: readonly Actor[]): Promise<void> {
    const { topology } = this;
    const slots = ['slot1', 'slot2']
      .map((label) => topology.pod(label))
      .map(({ netns, endpoint }) => ({ netns, endpoint }));
    let next = 0;
    await Promise.all(
      slots.map(async (slot) => {
        while (next < count) {
          const number = next++;
          await this.life(number, slot, peers);
        }
      }),
    );
    this.check('kills in ADD and DEL', this.kills.tried >= count / 2, JSON.stringify(this.kills));
  }

  /** Until the maps have no more room: what ADD refuses is not enrolled, what it takes is. */
  async fill(peers: readonly Actor[]): Promise<void> {
    const { topology } = this;
    const added: Actor[] = [];
    let refused: Outcome | undefined;
    let last: Pod | undefined;
    for (let number = 0; number < 20 && refused === undefined; number++) {
      const pod = topology.pod(`fill${number}`, { enroll: true });
      await topology.addPrimary(pod);
      const actor = { label: pod.label, addresses: pod.addresses, endpoint: undefined as unknown as Endpoint, pod };
      const outcome = await this.verb('ADD', pod);
      if (outcome.status !== 0) {
        refused = outcome;
        last = pod;
        continue;
      }
      this.enrolled(actor);
      added.push(actor);
    }
    this.check(
      'a full map refuses ADD with code 103',
      /"code":\s*103/.test(refused?.stdout ?? ''),
      refused?.stdout ?? 'all were taken',
    );
    // The last one that was taken had all it needs.
    const [actor] = added.slice(-1);
    if (actor?.pod) {
      actor.endpoint = actor.pod.endpoint;
      await this.works(
        'last pod that found room',
        peers.map((peer) => [actor, peer] as const),
      );
    }
    for (const one of added) {
      this.leaves(one);
      if (one.pod) await topology.delete(one.pod);
    }
    if (last) await topology.delete(last);
  }

  close(): void {
    this.#stopping = true;
    this.topology.close();
  }
}

/** One run on one throw-away node. */
export async function run(options: Options): Promise<Report> {
  const started = performance.now();
  const s = new Scenario(options);
  const { topology, outsider, host } = s;
  const step = (name: string) => options.say(`${((performance.now() - started) / 1000).toFixed(1)} s  ${name}`);
  try {
    step('pods');
    const client = await s.pod('client', { enroll: true });
    const server = await s.pod('server', { enroll: true });
    const plain = await s.pod('plain');
    const veteran = await s.pod('veteran');
    const leaver = await s.pod('leaver', { enroll: true });
    for (const actor of [outsider, server, plain, client]) await actor.endpoint.listen(PORT);
    const recordings = [await Recording.start(topology, topology.outside, 'outsider', outsiderAddress)];
    for (const { pod, label, addresses } of [server, plain]) {
      if (pod) recordings.push(await Recording.start(topology, pod.netns, label, addresses));
    }

    step('no proxy yet; a running pod is enrolled');
    for (const to of [outsider, plain]) await s.hold(veteran, to);
    const early = await Promise.all(families.map((family) => s.small(client, outsider, family)));
    s.check('closed without a proxy', !early.includes(true), `${early}`);
    const enrolled = await s.command('enroll', '--netns', veteran.pod?.netns.path ?? '', '--pod', 'default/veteran');
    s.check('enroll', enrolled.status === 0, enrolled.stderr);
    s.enrolled(veteran);

    step('a proxy');
    let proxy = await s.proxy('ztunnel-1', 1);
    const everyone = [client, server, plain, veteran, leaver, outsider, host];
    const servers = [outsider, server, plain];
    const pairs = [
      [client, outsider],
      [client, server],
      [client, plain],
      [outsider, server],
      [plain, server],
      [host, server],
      [veteran, outsider],
      [leaver, outsider],
    ] as const;
    await s.works('with the proxy', pairs);
    for (const from of everyone) {
      s.generate(
        from,
        servers.filter((to) => to !== from && (from !== host || to !== outsider) && (from !== plain || to === server)),
      );
    }
    await s.newborn([outsider, server]);
    await s.crowded(outsider);
    await s.frames(client, plain);
    await s.forge(proxy.pod, client, plain);
    const holdAll = async () => {
      for (const [from, to] of [
        [client, outsider],
        [client, server],
        [outsider, server],
        [plain, server],
        [veteran, outsider],
        [leaver, outsider],
      ] as const) {
        // Of a pod enrolled while it ran, a proxied connection whose entry was evicted cannot be told from one that is
        // older than the enrolment (README, Limits): it leaks when its proxy dies, and is left out here knowingly.
        if (from === veteran && options.smallMaps) continue;
        await s.hold(from, to);
      }
    };
    await holdAll();

    step('the proxy is killed');
    await proxy.haproxy.kill();
    await s.poke();
    await s.frames(client, plain);
    await proxy.haproxy.start();
    await s.poke();
    await s.works('with the proxy started again', pairs);

    step('the proxy pod is replaced: the old one goes silently, the new one answers with SYN cookies');
    await holdAll();
    const old = proxy;
    proxy = await s.proxy('ztunnel-2', 2);
    await s.works('with the new proxy', pairs);
    await s.poke();
    // Network first: no FIN of its sockets gets out.
    await topology.delete(old.pod);
    await old.haproxy.kill();
    await s.poke();
    await s.works('with the old proxy gone', pairs);
    await s.poke();
    await s.forge(proxy.pod, client, plain);

    if (options.churn > 0) {
      step(`${options.churn} pods come and go, plugin killed`);
      await s.churn(options.churn, [outsider, server]);
      step('the maps fill up');
      await s.fill([outsider, server]);
      step('unenrol under load');
      s.leaves(leaver);
      const left = await s.command('unenroll', '--pod', 'default/leaver');
      s.check('unenroll', left.status === 0, left.stderr);
      await s.works('after unenrol', [
        [leaver, outsider],
        [leaver, server],
        [client, outsider],
      ]);
      await uninstall(s, client, server, step);
    }
    await s.stopTraffic();
    const vantages: Vantage[] = [];
    for (const [index, actor] of [outsider, server, plain].entries()) {
      const from = actor === outsider ? { ...host, addresses: outsideGateway } : host;
      const last = s.flow(from, 4, 'last', 'direct');
      await s.carry(from, actor, 4, last, 5_000);
      const vantage = await recordings[index]?.stop(last.marker);
      if (vantage) vantages.push(vantage);
    }
    step('judging');
    const { flows, enrolments, proxies } = s;
    const verdict = judge(vantages, { ports: [FIRST_PORT, LAST_PORT], flows, enrolments, proxies });
    return { verdict, checks: s.checks, flows: count(flows), seconds: (performance.now() - started) / 1000 };
  } finally {
    s.close();
  }
}

/** Root takes the programs away behind the plugin's back: from then on nothing is promised, but it must be said. */
async function uninstall(s: Scenario, victim: Actor, server: Actor, step: (name: string) => void): Promise<void> {
  const { stateDir } = s.topology;
  const { pod } = victim;
  if (!pod) throw new Error(`${victim.label} is no pod`);
  s.leaves(victim);
  if (s.options.hook === 'tcx') {
    step("a program is detached behind the plugin's back");
    const shown = JSON.parse((await s.command('pods', '-o', 'json')).stdout) as { key: string; name: string }[];
    const directory = join(stateDir, 'links', shown.find(({ name }) => name === victim.label)?.key ?? '');
    for (const link of readdirSync(directory)) must(['bpftool', 'link', 'detach', 'pinned', join(directory, link)]);
  } else {
    step('a filter is replaced by a foreign one');
    for (const direction of ['ingress', 'egress']) {
      const on = ['dev', pod.hostIfname, direction];
      s.topology.node.run(['tc', 'filter', 'del', ...on]);
      s.topology.node.run(['tc', 'filter', 'add', ...on, ...endOfChain]);
    }
  }
  const told = await s.command('status');
  const impaired = told.status === 1 && told.stdout.includes(`impaired: default/${victim.label}`);
  s.check('status tells that the programs of a pod are gone', impaired, told.stdout);
  const missing = await s.verb('CHECK', pod);
  s.check('CHECK tells that the programs of a pod are gone', /"code":\s*105/.test(missing.stdout), missing.stdout);
  step('the state directory is removed by hand');
  for (const actor of s.remaining()) s.leaves(actor);
  rmSync(stateDir, { recursive: true });
  const status = await s.command('status');
  s.check('status: removed by hand', status.status === 1 && status.stdout.includes('has been removed'), status.stdout);
  if (!server.pod) return;
  const check = await s.verb('CHECK', server.pod);
  s.check('CHECK: removed by hand', check.status === 1 && check.stdout.includes('by hand'), check.stdout);
  const ready = await s.verb('STATUS', server.pod, { entry: { cniVersion: '1.1.0' } });
  s.check('STATUS: removed by hand', ready.status === 1 && ready.stdout.includes('by hand'), ready.stdout);
}

function count(flows: readonly Flow[]): Report['flows'] {
  const counts: Report['flows'] = {};
  for (const { what, completed } of flows) {
    const one = counts[what] ?? { begun: 0, completed: 0 };
    counts[what] = { begun: one.begun + 1, completed: one.completed + (completed ? 1 : 0) };
  }
  return counts;
}
