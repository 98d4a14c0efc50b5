// SPDX-License-Identifier: Apache-2.0
//
// A node whose pods are in a real API server: the kubelet's part is played here. A pod is made through the API, its
// sandbox by the chain of plugins, and its status is reported. The agent runs in the node's network namespace and
// reaches the API server through a Front there.

import { join } from 'node:path';
import { type Pod, type PodOptions, Topology, type TopologyOptions } from '../e2e/topology.ts';
import { type Running, until } from '../netns.ts';
import type { ControlPlane, PodSpec } from './control-plane.ts';
import { Front } from './front.ts';

export const REDIRECTION = 'ambient.istio.io/redirection';
export const NODE = 'node-1';

export interface SitePod {
  uid: string;
  namespace: string;
  name: string;
  sandbox: Pod;
}

export class Site {
  readonly plane: ControlPlane;
  readonly front: Front;
  readonly topology: Topology;
  readonly nodeName: string;
  tokenFile: string;
  agent: Running | undefined;

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
    const topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1, ...options });
    try {
      return new Site(plane, await Front.start(topology.testbed, plane, topology.node), topology, nodeName);
    } catch (error) {
      topology.close();
      throw error;
    }
  }

  startAgent({
    entry = {},
    reconcileMs = 30_000,
  }: {
    entry?: Record<string, unknown>;
    reconcileMs?: number;
  } = {}): Running {
    const { topology, front, plane } = this;
    const settings = {
      network: 'pods',
      nodeName: this.nodeName,
      reconcileMs,
      access: { server: front.url, caFile: plane.caFile, tokenFile: this.tokenFile },
      entry: {
        type: 'ambient-redirect',
        enrollment: 'agent',
        hook: topology.options.hook,
        stateDir: topology.stateDir,
        runDir: topology.runDir,
        ...topology.options.entry,
        ...entry,
      },
    };
    const program = join(import.meta.dirname, 'enroller-process.ts');
    this.agent = topology.testbed.start(topology.node.argv([process.execPath, program, JSON.stringify(settings)]));
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
    const sandbox = topology.pod(spec.name, { namespace: spec.namespace, uid: staticUid ?? uid, ...more });
    await topology.addPrimary(sandbox);
    if (plugin) await topology.addOurs(sandbox);
    await plane.setPodStatus(spec.namespace, spec.name, 'Running', [sandbox.addresses[4], sandbox.addresses[6]]);
    return { uid, namespace: spec.namespace, name: spec.name, sandbox };
  }

  /** A ztunnel's pod, which becomes the node's proxy. */
  proxy(name: string): Promise<SitePod> {
    return this.createPod({ namespace: 'istio-system', name, serviceAccount: 'ztunnel' });
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

  close(): void {
    this.topology.close();
  }
}
