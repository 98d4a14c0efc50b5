// SPDX-License-Identifier: Apache-2.0
//
// The networks that primary plugins make which cannot be run here: what `doctor` says works with them is what worked on
// their likes. Not the plugins: nobody's policy, tunnels of nodes or address management takes part.

import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { HAProxy, INNER_PORT } from '../e2e/haproxy.ts';
import { InPodMesh } from '../e2e/inpod.ts';
import { isDirect, Mesh } from '../e2e/mesh.ts';
import { families, outsideGateway, outsiderAddress, type Pod, Topology } from '../e2e/topology.ts';
import { Programs } from './programs.ts';
import { type RoutedPrimary, wireRouted } from './routed.ts';

const CILIUM = join(import.meta.dirname, 'cilium.bpf.c');

describe.each<[RoutedPrimary, 'tcx' | 'clsact']>([
  ['calico', 'tcx'],
  ['calico', 'clsact'],
  ['aws-cni', 'tcx'],
])('routed as by %s, %s', (primary, hook) => {
  let topology: Topology;
  let client: Pod;
  let server: Pod;
  let plain: Pod;
  beforeAll(async () => {
    topology = new Topology({ primary: 'ptp', hook, rpFilter: 1 });
    client = topology.pod('client', { enroll: true });
    server = topology.pod('server', { enroll: true });
    plain = topology.pod('plain');
    const proxy = topology.pod('ztunnel-1', { namespace: 'istio-system' });
    for (const [i, pod] of [client, server, plain, proxy].entries()) {
      wireRouted(topology, pod, i + 2, primary);
      await topology.addOurs(pod);
    }
    await new HAProxy(topology.testbed, proxy.netns, 'only').start();
    for (const endpoint of [client.endpoint, server.endpoint, plain.endpoint, topology.outsider]) {
      await endpoint.listen(INNER_PORT);
    }
  });
  afterAll(() => topology?.close());

  const talk = async (from: { endpoint: Pod['endpoint'] }, address: string) => {
    const connection = await from.endpoint.connect(address, INNER_PORT);
    await from.endpoint.exchange(connection, 20_000);
    expect(await from.endpoint.finish(connection)).toBe('bye\n');
    return connection;
  };

  test.each(families)('IPv%i: out, in, pod to pod and to one outside the mesh go through the proxy', async (family) => {
    const outsider = { endpoint: topology.outsider };
    for (const [from, address] of [
      [client, outsiderAddress[family]],
      [outsider, client.addresses[family]],
      [client, server.addresses[family]],
      [client, plain.addresses[family]],
      [plain, client.addresses[family]],
    ] as const) {
      const connection = await talk(from, address);
      expect(isDirect(connection)).toBe(false);
    }
    expect((await talk(client, outsiderAddress[family])).seen).toBe(client.addresses[family]);
  });

  test.each(families)('IPv%i: the node’s own sockets and pods outside the mesh go direct', async (family) => {
    expect(isDirect(await talk({ endpoint: topology.host }, client.addresses[family]))).toBe(true);
    expect(isDirect(await talk(plain, outsiderAddress[family]))).toBe(true);
  });

  test('CHECK, and DEL leaves the primary’s devices', async () => {
    await topology.checkOurs(server);
    await topology.deleteOurs(server);
    expect(topology.node.links()).toContain(server.hostIfname);
    for (const family of families) {
      expect(isDirect(await talk(plain, server.addresses[family]))).toBe(true);
    }
  });
});

/** Straight from the wire into the pod, and programs on its veth that end the chain. */
function likeCilium(topology: Topology, { hostIfname, hostIfindex, mac, addresses }: Pod): void {
  const programs = new Programs(topology.testbed, topology.node, topology.bpffs, 'cilium', CILIUM, {
    POD_IFINDEX: hostIfindex,
    POD_MAC: mac.replace(/\w\w/g, '0x$&').replaceAll(':', ','),
    POD_NUMBER: addresses[4].split('.').at(-1) ?? '',
  });
  expect(addresses[6].split(':').at(-1)).toBe(addresses[4].split('.').at(-1));
  programs.tcx('outside0', 'ingress', 'cil_from_netdev');
  programs.tcx(hostIfname, 'ingress', 'cil_from_container');
  programs.tcx(hostIfname, 'egress', 'cil_to_container');
}

describe('delivered as by Cilium with host routing', () => {
  test('contract shared: nothing from the wire reaches proxy or hooks, so connections fail; nothing leaks', async () => {
    const mesh = await Mesh.start();
    try {
      likeCilium(mesh.topology, mesh.client);
      for (const family of families) {
        // The answers to the proxy, which speaks from the pod's address, go into the pod.
        expect(await mesh.refused('client', outsiderAddress[family])).toBe('ETIMEDOUT');
        // None of our programs has seen the SYN, so the pod's answer is of no connection that may be.
        const before = mesh.counters();
        expect(await mesh.refused('outsider', mesh.address('client', family))).toBe('ETIMEDOUT');
        expect(mesh.moved(before, mesh.client)).toMatchObject({ 'pod_egress drop_orphaned_flow': expect.any(Number) });
        // Between pods of the node nothing changes.
        expect(await mesh.goesDirect('server', mesh.address('client', family))).toBe(false);
      }
    } finally {
      mesh.close();
    }
  });

  test('contract in-pod: out and in go through the proxy', async () => {
    const mesh = await InPodMesh.start();
    try {
      await mesh.proxies.client.start();
      likeCilium(mesh.topology, mesh.client);
      for (const family of families) {
        for (const [from, address, listener] of [
          ['client', outsiderAddress[family], 'outbound'],
          ['outsider', mesh.address('client', family), 'inbound'],
        ] as const) {
          const connection = await mesh.connect(from, address);
          await mesh.exchanged(connection, from);
          expect(mesh.proxies.client.from(connection.localPort).map((one) => one.listener)).toEqual([listener]);
        }
        const probe = await mesh.connect('host', mesh.address('client', family));
        await mesh.exchanged(probe, 'host');
        expect(mesh.proxies.client.from(probe.localPort)).toEqual([]);
      }
    } finally {
      mesh.close();
    }
  });
});

describe('bridged as by flannel, with its VXLAN to another node', () => {
  const there = { 4: '10.89.0.2', 6: 'fd89::2' };

  test.each(families)('IPv%i: out and in go through the proxy', async (family) => {
    const mesh = await Mesh.start({ primary: 'bridge' });
    try {
      const { node, outside } = mesh.topology;
      for (const [here, peer, own] of [
        [node, outsiderAddress[4], { 4: '10.89.0.1', 6: 'fd89::1' }],
        [outside, outsideGateway[4], there],
      ] as const) {
        const tunnel = ['type', 'vxlan', 'id', '1', 'remote', peer, 'dstport', '8472', 'nolearning'];
        here.ip('link', 'add', 'flannel.1', ...tunnel);
        here.ip('address', 'add', `${own[4]}/24`, 'dev', 'flannel.1');
        here.ip('address', 'add', `${own[6]}/64`, 'dev', 'flannel.1', 'nodad');
        here.ip('link', 'set', 'flannel.1', 'up');
      }
      const subnet = family === 4 ? '10.88.0.0/24' : 'fd88::/64';
      const via = family === 4 ? '10.89.0.1' : 'fd89::1';
      outside.ip(`-${family}`, 'route', 'replace', subnet, 'via', via, 'dev', 'flannel.1');
      expect(await mesh.goesDirect('client', there[family])).toBe(false);
      const inward = await mesh.connect('outsider', mesh.address('client', family), INNER_PORT, {
        source: there[family],
      });
      await mesh.exchanged(inward, 'outsider');
      expect([isDirect(inward), inward.seen]).toEqual([false, there[family]]);
    } finally {
      mesh.close();
    }
  });
});
