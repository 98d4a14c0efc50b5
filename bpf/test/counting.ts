// SPDX-License-Identifier: Apache-2.0
// Packets of one reason are added up, and a place in the list of proxies that is not in use names nobody.

import { describe, expect, test } from 'vitest';
import { ACK, SYN, tcpFrame } from './frames.ts';
import { APP, addresses, type Datapath, families, fromPod, HTTP, pass, toPod } from './node.ts';

export function counting(datapath: () => Datapath): void {
  test('packets and bytes of one reason add up', async () => {
    const d = datapath();
    const { pod } = d.node.ifindex;
    d.node.native.deleteCounters(d.state, pod);
    const times = 40;
    let bytes = 0;
    for (let length = 0; length < times; length++) {
      const from = { address: addresses[4].pod, port: d.node.port() };
      const to = { address: addresses[4].outside, port: HTTP };
      const frame = tcpFrame(fromPod, from, to, { flags: SYN, payload: Buffer.alloc(length) });
      bytes += frame.length;
      await d.run('pod_egress', frame);
    }
    expect(d.counters(pod)).toEqual([
      { program: 'pod_egress', reason: 'redirected_outbound', packets: BigInt(times), bytes: BigInt(bytes) },
    ]);
  });

  describe.each(families)('a place that is not in use, IPv%i', (family) => {
    test('is not taken for the namespace with the id 0', async () => {
      const d = datapath();
      const { node } = d;
      expect(node.nsid.pod).toBe(0);
      const { client, server } = await node.connect(node.inNode, addresses[family].host, addresses[family].pod, APP);
      const frame = tcpFrame(toPod, client, server, { flags: ACK });
      for (const proxies of [[], [d.old()], [d.old(), d.new()], [d.new(), d.old(), d.new()]]) {
        d.proxies(proxies);
        await d.check('pod_ingress', frame, pass('pass_no_proxy_socket'), { ingressIfindex: 1 });
      }
    });
  });
}
