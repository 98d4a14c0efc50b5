// SPDX-License-Identifier: Apache-2.0
//
// Each mode of the bench is wired and carries requests in both families, and the bench calls the run valid; and each has
// miswired twins, in which the same requests are answered as well, by another way: the bench must call those invalid.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { executable, families } from '../e2e/topology.ts';
import { crrLoad, holdLoad, type Load, type Programs, rrLoad, wrkLoad } from './load.ts';
import type { Cell, Step } from './plan.ts';
import { peer } from './programs.ts';
import type { ProxyKind } from './proxies.ts';
import { measure, type Run } from './run.ts';
import { MODES, type Mode, modeNamed, World } from './world.ts';
import { standInZtunnel } from './ztunnel.ts';

/** A mode, whose wiring it gets in truth, and what the bench must find. */
const twins: [mode: string, wiredAs: string, reason: RegExp][] = [
  ['direct', 'tcx', /"shared outbound" accepted|programs are attached/],
  ['direct', 'iptables', /"shared outbound" accepted|netfilter rules/],
  ['fixed', 'tcx', /"shared fixed" accepted 0/],
  ['tcx', 'direct', /"shared outbound" accepted 0/],
  ['tcx', 'clsact', /attached to clsact, the mode wants tcx/],
  ['tcx', 'iptables', /attached to nowhere/],
  ['clsact', 'tcx', /attached to tcx, the mode wants clsact/],
  ['iptables', 'iptables-vxlan', /there is a tunnel/],
  ['iptables', 'tcx', /programs are attached/],
  ['iptables-vxlan', 'iptables', /there is no tunnel/],
  ['iptables-vxlan-all', 'iptables-vxlan', /packets and \d+ bytes, \d+ and \d+ came through the tunnel/],
  ['fixed-in-pod', 'fixed', /"client fixed" accepted 0/],
  ['in-pod', 'tcx', /"client outbound" accepted 0/],
  ['in-pod', 'iptables-in-pod', /attached to nowhere/],
  ['iptables-in-pod', 'in-pod', /programs are attached/],
  ['ztunnel', 'ztunnel-iptables', /attached to nowhere/],
  ['ztunnel-iptables', 'ztunnel', /programs are attached/],
  ['iptables-in-pod', 'iptables', /"client outbound" accepted 0/],
];

/** What breaks a mode's wiring while everything still answers, and what the bench must find. */
const sabotage: Record<string, { what: string; how: (world: World) => void; reason: RegExp }> = {
  tcx: { what: 'the client left the mesh', how: leaveMesh, reason: /"shared outbound" accepted 0/ },
  'in-pod': { what: 'the client left the mesh', how: leaveMesh, reason: /"client outbound" accepted 0/ },
  iptables: {
    what: 'the rules were flushed',
    how: ({ topology }) => topology.node.run(['iptables', '-t', 'mangle', '-F', 'PREROUTING']),
    reason: /"shared outbound" accepted 0/,
  },
  'iptables-in-pod': {
    what: 'only the client’s pod has rules',
    how: ({ server }) => server.netns.run(['iptables', '-t', 'nat', '-F', 'PREROUTING']),
    reason: /"server inbound" accepted 0/,
  },
};

function leaveMesh({ client, topology: { node, stateDir, runDir } }: World): void {
  const where = ['--state-dir', stateDir, '--run-dir', runDir];
  node.run([executable, 'unenroll', '--netns', client.netns.path, '--no-drain', ...where]);
}

let programs: Programs;
beforeAll(async () => {
  const path = await peer();
  programs = { peer: path, fortio: undefined, ztunnel: standInZtunnel(path) };
});

function step(mode: Mode, load: Load, proxy: ProxyKind = 'native'): Step {
  const cell: Cell = { name: load.name, load, proxy, modes: [mode], repeats: 1 };
  return { round: 0, repeat: 0, cell, mode, place: 0 };
}

describe.each(MODES)('$name', (mode) => {
  let world: World;
  beforeAll(async () => {
    world = await World.open(mode, programs);
  });
  afterAll(() => world?.close());

  /** Requests of one connection, judged as those of `as`. */
  const request = (family: 4 | 6 = 4, as: Mode = mode, proxy?: ProxyKind): Promise<Run> =>
    measure(world, step(as, rrLoad(programs.peer, family, 0.05), proxy));

  test('carries requests, and the run is valid', async () => {
    for (const family of families) {
      const run = await request(family);
      expect(run.invalid, `IPv${family}`).toBeUndefined();
      expect(run.units).toBeGreaterThan(0);
      expect(run.metrics.qps).toBeGreaterThan(0);
    }
    for (const load of [crrLoad(programs.peer, 4, 4, 0.1), holdLoad(programs.peer, 6, 70, 1, 0.05)]) {
      const run = await measure(world, step(mode, load));
      expect(run.invalid, load.title).toBeUndefined();
    }
  });

  // HAProxy cannot be inside a pod: it does not mark the connections that it makes.
  if (mode.wiring.proxies === 'shared') {
    test('the same with HAProxy', async () => {
      for (const family of families) expect((await request(family, mode, 'haproxy')).invalid).toBeUndefined();
      expect((await request()).invalid).toBeUndefined();
    });
  }

  test.each(twins.filter(([, wiredAs]) => wiredAs === mode.name))('is not taken for %s', async (name, _, reason) => {
    const run = await request(4, modeNamed(name));
    expect(run.units, run.invalid).toBeGreaterThan(0);
    expect(run.invalid).toMatch(reason);
  });

  const broken = sabotage[mode.name];
  if (broken !== undefined) {
    test(`is invalid when ${broken.what}`, async () => {
      broken.how(world);
      const run = await request();
      expect(run.units, run.invalid).toBeGreaterThan(0);
      expect(run.invalid).toMatch(broken.reason);
    });
  }
});

test('every mode has a twin, wired as another mode is', () => {
  const names = new Set(MODES.map(({ name }) => name));
  expect(new Set(twins.map(([name]) => name))).toEqual(names);
  for (const [, wiredAs] of twins) expect(names).toContain(wiredAs);
});

describe('what fails is invalid, and says why', () => {
  const mode = modeNamed('direct');
  let world: World;
  beforeAll(async () => {
    world = await World.open(mode, programs);
  });
  afterAll(() => world?.close());

  test('a server that goes away while it is measured, and one that is not there', async () => {
    const running = measure(world, step(mode, wrkLoad(4, 4, 1)));
    await world.stopServer();
    expect((await running).invalid).toMatch(/wrk/);
    const run = await measure(world, step(mode, rrLoad(programs.peer, 4, 0.05)));
    expect(run.invalid).toMatch(/exit 1: peer: connect: Connection refused/);
    expect(run.metrics).toEqual({});
  });
});
