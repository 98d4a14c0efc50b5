// SPDX-License-Identifier: Apache-2.0
// What the node agent says of itself and of ztunnel, for `status`.

import * as v from 'valibot';
import { AgentAbsentError, agentSocket, callAgent } from '../agent-client.ts';
import { CniError } from '../cni/errors.ts';
import { countPending } from '../pending.ts';
import type { Directories } from '../state.ts';
import type { ZdsConnectionState } from '../zds/server.ts';
import { count, type Problem, type Survey } from './survey.ts';
import { printable, type Terminal } from './terminal.ts';

const connection = v.object({
  pid: v.number(),
  phase: v.picklist(['hello', 'snapshot', 'live'] satisfies ZdsConnectionState['phase'][]),
  pods: v.number(),
  newest: v.boolean(),
  since: v.number(),
});

/** The answer of GET /v1/status: of an agent of any build, or of whoever has its socket. */
const ANSWER = v.object({
  pid: v.number(),
  zds: v.object({ socket: v.string(), connections: v.array(connection) }),
  workloads: v.number(),
  unacknowledged: v.number(),
  markForgeable: v.nullable(v.string()),
  unready: v.array(v.object({ condition: v.string(), reason: v.string() })),
});

export interface AgentReport {
  /** null: it is not there, or gives no such answer, and `absent` says why */
  agent: v.InferOutput<typeof ANSWER> | null;
  absent: string;
  /** pods whose ADD found no agent or no ztunnel, and that are to be enrolled */
  pending: number;
}

const DEADLINE_MS = 1_000;

export async function askForReport({ runDir }: Directories): Promise<AgentReport> {
  const pending = countPending(runDir);
  try {
    const answer = v.safeParse(ANSWER, await callAgent(runDir, 'GET', '/v1/status', undefined, DEADLINE_MS));
    if (answer.success) return { agent: answer.output, absent: '', pending };
    const [issue] = answer.issues;
    const place = v.getDotPath(issue);
    const absent = `whoever serves ${agentSocket(runDir)} does not report as this build does${place === null ? '' : ` (${place})`}: ${issue.message}`;
    return { agent: null, absent, pending };
  } catch (error) {
    if (error instanceof AgentAbsentError) return { agent: null, absent: error.message, pending };
    if (!(error instanceof CniError)) throw error;
    return { agent: null, absent: `it answered: ${error.msg}: ${error.details}`, pending };
  }
}

/** `agent` and `ztunnel` of `status -o json`. */
export function reportDocument({ agent, pending }: AgentReport): Record<string, unknown> {
  if (agent === null) return { agent: { present: false, pending } };
  const { pid, zds, workloads, unacknowledged, markForgeable, unready } = agent;
  return {
    agent: { present: true, pid, pending, unready },
    ztunnel: { socket: zds.socket, connections: zds.connections, pods: workloads, unacknowledged, markForgeable },
  };
}

export function reportLines({ agent, absent, pending }: AgentReport, terminal: Terminal): [string, string][] {
  const waiting = pending > 0 ? `, ${terminal.yellow(`${count(pending, 'pod')} waiting to be enrolled`)}` : '';
  if (agent === null) return [['agent', `none: ${printable(absent)}${waiting}`]];
  const lines: [string, string][] = [['agent', `process ${agent.pid}${waiting}`]];
  for (const { condition, reason } of agent.unready) {
    lines.push(['', terminal.yellow(`not ready: ${condition}: ${printable(reason)}`)]);
  }
  if (agent.zds.connections.length === 0) lines.push(['ztunnel', `none is connected to ${agent.zds.socket}`]);
  for (const { pid, phase, pods, newest, since } of agent.zds.connections) {
    const role = newest ? '' : ', being replaced';
    lines.push([
      'ztunnel',
      `process ${pid}, ${phase}, ${count(pods, 'pod')}, since ${new Date(since).toISOString()}${role}`,
    ]);
  }
  if (agent.markForgeable !== null) lines.push(['', `its mark can be forged: ${printable(agent.markForgeable)}`]);
  return lines;
}

/** What the survey of maps and kernel cannot see. Only where pods of the contract in-pod are there does it matter. */
export function reportProblems({ agent, pending }: AgentReport, found: Survey): Problem[] {
  const problems: Problem[] = [];
  const inPod = found.attachments.some(({ record }) => record.contract === 'in-pod' && record.role === 'pod');
  const warn = (object: string, text: string) => problems.push({ severity: 'warning', object, text });
  if (agent === null) {
    if (inPod) warn('agent', 'is not there: pods go on as they are, and none can be enrolled');
    if (pending > 0) warn('agent', `is not there: ${count(pending, 'pod')} wait for it outside the mesh`);
    return problems;
  }
  if (inPod && agent.zds.connections.length === 0) {
    warn('ztunnel', `none is connected to ${agent.zds.socket}: no pod can be enrolled`);
  }
  if (agent.unacknowledged > 0 && agent.zds.connections.some(({ phase }) => phase === 'live')) {
    const text = `does not serve ${count(agent.unacknowledged, 'enrolled pod')}: agent.sock and the agent's log say why`;
    problems.push({ severity: 'impaired', object: 'ztunnel', text });
  }
  return problems;
}
