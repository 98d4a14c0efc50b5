// SPDX-License-Identifier: Apache-2.0
// What a profile measures, and in which order.

import { type Family, families } from '../e2e/topology.ts';
import { crrLoad, fortioLoad, holdLoad, iperfLoad, type Load, type Programs, rrLoad, wrkLoad } from './load.ts';
import type { ProxyKind } from './proxies.ts';
import { generator, shuffled } from './statistics.ts';
import { MODES, type Mode } from './world.ts';

export type ProfileName = 'quick' | 'default' | 'full';

export interface Profile {
  name: ProfileName;
  rounds: number;
  /** Connections of the published experiment, and how long each run of it lasts. */
  connections: readonly number[];
  fortioSeconds: number;
  /** How long wrk and iperf3 last, and how long the loads with little scatter. */
  seconds: number;
  shortSeconds: number;
  /** How often a load of the other kinds runs in a round. */
  repeats: number;
  modes: readonly string[];
  families: readonly Family[];
  /** Loads that HAProxy takes too. */
  haproxy: readonly ('wrk' | 'iperf')[];
  hold: readonly number[];
  streams: readonly number[];
  /** Rounds of what the programs cost by themselves. */
  programRounds: number;
  /** Idle attachments beside which ADD and the per-packet cost are measured. */
  attachments: readonly number[];
  /** Rounds of ADD, CHECK and DEL, and of twenty at once. */
  addRounds: number;
  atOnceRounds: number;
}

const every = MODES.map(({ name }) => name);

export const PROFILES: Record<ProfileName, Profile> = {
  quick: {
    name: 'quick',
    rounds: 2,
    connections: [1, 64],
    fortioSeconds: 2,
    seconds: 1,
    shortSeconds: 1,
    repeats: 1,
    modes: ['direct', 'fixed', 'tcx', 'iptables'],
    families: [4],
    haproxy: [],
    hold: [],
    streams: [1],
    programRounds: 2,
    attachments: [1, 100],
    addRounds: 4,
    atOnceRounds: 1,
  },
  default: {
    name: 'default',
    rounds: 3,
    connections: [1, 16, 64, 128],
    fortioSeconds: 4,
    seconds: 2,
    shortSeconds: 1,
    repeats: 2,
    modes: every,
    families,
    haproxy: ['wrk'],
    hold: [1000],
    streams: [1, 8],
    programRounds: 2,
    attachments: [1, 100, 1000],
    addRounds: 10,
    atOnceRounds: 3,
  },
  full: {
    name: 'full',
    rounds: 3,
    connections: [1, 2, 4, 8, 16, 32, 64, 128],
    fortioSeconds: 10,
    seconds: 5,
    shortSeconds: 3,
    repeats: 2,
    modes: every,
    families,
    haproxy: ['wrk', 'iperf'],
    hold: [10, 1000, 9000],
    streams: [1, 8],
    programRounds: 6,
    attachments: [1, 100, 1000, 4096],
    addRounds: 30,
    atOnceRounds: 6,
  },
};

/** A load that every mode of it takes, one right after the other: a row of pairs. */
export interface Cell {
  /** The load's name, and the proxy where it is not the native one: `wrk-64-v4`, `wrk-64-v4+haproxy`. */
  name: string;
  load: Load;
  proxy: ProxyKind;
  modes: readonly Mode[];
  repeats: number;
}

/** Loads of the profile. Where fortio is missing, wrk stands in for `-qps 0`, and `-qps 8000` is left out. */
export function cells(profile: Profile, programs: Programs): Cell[] {
  const { peer, fortio } = programs;
  const { seconds, shortSeconds, repeats } = profile;
  const modes = MODES.filter(
    ({ name, wiring }) =>
      profile.modes.includes(name) && (wiring.proxies !== 'ztunnel' || programs.ztunnel !== undefined),
  );
  const result: Cell[] = [];
  const add = (load: Load, times: number, proxy: ProxyKind = 'native') => {
    const able = proxy === 'native' ? modes : modes.filter(({ wiring }) => wiring.proxies === 'shared');
    const name = proxy === 'native' ? load.name : `${load.name}+${proxy}`;
    result.push({ name, load, proxy, modes: able, repeats: times });
  };
  for (const connections of profile.connections) {
    if (fortio === undefined) {
      add(wrkLoad(4, connections, profile.fortioSeconds), 1);
      continue;
    }
    for (const qps of [0, 8000]) add(fortioLoad(fortio, 4, connections, qps, profile.fortioSeconds), 1);
  }
  for (const family of profile.families) {
    // IPv6 goes the same way through every mode: once a round shows whether it does.
    const times = family === 4 ? repeats : 1;
    add(wrkLoad(family, 32, seconds), times);
    add(rrLoad(peer, family, shortSeconds), times);
    add(crrLoad(peer, family, 8, shortSeconds), times);
    for (const streams of family === 4 ? profile.streams : [1]) {
      for (const reverse of family === 4 ? [false, true] : [false]) {
        add(iperfLoad(family, streams, reverse, seconds), 1);
      }
    }
  }
  for (const connections of profile.hold) add(holdLoad(peer, 4, connections, 10, shortSeconds), 1);
  if (profile.haproxy.includes('wrk')) add(wrkLoad(4, 32, seconds), repeats, 'haproxy');
  if (profile.haproxy.includes('iperf')) add(iperfLoad(4, 1, false, seconds), repeats, 'haproxy');
  return result;
}

export interface Step {
  round: number;
  repeat: number;
  cell: Cell;
  mode: Mode;
  /** Place in the shuffled order of its cell, from 0. */
  place: number;
}

export function stepKey(step: { round: number; repeat: number; cell: string; mode: string }): string {
  return [step.round, step.repeat, step.cell, step.mode].join(' ');
}

/**
 * Every run in its order: within a round, cell after cell (one proxy's cells together, so that it is changed once), and
 * within each cell the modes in an order of their own.
 */
export function steps(profile: Profile, all: readonly Cell[], seed: number): Step[] {
  const random = generator(seed);
  const result: Step[] = [];
  for (let round = 0; round < profile.rounds; round++) {
    const order = shuffled(all, random).sort((a, b) => Number(a.proxy !== 'native') - Number(b.proxy !== 'native'));
    for (const cell of order) {
      for (let repeat = 0; repeat < cell.repeats; repeat++) {
        shuffled(cell.modes, random).forEach((mode, place) => {
          result.push({ round, repeat, cell, mode, place });
        });
      }
    }
  }
  return result;
}
