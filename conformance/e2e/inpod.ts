// SPDX-License-Identifier: Apache-2.0
//
// One node with pods in the in-pod contract, each with a proxy inside (inpod_proxy.py), one pod that is not enrolled,
// an outsider and the host. What tells how a packet went is tcpdump on the host-side veths: looped packets never get
// there.

import { mkdirSync, readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { join } from 'node:path';
import { expect } from 'vitest';
import { type Outcome, type Running, until } from '../netns.ts';
import { Capture } from './capture.ts';
import { type Count, counters, increases } from './counters.ts';
import { type Connection, type ConnectOptions, type Endpoint, EndpointError } from './endpoint.ts';
import {
  executable,
  type Family,
  gateway,
  outsiderAddress,
  type Pod,
  type PodOptions,
  requireExecutable,
  Topology,
  type TopologyOptions,
} from './topology.ts';

export const APP = 8080;
/** Below a SYN's first retransmission, so one attempt. */
export const ONE_SYN = 600;

export type Actor = 'client' | 'server' | 'plain' | 'outsider' | 'host';

/** A connection that a proxy accepted. */
export interface Proxied {
  listener: 'outbound' | 'inbound' | 'hbone';
  source: string;
  sourcePort: number;
  destination: string;
  destinationPort: number;
}

export class InPodProxy {
  readonly #pod: Pod;
  readonly #topology: Topology;
  #process: Running | undefined;
  #log: string | undefined;
  #starts = 0;

  constructor(topology: Topology, pod: Pod) {
    this.#topology = topology;
    this.#pod = pod;
  }

  /** `wrap`: a command that runs the proxy, as "cgroup.ts" does. */
  async start(args: readonly string[] = [], wrap: readonly string[] = []): Promise<void> {
    const program = join(import.meta.dirname, 'inpod_proxy.py');
    const { testbed } = this.#topology;
    // A file: what a client's greeting proves to be written can be read, whatever pipes are behind with.
    this.#log = join(testbed.directory(`proxy-${this.#pod.label}-${++this.#starts}`), 'log');
    const argv = [...wrap, '/usr/bin/python3', program, '--log', this.#log, ...args];
    const started = testbed.start(this.#pod.netns.argv(argv));
    await until(`the proxy in ${this.#pod.label} listens`, () => {
      if (!started.alive) throw new Error(`it ended: ${started.output}`);
      return started.output.includes('ready');
    });
    this.#process = started;
  }

  async kill(): Promise<void> {
    await this.#process?.stop('SIGKILL');
  }

  /** So far, since the last start. */
  proxied(): Proxied[] {
    return (this.#log === undefined ? '' : readFileSync(this.#log, 'utf8'))
      .split('\n')
      .filter((line) => line.startsWith('{'))
      .map((line) => JSON.parse(line) as Proxied);
  }

  from(sourcePort: number): Proxied[] {
    return this.proxied().filter((one) => one.sourcePort === sourcePort);
  }
}

/**
 * In the place of the node agent, whose own tests are elsewhere: acknowledges every attachment, whoever listens in the
 * pod. What the programs do must not depend on it.
 */
export function acknowledge(topology: Topology): Promise<void> {
  mkdirSync(topology.runDir, { recursive: true, mode: 0o700 });
  const server = createServer((request, response) => {
    // It has nothing to report.
    response.statusCode = request.method === 'POST' ? 200 : 404;
    request.resume().on('end', () => response.setHeader('content-type', 'application/json').end('{}'));
  });
  topology.testbed.defer(() => {
    server.close();
    server.closeAllConnections();
  });
  return new Promise((resolve, reject) => {
    server.once('error', reject).listen(join(topology.runDir, 'agent.sock'), resolve);
  });
}

export interface InPodOptions extends Partial<TopologyOptions> {
  client?: PodOptions;
  server?: PodOptions;
}

export class InPodMesh {
  readonly topology: Topology;
  readonly client: Pod;
  readonly server: Pod;
  readonly plain: Pod;
  readonly proxies: Record<'client' | 'server', InPodProxy>;
  #sourcePort = 20_000;

  private constructor({ client = {}, server = {}, ...options }: InPodOptions) {
    requireExecutable();
    const { entry, ...rest } = options;
    this.topology = new Topology({
      primary: 'ptp',
      hook: 'tcx',
      rpFilter: 1,
      ...rest,
      entry: { proxy: { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } }, ...entry },
    });
    const { topology } = this;
    this.client = topology.pod('client', { enroll: true, ...client });
    this.server = topology.pod('server', { enroll: true, ...server });
    this.plain = topology.pod('plain');
    this.proxies = {
      client: new InPodProxy(topology, this.client),
      server: new InPodProxy(topology, this.server),
    };
  }

  /** The pods are there and have servers; their proxies are not started. */
  static async start(options: InPodOptions = {}, ports: readonly number[] = [APP]): Promise<InPodMesh> {
    const mesh = new InPodMesh(options);
    try {
      await acknowledge(mesh.topology);
      await mesh.topology.add(mesh.client, mesh.server, mesh.plain);
      for (const actor of ['client', 'server', 'plain', 'outsider', 'host'] as const) {
        for (const port of ports) await mesh.endpoint(actor).listen(port);
      }
      return mesh;
    } catch (error) {
      mesh.topology.close();
      throw error;
    }
  }

  close(): void {
    this.topology.close();
  }

  endpoint(actor: Actor): Endpoint {
    if (actor === 'host') return this.topology.host;
    if (actor === 'outsider') return this.topology.outsider;
    return this[actor].endpoint;
  }

  address(actor: Actor, family: Family): string {
    if (actor === 'host') return gateway[family];
    if (actor === 'outsider') return outsiderAddress[family];
    return this[actor].addresses[family];
  }

  /** What comes out of the pod, on the host-side veth. */
  capture(pod: Pod, label: string): Promise<Capture> {
    return Capture.start(this.topology.testbed, this.topology.node, pod.hostIfname, label);
  }

  nextPort(): number {
    this.#sourcePort += 1;
    return this.#sourcePort;
  }

  connect(from: Actor, address: string, port = APP, more: ConnectOptions = {}): Promise<Connection> {
    return this.endpoint(from).connect(address, port, { sourcePort: this.nextPort(), ...more });
  }

  async exchanged(connection: Connection, from: Actor, bytes = 20_000): Promise<void> {
    await this.endpoint(from).exchange(connection, bytes);
    expect(await this.endpoint(from).finish(connection)).toBe('bye\n');
  }

  /** The errno's name that connecting ends with; fails if it succeeds. */
  async refused(from: Actor, address: string, port = APP, more: ConnectOptions = {}): Promise<string> {
    try {
      const connection = await this.connect(from, address, port, { timeout: ONE_SYN, ...more });
      throw new Error(`connected, and the server saw ${connection.seen}:${connection.seenPort}`);
    } catch (error) {
      if (error instanceof EndpointError) return error.code;
      throw error;
    }
  }

  counters(): Count[] {
    return counters(this.topology.stateDir);
  }

  moved(before: readonly Count[], pod: Pod): Record<string, number> {
    return increases(before, this.counters(), pod.hostIfindex);
  }

  command(...args: string[]): Promise<Outcome> {
    const { topology } = this;
    return topology.node.exec([executable, ...args, '--state-dir', topology.stateDir, '--run-dir', topology.runDir]);
  }

  async commanded(...args: string[]): Promise<string> {
    const outcome = await this.command(...args);
    expect(outcome, `${args.join(' ')}: ${outcome.stderr}`).toMatchObject({ status: 0 });
    return outcome.stdout;
  }
}
