// SPDX-License-Identifier: Apache-2.0
//
// A node whose pods are in a real API server: the kubelet's part is played here. A pod is made through the API, its
// sandbox by the chain of plugins, and its status is reported. The agent runs in the node's network namespace and
// reaches the API server through a Front there.

import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, rmdirSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { join } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import { ApiError, ApiUnreachable } from '../../plugin/agent/kubernetes/api.ts';
import type { ExclusionRule } from '../../plugin/native.ts';
import { makePods } from '../bench/pods.ts';
import type { Recording } from '../bench/record.ts';
import type { Attachment } from '../chain.ts';
import {
  executable,
  type Pod,
  type PodOptions,
  requireExecutable,
  Topology,
  type TopologyOptions,
} from '../e2e/topology.ts';
import { must, type Running, until } from '../netns.ts';
import type { ControlPlane, PodSpec } from './control-plane.ts';
import { Front } from './front.ts';

export const REDIRECTION = 'ambient.istio.io/redirection';
/** Pods that are made at a time: as many as the client has connections. */
const CREATORS = 8;
/** A refused request is sent again so often, 0.1 to 6.4 s apart. */
const TRIES = 7;
/** Pods that one process records: within a command's time limit on a busy machine too. */
const RECORDED_AT_ONCE = 250;
/** Names of nodes in a test file's API server. */
export const NODE_PREFIX = 'node-';

export interface SitePod {
  uid: string;
  namespace: string;
  name: string;
  sandbox: Pod;
}

export interface AgentOptions {
  /** Keys for our conflist entry, over the site's. */
  entry?: Record<string, unknown>;
  reconcileSeconds?: number;
  /** Before the executable: a command that runs another. */
  under?: string[];
  /** More arguments. */
  more?: string[];
}

export class Site {
  readonly plane: ControlPlane;
  readonly front: Front;
  readonly topology: Topology;
  readonly nodeName: string;
  tokenFile: string;
  agent: Running | undefined;
  /** what the API server answered idlePods() before it did what was asked */
  readonly refusals: string[] = [];
  readonly #processes: (() => Promise<void>)[] = [];
  #agents = 0;
  #sandboxes = 0;

  private constructor(plane: ControlPlane, front: Front, topology: Topology, nodeName: string) {
    this.plane = plane;
    this.front = front;
    this.topology = topology;
    this.nodeName = nodeName;
    this.tokenFile = plane.adminTokenFile;
  }

  static async start(
    plane: ControlPlane,
    nodeName: string,
    options: Partial<TopologyOptions> & { entry?: Record<string, unknown> } = {},
  ): Promise<Site> {
    requireExecutable();
    const topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1, ...options });
    try {
      return new Site(plane, await Front.start(topology.testbed, plane, topology.node), topology, nodeName);
    } catch (error) {
      topology.close();
      throw error;
    }
  }

  get zdsSocket(): string {
    return join(this.topology.runDir, '..', 'zds.sock');
  }

  /** The conflist entry that the agent goes by. */
  agentEntry(more: Record<string, unknown> = {}): Record<string, unknown> {
    const { options, stateDir, runDir } = this.topology;
    return {
      type: 'ambient-redirect',
      enrollment: 'agent',
      hook: options.hook,
      stateDir,
      runDir,
      ...options.entry,
      ...more,
    };
  }

  startAgent({ entry = {}, reconcileSeconds = 30, under = [], more = [] }: AgentOptions = {}): Running {
    const { topology, front, plane } = this;
    const directory = join(topology.runDir, '..', `agent-${++this.#agents}`);
    mkdirSync(directory);
    const conf = join(directory, '10-pods.conflist');
    const ours = this.agentEntry(entry);
    writeFileSync(conf, JSON.stringify({ cniVersion: '1.0.0', name: 'pods', plugins: [ours] }));
    const argv = [
      ...under,
      executable,
      'agent',
      ...['--state-dir', topology.stateDir, '--run-dir', topology.runDir, '--conf', conf],
      ...['--zds-socket', this.zdsSocket, '--address', '127.0.0.1'],
      ...['--node-name', this.nodeName, '--reconcile-seconds', String(reconcileSeconds)],
      ...['--kube-api', front.url, '--kube-ca-file', plane.caFile, '--kube-token-file', this.tokenFile],
      ...more,
    ];
    this.agent = topology.testbed.start(topology.node.argv(argv));
    return this.agent;
  }

  /** The pod in the API, and its sandbox; its status is reported when it has an address. */
  async createPod(
    spec: Omit<PodSpec, 'node'>,
    options: PodOptions & { staticUid?: string; plugin?: boolean } = {},
  ): Promise<SitePod> {
    const { plane, topology, nodeName } = this;
    const uid = await plane.createPod({ ...spec, node: nodeName });
    const { staticUid, plugin = true, ...more } = options;
    const { namespace, name } = spec;
    const sandbox = topology.pod(this.#label(), { namespace, name, uid: staticUid ?? uid, ...more });
    await topology.addPrimary(sandbox);
    if (plugin) await topology.addOurs(sandbox);
    await plane.setPodStatus(spec.namespace, spec.name, 'Running', [sandbox.addresses[4], sandbox.addresses[6]]);
    return { uid, namespace: spec.namespace, name: spec.name, sandbox };
  }

  /**
   * A process of the pod's, in the cgroup that kubelet and containerd would give it: below that of its UID, by the name
   * of its container. Returns how to end it.
   */
  async process(pod: SitePod, containerId = pod.sandbox.containerId.repeat(2)): Promise<() => Promise<void>> {
    const { testbed } = this.topology;
    const parent = join('/sys/fs/cgroup/pids', `${testbed.id}-pod${pod.uid}`);
    const cgroup = join(parent, containerId);
    for (const directory of [parent, cgroup]) {
      if (existsSync(directory)) continue;
      mkdirSync(directory);
      testbed.defer(() => rmdirSync(directory));
    }
    const [file = '', ...rest] = pod.sandbox.netns.argv(['setpriv', '--pdeathsig', 'KILL', '--', 'sleep', '600']);
    const child = spawn(file, rest, { stdio: 'ignore' });
    const ended = new Promise<void>((resolve) => child.once('close', () => resolve()));
    if (child.pid === undefined) throw new Error(`no process for ${pod.name}`);
    writeFileSync(join(cgroup, 'cgroup.procs'), String(child.pid));
    const end = () => {
      child.kill('SIGKILL');
      return ended;
    };
    this.#processes.push(end);
    return end;
  }

  /** Two pods of one name may follow each other. */
  #label(): string {
    return `pod${++this.#sandboxes}`;
  }

  /**
   * Many pods of one namespace that only are there, as API server, primary plugin and our plugin leave them when they are
   * not enrolled. Named pod-0, pod-1, ...; returns their UIDs.
   */
  async idlePods(namespace: string, count: number): Promise<string[]> {
    const { plane, topology, nodeName } = this;
    const pods = makePods(topology.testbed, topology.node, count);
    const uids: string[] = [];
    let next = 0;
    const work = async () => {
      for (let index = next++; index < count; index = next++) {
        const name = `pod-${index}`;
        uids[index] = await this.#persist(async (tries) => {
          // A request whose answer was lost may have been carried out.
          const there = tries > 0 ? await plane.pod(namespace, name) : null;
          return there === null
            ? plane.createPod({ namespace, name, node: nodeName })
            : (there.metadata as { uid: string }).uid;
        });
        const { addresses } = pods[index] as (typeof pods)[number];
        const ips = [addresses[4], addresses[6]];
        await this.#persist(() => plane.setPodStatus(namespace, name, 'Running', ips));
      }
    };
    await Promise.all(Array.from({ length: CREATORS }, work));
    const program = join(import.meta.dirname, '../bench/record.ts');
    for (let i = 0; i < count; i += RECORDED_AT_ONCE) {
      const recording: Recording = {
        entry: this.agentEntry(),
        network: 'pods',
        pods: pods.slice(i, i + RECORDED_AT_ONCE).map(({ containerId, namespace: netns }, offset) => ({
          containerId,
          netns: `/run/netns/${netns}`,
          namespace,
          name: `pod-${i + offset}`,
          uid: uids[i + offset] ?? '',
        })),
      };
      must(topology.node.argv([process.execPath, program]), JSON.stringify(recording));
    }
    return uids;
  }

  /** Again while the API server is too busy (429, 5xx) or hangs up: each such answer is kept in `refusals`. */
  async #persist<T>(send: (tries: number) => Promise<T>): Promise<T> {
    for (let tries = 0; ; tries++) {
      try {
        return await send(tries);
      } catch (error) {
        const isBusy = error instanceof ApiError && (error.status === 429 || error.status >= 500);
        if (tries === TRIES || !(isBusy || error instanceof ApiUnreachable)) throw error;
        this.refusals.push((error as Error).message);
        const wait = (error instanceof ApiError && error.retryAfterMs) || 100 * 2 ** tries;
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
  }

  /** Another sandbox of a pod whose first one is gone, and its report. */
  async newSandbox(pod: SitePod): Promise<SitePod> {
    const { topology, plane } = this;
    const sandbox = topology.pod(this.#label(), pod.sandbox.options);
    await topology.add(sandbox);
    await plane.setPodStatus(pod.namespace, pod.name, 'Running', [sandbox.addresses[4], sandbox.addresses[6]]);
    return { ...pod, sandbox };
  }

  /** `pods -o json` on this node. */
  async attachments(): Promise<Attachment[]> {
    const { node, stateDir, runDir } = this.topology;
    const argv = [executable, 'pods', '-o', 'json', '--state-dir', stateDir, '--run-dir', runDir];
    const { status, stdout, stderr } = await node.exec(argv);
    if (status !== 0) throw new Error(`pods: exit ${status}: ${stderr}`);
    return JSON.parse(stdout) as Attachment[];
  }

  /** The row of a pod's sandbox. */
  async attachment({ sandbox }: SitePod): Promise<Attachment | undefined> {
    return (await this.attachments()).find(({ containerId }) => containerId === sandbox.containerId);
  }

  /** What the map has for the pod's interface. */
  exclusions({ sandbox }: SitePod): ExclusionRule[] {
    const native = loadNative();
    const state = native.openState(this.topology.stateDir);
    try {
      return native.getExclusions(state, sandbox.hostIfindex);
    } finally {
      native.closeState(state);
    }
  }

  /** A ztunnel's pod, which becomes the node's proxy. */
  proxy(name: string, options: PodOptions = {}): Promise<SitePod> {
    const owner = { apiVersion: 'apps/v1', kind: 'DaemonSet', name: 'ztunnel', uid: randomUUID(), controller: true };
    return this.createPod(
      { namespace: 'istio-system', name, serviceAccount: 'ztunnel', ownerReferences: [owner] },
      options,
    );
  }

  /** Lines of the agent's log, parsed. */
  log(): Record<string, unknown>[] {
    const lines = (this.agent?.output ?? '').split('\n').filter((line) => line.startsWith('{'));
    return lines.flatMap((line) => {
      try {
        return [JSON.parse(line) as Record<string, unknown>];
      } catch {
        return [];
      }
    });
  }

  /** A page of the agent's: "15014/metrics", "8000/readyz". */
  async page(path: string): Promise<{ status: number; body: string }> {
    const script = `import sys, urllib.request, urllib.error
try: answer = urllib.request.urlopen(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error: answer = error
print(answer.status); print(answer.read().decode())`;
    const outcome = await this.topology.node.exec(['python3', '-c', script, `http://127.0.0.1:${path}`]);
    if (outcome.status !== 0) throw new Error(`${path}: ${outcome.stderr.trim().split('\n').at(-1)}`);
    const [status = '', ...body] = outcome.stdout.split('\n');
    return { status: Number(status), body: body.join('\n') };
  }

  /** What the plugin asks at ADD: is this pod in the mesh? */
  async ask(namespace: string, name: string, uid = ''): Promise<{ status: number; body: Record<string, unknown> }> {
    const body = JSON.stringify({ pod: { namespace, name, uid } });
    const answer = await new Promise<{ status: number; text: string }>((resolve, reject) => {
      const socketPath = join(this.topology.runDir, 'agent.sock');
      const sent = request({ socketPath, method: 'POST', path: '/v1/decide' }, (got) => {
        let text = '';
        got.setEncoding('utf8').on('data', (more) => {
          text += more;
        });
        got.once('end', () => resolve({ status: got.statusCode ?? 0, text }));
      });
      sent.once('error', reject).end(body);
    });
    return { status: answer.status, body: JSON.parse(answer.text) as Record<string, unknown> };
  }

  /** Value of a metric with exactly these labels; 0 if it is not there. */
  async metric(name: string, labels: Record<string, string> = {}): Promise<number> {
    const { status, body } = await this.page('15014/metrics');
    if (status !== 200) throw new Error(`/metrics: ${status}: ${body}`);
    const text = Object.entries(labels)
      .map(([key, value]) => `${key}="${value}"`)
      .join(',');
    const line = body.split('\n').find((one) => one.startsWith(text === '' ? `${name} ` : `${name}{${text}} `));
    return Number(line?.split(' ').at(-1) ?? 0);
  }

  async untilReady(limit = 20_000): Promise<void> {
    await until(
      'the agent is ready',
      () =>
        this.page('8000/readyz').then(
          ({ status }) => status === 200,
          () => false,
        ),
      limit,
    ).catch(async (error: Error) => {
      const page = await this.page('8000/readyz').catch(({ message }: Error) => ({ body: message }));
      throw new Error(`${error.message}: ${page.body}; the agent said:\n${this.agent?.output.slice(-4_000)}`);
    });
  }

  /** What the API says about the pod's redirection. */
  redirection(pod: SitePod): Promise<string | undefined> {
    return this.plane.annotation(pod.namespace, pod.name, REDIRECTION);
  }

  async untilRedirection(pod: SitePod, wanted: string | undefined, limit = 10_000): Promise<void> {
    await until(
      `${pod.namespace}/${pod.name} is annotated ${wanted}`,
      async () => (await this.redirection(pod)) === wanted,
      limit,
    ).catch((error: Error) => {
      throw new Error(`${error.message}; the agent said:\n${this.agent?.output.slice(-4_000)}`);
    });
  }

  /** Pod path in the API. */
  path(pod: SitePod): string {
    return `/api/v1/namespaces/${pod.namespace}/pods/${pod.name}`;
  }

  async close(): Promise<void> {
    // A cgroup can be removed when its processes are gone.
    await Promise.all(this.#processes.map((end) => end()));
    await this.agent?.stop('SIGKILL');
    this.topology.close();
  }
}
