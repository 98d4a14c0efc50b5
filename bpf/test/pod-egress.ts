// SPDX-License-Identifier: Apache-2.0
// pod_egress: what an enrolled pod sends.

import { beforeAll, describe, test } from 'vitest';
import {
  ACK,
  type End,
  FIN,
  fragmentHeader,
  IPPROTO_ICMP,
  IPPROTO_ICMPV6,
  IPPROTO_TCP,
  icmpMessage,
  ipFrame,
  ipPacket,
  PSH,
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
  fromPod,
  HTTP,
  MARKS,
  OUTBOUND,
  pass,
  SIGN,
  toPod,
} from './node.ts';
import { NOT_TCP, notTcp, readable, TAGGED, tagged, unreadable } from './parse-cases.ts';

export function podEgress(datapath: () => Datapath): void {
  const check = (frame: Uint8Array, ...rest: [Parameters<Datapath['check']>[2], Parameters<Datapath['check']>[3]?]) =>
    datapath().check('pod_egress', frame, ...rest);
  const send = (from: End, to: End, tcp: TcpFields = {}) => tcpFrame(fromPod, from, to, tcp);
  const port = () => datapath().node.port();
  /** A tuple of the pod's that no test has used. */
  const fresh = (family: Family): [pod: End, outside: End] => [
    { address: addresses[family].pod, port: port() },
    { address: addresses[family].outside, port: HTTP },
  ];
  const toOld = (reason: string, meaning: number, mark?: number) =>
    datapath().toProxy(reason, datapath().old(), meaning, mark);
  const redirected = () => toOld('redirected_outbound', SIGN.OUTBOUND);
  /** A flow that was redirected and whose socket does not exist. */
  const redirectedFlow = async (family: Family): Promise<[pod: End, outside: End]> => {
    const [pod, outside] = fresh(family);
    await check(send(pod, outside), redirected());
    return [pod, outside];
  };

  describe('pod_egress', () => {
    describe.each(families)('frames, IPv%i', (family) => {
      // A connection that the old proxy has: what is not read as it should be would go there.
      const pod = { address: addresses[family].pod, port: 19_999 };
      const outside = { address: addresses[family].outsideAtOld, port: HTTP };
      beforeAll(async () => {
        const { node } = datapath();
        await node.connect(node.far, pod.address, outside.address, outside.port, pod.port);
      });
      test.each(notTcp(family, fromPod, pod, outside))('$name passes', ({ frame }) => check(frame, NOT_TCP));
      test.each(unreadable(family, fromPod, pod, outside))('$name: $outcome.reason', ({ frame, outcome }) =>
        check(frame, outcome),
      );
      test.each(tagged(fromPod, pod, outside))('$name: dropped', ({ frame }) => check(frame, TAGGED));
      test.each(readable(family, fromPod, pod, outside, SYN))('a SYN with $name is redirected', ({ frame }) =>
        check(frame, redirected()),
      );
      test('a first fragment that is no SYN is judged by its tuple', async () => {
        const more = family === 4 ? { moreFragments: true } : { extensions: [fragmentHeader(0, true)] };
        const frame = tcpFrame(fromPod, pod, outside, { flags: ACK, payload: Buffer.alloc(12) }, more);
        await check(frame, toOld('to_proxy_established', SIGN.ESTABLISHED));
      });
    });

    test('our own mark passes, is cleared, and nothing else is looked at', () =>
      check(send({ address: '10.9.9.9', port: 1 }, { address: '10.9.9.8', port: 1 }), pass('pass_bypass', 0), {
        mark: MARKS.bypass,
      }));

    test('the other marks of ours are nobody else’s pass', () =>
      check(send({ address: '10.9.9.9', port: 1 }, { address: '10.9.9.8', port: 1 }), drop('drop_spoofed_source'), {
        mark: MARKS.toProxy,
      }));

    test('an interface that is not enrolled is left alone', () => {
      const [pod, outside] = fresh(4);
      return check(send(pod, outside), pass(null), { ifindex: datapath().node.ifindex.old });
    });

    describe.each(families)('IPv%i', (family) => {
      const its = addresses[family];
      const outside = { address: its.outside, port: HTTP };

      describe('link-local addresses', () => {
        const cases = [
          { from: 'fe80::2', to: 'ff02::1', local: true },
          { from: 'febf::2', to: its.outside, local: true },
          { from: its.pod, to: 'fe80::1', local: true },
          { from: its.pod, to: 'febf:ffff::1', local: true },
          { from: 'fec0::2', to: its.outside, local: false },
          { from: 'fd80::2', to: its.outside, local: false },
          { from: '169.254.1.2', to: its.outside, local: false },
        ].filter(({ from, to }) => [from, to].every((address) => address.includes(':') === (family === 6)));
        test.each(cases)('$from to $to: $local', ({ from, to, local }) =>
          check(
            send({ address: from, port: port() }, { address: to, port: HTTP }),
            local ? pass('pass_link_local') : drop('drop_spoofed_source'),
          ),
        );
      });

      describe('ICMP errors about TCP', () => {
        /** What a pod says about a segment that it got from `from`. */
        const error = (type: number, from: End, to: End, quoted = tcpSegment(from, to).subarray(0, 8), fields = {}) =>
          ipFrame(
            fromPod,
            ipPacket(
              to.address,
              from.address,
              family === 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6,
              icmpMessage(
                to.address,
                from.address,
                type,
                ipPacket(from.address, to.address, IPPROTO_TCP, quoted, fields),
                family === 4 ? 4 : 0,
                1400,
              ),
            ),
          );
        test.each(family === 4 ? [3, 11, 12] : [1, 2, 3, 4])('type %i reaches the proxy of the flow', async (type) => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
          await check(error(type, server, client), toOld('to_proxy_icmp_error', SIGN.ICMP));
        });
        if (family === 4) {
          test('a quote with IP options is read', async () => {
            const { node } = datapath();
            const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
            const quoted = tcpSegment(server, client).subarray(0, 8);
            const frame = error(3, server, client, quoted, { options: Buffer.alloc(8, 1) });
            await check(frame, toOld('to_proxy_icmp_error', SIGN.ICMP));
          });
        }
        test('no socket in a proxy: passes', () =>
          check(error(family === 4 ? 3 : 2, outside, { address: its.pod, port: port() }), NOT_TCP));
        test('about an address that is not the pod’s: passes, not to the proxy', async () => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.far, its.vip, its.outsideAtOld, HTTP);
          await check(error(family === 4 ? 3 : 2, server, client), NOT_TCP);
        });
        test('no proxy known: passes', async () => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
          datapath().forgetProxies();
          await check(error(family === 4 ? 3 : 2, server, client), NOT_TCP);
        });
      });

      describe('SYN', () => {
        test.each([
          { name: 'plain', flags: SYN },
          { name: 'with ECN flags', flags: SYN | 0xc0 },
          { name: 'with FIN', flags: SYN | FIN },
          { name: 'with PSH', flags: SYN | PSH },
        ])('$name is redirected', ({ flags }) => check(send(...fresh(family), { flags }), redirected()));

        test('our sign and the proxy’s MAC replace both MACs, and a foreign mark goes', () =>
          check(send(...fresh(family)), redirected(), { mark: 0xffffffff }));

        test('from an address that is not the pod’s: dropped', async () => {
          for (const address of [its.outside, its.vip, its.otherPod]) {
            await check(send({ address, port: port() }, outside), drop('drop_spoofed_source'));
          }
        });

        test('while draining: direct, and so is the rest of the flow', async () => {
          datapath().enrol({ flags: ['DRAINING', 'STRICT'] });
          const flow = fresh(family);
          await check(send(...flow), pass('pass_draining'));
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test('while draining, from a port that the proxy is connected to the same end from: redirected', async () => {
          const { node } = datapath();
          datapath().enrol({ flags: ['DRAINING', 'STRICT'] });
          const { client, server } = await node.connect(node.old, its.podAtProxy, its.outside, HTTP);
          await check(send(client, server), redirected());
          datapath().forgetProxies();
          await check(send(client, server), pass('pass_draining'));
        });

        test('outbound redirection not wanted: direct, and so is the rest of the flow', async () => {
          datapath().enrol({ flags: ['NO_OUTBOUND', 'STRICT'] });
          const flow = fresh(family);
          await check(send(...flow), pass('pass_not_wanted'));
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test('the flags that turn inbound off do not matter', async () => {
          datapath().enrol({ flags: ['NO_PLAINTEXT', 'NO_HBONE'] });
          await check(send(...fresh(family)), redirected());
        });

        describe.each([
          { name: 'no record of proxies', set: (d: Datapath) => d.forgetProxies() },
          { name: 'no proxy', set: (d: Datapath) => d.proxies([]) },
          {
            name: 'a proxy that does not listen',
            set: (d: Datapath) => d.proxies([d.old({ ports: { outbound: DEAF } })]),
          },
          {
            name: 'a proxy without an outbound port',
            set: (d: Datapath) => d.proxies([d.old({ ports: { outbound: 0 } })]),
          },
          { name: 'a proxy whose device is gone', set: (d: Datapath) => d.proxies([d.old({ hostIfindex: DEAD })]) },
          { name: 'a proxy whose namespace is gone', set: (d: Datapath) => d.proxies([d.old({ nsid: 4242 })]) },
        ])('$name', ({ set }) => {
          test('closed: dropped, and the rest of the flow is an orphan', async () => {
            datapath().enrol({ flags: ['STRICT'] });
            set(datapath());
            const flow = fresh(family);
            await check(send(...flow), drop('drop_no_listener'));
            await check(send(...flow, { flags: ACK }), drop('drop_orphaned_flow'));
          });
          test('open: passes, and so does the rest of the flow when the proxy is back', async () => {
            datapath().enrol({ flags: ['STRICT', 'POLICY_OPEN'] });
            set(datapath());
            const flow = fresh(family);
            await check(send(...flow), pass('pass_failure_policy_open'));
            await check(send(...flow, { flags: ACK }), pass('pass_direct'));
            datapath().proxies([datapath().old()]);
            await check(send(...flow, { flags: ACK }), pass('pass_direct'));
          });
        });

        test('the newest proxy that listens takes it', async () => {
          const d = datapath();
          d.proxies([d.new(), d.old()]);
          await check(send(...fresh(family)), d.toProxy('redirected_outbound', d.new(), SIGN.OUTBOUND));
        });

        test.each([
          { name: 'does not listen yet', fields: { ports: { outbound: DEAF } } },
          { name: 'wants no outbound', fields: { ports: { outbound: 0 } } },
          { name: 'has no device', fields: { hostIfindex: DEAD } },
        ])('the newest proxy $name: the one before takes it', async ({ fields }) => {
          const d = datapath();
          d.proxies([d.new(fields), d.old()]);
          await check(send(...fresh(family)), redirected());
        });

        test('the fourth of four proxies may be the one', async () => {
          const d = datapath();
          const deaf = d.new({ ports: { outbound: DEAF } });
          d.proxies([deaf, deaf, deaf, d.old()]);
          await check(send(...fresh(family)), redirected());
        });

        test('ends what an earlier flow of the same tuple was allowed', async () => {
          const d = datapath();
          d.enrol({ flags: ['DRAINING'] });
          const flow = fresh(family);
          await check(send(...flow), pass('pass_draining'));
          d.enrol();
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
          await check(send(...flow), redirected());
          await check(send(...flow, { flags: ACK }), toOld('to_proxy_orphaned', SIGN.COOKIE_OUTBOUND));
        });

        test('whose direct flow has been forgotten: an orphan', async () => {
          const d = datapath();
          d.enrol({ flags: ['DRAINING', 'STRICT'] });
          const flow = fresh(family);
          await check(send(...flow), pass('pass_draining'));
          d.forgetDirectFlows();
          await check(send(...flow, { flags: ACK }), drop('drop_orphaned_flow'));
        });
      });

      describe('a segment of a connection that a proxy has', () => {
        test.each([
          { name: 'ACK', flags: ACK },
          { name: 'FIN', flags: FIN | ACK },
          { name: 'RST', flags: RST },
          { name: 'SYN-ACK', flags: SYN | ACK },
          { name: 'SYN with RST', flags: SYN | RST },
          { name: 'no flag', flags: 0 },
        ])('accepted by the proxy: $name goes to it', async ({ flags }) => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
          await check(send(client, server, { flags }), toOld('to_proxy_established', SIGN.ESTABLISHED));
        });

        test('made by the proxy towards the pod: the pod’s answers go to it', async () => {
          const { node } = datapath();
          const { client, server } = await node.connect(node.old, its.outsideAtOld, its.pod, APP);
          const outcome = toOld('to_proxy_established', SIGN.ESTABLISHED);
          await check(send(server, client, { flags: SYN | ACK }), outcome);
        });

        test('half open: goes to the proxy', async () => {
          const { client, server } = await datapath().node.halfOpen(family);
          await check(send(client, server, { flags: ACK }), toOld('to_proxy_established', SIGN.ESTABLISHED));
        });

        test('TIME_WAIT: goes to the proxy', async () => {
          const { client, server } = await datapath().node.timeWait(family);
          await check(send(client, server, { flags: ACK }), toOld('to_proxy_established', SIGN.ESTABLISHED));
        });

        test('TIME_WAIT, but the flow was let go direct since: direct', async () => {
          const { client, server } = await datapath().node.timeWait(family);
          datapath().enrol({ flags: ['DRAINING', 'STRICT'] });
          await check(send(client, server), pass('pass_draining'));
          await check(send(client, server, { flags: ACK }), pass('pass_direct'));
        });

        test('each of two proxies gets its own', async () => {
          const d = datapath();
          d.proxies([d.new(), d.old()]);
          const older = await d.node.connect(d.node.far, its.pod, its.outsideAtOld, HTTP);
          const newer = await d.node.connect(d.node.far, its.pod, its.outsideAtNew, HTTP);
          await check(
            send(older.client, older.server, { flags: ACK }),
            d.toProxy('to_proxy_established', d.old(), SIGN.ESTABLISHED),
          );
          await check(
            send(newer.client, newer.server, { flags: ACK }),
            d.toProxy('to_proxy_established', d.new(), SIGN.ESTABLISHED),
          );
        });

        test('goes to the proxy while draining too', async () => {
          const d = datapath();
          d.enrol({ flags: ['DRAINING'] });
          const { client, server } = await d.node.connect(d.node.far, its.pod, its.outsideAtOld, HTTP);
          await check(send(client, server, { flags: ACK }), toOld('to_proxy_established', SIGN.ESTABLISHED));
        });

        test('the proxy’s device is gone: not to whoever has its namespace id now', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const { client, server } = await d.node.connect(d.node.far, its.pod, its.outsideAtOld, HTTP);
          d.proxies([d.old({ hostIfindex: DEAD })]);
          await check(send(client, server, { flags: ACK }), drop('drop_orphaned_flow'));
        });

        test('a listener alone is no connection', async () => {
          datapath().enrol({ flags: ['STRICT'] });
          const [pod] = fresh(family);
          const server = { address: its.outsideAtOld, port: HTTP };
          await check(send(pod, server, { flags: ACK }), drop('drop_orphaned_flow'));
        });
      });

      describe('a segment of a connection of the host', () => {
        test('passes', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const { client, server } = await d.node.connect(d.node.inNode, its.host, its.pod, APP);
          await check(send(server, client, { flags: SYN | ACK }), pass('pass_host_socket'));
        });
        test('passes without any proxy', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          d.forgetProxies();
          const { client, server } = await d.node.connect(d.node.inNode, its.host, its.pod, APP);
          await check(send(server, client, { flags: ACK }), pass('pass_host_socket'));
        });
      });

      describe('a segment from an address that is not the pod’s', () => {
        const vip = () => ({ address: its.vip, port: APP });
        const client = () => ({ address: its.outside, port: port() });

        test('nothing known: dropped, whoever has a socket', async () => {
          const { node } = datapath();
          await check(send(vip(), client(), { flags: ACK }), drop('drop_spoofed_source'));
          const taken = await node.connect(node.far, its.vip, its.outsideAtOld, HTTP);
          await check(send(taken.client, taken.server, { flags: ACK }), drop('drop_spoofed_source'));
        });

        test('on a flow of a proxy into this pod: to the proxy', async () => {
          const d = datapath();
          const { client: from, server } = await d.node.connect(d.node.old, its.outsideAtOld, its.vip, APP);
          const answer = send(server, from, { flags: SYN | ACK });
          await check(answer, drop('drop_spoofed_source'));
          await d.check('pod_ingress', tcpFrame(toPod, from, server), pass('from_proxy_local'), { ingressIfindex: 1 });
          await check(answer, toOld('to_proxy_established', SIGN.ESTABLISHED));
          await check(answer, drop('drop_spoofed_source'), { ifindex: d.node.ifindex.otherPod });
        });

        test('on a flow that was let go direct into this pod: passes', async () => {
          const d = datapath();
          d.enrol({ flags: ['DRAINING'] });
          const from = client();
          await d.check('pod_ingress', tcpFrame(toPod, from, vip()), pass('pass_draining'), { ingressIfindex: 1 });
          await check(send(vip(), from, { flags: SYN | ACK }), pass('pass_direct'));
        });
      });

      describe('a segment without a socket', () => {
        test('of a flow that was redirected: to the proxy, whose listener refuses it', async () => {
          const flow = await redirectedFlow(family);
          await check(send(...flow, { flags: ACK }), toOld('to_proxy_orphaned', SIGN.COOKIE_OUTBOUND));
        });

        test('of a flow that was redirected: to the proxy that listens now', async () => {
          const d = datapath();
          const flow = await redirectedFlow(family);
          d.proxies([d.new(), d.old()]);
          await check(send(...flow, { flags: ACK }), d.toProxy('to_proxy_orphaned', d.new(), SIGN.COOKIE_OUTBOUND));
        });

        test.each([
          { name: 'no record of proxies', set: (d: Datapath) => d.forgetProxies() },
          { name: 'no listener', set: (d: Datapath) => d.proxies([d.old({ ports: { outbound: DEAF } })]) },
        ])('of a flow that was redirected, $name: by policy', async ({ set }) => {
          const d = datapath();
          const flow = await redirectedFlow(family);
          set(d);
          await check(send(...flow, { flags: ACK }), drop('drop_no_listener'));
          d.enrol({ flags: ['POLICY_OPEN'] });
          await check(send(...flow, { flags: ACK }), pass('pass_failure_policy_open'));
          d.enrol();
          d.proxies([d.old()]);
          await check(send(...flow, { flags: ACK }), pass('pass_direct'));
        });

        test('nothing known, enrolled by its own ADD: dropped', async () => {
          datapath().enrol({ flags: ['STRICT', 'POLICY_OPEN'] });
          await check(send(...fresh(family), { flags: ACK }), drop('drop_orphaned_flow'));
        });

        test('nothing known, enrolled while running: older than that, passes', () =>
          check(send(...fresh(family), { flags: ACK }), pass('pass_no_proxy_socket')));
      });

      describe('the ACK of a SYN cookie', () => {
        const flow = (): [End, End] => [
          { address: its.podSilent, port: port() },
          { address: its.outsideAtOld, port: HTTP },
        ];

        test('valid: to the proxy, for the listener', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const [pod, server] = flow();
          const numbers = await d.node.cookie(pod, server, OUTBOUND);
          const frame = send(pod, server, { flags: ACK, ...numbers });
          const outcome = toOld('to_proxy_cookie', SIGN.COOKIE_OUTBOUND);
          await check(frame, outcome);
          d.proxies([d.new({ ports: { outbound: DEAF } }), d.new({ ports: { outbound: 0 } }), d.new(), d.old()]);
          await check(frame, outcome);
        });

        test('is none with another number, another flag, without ACK, or cut short', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const [pod, server] = flow();
          const numbers = await d.node.cookie(pod, server, OUTBOUND);
          const orphan = drop('drop_orphaned_flow');
          // The low bits are the MSS, of which more than one value is right.
          const forged = { ...numbers, ack: (numbers.ack ^ 0x800000) >>> 0 };
          await check(send(pod, server, { flags: ACK, ...forged }), orphan);
          for (const flags of [SYN | ACK, RST | ACK, PSH])
            await check(send(pod, server, { flags, ...numbers }), orphan);
          const cut = tcpSegment(pod, server, { flags: ACK, ...numbers }).subarray(0, 19);
          await check(ipFrame(fromPod, ipPacket(pod.address, server.address, IPPROTO_TCP, cut)), orphan);
          await check(
            send(pod, server, { flags: PSH | ACK, ...numbers }),
            toOld('to_proxy_cookie', SIGN.COOKIE_OUTBOUND),
          );
        });

        test('is none for a proxy whose device is gone, or when there is no proxy', async () => {
          const d = datapath();
          d.enrol({ flags: ['STRICT'] });
          const [pod, server] = flow();
          const numbers = await d.node.cookie(pod, server, OUTBOUND);
          const frame = send(pod, server, { flags: ACK, ...numbers });
          d.proxies([d.old({ hostIfindex: DEAD })]);
          await check(frame, drop('drop_orphaned_flow'));
          d.proxies([]);
          await check(frame, drop('drop_orphaned_flow'));
          d.forgetProxies();
          await check(frame, drop('drop_orphaned_flow'));
        });
      });
    });
  });
}
