// SPDX-License-Identifier: Apache-2.0
import { createServer, type ServerResponse } from 'node:http';
import { afterAll, expect, test } from 'vitest';
import { Testbed } from '../../conformance/netns.ts';
import { agentSocket } from '../agent-client.ts';
import { askForReport, reportDocument } from './agent-report.ts';

const bed = Testbed.open();
afterAll(() => bed.close());
let count = 0;

/** What is reported of an agent that answers so. */
async function reported(answer: (response: ServerResponse) => void) {
  const runDir = bed.directory(`run${count++}`);
  const server = createServer((_, response) => answer(response));
  await new Promise<void>((resolve) => server.listen({ path: agentSocket(runDir) }, resolve));
  try {
    return await askForReport({ runDir, stateDir: '/nowhere' });
  } finally {
    server.close();
    server.closeAllConnections();
  }
}

const json = (status: number, text: string) => (response: ServerResponse) => {
  response.writeHead(status, { 'Content-Length': Buffer.byteLength(text) });
  response.end(text);
};

const whole = {
  pid: 7,
  zds: { socket: '/z', connections: [{ pid: 8, phase: 'live', pods: 2, newest: true, since: 0, later: 'added' }] },
  workloads: 2,
  unacknowledged: 0,
  markForgeable: null,
  unready: [],
  something: 'of a later build',
};

test('an agent of this build, or of one that says more', async () => {
  const report = await reported(json(200, JSON.stringify(whole)));
  expect(report.agent?.pid).toBe(7);
  expect(reportDocument(report)).toMatchObject({ agent: { present: true }, ztunnel: { pods: 2, socket: '/z' } });
});

test.each([
  [
    '404 with an error of ours',
    json(404, '{"code":108,"msg":"not a request","details":"no GET /v1/status"}'),
    'it answered: not a request: no GET /v1/status',
  ],
  ['404 and {}', json(404, '{}'), 'it answered: the node agent refused: HTTP status 404'],
  ['500 and null', json(500, 'null'), 'it answered: the node agent refused: HTTP status 500'],
  ['{}', json(200, '{}'), /^whoever serves .*agent.sock does not report as this build does \(pid\): /],
  ['null', json(200, 'null'), /^whoever serves .*agent.sock does not report as this build does: /],
  ['zds without connections', json(200, JSON.stringify({ ...whole, zds: {} })), /\(zds\.socket\)/],
  ['no JSON', json(200, '<html>'), /is no agent: it answered 200 without JSON/],
  ['nothing', (response: ServerResponse) => void response.destroy(), /went away while it answered/],
])('who answers %s is named, and status goes on', async (_, answer, absent) => {
  const report = await reported(answer);
  expect(report).toMatchObject({ agent: null, pending: 0 });
  if (typeof absent === 'string') expect(report.absent).toBe(absent);
  else expect(report.absent).toMatch(absent);
  expect(reportDocument(report)).toEqual({ agent: { present: false, pending: 0 } });
});
