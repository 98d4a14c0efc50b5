// SPDX-License-Identifier: Apache-2.0
// The plugin's way to the node agent: one HTTP request over runDir/agent.sock. Written by hand over node:net, because
// loading node:http costs every ADD around 10 ms.

import { join } from 'node:path';
import { CniError, Code, type ErrorCode, registry } from './cni/errors.ts';
import type { AttachmentRecord } from './native.ts';
import type { Directories } from './state.ts';

/** Nobody serves agent.sock, or whoever does gave no answer in time. */
export class AgentAbsentError extends Error {
  override name = 'AgentAbsentError';
}

/** What POST /v1/attach and /v1/detach name; the rest is in the record. */
export interface AttachmentName {
  network: string;
  containerId: string;
  ifname: string;
}

export interface AttachBody extends AttachmentName {
  stateDir: string;
  /** the namespace that the plugin attached in; numbers as text, they have 64 bits */
  netns: { path: string; dev: string; ino: string; cookie: string };
  /** how long the agent may take, in ms */
  deadlineMs: number;
}

export interface DecideBody {
  pod: { namespace: string; name: string; uid: string };
}

export interface Decision {
  enrol: boolean;
  reason: string;
  /** "" if unknown */
  serviceAccount: string;
}

/** An answer that is no 200: the error of CNI that the agent wants the plugin to end with. */
export interface AgentFailure {
  code: number;
  msg: string;
  details: string;
}

/** Longer than the agent's own deadline, so that its words arrive rather than ours. */
const MARGIN_MS = 2_000;
const ANSWER_LIMIT = 256 * 1024;

export function agentSocket(runDir: string): string {
  return join(runDir, 'agent.sock');
}

/** Of ADD: less than what kubelet gives a whole sandbox. */
const ATTACH_DEADLINE_MS = 10_000;
/** Of DEL, which the agent need not hear of: it finds out by itself. */
const DETACH_DEADLINE_MS = 1_000;

/**
 * Has the agent tell ztunnel of a pod that is attached and recorded; resolves when ztunnel serves it. Rejects with
 * CniError: 11 if agent or ztunnel is not there or silent, 107 if ztunnel refused, 108 if the agent did.
 */
export async function announceAttachment(dirs: Directories, record: AttachmentRecord): Promise<void> {
  const { network, containerId, ifname, netnsPath, netns } = record;
  const body: AttachBody = {
    network,
    containerId,
    ifname,
    stateDir: dirs.stateDir,
    netns: { path: netnsPath, dev: `${netns.dev}`, ino: `${netns.ino}`, cookie: `${netns.cookie}` },
    deadlineMs: ATTACH_DEADLINE_MS,
  };
  try {
    await callAgent(dirs.runDir, 'POST', '/v1/attach', body, ATTACH_DEADLINE_MS);
  } catch (error) {
    throw absentError(error);
  }
}

/** The pod is detached. Rejects as announceAttachment() does. */
export async function withdrawAttachment(
  dirs: Directories,
  { network, containerId, ifname }: AttachmentName,
): Promise<void> {
  const body: AttachmentName = { network, containerId, ifname };
  try {
    await callAgent(dirs.runDir, 'POST', '/v1/detach', body, DETACH_DEADLINE_MS);
  } catch (error) {
    throw absentError(error);
  }
}

/** Is this pod in the mesh. Rejects as announceAttachment() does. */
export async function askAgent(dirs: Directories, pod: DecideBody['pod']): Promise<Decision> {
  const body: DecideBody = { pod };
  try {
    return (await callAgent(dirs.runDir, 'POST', '/v1/decide', body, ATTACH_DEADLINE_MS)) as Decision;
  } catch (error) {
    throw absentError(error);
  }
}

function absentError(error: unknown): unknown {
  if (!(error instanceof AgentAbsentError)) return error;
  return new CniError(Code.TRY_AGAIN_LATER, 'the node agent is not there', error.message, { cause: error });
}

/** Resolves with the answer's JSON. Rejects with CniError for what the agent refused, with AgentAbsentError. */
export async function callAgent(
  runDir: string,
  method: 'GET' | 'POST' | 'PUT',
  path: string,
  body: object | undefined,
  deadlineMs: number,
): Promise<unknown> {
  const socket = agentSocket(runDir);
  const { status, text } = parseAnswer(
    await exchange(socket, request(method, path, body), deadlineMs + MARGIN_MS),
    socket,
  );
  let answer: unknown;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new AgentAbsentError(`whoever serves ${socket} is no agent: it answered ${status} without JSON`);
  }
  if (status === 200) return answer;
  throw failureOf(answer, status);
}

function request(method: string, path: string, body: object | undefined): string {
  const text = body === undefined ? '' : JSON.stringify(body);
  return [
    `${method} ${path} HTTP/1.1`,
    'Host: agent',
    'Content-Type: application/json',
    `Content-Length: ${Buffer.byteLength(text)}`,
    'Connection: close',
    '',
    text,
  ].join('\r\n');
}

function exchange(path: string, text: string, timeoutMs: number): Promise<Buffer> {
  // Loaded when needed; import() does not work in the command line's bundle.
  const { connect } = process.getBuiltinModule('node:net');
  return new Promise((resolve, reject) => {
    const socket = connect({ path });
    const chunks: Buffer[] = [];
    let length = 0;
    const fail = (reason: string) => {
      clearTimeout(timer);
      socket.destroy();
      reject(new AgentAbsentError(reason));
    };
    const timer = setTimeout(
      () => fail(`the node agent did not answer on ${path} in ${timeoutMs / 1_000} s`),
      timeoutMs,
    );
    socket.on('error', ({ code, message }: NodeJS.ErrnoException) => {
      const nobody = code === 'ENOENT' || code === 'ECONNREFUSED';
      fail(nobody ? `no node agent serves ${path}` : `the node agent on ${path} could not be asked: ${message}`);
    });
    socket.on('data', (chunk) => {
      chunks.push(chunk);
      length += chunk.length;
      if (length > ANSWER_LIMIT) fail(`the answer on ${path} is longer than ${ANSWER_LIMIT} bytes`);
    });
    socket.on('end', () => {
      clearTimeout(timer);
      socket.destroy();
      resolve(Buffer.concat(chunks));
    });
    socket.write(text);
  });
}

function parseAnswer(bytes: Buffer, socket: string): { status: number; text: string } {
  const end = bytes.indexOf('\r\n\r\n');
  const head = bytes.subarray(0, Math.max(0, end)).toString('latin1');
  const status = Number(/^HTTP\/1\.1 ([0-9]{3}) /.exec(head)?.[1]);
  const length = Number(/\r\ncontent-length: *([0-9]+)/i.exec(head)?.[1]);
  const body = bytes.subarray(end + 4);
  if (!(status >= 200) || body.length !== length) {
    throw new AgentAbsentError(`the node agent on ${socket} went away while it answered`);
  }
  return { status, text: body.toString('utf8') };
}

function failureOf(answer: unknown, status: number): CniError {
  const { code, msg, details } = (answer ?? {}) as Partial<AgentFailure>;
  const known = registry.find((entry) => entry.code === code)?.code as ErrorCode | undefined;
  return new CniError(
    known ?? Code.AGENT_REFUSED,
    typeof msg === 'string' ? msg : 'the node agent refused',
    typeof details === 'string' ? details : `HTTP status ${status}`,
  );
}
