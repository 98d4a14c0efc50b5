// SPDX-License-Identifier: Apache-2.0
// What the programs report: nothing while nobody asks, then what the filter lets through, every field of it.

import { describe, expect, test } from 'vitest';
import { until } from '../../conformance/netns.ts';
import type { TraceEvent } from '../../plugin/native.ts';
import { arpFrame, type End, fragmentHeader, IPPROTO_TCP, ipFrame, ipPacket, SYN, tcpFrame } from './frames.ts';
import { addresses, type Datapath, drop, families, fromPod, HTTP, pass, SIGN } from './node.ts';

export function trace(datapath: () => Datapath): void {
  describe.each(families)('trace, IPv%i', (family) => {
    const its = addresses[family];
    const ends = (): [End, End] => [
      { address: its.pod, port: datapath().node.port() },
      { address: its.outside, port: HTTP },
    ];
    const redirected = () => datapath().toProxy('redirected_outbound', datapath().old(), SIGN.OUTBOUND);

    /** A fragment behind the first one, which never came. */
    const laterFragment = (): Buffer => {
      const [from, to] = ends();
      const fields = family === 4 ? { fragmentOffset: 32 } : { extensions: [fragmentHeader(32, false)] };
      return ipFrame(fromPod, ipPacket(from.address, to.address, IPPROTO_TCP, Buffer.alloc(40, 7), fields));
    };

    /** What is reported of a SYN that is taken, a spoofed address, an ARP request and a fragment, in this order. */
    async function reported(filter: { ifindex: number; reason: string | null } | null): Promise<TraceEvent[]> {
      const { node, state } = datapath();
      const events: TraceEvent[] = [];
      const stop = node.native.followEvents(state, (more) => events.push(...more));
      const last = { ifindex: node.ifindex.otherPod };
      try {
        node.native.setTrace(state, filter);
        const [from, to] = ends();
        await datapath().check('pod_egress', tcpFrame(fromPod, from, to, { flags: SYN }), redirected());
        const spoofed = tcpFrame(fromPod, { ...from, address: its.outsideAtOld }, to, { flags: SYN });
        await datapath().check('pod_egress', spoofed, drop('drop_spoofed_source'));
        await datapath().check('pod_egress', arpFrame(fromPod, '10.71.0.2', '10.71.0.1'), pass('pass_not_tcp'));
        await datapath().check('pod_egress', laterFragment(), drop('drop_fragment'));
        expect(node.native.getTrace(state).lost).toBe(0);
        // The end of it: an event that is always reported.
        node.native.setTrace(state, { ifindex: last.ifindex, reason: null });
        const arp = arpFrame(fromPod, '10.71.0.9', '10.71.0.1');
        await datapath().check('pod_egress', arp, pass('pass_not_tcp'), last);
        await until('the last event', () => events.some(({ ifindex }) => ifindex === last.ifindex));
        return events.filter(({ ifindex }) => ifindex !== last.ifindex);
      } finally {
        node.native.setTrace(state, null);
        stop();
      }
    }

    const all = ['redirected_outbound', 'drop_spoofed_source', 'pass_not_tcp', 'drop_fragment'];
    const reasonsOf = (events: readonly TraceEvent[]) => events.map(({ reason }) => reason);

    test('nobody asked: nothing', async () => {
      expect(await reported(null)).toEqual([]);
    });
    test('everything, with every field', async () => {
      const events = await reported({ ifindex: 0, reason: null });
      expect(reasonsOf(events)).toEqual(all);
      const [first, , arp, later] = events;
      const { pod } = datapath().node.ifindex;
      expect([first?.program, first?.ifindex, first?.family, first?.flags, first?.protocol]).toEqual([
        'pod_egress',
        pod,
        family,
        SYN,
        6,
      ]);
      expect(first?.length).toBe(family === 4 ? 54 : 74);
      expect([first?.sourcePort !== HTTP, first?.destinationPort]).toEqual([true, HTTP]);
      expect([arp?.family, arp?.flags, arp?.length]).toEqual([0, 0, 42]);
      expect([later?.family, later?.source, later?.destination, later?.sourcePort, later?.destinationPort]).toEqual([
        family,
        first?.source,
        first?.destination,
        0,
        0,
      ]);
    });
    test('those that find no room in the buffer are counted as lost', async () => {
      const d = datapath();
      const { native } = d.node;
      // In this process, which therefore does not read meanwhile, and on its lo.
      const lo = 1;
      const fd = native.openProgram(d.pathOf('pod_egress'));
      const own = native.getInterface(d.state, d.node.ifindex.pod);
      let seen = 0;
      const stop = native.followEvents(d.state, (more) => {
        seen += more.length;
      });
      try {
        if (own !== null) native.putInterface(d.state, lo, own);
        native.setTrace(d.state, { ifindex: lo, reason: null });
        const sent = 50_000;
        native.testRun(fd, arpFrame(fromPod, '10.71.0.2', '10.71.0.1'), { ifindex: lo, repeat: sent });
        const { lost } = native.getTrace(d.state);
        expect(lost > 0 && lost < sent).toBe(true);
        await until('all others', () => seen >= sent - lost);
        expect(seen).toBe(sent - lost);
      } finally {
        native.setTrace(d.state, null);
        native.deleteInterface(d.state, lo);
        native.deleteCounters(d.state, lo);
        native.close(fd);
        stop();
      }
    });
    test('of one interface', async () => {
      const { pod, old } = datapath().node.ifindex;
      expect(reasonsOf(await reported({ ifindex: pod, reason: null }))).toEqual(all);
      expect(await reported({ ifindex: old, reason: null })).toEqual([]);
    });
    test('of one reason, and of both', async () => {
      const { pod, old } = datapath().node.ifindex;
      const reason = 'drop_spoofed_source';
      expect(reasonsOf(await reported({ ifindex: 0, reason }))).toEqual([reason]);
      expect(reasonsOf(await reported({ ifindex: pod, reason }))).toEqual([reason]);
      expect(await reported({ ifindex: old, reason })).toEqual([]);
      expect(await reported({ ifindex: pod, reason: 'drop_malformed' })).toEqual([]);
    });
  });
}
