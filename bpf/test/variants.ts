// SPDX-License-Identifier: Apache-2.0
// Without bpf_redirect_peer every frame takes a host-side veth, and needs our mark to pass the program there. Without
// bpf_skc_lookup_tcp a half-open connection looks like the listener that it began at.

import { describe, test } from 'vitest';
import { ACK, SYN, tcpFrame } from './frames.ts';
import {
  APP,
  addresses,
  type Datapath,
  DEAF,
  families,
  fromPod,
  fromProxy,
  GATEWAY_MAC,
  HBONE,
  HTTP,
  MARKS,
  OTHER_POD_MAC,
  OUTBOUND,
  POD_MAC,
  pass,
  SIGN,
  TAKEN,
  toPod,
  VERDICT,
} from './node.ts';
import { delivered } from './proxy-egress.ts';

export function noRedirectPeer(datapath: () => Datapath): void {
  describe.each(families)('without bpf_redirect_peer, IPv%i', (family) => {
    const its = addresses[family];
    const pod = () => ({ address: its.pod, port: datapath().node.port() });
    const outside = { address: its.outside, port: HTTP };

    test('pod_egress: to the proxy with our mark', async () => {
      const d = datapath();
      const outcome = d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND, MARKS.toProxy);
      await d.check('pod_egress', tcpFrame(fromPod, pod(), outside, { flags: SYN }), outcome);
    });
    test('proxy_egress: into the pod with our mark', async () => {
      const to = { address: its.pod, port: APP };
      await datapath().check('proxy_egress', tcpFrame(fromProxy, outside, to), delivered(POD_MAC, MARKS.bypass));
    });
    test('proxy_egress: back to the proxy with our mark', async () => {
      const d = datapath();
      const outcome = d.toProxy('from_proxy_second_leg', d.old(), SIGN.INBOUND, MARKS.toProxy);
      await d.check('proxy_egress', tcpFrame(fromProxy, outside, { address: its.pod, port: HBONE }), outcome);
    });
  });
}

/** `full`: with bpf_sk_lookup_tcp alone. */
export function fullSocketsOnly(standard: () => Datapath, full: () => Datapath): void {
  describe.each(families)('with bpf_sk_lookup_tcp alone, IPv%i', (family) => {
    const its = addresses[family];
    const own = pass('pass_proxy_own');

    test('a half-open connection is one if its listener is on another port', async () => {
      const d = full();
      const established = d.toProxy('to_proxy_established', d.old(), SIGN.ESTABLISHED, MARKS.toProxy);
      const taken = await d.node.halfOpen(family, TAKEN);
      await d.check('pod_egress', tcpFrame(fromPod, taken.client, taken.server, { flags: ACK }), established);
      const direct = await d.node.halfOpen(family);
      const ack = tcpFrame(fromPod, direct.client, direct.server, { flags: ACK });
      await d.check('pod_egress', ack, pass('pass_no_proxy_socket'));
    });

    test('a connection, and a listener', async () => {
      const d = full();
      const { client, server } = await d.node.connect(d.node.far, its.pod, its.outsideAtOld, HTTP);
      const established = d.toProxy('to_proxy_established', d.old(), SIGN.ESTABLISHED, MARKS.toProxy);
      await d.check('pod_egress', tcpFrame(fromPod, client, server, { flags: ACK }), established);
      const other = { ...client, port: d.node.port() };
      const ack = tcpFrame(fromPod, other, server, { flags: ACK });
      await d.check('pod_egress', ack, pass('pass_no_proxy_socket'));
    });

    test('the proxy’s segment to 15008 of a pod may be of a half-open one: TPROXY finds out', async () => {
      const d = full();
      const segment = (port: number) =>
        tcpFrame(fromProxy, { address: its.outside, port: d.node.port() }, { address: its.pod, port }, { flags: ACK });
      const back = d.toProxy('to_proxy_established', d.old(), SIGN.COOKIE_INBOUND, MARKS.toProxy);
      await d.check('proxy_egress', segment(HBONE), back);
      await d.check('proxy_egress', segment(OUTBOUND), own);
      await standard().check('proxy_egress', segment(HBONE), own);
      d.proxies([d.old({ ports: { inboundHBONE: 0 } })]);
      await d.check('proxy_egress', segment(HBONE), own);
      d.proxies([d.old({ ports: { inboundHBONE: DEAF } })]);
      await d.check('proxy_egress', segment(DEAF), own);
      d.proxies([d.old()]);
      // Not on a flow that was taken on its way to the other end.
      const client = { address: its.otherPod, port: d.node.port() };
      const pod = { address: its.pod, port: HBONE };
      const syn = tcpFrame({ ...toPod, destination: OTHER_POD_MAC }, pod, client);
      const taken = d.toProxy('redirected_inbound', d.old(), SIGN.INBOUND, MARKS.toProxy);
      await d.check('pod_ingress', syn, taken, { ingressIfindex: 1, ifindex: d.node.ifindex.otherPod });
      await d.check('proxy_egress', tcpFrame(fromProxy, client, pod, { flags: ACK }), {
        verdict: VERDICT.REDIRECT,
        reason: 'from_proxy_reinjected',
        destination: GATEWAY_MAC,
        source: OTHER_POD_MAC,
        mark: MARKS.bypass,
      });
    });
  });
}
