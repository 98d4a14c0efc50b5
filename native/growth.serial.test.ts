// SPDX-License-Identifier: Apache-2.0
// Attaching and detaching many times leaves nothing behind: no descriptor, no memory, no pin, no filter, no program.

import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { must, type Namespace, Testbed } from '../conformance/netns.ts';
import {
  address,
  attachmentRecord,
  bytes,
  descriptors,
  endpointRecord,
  interfaceRecord,
  LONG,
  native,
  opened,
  type StateFixture,
  stateDirectory,
} from './native.testing.ts';

const bed = Testbed.open();
afterAll(() => bed.close());

let node: Namespace;
let netns: number;
let pod: Namespace;
let state: StateFixture;
let egress: number;
let ingress: number;
beforeAll(() => {
  [node, pod] = [bed.namespace('node'), bed.namespace('pod')];
  bed.veth({ namespace: node, ifname: 'veth0' }, { namespace: pod, ifname: 'eth0', addresses: ['192.0.2.2/24'] });
  netns = opened(bed, node);
  state = stateDirectory(bed);
  [egress, ingress] = [state.program('pod_egress'), state.program('pod_ingress')];
  idle = threads();
});

/** Everything an ADD and a DEL do, hooks apart. */
function round(attach: (ifindex: number) => void, detach: (ifindex: number) => void): void {
  const podFd = native.openNetns(pod.path);
  const lock = native.lockFile(join(state.dir, '../../lock'), 1_000);
  native.netnsIdentity(podFd);
  const inside = native.linkByName(podFd, 'eth0');
  const host = native.linkByIndex(netns, inside?.peerIfindex ?? 0);
  const ifindex = host?.ifindex ?? 0;
  native.linkAddresses(podFd, inside?.ifindex ?? 0);
  native.qdiscs(netns, ifindex);
  native.listeners(podFd);
  native.addRule(podFd, { family: 4, priority: 100, mark: 1, table: 100, protocol: 163 });
  native.addLocalRoute(podFd, { family: 4, table: 100, protocol: 163 });
  const opened = native.openState(state.dir);
  native.putAttachment(opened, bytes(32), attachmentRecord());
  native.putInterface(opened, ifindex, interfaceRecord());
  native.putEndpoint(opened, address(1), endpointRecord(), true);
  attach(ifindex);
  native.getAttachment(opened, bytes(32));
  native.listAttachments(opened);
  native.counters(opened);
  try {
    native.openNetns('/nonexistent');
  } catch {
    // an error on the way is part of the round
  }
  detach(ifindex);
  native.deleteEndpoint(opened, address(1));
  native.deleteInterface(opened, ifindex);
  native.deleteAttachment(opened, bytes(32));
  native.deleteLocalRoute(podFd, { family: 4, table: 100, protocol: 163 });
  native.deleteRule(podFd, { family: 4, priority: 100, mark: 1, table: 100, protocol: 163 });
  native.closeState(opened);
  native.close(lock);
  native.close(podFd);
}

const clsact = {
  attach(ifindex: number): void {
    native.addClsact(netns, ifindex);
    for (const direction of ['ingress', 'egress'] as const) {
      const program = direction === 'ingress' ? egress : ingress;
      native.attachFilter(netns, ifindex, direction, program, { priority: 1, handle: 1, name: 'pod', replace: false });
    }
  },
  detach(ifindex: number): void {
    for (const direction of ['ingress', 'egress'] as const) {
      expect(native.filters(netns, ifindex, direction)).toHaveLength(1);
      expect(native.deleteFilter(netns, ifindex, direction, { priority: 1, handle: 1 })).toBe(true);
      expect(native.filters(netns, ifindex, direction)).toEqual([]);
    }
  },
};

const tcx = {
  attach(ifindex: number): void {
    native.attachTcx(netns, ifindex, 'ingress', egress, 'first', join(state.links, 'in'));
    native.attachTcx(netns, ifindex, 'egress', ingress, 'first', join(state.links, 'out'));
  },
  detach(ifindex: number): void {
    expect(native.linkInfo(join(state.links, 'in'))?.ifindex).toBe(ifindex);
    expect(native.queryTcx(netns, ifindex, 'ingress')).toHaveLength(1);
    expect(native.detachLink(join(state.links, 'in'))).toBe(true);
    expect(native.detachLink(join(state.links, 'out'))).toBe(true);
    expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([]);
    expect(native.queryTcx(netns, ifindex, 'egress')).toEqual([]);
  },
};

const exclusions = {
  attach(ifindex: number): void {
    const opened = native.openState(state.dir);
    native.putExclusions(opened, ifindex, []);
    expect(native.listExclusions(opened)).toEqual([ifindex]);
    native.closeState(opened);
  },
  detach(ifindex: number): void {
    const opened = native.openState(state.dir);
    expect(native.deleteExclusions(opened, ifindex)).toBe(true);
    expect(native.listExclusions(opened)).toEqual([]);
    native.closeState(opened);
  },
};

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc') as () => void;

/** Resident memory in KiB without V8's heap, whose size is V8's affair. */
function resident(): number {
  collect();
  const { rss, heapTotal } = process.memoryUsage();
  return (rss - heapTotal) / 1024;
}

const threads = () => readdirSync('/proc/self/task').length;
let idle = 0;

const pins = () => readdirSync(state.dir, { recursive: true }).sort();
const innerMaps = () =>
  (JSON.parse(must(['bpftool', '-j', 'map', 'show'])) as { name?: string }[]).filter(
    ({ name }) => name === 'exclusion_rules',
  );

describe('without growth', () => {
  test.each([
    { hooks: 'clsact', times: LONG ? 2_001 : 402, rounds: clsact },
    { hooks: 'TCX', times: LONG ? 300 : 21, rounds: tcx },
    { hooks: 'exclusions', times: LONG ? 300 : 21, rounds: exclusions },
  ])(
    '$times rounds of $hooks',
    async ({ times, rounds }) => {
      const warm = Math.max(10, times / 4);
      for (let i = 0; i < warm; i++) round(rounds.attach, rounds.detach);
      const before = { pins: pins(), descriptors: descriptors() };
      const growth = [0, 1, 2].map(() => {
        const begun = resident();
        for (let i = 0; i < times / 3; i++) round(rounds.attach, rounds.detach);
        return resident() - begun;
      });
      // V8 grows by fits and starts, a leak in each third. One netlink buffer (32 KiB) a round would be 4 MiB at least.
      if (times >= 300) expect(Math.min(...growth)).toBeLessThan(2 * 1024);
      expect({ pins: pins(), descriptors: descriptors() }).toEqual(before);
      // Threads come back from the kernel a grace period after their call took effect.
      await expect.poll(threads, { timeout: 10_000 }).toBeLessThanOrEqual(idle);
    },
    600_000,
  );

  test('a replaced or deleted table of exclusions is freed by the kernel', async () => {
    expect(existsSync(state.dir)).toBe(true);
    const before = innerMaps().length;
    const opened = native.openState(state.dir);
    for (let i = 0; i < 5; i++) native.putExclusions(opened, 7, []);
    native.deleteExclusions(opened, 7);
    native.closeState(opened);
    await expect.poll(() => innerMaps().length, { timeout: 10_000 }).toBeLessThanOrEqual(before);
  });
});
