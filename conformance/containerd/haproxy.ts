// SPDX-License-Identifier: Apache-2.0
import { writeFile } from 'node:fs/promises';
import { type Running, until } from '../netns.ts';
import type { Pod, ThrowawayNode } from './throwaway-node.ts';

/** A request as HAProxy took it: on which listener, from whom, for which original destination. */
export type Seen = {
  listener: Listener;
  client: string;
  destination: string;
  port: number;
  uri: string;
};
export type Listener = keyof typeof ports;

const ports = { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008 };

// `transparent` is IP_TRANSPARENT on the listener; `usesrc clientip` binds the onward socket to the client's address;
// server address and port 0 stand for the original destination.
const configuration = `global
  log stdout format raw local0
  maxconn 100
defaults
  mode http
  log global
  log-format "%ft %ci %fi %fp %HU"
  timeout connect 5s
  timeout client 20s
  timeout server 20s
  default_backend original_destination
${Object.entries(ports)
  .map(
    ([name, port]) => `frontend ${name}\n  bind 0.0.0.0:${port} transparent\n  bind [::]:${port} v6only transparent\n`,
  )
  .join('')}backend original_destination
  source 0.0.0.0 usesrc clientip
  server original 0.0.0.0:0
`;

/** Debian's HAProxy as the node's transparent proxy, in the network namespace of a pod. */
export class HAProxy {
  readonly #process: Running;

  private constructor(process: Running) {
    this.#process = process;
  }

  /** Returns when all listeners are there, of both families. */
  static async start(node: ThrowawayNode, pod: Pod): Promise<HAProxy> {
    await writeFile(node.path('/run/haproxy.cfg'), configuration);
    const haproxy = node.launch(['haproxy', '-db', '-f', '/run/haproxy.cfg'], pod.netns);
    const listeners = 2 * Object.keys(ports).length;
    await until(
      'HAProxy listens',
      async () => {
        if (!haproxy.alive) throw new Error(`HAProxy ended: ${haproxy.output}`);
        const listening = await node.run(['ss', '--no-header', '--listening', '--tcp', '--numeric'], {
          netns: pod.netns,
        });
        return listening.split('\n').filter((line) => line !== '').length === listeners;
      },
      20_000,
    );
    return new HAProxy(haproxy);
  }

  /** In the order of their ends. */
  get seen(): Seen[] {
    const requests: Seen[] = [];
    for (const line of this.#process.output.split('\n')) {
      const [, listener, client, destination, port, uri] = /^(\w+) (\S+) (\S+) (\d+) (\/\S*)$/.exec(line) ?? [];
      if (!listener || !(listener in ports) || !client || !destination || !uri) continue;
      requests.push({ listener: listener as Listener, client, destination, port: Number(port), uri });
    }
    return requests;
  }

  /** What was seen of the request for `uri`, waiting for the log line, which HAProxy writes when the request has ended. */
  async sightingsOf(uri: string): Promise<Seen[]> {
    const sightings = () => this.seen.filter((request) => request.uri === uri);
    await until(`HAProxy logs ${uri}`, () => sightings().length > 0, 10_000);
    return sightings();
  }

  async stop(): Promise<void> {
    await this.#process.stop();
  }
}
