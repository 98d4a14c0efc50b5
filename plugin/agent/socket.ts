// SPDX-License-Identifier: Apache-2.0
// agent.sock: HTTP and JSON for the plugin and the command line, root only. Every error is {code, msg, details} with a
// code of the plugin's registry, which becomes what ADD prints.

import { chmodSync, rmSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import * as v from 'valibot';
import { agentSocket } from '../agent-client.ts';
import { CniError, Code, quote } from '../cni/errors.ts';
import type { Agent } from './agent.ts';
import { AGENT_LOG_LEVELS } from './settings.ts';

const BODY_LIMIT = 64 * 1024;
const REQUEST_TIMEOUT_MS = 10_000;
const MAX_CONNECTIONS = 512;

const text = v.pipe(v.string(), v.maxLength(4096));
const number = v.pipe(v.string(), v.regex(/^[0-9]{1,20}$/));
const name = { network: text, containerId: text, ifname: text };
const ATTACH = v.object({
  ...name,
  stateDir: text,
  netns: v.object({ path: text, dev: number, ino: number, cookie: number }),
  deadlineMs: v.pipe(v.number(), v.minValue(1), v.maxValue(120_000)),
});
const DETACH = v.object(name);
const DECIDE = v.object({ pod: v.object({ namespace: text, name: text, uid: text }) });
const LOG_LEVEL = v.object({ level: v.picklist(AGENT_LOG_LEVELS) });

type Handler = (agent: Agent, body: unknown) => Promise<object> | object;

const ROUTES: Readonly<Record<string, Handler>> = {
  'POST /v1/attach': async (agent, body) => {
    await agent.attached(read(ATTACH, body));
    return {};
  },
  'POST /v1/detach': async (agent, body) => {
    await agent.detached(read(DETACH, body));
    return {};
  },
  'POST /v1/decide': (agent, body) => agent.decide(read(DECIDE, body).pod),
  'GET /v1/workloads': (agent) => listWorkloads(agent),
  'GET /v1/status': (agent) => ({
    pid: process.pid,
    zds: { socket: agent.settings.zdsSocket, connections: agent.zds?.connections ?? [] },
    workloads: agent.registry.size,
    unacknowledged: [...agent.registry.values()].filter(({ uid }) => agent.zds?.answerOf(uid) !== null).length,
    markForgeable: agent.forgeable,
    unready: agent.readiness.unready(),
    logLevel: agent.log.level,
  }),
  'PUT /v1/log-level': (agent, body) => {
    const { level } = read(LOG_LEVEL, body);
    agent.log.level = level;
    return { level };
  },
};

export interface AgentSocket {
  close(): Promise<void>;
}

/** The caller holds the agent's lock, so whatever has the path now is nobody's any more. */
export async function serveAgentSocket(agent: Agent): Promise<AgentSocket> {
  const path = agentSocket(agent.settings.runDir);
  rmSync(path, { force: true });
  const server = createServer(
    { requestTimeout: REQUEST_TIMEOUT_MS, headersTimeout: REQUEST_TIMEOUT_MS },
    (request, response) => {
      answer(agent, request, response).catch((error: unknown) => {
        agent.log.error({ error: String(error) }, 'a request on agent.sock failed');
        response.destroy();
      });
    },
  );
  server.maxConnections = MAX_CONNECTIONS;
  // The directory is 0700, so nobody can connect before this.
  await listening(server, path);
  chmodSync(path, 0o600);
  agent.readiness.add('agent.sock', () => (server.listening ? null : `${path} is not served`));
  return {
    close: async () => {
      const closed = new Promise((resolve) => server.close(resolve));
      server.closeAllConnections();
      await closed;
    },
  };
}

async function answer(agent: Agent, request: IncomingMessage, response: ServerResponse): Promise<void> {
  const route = `${request.method} ${request.url}`;
  const handler = ROUTES[route];
  let status = 200;
  let document: object;
  try {
    const body = await readBody(request);
    if (handler === undefined) throw new Refusal(404, `no ${quote(route)}; there is ${Object.keys(ROUTES).join(', ')}`);
    document = await handler(agent, body);
  } catch (error) {
    const { status: failed, error: failure } = failureOf(error);
    status = failed;
    document = { code: failure.code, msg: failure.msg, details: failure.details };
    agent.log[status >= 500 ? 'error' : 'warn'](
      { route, status, code: failure.code, details: failure.details },
      failure.msg,
    );
  }
  if (route.startsWith('POST ')) agent.metrics.pluginRequests.inc({ response_code: status });
  if (response.destroyed) return;
  const bytes = Buffer.from(JSON.stringify(document));
  response.writeHead(status, { 'Content-Type': 'application/json', 'Content-Length': bytes.length });
  response.end(bytes);
}

/** A request that is at fault itself. */
class Refusal extends Error {
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

function failureOf(error: unknown): { status: number; error: CniError } {
  if (error instanceof CniError) {
    return { status: error.code === Code.TRY_AGAIN_LATER ? 503 : 409, error };
  }
  if (error instanceof Refusal) {
    return {
      status: error.status,
      error: new CniError(Code.AGENT_REFUSED, 'not a request of agent.sock', error.message),
    };
  }
  const details = error instanceof Error ? error.message : String(error);
  return { status: 500, error: new CniError(Code.AGENT_REFUSED, 'the node agent failed', details, { cause: error }) };
}

async function readBody(request: IncomingMessage): Promise<unknown> {
  const chunks: Buffer[] = [];
  let length = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    length += chunk.length;
    if (length > BODY_LIMIT) throw new Refusal(413, `a body of more than ${BODY_LIMIT} bytes`);
    chunks.push(chunk);
  }
  if (length === 0) return undefined;
  try {
    return JSON.parse(Buffer.concat(chunks).toString('utf8'));
  } catch {
    throw new Refusal(400, `a body of ${length} bytes that is not JSON`);
  }
}

function read<T extends v.GenericSchema>(schema: T, body: unknown): v.InferOutput<T> {
  const result = v.safeParse(schema, body);
  if (result.success) return result.output;
  const [issue] = result.issues;
  throw new Refusal(400, `${v.getDotPath(issue) ?? 'body'}: ${issue.message}`);
}

function listWorkloads(agent: Agent): object {
  return {
    workloads: [...agent.registry.values()].map(({ uid, names, netns, attachments }) => {
      const answer = agent.zds?.answerOf(uid);
      return {
        uid,
        ...names,
        netns: { path: netns.path, ino: `${netns.ino}` },
        attachments: [...attachments],
        acknowledged: answer === null,
        error: answer ?? null,
      };
    }),
  };
}

function listening(server: Server, path: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen({ path }, () => {
      server.off('error', reject);
      resolve();
    });
  });
}
