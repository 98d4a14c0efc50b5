// SPDX-License-Identifier: Apache-2.0
//
// What the sections of the life cycle share: the cluster, the pods that live through all of it, and the ways that their
// traffic goes in either contract.

import { HUB } from '../../deploy/image/reference.ts';
import { until } from '../netns.ts';
import { type Cluster, NODE_NAMES, type PodObject } from './cluster.ts';
import { MODE, pod, REDIRECTION, role, SYSTEM, type Workload } from './manifests.ts';
import { expectWay, urlOf } from './mesh.ts';
import type { Steps } from './steps.ts';

export type Contract = 'shared' | 'in-pod';

export const SHOP = 'shop';
export const PORT = 8080;
export const [ONE, TWO] = NODE_NAMES;
const SERVE = role('serve', String(PORT));
/** A pod that answers, and is ready when it does. */
export const SERVER = {
  command: SERVE,
  container: { readinessProbe: { tcpSocket: { port: PORT }, periodSeconds: 1 } },
};

/** A row of `pods -o json`. */
export interface Row {
  namespace: string;
  name: string;
  uid: string;
  containerId: string;
  network: string;
  addresses: string[];
  role: 'pod' | 'proxy' | 'none';
  state: string;
  netns: { path: string };
  hostInterface: { name: string };
  programs: { alive: number; attached: unknown[] };
}

export class Ground {
  readonly cluster: Cluster;
  readonly contract: Contract;
  readonly step: Steps['step'];
  readonly section: Steps['section'];
  readonly #pods = new Map<string, PodObject>();

  constructor(cluster: Cluster, steps: Steps, contract: Contract) {
    this.cluster = cluster;
    this.contract = contract;
    this.step = steps.step.bind(steps);
    this.section = steps.section.bind(steps);
  }

  /** A pod of the shop that came up. */
  pod(name: string): PodObject {
    const found = this.#pods.get(name);
    if (found === undefined) throw new Error(`${name} has not come up`);
    return found;
  }

  keep(object: PodObject): PodObject {
    this.#pods.set(object.metadata.name, object);
    return object;
  }

  /** Applies a pod and waits until it is ready. */
  async run(workload: Omit<Workload, 'namespace'> & { namespace?: string }, limit = 60_000): Promise<PodObject> {
    const whole = { namespace: SHOP, ...workload };
    await this.cluster.apply(pod(whole));
    const ready = await this.cluster.untilReady(whole.namespace, whole.name, limit);
    return whole.namespace === SHOP ? this.keep(ready) : ready;
  }

  /** Reads the pods that live through all of it again: their addresses may have changed. */
  async refresh(): Promise<void> {
    for (const name of this.#pods.keys()) {
      const found = await this.cluster.pod(SHOP, name);
      if (found === null) this.#pods.delete(name);
      else this.#pods.set(name, found);
    }
  }

  async delete(name: string, more: readonly string[] = []): Promise<void> {
    await this.cluster.kubectl(['delete', 'pod', '-n', SHOP, name, ...more], { timeout: 90_000 });
    this.#pods.delete(name);
  }

  async label(value: string | null): Promise<void> {
    await this.cluster.plane.label(`/api/v1/namespaces/${SHOP}`, { [MODE]: value });
  }

  /** Every pod of the shop that is the mesh's affair. */
  async untilAnnotated(value: string | undefined, limit = 30_000): Promise<void> {
    let wrong: string[] = [];
    await until(
      `all pods of ${SHOP} are annotated ${value}`,
      async () => {
        const pods = (await this.cluster.pods(SHOP)).filter(
          ({ spec, status }) => spec.hostNetwork !== true && status.phase === 'Running',
        );
        wrong = pods
          .filter(({ metadata }) => metadata.annotations?.[REDIRECTION] !== value)
          .map(({ metadata }) => `${metadata.name}: ${metadata.annotations?.[REDIRECTION]}`);
        return wrong.length === 0;
      },
      limit,
    ).catch(async (error: Error) => {
      throw new Error(`${error.message}: ${wrong.join(', ')}\n${await this.agentLogs()}`);
    });
  }

  async agentLogs(): Promise<string> {
    const args = ['logs', '-n', SYSTEM, '-l', 'k8s-app=istio-cni-node', '-c', 'agent', '--tail', '12'];
    return this.cluster.kubectl(args).catch(String);
  }

  /** `pods -o json` on a node. */
  async rows(node: string): Promise<Row[]> {
    const text = await this.cluster.node(node).run(['/opt/cni/bin/ambient-redirect', 'pods', '-o', 'json']);
    return JSON.parse(text) as Row[];
  }

  /** Rows of both nodes that are enrolled. */
  async enrolled(): Promise<Row[]> {
    const rows = await Promise.all(NODE_NAMES.map((node) => this.rows(node)));
    return rows.flat().filter(({ role: of, state }) => of === 'pod' && state === 'attached');
  }

  /**
   * Which proxies see a request. Shared: the client's sees it as outbound and reaches a pod of its own node straight; a
   * connection that comes by the node's stack (from the other node, or by a Service address) is seen once more, as
   * inbound of the pod that it comes to. In-pod: the stand-in knows pods by their addresses, and goes to their 15008.
   */
  ways(from: string, to: string, by: 'pod' | 'service'): string[] {
    const out = `${from} outbound`;
    if (this.contract === 'in-pod') return [out, `${to} ${by === 'pod' ? 'inboundHBONE' : 'inboundPlaintext'}`];
    return from === to && by === 'pod' ? [out] : [out, `${to} inboundPlaintext`];
  }

  /** From client to a pod on the same node and on the other, to their addresses of both families and their Services. */
  async traffic(redirected: boolean, names: readonly string[] = ['near', 'far']): Promise<void> {
    const client = this.pod('client');
    for (const name of names) {
      const server = this.pod(name);
      const ways = (by: 'pod' | 'service') =>
        redirected ? this.ways(client.spec.nodeName, server.spec.nodeName, by) : [];
      for (const family of [4, 6] as const) {
        await expectWay(this.cluster, client, urlOf(server, PORT, family), ways('pod'), name);
      }
      const ip = await this.serviceAddress(SHOP, name);
      await expectWay(this.cluster, client, `http://${ip}:${PORT}/`, ways('service'), name);
    }
  }

  async serviceAddress(namespace: string, name: string): Promise<string> {
    const service = (await this.cluster.api.get(`/api/v1/namespaces/${namespace}/services/${name}`)) as {
      spec: { clusterIP: string };
    } | null;
    if (service === null) throw new Error(`no service ${name}`);
    return service.spec.clusterIP;
  }

  /** Arguments of helm install and upgrade for this contract. */
  release(tag: string): string[] {
    const values = [
      `hub=${HUB}`,
      `tag=${tag}`,
      'pullPolicy=Never',
      // As Istio 1.20's document has it.
      ...(this.contract === 'shared' ? ['cni.ambient.redirectMode=ebpf'] : []),
    ];
    return [
      'ambient-redirect',
      this.cluster.chart,
      '-n',
      SYSTEM,
      ...values.flatMap((value) => ['--set-string', value]),
    ];
  }

  /** A file that a node has at this moment, or '' */
  async file(node: string, path: string): Promise<string> {
    return this.cluster
      .node(node)
      .run(['cat', path])
      .catch(() => '');
  }
}
