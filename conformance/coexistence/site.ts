// SPDX-License-Identifier: Apache-2.0
//
// A node with a proxy (HAProxy), and on it one pod after the other: its chain run plugin by plugin as libcni runs it,
// with looks at the kernel in between.

import { strict as assert } from 'node:assert';
import { join } from 'node:path';
import { DEBIAN, EXECUTABLE } from '../chain.ts';
import type { Connection, Endpoint } from '../e2e/endpoint.ts';
import { HAProxy, INNER_PORT, type Proxied } from '../e2e/haproxy.ts';
import {
  BRIDGE,
  families,
  gateway,
  outsideGateway,
  outsiderAddress,
  type Pod,
  requireExecutable,
  Topology,
} from '../e2e/topology.ts';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { removeNetns, until } from '../netns.ts';
import {
  type JsonObject,
  type NetworkList,
  type PluginConf,
  PluginError,
  Runtime,
  type RuntimeConf,
} from '../runtime.ts';
import { type Combination, type Ending, endingOf } from './combinations.ts';
import { Foreign } from './foreign.ts';

const PORT = INNER_PORT;
const FLOW_PORT = 8100;
const MTU = 1400;
/** 8 Mbit/s, and a burst of a tenth of a second: 2 MB take 1.9 s. */
const RATE = { ingressRate: 8_000_000, ingressBurst: 800_000, egressRate: 8_000_000, egressBurst: 800_000 };
const TRANSFER = 2_000_000;
const SHAPED_MS = 1_200;

/** Objects of ours; everything else has to be the same before and after our ADD and DEL. */
const OURS = /ambient-redirect|pod_(egress|ingress)/;
/** Comes with our filters and stays, as it may be shared by then; kernel-state.ts leaves out one that is empty. */
const CLSACT = /qdisc \S+ ffff:fff1$/;
/** What the kernel sets on a device without queue when it gets its first qdisc, a clsact too (sch_api.c). */
const QUEUE_LENGTH = /,"txqlen":1000/;

export interface Subject {
  pod: Pod;
  rt: RuntimeConf;
  list: (plugins: readonly PluginConf[]) => NetworkList;
  hostIfname: string;
  hostIfindex: number;
}

export class Site {
  readonly topology: Topology;
  readonly runtime: Runtime;
  readonly foreign: Foreign;
  readonly primary: Combination['primary'];
  readonly hook: Combination['hook'];
  readonly #proxy: Pod;
  readonly #directory: string;
  #haproxy: HAProxy | undefined;
  #pods = 0;
  /** Each connection has its own, below the ephemeral range: that is how it is found in the proxy's log. */
  #sourcePort = 21_000;

  constructor(primary: Combination['primary'], hook: Combination['hook']) {
    requireExecutable();
    this.primary = primary;
    this.hook = hook;
    this.topology = new Topology({ primary, hook, rpFilter: 1, plugin: EXECUTABLE });
    try {
      this.#directory = this.topology.testbed.directory('matrix');
      this.runtime = new Runtime({
        path: [DEBIAN, join(EXECUTABLE, '..')],
        cacheDir: join(this.#directory, 'cache'),
        node: this.topology.node,
      });
      this.foreign = new Foreign(this.topology.testbed, this.topology.node, this.topology.bpffs);
      this.#proxy = this.topology.pod('ztunnel-matrix', { namespace: 'istio-system' });
    } catch (error) {
      this.topology.close();
      throw error;
    }
  }

  /** The proxy, the outsider's servers. */
  async start(): Promise<void> {
    const { topology } = this;
    await topology.add(this.#proxy);
    this.#haproxy = new HAProxy(topology.testbed, this.#proxy.netns, 'matrix');
    await this.#haproxy.start();
    await topology.outsider.listen(PORT);
    const server = ['/usr/bin/python3', join(import.meta.dirname, 'flow.py'), String(FLOW_PORT)];
    const flow = topology.testbed.start(topology.outside.argv(server));
    await until('flow.py listens', () => flow.output.includes('ready'));
  }

  close(): void {
    this.topology.close();
  }

  subject(): Subject {
    this.#pods += 1;
    const pod = this.topology.pod(`pod${this.#pods}`);
    const args = Object.entries({
      IgnoreUnknown: '1',
      K8S_POD_NAMESPACE: 'default',
      K8S_POD_NAME: pod.label,
      K8S_POD_INFRA_CONTAINER_ID: pod.containerId,
      K8S_POD_UID: crypto.randomUUID(),
    });
    const rt: RuntimeConf = {
      containerId: pod.containerId,
      netns: pod.netns.path,
      ifname: 'eth0',
      args,
      capabilityArgs: { 'io.kubernetes.cri.pod-annotations': { 'ambient-redirect/enroll': 'true' } },
    };
    const list = (plugins: readonly PluginConf[]) => ({ name: 'matrix', cniVersion: '1.0.0', plugins: [...plugins] });
    return { pod, rt, list, hostIfname: '', hostIfindex: 0 };
  }

  get ours(): PluginConf {
    return {
      type: 'ambient-redirect',
      enrollment: 'annotation',
      proxy: { contract: 'shared', match: { namespace: 'istio-system', name: 'ztunnel-*' } },
      hook: this.hook,
      stateDir: this.topology.stateDir,
      runDir: this.topology.runDir,
      capabilities: { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true },
    };
  }

  get primaryConf(): PluginConf {
    // The proxy has the first addresses of the same subnets.
    const starts = { 4: ['10.88.0.0/24', '10.88.0.100'], 6: ['fd88::/64', 'fd88::100'] } as const;
    const ranges = families.map((family) => {
      const [subnet, rangeStart] = starts[family];
      return [{ subnet, rangeStart, gateway: gateway[family] }];
    });
    const routes = [{ dst: '0.0.0.0/0' }, { dst: '::/0' }];
    const ipam = { type: 'host-local', dataDir: join(this.#directory, 'ipam'), ranges, routes };
    const own = this.primary === 'bridge' ? { bridge: BRIDGE, isGateway: true, hairpinMode: true } : { ipMasq: false };
    return { type: this.primary, ...own, ipam };
  }

  #chainedConf(kind: Combination['chained']): PluginConf[] {
    const dataDir = join(this.#directory, kind);
    switch (kind) {
      case 'none':
        return [];
      case 'bandwidth':
        return [{ type: kind, capabilities: { bandwidth: true } }];
      case 'portmap':
        return [{ type: kind, capabilities: { portMappings: true }, snat: true }];
      case 'tuning':
        return [{ type: kind, mtu: MTU, dataDir }];
      case 'sbr':
        return [{ type: kind }];
      case 'firewall':
        return [{ type: kind, backend: 'iptables' }];
    }
  }

  /** ADD of some of the chain's plugins, after those that gave `prevResult`. */
  add(subject: Subject, plugins: readonly PluginConf[], prevResult?: JsonObject): Promise<JsonObject> {
    const [first, ...rest] = plugins;
    if (first === undefined) return Promise.resolve(prevResult ?? {});
    const given = prevResult === undefined ? first : { ...first, prevResult };
    return this.runtime.add(subject.list([given, ...rest]), subject.rt);
  }

  /** Learns the interfaces and addresses from the primary's Result. */
  async look(subject: Subject, result: JsonObject): Promise<void> {
    const { interfaces, ips } = result as unknown as {
      interfaces: { name: string; sandbox?: string }[];
      ips: { address: string }[];
    };
    subject.hostIfname = interfaces.find((one) => one.sandbox === undefined && one.name !== BRIDGE)?.name ?? '';
    for (const { address } of ips) subject.pod.addresses[address.includes(':') ? 6 : 4] = address.replace(/\/.*/, '');
    // Carrier and bridge port state change by themselves a moment after the primary plugin.
    await until(`${subject.hostIfname} is up`, () => {
      const text = this.topology.node.ip('-j', 'link', 'show', 'dev', subject.hostIfname);
      const [link] = JSON.parse(text) as { ifindex: number; operstate: string }[];
      subject.hostIfindex = link?.ifindex ?? 0;
      return link?.operstate === 'UP';
    });
  }

  state(subject: Subject): Promise<KernelState> {
    return kernelState([this.topology.node, subject.pod.netns]);
  }

  /** `doctor`'s findings about this pod's interfaces. */
  async doctor(subject: Subject): Promise<{ level: string; subject: string; text: string }[]> {
    const { stateDir, runDir } = this.topology;
    const argv = [
      EXECUTABLE,
      'doctor',
      '-o',
      'json',
      '--state-dir',
      stateDir,
      '--run-dir',
      runDir,
      '--conf-dir',
      '/nowhere',
    ];
    const { stdout } = await this.topology.node.exec(argv);
    const { findings } = JSON.parse(stdout) as { findings: { level: string; subject: string; text: string }[] };
    const ours = [` of ${subject.hostIfname}`, ` of default/${subject.pod.label}`];
    return findings.filter((one) => ours.some((end) => one.subject.endsWith(end)));
  }

  proxied(connection: Connection): Proxied[] {
    return this.#haproxy?.proxied().filter((one) => one.clientPort === connection.localPort) ?? [];
  }

  async #exchange(endpoint: Endpoint, connection: Connection): Promise<void> {
    await endpoint.exchange(connection, 20_000);
    assert.equal(await endpoint.finish(connection), 'bye\n');
  }

  /** Connects from the pod to the outsider; the source is named because sbr leaves no route without one. */
  async outbound(subject: Subject, family: 4 | 6): Promise<{ connection: Connection; proxied: Proxied[] }> {
    const { endpoint, addresses } = subject.pod;
    const options = { source: addresses[family], sourcePort: ++this.#sourcePort };
    const connection = await endpoint.connect(outsiderAddress[family], PORT, options);
    await this.#exchange(endpoint, connection);
    return { connection, proxied: this.proxied(connection) };
  }

  /** Connects from the outsider. */
  async inbound(address: string, port: number): Promise<{ connection: Connection; proxied: Proxied[] }> {
    const { outsider } = this.topology;
    const connection = await outsider.connect(address, port, { sourcePort: ++this.#sourcePort });
    await this.#exchange(outsider, connection);
    return { connection, proxied: this.proxied(connection) };
  }

  /** Runs one combination to its end. Throws where anything is not as it has to be. */
  async run(combination: Combination): Promise<Ending> {
    const { chained, position, foreign } = combination;
    const subject = this.subject();
    const { rt } = subject;
    const hostPort = 20_000 + this.#pods;
    if (chained === 'bandwidth') rt.capabilityArgs = { ...rt.capabilityArgs, bandwidth: RATE };
    if (chained === 'portmap') {
      const portMappings = [{ hostPort, containerPort: PORT, protocol: 'tcp' }];
      rt.capabilityArgs = { ...rt.capabilityArgs, portMappings };
    }
    const other = this.#chainedConf(chained);
    const before = [this.primaryConf, ...(position === 'before us' ? other : [])];
    const after = position === 'after us' ? other : [];
    const whole = [...before, this.ours, ...after];
    let ending: Ending = 'redirected';

    try {
      const first = await this.add(subject, before);
      await this.look(subject, first);
      if (foreign === 'filter') this.foreign.filter(subject.hostIfname, 'foreign_pass');
      if (foreign === 'ok filter') this.foreign.filter(subject.hostIfname, 'foreign_ok');
      if (foreign === 'tcx behind') this.foreign.tcx(subject.hostIfindex, 'foreign_pass', 'last');

      const untouched = await this.state(subject);
      const failure = await this.add(subject, [this.ours], first).then(() => undefined, asPluginError);
      assertOthersSame(untouched, await this.state(subject), 'ADD');
      if (failure !== undefined) {
        assert.equal(endingOf(combination), 'refused', `ADD: ${failure.message}`);
        assert.equal(failure.code, 102, failure.message);
        const reason =
          foreign === 'tcx behind' ? /TCX program \d+ \("?foreign_pass"?\).*"hook": "tcx"/ : /bandwidth.*"hook": "tcx"/;
        assert.match(failure.message, reason);
        ending = 'refused';
      } else {
        if (foreign === 'tcx ahead') this.foreign.tcx(subject.hostIfindex, 'foreign_pass', 'first');
        const late = await this.add(subject, after, first).then(() => undefined, asPluginError);
        if (late === undefined) await this.#judge(subject, combination, hostPort);
        else {
          assert.equal(endingOf(combination), 'impossible', `${late.type}'s ADD: ${late.message}`);
          await this.#assertFailsWithoutUs(combination, late);
          ending = 'impossible';
        }
      }
      const during = await this.state(subject);
      await this.runtime.del(subject.list([this.ours]), rt);
      const left = await this.state(subject);
      assertOthersSame(during, left, 'DEL');
      assert.deepEqual(
        [...left].filter((row) => isOurProgram(row, subject)),
        [],
        'a program of ours is left',
      );
    } finally {
      await this.remove(subject, whole);
    }
    assert.equal(ending, endingOf(combination));
    return ending;
  }

  /** CHECK of our plugin alone; what it said on stderr. */
  async check(subject: Subject): Promise<string> {
    await this.runtime.check(subject.list([this.ours]), subject.rt);
    return this.runtime.calls.at(-1)?.outcome.stderr ?? '';
  }

  /** DEL of the chain, and the namespace. */
  async remove(subject: Subject, plugins: readonly PluginConf[]): Promise<void> {
    await this.runtime.del(subject.list(plugins), subject.rt);
    removeNetns(subject.pod.netns);
  }

  async #judge(subject: Subject, combination: Combination, hostPort: number): Promise<void> {
    const { chained, foreign, family } = combination;
    const { pod } = subject;
    await pod.endpoint.listen(PORT);

    const out = await this.outbound(subject, family);
    assert.deepEqual(
      out.proxied.map(({ listener, client, destination }) => [listener, client, destination]),
      [['outbound', pod.addresses[family], outsiderAddress[family]]],
    );
    assert.equal(out.connection.seen, pod.addresses[family], 'the source that the outsider saw');
    const inward = await this.inbound(pod.addresses[family], PORT);
    const expected = [['inbound', outsiderAddress[family], pod.addresses[family], PORT]];
    assert.deepEqual(inward.proxied.map(flat), expected);
    assert.equal(inward.connection.seen, outsiderAddress[family], 'the source that the pod saw');

    if (chained === 'portmap') {
      const mapped = await this.inbound(outsideGateway[family], hostPort);
      assert.deepEqual(mapped.proxied.map(flat), expected, 'through the host port');
      assert.equal(mapped.connection.seen, outsiderAddress[family]);
    }
    if (chained === 'tuning') assert.equal(linkOf(pod).mtu, MTU);
    if (chained === 'bandwidth') {
      for (const text of [`up ${TRANSFER}\n${'x'.repeat(TRANSFER)}`, `down ${TRANSFER}\n`]) {
        const ms = await this.#transfer(subject, family, text);
        assert.ok(ms > SHAPED_MS, `${text.slice(0, 12).trim()} took ${ms.toFixed(0)} ms, the limit is gone`);
      }
    }

    // portmap 1.1.1's CHECK always fails (reference.conformance.test.ts), and Debian's sbr and firewall want more than
    // their own ADD made; what has to hold is ours.
    const said = await this.check(subject);
    const named = (await this.doctor(subject)).map(({ level, text }) => `${level}: ${text}`).join('\n');
    if (foreign !== 'tcx ahead') assert.equal(said, '', 'CHECK says nothing');
    if (foreign === 'none') assert.doesNotMatch(named, /foreign_/);
    else if (foreign === 'tcx ahead') {
      assert.match(named, /^warning: TCX program \d+ \(foreign_pass\) runs before ours/m);
      assert.match(said, /^ambient-redirect: warn: ingress of \S+: TCX program \d+ \(foreign_pass\) runs before ours/m);
    } else if (foreign === 'tcx behind') assert.match(named, /^note: TCX program \d+ \(foreign_pass\) is there too/m);
    else assert.match(named, /^note: a bpf filter of priority [12] .* is there too/m);
  }

  /** One way, `text` says which; milliseconds. */
  async #transfer({ pod }: Subject, family: 4 | 6, text: string): Promise<number> {
    const options = { source: pod.addresses[family], sourcePort: ++this.#sourcePort, banner: false };
    const connection = await pod.endpoint.connect(outsiderAddress[family], FLOW_PORT, options);
    const started = performance.now();
    const answer = await pod.endpoint.request(connection, text);
    const ms = performance.now() - started;
    assert.equal(answer.length, text.startsWith('up') ? 'done\n'.length : TRANSFER);
    assert.equal(this.proxied(connection).length, 1, 'the transfer took the proxy');
    return ms;
  }

  /** The same chain with the same foreign program, but not us, fails in the same plugin with the same words. */
  async #assertFailsWithoutUs({ chained, foreign }: Combination, failure: PluginError): Promise<void> {
    const subject = this.subject();
    subject.rt.capabilityArgs = { ...subject.rt.capabilityArgs, bandwidth: RATE };
    const others = this.#chainedConf(chained);
    try {
      const first = await this.add(subject, [this.primaryConf]);
      await this.look(subject, first);
      this.foreign.filter(subject.hostIfname, foreign === 'ok filter' ? 'foreign_ok' : 'foreign_pass');
      const alone = await this.add(subject, others, first).then(() => undefined, asPluginError);
      assert.deepEqual([alone?.type, alone?.code, alone?.message], [failure.type, failure.code, failure.message]);
    } finally {
      await this.remove(subject, [this.primaryConf, ...others]);
    }
  }
}

function asPluginError(error: unknown): PluginError {
  if (error instanceof PluginError) return error;
  throw error;
}

function flat({ listener, client, destination, destinationPort }: Proxied): unknown[] {
  return [listener, client, destination, destinationPort];
}

function linkOf(pod: Pod): { mtu: number; address: string } {
  const [link] = JSON.parse(pod.netns.ip('-j', 'link', 'show', 'dev', 'eth0')) as { mtu: number; address: string }[];
  if (link === undefined) throw new Error(`${pod.label} has no eth0`);
  return link;
}

function isOurProgram([key, value]: [string, string], { hostIfname }: Subject): boolean {
  return /^node (tcx|filter) /.test(key) && key.includes(` ${hostIfname} `) && OURS.test(value);
}

/** TCX entries are keyed by place, which shifts when a program comes or goes ahead of them: theirs in order instead. */
function others(state: KernelState): KernelState {
  const kept = new Map<string, string>();
  for (const [key, value] of state) {
    if (OURS.test(key) || OURS.test(value) || CLSACT.test(key)) continue;
    const [, hook] = /^(.* tcx \S+ \S+) \d+$/.exec(key) ?? [];
    if (hook === undefined) kept.set(key, key.includes(' link ') ? value.replace(QUEUE_LENGTH, '') : value);
    else kept.set(hook, `${kept.get(hook) ?? ''}${value}\n`);
  }
  return kept;
}

function assertOthersSame(before: KernelState, after: KernelState, verb: string): void {
  assert.deepEqual(differences(others(before), others(after)), [], `${verb} changed what is not ours`);
}
