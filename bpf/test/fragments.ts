// SPDX-License-Identifier: Apache-2.0
// Later fragments go where their first one went, and only those.

import { describe, test } from 'vitest';
import {
  ACK,
  type End,
  fragmentHeader,
  type IPFields,
  IPPROTO_TCP,
  ipFrame,
  ipPacket,
  tcpSegment,
  type Wire,
} from './frames.ts';
import {
  addresses,
  type Datapath,
  drop,
  type Family,
  families,
  fromPod,
  HTTP,
  MARKS,
  type Outcome,
  pass,
  SIGN,
  toPod,
} from './node.ts';

/** The three fragments of one segment with `id` (IPv4; the one of frames.ts by default). */
function pieces(family: Family, wire: Wire, from: End, to: End, flags = ACK, id?: number): [Buffer, Buffer, Buffer] {
  const segment = tcpSegment(from, to, { flags, payload: Buffer.alloc(60, 7) });
  const piece = (start: number, end: number) => {
    const more = end < segment.length;
    const fields: IPFields =
      family === 4
        ? { fragmentOffset: start, moreFragments: more, ...(id !== undefined && { id }) }
        : { extensions: [fragmentHeader(start, more)] };
    const frame = ipFrame(wire, ipPacket(from.address, to.address, IPPROTO_TCP, segment.subarray(start, end), fields));
    // Of the fragment header behind Ethernet and IPv6.
    if (family === 6 && id !== undefined) frame.writeUInt32BE(id, 14 + 40 + 4);
    return frame;
  };
  return [piece(0, 32), piece(32, 56), piece(56, segment.length)];
}

export function fragments(datapath: () => Datapath): void {
  /** From an egress hook over the proxy's host-side veth, with our mark. */
  const toOld = (mark = 0) => datapath().toProxy('to_proxy_established', datapath().old(), SIGN.ESTABLISHED, mark);

  describe.each(families)('fragments, IPv%i', (family) => {
    const its = addresses[family];
    const egress = (frame: Buffer, outcome: Outcome) => datapath().check('pod_egress', frame, outcome);
    const ingress = (frame: Buffer, outcome: Outcome) =>
      datapath().check('pod_ingress', frame, outcome, { ingressIfindex: 7 });
    /** A connection of the old proxy's, taken from the pod. */
    const proxied = async (): Promise<[End, End]> => {
      const { node } = datapath();
      const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
      return [client, server];
    };

    test('of the proxy’s connection: all to the proxy', async () => {
      const [client, server] = await proxied();
      for (const frame of pieces(family, fromPod, client, server, ACK, 101)) await egress(frame, toOld());
    });

    test('of what the pod receives on one: all to the proxy', async () => {
      const { node } = datapath();
      const server = { address: its.podAtProxy, port: node.port() };
      await node.connect(node.old, its.podAtProxy, its.outside, HTTP, server.port);
      const [from, to] = [{ address: its.outside, port: HTTP }, server];
      for (const frame of pieces(family, toPod, from, to, ACK, 102)) await ingress(frame, toOld(MARKS.toProxy));
    });

    test('of a connection that passes: all pass', async () => {
      const ends: [End, End] = [
        { address: its.pod, port: datapath().node.port() },
        { address: its.outside, port: HTTP },
      ];
      const [first, second, third] = pieces(family, fromPod, ...ends, ACK, 103);
      await egress(first, pass('pass_no_proxy_socket'));
      for (const frame of [second, third]) await egress(frame, pass('pass_fragment'));
      const [head, ...rest] = pieces(family, toPod, ends[1], ends[0], ACK, 103);
      await ingress(head, pass('pass_no_proxy_socket'));
      for (const frame of rest) await ingress(frame, pass('pass_fragment'));
    });

    test('whose first one was dropped: dropped', async () => {
      datapath().enrol({ flags: ['STRICT'] });
      const from = { address: its.pod, port: datapath().node.port() };
      const [first, second] = pieces(family, fromPod, from, { address: its.outside, port: HTTP }, ACK, 104);
      await egress(first, drop('drop_orphaned_flow'));
      await egress(second, drop('drop_fragment'));
    });

    test('of another datagram, source, destination or interface: dropped', async () => {
      const [client, server] = await proxied();
      const [first, second] = pieces(family, fromPod, client, server, ACK, 105);
      await egress(first, toOld());
      const others = [
        pieces(family, fromPod, client, server, ACK, 106),
        pieces(family, fromPod, { ...client, address: its.podSilent }, server, ACK, 105),
        pieces(family, fromPod, client, { ...server, address: its.outside }, ACK, 105),
      ];
      for (const [, other] of others) await egress(other, drop('drop_fragment'));
      const { otherPod } = datapath().node.ifindex;
      await datapath().check('pod_egress', second, drop('drop_fragment'), { ifindex: otherPod });
      await egress(second, toOld());
    });
  });
}
