// SPDX-License-Identifier: Apache-2.0
//
// closedAction reset: a new connection that finds no listener is refused at once, in both directions, and so is a segment
// of a connection whose proxy died.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { must, until } from '../netns.ts';
import { Capture } from './capture.ts';
import type { Connection } from './endpoint.ts';
import { OWN_SOURCE_PORT, TUNNELLED_PORT } from './haproxy.ts';
import { type Actor, Mesh, PORT } from './mesh.ts';
import { clusterAddress, type Family, families, type TopologyOptions } from './topology.ts';

const SERVICE_PORT = 8000;

type Options = Pick<TopologyOptions, 'primary' | 'hook'> & { variant: string };

describe.each<Options>([
  { primary: 'ptp', hook: 'tcx', variant: 'auto' },
  { primary: 'bridge', hook: 'clsact', variant: 'auto' },
  { primary: 'bridge', hook: 'tcx', variant: 'no-redirect-peer' },
  { primary: 'ptp', hook: 'clsact', variant: 'full-sockets-only' },
])('closedAction reset, $primary, $hook, variant $variant', ({ primary, hook, variant }) => {
  let mesh: Mesh;
  let inClient: Capture;
  let inOutsider: Capture;

  beforeAll(async () => {
    mesh = await Mesh.start({ primary, hook, rpFilter: 1, entry: { variant, closedAction: 'reset' } });
    const { topology } = mesh;
    topology.service(clusterAddress, SERVICE_PORT, mesh.server, PORT);
    // A conntrack that is strict about what belongs to a connection, as kube-proxy's rules make it.
    must(
      topology.node.argv(['nft', '-f', '-']),
      'table inet strict {\n chain forward { type filter hook forward priority 0; ct state invalid drop; }\n}\n',
    );
    inClient = await Capture.start(topology.testbed, mesh.client.netns, 'eth0', 'client');
    inOutsider = await Capture.start(topology.testbed, topology.outside, 'eth0', 'outsider');
  });
  afterAll(() => mesh?.close());

  const refusedWith = (from: Actor, address: string, port?: number) => mesh.refused(from, address, port);
  /** tcpdump's verdict on the checksums of the RSTs that came to `port`. */
  const checksums = async (capture: Capture, port: number): Promise<string[]> => {
    await capture.until(`a RST to port ${port}`, `tcp and dst port ${port}`, (all) => all.some(isReset));
    return capture
      .verbose(`tcp and dst port ${port}`)
      .filter((text) => text.includes('Flags [R'))
      .map((text) => /cksum 0x[0-9a-f]+ \((correct|incorrect)/.exec(text)?.[1] ?? text);
  };

  test.each(families)('IPv%i: with a listener everything is as with drop', async (family) => {
    expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(false);
    expect(await mesh.goesDirect('outsider', mesh.address('server', family))).toBe(false);
  });

  test.each(families)('IPv%i: a segment of a flow whose proxy died without a word', async (family) => {
    const outbound = await mesh.connect('client', mesh.address('outsider', family));
    const inbound = await mesh.connect('outsider', mesh.address('server', family));
    await dieSilently(mesh);
    const before = mesh.counters();
    const reset = (from: Actor, connection: Connection) => mesh.endpoint(from).exchange(connection, 1000);
    await expect(reset('client', outbound)).rejects.toThrow('ECONNRESET');
    await expect(reset('outsider', inbound)).rejects.toThrow('ECONNRESET');
    expect(mesh.moved(before, mesh.client)['pod_egress reset_no_listener']).toBe(1);
    expect(mesh.moved(before, mesh.server)['pod_ingress reset_no_listener']).toBe(1);
    await mesh.haproxy.start();
    expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(false);
  });

  describe('without a listener', () => {
    beforeAll(() => mesh.haproxy.kill());

    test.each<[Family, Actor, Actor]>(
      families.flatMap((family): [Family, Actor, Actor][] => [
        [family, 'client', 'outsider'],
        [family, 'client', 'server'],
        [family, 'client', 'plain'],
        [family, 'client', 'host'],
      ]),
    )('IPv%i: %s to %s is refused, with one SYN and one RST', async (family, from, to) => {
      const before = mesh.counters();
      expect(await refusedWith(from, mesh.address(to, family))).toBe('ECONNREFUSED');
      expect(mesh.moved(before, mesh.client)['pod_egress reset_no_listener']).toBe(1);
      const port = mesh.lastPort;
      const got = await inClient.until(`the RST to ${port}`, `tcp and dst port ${port}`, (all) => all.some(isReset));
      expect(got.map(({ flags, source }) => [flags, source])).toEqual([['R.', mesh.address(to, family)]]);
    });

    test.each<[Family, Actor]>(
      families.flatMap((family): [Family, Actor][] => [
        [family, 'outsider'],
        [family, 'plain'],
      ]),
    )('IPv%i: %s to a pod is refused, with one SYN', async (family, from) => {
      const before = mesh.counters();
      expect(await refusedWith(from, mesh.address('server', family))).toBe('ECONNREFUSED');
      expect(mesh.moved(before, mesh.server)['pod_ingress reset_no_listener']).toBe(1);
    });

    test.each(families)('IPv%i: outsider to a service is refused by the service', async (family) => {
      expect(await refusedWith('outsider', clusterAddress[family], SERVICE_PORT)).toBe('ECONNREFUSED');
      const filter = `tcp and src host ${clusterAddress[family]} and dst port ${mesh.lastPort}`;
      const got = await inOutsider.until('the RST of the service', filter, (all) => all.some(isReset));
      expect(got.map(({ flags }) => flags)).toEqual(['R.']);
    });

    test.each(families)('IPv%i: the checksums hold where nothing completes them', async (family) => {
      const { outsider, host } = mesh.topology;
      // The node's last device computes what is still to be computed, so the outsider sees what would be on a wire.
      await host.offload('outside0', { checksum: false });
      for (const checksum of [true, false]) {
        await outsider.offload('eth0', { checksum });
        expect(await refusedWith('outsider', mesh.address('server', family))).toBe('ECONNREFUSED');
        expect(await checksums(inOutsider, mesh.lastPort), `offload ${checksum}`).toEqual(['correct']);
      }
      await mesh.client.endpoint.offload('eth0', { checksum: false });
      expect(await refusedWith('client', mesh.address('outsider', family))).toBe('ECONNREFUSED');
      expect(await checksums(inClient, mesh.lastPort)).toEqual(['correct']);
      await mesh.client.endpoint.offload('eth0', { checksum: true });
      await outsider.offload('eth0', { checksum: true });
      await host.offload('outside0', { checksum: true });
    });

    test.each(families)('IPv%i: probes pass, and a proxy that is back takes what comes', async (family) => {
      expect(await mesh.goesDirect('host', mesh.address('server', family))).toBe(true);
      await mesh.haproxy.start();
      expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(false);
      expect(await mesh.goesDirect('outsider', mesh.address('server', family))).toBe(false);
      await mesh.haproxy.kill();
    });
  });

  describe('the second leg', () => {
    beforeAll(() => mesh.haproxy.start({ without: 'hbone' }));
    afterAll(() => mesh.haproxy.kill());

    test.each(families.flatMap((family) => [TUNNELLED_PORT, OWN_SOURCE_PORT].map((port) => [family, port] as const)))(
      'IPv%i, port %i: the proxy’s SYN to 15008 is refused at once',
      async (family, port) => {
        const before = mesh.counters();
        // What HAProxy does with its own client then is its own business.
        await expect(mesh.connect('client', mesh.address('server', family), port)).rejects.toThrow();
        // HAProxy tries a refused server three times more.
        const refused = mesh.moved(before, mesh.proxy)['proxy_egress reset_no_listener'];
        expect(refused).toBeGreaterThanOrEqual(1);
        expect(await synSent(mesh)).toBe('');
      },
    );
  });
});

const isReset = ({ flags }: { flags: string }) => flags.startsWith('R');

/** The proxy's connections that still wait for an answer to their SYN. */
async function synSent(mesh: Mesh): Promise<string> {
  return must(mesh.proxy.netns.argv(['ss', '-Htan', 'state', 'syn-sent']));
}

/** The proxy and its sockets go, and nothing that its kernel then sends gets out. */
async function dieSilently(mesh: Mesh): Promise<void> {
  const { netns } = mesh.proxy;
  const nft = (rules: string) => must(netns.argv(['nft', '-f', '-']), rules);
  nft('table inet silence {\n chain out { type filter hook output priority 0; meta l4proto tcp drop; }\n}\n');
  await mesh.haproxy.kill();
  // What a killed process leaves are sockets that wait for the answer to their FIN.
  must(netns.argv(['ss', '-K', '-tan']));
  await until('no connection in the proxy', () => must(netns.argv(['ss', '-Htan', 'state', 'connected'])) === '');
  nft('delete table inet silence\n');
}
