// SPDX-License-Identifier: Apache-2.0
//
// Two real nodes and their control plane. Runs in a network namespace of its own (main.ts sees to it): the control
// plane's processes are in that one, the nodes hang on a bridge there.

import { readFileSync, writeFileSync } from 'node:fs';
import { request } from 'node:https';
import { join } from 'node:path';
import type { Api } from '../../plugin/agent/kubernetes/api.ts';
import { CHART, helmProgram } from '../chart/helm.ts';
import { CONTAINERD, containerdDirectory, missingContainerd } from '../containerd/build.ts';
import { ControlPlane } from '../kubernetes/control-plane.ts';
import { type ExecOptions, exec, must, type Running, type Testbed, until } from '../netns.ts';
import { type NodePrograms, nodePrograms } from './build.ts';
import { meshImage } from './images.ts';
import { currentImage, type Image, nextImage } from './next.ts';
import { addressing, RealNode } from './node.ts';

const CONTROL = '172.31.0.1';
export const NODE_NAMES = ['worker-1', 'worker-2'] as const;

type Json = Record<string, unknown>;

export interface PodObject {
  metadata: {
    name: string;
    namespace: string;
    uid: string;
    annotations?: Record<string, string>;
    deletionTimestamp?: string;
  };
  spec: { nodeName: string; hostNetwork?: boolean };
  status: {
    phase: string;
    podIP?: string;
    podIPs?: { ip: string }[];
    hostIP?: string;
    conditions?: { type: string; status: string }[];
    containerStatuses?: { ready: boolean; restartCount: number; containerID?: string }[];
  };
}

export class Cluster {
  readonly testbed: Testbed;
  readonly plane: ControlPlane;
  readonly programs: NodePrograms;
  readonly nodes: RealNode[] = [];
  /** of ours, on both nodes */
  readonly images: { current: Image; next: Image };
  readonly kubeconfig: string;
  readonly #controllers: Running[] = [];

  private constructor(testbed: Testbed, plane: ControlPlane, programs: NodePrograms, images: Cluster['images']) {
    this.testbed = testbed;
    this.images = images;
    this.plane = plane;
    this.programs = programs;
    this.kubeconfig = join(plane.directory, 'admin.conf');
    writeFileSync(
      this.kubeconfig,
      JSON.stringify({
        apiVersion: 'v1',
        kind: 'Config',
        clusters: [{ name: 'c', cluster: { server: plane.url, 'certificate-authority': plane.caFile } }],
        users: [{ name: 'u', user: { tokenFile: plane.adminTokenFile } }],
        contexts: [{ name: 'x', context: { cluster: 'c', user: 'u' } }],
        'current-context': 'x',
      }),
    );
  }

  static async start(testbed: Testbed): Promise<Cluster> {
    must(['ip', 'link', 'set', 'lo', 'up']);
    must(['ip', 'link', 'add', 'fabric', 'type', 'bridge']);
    must(['ip', 'address', 'add', `${CONTROL}/24`, 'dev', 'fabric']);
    must(['ip', 'address', 'add', 'fd31::1/64', 'dev', 'fabric', 'nodad']);
    must(['ip', 'link', 'set', 'fabric', 'up']);
    // Pods speak to the API server with their own addresses.
    for (const number of [1, 2]) {
      const { node, node6, pods, pods6 } = addressing(number);
      must(['ip', 'route', 'add', pods, 'via', node]);
      must(['ip', 'route', 'add', pods6, 'via', node6]);
    }
    const programs = await nodePrograms();
    const kubelets = NODE_NAMES.map((name) => ({
      token: `${name}-token`,
      user: `system:node:${name}`,
      groups: 'system:nodes',
    }));
    const proxies = { token: 'kube-proxy-token', user: 'system:kube-proxy', groups: 'system:kube-proxies' };
    const plane = await ControlPlane.start(testbed, { address: CONTROL, tokens: [...kubelets, proxies] });
    const cluster = new Cluster(testbed, plane, programs, { current: currentImage(), next: await nextImage() });
    cluster.#startControllers();
    const { current, next } = cluster.images;
    // The second node's is the newer one.
    const newer = missingContainerd() === undefined ? await containerdDirectory() : undefined;
    const images = [await meshImage(testbed.directory('mesh-image')), current.archive, next.archive];
    const server = `https://${CONTROL}:${plane.port}`;
    await Promise.all(
      NODE_NAMES.map(async (name, index) => {
        const api = { server, caFile: plane.caFile, token: `${name}-token`, proxyToken: proxies.token };
        const primary = index === 0 ? 'bridge' : 'ptp';
        cluster.nodes[index] = await RealNode.start(testbed, {
          name,
          number: index + 1,
          primary,
          programs,
          api,
          images,
          ...(index === 1 && newer !== undefined && { containerd: newer }),
        });
      }),
    );
    await Promise.all(NODE_NAMES.map((name) => cluster.untilNodeReady(name)));
    return cluster;
  }

  /** What it is made of; a node's runtime as its kubelet tells it. */
  async description(): Promise<string> {
    const { items } = await this.api.list('/api/v1/nodes');
    const missing = missingContainerd();
    const nodes = (items as { metadata: { name: string }; status: { nodeInfo: Record<string, string> } }[])
      .map(
        ({ metadata, status }) =>
          `${metadata.name}: kubelet ${status.nodeInfo.kubeletVersion}, ${status.nodeInfo.containerRuntimeVersion}`,
      )
      .join('; ');
    return missing === undefined ? nodes : `${nodes}; no containerd ${CONTAINERD}: ${missing}`;
  }

  get api(): Api {
    return this.plane.admin;
  }

  node(name: string): RealNode {
    const found = this.nodes.find((node) => node.name === name);
    if (found === undefined) throw new Error(`no node ${name}`);
    return found;
  }

  #startControllers(): void {
    const common = [`--kubeconfig=${this.kubeconfig}`, '--leader-elect=false'];
    this.#controllers.push(
      this.testbed.start([
        this.programs['kube-controller-manager'],
        ...common,
        `--service-account-private-key-file=${this.plane.accountsKeyFile}`,
        `--root-ca-file=${this.plane.caFile}`,
        '--node-monitor-grace-period=20s',
        '--secure-port=0',
      ]),
      this.testbed.start([this.programs['kube-scheduler'], ...common, '--secure-port=0']),
    );
  }

  async untilNodeReady(name: string, wanted = true, limit = 120_000): Promise<void> {
    await until(
      `node ${name} is ${wanted ? '' : 'not '}ready`,
      async () => {
        const node = (await this.api.get(`/api/v1/nodes/${name}`)) as { status?: PodObject['status'] } | null;
        const ready = node?.status?.conditions?.find(({ type }) => type === 'Ready')?.status === 'True';
        return ready === wanted;
      },
      limit,
    ).catch((error: Error) => {
      const node = this.node(name);
      throw new Error(`${error.message}; kubelet: ${node.log('kubelet')}; containerd: ${node.log('containerd')}`);
    });
  }

  // ---- objects -----------------------------------------------------------------------------------------------------

  /** kubectl; returns its stdout; throws if it fails. */
  async kubectl(args: readonly string[], options: ExecOptions = {}): Promise<string> {
    const outcome = await exec([this.programs.kubectl, `--kubeconfig=${this.kubeconfig}`, ...args], options);
    if (outcome.status !== 0)
      throw new Error(
        `kubectl ${args.join(' ')}: exit ${outcome.status}: ${outcome.stderr.trim()} ${outcome.stdout.trim()}`,
      );
    return outcome.stdout;
  }

  /** helm with the chart in the release's place; returns its stdout; throws if it fails. */
  async helm(args: readonly string[], timeout = 300_000): Promise<string> {
    const nowhere = {
      HELM_CONFIG_HOME: '/nonexistent',
      HELM_DATA_HOME: '/nonexistent',
      HELM_CACHE_HOME: '/nonexistent',
    };
    const argv = [await helmProgram(), `--kubeconfig=${this.kubeconfig}`, ...args];
    // helm keeps what it knows of the cluster in $HOME/.kube/cache.
    const env = { PATH: process.env.PATH ?? '', HOME: this.plane.directory, ...nowhere };
    const outcome = await exec(argv, { timeout, env });
    if (outcome.status !== 0) {
      throw new Error(
        `helm ${args.join(' ')}: exit ${outcome.status}: ${outcome.stderr.trim()} ${outcome.stdout.trim()}`,
      );
    }
    return outcome.stdout;
  }

  get chart(): string {
    return CHART;
  }

  /** kubectl apply of objects. */
  async apply(...objects: Json[]): Promise<void> {
    const input = objects.map((object) => JSON.stringify(object)).join('\n---\n');
    await this.kubectl(['apply', '-f', '-'], { input, timeout: 60_000 });
  }

  async pods(namespace: string, selector = ''): Promise<PodObject[]> {
    const query = selector === '' ? {} : { labelSelector: selector };
    const { items } = await this.api.list(`/api/v1/namespaces/${namespace}/pods`, query);
    return items as unknown as PodObject[];
  }

  async pod(namespace: string, name: string): Promise<PodObject | null> {
    return (await this.api.get(`/api/v1/namespaces/${namespace}/pods/${name}`)) as PodObject | null;
  }

  async untilPod(
    namespace: string,
    name: string,
    what: string,
    condition: (pod: PodObject) => boolean,
    limit = 60_000,
  ): Promise<PodObject> {
    let last: PodObject | null = null;
    await until(
      `${namespace}/${name} ${what}`,
      async () => {
        last = await this.pod(namespace, name);
        return last !== null && condition(last);
      },
      limit,
    ).catch(async (error: Error) => {
      const events = await this.kubectl([
        'get',
        'events',
        '-n',
        namespace,
        '--field-selector',
        `involvedObject.name=${name}`,
      ]).catch(String);
      throw new Error(`${error.message}: ${JSON.stringify(last?.status)}\n${events}`);
    });
    return last as unknown as PodObject;
  }

  async untilReady(namespace: string, name: string, limit = 60_000): Promise<PodObject> {
    return this.untilPod(namespace, name, 'is ready', isReady, limit);
  }

  /** All pods with these labels, when there are `count` and all are ready. */
  async untilAllReady(namespace: string, selector: string, count: number, limit = 90_000): Promise<PodObject[]> {
    let found: PodObject[] = [];
    await until(
      `${count} pods ${selector} of ${namespace} are ready`,
      async () => {
        found = (await this.pods(namespace, selector)).filter(
          ({ metadata }) => metadata.deletionTimestamp === undefined,
        );
        return found.length === count && found.every(isReady);
      },
      limit,
    ).catch(async (error: Error) => {
      const events = await this.kubectl(['get', 'events', '-n', namespace, '--sort-by=.lastTimestamp']).catch(String);
      const states = found
        .filter((pod) => !isReady(pod))
        .slice(0, 3)
        .map(({ metadata, status }) => `${metadata.name}: ${JSON.stringify(status).slice(0, 1_500)}`)
        .join('\n');
      throw new Error(`${error.message}:\n${states}\n${events.slice(-3_000)}`);
    });
    return found;
  }

  /** Runs a command in a pod through API server and kubelet. */
  async exec(namespace: string, name: string, command: readonly string[], timeout = 30_000): Promise<string> {
    return this.kubectl(['exec', '-n', namespace, name, '--', ...command], { timeout });
  }

  /** A pod's log through the API, as text. */
  async logs(namespace: string, name: string, container: string): Promise<string> {
    const path = `/api/v1/namespaces/${namespace}/pods/${name}/log?container=${container}`;
    const headers = { authorization: `Bearer ${readFileSync(this.plane.adminTokenFile, 'utf8').trim()}` };
    return new Promise((resolve, reject) => {
      const sent = request(new URL(path, this.plane.url), { ca: readFileSync(this.plane.caFile), headers }, (got) => {
        let text = '';
        got.setEncoding('utf8').on('data', (more: string) => {
          text += more;
        });
        got.once('end', () =>
          got.statusCode === 200 ? resolve(text) : reject(new Error(`${path}: ${got.statusCode}: ${text}`)),
        );
      });
      sent.once('error', reject).end();
    });
  }
}

export function isReady({ status }: PodObject): boolean {
  return status.conditions?.some(({ type, status: state }) => type === 'Ready' && state === 'True') === true;
}
