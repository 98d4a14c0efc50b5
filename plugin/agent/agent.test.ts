// SPDX-License-Identifier: Apache-2.0
// The agent over real state, a real agent.sock and the stand-in ztunnel. Records are written as the plugin writes them.

import { existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { createServer, request } from 'node:http';
import { createServer as createSocketServer } from 'node:net';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { must, Testbed } from '../../conformance/netns.ts';
import { descriptors, native } from '../../native/native.testing.ts';
import { announceAttachment, askAgent, callAgent, withdrawAttachment } from '../agent-client.ts';
import { CniError } from '../cni/errors.ts';
import type { AttachmentRecord } from '../native.ts';
import { AgentSite, until } from './agent.testing.ts';
import { type Agent, AgentRunsError } from './agent.ts';
import { servePorts } from './http.ts';
import { WorkloadsFile } from './workloads.ts';

let bed: Testbed;
let site: AgentSite;

beforeEach(() => {
  bed = Testbed.open();
  site = new AgentSite(bed);
});
afterEach(() => site.close());

const announce = (record: AttachmentRecord) => announceAttachment(site.settings, record);

async function failureOf(promise: Promise<unknown>): Promise<{ code: number; msg: string; details: string }> {
  try {
    await promise;
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return { code: error.code, msg: error.msg, details: error.details };
  }
  throw new Error('it did not fail');
}

function eventsOf(agent: Agent): string[] {
  const seen: string[] = [];
  agent.events.on('enrolled', ({ name }) => seen.push(`enrolled ${name}`));
  agent.events.on('unenrolled', ({ name }) => seen.push(`unenrolled ${name}`));
  return seen;
}

describe('starting', () => {
  test('the recorded pods are known before ztunnel hears of any', async () => {
    const records = ['a', 'b'].map((label) => site.record(bed.namespace(label)));
    site.record(bed.namespace('shared'), { contract: 'shared' });
    site.record(bed.namespace('none'), { role: 'none', state: 'recorded' });
    site.record(bed.namespace('half'), { state: 'attaching' });
    const { agent } = await site.agent();
    expect([...agent.registry.values()].map(({ uid }) => uid).sort()).toEqual(
      records.map(({ podUid }) => podUid).sort(),
    );
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    expect(ztunnel.log.at(-1)).toBe('snapshotSent');
    expect(ztunnel.served.sort()).toEqual(records.map(({ podUid }) => podUid).sort());
  });

  test('ztunnel hears nothing before everybody who knows pods is ready', async () => {
    site.record(bed.namespace('a'));
    const { promise, resolve } = Promise.withResolvers<void>();
    await site.agent({}, (agent) => agent.beforeSnapshot(promise));
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.connected);
    expect(ztunnel.log).toEqual(['connected']);
    resolve();
    await until(() => ztunnel.ready);
  });

  test('an agent that was away: what left meanwhile leaves ztunnel, the rest is not touched', async () => {
    const [stays, leaves] = [site.record(bed.namespace('a')), site.record(bed.namespace('b'))];
    const first = await site.agent();
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.served.length === 2);
    const served = ztunnel.pod(stays.podUid)?.proxy;
    await first.stop();
    await until(() => !ztunnel.connected);
    site.remove(leaves);
    const comes = site.record(bed.namespace('c'));
    await site.agent();
    await until(() => ztunnel.ready);
    expect(ztunnel.served.sort()).toEqual([stays.podUid, comes.podUid].sort());
    expect(ztunnel.pod(stays.podUid)?.proxy).toBe(served);
  });

  test('a second agent with the same runDir says who is there', async () => {
    await site.agent();
    const second = site.agent({ zdsSocket: `${site.settings.zdsSocket}2` });
    await expect(second).rejects.toThrow(
      new AgentRunsError(`another agent (process ${process.pid}) runs with ${site.settings.runDir}`),
    );
  });

  test('stopping leaves nothing behind, and another can start', async () => {
    const before = descriptors().length;
    const first = await site.agent();
    await first.stop();
    expect(existsSync(site.settings.zdsSocket)).toBe(false);
    expect(descriptors().length).toBe(before);
    await site.agent();
  });

  test('agent.sock is root only', async () => {
    await site.agent();
    const found = statSync(join(site.settings.runDir, 'agent.sock'));
    expect([found.isSocket(), found.mode & 0o777]).toEqual([true, 0o600]);
    expect(statSync(site.settings.runDir).mode & 0o777).toBe(0o700);
  });
});

describe('attach', () => {
  test('resolves when ztunnel serves the pod, and says so once', async () => {
    const { agent } = await site.agent();
    const seen = eventsOf(agent);
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    const record = site.record(bed.namespace('a'));
    await announce(record);
    expect(ztunnel.pod(record.podUid)?.names).toEqual({
      name: record.podName,
      namespace: 'default',
      serviceAccount: 'sa',
    });
    await announce(record);
    expect(seen).toEqual([`enrolled ${record.podName}`]);
  });

  test('no agent, no ztunnel, one that refuses, one that is silent: each says which', async () => {
    const record = site.record(bed.namespace('a'));
    const { runDir, zdsSocket } = site.settings;
    expect(await failureOf(announce(record))).toEqual({
      code: 11,
      msg: 'the node agent is not there',
      details: `no node agent serves ${runDir}/agent.sock`,
    });
    site.remove(record);
    const { agent } = await site.agent();
    site.put(record);
    expect(await failureOf(announce(record))).toEqual({
      code: 11,
      msg: `ztunnel does not serve default/${record.podName}`,
      details: `no ztunnel is connected to ${zdsSocket}`,
    });
    expect(agent.registry.size).toBe(0);
    const refusing = site.ztunnel({ misbehaviour: { nack: 'AddrInUse' } });
    await until(() => refusing.ready);
    expect(await failureOf(announce(record))).toEqual({
      code: 107,
      msg: `ztunnel does not serve default/${record.podName}`,
      details: `ztunnel (process ${process.pid}) refused ${record.podUid}: AddrInUse`,
    });
    expect(agent.registry.size).toBe(0);
  });

  test('what the plugin says must be what is recorded', async () => {
    await site.agent();
    const record = site.record(bed.namespace('a'));
    const refused = async (changes: object, about: Partial<AttachmentRecord> = {}) =>
      (await failureOf(announceAttachment({ ...site.settings, ...changes }, { ...record, ...about }))).details;
    expect(await refused({ stateDir: '/elsewhere' })).toBe(
      `the plugin's stateDir is /elsewhere, the agent's ${site.settings.stateDir}`,
    );
    expect(await refused({}, { containerId: 'other' })).toBe(`nothing is recorded in ${site.settings.stateDir}`);
    expect(await refused({}, { netns: { ...record.netns, cookie: 1n } })).toBe(
      `${record.netnsPath} is net:[${record.netns.ino}], recorded is net:[${record.netns.ino}]`,
    );
    site.put({ ...record, state: 'attaching' });
    expect(await refused({})).toBe('it is recorded as pod, attaching');
  });

  test('in the shared contract there is nobody to be told', async () => {
    const { agent } = await site.agent();
    const seen = eventsOf(agent);
    const record = site.record(bed.namespace('a'), { contract: 'shared' });
    await announce(record);
    expect(seen).toEqual([`enrolled ${record.podName}`]);
    expect(agent.registry.size).toBe(0);
  });

  test('a pod whose service account nobody knows is refused; one that a directory knows is recorded with it', async () => {
    const { agent } = await site.agent();
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    const record = site.record(bed.namespace('a'), { serviceAccount: '', podUid: '' });
    expect(await failureOf(announce(record))).toMatchObject({
      code: 108,
      msg: `the service account of default/${record.podName} is not known`,
    });
    agent.directories.push({ find: async () => ({ uid: 'u', serviceAccount: 'found', enrol: true, reason: 'r' }) });
    await announce(record);
    expect(ztunnel.pod('u')?.names.serviceAccount).toBe('found');
    expect(site.read(record)?.serviceAccount).toBe('found');
  });

  test('a plugin that gave up meanwhile has undone the attach: the pod leaves again', async () => {
    const { agent } = await site.agent();
    const ztunnel = site.ztunnel();
    await until(() => agent.zds?.isLive === true);
    const record = site.record(bed.namespace('a'));
    const announced = announce(record);
    while (!ztunnel.served.includes(record.podUid)) await ztunnel.change();
    // ztunnel's answer is on its way, and the agent has not read it.
    site.remove(record);
    await announced;
    expect(agent.registry.size).toBe(0);
    expect(ztunnel.served).toEqual([]);
  });
});

describe('leaving', () => {
  test('detach: ztunnel forgets the pod with its last attachment', async () => {
    const { agent } = await site.agent();
    const seen = eventsOf(agent);
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    const first = site.record(bed.namespace('a'));
    const second = { ...first, ifname: 'net1' };
    site.put(second);
    await announce(first);
    await announce(second);
    site.remove(first);
    await withdrawAttachment(site.settings, first);
    expect(ztunnel.served).toEqual([first.podUid]);
    site.remove(second);
    await withdrawAttachment(site.settings, second);
    await until(() => ztunnel.served.length === 0);
    expect(seen).toEqual([`enrolled ${first.podName}`, `unenrolled ${first.podName}`]);
    await withdrawAttachment(site.settings, second);
  });

  test('a new sandbox of the same pod: the DEL of the old one does not take the new one away', async () => {
    await site.agent();
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    const old = site.record(bed.namespace('a'));
    await announce(old);
    const young = site.record(bed.namespace('b'), { podUid: old.podUid, podName: old.podName });
    await announce(young);
    site.remove(old);
    await withdrawAttachment(site.settings, old);
    expect(ztunnel.pod(old.podUid)?.ino).toBe(young.netns.ino);
  });

  test('a DEL that could not reach the agent is found out', async () => {
    const { agent } = await site.agent();
    const ztunnel = site.ztunnel();
    const record = site.record(bed.namespace('a'));
    await until(() => ztunnel.ready);
    await announce(record);
    site.remove(record);
    await agent.reconcile('test');
    expect(ztunnel.served).toEqual([]);
  });

  test('an ADD that ended before it could tell is found out, too, and so is a Nack that is none any more', async () => {
    const { agent } = await site.agent();
    const seen = eventsOf(agent);
    const ztunnel = site.ztunnel();
    await until(() => agent.zds?.isLive === true);
    const record = site.record(bed.namespace('a'));
    const netns = native.openNetns(record.netnsPath);
    const taken = native.listenPlain(netns, { address: '::', port: 15_006, backlog: 1 });
    native.close(netns);
    await agent.reconcile('test');
    expect(ztunnel.pending).toEqual([record.podUid]);
    expect(seen).toEqual([]);
    native.close(taken);
    await agent.reconcile('test');
    expect(ztunnel.served).toEqual([record.podUid]);
    expect(seen).toEqual([`enrolled ${record.podName}`]);
  });

  test('a pod whose namespace is gone without a DEL leaves the state and ztunnel', async () => {
    const { agent } = await site.agent();
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    const record = site.record(bed.namespace('a'));
    await announce(record);
    native.deleteNetns(record.netnsPath);
    await agent.reconcile('test');
    expect(site.read(record)).toBeNull();
    expect(ztunnel.served).toEqual([]);
  });
});

describe('deciding', () => {
  test('by the list of pods, read again when it changes', async () => {
    const path = join(bed.directory('lists'), 'workloads.yaml');
    writeFileSync(path, '- {namespace: default, name: web, serviceAccount: web-sa}\n');
    const errors: string[] = [];
    const { agent } = await site.agent({}, (agent) =>
      agent.directories.push(new WorkloadsFile(path, ({ message }) => errors.push(message))),
    );
    const ask = (name: string, uid = '') => askAgent(site.settings, { namespace: 'default', name, uid });
    expect(await ask('web')).toEqual({ enrol: true, reason: `default/web is in ${path}`, serviceAccount: 'web-sa' });
    expect(await ask('db')).toMatchObject({ enrol: false, serviceAccount: '' });
    writeFileSync(path, '- {namespace: default, name: db, serviceAccount: d, uid: "1"}\n- {name: x}\n');
    expect(await ask('web')).toMatchObject({ enrol: true });
    expect(errors).toEqual([`${path}: [1]: namespace, name and serviceAccount are needed`]);
    expect(await ask('web')).toMatchObject({ enrol: true });
    expect(errors.length).toBe(1);
    writeFileSync(path, '- {namespace: default, name: db, serviceAccount: d, uid: "1"}\n');
    expect(await ask('web')).toMatchObject({ enrol: false });
    expect(await ask('db', '1')).toMatchObject({ enrol: true });
    expect(await ask('db', '2')).toMatchObject({ enrol: false });
    expect(agent.directories.length).toBe(1);
  });

  test.each([
    ['a: 1', 'not a list'],
    ['- 1', '[0]: not a mapping'],
    ['- {namespace: n, name: 1, serviceAccount: s}', '[0].name: not a text'],
    [
      '- {namespace: n, name: a, serviceAccount: s, serviceaccount: s}',
      '[0].serviceaccount: no such key; there is namespace, name, serviceAccount, uid',
    ],
    ['- [', 'Flow sequence'],
  ])('a list that will not do: %s', (contents, message) => {
    const path = join(bed.directory('lists'), 'workloads.yaml');
    writeFileSync(path, contents);
    expect(() => new WorkloadsFile(path, () => {})).toThrow(message);
    expect(() => new WorkloadsFile(path, () => {})).toThrow(path);
  });

  test('an empty list is one', () => {
    const path = join(bed.directory('lists'), 'workloads.yaml');
    writeFileSync(path, '# none yet\n');
    expect(new WorkloadsFile(path, () => {}).find({ namespace: 'n', name: 'a', uid: '' })).toBeUndefined();
  });
});

describe('agent.sock', () => {
  const raw = (method: string, path: string, body: string): Promise<{ status: number | undefined; body: string }> =>
    new Promise((resolve, reject) => {
      const outgoing = request({ socketPath: join(site.settings.runDir, 'agent.sock'), method, path }, (incoming) => {
        text(incoming).then((answer) => resolve({ status: incoming.statusCode, body: answer }), reject);
      });
      outgoing.on('error', reject);
      outgoing.end(body);
    });

  test('lists what ztunnel is to serve and what it said', async () => {
    await site.agent();
    const ztunnel = site.ztunnel();
    await until(() => ztunnel.ready);
    const record = site.record(bed.namespace('a'));
    await announce(record);
    expect(await callAgent(site.settings.runDir, 'GET', '/v1/workloads', undefined, 1_000)).toEqual({
      workloads: [
        {
          uid: record.podUid,
          name: record.podName,
          namespace: 'default',
          serviceAccount: 'sa',
          netns: { path: record.netnsPath, ino: `${record.netns.ino}` },
          attachments: [expect.stringMatching(/^[0-9a-f]{64}$/)],
          acknowledged: true,
          error: null,
        },
      ],
    });
    expect(await callAgent(site.settings.runDir, 'GET', '/v1/status', undefined, 1_000)).toMatchObject({
      pid: process.pid,
      zds: {
        socket: site.settings.zdsSocket,
        connections: [{ pid: process.pid, phase: 'live', pods: 1, newest: true }],
      },
      workloads: 1,
      unready: [],
    });
  });

  test.each([
    ['GET', '/', '', 404, 'no "GET /"'],
    ['POST', '/v1/attach', '{', 400, 'a body of 1 bytes that is not JSON'],
    ['POST', '/v1/attach', '', 400, 'body: '],
    ['POST', '/v1/attach', '{"network":1}', 400, 'network: '],
    ['POST', '/v1/detach', '[]', 400, ''],
    ['POST', '/v1/attach', `"${'x'.repeat(70_000)}"`, 413, 'a body of more than 65536 bytes'],
    ['PUT', '/v1/log-level', '{"level":"loud"}', 400, 'level: '],
  ])('%s %s %s: %i', async (method, path, body, status, details) => {
    await site.agent();
    const answer = await raw(method, path, body);
    expect(answer.status).toBe(status);
    expect(JSON.parse(answer.body)).toMatchObject({ code: 108, msg: 'not a request of agent.sock' });
    expect(JSON.parse(answer.body).details).toMatch(details);
  });

  test('the log level can be changed', async () => {
    const { agent } = await site.agent();
    await callAgent(site.settings.runDir, 'PUT', '/v1/log-level', { level: 'error' }, 1_000);
    expect(agent.log.level).toBe('error');
  });

  test('what answers there and is no agent, or never answers, is the same as none', async () => {
    const path = join(site.settings.runDir, 'agent.sock');
    const other = createServer((_, response) => response.end('hello'));
    await new Promise<void>((resolve) => other.listen({ path }, resolve));
    const record = site.record(bed.namespace('a'));
    expect(await failureOf(announce(record))).toMatchObject({ code: 11, msg: 'the node agent is not there' });
    other.closeAllConnections();
    await new Promise((resolve) => other.close(resolve));
    const mute = createSocketServer((socket) => socket.on('error', () => {}));
    await new Promise<void>((resolve) => mute.listen({ path }, resolve));
    await expect(callAgent(site.settings.runDir, 'GET', '/v1/status', undefined, -1_900)).rejects.toThrow(
      `the node agent did not answer on ${path} in 0.1 s`,
    );
    mute.close();
  });
});

describe('ports', () => {
  const get = async (port: number, path: string) => {
    const response = await fetch(`http://127.0.0.1:${port}${path}`);
    return { status: response.status, body: await response.text() };
  };

  test('health, readiness with reasons, metrics', async () => {
    const { agent } = await site.agent();
    // Port 0 means none, so a free one is looked for.
    const free = await freePorts(2);
    const ports = await servePorts({
      ...agentView(agent),
      settings: { ...agent.settings, monitoringPort: free[0], healthPort: free[1] },
    } as Agent);
    try {
      expect(await get(ports.health, '/healthz')).toEqual({ status: 200, body: 'ok\n' });
      expect(await get(ports.health, '/readyz')).toEqual({
        status: 503,
        body: 'state: state and kernel have not been compared yet\n',
      });
      await agent.reconcile('test');
      expect(await get(ports.health, '/readyz')).toEqual({ status: 200, body: 'ok\n' });
      agent.readiness.add('test', () => 'not yet');
      expect(await get(ports.health, '/readyz')).toEqual({ status: 503, body: 'test: not yet\n' });
      const { body: unready } = await get(ports.monitoring, '/metrics');
      expect(unready).toContain('ambient_redirect_ready{condition="test"} 0\n');
      agent.readiness.remove('test');
      expect((await get(ports.health, '/')).status).toBe(404);

      const ztunnel = site.ztunnel();
      await until(() => ztunnel.ready);
      const record = site.record(bed.namespace('a'));
      await announce(record);
      const { body } = await get(ports.monitoring, '/metrics');
      for (const line of [
        'ztunnel_connected 1',
        'istio_cni_plugin_requests_total{response_code="200"} 1',
        'ambient_redirect_workloads 1',
        'ambient_redirect_workloads_unacknowledged 0',
        'ambient_redirect_attachments{contract="in-pod",role="pod",state="attached"} 1',
        'ambient_redirect_zds_messages_total{kind="add",result="ack"} 1',
        'ambient_redirect_map_capacity{map="interfaces"} 2048',
        'ambient_redirect_map_entries{map="attachments"} 1',
        'ambient_redirect_ready{condition="state"} 1',
        'ambient_redirect_drift_total{kind="program"} 0',
      ]) {
        expect(body).toContain(`${line}\n`);
      }
      await expect(
        servePorts({ ...agentView(agent), settings: { ...agent.settings, healthPort: ports.health } } as Agent),
      ).rejects.toThrow(`--health-port ${ports.health}: listen EADDRINUSE`);
    } finally {
      await ports.close();
    }
  });
});

test("a pod's counters that begin anew, whichever of packets and bytes tells it", async () => {
  const { agent } = await site.agent();
  // "0-7"
  const processors = 1 + Number(/\d+$/.exec(readFileSync('/sys/devices/system/cpu/possible', 'latin1').trim())?.[0]);
  const total = async (name: string) => {
    agent.refreshMetrics();
    const text = await agent.metrics.registry.getSingleMetricAsString(`ambient_redirect_${name}_total`);
    const values = text.split('\n').filter((line) => line.startsWith('ambient_redirect_'));
    return values.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0) / processors;
  };
  // The same on each processor.
  const count = (packets: number, bytes: number) => {
    const key = Buffer.alloc(8);
    key.writeUInt32LE(7);
    key.writeUInt16LE(1, 4);
    key.writeUInt16LE(1, 6);
    const value = Buffer.alloc(16);
    value.writeBigUInt64LE(BigInt(packets));
    value.writeBigUInt64LE(BigInt(bytes), 8);
    const words = (bytes: Buffer) => ['hex', ...[...bytes].map((byte) => byte.toString(16).padStart(2, '0'))];
    const map = join(site.settings.stateDir, 'counters');
    must(['bpftool', 'map', 'update', 'pinned', map, 'key', ...words(key), 'value', ...words(value)]);
  };
  count(3, 300);
  expect([await total('packets'), await total('bytes')]).toEqual([3, 300]);
  count(5, 400);
  expect([await total('packets'), await total('bytes')]).toEqual([5, 400]);
  count(5, 250);
  expect([await total('packets'), await total('bytes')]).toEqual([10, 650]);
  count(1, 260);
  expect([await total('packets'), await total('bytes')]).toEqual([11, 910]);
});

function agentView(agent: Agent): Pick<Agent, 'metrics' | 'readiness' | 'refreshMetrics'> {
  return { metrics: agent.metrics, readiness: agent.readiness, refreshMetrics: () => agent.refreshMetrics() };
}

async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from({ length: count }, async () => {
      const server = createSocketServer();
      await new Promise<void>((resolve) => server.listen({ port: 0, host: '127.0.0.1' }, resolve));
      return server;
    }),
  );
  const ports = servers.map((server) => (server.address() as { port: number }).port);
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
  return ports;
}

test('a ZDS socket that somebody serves is not taken', async () => {
  mkdirSync(join(site.settings.zdsSocket, '..'), { recursive: true });
  const theirs = native.listenSeqpacket(site.settings.zdsSocket, { mode: 0o600, backlog: 1 });
  try {
    await expect(site.agent()).rejects.toThrow('is served already');
  } finally {
    native.close(theirs);
  }
  await site.agent();
});
