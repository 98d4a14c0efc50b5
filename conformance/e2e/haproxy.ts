// SPDX-License-Identifier: Apache-2.0
//
// HAProxy as the node's transparent proxy: it keeps the original destination and the client's address on both sides.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { must, type Namespace, type Running, type Testbed, until } from '../netns.ts';

/** Answered by HAProxy itself at the proxy's own address. */
export const METRICS_PORT = 9090;
/**
 * Outbound connections to this port are made towards 15008 instead, as a ztunnel does for a destination in the mesh;
 * those that arrive at the 15008 listener are made towards INNER_PORT, as a ztunnel unwraps HBONE.
 */
export const TUNNELLED_PORT = 8443;
export const INNER_PORT = 80;
/** As TUNNELLED_PORT, but from the proxy's own address, as ztunnel 1.22 does where it has no HBONE of the client's. */
export const OWN_SOURCE_PORT = 8444;

const configuration = `
global
  log stdout format raw daemon
  nbthread 1
  maxconn 9500
defaults
  mode tcp
  log global
  option logasap
  log-format "conn %ft %ci %cp %fi %fp"
  timeout connect 5s
  timeout client 120s
  timeout server 120s
frontend outbound
  bind :15001 transparent backlog 4096
  bind :::15001 v6only transparent backlog 4096
  tcp-request connection set-var(sess.own) int(1) if { dst_port ${OWN_SOURCE_PORT} }
  tcp-request connection set-dst-port int(15008) if { dst_port ${TUNNELLED_PORT} } or { dst_port ${OWN_SOURCE_PORT} }
  use_backend own_source if { var(sess.own) -m int 1 }
  default_backend original
frontend inbound
  bind :15006 transparent backlog 4096
  bind :::15006 v6only transparent backlog 4096
  default_backend original
frontend hbone
  bind :15008 transparent backlog 4096
  bind :::15008 v6only transparent backlog 4096
  tcp-request connection set-dst-port int(${INNER_PORT})
  default_backend original
backend original
  source 0.0.0.0 usesrc clientip
  server original 0.0.0.0:0
backend own_source
  server original 0.0.0.0:0
frontend metrics
  mode http
  bind :${METRICS_PORT}
  bind :::${METRICS_PORT} v6only
  timeout http-request 5s
  http-request return status 200 content-type text/plain lf-string "proxy %[dst] asked by %[src]\\n"
`;

export type Listener = 'outbound' | 'inbound' | 'hbone' | 'metrics';

/** A connection that HAProxy accepted and passed on. */
export interface Proxied {
  listener: Listener;
  client: string;
  clientPort: number;
  /** What the client had asked for. */
  destination: string;
  destinationPort: number;
}

export class HAProxy {
  readonly namespace: Namespace;
  readonly #testbed: Testbed;
  readonly #directory: string;
  readonly #log: string;
  #process: Running | undefined;

  /** `label` must be new in this testbed. */
  constructor(testbed: Testbed, namespace: Namespace, label: string) {
    this.#testbed = testbed;
    this.namespace = namespace;
    this.#directory = testbed.directory(`haproxy.${label}`);
    this.#log = join(this.#directory, 'log');
    writeFileSync(this.#log, '');
  }

  /** Starts it and waits until its last listener is there. `without`: a frontend that it does not have. */
  async start({ without }: { without?: Listener } = {}): Promise<void> {
    const file = join(this.#directory, 'haproxy.cfg');
    const section = new RegExp(`^frontend ${without}\\n(?: .*\\n)+`, 'm');
    writeFileSync(file, without === undefined ? configuration : configuration.replace(section, ''));
    const listeners = without === undefined ? 8 : 6;
    // Into a file: what a full pipe does not take, HAProxy drops.
    const command = ['sh', '-c', 'exec haproxy -db -f "$1" >>"$2"', 'sh', file, this.#log];
    const running = this.#testbed.start(this.namespace.argv(command));
    this.#process = running;
    await until(`haproxy listens in ${this.namespace.name}`, () => {
      if (!running.alive) throw new Error(`haproxy ended: ${running.output}`);
      const ports = must(this.namespace.argv(['ss', '-Hltn'])).match(/:(15001|15006|15008|9090)\s/g) ?? [];
      return ports.length === listeners;
    });
  }

  async kill(): Promise<void> {
    await this.#process?.stop('SIGKILL');
    this.#process = undefined;
  }

  get pid(): number {
    if (this.#process === undefined) throw new Error('haproxy is not running');
    return this.#process.pid;
  }

  /** What was proxied so far, in order. A connection appears when the one towards the server is established. */
  proxied(): Proxied[] {
    const lines = readFileSync(this.#log, 'utf8').matchAll(/^conn (\w+) (\S+) (\d+) (\S+) (\d+)$/gm);
    return [...lines].map(([, listener, client, clientPort, destination, destinationPort]) => ({
      listener: listener as Listener,
      client: client ?? '',
      clientPort: Number(clientPort),
      destination: destination ?? '',
      destinationPort: Number(destinationPort),
    }));
  }
}
