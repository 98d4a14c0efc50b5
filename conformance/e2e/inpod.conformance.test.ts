// SPDX-License-Identifier: Apache-2.0
//
// The in-pod contract with real packets: every row of the packet table, in both families, with both hooks, on both
// kinds of primary plugin. What reached a host-side veth is told by tcpdump, who took a connection by the proxies.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Capture } from './capture.ts';
import { APP, InPodMesh } from './inpod.ts';
import { families, type TopologyOptions } from './topology.ts';

const topologies: Pick<TopologyOptions, 'primary' | 'hook' | 'rpFilter'>[] = [
  { primary: 'ptp', hook: 'tcx', rpFilter: 1 },
  { primary: 'bridge', hook: 'clsact', rpFilter: 0 },
  { primary: 'bridge', hook: 'tcx', rpFilter: 1 },
  { primary: 'ptp', hook: 'clsact', rpFilter: 0 },
];

describe.each(topologies)('in-pod, $primary, $hook, rp_filter $rpFilter', (options) => {
  let mesh: InPodMesh;
  let ofClient: Capture;

  beforeAll(async () => {
    mesh = await InPodMesh.start({ ...options, entry: { dnsCapture: true } });
    ofClient = await mesh.capture(mesh.client, 'client');
    const { server } = mesh;
    await mesh.proxies.client.start(['--hbone', server.addresses[4], server.addresses[6]]);
    await mesh.proxies.server.start();
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: app to outside: looped to 15001, the proxy goes on from its own port', async (family) => {
    const connection = await mesh.connect('client', mesh.address('outsider', family));
    await mesh.exchanged(connection, 'client');
    expect(mesh.proxies.client.from(connection.localPort)).toEqual([
      {
        listener: 'outbound',
        source: mesh.address('client', family),
        sourcePort: connection.localPort,
        destination: mesh.address('outsider', family),
        destinationPort: APP,
      },
    ]);
    expect(connection.seen).toBe(mesh.address('client', family));
    expect(connection.seenPort).not.toBe(connection.localPort);
    expect(ofClient.packets(`tcp src port ${connection.localPort}`)).toEqual([]);
    expect(ofClient.packets(`tcp src port ${connection.seenPort}`).length).toBeGreaterThan(0);
  });
});
