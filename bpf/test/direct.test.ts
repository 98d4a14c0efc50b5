// SPDX-License-Identifier: Apache-2.0
// The table of direct flows: whose flows give way, and what two CPUs do to one set at the same time.

import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { ACK, mapped, SYN, tcpFrame } from './frames.ts';
import { addresses, Datapath, drop, families, fromPod, Node, pass, VERDICT } from './node.ts';

const native = loadNative();
const DRAINING = ['DRAINING', 'STRICT'];
/** Ways of a set: DIRECT_WAYS of redirect.h. */
const WAYS = 8;

describe.each(families)('IPv%i: 16 flows of a pod', (family) => {
  let node: Node;
  let datapath: Datapath;
  beforeAll(async () => {
    node = await Node.open();
    datapath = new Datapath(node, new Set(), [], `direct-${family}`, 2 * WAYS);
    datapath.reset();
    datapath.enrol({ flags: DRAINING });
    datapath.enrolOther(DRAINING);
  });
  afterAll(() => node?.close());

  const outside = { address: addresses[family].outside, port: 80 };
  const frame = (from: string, port: number, flags: number) =>
    tcpFrame(fromPod, { address: from, port }, outside, { flags });
  const own = (port: number, flags: number) => frame(addresses[family].pod, port, flags);
  const begin = (port: number) => datapath.check('pod_egress', own(port, SYN), pass('pass_draining'));
  const goesOn = (port: number) => datapath.check('pod_egress', own(port, ACK), pass('pass_direct'));
  const ports = (ifindex: number) =>
    native
      .directFlows(datapath.state, ifindex)
      .map(({ sourcePort }) => sourcePort)
      .sort((a, b) => a - b);

  test('begin with none, and are kept with both ends', async () => {
    expect(native.directFlows(datapath.state, node.ifindex.pod)).toEqual([]);
    await datapath.check('pod_egress', own(999, ACK), drop('drop_orphaned_flow'));
    await begin(1000);
    await begin(1000);
    const [flow, ...others] = native.directFlows(datapath.state, node.ifindex.pod);
    expect(others).toEqual([]);
    expect(flow).toMatchObject({ sourcePort: 1000, destinationPort: 80 });
    await goesOn(1000);
    await datapath.check('pod_egress', own(1001, ACK), drop('drop_orphaned_flow'));
  });

  test('more than that: the newest stay, and one in use stays however many come', async () => {
    for (let port = 1001; port <= 1200; port++) {
      await begin(port);
      await goesOn(1000);
    }
    const kept = ports(node.ifindex.pod);
    // Both sets are full after so many, and in the worst case all of the newest fell into the set of the one in use.
    expect(kept).toHaveLength(2 * WAYS);
    expect(kept).toEqual(expect.arrayContaining([1000, 1194, 1195, 1196, 1197, 1198, 1199, 1200]));
    for (const port of kept) await goesOn(port);
    await datapath.check('pod_egress', own(1001, ACK), drop('drop_orphaned_flow'));
  });

  test('another pod’s flood takes none of them', async () => {
    const kept = ports(node.ifindex.pod);
    const other = node.ifindex.otherPod;
    for (let port = 1; port <= 200; port++) {
      await datapath.check('pod_egress', frame(addresses[family].otherPod, port, SYN), pass('pass_draining'), {
        ifindex: other,
      });
    }
    expect(ports(other)).toHaveLength(2 * WAYS);
    expect(ports(node.ifindex.pod)).toEqual(kept);
    expect(native.mapUsage(datapath.state).find(({ map }) => map === 'direct')).toMatchObject({ entries: 4 });
    expect(native.listDirectFlows(datapath.state).sort()).toEqual([node.ifindex.pod, other].sort());
    expect(native.deleteDirectFlows(datapath.state, other)).toBe(2);
    expect(native.deleteDirectFlows(datapath.state, other)).toBe(0);
    expect(ports(other)).toEqual([]);
    expect(ports(node.ifindex.pod)).toEqual(kept);
  });

  describe('that are older than the enrolment', () => {
    const flow = (sourcePort: number) => ({
      source: mapped(addresses[family].pod),
      sourcePort,
      destination: mapped(outside.address),
      destinationPort: outside.port,
    });
    const importFlow = (port: number) => {
      const fd = native.openProgram(join(datapath.directory, 'programs', datapath.tag, 'direct_import'));
      try {
        return native.importDirectFlow(fd, node.ifindex.pod, flow(port));
      } finally {
        native.close(fd);
      }
    };

    test('are put in from outside like any other', async () => {
      expect(importFlow(2000)).toBe(true);
      expect(native.directFlows(datapath.state, node.ifindex.pod)).toContainEqual(flow(2000));
      await goesOn(2000);
    });

    test('are left out where they have been redirected meanwhile', async () => {
      datapath.enrol({ flags: ['STRICT'] });
      await datapath.check('pod_egress', own(2001, SYN), datapath.toProxy('redirected_outbound', datapath.old(), 1));
      expect(importFlow(2001)).toBe(false);
      expect(ports(node.ifindex.pod)).not.toContain(2001);
      datapath.enrol({ flags: DRAINING });
    });
  });

  test('one that is redirected when it comes again is forgotten, alone', async () => {
    const kept = ports(node.ifindex.pod);
    // Any that is there: which of those that are equally old made room for the imported one is up to the state's seed.
    const [again = 0] = kept;
    datapath.enrol({ flags: ['STRICT'] });
    await datapath.check('pod_egress', own(again, SYN), datapath.toProxy('redirected_outbound', datapath.old(), 1));
    expect(ports(node.ifindex.pod)).toEqual(kept.filter((port) => port !== again));
    // And remembered again, in the very place that it left: both sets are full.
    datapath.enrol({ flags: DRAINING });
    await begin(again);
    await goesOn(again);
    expect(ports(node.ifindex.pod)).toEqual(kept);
  });
});

describe('no memory for another set', () => {
  let node: Node;
  let datapath: Datapath;
  beforeAll(async () => {
    node = await Node.open();
    datapath = new Datapath(node, new Set(), [], 'full', WAYS);
    datapath.reset();
  });
  afterAll(() => node?.close());

  test('what would go direct is dropped, and goes when there is room', async () => {
    const { directory, tag, state } = datapath;
    const outside = { address: addresses[4].outside, port: 80 };
    const capacity = native.mapUsage(state).find(({ map }) => map === 'direct')?.capacity ?? 0;
    const other = 1_000_000;
    const fd = native.openProgram(join(directory, 'programs', tag, 'direct_import'));
    try {
      const flow = (sourcePort: number) => ({
        source: mapped(addresses[4].pod),
        sourcePort,
        destination: mapped(outside.address),
        destinationPort: outside.port,
      });
      // One set each.
      for (let id = other; id < other + capacity; id++) expect(native.importDirectFlow(fd, id, flow(1))).toBe(true);
      expect(() => native.importDirectFlow(fd, other + capacity, flow(1))).toThrow('ENOMEM');
    } finally {
      native.close(fd);
    }
    datapath.enrol({ flags: DRAINING });
    const syn = tcpFrame(fromPod, { address: addresses[4].pod, port: 1 }, outside, { flags: SYN });
    await datapath.check('pod_egress', syn, drop('drop_redirect_failed'));
    native.deleteDirectFlows(state, other);
    await datapath.check('pod_egress', syn, pass('pass_draining'));
  });
});

describe('two CPUs and one set', () => {
  let node: Node;
  let datapath: Datapath;
  beforeAll(async () => {
    node = await Node.open();
    datapath = new Datapath(node, new Set(), [], 'race', WAYS);
    // The device of a test run in this process is lo.
    const flags = (native.flags.INTERFACE_DRAINING ?? 0) | (native.flags.INTERFACE_STRICT ?? 0);
    native.putInterface(datapath.state, LO, {
      podMac: fromPod.source,
      gatewayMac: fromPod.destination,
      flags,
      podIfindex: 2,
      nsid: -1,
      master: 0,
      ports: { outbound: 0, inboundPlaintext: 0, inboundHBONE: 0, dns: 0 },
      address4: new Uint8Array(16),
      address6: new Uint8Array(16),
    });
    native.putEndpoint(datapath.state, mapped(addresses[4].pod), { ifindex: LO, flags, podMac: fromPod.source }, false);
  });
  afterAll(() => node?.close());

  const LO = 1;
  /**
   * Two threads put one flow after the other into the set, and each looks at once whether its own is there. It may have
   * given way only if the other thread has put in about as many as the set holds meanwhile; `begun` counts those.
   */
  const CHURN = `let judged = 0, lost = 0;
    for (let i = 0; i < w.times; i++) {
      const { syn, ack } = w.frames[i % w.frames.length];
      const before = Atomics.load(w.begun, 1 - w.index);
      Atomics.add(w.begun, w.index, 1);
      native.testRun(fd, syn);
      const { verdict } = native.testRun(fd, ack);
      if (Atomics.load(w.begun, 1 - w.index) - before > ${WAYS} - 3) continue;
      judged++;
      if (verdict === ${VERDICT.DROP}) lost++;
    }
    parentPort.postMessage({ judged, lost });`;

  test('that put flows into it lose none', async () => {
    const begun = new Int32Array(new SharedArrayBuffer(8));
    const frame = (port: number, flags: number) =>
      tcpFrame(fromPod, { address: addresses[4].pod, port }, { address: addresses[4].outside, port: 80 }, { flags });
    const answers = [0, 1].map((index) => {
      const ports = Array.from({ length: 64 }, (_, i) => 1000 * (index + 1) + i);
      return inThread<{ judged: number; lost: number }>(CHURN, {
        program: join(datapath.directory, 'programs', datapath.tag, 'pod_egress'),
        frames: ports.map((port) => ({ syn: frame(port, SYN), ack: frame(port, ACK) })),
        times: 100_000,
        begun,
        index,
      });
    });
    for (const { judged, lost } of await Promise.all(answers)) {
      expect(judged).toBeGreaterThan(10_000);
      expect(lost).toBe(0);
    }
    expect(native.directFlows(datapath.state, LO)).toHaveLength(WAYS);
  });

  /** Two threads begin at one moment, round after round, with a counter that is not there. */
  const FIRST = `const state = native.openState(w.state);
    let arrivals = 0;
    const together = () => {
      arrivals += 2;
      Atomics.add(w.arrived, 0, 1);
      while (Atomics.load(w.arrived, 0) < arrivals);
    };
    const rounds = {};
    for (let i = 0; i < w.rounds; i++) {
      if (w.index === 0) native.deleteCounters(state, ${LO});
      together();
      native.testRun(fd, w.frame);
      together();
      if (w.index !== 0) continue;
      const counted = native.counters(state).filter(({ ifindex }) => ifindex === ${LO});
      const text = counted.map(({ reason, packets }) => reason + ' ' + packets).join();
      rounds[text] = (rounds[text] ?? 0) + 1;
    }
    native.closeState(state);
    parentPort.postMessage(rounds);`;

  test('whose packets are the first of their kind count both', async () => {
    const arrived = new Int32Array(new SharedArrayBuffer(4));
    const rounds = 1_000;
    const frame = tcpFrame(
      fromPod,
      { address: addresses[4].pod, port: 7 },
      { address: addresses[4].outside, port: 80 },
      { flags: ACK },
    );
    const program = join(datapath.directory, 'programs', datapath.tag, 'pod_egress');
    const [counted] = await Promise.all(
      [0, 1].map((index) => inThread(FIRST, { program, state: datapath.directory, arrived, rounds, frame, index })),
    );
    expect(counted).toEqual({ 'drop_orphaned_flow 2': rounds });
  });
});

/** What `source` posts to `parentPort`; it has `native`, `data` as `w`, and a descriptor `fd` of the pinned w.program. */
function inThread<T>(source: string, data: { program: string } & Record<string, unknown>): Promise<T> {
  const addon =
    process.env.AMBIENT_REDIRECT_ADDON ?? join(import.meta.dirname, '../../build/Release/ambient_redirect.node');
  const whole = `const { workerData: w, parentPort } = require('node:worker_threads');
    const m = { exports: {} };
    process.dlopen(m, w.addon);
    const native = m.exports;
    const fd = native.openProgram(w.program);
    ${source}
    native.close(fd);`;
  const worker = new Worker(whole, { eval: true, workerData: { addon, ...data } });
  return new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
}
