// SPDX-License-Identifier: Apache-2.0
// /metrics on one port, /healthz and /readyz on another, as Istio's node agent has them. A port that is taken is fatal:
// an agent whose probes somebody else answers is worse than none.

import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Agent } from './agent.ts';

export interface AgentPorts {
  /** 0: not served */
  monitoring: number;
  health: number;
  close(): Promise<void>;
}

interface Page {
  status: number;
  type: string;
  body: string;
}

const TEXT = 'text/plain; charset=utf-8';

/** Throws Error that names setting, address and reason. */
export async function servePorts(agent: Agent): Promise<AgentPorts> {
  const { address, monitoringPort, healthPort } = agent.settings;
  const servers: Server[] = [];
  const close = async () => {
    await Promise.all(
      servers.map((server) => {
        const closed = new Promise((resolve) => server.close(resolve));
        server.closeAllConnections();
        return closed;
      }),
    );
  };
  try {
    const monitoring = await open(servers, 'monitoring-port', address, monitoringPort, {
      '/metrics': async () => {
        agent.refreshMetrics();
        const { registry } = agent.metrics;
        return { status: 200, type: registry.contentType, body: await registry.metrics() };
      },
    });
    const health = await open(servers, 'health-port', address, healthPort, {
      '/healthz': async () => ({ status: 200, type: TEXT, body: 'ok\n' }),
      '/readyz': async () => {
        const unready = agent.readiness.unready();
        const body = unready.map(({ condition, reason }) => `${condition}: ${reason}\n`).join('');
        return { status: unready.length === 0 ? 200 : 503, type: TEXT, body: body || 'ok\n' };
      },
    });
    return { monitoring, health, close };
  } catch (error) {
    await close();
    throw error;
  }
}

async function open(
  servers: Server[],
  setting: string,
  host: string,
  port: number,
  pages: Readonly<Record<string, () => Promise<Page>>>,
): Promise<number> {
  if (port === 0) return 0;
  const server = createServer((request, response) => {
    const path = (request.url ?? '').split('?', 1)[0] ?? '';
    const page = request.method === 'GET' || request.method === 'HEAD' ? pages[path] : undefined;
    const missing: Page = { status: 404, type: TEXT, body: `${Object.keys(pages).join(' ')}\n` };
    (page?.() ?? Promise.resolve(missing))
      .catch((error: unknown): Page => ({ status: 500, type: TEXT, body: `${String(error)}\n` }))
      .then(({ status, type, body }) => {
        response.writeHead(status, { 'Content-Type': type });
        response.end(request.method === 'HEAD' ? undefined : body);
      });
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error) => {
      reject(new Error(`--${setting} ${port}: ${error.message}`, { cause: error }));
    });
    // Without an address Node takes all of both families.
    server.listen({ port, ...(host !== '' && { host }) }, resolve);
  });
  servers.push(server);
  return (server.address() as AddressInfo).port;
}
