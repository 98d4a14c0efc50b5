// SPDX-License-Identifier: Apache-2.0
//
// A network inside a pod: a virtual machine behind a bridge (KubeVirt), containers of a Docker in the pod. In the
// shared contract all of it leaves by the pod's own interface, whose host side is where it is caught, so the annotation
// istio.io/reroute-virtual-interfaces has nothing to add there.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { must, type Namespace } from '../netns.ts';
import { Endpoint } from './endpoint.ts';
import { isDirect, Mesh, ONE_SYN, PORT } from './mesh.ts';
import { families } from './topology.ts';

const annotations = { 'ambient-redirect/enroll': 'true', 'istio.io/reroute-virtual-interfaces': 'k6t-eth0' };
const guests = { 4: '172.31.7.2', 6: 'fd00:31:7::2' } as const;
const gateways = { 4: '172.31.7.1', 6: 'fd00:31:7::1' } as const;

describe.each(['tcx', 'clsact'] as const)('a guest in an enrolled pod, %s', (hook) => {
  let mesh: Mesh;
  let guest: Namespace;
  let machine: Endpoint;

  beforeAll(async () => {
    mesh = await Mesh.start({
      hook,
      client: { entry: { runtimeConfig: { 'io.kubernetes.cri.pod-annotations': annotations } } },
    });
    const { topology, client } = mesh;
    const { testbed } = topology;
    guest = topology.namespace('guest');
    testbed.bridge(client.netns, 'k6t-eth0', [`${gateways[4]}/24`, `${gateways[6]}/64`]);
    testbed.veth(
      { namespace: client.netns, ifname: 'tap0', bridge: 'k6t-eth0' },
      {
        namespace: guest,
        ifname: 'eth0',
        addresses: [`${guests[4]}/24`, `${guests[6]}/64`],
        gateways: [gateways[4], gateways[6]],
      },
    );
    for (const sysctl of ['net/ipv4/ip_forward', 'net/ipv6/conf/all/forwarding']) {
      client.netns.run(['sh', '-c', `echo 1 >/proc/sys/${sysctl}`]);
    }
    machine = new Endpoint(testbed, guest, 'guest');
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: behind its own address nothing leaves, and it is counted', async (family) => {
    const before = mesh.counters();
    await expect(
      machine.connect(mesh.address('server', family), PORT, { sourcePort: mesh.nextPort(), timeout: ONE_SYN }),
    ).rejects.toMatchObject({ code: 'ETIMEDOUT' });
    expect(mesh.moved(before, mesh.client)).toMatchObject({ 'pod_egress drop_spoofed_source': 1 });
  });

  test.each(families)('IPv%i: behind the address of the pod it goes through the proxy', async (family) => {
    must(mesh.client.netns.argv(['nft', '-f', '-']), masquerade);
    try {
      for (const to of ['server', 'outsider', 'plain'] as const) {
        const connection = await machine.connect(mesh.address(to, family), PORT, { sourcePort: mesh.nextPort() });
        expect({ to, seen: connection.seen, direct: isDirect(connection) }).toEqual({
          to,
          seen: mesh.address('client', family),
          direct: false,
        });
        await machine.exchange(connection, 50_000);
        expect(await machine.finish(connection)).toBe('bye\n');
      }
    } finally {
      mesh.client.netns.run(['nft', 'delete', 'table', 'inet', 'guest']);
    }
  });
});

const masquerade = `table inet guest {
  chain out {
    type nat hook postrouting priority srcnat;
    oifname "eth0" masquerade
  }
}
`;
