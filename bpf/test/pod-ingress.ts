// SPDX-License-Identifier: Apache-2.0
// pod_ingress: what an enrolled pod receives.

import { beforeAll, describe, test } from 'vitest';
import {
  ACK,
  type End,
  FIN,
  IPPROTO_ICMP,
  IPPROTO_ICMPV6,
  IPPROTO_TCP,
  icmpMessage,
  ipFrame,
  ipPacket,
  mac,
  macText,
  RST,
  SYN,
  type TcpFields,
  tcpFrame,
  tcpSegment,
} from './frames.ts';
import {
  APP,
  addresses,
  type Datapath,
  DEAD,
  DEAF,
  drop,
  type Family,
  families,
  GATEWAY_MAC,
  HBONE,
  HTTP,
  MARKS,
  OUTBOUND,
  PLAINTEXT,
  POD_MAC,
  pass,
  SIGN,
  toPod,
} from './node.ts';
import { NOT_TCP, notTcp, readable, TAGGED, tagged, unreadable } from './parse-cases.ts';

/** skb->ingress_ifindex of a packet that came in by some device; 0 is the host's own. */
const FORWARDED = { ingressIfindex: 1 };
const HOST_BORN = { ingressIfindex: 0 };

export function podIngress(datapath: () => Datapath): void {
  const check = (
    frame: Uint8Array,
    outcome: Parameters<Datapath['check']>[2],
    skb: Parameters<Datapath['check']>[3] = FORWARDED,
  ) => datapath().check('pod_ingress', frame, outcome, skb);
  const send = (from: End, to: End, tcp: TcpFields = {}) => tcpFrame(toPod, from, to, tcp);
  const port = () => datapath().node.port();
  const fresh = (family: Family, server = APP): [outside: End, pod: End] => [
    { address: addresses[family].outside, port: port() },
    { address: addresses[family].pod, port: server },
  ];
  /** redirect_peer is refused in egress hooks: the frame takes the proxy's veth and carries our mark past its guard. */
  const toOld = (reason: string, meaning: number) =>
    datapath().toProxy(reason, datapath().old(), meaning, MARKS.toProxy);
  const redirected = () => toOld('redirected_inbound', SIGN.INBOUND);
  const established = () => toOld('to_proxy_established', SIGN.ESTABLISHED);
  const redirectedFlow = async (family: Family): Promise<[outside: End, pod: End]> => {
    const flow = fresh(family);
    await check(send(...flow), redirected());
    return flow;
  };

  describe('pod_ingress', () => {
    describe.each(families)('frames, IPv%i', (family) => {
      // A connection that the old proxy has: what is not read as it should be would go there.
      const outside = { address: addresses[family].outside, port: 19_998 };
      const pod = { address: addresses[family].podAtProxy, port: APP };
      beforeAll(async () => {
        const { node } = datapath();
        await node.connect(node.far, outside.address, pod.address, pod.port, outside.port);
      });
      test.each(notTcp(family, toPod, outside, pod))('$name passes', ({ frame }) => check(frame, NOT_TCP));
      test.each(unreadable(family, toPod, outside, pod))('$name: $outcome.reason', ({ frame, outcome }) =>
        check(frame, outcome),
      );
      test.each(tagged(toPod, outside, pod))('$name: dropped', ({ frame }) => check(frame, TAGGED));
      test.each(readable(family, toPod, outside, pod, SYN))('a SYN with $name is redirected', ({ frame }) =>
        check(frame, redirected()),
      );
    });

    test('our own mark passes and is cleared', () =>
      check(send(...fresh(4)), pass('pass_bypass', 0), { ...FORWARDED, mark: MARKS.bypass }));

    test('the other marks of ours are nobody else’s pass', () =>
      check(send(...fresh(4)), redirected(), { ...FORWARDED, mark: MARKS.toProxy }));

    test('an interface that is not enrolled is left alone', () =>
      check(send(...fresh(4)), pass(null), { ...FORWARDED, ifindex: datapath().node.ifindex.old }));

    test.each([0, 1, 2, 3, 4, 5])('a destination MAC that differs in byte %i passes untouched', (byte) => {
      const destination = mac(POD_MAC);
      destination.writeUInt8((destination[byte] ?? 0) ^ 1, byte);
      const frame = tcpFrame({ source: GATEWAY_MAC, destination: macText(destination) }, ...fresh(4));
      return check(frame, pass('pass_other_host'));
    });

    test('a tagged frame for another host passes too', () => {
      const tags = [{ protocol: 0x8100, id: 0 }];
      const frame = tcpFrame({ source: GATEWAY_MAC, destination: 'ff:ff:ff:ff:ff:ff', tags }, ...fresh(4));
      return check(frame, pass('pass_other_host'));
    });

    describe.each(families)('IPv%i', (family) => {
      const its = addresses[family];

      if (family === 6) {
        test.each([
          ['fe80::1', its.pod],
          [its.outside, 'fe80::2'],
        ])('link-local addresses pass: %s to %s', (from, to) =>
          check(send({ address: from, port: port() }, { address: to, port: APP }), pass('pass_link_local')),
        );
      }

      describe('ICMP errors about TCP', () => {
        /** What a router says about a segment that `from` sent. */
        const error = (type: number, from: End, to: End) =>
          ipFrame(
            toPod,
            ipPacket(
              its.outsideSilent,
              from.address,
              family === 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6,
              icmpMessage(
                its.outsideSilent,
                from.address,
                type,
                ipPacket(from.address, to.address, IPPROTO_TCP, tcpSegment(from, to).subarray(0, 8)),
                family === 4 ? 4 : 0,
                1400,
              ),
            ),
          );
        test.each(family === 4 ? [3, 11, 12] : [1, 2, 3, 4])('type %i reaches the proxy of the flow', async (type) => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.old, its.podAtProxy, its.outside, HTTP);
          await check(error(type, client, server), toOld('to_proxy_icmp_error', SIGN.ICMP));
        });
        test('no socket in a proxy: passes', () =>
          check(
            error(family === 4 ? 3 : 2, { address: its.pod, port: port() }, { address: its.outside, port: HTTP }),
            NOT_TCP,
          ));
        test('no proxy known: passes', async () => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.old, its.podAtProxy, its.outside, HTTP);
          datapath().forgetProxies();
          await check(error(family === 4 ? 3 : 2, client, server), NOT_TCP);
        });
      });

      describe('a packet born on the host', () => {
        test.each([SYN, ACK])(
          'with TCP flags %i passes, and so does the pod’s answer on whatever tuple',
          async (flags) => {
            const d = datapath();
            d.enrol({ flags: ['STRICT'] });
            const probe = { address: its.host, port: port() };
            const pod = { address: its.pod, port: APP };
            await check(send(probe, pod, { flags }), pass('pass_host_socket'), HOST_BORN);
            await d.check('pod_egress', tcpFrame(toPod, pod, probe, { flags: SYN | ACK }), pass('pass_direct'));
            await check(send(probe, pod, { flags }), pass('pass_host_socket'), HOST_BORN);
          },
        );

        test('a segment of a connection that a proxy has goes to the proxy all the same', async () => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.far, its.outside, its.podAtProxy, APP);
          await check(send(client, server, { flags: ACK }), established(), HOST_BORN);
        });
      });

      describe('SYN', () => {
        test('is redirected with our sign and our mark', () => check(send(...fresh(family)), redirected()));

        test('to an address that only the pod knows of: redirected too', () =>
          check(send({ address: its.outside, port: port() }, { address: its.vip, port: APP }), redirected()));

        test('while draining: direct, and so is the rest of the flow', async () => {
          datapath().enrol({ flags: ['DRAINING', 'STRICT'] });
          const flow = fresh(family);
          await check(send(...flow), pass('pass_draining'));
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test('while draining, from a port that the proxy is connected to the pod from: redirected', async () => {
          const { node } = datapath();
          datapath().enrol({ flags: ['DRAINING', 'STRICT'] });
          const { client, server } = await node.connect(node.old, its.outsideAtOld, its.pod, APP);
          await check(send(client, server), redirected());
        });

        test.each([
          { flags: ['NO_PLAINTEXT'], server: APP, taken: false },
          { flags: ['NO_PLAINTEXT'], server: HBONE, taken: true },
          { flags: ['NO_HBONE'], server: APP, taken: true },
          { flags: ['NO_HBONE'], server: HBONE, taken: false },
          { flags: ['NO_OUTBOUND'], server: APP, taken: true },
        ])('with $flags to port $server: redirected $taken', async ({ flags, server, taken }) => {
          datapath().enrol({ flags: [...flags, 'STRICT'] });
          const flow = fresh(family, server);
          await check(send(...flow), taken ? redirected() : pass('pass_not_wanted'));
          if (!taken) await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test.each([
          { name: 'plaintext needs its listener', ports: { inboundPlaintext: DEAF }, server: APP, taken: false },
          { name: 'plaintext needs no other', ports: { inboundHBONE: DEAF, outbound: DEAF }, server: APP, taken: true },
          { name: 'HBONE needs its listener', ports: { inboundHBONE: DEAF }, server: DEAF, taken: false },
          {
            name: 'HBONE needs no other',
            ports: { inboundPlaintext: DEAF, outbound: DEAF },
            server: HBONE,
            taken: true,
          },
          { name: 'without HBONE 15008 is plaintext', ports: { inboundHBONE: 0 }, server: HBONE, taken: true },
          {
            name: 'without HBONE 15008 needs the plaintext listener',
            ports: { inboundHBONE: 0, inboundPlaintext: DEAF },
            server: HBONE,
            taken: false,
          },
          { name: 'without plaintext nothing takes it', ports: { inboundPlaintext: 0 }, server: APP, taken: false },
        ])('$name', async ({ ports, server, taken }) => {
          const d = datapath();
          d.proxies([d.old({ ports })]);
          await check(send(...fresh(family, server)), taken ? redirected() : drop('drop_no_listener'));
        });

        test.each([
          { name: 'no record of proxies', set: (d: Datapath) => d.forgetProxies() },
          { name: 'no proxy', set: (d: Datapath) => d.proxies([]) },
          {
            name: 'a proxy that does not listen',
            set: (d: Datapath) => d.proxies([d.old({ ports: { inboundPlaintext: DEAF } })]),
          },
          { name: 'a proxy whose device is gone', set: (d: Datapath) => d.proxies([d.old({ hostIfindex: DEAD })]) },
        ])('$name: by policy', async ({ set }) => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          set(d);
          await check(send(...fresh(family)), drop('drop_no_listener'));
          d.enrol({ flags: ['STRICT', 'POLICY_OPEN'] });
          const flow = fresh(family);
          await check(send(...flow), pass('pass_failure_policy_open'));
          d.enrol({ flags: ['STRICT'] });
          d.proxies([d.old()]);
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test('the newest proxy that listens takes it, else the one before', async () => {
          const d = datapath();
          d.proxies([d.new(), d.old()]);
          await check(send(...fresh(family)), d.toProxy('redirected_inbound', d.new(), SIGN.INBOUND, MARKS.toProxy));
          d.proxies([d.new({ ports: { inboundPlaintext: DEAF } }), d.old()]);
          await check(send(...fresh(family)), redirected());
          d.proxies([d.new({ ports: { inboundPlaintext: 0 } }), d.old()]);
          await check(send(...fresh(family)), redirected());
        });

        test('sent by a proxy to an address that only the pod knows of: passes', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.old, its.outsideAtOld, its.vip, APP);
          await check(send(client, server), pass('from_proxy_local'));
          d.forgetProxies();
          await check(send(client, server), drop('drop_no_listener'));
        });

        test('with the tuple of a proxy’s connection to an address of the pod’s own: redirected', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.old, its.outsideAtOld, its.pod, APP);
          await check(send(client, server), redirected());
        });
      });

      describe('a segment of a connection that a proxy has', () => {
        test.each([ACK, FIN | ACK, RST, SYN | ACK])('accepted by the proxy: TCP flags %i go to it', async (flags) => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.far, its.outside, its.podAtProxy, APP);
          await check(send(client, server, { flags }), established());
        });

        test('made by the proxy in the pod’s name: answers go to it', async () => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.old, its.podAtProxy, its.outside, HTTP);
          await check(send(server, client, { flags: SYN | ACK }), established());
        });

        test('that is in TIME_WAIT there: goes to it, unless the flow was let go direct since', async () => {
          const d = datapath();
          const { client, server } = await d.node.timeWait(family, its.outside, its.podAtProxy, APP);
          await check(send(client, server, { flags: ACK }), established());
          d.enrol({ flags: ['DRAINING', 'STRICT'] });
          await check(send(client, server), pass('pass_draining'));
          await check(send(client, server, { flags: ACK }), pass('pass_direct'));
        });

        test('stays with the older proxy', async () => {
          const d = datapath();
          d.proxies([d.new(), d.old()]);
          const { client, server } = await d.node.connect(d.node.far, its.outside, its.podAtProxy, APP);
          await check(send(client, server, { flags: ACK }), established());
        });

        test('from a proxy to an address that only the pod knows of: passes', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const { client, server } = await d.node.connect(d.node.old, its.outsideAtOld, its.vip, APP);
          await check(send(client, server, { flags: ACK }), pass('from_proxy_local'));
        });

        test('from a proxy to an address of the pod’s own: nothing of ours brought it here', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const { client, server } = await d.node.connect(d.node.old, its.outsideAtOld, its.pod, APP);
          await check(send(client, server, { flags: ACK }), drop('drop_orphaned_flow'));
        });
      });

      describe('a segment without a socket', () => {
        test('of a flow that was redirected: to the proxy, whose listener refuses it', async () => {
          const flow = await redirectedFlow(family);
          await check(send(...flow, { flags: ACK }), toOld('to_proxy_orphaned', SIGN.COOKIE_INBOUND));
        });

        test.each([
          { name: 'no record of proxies', set: (d: Datapath) => d.forgetProxies() },
          { name: 'no listener', set: (d: Datapath) => d.proxies([d.old({ ports: { inboundPlaintext: DEAF } })]) },
        ])('of a flow that was redirected, $name: by policy', async ({ set }) => {
          const d = datapath();
          const flow = await redirectedFlow(family);
          set(d);
          await check(send(...flow, { flags: ACK }), drop('drop_no_listener'));
          d.enrol({ flags: ['POLICY_OPEN'] });
          await check(send(...flow, { flags: ACK }), pass('pass_failure_policy_open'));
          d.proxies([d.old()]);
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test('the answer of the outside on a flow of the pod’s that was redirected', async () => {
          const d = datapath();
          const [outside, pod] = fresh(family);
          const taken = d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND);
          await d.check('pod_egress', tcpFrame(toPod, pod, outside), taken);
          d.enrol({ flags: ['STRICT'] });
          await check(send(outside, pod, { flags: SYN | ACK }), drop('drop_orphaned_flow'));
        });

        test('nothing known, enrolled by its own ADD: dropped', async () => {
          datapath().enrol({ flags: ['STRICT', 'POLICY_OPEN'] });
          await check(send(...fresh(family), { flags: ACK }), drop('drop_orphaned_flow'));
        });

        test('nothing known, enrolled while running: passes', () =>
          check(send(...fresh(family), { flags: ACK }), pass('pass_no_proxy_socket')));
      });

      describe('the ACK of a SYN cookie', () => {
        test.each([
          { name: 'plaintext', listener: PLAINTEXT, ports: {} },
          { name: 'HBONE', listener: HBONE, ports: { inboundHBONE: HBONE, inboundPlaintext: DEAF } },
        ])('$name, valid: to the proxy, for the listener', async ({ listener, ports }) => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          d.proxies([d.old({ ports })]);
          const client = { address: its.outsideSilent, port: port() };
          const server = { address: its.podAtProxy, port: listener === HBONE ? HBONE : APP };
          const numbers = await d.node.cookie(client, server, listener);
          const frame = send(client, server, { flags: ACK, ...numbers });
          await check(frame, toOld('to_proxy_cookie', SIGN.COOKIE_INBOUND));
          const forged = { ...numbers, seq: numbers.seq + 1 };
          await check(send(client, server, { flags: ACK, ...forged }), drop('drop_orphaned_flow'));
          d.proxies([d.old({ ports: { ...ports, inboundPlaintext: 0, inboundHBONE: 0, outbound: OUTBOUND } })]);
          await check(frame, drop('drop_orphaned_flow'));
        });
      });
    });
  });
}
