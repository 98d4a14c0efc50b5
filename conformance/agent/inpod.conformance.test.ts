// SPDX-License-Identifier: Apache-2.0
//
// The contract in-pod as a whole: the plugin, the agent and a ztunnel (the stand-in as a process) on a node, real
// packets, and each of them missing in turn.

import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Capture } from '../e2e/capture.ts';
import { executable, families, PluginError, type Pod, requireExecutable, Topology } from '../e2e/topology.ts';
import { must, type Outcome, until } from '../netns.ts';
import { AgentSite, ZtunnelProcess } from './processes.ts';

const APP = 8080;
const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';

let topology: Topology;
let site: AgentSite;
let captures = 0;

beforeEach(() => {
  requireExecutable();
});
afterEach(() => topology.close());

function open(entry: Record<string, unknown> = {}, hook: 'tcx' | 'clsact' = 'tcx'): void {
  topology = new Topology({
    primary: 'ptp',
    hook,
    rpFilter: 1,
    entry: {
      proxy: { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } },
      ...entry,
    },
  });
  site = new AgentSite(topology);
}

const enrolled = (label: string) => topology.pod(label, { enroll: true, uid: `uid-${label}` });

async function start(...pods: Pod[]): Promise<void> {
  site.know(...pods);
  for (const pod of pods) {
    await topology.addPrimary(pod);
    site.refresh();
    await topology.addOurs(pod);
  }
}

async function refusal(pod: Pod): Promise<{ code: number; msg: string; details: string }> {
  try {
    await topology.addOurs(pod);
  } catch (error) {
    if (error instanceof PluginError) return JSON.parse(error.outcome.stdout);
    throw error;
  }
  throw new Error('ADD succeeded');
}

function command(...args: string[]): Promise<Outcome> {
  const { node, stateDir, runDir } = topology;
  return node.exec([executable, ...args, '--state-dir', stateDir, '--run-dir', runDir]);
}

interface Row {
  name: string;
  role: string;
  state: string;
  contract: string;
  serviceAccount: string;
  programs: { alive: number; attached: unknown[] };
}

async function pods(): Promise<Row[]> {
  const outcome = await command('pods', '-o', 'json');
  expect(outcome, outcome.stderr).toMatchObject({ status: 0 });
  return JSON.parse(outcome.stdout) as Row[];
}

const pending = () => {
  const directory = join(topology.runDir, 'pending');
  return existsSync(directory) ? readdirSync(directory) : [];
};

function capture(pod: Pod): Promise<Capture> {
  captures++;
  return Capture.start(topology.testbed, topology.node, pod.hostIfname, `${pod.label}.${captures}`);
}

/** One connection with some bytes each way; what the server saw as its source. */
async function talk(from: Pod, to: Pod, family: 4 | 6): Promise<string> {
  const connection = await from.endpoint.connect(to.addresses[family], APP, { timeout: 8_000 });
  await from.endpoint.exchange(connection, 5_000, 8_000);
  await from.endpoint.finish(connection);
  return connection.seen;
}

/** Between pods nothing but ztunnel's own port. */
const AROUND = `tcp port ${APP}`;

describe('ADD', () => {
  test('returns when ztunnel serves the pod; traffic goes through it, in both families, with the sources kept', async () => {
    open();
    const agent = await site.agent();
    const ztunnel = await site.ztunnel();
    const [client, server] = [enrolled('client'), enrolled('server')];
    await start(client, server);
    // Synchronously: ADD has waited for the Ack.
    expect(ztunnel.state.served.sort()).toEqual(['uid-client', 'uid-server']);
    expect(
      (await pods()).map(({ name, role, state, contract, serviceAccount }) => ({
        name,
        role,
        state,
        contract,
        serviceAccount,
      })),
    ).toEqual(
      ['client', 'server'].map((name) => ({
        name,
        role: 'pod',
        state: 'attached',
        contract: 'in-pod',
        serviceAccount: `${name}-sa`,
      })),
    );
    await server.endpoint.listen(APP);
    const seen = await capture(client);
    for (const family of families) {
      expect(await talk(client, server, family)).toBe(client.addresses[family]);
      const via = ztunnel.seen.filter(({ source }) => source === client.addresses[family]);
      expect(via.map(({ uid, listener, destination, port }) => ({ uid, listener, destination, port }))).toEqual([
        { uid: 'uid-client', listener: 'outbound', destination: server.addresses[family], port: APP },
        { uid: 'uid-server', listener: 'inboundHBONE', destination: server.addresses[family], port: 15_008 },
      ]);
    }
    await seen.until('HBONE', 'tcp port 15008', (packets) => packets.length > 0);
    expect(seen.packets(AROUND)).toEqual([]);
    const status = JSON.parse((await command('status', '-o', 'json')).stdout);
    expect(status.agent).toEqual({ present: true, pid: agent.process.pid, pending: 0, unready: [] });
    expect(status.ztunnel).toMatchObject({
      socket: site.zdsSocket,
      connections: [{ pid: ztunnel.process.pid, phase: 'live', pods: 2, newest: true }],
      pods: 2,
      unacknowledged: 0,
    });
    const { workloads } = await agent.get<{ workloads: { uid: string; acknowledged: boolean }[] }>('/v1/workloads');
    expect(workloads.map(({ uid, acknowledged }) => `${uid} ${acknowledged}`).sort()).toEqual([
      'uid-client true',
      'uid-server true',
    ]);
  });

  test('closed: without agent, without ztunnel, with one that refuses, it fails, says which, and leaves nothing', async () => {
    open();
    const pod = enrolled('client');
    site.know(pod);
    await topology.addPrimary(pod);
    expect(await refusal(pod)).toEqual({
      cniVersion: '1.0.0',
      code: 11,
      msg: 'the node agent is not there',
      details: `no node agent serves ${topology.runDir}/agent.sock`,
    });
    await site.agent('--ztunnel-wait-seconds', '0');
    expect(await refusal(pod)).toMatchObject({
      code: 11,
      msg: 'ztunnel does not serve default/client',
      details: `no ztunnel is connected to ${site.zdsSocket}`,
    });
    await site.ztunnel('--misbehaviour', JSON.stringify({ nack: 'AddrInUse' }));
    const refused = await refusal(pod);
    expect(refused).toMatchObject({ code: 107, msg: 'ztunnel does not serve default/client' });
    expect(refused.details).toMatch(/refused uid-client: AddrInUse$/);
    expect(await pods()).toEqual([]);
    expect(pending()).toEqual([]);
  });

  test('open: the pod starts outside the mesh and is enrolled when ztunnel is there', async () => {
    open({ failurePolicy: 'open' });
    const [client, server] = [enrolled('client'), enrolled('server')];
    await start(client, server);
    expect((await pods()).map(({ role, state }) => `${role} ${state}`)).toEqual(['none recorded', 'none recorded']);
    await server.endpoint.listen(APP);
    // A connection that is older than the enrolment goes on.
    const old = await client.endpoint.connect(server.addresses[4], APP);
    await site.agent('--ztunnel-wait-seconds', '0');
    const ztunnel = await site.ztunnel();
    await until('both are enrolled', async () =>
      (await pods()).every(({ role, state }) => role === 'pod' && state === 'attached'),
    );
    await ztunnel.until('both are served', ({ served }) => served.length === 2);
    expect(pending()).toEqual([]);
    await talk(client, server, 6);
    expect(ztunnel.seen.map(({ listener }) => listener)).toEqual(['outbound', 'inboundHBONE']);
    await client.endpoint.exchange(old, 5_000);
  });

  test('a pod whose service account nobody knows is refused', async () => {
    open();
    await site.agent();
    await site.ztunnel();
    const pod = enrolled('client');
    await topology.addPrimary(pod);
    expect(await refusal(pod)).toMatchObject({ code: 108, msg: 'the service account of default/client is not known' });
    expect(await pods()).toEqual([]);
  });

  test('ztunnel’s own pod starts while there is no ztunnel', async () => {
    open();
    const proxy = topology.pod('ztunnel-1', { namespace: 'istio-system' });
    await topology.add(proxy);
    expect((await pods()).map(({ role, state }) => `${role} ${state}`)).toEqual(['none recorded']);
  });
});

test('a ztunnel in a cgroup of its own: its mark counts there and nowhere else, and traffic goes as ever', async () => {
  open();
  const mount = topology.testbed.directory('cgroups');
  must(['mount', '-t', 'cgroup2', 'none', mount]);
  topology.testbed.defer(() => must(['umount', mount]));
  const cgroup = join(mount, `ambient-redirect-${process.pid}`);
  mkdirSync(cgroup);
  const ztunnel = new ZtunnelProcess(site, []);
  topology.testbed.defer(() => {
    ztunnel.process.kill('SIGKILL');
    const remove = `for i in $(seq 1000); do rmdir ${cgroup} 2>/dev/null && exit 0; sleep 0.01; done; rmdir ${cgroup}`;
    must(['sh', '-c', remove]);
  });
  writeFileSync(join(cgroup, 'cgroup.procs'), `${ztunnel.process.pid}`);
  const agent = await site.agent();
  await ztunnel.until('it is ready', ({ ready }) => ready);
  const [client, server] = [enrolled('client'), enrolled('server')];
  await start(client, server);
  await server.endpoint.listen(APP);
  expect((await agent.get<{ markForgeable: string | null }>('/v1/status')).markForgeable).toBeNull();
  const seen = await capture(client);
  for (const family of families) expect(await talk(client, server, family)).toBe(client.addresses[family]);
  expect(ztunnel.seen.length).toBe(4);
  expect(seen.packets(AROUND)).toEqual([]);
});

describe('leaving', () => {
  test('DEL closes the listeners in the pod', async () => {
    open();
    await site.agent();
    const ztunnel = await site.ztunnel();
    const pod = enrolled('client');
    await start(pod);
    await topology.deleteOurs(pod);
    await ztunnel.until('the pod is forgotten', ({ served }) => served.length === 0);
    expect(await pods()).toEqual([]);
    await topology.deleteOurs(pod);
  });

  test('DEL without the agent: it learns of it when it is back', async () => {
    open();
    const agent = await site.agent();
    const ztunnel = await site.ztunnel();
    const [gone, stays] = [enrolled('gone'), enrolled('stays')];
    await start(gone, stays);
    await agent.kill();
    await topology.delete(gone);
    expect(ztunnel.state.served.sort()).toEqual(['uid-gone', 'uid-stays']);
    await site.agent();
    await ztunnel.until('the pod is forgotten', ({ served }) => served.join() === 'uid-stays');
  });

  test('unenroll drains: what ztunnel has goes on, new connections go direct, then ztunnel forgets the pod', async () => {
    open();
    await site.agent('--reconcile-seconds', '1');
    const ztunnel = await site.ztunnel();
    const [client, server] = [enrolled('client'), enrolled('server')];
    await start(client, server);
    await server.endpoint.listen(APP);
    const held = await client.endpoint.connect(server.addresses[4], APP);
    expect(await command('unenroll', '--pod', 'default/client')).toMatchObject({ status: 0 });
    const seen = await capture(client);
    await talk(client, server, 4);
    await seen.until('a direct connection', AROUND, (packets) => packets.length > 0);
    await client.endpoint.exchange(held, 5_000);
    await client.endpoint.finish(held);
    await ztunnel.until('the pod is forgotten', ({ served }) => served.join() === 'uid-server');
  });

  test('enroll with a service account, for a pod that the agent has no list for', async () => {
    open({ enrollment: 'annotation' });
    await site.agent();
    const ztunnel = await site.ztunnel();
    const pod = topology.pod('later');
    await topology.add(pod);
    const conf = join(topology.testbed.directory('conf'), 'entry.json');
    writeFileSync(conf, JSON.stringify({ type: 'ambient-redirect', proxy: { contract: 'in-pod' } }));
    const args = ['enroll', '--conf', conf, '--netns', pod.netns.path];
    const refused = await command(...args);
    expect(refused.status).toBe(1);
    expect(refused.stderr).toMatch('the service account of default/later is not known');
    expect((await pods()).map(({ role, state }) => `${role} ${state}`)).toEqual(['none recorded']);
    const done = await command(...args, '--service-account', 'sa', '--uid', 'u1');
    expect(done, done.stderr).toMatchObject({ status: 0 });
    expect(ztunnel.state.served).toEqual(['u1']);
    expect(await command('unenroll', '--no-drain', '--pod', 'default/later')).toMatchObject({ status: 0 });
    await ztunnel.until('the pod is forgotten', ({ served }) => served.length === 0);
  });
});

describe('restarts', () => {
  test('of the agent change no packet: connections go on, and ztunnel keeps its pods', async () => {
    open();
    const agent = await site.agent();
    const ztunnel = await site.ztunnel();
    const [client, server] = [enrolled('client'), enrolled('server')];
    await start(client, server);
    await server.endpoint.listen(APP);
    const held = await client.endpoint.connect(server.addresses[4], APP);
    const seen = await capture(client);
    await agent.stop();
    await client.endpoint.exchange(held, 5_000);
    await talk(client, server, 6);
    await site.agent();
    await ztunnel.until('it is ready again', ({ ready }) => ready);
    expect(ztunnel.state.served.sort()).toEqual(['uid-client', 'uid-server']);
    await client.endpoint.exchange(held, 5_000);
    await talk(client, server, 4);
    expect(seen.packets(AROUND)).toEqual([]);
  });

  test('an upgrade of ztunnel, the second beside the first, which drains, loses no request at a fixed rate', async () => {
    open();
    await site.agent();
    const first = await site.ztunnel();
    const [client, server] = [enrolled('client'), enrolled('server')];
    await start(client, server);
    await server.endpoint.listen(APP);
    const seen = await capture(client);
    const failures: string[] = [];
    let sent = 0;
    let running = true;
    // A request every 25 ms whatever becomes of those before it.
    const requests: Promise<void>[] = [];
    const load = (async () => {
      for (; running; sent++) {
        const family = families[sent % 2] as 4 | 6;
        requests.push(
          talk(client, server, family).then(
            () => {},
            (error: Error) => void failures.push(error.message),
          ),
        );
        await new Promise((resolve) => setTimeout(resolve, 25));
      }
    })();
    await until('there is load', () => sent > 20);
    const second = await site.ztunnel();
    await second.until('it serves both', ({ served }) => served.length === 2);
    const atUpgrade = sent;
    first.process.kill('SIGTERM');
    await first.process.ended;
    await until('there was load after the upgrade', () => sent > atUpgrade + 40);
    running = false;
    await load;
    await Promise.all(requests);
    expect(failures).toEqual([]);
    expect(second.seen.length).toBeGreaterThan(0);
    expect(seen.packets(AROUND)).toEqual([]);
    // The one that is left gets what comes.
    const third = enrolled('third');
    await start(third);
    expect(second.state.served).toContain('uid-third');
  });

  test.each(families)(
    'IPv%i: connections that wait for a ztunnel which dies are served by the one beside it',
    async (family) => {
      open();
      await site.agent();
      const first = await site.ztunnel();
      const [client, server] = [enrolled('client'), enrolled('server')];
      await start(client, server);
      await server.endpoint.listen(APP);
      const second = await site.ztunnel();
      await second.until('it serves both', ({ served }) => served.length === 2);
      const seen = await capture(client);
      // It accepts nothing any more, and its listeners still complete handshakes.
      first.process.kill('SIGSTOP');
      const many = client.endpoint.many(server.addresses[family], APP, 40, 20_000);
      const taken = () => second.seen.filter(({ listener }) => listener === 'outbound').length;
      await until('the client has all its connections', () => {
        const found = client.netns.run(['ss', '-Htn', 'state', 'established', `( dport = :${APP} )`]);
        return found.trim().split('\n').length >= 40;
      });
      expect(taken()).toBeLessThan(40);
      first.process.kill('SIGKILL');
      expect(await many).toMatchObject({ answered: 40, failures: {} });
      expect(seen.packets(AROUND)).toEqual([]);
    },
  );

  test(
    'kill -9 of the agent while pods come and go: state, ztunnel and kernel agree, and nothing went around',
    async () => {
      open({ hook: 'clsact' }, 'clsact');
      const rounds = LONG ? 100 : 4;
      let agent = await site.agent();
      const ztunnel = await site.ztunnel();
      const [client, server] = [enrolled('client'), enrolled('server')];
      await start(client, server);
      await server.endpoint.listen(APP);
      const seen = await capture(client);
      const living = new Map<string, Pod>();
      for (let round = 0; round < rounds; round++) {
        const comes = enrolled(`pod-${round}`);
        site.know(comes);
        await topology.addPrimary(comes);
        site.refresh();
        const goes = round % 2 === 1 ? [...living.values()][0] : undefined;
        const added = topology.addOurs(comes).then(
          () => true,
          (error: unknown) => {
            if (error instanceof PluginError && [11, 107].includes(JSON.parse(error.outcome.stdout).code)) return false;
            throw error;
          },
        );
        const removed = goes === undefined ? Promise.resolve() : topology.deleteOurs(goes);
        // At any moment of them.
        await new Promise((resolve) => setTimeout(resolve, (round * 37) % 150));
        await agent.kill();
        await talk(client, server, families[round % 2] as 4 | 6);
        agent = await site.agent();
        if (await added) living.set(comes.label, comes);
        await removed;
        if (goes !== undefined) living.delete(goes.label);
        await ztunnel.until('it is ready again', ({ ready }) => ready);
      }
      const expected = ['client', 'server', ...living.keys()].sort();
      await until('state and ztunnel agree', async () => {
        const recorded = (await pods()).filter(({ role, state }) => role === 'pod' && state === 'attached');
        const names = recorded
          .map(({ name }) => name)
          .sort()
          .join();
        return (
          names === expected.join() &&
          ztunnel.state.served.sort().join() ===
            expected
              .map((name) => `uid-${name}`)
              .sort()
              .join()
        );
      });
      for (const { name, programs } of await pods()) {
        expect(programs.alive, name).toBe(programs.attached.length);
      }
      const { workloads } = await agent.get<{ workloads: { name: string; acknowledged: boolean }[] }>('/v1/workloads');
      expect(
        workloads
          .filter(({ acknowledged }) => acknowledged)
          .map(({ name }) => name)
          .sort(),
      ).toEqual(expected);
      expect(seen.packets(AROUND)).toEqual([]);
    },
    LONG ? 1_200_000 : 60_000,
  );
});

describe('truth', () => {
  const PERIOD_MS = 1_000;

  test('a pod whose listeners ztunnel has lost gets them again within a period; other pods are not disturbed', async () => {
    open();
    const agent = await site.agent(
      '--reconcile-seconds',
      `${PERIOD_MS / 1_000}`,
      '--monitoring-port',
      '15014',
      '--address',
      '127.0.0.1',
    );
    const ztunnel = await site.ztunnel('--deaf-to', 'uid-deaf');
    const [client, server, deaf] = [enrolled('client'), enrolled('server'), enrolled('deaf')];
    await start(client, server, deaf);
    await server.endpoint.listen(APP);
    const held = await client.endpoint.connect(server.addresses[4], APP);
    const seen = await capture(deaf);
    const listening = () => deaf.netns.run(['ss', '-Hltn']).match(/:150(01|06|08)\b/g)?.length ?? 0;
    const said = (text: string) => agent.log.filter(({ msg }) => msg === text);
    expect(listening()).toBe(3);
    ztunnel.process.kill('SIGUSR2');
    await until('they are gone', () => listening() === 0);
    await until('they are there again', () => listening() === 3);
    await until('it is said', () => said('made again as recorded').length === 1);
    expect(
      said('the kernel is not as recorded').map(({ kind, pod, object }) => `${kind} of ${pod}: ${object}`),
    ).toEqual([15_001, 15_006, 15_008].map((port) => `listener of default/deaf: listener on port ${port}`));
    const metrics = await topology.node.exec(['curl', '-sf', 'http://127.0.0.1:15014/metrics']);
    expect(metrics.stdout).toMatch(/^ambient_redirect_drift_total\{kind="listener"\} 3$/m);
    for (const family of families) expect(await talk(deaf, server, family)).toBe(deaf.addresses[family]);
    expect(seen.packets(AROUND)).toEqual([]);
    await client.endpoint.exchange(held, 5_000);
    await client.endpoint.finish(held);

    // Soon after, again: what a repair cuts off is not cut off in each period.
    ztunnel.process.kill('SIGUSR2');
    await until('they are gone', () => listening() === 0);
    await until('it is said again', () => said('made again as recorded').length === 2, 20_000);
    expect(listening()).toBe(3);
    const [first = 0, second = 0] = said('made again as recorded').map(({ time }) => Date.parse(String(time)));
    expect(second - first).toBeGreaterThanOrEqual(4 * PERIOD_MS);
  }, 60_000);
});
