// SPDX-License-Identifier: Apache-2.0
//
// One node with two enrolled pods, one that is not, and HAProxy, for the tests that look at one behaviour each.

import { expect } from 'vitest';
import { type Outcome, until } from '../netns.ts';
import { type Count, counters, increases } from './counters.ts';
import { type Connection, type ConnectOptions, type Endpoint, EndpointError } from './endpoint.ts';
import { HAProxy, INNER_PORT } from './haproxy.ts';
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

export const PORT = INNER_PORT;
/** Below a SYN's first retransmission, so one attempt. */
export const ONE_SYN = 600;

export type Actor = 'client' | 'server' | 'plain' | 'outsider' | 'host';

export interface MeshOptions extends Partial<TopologyOptions> {
  client?: PodOptions;
  server?: PodOptions;
}

export class Mesh {
  readonly topology: Topology;
  readonly client: Pod;
  readonly server: Pod;
  readonly plain: Pod;
  readonly proxy: Pod;
  readonly haproxy: HAProxy;
  /** Below the ephemeral range, so that no proxied connection has a client's port by accident. */
  #sourcePort = 20_000;

  private constructor(options: MeshOptions) {
    requireExecutable();
    this.topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1, ...options });
    const { topology } = this;
    this.client = topology.pod('client', { enroll: true, ...options.client });
    this.server = topology.pod('server', { enroll: true, ...options.server });
    this.plain = topology.pod('plain');
    this.proxy = topology.pod('ztunnel-1', { namespace: 'istio-system' });
    this.haproxy = new HAProxy(topology.testbed, this.proxy.netns, 'only');
  }

  /** Everything up and listening on `ports`. */
  static async start(options: MeshOptions = {}, ports: readonly number[] = [PORT]): Promise<Mesh> {
    const mesh = new Mesh(options);
    try {
      await mesh.topology.add(mesh.client, mesh.server, mesh.plain, mesh.proxy);
      for (const actor of ['client', 'server', 'plain', 'outsider', 'host'] as const) {
        for (const port of ports) await mesh.endpoint(actor).listen(port);
      }
      await mesh.haproxy.start();
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

  nextPort(): number {
    this.#sourcePort += 1;
    return this.#sourcePort;
  }

  /** What nextPort() gave last, and so the source port of the last connect(). */
  get lastPort(): number {
    return this.#sourcePort;
  }

  connect(from: Actor, address: string, port = PORT, more: ConnectOptions = {}): Promise<Connection> {
    return this.endpoint(from).connect(address, port, { sourcePort: this.nextPort(), ...more });
  }

  /** Sends data, and half-closes. */
  async exchanged(connection: Connection, from: Actor, bytes = 20_000): Promise<void> {
    await this.endpoint(from).exchange(connection, bytes);
    expect(await this.endpoint(from).finish(connection)).toBe('bye\n');
  }

  /** Connects, exchanges data, and tells whether the server saw the client's own port. */
  async goesDirect(from: Actor, address: string, port = PORT): Promise<boolean> {
    const connection = await this.connect(from, address, port);
    await this.exchanged(connection, from);
    return isDirect(connection);
  }

  /** The errno's name that connecting ends with; fails if it succeeds. */
  async refused(from: Actor, address: string, port = PORT): Promise<string> {
    try {
      const connection = await this.connect(from, address, port, { timeout: ONE_SYN });
      throw new Error(`connected, and the server saw ${connection.seen}:${connection.seenPort}`);
    } catch (error) {
      if (error instanceof EndpointError) return error.code;
      throw error;
    }
  }

  counters(): Count[] {
    return counters(this.topology.stateDir);
  }

  /** What was counted since `before` at a pod's interface, or at all. */
  moved(before: readonly Count[], pod?: Pod): Record<string, number> {
    return increases(before, this.counters(), pod?.hostIfindex);
  }

  async untilMoved(before: readonly Count[], pod: Pod, key: string, packets = 1): Promise<void> {
    await until(
      `${key} counted ${packets} at ${pod.label}`,
      () => (this.moved(before, pod)[key] ?? 0) >= packets,
    ).catch((error: Error) => {
      throw new Error(`${error.message}; counted: ${JSON.stringify(this.moved(before, pod))}`);
    });
    expect(this.moved(before, pod)[key]).toBe(packets);
  }

  /** Our command line, on the node. */
  command(...args: string[]): Promise<Outcome> {
    const { topology } = this;
    return topology.node.exec([executable, ...args, '--state-dir', topology.stateDir, '--run-dir', topology.runDir]);
  }

  /** The same; fails unless it exits 0. */
  async commanded(...args: string[]): Promise<string> {
    const outcome = await this.command(...args);
    expect(outcome, `${args.join(' ')}: ${outcome.stderr}`).toMatchObject({ status: 0 });
    return outcome.stdout;
  }
}

export function isDirect(connection: Connection): boolean {
  return connection.seenPort === connection.localPort;
}
