// SPDX-License-Identifier: Apache-2.0
//
// The six sections of a node's life with ambient-redirect. They build on each other in this order.

import { until } from '../netns.ts';
import type { Cluster, PodObject } from './cluster.ts';
import { NODE_NAMES } from './cluster.ts';
import { agent, clusterService, MODE, namespace, pod, REDIRECTION, role, SYSTEM, ztunnel } from './manifests.ts';
import { expectWay, urlOf } from './mesh.ts';
import type { Steps } from './steps.ts';

export type Contract = 'shared' | 'in-pod';

const SHOP = 'shop';
const PORT = 8080;
const [ONE, TWO] = NODE_NAMES;
const AMBIENT_LINE = 'ambient Writing ambient config: {"ztunnelReady":true,"redirectMode":"eBPF"}';

export class LifeCycle {
  readonly #cluster: Cluster;
  readonly #steps: Steps;
  readonly #contract: Contract;
  readonly #pods = new Map<string, PodObject>();

  constructor(cluster: Cluster, steps: Steps, contract: Contract) {
    this.#cluster = cluster;
    this.#steps = steps;
    this.#contract = contract;
  }

  async run(only: readonly string[] | undefined): Promise<void> {
    const wanted = (section: string) => only === undefined || only.includes(section);
    await this.#before();
    if (wanted('1')) await this.#install();
  }

  #pod(name: string): PodObject {
    const found = this.#pods.get(name);
    if (found === undefined) throw new Error(`${name} has not come up`);
    return found;
  }

  async #before(): Promise<void> {
    const { step } = this.#bound();
    const cluster = this.#cluster;
    await step('workloads run on both nodes, before anything of ours is there', async () => {
      const serve = role('serve', String(PORT));
      const names = [
        ['client', ONE],
        ['near', ONE],
        ['far', TWO],
      ] as const;
      await cluster.apply(namespace(SHOP), namespace(SYSTEM));
      await cluster.apply(
        ...names.map(([name, node]) => pod({ namespace: SHOP, name, node, command: serve })),
        clusterService(SHOP, 'near', PORT),
        clusterService(SHOP, 'far', PORT),
      );
      for (const [name] of names) this.#pods.set(name, await cluster.untilReady(SHOP, name));
    });
    await step('pod to pod, on one node and across, and through Service addresses: direct', () =>
      this.#traffic('direct'),
    );
  }

  async #install(): Promise<void> {
    const { step, section } = this.#bound();
    const cluster = this.#cluster;
    section('1 Install on nodes with running pods');
    await step('ztunnel as a DaemonSet', async () => {
      await cluster.apply(...ztunnel(this.#contract));
      if (this.#contract === 'shared') await cluster.untilAllReady(SYSTEM, 'app=ztunnel', 2);
    });
    await step('the agent as a DaemonSet is ready on both nodes', async () => {
      await cluster.apply(...agent(this.#contract));
      await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
    });
    await step('the pod’s log, read through the API, has the line of Istio’s document', async () => {
      for (const { metadata } of await cluster.pods(SYSTEM, 'k8s-app=istio-cni-node')) {
        await until(
          `${metadata.name} says so`,
          async () =>
            (await cluster.logs(SYSTEM, metadata.name, 'agent')).split('\n').some((line) => says(line, AMBIENT_LINE)),
          20_000,
        );
      }
    });
    await step('not labelled: traffic still goes direct', () => this.#traffic('direct'));
    await step('the namespace is labelled: every pod is annotated', async () => {
      await this.#label('ambient');
      await this.#annotated('enabled');
    });
    await step('pod to pod, on one node and across, and through Service addresses: by the proxy', () =>
      this.#traffic('proxied'),
    );
  }

  // ------------------------------------------------------------------------------------------------------------------

  #bound() {
    return {
      step: this.#steps.step.bind(this.#steps),
      section: this.#steps.section.bind(this.#steps),
    };
  }

  async #label(value: string | null): Promise<void> {
    await this.#cluster.plane.label(`/api/v1/namespaces/${SHOP}`, { [MODE]: value });
  }

  async #annotated(value: string | undefined, limit = 20_000): Promise<void> {
    await until(
      `all pods of ${SHOP} are annotated ${value}`,
      async () => {
        const pods = await this.#cluster.pods(SHOP);
        return pods.every(({ metadata }) => metadata.annotations?.[REDIRECTION] === value);
      },
      limit,
    );
  }

  async #traffic(way: 'direct' | 'proxied'): Promise<void> {
    const cluster = this.#cluster;
    const client = this.#pod('client');
    // Each pod's side of a connection across nodes has a proxy of its own in the shared contract.
    for (const name of ['near', 'far']) {
      const server = this.#pod(name);
      for (const family of [4, 6] as const) {
        await expectWay(cluster, client, urlOf(server, PORT, family), way, { server: name });
      }
      const ip = await this.#serviceAddress(name);
      await expectWay(cluster, client, `http://${ip}:${PORT}/`, way, { server: name });
    }
  }

  async #serviceAddress(name: string): Promise<string> {
    const service = (await this.#cluster.api.get(`/api/v1/namespaces/${SHOP}/services/${name}`)) as {
      spec: { clusterIP: string };
    } | null;
    if (service === null) throw new Error(`no service ${name}`);
    return service.spec.clusterIP;
  }
}

/** A line of the agent's log is JSON. */
function says(line: string, text: string): boolean {
  if (!line.startsWith('{')) return false;
  return (JSON.parse(line) as { msg?: string }).msg === text;
}
