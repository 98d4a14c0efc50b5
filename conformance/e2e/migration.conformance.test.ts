// SPDX-License-Identifier: Apache-2.0
//
// An upgrade while pods run: the programs of another build in place of the pinned ones, larger maps in place of full
// ones, under load, and killed at each step of it.

import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { NO_CAPACITY } from '../../plugin/migrate.ts';
import { Steady } from '../kubernetes/steady.ts';
import { must, type Outcome, until } from '../netns.ts';
import { counters, increases } from './counters.ts';
import { type Actor, InPodMesh, InPodProxy } from './inpod.ts';
import { Mesh } from './mesh.ts';
import { executable, type Family, families, type Pod, requireExecutable, Topology } from './topology.ts';

const root = join(import.meta.dirname, '../..');
const script = join(root, 'plugin/migrate.testing.ts');
const faults = join(root, 'build/Release/ambient_redirect_faults.node');
const OTHER_BUILD = '0123456789abcdef';
const PORT = 8080;
const SMALL = { maxPods: 8, maxFlows: 2_048, directFlowsPerPod: 64 };
const FLOWS = { maxFlows: 8_192, directFlowsPerPod: 1_024 };
const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';

let topology: Topology;
afterEach(() => topology?.close());

interface Wanted {
  maxPods?: number;
  /** default: what there is */
  maxFlows?: number;
  directFlowsPerPod?: number;
  /** of the build whose programs are to be in place; default: the executable's */
  build?: string;
  killStep?: number;
  killCall?: number;
  /** where the names of its kernel calls go */
  calls?: string;
}

function migrate({ build, killStep = 0, killCall, calls, ...wanted }: Wanted): Promise<Outcome> {
  const { stateDir, runDir } = topology;
  const env = {
    PATH: process.env.PATH ?? '',
    AMBIENT_REDIRECT_ADDON: faults,
    ...(build !== undefined && { AMBIENT_REDIRECT_OBJECT_ID: build }),
    ...(killCall !== undefined && { AMBIENT_REDIRECT_KILL_CALL: String(killCall) }),
    ...(calls !== undefined && { AMBIENT_REDIRECT_CALLS_FILE: calls }),
  };
  const argv = [
    process.execPath,
    script,
    JSON.stringify({ stateDir, runDir, ...NO_CAPACITY, maxPods: 8, ...wanted }),
    String(killStep),
  ];
  return topology.node.exec(argv, { env });
}

async function migrated(wanted: Wanted): Promise<unknown> {
  const outcome = await migrate(wanted);
  expect(outcome, outcome.stderr).toMatchObject({ status: 0 });
  return JSON.parse(outcome.stdout.trim().split('\n').at(-1) ?? '');
}

function builds(): string[] {
  return readdirSync(join(topology.stateDir, 'programs'));
}

async function add(pod: Pod): Promise<{ code: number; msg: string } | null> {
  const { status, stdout } = await topology.node.exec([executable], {
    env: topology.environment('ADD', pod),
    input: JSON.stringify(topology.entry(pod)),
  });
  return status === 0 ? null : (JSON.parse(stdout) as { code: number; msg: string });
}

/** Retransmissions of a namespace's TCP so far, both families. */
function retransmitted(pod: Pod): number {
  const [names = '', values = ''] = pod.netns
    .run(['cat', '/proc/net/snmp'])
    .split('\n')
    .filter((line) => line.startsWith('Tcp:'));
  return Number(values.split(' ')[names.split(' ').indexOf('RetransSegs')]);
}

describe.each(['shared', 'in-pod'] as const)('%s, under load', (contract) => {
  const start = async (hook: 'tcx' | 'clsact') => {
    if (contract === 'shared') {
      const mesh = await Mesh.start({ primary: 'ptp', hook, entry: SMALL }, [PORT]);
      return { mesh, proxied: () => mesh.haproxy.proxied().length };
    }
    const mesh = await InPodMesh.start({ primary: 'ptp', hook, entry: SMALL }, [PORT]);
    await mesh.proxies.client.start();
    await mesh.proxies.server.start();
    return { mesh, proxied: () => mesh.proxies.client.proxied().length + mesh.proxies.server.proxied().length };
  };

  test.each(['tcx', 'clsact'] as const)('%s: no packet and no connection is lost, and counters go on', async (hook) => {
    const { mesh, proxied } = await start(hook);
    topology = mesh.topology;
    const { client, server, plain } = mesh;
    for (const namespace of [client.netns, server.netns, topology.outside]) {
      // Without probes for a lost tail, which a busy machine draws by being late.
      namespace.run(['sysctl', '-q', '-w', 'net.ipv4.tcp_early_retrans=0']);
    }
    const hold = (from: Actor, to: Actor) =>
      families.map(async (family: Family) => ({
        from,
        connection: await mesh.connect(from, mesh.address(to, family), PORT),
      }));
    const held = await Promise.all([...hold('client', 'outsider'), ...hold('outsider', 'server')]);
    const exchange = async () => {
      for (const { from, connection } of held) await mesh.endpoint(from).exchange(connection, 20_000);
    };
    await exchange();
    const loads = families.flatMap((family) => [
      new Steady(topology.testbed, client.netns, mesh.address('outsider', family), PORT, 50),
      new Steady(topology.testbed, topology.outside, mesh.address('server', family), PORT, 50),
    ]);
    const flow = () => Promise.all(loads.map((load) => load.more(20)));
    await flow();

    const retransmissions = [client, server].map(retransmitted);
    const attached = contract === 'shared' ? 3 : 2;
    const old = builds();
    const rounds: [Wanted, unknown, string[]][] = [
      [{ build: OTHER_BUILD }, { attachments: attached }, [OTHER_BUILD]],
      [{ build: OTHER_BUILD }, { attachments: 0 }, [OTHER_BUILD]],
      [
        { build: OTHER_BUILD, maxPods: 64 },
        { attachments: attached, capacity: { ...SMALL, maxPods: 64 } },
        [OTHER_BUILD],
      ],
      [{ maxPods: 32 }, { attachments: attached }, old],
      [FLOWS, { attachments: attached, capacity: { ...FLOWS, maxPods: 64 } }, old],
      [{ maxFlows: 64, directFlowsPerPod: 16 }, { attachments: 0 }, old],
    ];
    for (const [wanted, outcome, tags] of rounds) {
      const before = counters(topology.stateDir);
      expect(await migrated(wanted)).toEqual(outcome);
      await flow();
      await exchange();
      expect(builds()).toEqual(tags);
      const moved = increases(before, counters(topology.stateDir));
      // None has become smaller, and none is of a packet that was dropped or let past the proxy.
      expect(Object.values(moved).filter((packets) => packets < 0)).toEqual([]);
      expect(Object.keys(moved).filter((key) => /drop|reset|orphaned|pass_(direct|no_proxy)/.test(key))).toEqual([]);
      for (const pod of [client, server, plain]) await topology.checkOurs(pod);
    }
    expect(readdirSync(topology.stateDir)).not.toContain('next');
    for (const load of loads) expect(await load.stop()).toEqual([]);
    for (const { from, connection } of held) expect(await mesh.endpoint(from).finish(connection)).toBe('bye\n');
    expect([client, server].map(retransmitted)).toEqual(retransmissions);
    const requests = loads.reduce((sum, { outcomes }) => sum + outcomes.length, 0);
    expect(proxied()).toBe(requests + held.length);

    const late = topology.pod('late', { enroll: true });
    await topology.add(late);
    await late.endpoint.listen(PORT);
    if (contract === 'in-pod') await new InPodProxy(topology, late).start();
    for (const family of families) {
      const connection = await mesh.connect('client', late.addresses[family], PORT);
      expect(await mesh.endpoint('client').finish(connection)).toBe('bye\n');
    }
    const moved = increases([], counters(topology.stateDir), late.hostIfindex || undefined);
    expect(Object.keys(moved)).toContain(
      contract === 'shared' ? 'pod_egress to_proxy_established' : 'inpod_ingress redirected_inbound',
    );
    expect(builds()).toEqual(old);
  });
});

test.each(['tcx', 'clsact'] as const)(
  '%s: direct connections go on in larger maps, each where it is looked for',
  async (hook) => {
    const mesh = await Mesh.start({ primary: 'ptp', hook, entry: SMALL }, [PORT]);
    topology = mesh.topology;
    const { plain } = mesh;
    const older = await Promise.all(
      families.flatMap((family) =>
        Array.from({ length: 12 }, () => mesh.connect('plain', mesh.address('outsider', family), PORT)),
      ),
    );
    await mesh.commanded('enroll', '--netns', plain.netns.path, '--pod', 'default/plain');
    const native = loadNative();
    const remembered = () => {
      const state = native.openState(topology.stateDir);
      try {
        const { maxFlows, directFlowsPerPod } = native.settings(state);
        return { maxFlows, directFlowsPerPod, flows: native.directFlows(state, plain.hostIfindex).length };
      } finally {
        native.closeState(state);
      }
    };
    const { maxFlows, directFlowsPerPod } = SMALL;
    expect(remembered()).toEqual({ maxFlows, directFlowsPerPod, flows: older.length });
    await migrated(FLOWS);
    expect(remembered()).toEqual({ ...FLOWS, flows: older.length });
    const before = counters(topology.stateDir);
    for (const connection of older) await mesh.exchanged(connection, 'plain');
    const moved = increases(before, counters(topology.stateDir), plain.hostIfindex);
    expect(Object.keys(moved).sort()).toEqual(['pod_egress pass_direct', 'pod_ingress pass_direct']);
    expect(await mesh.goesDirect('plain', mesh.address('outsider', 4), PORT)).toBe(false);
  },
);

describe.each(['tcx', 'clsact'] as const)('%s', (hook) => {
  /** A node with as many pods as it has room for, and one more. */
  const full = async (maxPods: number) => {
    requireExecutable();
    topology = new Topology({ primary: 'ptp', hook, rpFilter: 1, entry: { maxPods } });
    const pods = Array.from({ length: maxPods + 1 }, (_, i) => {
      const pod = topology.pod(`pod${i}`, { enroll: true, entry: { exclude: { outboundPorts: [7000 + i] } } });
      topology.wire(pod, i + 2);
      return pod;
    });
    const last = pods.pop() as Pod;
    for (const pod of pods) expect(await add(pod)).toBeNull();
    return { pods, last };
  };

  test('there is room for a ninth pod when maxPods has been raised', async () => {
    const { pods, last } = await full(8);
    expect(await add(last)).toMatchObject({ code: 103 });
    expect(await migrated({ maxPods: 64 })).toMatchObject({ attachments: 8, capacity: { maxPods: 64 } });
    expect(await add(last)).toBeNull();
    for (const pod of [...pods, last]) await topology.checkOurs(pod);
  });

  const kinds = [
    { what: 'another build', wanted: { build: OTHER_BUILD, maxPods: 3 } },
    { what: 'larger maps', wanted: { maxPods: 8 } },
  ];
  const larger = (round: number) => ({
    maxPods: 8 + round * 8,
    maxFlows: 65_536 + round,
    directFlowsPerPod: 1_024 + round * 8,
  });
  const chosen = LONG ? kinds : hook === 'clsact' ? kinds.slice(0, 1) : kinds.slice(1);
  test.each(chosen)(
    '$what, killed on its way: the next run goes on',
    async ({ what, wanted }) => {
      const { pods, last } = await full(3);
      const [gone, ...kept] = pods as [Pod, ...Pod[]];
      // Back and forth, or larger and larger, so that each round has all to do.
      let rounds = 0;
      const round = () => {
        rounds += 1;
        if (what === 'larger maps') return larger(rounds);
        return rounds % 2 === 1 ? wanted : { maxPods: wanted.maxPods };
      };
      const { stdout } = await migrate(round());
      const steps = stdout.trim().split('\n').slice(0, -1);
      for (const [index, name] of steps.entries()) {
        // Of steps that are alike the first and the last; all in the long run.
        const kind = (other: string) => other.split(' ')[0] === name.split(' ')[0];
        if (!LONG && index !== steps.findIndex(kind) && index !== steps.findLastIndex(kind)) continue;
        const now = round();
        const killed = await migrate({ ...now, killStep: index + 1 });
        expect(killed.stdout.trim().split('\n').at(-1)?.split(' ')[0], killed.stderr).toBe(name.split(' ')[0]);
        expect(killed.status).not.toBe(0);
        // Meanwhile pods may go; none comes that a part of the programs would not know.
        await topology.deleteOurs(gone);
        if (existsSync(join(topology.stateDir, 'next/complete')))
          expect(await add(last), name).toMatchObject({ code: 11 });
        await migrated(now);
        for (const pod of kept) await topology.checkOurs(pod);
        expect(builds(), name).toHaveLength(1);
        expect(readdirSync(topology.stateDir), name).not.toContain('next');
        // By the executable's own build, so that there is one more to replace.
        expect(await add(gone), name).toBeNull();
        await migrated(now);
      }
      expect(steps.map((step) => step.split(' ')[0])).toEqual(
        expect.arrayContaining(['programs', 'switched', 'recorded']),
      );
    },
    180_000,
  );

  test.each(chosen)(
    '$what, killed at kernel calls',
    async ({ what, wanted }) => {
      const { pods } = await full(3);
      const calls = join(topology.testbed.directory('calls'), 'calls');
      let rounds = 0;
      const round = () => {
        rounds += 1;
        if (what === 'larger maps') return larger(rounds);
        return rounds % 2 === 1 ? wanted : { maxPods: wanted.maxPods };
      };
      await migrated({ ...round(), calls });
      const made = readFileSync(calls, 'utf8').trim().split('\n').length;
      expect(made).toBeGreaterThan(100);
      // Every one of them takes an hour: in the long run every second one, half of those with either hook.
      const distance = LONG ? 4 : Math.floor(made / 6);
      for (let call = LONG && hook === 'clsact' ? 5 : 3; call <= made; call += distance) {
        const now = round();
        const killed = await migrate({ ...now, killCall: call });
        expect(killed.status, `call ${call}`).not.toBe(0);
        await migrated(now);
        for (const pod of pods) await topology.checkOurs(pod);
        expect(builds()).toHaveLength(1);
        expect(readdirSync(topology.stateDir)).not.toContain('next');
      }
    },
    LONG ? 3_600_000 : 120_000,
  );
});

test('ADD waits for a migration that is under way', async () => {
  requireExecutable();
  topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1 });
  const [first, second] = ['first', 'second'].map((label, i) => {
    const pod = topology.pod(label, { enroll: true });
    topology.wire(pod, i + 2);
    return pod;
  }) as [Pod, Pod];
  expect(await add(first)).toBeNull();
  const native = loadNative();
  const lock = native.lockFile(join(topology.runDir, 'migration.lock'), 5_000);
  const calls = join(topology.testbed.directory('calls'), 'calls');
  let ended = false;
  const adding = topology.node
    .exec([`${executable}-faults`], {
      env: { ...topology.environment('ADD', second), AMBIENT_REDIRECT_CALLS_FILE: calls },
      input: JSON.stringify(topology.entry(second)),
    })
    .finally(() => {
      ended = true;
    });
  const asked = () => (existsSync(calls) ? readFileSync(calls, 'utf8').match(/^flock$/gm)?.length : 0) ?? 0;
  try {
    await until('ADD has asked for the lock several times', () => asked() > 3);
    expect(ended).toBe(false);
    expect(readdirSync(join(topology.stateDir, 'links'))).toHaveLength(1);
  } finally {
    native.close(lock);
  }
  expect(await adding).toMatchObject({ status: 0 });
  await topology.checkOurs(second);
});

test('install does it, and so does the agent when it starts', async () => {
  const mesh = await Mesh.start({ primary: 'ptp', hook: 'tcx', entry: { maxPods: 8 } }, [PORT]);
  topology = mesh.topology;
  const { testbed, stateDir, runDir } = topology;
  const [netDir, binDir] = [testbed.directory('net.d'), testbed.directory('bin')];
  writeFileSync(join(netDir, '10.conflist'), '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"}]}');
  const install = (pods: string) =>
    mesh.commanded('install', '--cni-net-dir', netDir, '--cni-bin-dir', binDir, '--max-pods', pods);
  const held = await mesh.connect('client', mesh.address('outsider', 4), PORT);
  const own = builds();

  await migrated({ build: OTHER_BUILD });
  expect(await install('16')).toContain(
    `${stateDir}: 3 attachments with the programs of this build\n${stateDir}: room for 16 pods, 65536 flows, 1024 direct flows of each pod\n`,
  );
  expect(builds()).toEqual(own);
  expect(await install('16')).not.toContain(stateDir);

  await migrated({ build: OTHER_BUILD });
  const directories = ['--state-dir', stateDir, '--run-dir', runDir, '--zds-socket', join(netDir, 'ztunnel.sock')];
  const ports = ['--monitoring-port', '0', '--health-port', '0'];
  const agent = testbed.start(topology.node.argv([executable, 'agent', ...directories, ...ports]));
  await until('the agent serves', () => agent.output.includes('the agent serves'), 20_000);
  expect(agent.output).toContain('attachments got the programs of this build');
  expect(agent.output).not.toContain('the kernel is not as recorded');
  expect(builds()).toEqual(own);
  await mesh.exchanged(held, 'client');
  await topology.checkOurs(mesh.client);
  await topology.add(topology.pod('late', { enroll: true }));
});

describe('another layout', () => {
  test.each([
    { layout: 4, why: 'a newer version made it' },
    { layout: 2, why: 'none of its versions is as old' },
  ])('$layout: install and the agent refuse it and change nothing', async ({ layout, why }) => {
    const mesh = await Mesh.start({ primary: 'ptp', hook: 'tcx' }, [PORT]);
    topology = mesh.topology;
    const pin = join(topology.stateDir, 'settings');
    const [entry] = JSON.parse(must(['bpftool', '-j', 'map', 'dump', 'pinned', pin])) as { value: string[] }[];
    const value = entry?.value ?? [];
    const words = (bytes: string[]) => bytes.map((byte) => String(Number(byte)));
    const write = (bytes: string[]) =>
      must(['bpftool', 'map', 'update', 'pinned', pin, 'key', '0', '0', '0', '0', 'value', ...words(bytes)]);
    write([`0x0${layout}`, ...value.slice(1)]);
    const [netDir, binDir] = [topology.testbed.directory('net.d'), topology.testbed.directory('bin')];
    writeFileSync(join(netDir, '10.conflist'), '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"}]}');
    const before = readdirSync(topology.stateDir);
    const installed = await mesh.command('install', '--cni-net-dir', netDir, '--cni-bin-dir', binDir);
    const agent = await mesh.command('agent', '--zds-socket', join(netDir, 'ztunnel.sock'));
    for (const { status, stdout, stderr } of [installed, agent]) {
      expect(status).toBe(1);
      expect(stdout + stderr).toContain(`layout ${layout}, this program wants layout 3: ${why}`);
    }
    expect(readdirSync(binDir)).toEqual([]);
    expect(readdirSync(topology.stateDir)).toEqual(before);
    expect(await mesh.goesDirect('client', mesh.address('server', 4), PORT)).toBe(false);
    write(value);
    await mesh.commanded('install', '--cni-net-dir', netDir, '--cni-bin-dir', binDir);
    await topology.checkOurs(mesh.client);
  });
});
