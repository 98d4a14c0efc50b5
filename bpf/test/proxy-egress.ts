// SPDX-License-Identifier: Apache-2.0
// proxy_egress: what a proxy sends.

import { describe, test } from 'vitest';
import { ACK, type End, FIN, RST, SYN, type TcpFields, tcpFrame } from './frames.ts';
import {
  APP,
  addresses,
  type Datapath,
  DEAF,
  drop,
  type Family,
  families,
  fromPod,
  fromProxy,
  GATEWAY_MAC,
  HBONE,
  HTTP,
  MARKS,
  OTHER_POD_MAC,
  type Outcome,
  POD_MAC,
  pass,
  SIGN,
  toPod,
  VERDICT,
} from './node.ts';
import { NOT_TCP, notTcp, readable, tagged, unreadable } from './parse-cases.ts';

/** Straight into the pod: past its host-side veth where redirect_peer may be used, else through it with our mark. */
export const delivered = (destination = POD_MAC, mark = 0): Outcome => ({
  verdict: VERDICT.REDIRECT,
  reason: 'from_proxy_local',
  destination,
  mark,
});

/** As if the pod had sent it. */
const reinjected: Outcome = {
  verdict: VERDICT.REDIRECT,
  reason: 'from_proxy_reinjected',
  destination: GATEWAY_MAC,
  source: POD_MAC,
  mark: MARKS.bypass,
};

export function proxyEgress(datapath: () => Datapath): void {
  const check = (frame: Uint8Array, ...rest: [Outcome, Parameters<Datapath['check']>[3]?]) =>
    datapath().check('proxy_egress', frame, ...rest);
  const send = (from: End, to: End, tcp: TcpFields = {}) => tcpFrame(fromProxy, from, to, tcp);
  const port = () => datapath().node.port();
  /** A connection of the proxy's to the pod, in the name of a client outside. */
  const upstream = (family: Family, server = APP): [client: End, pod: End] => [
    { address: addresses[family].outside, port: port() },
    { address: addresses[family].pod, port: server },
  ];
  const own = pass('pass_proxy_own');

  describe('proxy_egress', () => {
    describe.each(families)('frames, IPv%i', (family) => {
      const outside = { address: addresses[family].outside, port: 19_997 };
      const pod = { address: addresses[family].pod, port: APP };
      test.each([
        ...notTcp(family, fromProxy, outside, pod),
        ...unreadable(family, fromProxy, outside, pod).filter(({ name }) => !name.includes('SYN')),
        ...tagged(fromProxy, outside, pod),
      ])('$name passes', ({ frame }) => check(frame, NOT_TCP));
      test.each(readable(family, fromProxy, outside, pod, SYN))('a SYN with $name is delivered', ({ frame }) =>
        check(frame, delivered()),
      );
    });

    describe('a device that is no proxy’s is left alone', () => {
      test('no record of proxies', () => {
        datapath().forgetProxies();
        return check(send(...upstream(4)), pass(null));
      });
      test('no proxy', () => {
        datapath().proxies([]);
        return check(send(...upstream(4)), pass(null));
      });
      test('another device', () => check(send(...upstream(4)), pass(null), { ifindex: datapath().node.ifindex.new }));
    });

    test('an older proxy’s device is a proxy’s too', async () => {
      const d = datapath();
      d.proxies([d.new(), d.new(), d.new(), d.old()]);
      await check(send(...upstream(4)), delivered());
    });

    describe.each(families)('IPv%i', (family) => {
      const its = addresses[family];
      const outside = (): End => ({ address: its.outside, port: HTTP });

      describe('SYN to a local enrolled pod', () => {
        test('is delivered, and so is what follows it', async () => {
          const flow = upstream(family);
          await check(send(...flow), delivered());
          await check(send(...flow, { flags: ACK }), delivered());
        });

        test('goes to the pod that has the address', async () => {
          const client = { address: its.pod, port: port() };
          await check(send(client, { address: its.otherPod, port: HTTP }), delivered(OTHER_POD_MAC));
        });

        test('past nobody’s queue: through the host-side veth with our mark', async () => {
          datapath().enrol({ flags: ['NO_PEER'] });
          const flow = upstream(family);
          await check(send(...flow), delivered(POD_MAC, MARKS.bypass));
          await check(send(...flow, { flags: ACK }), delivered(POD_MAC, MARKS.bypass));
        });

        test('to port 15008: back to the proxy as inbound', async () => {
          const d = datapath();
          const second = d.toProxy('from_proxy_second_leg', d.old(), SIGN.INBOUND);
          await check(send(...upstream(family, HBONE)), second);
        });

        test('to port 15008 of a pod whose HBONE is not wanted: delivered', async () => {
          datapath().enrol({ flags: ['NO_HBONE'] });
          await check(send(...upstream(family, HBONE)), delivered());
        });

        test('to port 15008, the proxy wants no HBONE: delivered', async () => {
          const d = datapath();
          d.proxies([d.old({ ports: { inboundHBONE: 0 } })]);
          await check(send(...upstream(family, HBONE)), delivered());
        });

        test('to port 15008, no listener: by policy', async () => {
          const d = datapath();
          d.proxies([d.old({ ports: { inboundHBONE: DEAF } })]);
          await check(send(...upstream(family, DEAF)), drop('drop_no_listener'));
          d.enrol({ flags: ['POLICY_OPEN'] });
          const flow = upstream(family, DEAF);
          await check(send(...flow), delivered());
          await check(send(...flow, { flags: ACK }), delivered());
        });
      });

      test('SYN in a pod’s name to outside: into the stack; answers to a socket that is gone get the living proxy’s RST', async () => {
        const d = datapath();
        d.enrol({ flags: ['STRICT'] });
        const [pod, server] = [{ address: its.pod, port: port() }, outside()];
        const answer = tcpFrame(toPod, server, pod, { flags: ACK });
        const orphaned = d.toProxy('to_proxy_orphaned', d.old(), SIGN.COOKIE_INBOUND, MARKS.toProxy);
        await d.check('pod_ingress', answer, drop('drop_orphaned_flow'), { ingressIfindex: 1 });
        await check(send(pod, server), reinjected);
        await d.check('pod_ingress', answer, orphaned, { ingressIfindex: 1 });
        d.proxies([]);
        await d.check('pod_ingress', answer, drop('drop_no_listener'), { ingressIfindex: 1 });
        d.proxies([d.old()]);
        await check(send(pod, server, { flags: RST }), reinjected);
      });

      describe('to a local enrolled pod, no SYN', () => {
        test('the answer on a flow that the pod’s SYN began: delivered', async () => {
          const d = datapath();
          const pod = { address: its.pod, port: port() };
          const taken = d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND);
          await d.check('pod_egress', tcpFrame(fromPod, pod, outside()), taken);
          await check(send(outside(), pod, { flags: SYN | ACK }), delivered());
          await check(send(outside(), pod, { flags: FIN | ACK }), delivered());
        });

        test('a flow of an address that another pod has now: not to that one', async () => {
          const d = datapath();
          const pod = { address: its.pod, port: port() };
          const taken = d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND);
          await d.check('pod_egress', tcpFrame(fromPod, pod, outside()), taken);
          const record = { ifindex: d.node.ifindex.otherPod, flags: 1, podMac: OTHER_POD_MAC };
          d.putEndpoint(its.pod, record);
          await check(send(outside(), pod, { flags: SYN | ACK }), own);
        });

        test('the answer on an inbound flow between two local pods: back into the stack', async () => {
          const d = datapath();
          const client = { address: its.otherPod, port: port() };
          const pod = { address: its.pod, port: APP };
          const taken = d.toProxy('redirected_inbound', d.old(), SIGN.INBOUND, MARKS.toProxy);
          await d.check('pod_ingress', tcpFrame(toPod, client, pod), taken, { ingressIfindex: 1 });
          await check(send(pod, client, { flags: SYN | ACK }), reinjected);
        });

        test('the answer on an inbound flow to a pod that has the connection: back into the stack all the same', async () => {
          const d = datapath();
          const sourcePort = port();
          const taken = d.toProxy('redirected_inbound', d.old(), SIGN.INBOUND, MARKS.toProxy);
          const ends = [
            { address: its.pod, port: sourcePort },
            { address: its.pod, port: APP },
          ] as const;
          await d.check('pod_ingress', tcpFrame(toPod, ...ends), taken, { ingressIfindex: 1 });
          const { client, server } = await d.node.connect(d.node.inPod, its.pod, its.pod, APP, sourcePort);
          await check(send(server, client, { flags: SYN | ACK }), reinjected);
        });

        test('both ends are the proxy’s: loops back to it', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.far, its.outside, its.podAtProxy, APP);
          const loop = d.toProxy('to_proxy_established', d.old(), SIGN.ESTABLISHED);
          await check(send(client, server, { flags: ACK }), loop);
        });

        /** A SYN to the pod, from the end that the proxy has too, is taken at its hook. */
        const takenAsInbound = (sourcePort: number) => {
          const d = datapath();
          const taken = d.toProxy('redirected_inbound', d.old(), SIGN.INBOUND, MARKS.toProxy);
          const [from, to] = [
            { address: its.podAtProxy, port: APP },
            { address: its.outside, port: sourcePort },
          ];
          return d.check('pod_ingress', tcpFrame(toPod, from, to), taken, { ingressIfindex: 1 });
        };

        test('both ends are the proxy’s although the flow was taken as inbound', async () => {
          const d = datapath();
          const sourcePort = port();
          await takenAsInbound(sourcePort);
          const { client, server } = await d.node.connect(d.node.far, its.outside, its.podAtProxy, APP, sourcePort);
          const loop = d.toProxy('to_proxy_established', d.old(), SIGN.ESTABLISHED);
          await check(send(client, server, { flags: ACK }), loop);
        });

        test('one end is in TIME_WAIT at the proxy: loops back to it, unless the flow was taken as inbound', async () => {
          const d = datapath();
          const timeWait = (sourcePort: number) =>
            d.node.timeWait(family, its.outside, its.podAtProxy, APP, sourcePort);
          const loop = d.toProxy('to_proxy_established', d.old(), SIGN.ESTABLISHED);
          const closed = await timeWait(port());
          await check(send(closed.client, closed.server, { flags: ACK }), loop);
          const sourcePort = port();
          await takenAsInbound(sourcePort);
          const { client, server } = await timeWait(sourcePort);
          await check(send(client, server, { flags: ACK }), reinjected);
        });

        test('the entry was evicted, the pod has the connection: delivered', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.inPod, its.pod, its.pod, APP);
          await check(send(client, server, { flags: ACK }), delivered());
        });

        test('the entry was evicted, the pod only listens: not delivered', async () => {
          await check(send(...upstream(family), { flags: ACK }), own);
        });

        test('the entry was evicted, the pod’s namespace is not known: not delivered', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.inPod, its.pod, its.pod, APP);
          d.enrol({ nsid: -1 });
          await check(send(client, server, { flags: ACK }), reinjected);
        });

        test('the entry was evicted, the pod’s namespace is not known: the host’s sockets say nothing about it', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.inNode, its.podAtHost, its.podAtHost, APP);
          d.enrol({ nsid: -1 });
          await check(send(client, server, { flags: ACK }), reinjected);
        });

        test('the entry was evicted, the interface is not enrolled any more: the proxy’s own', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.inPod, its.pod, its.pod, APP);
          d.forgetInterface();
          await check(send(client, server, { flags: ACK }), own);
        });
      });

      describe('from an enrolled pod’s address', () => {
        test.each([SYN, ACK])('to the outside, TCP flags %i: back into the stack on that pod’s interface', (flags) =>
          check(send({ address: its.pod, port: port() }, outside(), { flags }), reinjected),
        );

        test('its interface is not enrolled any more: passes', async () => {
          datapath().forgetInterface();
          await check(send({ address: its.pod, port: port() }, outside()), own);
        });
      });

      describe('from an address that only a pod knows of', () => {
        test('the answer on a flow that was taken on its way there: back into the stack on that pod’s interface', async () => {
          const d = datapath();
          const client = outside();
          const vip = { address: its.vip, port: port() };
          const taken = d.toProxy('redirected_inbound', d.old(), SIGN.INBOUND, MARKS.toProxy);
          await d.check('pod_ingress', tcpFrame(toPod, client, vip), taken, { ingressIfindex: 1 });
          await check(send(vip, client, { flags: SYN | ACK }), reinjected);
          d.forgetInterface();
          await check(send(vip, client, { flags: SYN | ACK }), own);
        });

        test('the answer on a flow that the pod began: passes', async () => {
          const d = datapath();
          const { client, server } = await d.node.connect(d.node.old, its.outsideAtOld, its.vip, APP);
          await d.check('pod_ingress', tcpFrame(toPod, client, server), pass('from_proxy_local'), {
            ingressIfindex: 1,
          });
          await check(send(client, server, { flags: ACK }), own);
        });
      });

      test.each([SYN, ACK])('the proxy for itself, to the outside, TCP flags %i: passes', (flags) =>
        check(send({ address: its.outsideAtOld, port: port() }, outside(), { flags }), own),
      );
    });
  });
}
