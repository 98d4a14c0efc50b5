// SPDX-License-Identifier: Apache-2.0
//
// The node agent and the stand-in for ztunnel as processes of the executable, on a topology's node.

import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { callAgent } from '../../plugin/agent-client.ts';
import { executable, type Pod, type Topology } from '../e2e/topology.ts';
import { type Running, until } from '../netns.ts';

/** What `agent` needs on a topology, and where its sockets are. */
export class AgentSite {
  readonly topology: Topology;
  readonly zdsSocket: string;
  readonly workloads: string;
  readonly xds: string;
  readonly #pods: { pod: Pod; serviceAccount: string }[] = [];

  constructor(topology: Topology) {
    this.topology = topology;
    const directory = topology.testbed.directory('agent');
    this.zdsSocket = join(directory, 'ztunnel.sock');
    this.workloads = join(directory, 'workloads.yaml');
    this.xds = join(directory, 'xds.yaml');
    mkdirSync(topology.runDir, { recursive: true, mode: 0o700 });
    this.#write();
  }

  /** Puts pods into the list of the agent and into what ztunnel knows from XDS. */
  know(...pods: Pod[]): void {
    this.#pods.push(...pods.map((pod) => ({ pod, serviceAccount: `${pod.label}-sa` })));
    this.#write();
  }

  /** Addresses are known after the primary plugin's ADD. */
  refresh(): void {
    this.#write();
  }

  #write(): void {
    const rows = this.#pods.map(({ pod, serviceAccount }) => ({
      namespace: pod.options.namespace ?? 'default',
      name: pod.label,
      serviceAccount,
    }));
    // JSON is YAML.
    writeFileSync(this.workloads, JSON.stringify(rows));
    const addresses = this.#pods.map(({ pod }) => Object.values(pod.addresses).filter((address) => address !== ''));
    writeFileSync(this.xds, JSON.stringify(rows.map((row, i) => ({ ...row, addresses: addresses[i] }))));
  }

  async agent(...args: string[]): Promise<AgentProcess> {
    const agent = new AgentProcess(this, args);
    await agent.ready();
    return agent;
  }

  async ztunnel(...args: string[]): Promise<ZtunnelProcess> {
    const ztunnel = new ZtunnelProcess(this, args);
    await ztunnel.until('it is ready', ({ ready }) => ready);
    return ztunnel;
  }
}

export class AgentProcess {
  readonly process: Running;
  readonly #site: AgentSite;

  constructor(site: AgentSite, args: readonly string[]) {
    this.#site = site;
    const { topology, zdsSocket, workloads } = site;
    const directories = ['--state-dir', topology.stateDir, '--run-dir', topology.runDir];
    this.process = topology.testbed.start(
      topology.node.argv([
        executable,
        'agent',
        ...directories,
        ...['--zds-socket', zdsSocket, '--workloads', workloads],
        ...['--monitoring-port', '0', '--health-port', '0', '--log-level', 'debug'],
        ...args,
      ]),
    );
  }

  async ready(): Promise<void> {
    await until('the agent serves', () => {
      if (!this.process.alive) throw new Error(`it ended: ${this.process.output}`);
      return (
        this.process.output.includes('the agent serves') && existsSync(join(this.#site.topology.runDir, 'agent.sock'))
      );
    });
  }

  /** GET of agent.sock. */
  async get<T>(path: string): Promise<T> {
    return (await callAgent(this.#site.topology.runDir, 'GET', path, undefined, 10_000)) as T;
  }

  /** Its log, a line each. */
  get log(): { level: string; msg: string; [field: string]: unknown }[] {
    return this.process.output
      .split('\n')
      .filter((line) => line.startsWith('{') && line.endsWith('}'))
      .map((line) => JSON.parse(line));
  }

  kill(): Promise<void> {
    return this.process.stop('SIGKILL');
  }

  stop(): Promise<void> {
    return this.process.stop('SIGTERM');
  }
}

export interface ZtunnelState {
  ready: boolean;
  served: string[];
  pending: string[];
}

/** A connection that it has accepted. */
export interface Seen {
  uid: string;
  listener: 'outbound' | 'inboundPlaintext' | 'inboundHBONE';
  source: string;
  destination: string;
  port: number;
}

export class ZtunnelProcess {
  readonly process: Running;

  constructor({ topology, zdsSocket, xds }: AgentSite, args: readonly string[]) {
    this.process = topology.testbed.start(
      topology.node.argv([executable, 'stand-in-ztunnel', '--socket', zdsSocket, '--xds', xds, ...args]),
    );
  }

  get #events(): ({ event: string } & Record<string, unknown>)[] {
    return this.process.output
      .split('\n')
      .filter((line) => line.startsWith('{') && line.endsWith('}'))
      .map((line) => JSON.parse(line));
  }

  get state(): ZtunnelState {
    const last = this.#events.findLast(({ event }) => event === 'state');
    return (last as ZtunnelState | undefined) ?? { ready: false, served: [], pending: [] };
  }

  get seen(): Seen[] {
    return this.#events.filter(({ event }) => event === 'seen') as unknown as Seen[];
  }

  async until(what: string, condition: (state: ZtunnelState) => boolean): Promise<void> {
    await until(what, () => {
      if (!this.process.alive) throw new Error(`ztunnel ended: ${this.process.output}`);
      return condition(this.state);
    }).catch((error: Error) => {
      throw new Error(`${error.message}; it is ${JSON.stringify(this.state)}`);
    });
  }
}
