// SPDX-License-Identifier: Apache-2.0
//
// Says yes on agent.sock to whatever the plugin asks, for tests of packets that bring a proxy of their own and have
// nothing to say about the node agent.

import { chmodSync, mkdirSync } from 'node:fs';
import { createServer } from 'node:http';
import { agentSocket } from '../../plugin/agent-client.ts';
import type { Topology } from './topology.ts';

export async function assentingAgent({ runDir, testbed }: Topology): Promise<void> {
  mkdirSync(runDir, { recursive: true, mode: 0o700 });
  const path = agentSocket(runDir);
  const server = createServer((request, response) => {
    request.resume().on('end', () => {
      response.writeHead(200, { 'Content-Type': 'application/json', 'Content-Length': 2 }).end('{}');
    });
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen({ path }, resolve);
  });
  chmodSync(path, 0o600);
  server.unref();
  testbed.defer(() => {
    server.close();
    server.closeAllConnections();
  });
}
