// SPDX-License-Identifier: Apache-2.0
// What stands for the mesh in the demo, in either contract: a proxy in a pod of its own, or a node agent and a ztunnel
// that has listeners in every enrolled pod.

import { type ChildProcess, spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { DemoNative } from './native-topology.ts';
import { type SeenConnection, TransparentProxy } from './proxy.ts';
import { PORTS } from './scenarios.ts';
import type { Family, PodName, Topology } from './topology.ts';
import { StandInZtunnel } from './ztunnel.ts';

export type DemoContract = 'shared' | 'in-pod';

/** Kubernetes namespaces of the pods. */
export const NAMESPACES: Readonly<Record<PodName, string>> = { client: 'demo', server: 'demo', proxy: 'demo-mesh' };

export interface Mesh {
  /** accepted connections; the owner may empty it */
  readonly seen: SeenConnection[];
  /** Destinations that the shared proxy reaches through their port 15008. */
  aimAt(secondLegTo: readonly string[]): void;
  close(): Promise<void>;
}

export function startMesh(
  native: DemoNative,
  topology: Topology,
  families: readonly Family[],
  contract: DemoContract,
  self: readonly string[],
): Promise<Mesh> {
  return contract === 'shared' ? startShared(native, topology, families) : startInPod(native, topology, families, self);
}

async function startShared(native: DemoNative, topology: Topology, families: readonly Family[]): Promise<Mesh> {
  const address = families.includes(6) ? '::' : '0.0.0.0';
  const proxy = await TransparentProxy.start(native, { netns: topology.places.proxy.netns, address, ports: PORTS });
  return {
    seen: proxy.seen,
    aimAt: (secondLegTo) => {
      proxy.secondLegTo = new Set(secondLegTo);
    },
    close: () => proxy.close(),
  };
}

async function startInPod(
  native: DemoNative,
  topology: Topology,
  families: readonly Family[],
  self: readonly string[],
): Promise<Mesh> {
  const { base, stateDir, runDir } = topology.paths;
  const pods = (['client', 'server'] as const).map((name) => ({
    namespace: NAMESPACES[name],
    name,
    serviceAccount: `${name}-sa`,
    addresses: families.map((family) => topology.places[name].address[family]),
  }));
  const workloads = join(base, 'workloads.yaml');
  // JSON is YAML.
  writeFileSync(
    workloads,
    JSON.stringify(pods.map(({ namespace, name, serviceAccount }) => ({ namespace, name, serviceAccount }))),
  );
  const socket = join(base, 'ztunnel.sock');
  const agent = new DemoAgent(native, topology, [
    ...self,
    'agent',
    ...['--state-dir', stateDir, '--run-dir', runDir, '--zds-socket', socket, '--workloads', workloads],
    ...['--monitoring-port', '0', '--health-port', '0'],
  ]);
  const seen: SeenConnection[] = [];
  const ztunnel = StandInZtunnel.start(native, {
    socket,
    xds: pods,
    drainMs: 0,
    onSeen: (_uid, connection) => seen.push(connection),
  });
  const close = async () => {
    await ztunnel.terminate();
    await agent.close();
  };
  try {
    // It connects when the agent listens, and is ready when the agent has told it of every pod.
    while (!ztunnel.ready) await Promise.race([ztunnel.change(), agent.ended]);
  } catch (error) {
    await close();
    throw error;
  }
  return { seen, aimAt: () => {}, close };
}

/** The agent as a process in the node's namespace; ends when this process does. */
class DemoAgent {
  /** Rejects if it ends by itself. */
  readonly ended: Promise<never>;
  readonly #child: ChildProcess;
  readonly #closed: Promise<void>;
  #log = '';

  constructor(native: DemoNative, topology: Topology, [file = '', ...args]: readonly string[]) {
    const child = native.inNetns(topology.places.node.netns, () =>
      spawn(file, args, { stdio: ['ignore', 'ignore', 'pipe', 'ipc'] }),
    );
    this.#child = child;
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#log = (this.#log + text).slice(-4_000);
    });
    const { promise, reject } = Promise.withResolvers<never>();
    this.ended = promise;
    // Nobody may be waiting for it any more.
    promise.catch(() => {});
    this.#closed = new Promise((resolve) => {
      child.once('error', (error) => {
        reject(error);
        resolve();
      });
      child.once('close', (code) => {
        reject(new Error(`the agent ended (exit ${code}): ${this.#log.trim()}`));
        resolve();
      });
    });
  }

  async close(): Promise<void> {
    this.#child.kill('SIGTERM');
    await this.#closed;
  }
}
