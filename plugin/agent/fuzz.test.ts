// SPDX-License-Identifier: Apache-2.0
// Mutated requests on agent.sock. Whatever comes in: one answer in HTTP or an end, no crash, no descriptor stays, and
// the next plugin is served.

import { readdirSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Testbed } from '../../conformance/netns.ts';
import { LONG } from '../../native/native.testing.ts';
import { announceAttachment, callAgent, withdrawAttachment } from '../agent-client.ts';
import { registry } from '../cni/errors.ts';
import { seededRandom } from '../cni/random.testing.ts';
import { AgentSite, until } from './agent.testing.ts';

const RUNS = LONG ? 100_000 : 2_000;
const SEED = Number(process.env.AMBIENT_REDIRECT_SEED ?? 20_261_125);
const random = seededRandom(SEED);
const pick = <T>(list: readonly T[]): T => list[random(list.length)] as T;

const VALUES: readonly unknown[] = [
  null,
  true,
  0,
  -1,
  1e21,
  '',
  'x',
  '0',
  '99999999999999999999999',
  '/',
  '\u0000',
  '\ud800',
  '__proto__',
  [],
  {},
  { __proto__: null },
  'a'.repeat(5_000),
  [[[[]]]],
];

const ROUTES = [
  ['POST', '/v1/attach'],
  ['POST', '/v1/detach'],
  ['POST', '/v1/decide'],
  ['GET', '/v1/workloads'],
  ['GET', '/v1/status'],
  ['PUT', '/v1/attach'],
  ['POST', '/v2/attach'],
  ['DELETE', '/'],
] as const;

function body(): string {
  const document: Record<string, unknown> = {
    network: 'net',
    containerId: 'c',
    ifname: 'eth0',
    stateDir: '/x',
    netns: { path: '/run/netns/x', dev: '4', ino: '1', cookie: '1' },
    pod: { namespace: 'n', name: 'a', uid: 'u' },
    deadlineMs: 10,
  };
  for (let count = random(3); count > 0; count--) {
    const inner = random(3) === 0 ? pick([document.netns, document.pod]) : document;
    const target = (typeof inner === 'object' && inner !== null ? inner : document) as Record<string, unknown>;
    const key = pick([...Object.keys(document), 'path', 'dev', 'ino', 'uid', '__proto__', 'constructor']);
    if (random(3) === 0) delete target[key];
    else
      Object.defineProperty(target, key, {
        value: structuredClone(pick(VALUES)),
        enumerable: true,
        configurable: true,
        writable: true,
      });
  }
  return JSON.stringify(random(20) === 0 ? pick(VALUES) : document) ?? '';
}

function request(): Buffer {
  const [method, path] = pick(ROUTES);
  const text = Buffer.from(body());
  const length = random(10) === 0 ? random(200_000) : text.length;
  const head = `${method} ${path} HTTP/1.1\r\nHost: a\r\nContent-Length: ${length}\r\nConnection: close\r\n\r\n`;
  let bytes = Buffer.concat([Buffer.from(head), text]);
  for (let count = random(3); count > 0; count--) {
    const at = random(bytes.length);
    if (random(2) === 0) bytes[at] = random(256);
    else bytes = Buffer.concat([bytes.subarray(0, at), Buffer.from([random(256)]), bytes.subarray(at + random(3))]);
  }
  return bytes;
}

/** What came back; the client ends its side, as one that was killed does. */
function exchange(path: string, bytes: Buffer): Promise<string> {
  return new Promise((resolve) => {
    const socket = connect({ path });
    let text = '';
    socket.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
    });
    socket.on('error', () => {});
    socket.on('close', () => resolve(text));
    socket.end(bytes);
  });
}

const openDescriptors = () => readdirSync('/proc/self/fd').length;

test(
  `${RUNS} requests`,
  async () => {
    const bed = Testbed.open();
    const site = new AgentSite(bed);
    try {
      const { agent } = await site.agent();
      const ztunnel = site.ztunnel();
      await until(() => agent.zds?.isLive === true);
      const socket = join(site.settings.runDir, 'agent.sock');
      const record = site.record(bed.namespace('pod'));
      await announceAttachment(site.settings, record);
      const before = openDescriptors();
      for (let run = 0; run < RUNS; run++) {
        const answer = await exchange(socket, request());
        const [head = '', text = ''] = answer.split('\r\n\r\n');
        const status = Number(/^HTTP\/1\.1 ([0-9]{3}) /.exec(head)?.[1] ?? 0);
        const label = `seed ${SEED}, run ${run}: ${head} ${text.slice(0, 300)}`;
        // 500 is a defect.
        expect(status === 0 || (status >= 200 && status < 500) || status === 503, label).toBe(true);
        if (/content-type: application\/json/i.test(head) && status !== 200) {
          expect(
            registry.map(({ code }): number => code),
            label,
          ).toContain(JSON.parse(text).code);
        }
        if (run % 200 === 199) {
          expect(agent.registry.size, label).toBe(1);
          await withdrawAttachment(site.settings, record);
          await announceAttachment(site.settings, record);
          expect(ztunnel.served, label).toEqual([record.podUid]);
          await callAgent(site.settings.runDir, 'GET', '/v1/status', undefined, 5_000);
          await until(() => openDescriptors() === before);
        }
      }
    } finally {
      await site.close();
    }
  },
  LONG ? 1_800_000 : 60_000,
);
