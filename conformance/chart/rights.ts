// SPDX-License-Identifier: Apache-2.0
//
// What each right of the chart's pods is for: the pods run on a real containerd with exactly what helm rendered, then
// without one capability, mount or namespace after the other, and what no longer works is told. Run by itself
// (npm run chart:rights) it prints the table, and ends with 1 where it is another than EXPECTED.

import { chmodSync, chownSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { EXECUTABLE } from '../chain.ts';
import { ask, type Workload } from '../containerd/mesh.ts';
import { network } from '../containerd/networks.ts';
import { ThrowawayNode } from '../containerd/throwaway-node.ts';
import { missingControlPlane } from '../kubernetes/build.ts';
import { ControlPlane } from '../kubernetes/control-plane.ts';
import { Front } from '../kubernetes/front.ts';
import { grantRole } from '../kubernetes/role.ts';
import { exec, type Running, Testbed, until } from '../netns.ts';
import { missingHelm } from './helm.ts';
import { type ChartContainer, type ChartPod, importImage, Kubelet, type RunningPod } from './kubelet.ts';
import { type KubernetesObject, objectsOf, render } from './render.ts';

/** In the order in which they are tried. */
export const FEATURES = [
  'starts without a network',
  'install',
  'agent ready',
  'ztunnel connects',
  'mark trusted',
  'running pod found',
  'new pod served',
  'traffic redirected',
  'program repaired',
  'conflist repaired',
  'status',
  'trace',
  'uninstall',
] as const;
export type Feature = (typeof FEATURES)[number];

export interface Variant {
  name: string;
  change(pod: ChartPod): void;
}

const containersOf = (pod: ChartPod): ChartContainer[] => [...pod.initContainers, ...pod.containers];

const withoutMount = (name: string): Variant => ({
  name: `without the mount ${name}`,
  change: (pod) => {
    for (const container of containersOf(pod)) {
      container.volumeMounts = container.volumeMounts.filter((mount) => mount.name !== name);
    }
  },
});

/** Everything of the rendered pod that could be left out. */
export function variantsOf(pod: ChartPod): Variant[] {
  const capabilities = pod.containers[0]?.securityContext.capabilities.add ?? [];
  const mounts = [...new Set(containersOf(pod).flatMap(({ volumeMounts }) => volumeMounts.map(({ name }) => name)))];
  return [
    ...capabilities.map((capability) => ({
      name: `without ${capability}`,
      change: (changed: ChartPod) => {
        for (const { securityContext } of containersOf(changed)) {
          securityContext.capabilities.add = securityContext.capabilities.add.filter((one) => one !== capability);
        }
      },
    })),
    ...mounts.map(withoutMount),
    {
      name: 'netns without HostToContainer',
      change: (changed) => {
        for (const mount of containersOf(changed).flatMap(({ volumeMounts }) => volumeMounts)) {
          if (mount.name === 'netns') delete mount.mountPropagation;
        }
      },
    },
    {
      name: 'without hostPID',
      change: (changed) => {
        changed.hostPID = false;
      },
    },
    {
      name: 'without hostNetwork',
      change: (changed) => {
        changed.hostNetwork = false;
      },
    },
  ];
}

const NODE = 'worker';
const SYSTEM = 'istio-system';
const REDIRECTION = 'ambient.istio.io/redirection';
const CONFLIST = '/etc/cni/net.d/10-throwaway.conflist';
/** Somebody else's, as that of a primary plugin's daemon may be. */
const OWNER = 1_234;
const PATIENCE_MS = 12_000;

interface CounterRow {
  namespace: string;
  pod: string;
  reason: string;
}

interface Outcome {
  works: Feature[];
  /** the first words about what does not */
  why: Map<Feature, string>;
}

/** A node with containerd, its API server, and the chart's pods. */
export class RightsNode {
  readonly testbed: Testbed;
  readonly plane: ControlPlane;
  readonly node: ThrowawayNode;
  readonly #kubelet: Kubelet;
  readonly #objects: readonly KubernetesObject[];
  #round = 0;

  private constructor(
    testbed: Testbed,
    plane: ControlPlane,
    node: ThrowawayNode,
    kubelet: Kubelet,
    objects: readonly KubernetesObject[],
  ) {
    this.testbed = testbed;
    this.plane = plane;
    this.node = node;
    this.#kubelet = kubelet;
    this.#objects = objects;
  }

  static async start(testbed: Testbed): Promise<RightsNode> {
    const rendering = { values: ['default.yaml'], kubeVersion: '1.37.2', namespace: SYSTEM };
    const set = ['--set', 'agent.address=127.0.0.1,agent.reconcileSeconds=1', '--set', 'uninstall.executableDelay=0'];
    const objects = objectsOf(await render(rendering, set));
    const plane = await ControlPlane.start(testbed);
    await plane.createNamespace(SYSTEM);
    const uid = await grantRole(plane, SYSTEM, 'ambient-redirect');
    const node = await ThrowawayNode.start(testbed);
    // As systemd has it: HostToContainer needs it.
    await node.run(['mount', '--make-rshared', '/']);
    await node.writeConflist(network('bridge'));
    await node.startContainerd();
    await importImage(node, EXECUTABLE);
    await Front.start(testbed, plane, node.namespace);
    const map = objects.find(({ kind }) => kind === 'ConfigMap') as unknown as { data: Record<string, string> };
    const kubelet = new Kubelet({
      node,
      nodeName: NODE,
      configMaps: { 'ambient-redirect': map.data },
      token: plane.serviceAccountToken(SYSTEM, 'ambient-redirect', uid, 3_600),
      caFile: plane.caFile,
    });
    return new RightsNode(testbed, plane, node, kubelet, objects);
  }

  /** A copy. */
  podOf(daemonSet: string): ChartPod {
    const found = this.#objects.find(({ kind, metadata }) => kind === 'DaemonSet' && metadata.name === daemonSet);
    if (found === undefined) throw new Error(`there is no DaemonSet ${daemonSet}`);
    return structuredClone((found.spec as { template: { spec: ChartPod } }).template.spec);
  }

  /** Tries every feature with the pods as `change` leaves them. */
  async try(change: (pod: ChartPod) => void = () => {}): Promise<Outcome> {
    const round = new Round(this, this.#kubelet, `round-${++this.#round}`);
    try {
      return await round.run(change);
    } finally {
      await round.end();
    }
  }
}

class Round {
  readonly #world: RightsNode;
  readonly #kubelet: Kubelet;
  readonly #namespace: string;
  readonly #pods: RunningPod[] = [];
  readonly #workloads: Workload[] = [];
  readonly #known: { name: string; namespace: string; serviceAccount: string; addresses: string[] }[] = [];
  #ztunnel: Running | undefined;

  constructor(world: RightsNode, kubelet: Kubelet, namespace: string) {
    this.#world = world;
    this.#kubelet = kubelet;
    this.#namespace = namespace;
  }

  async run(change: (pod: ChartPod) => void): Promise<Outcome> {
    const { plane, node } = this.#world;
    const outcome: Outcome = { works: [], why: new Map() };
    const attempt = async (feature: Feature, body: () => Promise<void>) => {
      try {
        await body();
        outcome.works.push(feature);
        return true;
      } catch (error) {
        outcome.why.set(feature, (error as Error).message.split('\n').slice(0, 3).join(' ').slice(0, 300));
        return false;
      }
    };
    await plane.createNamespace(this.#namespace, { 'istio.io/dataplane-mode': 'ambient' });
    await attempt('starts without a network', async () => {
      rmSync(node.path(CONFLIST), { force: true });
      await this.#untilNetwork(false);
      await this.#start(this.#podOf('istio-cni-node', change), 'early');
    });
    chownSync(node.path('/etc/cni/net.d'), OWNER, OWNER);
    await this.#writeConflist();
    await this.#untilNetwork(true);
    const before = await this.#workload('before');

    const agents = this.#podOf('istio-cni-node', change);
    const [install] = agents.initContainers;
    const [agent] = agents.containers;
    if (install === undefined || agent === undefined) throw new Error('install and agent');
    let pod: RunningPod | undefined;
    const installed = await attempt('install', async () => {
      pod = await this.#start(agents, 'agent');
      const code = await pod.finish(install);
      if (code !== 0) throw new Error(`exit ${code}: ${pod.log('install')}`);
      this.#assertEntry();
      if (!existsSync(node.path('/opt/cni/bin/ambient-redirect'))) throw new Error('there is no executable');
    });
    if (!installed || pod === undefined) return outcome;
    const running: RunningPod = pod;
    let container = '';
    let netns: string | undefined;
    const ready = await attempt('agent ready', async () => {
      netns = await running.netns();
      container = await running.start(agent);
      await this.#until(
        'it is ready',
        async () => (await this.#page('8000/readyz', netns)) === 'ok\n',
        () => running.log('agent'),
      );
    });
    if (!ready) return outcome;
    const log = () => running.log('agent');
    const live = await attempt('ztunnel connects', async () => {
      const ztunnel = await this.#startZtunnel();
      await this.#until(
        'it has its snapshot',
        () => ztunnel.output.includes('"ready":true'),
        () => ztunnel.output,
      );
    });
    await attempt('mark trusted', async () => {
      if (!live) throw new Error('no ztunnel');
      const { ztunnel } = JSON.parse(await this.#inContainer(container, 'status', '-o', 'json')) as {
        ztunnel?: { markForgeable: string | null };
      };
      if (ztunnel?.markForgeable !== null) throw new Error(ztunnel?.markForgeable ?? 'no ztunnel');
    });
    await attempt('running pod found', () => this.#untilEnabled('before', log));
    let after: Workload | undefined;
    await attempt('new pod served', async () => {
      after = await this.#workload('after');
      await this.#untilEnabled('after', log);
    });
    await attempt('traffic redirected', async () => {
      if (after === undefined) throw new Error('there is no pod');
      await ask(node, after, before.pod.addresses[0] ?? '');
      const rows = JSON.parse(await this.#inContainer(container, 'counters', '-o', 'json')) as CounterRow[];
      const own = rows.filter(({ namespace, pod }) => namespace === this.#namespace && pod === 'after');
      if (!own.some(({ reason }) => reason === 'redirected_outbound')) {
        throw new Error(`counted: ${own.map(({ reason }) => reason).join(', ')}`);
      }
    });
    await attempt('program repaired', async () => {
      if (after === undefined) throw new Error('there is no pod');
      const links = '/sys/fs/bpf/ambient-redirect/links';
      const pinned = (await node.run(['find', links, '-type', 'f'])).split('\n').filter((path) => path !== '');
      if (pinned[0] === undefined) throw new Error(`nothing in ${links}`);
      // Those inside the pod, and those on the node's end of its veth.
      for (const path of pinned) await node.run(['bpftool', 'link', 'detach', 'pinned', path]);
      await this.#until('it is made again', () => log().includes('made again as recorded'), log);
      // As the node itself sees it: interface numbers mean nothing elsewhere.
      let seen = '';
      const inOrder = async () => {
        const { status, stdout } = await exec(node.argv([EXECUTABLE, 'status']));
        seen = stdout.slice(stdout.indexOf('problem'));
        return status === 0;
      };
      await this.#until('all of them are', inOrder, () => seen);
    });
    await attempt('conflist repaired', async () => {
      await this.#writeConflist();
      await this.#until(
        'the entry is back',
        () => {
          try {
            this.#assertEntry();
            return true;
          } catch {
            return false;
          }
        },
        log,
      );
    });
    await attempt('status', async () => {
      await this.#inContainer(container, 'status');
    });
    await attempt('trace', async () => {
      if (after === undefined) throw new Error('there is no pod');
      const tracing = this.#inContainer(container, 'trace', '--pod', `${this.#namespace}/after`, '--count', '1');
      let ended = false;
      const end = tracing.finally(() => {
        ended = true;
      });
      end.catch(() => {});
      while (!ended) await ask(node, after, before.pod.addresses[0] ?? '').catch(() => {});
      const line = await end;
      if (!line.includes(`${this.#namespace}/after`)) throw new Error(line);
    });
    await attempt('uninstall', async () => {
      const removal = this.#podOf('istio-cni-node-uninstall', change);
      const [uninstall] = removal.initContainers;
      if (uninstall === undefined) throw new Error('uninstall');
      const leaving = await this.#start(removal, 'uninstall');
      const code = await leaving.finish(uninstall);
      if (code !== 0) throw new Error(`exit ${code}: ${leaving.log('uninstall')}`);
      if (existsSync(node.path('/opt/cni/bin/ambient-redirect'))) throw new Error('the executable is still there');
      if (existsSync(node.path('/sys/fs/bpf/ambient-redirect'))) throw new Error('the state is still there');
      if (this.#conflist().includes('ambient-redirect')) throw new Error('the entry is still there');
    });
    return outcome;
  }

  /** Everything as it was, by somebody who may do anything. */
  async end(): Promise<void> {
    const { node } = this.#world;
    for (const pod of this.#pods) await pod.remove().catch(() => {});
    await node
      .run([EXECUTABLE, 'uninstall', '--executable-delay', '0', '--drain-timeout', '0'])
      .catch((error: Error) => console.error(error.message));
    await this.#ztunnel?.stop('SIGKILL');
    for (const { pod } of this.#workloads) await node.removePod(pod).catch(() => {});
    rmSync(node.path('/run/ambient-redirect'), { recursive: true, force: true });
    rmSync(node.path('/run/pod-logs'), { recursive: true, force: true });
  }

  async #start(pod: ChartPod, name: string): Promise<RunningPod> {
    const { testbed, plane, node } = this.#world;
    const running = await this.#kubelet.startPod(pod, name);
    this.#pods.push(running);
    // The API server is where the pod's loopback is.
    const netns = await running.netns();
    if (netns !== undefined) await Front.start(testbed, plane, node.namespaceAt(netns));
    return running;
  }

  #podOf(daemonSet: string, change: (pod: ChartPod) => void): ChartPod {
    const pod = this.#world.podOf(daemonSet);
    change(pod);
    return pod;
  }

  async #workload(name: string): Promise<Workload> {
    const { plane, node } = this.#world;
    const namespace = this.#namespace;
    const uid = await plane.createPod({ namespace, name, node: NODE });
    const pod = await node.runPod(namespace, name, { uid });
    this.#known.push({ name, namespace, serviceAccount: 'default', addresses: pod.addresses });
    this.#writeKnown();
    await plane.setPodStatus(namespace, name, 'Running', pod.addresses);
    const workload = { pod, container: await node.runContainer(pod, 'web', ['httpd', '-f', '-p', '80', '-h', '/www']) };
    this.#workloads.push(workload);
    return workload;
  }

  #writeKnown(): void {
    writeFileSync(this.#world.node.path('/run/xds.yaml'), JSON.stringify(this.#known));
  }

  /** ztunnel's stand-in as a process of the node, in a v2 cgroup of its own as a pod's is. */
  async #startZtunnel(): Promise<Running> {
    const { node } = this.#world;
    const command = `${EXECUTABLE} stand-in-ztunnel --socket /run/ztunnel/ztunnel.sock --xds /run/xds.yaml`;
    const cgroup = node
      .cgroups()
      .map((path) => join(path, 'ztunnel'))
      .find((path) => path.includes('unified') || existsSync(join(path, '../cgroup.controllers')));
    if (cgroup === undefined) throw new Error('no v2 hierarchy');
    mkdirSync(cgroup, { recursive: true });
    const ztunnel = node.launch(['sh', '-c', `echo $$ >${cgroup}/cgroup.procs && exec ${command}`]);
    this.#ztunnel = ztunnel;
    return ztunnel;
  }

  /** The runtime follows the directory. */
  #untilNetwork(wanted: boolean): Promise<void> {
    const { node } = this.#world;
    return until(
      `the network is ${wanted ? '' : 'not '}ready`,
      async () => {
        const { status } = await node.cri.call('Status', {});
        return status.conditions.find(({ type }) => type === 'NetworkReady')?.status === wanted;
      },
      PATIENCE_MS,
    );
  }

  /** As its owner's daemon writes it. */
  async #writeConflist(): Promise<void> {
    const { node } = this.#world;
    await node.writeConflist(network('bridge'));
    chownSync(node.path(CONFLIST), OWNER, OWNER);
    chmodSync(node.path(CONFLIST), 0o600);
  }

  #conflist(): string {
    return readFileSync(this.#world.node.path(CONFLIST), 'utf8');
  }

  #assertEntry(): void {
    if (!this.#conflist().includes('"ambient-redirect"')) throw new Error('there is no entry');
    const { uid, gid } = statSync(this.#world.node.path(CONFLIST));
    if (uid !== OWNER || gid !== OWNER) throw new Error(`the conflist belongs to ${uid}:${gid}`);
  }

  async #page(path: string, netns: string | undefined): Promise<string> {
    const command = ['busybox', 'wget', '-q', '-O', '-', `http://127.0.0.1:${path}`];
    return this.#world.node.run(command, netns === undefined ? {} : { netns }).catch(() => '');
  }

  async #inContainer(container: string, ...args: string[]): Promise<string> {
    const { stdout, stderr, code } = await this.#world.node.exec(container, ['/usr/bin/ambient-redirect', ...args], 15);
    if (code !== 0) throw new Error(`${args.join(' ')}: exit ${code}: ${stderr.trim() || stdout.trim()}`);
    return stdout;
  }

  #untilEnabled(name: string, log: () => string): Promise<void> {
    const enabled = async () => (await this.#world.plane.annotation(this.#namespace, name, REDIRECTION)) === 'enabled';
    return this.#until(`${name} is enabled`, enabled, log);
  }

  async #until(what: string, condition: () => boolean | Promise<boolean>, log: () => string): Promise<void> {
    await until(what, condition, PATIENCE_MS).catch((error: Error) => {
      const words = log()
        .split('\n')
        .filter((line) => /"(warn|error|fatal)"/.test(line))
        .at(-1);
      throw new Error(`${error.message}; ${words ?? log().slice(-200)}`);
    });
  }
}

/** Nothing was tried after it. */
const from = (feature: Feature): readonly Feature[] => FEATURES.slice(FEATURES.indexOf(feature));

/** No pod starts, so nothing of one was tried. */
const NO_POD: readonly Feature[] = ['new pod served', 'traffic redirected', 'program repaired', 'trace'];

/** Pods that the plugin has not seen are not found; what is sent to such a pod by way of its own ztunnel is lost. */
const NO_PROCESSES: readonly Feature[] = ['mark trusted', 'running pod found', 'traffic redirected'];

/** What does not work, by variant. */
export const EXPECTED: Readonly<Record<string, readonly Feature[]>> = {
  'without NET_ADMIN': ['running pod found', 'traffic redirected', 'program repaired', 'status', 'trace', 'uninstall'],
  'without SYS_ADMIN': from('agent ready'),
  'without SYS_PTRACE': NO_PROCESSES,
  'without DAC_OVERRIDE': from('install'),
  'without CHOWN': from('install'),
  'without FOWNER': from('install'),
  'without the mount tmp': from('install'),
  'without the mount bpffs': from('agent ready'),
  'without the mount run': from('install'),
  'without the mount cni-net-dir': from('install'),
  'without the mount netns': NO_POD,
  'without the mount cni-bin-dir': from('install'),
  'without the mount entry': from('install'),
  'without the mount token': from('agent ready'),
  'without the mount zds': from('agent ready'),
  'netns without HostToContainer': NO_POD,
  'without hostPID': NO_PROCESSES,
  // The contract "shared", whose programs are on the node's side alone, is not tried here.
  'without hostNetwork': ['starts without a network'],
};

/** Runs those whose name has one of `only` in it, or all; returns how many came out otherwise than expected. */
async function main(only: readonly string[]): Promise<number> {
  using testbed = Testbed.open();
  const world = await RightsNode.start(testbed);
  const all = [{ name: 'everything', change: () => {} }, ...variantsOf(world.podOf('istio-cni-node'))];
  let wrong = 0;
  for (const { name, change } of all.filter(
    ({ name }) => only.length === 0 || only.some((one) => name.includes(one)),
  )) {
    const { works, why } = await world.try(change);
    const missing = FEATURES.filter((feature) => !works.includes(feature));
    const expected = JSON.stringify(missing) === JSON.stringify(EXPECTED[name] ?? []);
    if (!expected) wrong += 1;
    console.log(`${name}: ${missing.length === 0 ? 'all works' : `not: ${missing.join(', ')}`}`);
    for (const [feature, words] of why) console.log(`    ${feature}: ${words}`);
    if (!expected) console.log(`  expected: ${EXPECTED[name]?.join(', ') ?? 'all works'}`);
  }
  console.log(wrong === 0 ? 'each as expected' : `${wrong} otherwise than expected`);
  return wrong;
}

if (import.meta.main) {
  const missing = missingHelm() ?? missingControlPlane();
  if (missing === undefined) process.exitCode = (await main(process.argv.slice(2))) === 0 ? 0 : 1;
  else {
    console.error(`chart:rights: ${missing}`);
    process.exitCode = 1;
  }
}
