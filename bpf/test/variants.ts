// SPDX-License-Identifier: Apache-2.0
// Without bpf_redirect_peer every frame takes a host-side veth, and needs our mark to pass the program there.

import { describe, test } from 'vitest';
import { SYN, tcpFrame } from './frames.ts';
import {
  APP,
  addresses,
  type Datapath,
  families,
  fromPod,
  fromProxy,
  HBONE,
  HTTP,
  MARKS,
  POD_MAC,
  SIGN,
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
