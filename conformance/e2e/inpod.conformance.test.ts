// SPDX-License-Identifier: Apache-2.0
//
// The in-pod contract with real packets: every row of the packet table, in both families, with both hooks, on both
// kinds of primary plugin. What reached a host-side veth is told by tcpdump, who took a connection by the proxies, what
// decided by the counters.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { until } from '../netns.ts';
import type { Capture } from './capture.ts';
import { sign } from './counters.ts';
import { type Connection, EndpointError } from './endpoint.ts';
import { ACK, macText, SYN, tcpFrame } from './frames.ts';
import { type Actor, APP, InPodMesh, ONE_SYN } from './inpod.ts';
import { type Family, families, type Pod, sysctl, type TopologyOptions } from './topology.ts';

const topologies: Pick<TopologyOptions, 'primary' | 'hook' | 'rpFilter'>[] = [
  { primary: 'ptp', hook: 'tcx', rpFilter: 1 },
  { primary: 'bridge', hook: 'clsact', rpFilter: 0 },
  { primary: 'bridge', hook: 'tcx', rpFilter: 1 },
  { primary: 'ptp', hook: 'clsact', rpFilter: 0 },
];

const SECRET = 'ambient-redirect-plain-text';
const HBONE = 15008;

describe.each(topologies)('in-pod, $primary, $hook, rp_filter $rpFilter', (options) => {
  let mesh: InPodMesh;
  let ofClient: Capture;
  let ofServer: Capture;

  beforeAll(async () => {
    mesh = await InPodMesh.start({ ...options, entry: { dnsCapture: true } });
    await mesh.topology.outsider.serveUDP(53);
    ofClient = await mesh.capture(mesh.client, 'client');
    ofServer = await mesh.capture(mesh.server, 'server');
  });
  afterAll(() => mesh?.close());

  const startProxies = async () => {
    const { server } = mesh;
    await mesh.proxies.client.start(['--hbone', server.addresses[4], server.addresses[6]]);
    await mesh.proxies.server.start();
  };
  /** What came out of a pod from this port. */
  const sent = (capture: Capture, port: number) => capture.packets(`tcp src port ${port}`).map(({ text }) => text);
  const talks = async (connection: Connection, from: Actor) => {
    await mesh.endpoint(from).exchange(connection, 20_000);
    expect(await mesh.endpoint(from).finish(connection)).toBe('bye\n');
  };
  const proxied = (of: 'client' | 'server', port: number) =>
    mesh.proxies[of].from(port).map(({ listener, source, destination, destinationPort }) => ({
      listener,
      source,
      destination,
      destinationPort,
    }));
  const untilMoved = async (pod: Pod, before: ReturnType<InPodMesh['counters']>, key: string, packets = 1) => {
    await until(`${key} at ${pod.label}`, () => (mesh.moved(before, pod)[key] ?? 0) >= packets).catch((error) => {
      throw new Error(`${error.message}; counted: ${JSON.stringify(mesh.moved(before, pod))}`);
    });
  };

  describe('before the proxy listens', () => {
    test.each(families)('IPv%i: closed: SYNs are dropped and counted, none gets out or in', async (family) => {
      const before = mesh.counters();
      const sourcePort = mesh.nextPort();
      expect(await mesh.refused('client', mesh.address('outsider', family), APP, { sourcePort })).toBe('ETIMEDOUT');
      expect(sent(ofClient, sourcePort)).toEqual([]);
      expect(await mesh.refused('outsider', mesh.address('server', family))).toBe('ETIMEDOUT');
      expect(mesh.moved(before, mesh.client)['inpod_egress drop_no_listener']).toBe(1);
      expect(mesh.moved(before, mesh.server)['inpod_ingress drop_no_listener']).toBe(1);
    });

    test.each(families)('IPv%i: a probe of the host sees the app, with the host’s own address', async (family) => {
      const before = mesh.counters();
      const probe = await mesh.connect('host', mesh.address('server', family));
      expect([probe.seen, probe.seenPort]).toEqual([mesh.address('host', family), probe.localPort]);
      await talks(probe, 'host');
      const moved = mesh.moved(before, mesh.server);
      expect(moved['inpod_sign pass_host_socket']).toBeGreaterThan(0);
      expect(moved['inpod_ingress pass_host_socket']).toBe(moved['inpod_sign pass_host_socket']);
      expect(moved['inpod_egress pass_direct']).toBeGreaterThan(0);
      expect(Object.keys(moved).filter((key) => key.includes('drop_'))).toEqual([]);
    });

    test.each(families)('IPv%i: ICMP, UDP and the pod’s own address are left alone', async (family) => {
      await mesh.client.endpoint.ping(mesh.address('outsider', family));
      await mesh.topology.outsider.ping(mesh.address('client', family));
      const own = await mesh.connect('client', mesh.address('client', family));
      expect(own.seenPort).toBe(own.localPort);
      const loopback = await mesh.connect('client', family === 4 ? '127.0.0.1' : '::1');
      expect(loopback.seenPort).toBe(loopback.localPort);
    });
  });

  describe('with the proxies', () => {
    beforeAll(startProxies);

    test.each(families)('IPv%i: app to outside: looped to 15001, which goes on with its own port', async (family) => {
      const before = mesh.counters();
      const connection = await mesh.connect('client', mesh.address('outsider', family));
      await talks(connection, 'client');
      expect(proxied('client', connection.localPort)).toEqual([
        {
          listener: 'outbound',
          source: mesh.address('client', family),
          destination: mesh.address('outsider', family),
          destinationPort: APP,
        },
      ]);
      expect(connection.seen).toBe(mesh.address('client', family));
      expect(connection.seenPort).not.toBe(connection.localPort);
      expect(sent(ofClient, connection.localPort)).toEqual([]);
      expect(sent(ofClient, connection.seenPort).length).toBeGreaterThan(0);
      const moved = mesh.moved(before, mesh.client);
      expect(moved['inpod_egress redirected_outbound']).toBe(1);
      expect(moved['inpod_ingress proxy_assigned']).toBe(1);
      expect(moved['inpod_egress to_proxy_established']).toBeGreaterThan(0);
      expect(moved['inpod_ingress proxy_delivered']).toBe(moved['inpod_egress to_proxy_established']);
      expect(moved['inpod_egress pass_proxy_own']).toBeGreaterThan(0);
      expect(moved['inpod_ingress to_proxy_established']).toBeGreaterThan(0);
      expect(Object.keys(moved).filter((key) => key.includes('drop_'))).toEqual([]);
    });

    test.each(families)('IPv%i: outside to app: steered to 15006, the app sees the caller', async (family) => {
      const before = mesh.counters();
      const connection = await mesh.connect('outsider', mesh.address('server', family));
      await talks(connection, 'outsider');
      expect(proxied('server', connection.localPort)).toEqual([
        {
          listener: 'inbound',
          source: mesh.address('outsider', family),
          destination: mesh.address('server', family),
          destinationPort: APP,
        },
      ]);
      expect(connection.seen).toBe(mesh.address('outsider', family));
      expect(connection.seenPort).not.toBe(connection.localPort);
      const moved = mesh.moved(before, mesh.server);
      expect(moved['inpod_ingress redirected_inbound']).toBe(1);
      // The app's replies: it is connected to the outsider, the proxy's end of that has the outsider's address.
      expect(moved['inpod_egress to_proxy_established']).toBeGreaterThan(0);
      expect(sent(ofServer, APP).length).toBeGreaterThan(0);
      expect(ofServer.packets(`tcp dst port ${connection.seenPort}`)).toEqual([]);
      expect(Object.keys(moved).filter((key) => key.includes('drop_'))).toEqual([]);
    });

    test.each(families)('IPv%i: pod to pod by 15008, which is reached by itself; nothing in clear', async (family) => {
      const before = mesh.counters();
      const connection = await mesh.connect('client', mesh.address('server', family));
      await mesh.client.endpoint.exchange(connection, 100_000);
      expect(connection.seen).toBe(mesh.address('client', family));
      expect(proxied('client', connection.localPort)[0]?.listener).toBe('outbound');
      const taken = mesh.proxies.server.proxied().filter(({ listener }) => listener === 'hbone');
      expect(taken.at(-1)).toMatchObject({ source: mesh.address('client', family), destinationPort: APP });
      const moved = mesh.moved(before, mesh.server);
      expect(moved['inpod_ingress proxy_delivered'], JSON.stringify(moved)).toBeGreaterThan(0);
      expect(moved['inpod_ingress redirected_inbound']).toBeUndefined();
      const ports = [connection.localPort, connection.seenPort];
      for (const port of ports) expect(sent(ofClient, port)).toEqual([]);
      const between = ofClient.packets(`tcp and dst host ${mesh.address('server', family)}`);
      expect(new Set(between.map(({ destinationPort }) => destinationPort))).toEqual(new Set([HBONE]));
      expect(await mesh.client.endpoint.finish(connection)).toBe('bye\n');
    });

    test.each(families)(
      'IPv%i: a pod that is not enrolled: inbound is proxied, itself it is left alone',
      async (family) => {
        const inbound = await mesh.connect('plain', mesh.address('server', family));
        expect(proxied('server', inbound.localPort)[0]?.listener).toBe('inbound');
        await talks(inbound, 'plain');
        const direct = await mesh.connect('plain', mesh.address('outsider', family));
        expect(direct.seenPort).toBe(direct.localPort);
      },
    );

    test.each(families)('IPv%i: probes go on to the app itself', async (family) => {
      const probe = await mesh.connect('host', mesh.address('server', family));
      expect([probe.seen, probe.seenPort]).toEqual([mesh.address('host', family), probe.localPort]);
      await talks(probe, 'host');
      expect(proxied('server', probe.localPort)).toEqual([]);
    });

    test.each(families)('IPv%i: many at once, large and small', async (family) => {
      const [out, within] = await Promise.all([
        mesh.client.endpoint.many(mesh.address('outsider', family), APP, 60, 15_000),
        mesh.topology.outsider.many(mesh.address('server', family), APP, 60, 15_000),
      ]);
      expect(out).toMatchObject({ answered: 60, failures: {} });
      expect(within).toMatchObject({ answered: 60, failures: {}, sources: [mesh.address('outsider', family)] });
      const large = await mesh.connect('client', mesh.address('outsider', family));
      await mesh.client.endpoint.exchange(large, 4_000_000, 20_000);
      await mesh.client.endpoint.abort(large);
    });

    test.each(families)('IPv%i: a port that is used again while the proxy has TIME_WAIT', async (family) => {
      const before = mesh.counters();
      const sourcePort = mesh.nextPort();
      for (let i = 0; i < 3; i++) {
        const connection = await mesh.connect('client', mesh.address('outsider', family), APP, { sourcePort });
        // The proxy closes first and keeps TIME_WAIT.
        await mesh.client.endpoint.request(connection, 'quit\n');
        expect(connection.ms).toBeLessThan(1_000);
      }
      const moved = mesh.moved(before, mesh.client);
      expect((moved['inpod_ingress proxy_assigned'] ?? 0) + (moved['inpod_ingress proxy_time_wait'] ?? 0)).toBe(3);
      expect(moved['inpod_ingress proxy_time_wait']).toBeGreaterThan(0);
    });

    test.each(families)('IPv%i: many at once by SYN cookies: none lost, none leaked', async (family) => {
      const count = 100;
      const pods = [mesh.client, mesh.server];
      for (const { netns } of pods) sysctl(netns, { 'net.ipv4.tcp_syncookies': 2 });
      try {
        const { outsider } = mesh.topology;
        const before = mesh.counters();
        const [served, proxiedBefore] = [await outsider.seen(APP, family), mesh.proxies.client.proxied().length];
        const out = await mesh.client.endpoint.many(mesh.address('outsider', family), APP, count, 20_000);
        expect(out).toEqual({ answered: count, failures: {}, sources: [mesh.address('client', family)] });
        const asked = mesh.proxies.client.proxied().slice(proxiedBefore);
        expect(asked.map(({ listener }) => listener)).toEqual(Array(count).fill('outbound'));
        const direct = new Set(asked.map(({ sourcePort }) => sourcePort));
        const seen = (await outsider.seen(APP, family)).slice(served.length);
        expect(seen).toHaveLength(count);
        expect(seen.filter(([, port]) => direct.has(port))).toEqual([]);
        const outbound = mesh.moved(before, mesh.client);
        expect(outbound['inpod_egress redirected_outbound']).toBe(count);
        expect(outbound['inpod_egress to_proxy_cookie']).toBeGreaterThanOrEqual(count);
        const within = await outsider.many(mesh.address('server', family), APP, count, 20_000);
        expect(within).toEqual({ answered: count, failures: {}, sources: [mesh.address('outsider', family)] });
        const inbound = mesh.moved(before, mesh.server);
        expect(inbound['inpod_ingress redirected_inbound']).toBe(count);
        expect(inbound['inpod_ingress to_proxy_cookie']).toBeGreaterThanOrEqual(count);
        for (const pod of pods) {
          expect(Object.keys(mesh.moved(before, pod)).filter((key) => key.includes('drop_'))).toEqual([]);
        }
      } finally {
        for (const { netns } of pods) sysctl(netns, { 'net.ipv4.tcp_syncookies': 1 });
      }
    });

    test.each(families)('IPv%i: DNS over UDP and TCP, from the resolver that was asked', async (family) => {
      const resolver = mesh.address('outsider', family);
      const before = mesh.counters();
      // The listener sees the resolver as its client.
      expect(await mesh.client.endpoint.dns([[resolver, 'a.test', 7]])).toEqual([[resolver, 7, `udp ${resolver}`]]);
      expect(await mesh.client.endpoint.dns([[resolver, 'a.test', 8]], { transport: 'tcp' })).toEqual([
        [resolver, 8, `tcp ${resolver}`],
      ]);
      const moved = mesh.moved(before, mesh.client);
      expect(moved['inpod_egress dns_captured']).toBe(2);
      expect(moved['inpod_egress dns_answered']).toBeGreaterThan(2);
      expect(Object.keys(moved).filter((key) => key.includes('drop_'))).toEqual([]);
      expect(ofClient.lines('port 53')).toEqual([]);
      const [large] = await mesh.client.endpoint.dns([[resolver, '4000.big', 9]]);
      expect(large).toEqual([resolver, 9, 'x'.repeat(4000)]);
    });

    test('IPv4: DNS over UDP without a checksum', async () => {
      const resolver = mesh.address('outsider', 4);
      expect(await mesh.client.endpoint.dns([[resolver, 'a.test', 7]], { checksum: false })).toEqual([
        [resolver, 7, `udp ${resolver}`],
      ]);
    });

    describe('what nobody may send', () => {
      const frame = (to: Pod, fields: Partial<Parameters<typeof tcpFrame>[0]>) =>
        tcpFrame({
          source: to.gatewayMac,
          destination: to.mac,
          from: mesh.address('plain', 4),
          to: to.addresses[4],
          sourcePort: mesh.nextPort(),
          destinationPort: APP,
          ...fields,
        });

      test.each(families)('IPv%i: from the wire, the pod’s own address as source', async (family) => {
        const before = mesh.counters();
        const own = mesh.address('server', family);
        await mesh.topology.host.frame(mesh.server.hostIfname, frame(mesh.server, { from: own, to: own }));
        await untilMoved(mesh.server, before, 'inpod_ingress drop_spoofed_source');
      });

      test('from the wire, to 127.0.0.1', async () => {
        const before = mesh.counters();
        await mesh.topology.host.frame(mesh.client.hostIfname, frame(mesh.client, { to: '127.0.0.1' }));
        await untilMoved(mesh.client, before, 'inpod_ingress drop_not_our_address');
      });

      test('the sign of probes, by a pod and by a neighbour', async () => {
        const before = mesh.counters();
        const signed = macText(Uint8Array.from([...sign(mesh.topology.stateDir), 10]));
        const forged = frame(mesh.server, { source: signed });
        await mesh.client.endpoint.frame('eth0', forged, 1, true);
        await untilMoved(mesh.client, before, 'inpod_guard drop_forged_sign');
        if (options.primary !== 'bridge') return;
        await mesh.plain.endpoint.frame('eth0', forged);
        await untilMoved(mesh.server, before, 'inpod_sign drop_forged_sign');
        expect(mesh.moved(before, mesh.server)['inpod_ingress pass_host_socket']).toBeUndefined();
      });

      test.each(families)('IPv%i: TCP past the egress hook', async (family) => {
        const before = mesh.counters();
        const sourcePort = mesh.nextPort();
        for (const flags of [SYN, ACK]) {
          const bypass = tcpFrame({
            source: mesh.client.mac,
            destination: mesh.client.gatewayMac,
            from: mesh.address('client', family),
            to: mesh.address('outsider', family),
            sourcePort,
            destinationPort: APP,
            flags,
            ...(flags === ACK && { payload: 'past the hook' }),
          });
          await mesh.client.endpoint.frame('eth0', bypass, 1, true);
        }
        await untilMoved(mesh.client, before, 'inpod_guard drop_unjudged', 2);
        expect(mesh.moved(before, mesh.client)['inpod_egress drop_spoofed_source']).toBeUndefined();
      });

      test.each(families)('IPv%i: a source that is not the pod’s', async (family) => {
        const before = mesh.counters();
        const spoofed = tcpFrame({
          source: mesh.client.mac,
          destination: mesh.client.gatewayMac,
          from: mesh.address('plain', family),
          to: mesh.address('outsider', family),
          sourcePort: mesh.nextPort(),
          destinationPort: APP,
        });
        await expect(mesh.client.endpoint.frame('eth0', spoofed)).rejects.toMatchObject({ code: 'ENOBUFS' });
        await untilMoved(mesh.client, before, 'inpod_egress drop_spoofed_source');
      });
    });
  });

  describe('the proxy dies', () => {
    test.each(families)('IPv%i: nothing goes out in clear, and it is served again after a restart', async (family) => {
      const held = await mesh.connect('client', mesh.address('outsider', family));
      const inbound = await mesh.connect('outsider', mesh.address('server', family));
      await mesh.client.endpoint.exchange(held, 1_000);
      await mesh.topology.outsider.exchange(inbound, 1_000);
      await Promise.all([mesh.proxies.client.kill(), mesh.proxies.server.kill()]);
      await mesh.client.endpoint.send(held, SECRET).catch((error) => expect(error).toBeInstanceOf(EndpointError));
      await mesh.topology.outsider.send(inbound, SECRET).catch((error) => expect(error).toBeInstanceOf(EndpointError));
      const sourcePort = mesh.nextPort();
      expect(await mesh.refused('client', mesh.address('outsider', family), APP, { sourcePort })).toBe('ETIMEDOUT');
      expect(await mesh.refused('outsider', mesh.address('server', family))).toBe('ETIMEDOUT');
      for (const port of [held.localPort, sourcePort]) expect(sent(ofClient, port)).toEqual([]);
      expect(ofClient.contains(SECRET)).toBe(false);
      const probe = await mesh.connect('host', mesh.address('server', family), APP, { timeout: ONE_SYN * 5 });
      expect(probe.seenPort).toBe(probe.localPort);
      await startProxies();
      const again = await mesh.connect('client', mesh.address('outsider', family));
      await talks(again, 'client');
      expect(proxied('client', again.localPort)[0]?.listener).toBe('outbound');
    });
  });

  describe('leaving', () => {
    test.each(families)('IPv%i: nobody else’s listener takes the place of the proxy’s', async (family) => {
      await mesh.proxies.server.kill();
      if (family === 4) await mesh.server.endpoint.listen(15006);
      const before = mesh.counters();
      expect(await mesh.refused('outsider', mesh.address('server', family))).toBe('ETIMEDOUT');
      expect(mesh.moved(before, mesh.server)['inpod_ingress drop_no_listener']).toBeGreaterThan(0);
    });

    test('pods and CHECK say what is there', async () => {
      const pods = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as {
        name: string;
        contract: string;
        programs: { alive: number; attached: { program: string }[] };
      }[];
      const client = pods.find(({ name }) => name === 'client');
      expect(client?.contract).toBe('in-pod');
      expect(client?.programs.alive).toBe(5);
    });

    test.each(families)('IPv%i: DEL takes everything away, and the pod is as others', async (family: Family) => {
      if (family === 6) return;
      await mesh.topology.deleteOurs(mesh.client);
      for (const one of families) {
        const direct = await mesh.connect('client', mesh.address('outsider', one));
        expect(direct.seenPort).toBe(direct.localPort);
      }
      const { netns } = mesh.client;
      expect(netns.run(['ip', 'rule', 'show'])).not.toContain('41905');
      expect(netns.run(['ip', '-6', 'rule', 'show'])).not.toContain('41905');
      expect(netns.run(['ip', 'route', 'show', 'table', 'all'])).not.toContain('41905');
      expect(netns.run(['sysctl', '-n', 'net.ipv4.conf.eth0.accept_local']).trim()).toBe('0');
      expect(netns.run(['sysctl', '-n', 'net.ipv4.tcp_migrate_req']).trim()).toBe('0');
      expect(netns.run(['sysctl', '-n', 'net.ipv4.conf.eth0.route_localnet']).trim()).toBe('0');
      expect(netns.run(['bpftool', 'net', 'show', 'dev', 'eth0'])).not.toContain('inpod_');
      expect(mesh.topology.node.run(['bpftool', 'net', 'show', 'dev', mesh.client.hostIfname])).not.toContain('inpod_');
    });
  });
});
