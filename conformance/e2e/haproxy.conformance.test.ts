// SPDX-License-Identifier: Apache-2.0
//
// Real packets through Debian's HAProxy: every way a TCP connection can take on a node with enrolled pods.
//
// Who saw a connection is told by HAProxy's log; by the source port that the server sees (the client's own only if
// nobody stood between); by what tcpdump saw in the server's namespace; and by the programs' counters. Clients use
// source ports below the ephemeral range, so that no proxied connection has a client's port by accident.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { until } from '../netns.ts';
import { Capture, type Packet } from './capture.ts';
import { type Count, counters, increases, sign } from './counters.ts';
import { type Connection, type ConnectOptions, type Endpoint, EndpointError } from './endpoint.ts';
import { ACK, macText, tcpFrame } from './frames.ts';
import {
  HAProxy,
  INNER_PORT,
  type Listener,
  METRICS_PORT,
  OWN_SOURCE_PORT,
  type Proxied,
  TUNNELLED_PORT,
} from './haproxy.ts';
import {
  type Addresses,
  BRIDGE,
  clusterAddress,
  executable,
  type Family,
  families,
  gateway,
  outsideGateway,
  outsiderAddress,
  type Pod,
  requireExecutable,
  sysctl,
  Topology,
  type TopologyOptions,
} from './topology.ts';

const topologies: TopologyOptions[] = [
  { primary: 'ptp', hook: 'tcx', rpFilter: 1 },
  { primary: 'bridge', hook: 'clsact', rpFilter: 0 },
  { primary: 'bridge', hook: 'tcx', rpFilter: 1 },
  { primary: 'ptp', hook: 'clsact', rpFilter: 0 },
];

const PORT = INNER_PORT;
/** The outsider's capture and pod s's are searched for this; long enough not to come up by chance. */
const SECRET = 'ambient-redirect-plain-text';
/** Below a SYN's first retransmission, so one attempt. */
const ONE_SYN = 600;

type Actor = 'client' | 'server' | 'plain' | 'open' | 'outsider' | 'host';

/** One way through the node. */
interface Path {
  name: string;
  from: Actor;
  to: (family: Family) => string;
  port?: number;
  /** Whose socket accepts in the end. */
  server: Actor;
  /** HAProxy's listeners that took a connection, in order. None: the connection is direct. */
  listeners: Listener[];
  /** What the server sees as the client's address, if not the client's own. */
  seen?: Addresses | 'proxy';
  /** Every counter that moves, but for neighbour discovery's. "client", "server": their interfaces. */
  counted: { client?: string[]; server?: string[]; proxy?: string[] };
}

const outbound = ['pod_egress redirected_outbound', 'pod_egress to_proxy_established'];
const leaving = ['pod_egress pass_bypass', 'pod_ingress to_proxy_established'];
const inbound = ['pod_egress pass_bypass', 'pod_egress to_proxy_established', 'pod_ingress redirected_inbound'];
const answered = ['pod_ingress to_proxy_established'];
const local = 'proxy_egress from_proxy_local';
const reinjected = 'proxy_egress from_proxy_reinjected';

for (const options of topologies) {
  describe(`HAProxy, ${options.primary}, ${options.hook}, rp_filter ${options.rpFilter}`, () => {
    let topology: Topology;
    let client: Pod;
    let server: Pod;
    let plain: Pod;
    let open: Pod;
    let proxy: Pod;
    let haproxy: HAProxy;
    let atServer: Capture;
    let atOutsider: Capture;
    let sourcePort = 20_000;

    const endpoint = (actor: Actor): Endpoint => {
      const pods = { client, server, plain, open };
      if (actor === 'host') return topology.host;
      if (actor === 'outsider') return topology.outsider;
      return pods[actor].endpoint;
    };
    const addressOf = (actor: Actor, family: Family): string => {
      const pods = { client, server, plain, open };
      if (actor === 'host') return gateway[family];
      if (actor === 'outsider') return outsiderAddress[family];
      return pods[actor].addresses[family];
    };
    const connect = (from: Actor, address: string, port = PORT, more: ConnectOptions = {}): Promise<Connection> => {
      sourcePort += 1;
      return endpoint(from).connect(address, port, { sourcePort, ...more });
    };
    /** The errno's name that connecting ends with; fails if it succeeds. */
    const refused = async (from: Actor, address: string, port = PORT): Promise<string> => {
      try {
        const connection = await connect(from, address, port, { timeout: ONE_SYN });
        throw new Error(`connected, and the server saw ${connection.seen}:${connection.seenPort}`);
      } catch (error) {
        if (error instanceof EndpointError) return error.code;
        throw error;
      }
    };
    const isDirect = (connection: Connection) => connection.seenPort === connection.localPort;
    const logged = (port: number, at = haproxy): Proxied[] => at.proxied().filter((one) => one.clientPort === port);
    const moved = (before: readonly Count[], pod?: Pod): Record<string, number> =>
      increases(before, counters(topology.stateDir), pod?.hostIfindex);
    const untilMoved = async (before: readonly Count[], pod: Pod, key: string, packets = 1): Promise<void> => {
      await until(`${key} counted ${packets} at ${pod.label}`, () => (moved(before, pod)[key] ?? 0) >= packets).catch(
        (error: Error) => {
          throw new Error(`${error.message}; counted: ${JSON.stringify(moved(before, pod))}`);
        },
      );
      expect(moved(before, pod)[key]).toBe(packets);
    };
    const exchanged = async (connection: Connection, from: Actor, bytes = 20_000): Promise<void> => {
      await endpoint(from).exchange(connection, bytes);
      expect(await endpoint(from).finish(connection)).toBe('bye\n');
    };
    /** Connects, exchanges data, and tells whether the connection was direct. */
    const goesDirect = async (from: Actor, address: string, port = PORT): Promise<boolean> => {
      const connection = await connect(from, address, port);
      await exchanged(connection, from);
      return isDirect(connection);
    };
    const command = (...args: string[]) =>
      topology.node.exec([executable, ...args, '--state-dir', topology.stateDir, '--run-dir', topology.runDir]);

    beforeAll(async () => {
      requireExecutable();
      topology = new Topology(options);
      client = topology.pod('client', { enroll: true });
      server = topology.pod('server', { enroll: true });
      plain = topology.pod('plain');
      open = topology.pod('open', { enroll: true, entry: { failurePolicy: 'open' } });
      await topology.add(client, server, plain, open);
      for (const actor of ['client', 'server', 'plain', 'open', 'outsider', 'host'] as const) {
        await endpoint(actor).listen(PORT);
      }
      await topology.outsider.serveUDP(53);
      topology.service(clusterAddress, 8000, server, PORT);
      atServer = await Capture.start(topology.testbed, server.netns, 'eth0', 'server');
      atOutsider = await Capture.start(topology.testbed, topology.outside, 'eth0', 'outsider');
    });
    afterAll(() => topology?.close());

    /** SYNs that reached the server's namespace or the outsider with one of these source ports. */
    const leaked = (ports: readonly number[]) =>
      [...atServer.packets(), ...atOutsider.packets()].filter((one) => ports.includes(one.sourcePort));

    describe('before a proxy is there', () => {
      test.each(families)('IPv%i: closed, SYNs are dropped and counted', async (family) => {
        const before = counters(topology.stateDir);
        const first = sourcePort + 1;
        const codes = await Promise.all([
          refused('client', addressOf('outsider', family)),
          refused('client', addressOf('server', family)),
          refused('outsider', addressOf('server', family)),
          refused('plain', addressOf('server', family)),
        ]);
        expect(codes).toEqual(Array(4).fill('ETIMEDOUT'));
        // A busy machine may be late to give up, after a retransmission.
        expect(moved(before, client)['pod_egress drop_no_listener']).toBeGreaterThanOrEqual(2);
        expect(moved(before, server)['pod_ingress drop_no_listener']).toBeGreaterThanOrEqual(2);
        const others = [...atServer.packets(), ...atOutsider.packets()].filter((one) => one.sourcePort >= first);
        expect(others.map((one) => one.text)).toEqual([]);
      });

      test.each(families)('IPv%i: probes of the host, ICMP, neighbour discovery and UDP pass', async (family) => {
        const probe = await connect('host', addressOf('server', family));
        expect(probe.seen).toBe(gateway[family]);
        expect(isDirect(probe)).toBe(true);
        await exchanged(probe, 'host');
        for (const netns of [client.netns, topology.node]) netns.ip('neigh', 'flush', 'all');
        await client.endpoint.ping(addressOf('outsider', family));
        await client.endpoint.ping(addressOf('server', family));
        await topology.host.ping(addressOf('client', family));
        expect(await client.endpoint.udp(addressOf('outsider', family), 53, 'question')).toBe(
          `${addressOf('client', family)} question`,
        );
      });

      test.each(families)('IPv%i: a pod that is not enrolled is left alone', async (family) => {
        const before = counters(topology.stateDir);
        expect(await goesDirect('plain', addressOf('outsider', family))).toBe(true);
        expect(await goesDirect('outsider', addressOf('plain', family))).toBe(true);
        expect(moved(before, plain)).toEqual({});
      });

      test('the proxy pod is added but does not listen yet: still closed', async () => {
        proxy = topology.pod('ztunnel-1', { namespace: 'istio-system' });
        await topology.add(proxy);
        const before = counters(topology.stateDir);
        expect(await refused('client', addressOf('outsider', 4))).toBe('ETIMEDOUT');
        expect(moved(before, client)['pod_egress drop_no_listener']).toBeGreaterThanOrEqual(1);
      });

      test.each(families)('IPv%i: policy open passes, and what was passed stays direct', async (family) => {
        const before = counters(topology.stateDir);
        const held = await connect('open', addressOf('outsider', family));
        const heldIn = await connect('outsider', addressOf('open', family));
        expect([isDirect(held), isDirect(heldIn)]).toEqual([true, true]);
        expect(moved(before, open)).toMatchObject({
          'pod_egress pass_failure_policy_open': 1,
          'pod_ingress pass_failure_policy_open': 1,
        });
        const other = new HAProxy(topology.testbed, proxy.netns, `open${family}`);
        await other.start();
        await endpoint('open').exchange(held, 100_000);
        await endpoint('outsider').exchange(heldIn, 100_000);
        expect(await goesDirect('open', addressOf('outsider', family))).toBe(false);
        expect(logged(held.localPort, other)).toEqual([]);
        await exchanged(held, 'open');
        await exchanged(heldIn, 'outsider');
        await other.kill();
      });
    });

    describe('with the proxy', () => {
      beforeAll(async () => {
        haproxy = new HAProxy(topology.testbed, proxy.netns, 'first');
        await haproxy.start();
      });

      const to = (actor: Actor) => (family: Family) => addressOf(actor, family);
      const paths: Path[] = [
        {
          name: 'enrolled pod to enrolled pod on the node',
          from: 'client',
          to: to('server'),
          server: 'server',
          listeners: ['outbound'],
          counted: { client: outbound, server: ['pod_egress to_proxy_established'], proxy: [local] },
        },
        {
          name: 'enrolled pod to outside',
          from: 'client',
          to: to('outsider'),
          server: 'outsider',
          listeners: ['outbound'],
          counted: { client: [...outbound, ...leaving], proxy: [local, reinjected] },
        },
        {
          name: 'enrolled pod to a pod that is not enrolled',
          from: 'client',
          to: to('plain'),
          server: 'plain',
          listeners: ['outbound'],
          counted: { client: [...outbound, ...leaving], proxy: [local, reinjected] },
        },
        {
          name: 'enrolled pod to the node itself',
          from: 'client',
          to: to('host'),
          server: 'host',
          listeners: ['outbound'],
          counted: { client: [...outbound, ...leaving], proxy: [local, reinjected] },
        },
        {
          name: 'outside to enrolled pod',
          from: 'outsider',
          to: to('server'),
          server: 'server',
          listeners: ['inbound'],
          counted: { server: [...inbound, ...answered], proxy: [local, reinjected] },
        },
        {
          name: 'pod that is not enrolled to enrolled pod',
          from: 'plain',
          to: to('server'),
          server: 'server',
          listeners: ['inbound'],
          counted: { server: [...inbound, ...answered], proxy: [local, reinjected] },
        },
        {
          name: 'outside to enrolled pod, HBONE port',
          from: 'outsider',
          to: to('server'),
          port: 15008,
          server: 'server',
          listeners: ['hbone'],
          counted: { server: [...inbound, ...answered], proxy: [local, reinjected] },
        },
        {
          name: 'enrolled pod to enrolled pod in two legs, the second to the HBONE port',
          from: 'client',
          to: to('server'),
          port: TUNNELLED_PORT,
          server: 'server',
          listeners: ['outbound', 'hbone'],
          counted: {
            client: outbound,
            server: ['pod_egress to_proxy_established'],
            proxy: [local, 'proxy_egress from_proxy_second_leg', 'proxy_egress to_proxy_established'],
          },
        },
        {
          name: "enrolled pod to enrolled pod in two legs, the second from the proxy's own address",
          from: 'client',
          to: to('server'),
          port: OWN_SOURCE_PORT,
          server: 'server',
          listeners: ['outbound', 'hbone'],
          seen: 'proxy',
          counted: {
            client: outbound,
            server: ['pod_egress to_proxy_established'],
            proxy: [local, 'proxy_egress from_proxy_second_leg', 'proxy_egress to_proxy_established'],
          },
        },
        {
          name: 'enrolled pod to a service of an enrolled pod',
          from: 'client',
          to: (family) => clusterAddress[family],
          port: 8000,
          server: 'server',
          listeners: ['outbound', 'inbound'],
          counted: {
            client: [...outbound, ...leaving],
            server: [...inbound, ...answered],
            proxy: [local, reinjected],
          },
        },
        {
          name: 'enrolled pod to its own service',
          from: 'server',
          to: (family) => clusterAddress[family],
          port: 8000,
          server: 'server',
          listeners: ['outbound', 'inbound'],
          seen: gateway,
          counted: { server: [...new Set([...outbound, ...leaving, ...inbound])], proxy: [local, reinjected] },
        },
        {
          name: 'outside to a service of an enrolled pod',
          from: 'outsider',
          to: (family) => clusterAddress[family],
          port: 8000,
          server: 'server',
          listeners: ['inbound'],
          counted: { server: [...inbound, ...answered], proxy: [local, reinjected] },
        },
        {
          name: 'probe: host to enrolled pod',
          from: 'host',
          to: to('server'),
          server: 'server',
          listeners: [],
          counted: { server: ['pod_egress pass_host_socket', 'pod_ingress pass_host_socket'] },
        },
        {
          name: 'host to a service of an enrolled pod',
          from: 'host',
          to: (family) => clusterAddress[family],
          port: 8000,
          server: 'server',
          listeners: [],
          // Chosen before the destination was rewritten.
          seen: outsideGateway,
          counted: { server: ['pod_egress pass_direct', 'pod_ingress pass_host_socket'] },
        },
        {
          name: 'pod that is not enrolled to outside',
          from: 'plain',
          to: to('outsider'),
          server: 'outsider',
          listeners: [],
          counted: {},
        },
        {
          name: 'outside to pod that is not enrolled',
          from: 'outsider',
          to: to('plain'),
          server: 'plain',
          listeners: [],
          counted: {},
        },
      ];
      const cases = families.flatMap((family) => paths.map((path) => ({ ...path, family })));

      test.each(cases)('IPv$family: $name', async ({ from, to, port = PORT, server: at, family, ...path }) => {
        const before = counters(topology.stateDir);
        const loggedBefore = haproxy.proxied().length;
        const started = Date.now();
        const connection = await connect(from, to(family), port);
        await exchanged(connection, from);

        // Who saw it.
        await until('HAProxy has logged it', () => haproxy.proxied().length >= loggedBefore + path.listeners.length);
        const entries = haproxy.proxied().slice(loggedBefore);
        expect(entries.map((one) => one.listener)).toEqual(path.listeners);
        if (path.listeners.length > 0) {
          expect(entries[0]).toMatchObject({ client: addressOf(from, family), clientPort: connection.localPort });
          expect(isDirect(connection)).toBe(false);
        } else {
          expect(isDirect(connection)).toBe(true);
        }
        if (path.listeners[0] === 'outbound' && !path.listeners.includes('hbone')) {
          expect(entries[0]).toMatchObject({ destination: to(family), destinationPort: port });
        }
        // Whom the server saw.
        const seen = path.seen === 'proxy' ? proxy.addresses : path.seen;
        const expected = seen?.[family] ?? addressOf(from, family);
        expect(connection.seen).toBe(expected);
        const accepted = await endpoint(at).seen(PORT, family);
        expect(accepted.at(-1)).toEqual([expected, connection.seenPort, addressOf(at, family)]);
        // What was on the wire: one SYN with the source port that the server saw, none with the client's.
        const capture = at === 'server' ? atServer : at === 'outsider' ? atOutsider : undefined;
        if (capture) {
          // Ephemeral ports come back: only what this connection sent.
          const syns = (packets: Packet[]) =>
            packets.filter((one) => one.flags === 'S' && one.source === expected && one.time >= started);
          const protocol = family === 4 ? 'ip' : 'ip6';
          const packets = await capture.until(
            'the SYN',
            `${protocol} and port ${connection.seenPort}`,
            (found) => syns(found).length > 0,
          );
          expect(syns(packets)).toHaveLength(1);
        }
        if (path.listeners.length > 0 && at !== from) expect(leaked([connection.localPort])).toEqual([]);
        // What was counted: these and no others, and one decision per connection.
        for (const [pod, words = []] of [
          [client, path.counted.client],
          [server, path.counted.server],
          [proxy, path.counted.proxy],
        ] as const) {
          const increase = moved(before, pod);
          const keys = Object.keys(increase).filter((key) => !/ pass_(not_tcp|other_host)$/.test(key));
          expect(keys, `counters of ${pod.label}`).toEqual([...words].sort());
          for (const word of ['pod_egress redirected_outbound', 'pod_ingress redirected_inbound']) {
            if (words.includes(word)) expect(increase[word], `${word} of ${pod.label}`).toBe(1);
          }
        }
        // The proxy's own end has no interface of the host.
        const assigned = increases(before, counters(topology.stateDir), 0)['proxy_ingress proxy_assigned'] ?? 0;
        expect(assigned).toBe(path.listeners.length);
      });

      test.each(families)('IPv%i: megabytes both ways, then half-close', async (family) => {
        const ways = [
          ['client', addressOf('server', family)],
          ['client', addressOf('outsider', family)],
          ['outsider', addressOf('server', family)],
        ] as const;
        await Promise.all(
          ways.map(async ([from, address]) => {
            const connection = await connect(from, address);
            await exchanged(connection, from, 4_000_000);
          }),
        );
      });

      test.each(families)("IPv%i: the proxy's own address answers everybody", async (family) => {
        const address = proxy.addresses[family];
        for (const from of ['client', 'plain', 'outsider', 'host'] as const) {
          const connection = await connect(from, address, METRICS_PORT, { banner: false });
          const page = await endpoint(from).request(connection, 'GET / HTTP/1.0\r\n\r\n');
          expect(page, `asked by ${from}`).toContain(`proxy ${address} asked by ${addressOf(from, family)}`);
        }
      });

      test.each(families)('IPv%i: the path MTU is learned by the proxy', async (family) => {
        const subnet = family === 4 ? '10.99.0.0/24' : 'fd99::/64';
        const route = (...more: string[]) =>
          topology.node.ip(
            ...[`-${family}`, 'route', 'replace', subnet, 'dev', 'outside0', 'proto', 'kernel'],
            ...(family === 6 ? ['metric', '256'] : []),
            ...more,
          );
        const before = counters(topology.stateDir);
        route('mtu', '1300');
        try {
          await exchanged(await connect('client', addressOf('outsider', family)), 'client', 300_000);
        } finally {
          route();
        }
        expect(moved(before, client)['pod_ingress to_proxy_icmp_error']).toBeGreaterThan(0);
      });

      test.each(families)('IPv%i: a link-local address is nobody else’s business', async (family) => {
        if (family === 4) {
          // IPv4 link-local addresses are captured like any other.
          expect(await refused('client', '169.254.99.99')).not.toBe('');
          return;
        }
        const device = options.primary === 'bridge' ? BRIDGE : client.hostIfname;
        const shown: unknown = JSON.parse(
          topology.node.ip('-j', '-6', 'address', 'show', 'dev', device, 'scope', 'link'),
        );
        // iproute2 prints an empty object for every address of another scope.
        const shownAddresses = (shown as { addr_info: { local?: string }[] }[])[0]?.addr_info ?? [];
        const address = shownAddresses.find((one) => one.local !== undefined)?.local;
        if (address === undefined) throw new Error(`${device} has no link-local address`);
        const before = counters(topology.stateDir);
        const connection = await connect('client', address, PORT, { scope: 'eth0' });
        await exchanged(connection, 'client');
        expect(isDirect(connection)).toBe(true);
        expect(moved(before, client)).toMatchObject({ 'pod_egress pass_link_local': expect.any(Number) });
      });

      test.each(families)('IPv%i: a source port is used again while the proxy remembers it', async (family) => {
        sourcePort += 1;
        for (let round = 0; round < 4; round++) {
          const connection = await client.endpoint.connect(addressOf('outsider', family), PORT, { sourcePort });
          expect(isDirect(connection)).toBe(false);
          // The server closes first, so the proxy keeps TIME_WAIT for the client's tuple.
          expect(await client.endpoint.request(connection, 'quit\n')).toBe('');
        }
      });

      test('1,000 connections at once by SYN cookies: none lost, none leaked', async () => {
        sysctl(proxy.netns, { 'net.ipv4.tcp_syncookies': 2 });
        try {
          for (const family of families) {
            const before = counters(topology.stateDir);
            const loggedBefore = haproxy.proxied().length;
            const acceptedBefore = (await server.endpoint.seen(PORT, family)).length;
            const result = await client.endpoint.many(addressOf('server', family), PORT, 500, 20_000);
            expect(result).toEqual({ answered: 500, failures: {}, sources: [addressOf('client', family)] });
            await until('HAProxy has logged all', () => haproxy.proxied().length >= loggedBefore + 500);
            expect(haproxy.proxied().length).toBe(loggedBefore + 500);
            expect((await server.endpoint.seen(PORT, family)).length).toBe(acceptedBefore + 500);
            expect(moved(before, client)).toMatchObject({
              'pod_egress redirected_outbound': 500,
              'pod_egress to_proxy_cookie': 500,
            });
            const dropped = Object.entries(moved(before, client)).filter(([key]) => key.startsWith('pod_egress drop_'));
            expect(dropped).toEqual([]);
          }
          const inbound = await topology.outsider.many(addressOf('server', 4), PORT, 100, 20_000);
          expect(inbound).toEqual({ answered: 100, failures: {}, sources: [addressOf('outsider', 4)] });
        } finally {
          sysctl(proxy.netns, { 'net.ipv4.tcp_syncookies': 1 });
        }
      });
    });

    describe('forgery', () => {
      /** A frame as `pod` would send it through its gateway. */
      const frameFrom = (pod: Pod, family: Family, more: Partial<Parameters<typeof tcpFrame>[0]> = {}) => {
        sourcePort += 1;
        return tcpFrame({
          source: pod.mac,
          destination: pod.gatewayMac,
          from: pod.addresses[family],
          to: addressOf('outsider', family),
          sourcePort,
          destinationPort: PORT,
          ...more,
        });
      };
      const neverSeen = (port: number) => {
        expect(leaked([port])).toEqual([]);
        expect(logged(port)).toEqual([]);
      };

      test.each(families)("IPv%i: another pod's source address is dropped", async (family) => {
        const before = counters(topology.stateDir);
        for (const from of [server.addresses[family], family === 4 ? '10.77.0.1' : 'fd77::1']) {
          for (const flags of [undefined, ACK]) {
            const frame = frameFrom(client, family, { from, ...(flags && { flags }) });
            await client.endpoint.frame('eth0', frame);
          }
        }
        await untilMoved(before, client, 'pod_egress drop_spoofed_source', 4);
        neverSeen(sourcePort);
      });

      test.each(families)('IPv%i: a segment of a connection that never was is dropped', async (family) => {
        const before = counters(topology.stateDir);
        await client.endpoint.frame('eth0', frameFrom(client, family, { flags: ACK }));
        await untilMoved(before, client, 'pod_egress drop_orphaned_flow');
        neverSeen(sourcePort);
      });

      test.each(families)('IPv%i: VLAN tags hide nothing', async (family) => {
        const before = counters(topology.stateDir);
        const first = sourcePort + 1;
        for (const protocol of [0x8100, 0x88a8] as const) {
          for (const count of [1, 2, 3]) {
            const tags = Array(count).fill({ protocol, id: 0 });
            await client.endpoint.frame('eth0', frameFrom(client, family, { tags }));
          }
        }
        await untilMoved(before, client, 'pod_egress drop_vlan_tagged', 6);
        for (let port = first; port <= sourcePort; port++) neverSeen(port);
      });

      if (options.primary === 'bridge') {
        const fromPlain = (family: Family, destination: string, more: Partial<Parameters<typeof tcpFrame>[0]> = {}) =>
          frameFrom(plain, family, { destination, to: server.addresses[family], ...more });

        test.each(families)('IPv%i: frames that the bridge floods are left alone', async (family) => {
          const before = counters(topology.stateDir);
          await plain.endpoint.frame('eth0', fromPlain(family, '02:de:ad:be:ef:01'), 3);
          // At least: multicast is flooded too.
          await until('both pods were passed by', () =>
            [client, server].every((pod) => (moved(before, pod)['pod_ingress pass_other_host'] ?? 0) >= 3),
          );
          expect(moved(before, server)['pod_ingress redirected_inbound']).toBeUndefined();
          expect(logged(sourcePort)).toEqual([]);
        });

        test.each(families)('IPv%i: tagged frames to an enrolled pod are dropped', async (family) => {
          const before = counters(topology.stateDir);
          for (const count of [1, 2, 3]) {
            const tags = Array(count).fill({ protocol: 0x8100, id: 0 });
            await plain.endpoint.frame('eth0', fromPlain(family, server.mac, { tags }));
          }
          await untilMoved(before, server, 'pod_ingress drop_vlan_tagged', 3);
        });

        test.each(families)('IPv%i: an address that only the pod knows of is captured too', async (family) => {
          const before = counters(topology.stateDir);
          const address = family === 4 ? '10.77.0.7' : 'fd77::7';
          await plain.endpoint.frame('eth0', fromPlain(family, server.mac, { to: address }));
          await untilMoved(before, server, 'pod_ingress redirected_inbound');
          // The proxy has answered; the sender's stack, which knows of no connection, has reset it.
          expect(leaked([sourcePort]).filter((one) => one.flags !== 'R')).toEqual([]);
        });

        test.each(families)('IPv%i: nobody else can sign a frame for the proxy', async (family) => {
          const before = counters(topology.stateDir);
          const prefix = sign(topology.stateDir);
          expect(prefix).toHaveLength(5);
          for (let meaning = 1; meaning <= 6; meaning++) {
            const source = macText(Uint8Array.of(...prefix, meaning));
            await plain.endpoint.frame('eth0', fromPlain(family, proxy.mac, { source }));
          }
          await untilMoved(before, proxy, 'proxy_guard drop_forged_sign', 6);
          expect(increases(before, counters(topology.stateDir), 0)).toEqual({});
          neverSeen(sourcePort);
          // The bridge has learned the forged addresses as the pod's; they age out by themselves.
        });
      }
    });

    describe('proxies come and go', () => {
      const directions = families.flatMap((family) => [
        { family, from: 'client' as const, at: 'outsider' as const },
        { family, from: 'client' as const, at: 'server' as const },
        { family, from: 'outsider' as const, at: 'server' as const },
      ]);
      const hold = () =>
        Promise.all(
          directions.map(async ({ family, from, at }) => ({
            from,
            connection: await connect(from, addressOf(at, family)),
          })),
        );

      test('a second proxy takes new connections when it listens, the first keeps its own', async () => {
        const held = await hold();
        const second = topology.pod('ztunnel-2', { namespace: 'istio-system' });
        await topology.add(second);
        // Added, not listening: still the first one's.
        for (const { family, from, at } of directions) {
          const connection = await connect(from, addressOf(at, family));
          await exchanged(connection, from);
          expect(logged(connection.localPort)).toHaveLength(1);
        }
        const other = new HAProxy(topology.testbed, second.netns, 'second');
        await other.start();
        for (const { family, from, at } of directions) {
          const connection = await connect(from, addressOf(at, family));
          await exchanged(connection, from);
          expect(isDirect(connection)).toBe(false);
          expect(logged(connection.localPort)).toEqual([]);
          expect(logged(connection.localPort, other)).toHaveLength(1);
        }
        for (const { from, connection } of held) await exchanged(connection, from, 200_000);
        // The newest goes: back to the one before, first because nobody listens, then because it is no proxy any more.
        await other.kill();
        for (const { family, from, at } of directions) {
          expect(await goesDirect(from, addressOf(at, family))).toBe(false);
        }
        await topology.delete(second);
        for (const { family, from, at } of directions) {
          expect(await goesDirect(from, addressOf(at, family))).toBe(false);
        }
      });

      test('a connection whose proxy died never sends a byte in clear', async () => {
        const held = await hold();
        for (const { from, connection } of held) await endpoint(from).exchange(connection, 1_000);
        const before = counters(topology.stateDir);
        // Without a word of farewell, as the sockets of a crashed machine: no FIN and no RST gets out.
        proxy.netns.run(
          ['nft', '-f', '-'],
          'table inet mute { chain output { type filter hook output priority 0; drop; }\n}\n',
        );
        proxy.netns.run(['ss', '-K', '-t', 'state', 'connected']);
        await haproxy.kill();
        proxy.netns.run(['nft', 'delete', 'table', 'inet', 'mute']);
        for (const { from, connection } of held) await endpoint(from).send(connection, SECRET);
        await until('the segments were dropped', () => {
          const clientDrops = moved(before, client)['pod_egress drop_no_listener'] ?? 0;
          const serverDrops = moved(before, server)['pod_ingress drop_no_listener'] ?? 0;
          return clientDrops >= 4 && serverDrops >= 2;
        });
        expect(leaked(held.map((one) => one.connection.localPort))).toEqual([]);
        expect([atServer.contains(SECRET), atOutsider.contains(SECRET)]).toEqual([false, false]);
        // Probes go on, new connections do not.
        expect(await goesDirect('host', addressOf('server', 4))).toBe(true);
        expect(await refused('client', addressOf('outsider', 4))).toBe('ETIMEDOUT');

        // Back again, on the same pods: new connections work, old ones are told that they are over.
        await haproxy.start();
        for (const { family, from, at } of directions) {
          expect(await goesDirect(from, addressOf(at, family))).toBe(false);
        }
        for (const { from, connection } of held) {
          await expect(endpoint(from).exchange(connection, 1_000, 10_000)).rejects.toMatchObject({
            code: expect.stringMatching(/^(ECONNRESET|EPIPE)$/),
          });
        }
      });

      test('the proxy pod is deleted and another one made', async () => {
        await haproxy.kill();
        await topology.delete(proxy);
        expect(await refused('client', addressOf('outsider', 4))).toBe('ETIMEDOUT');
        expect(await goesDirect('host', addressOf('server', 6))).toBe(true);
        proxy = topology.pod('ztunnel-3', { namespace: 'istio-system' });
        await topology.add(proxy);
        haproxy = new HAProxy(topology.testbed, proxy.netns, 'third');
        await haproxy.start();
        for (const { family, from, at } of directions) {
          expect(await goesDirect(from, addressOf(at, family))).toBe(false);
        }
      });
    });

    describe('leaving', () => {
      test("the command line's counters are the kernel's", async () => {
        const before = counters(topology.stateDir);
        const shown = await command('counters', '-o', 'json');
        const after = counters(topology.stateDir);
        expect(shown, shown.stderr).toMatchObject({ status: 0 });
        const lines = JSON.parse(shown.stdout) as (Count & { pod: string })[];
        const owners = new Map([client, server, open, proxy].map((pod) => [pod.hostIfindex, pod.label]));
        for (const line of lines) {
          if (owners.has(line.ifindex)) expect(line.pod).toBe(owners.get(line.ifindex));
          const [low, high] = [before, after].map(
            (counts) =>
              counts.find(
                (one) => one.ifindex === line.ifindex && one.program === line.program && one.reason === line.reason,
              )?.packets ?? 0,
          );
          expect(line.packets).toBeGreaterThanOrEqual(low ?? 0);
          expect(line.packets).toBeLessThanOrEqual(high ?? 0);
        }
        expect(lines).toHaveLength(after.length);
        expect(lines.length).toBeGreaterThan(20);
      });

      test('status tells of the proxy, and that pods are cut off when it does not listen', async () => {
        const good = await command('status', '-o', 'json');
        expect(good, good.stderr).toMatchObject({ status: 0 });
        await haproxy.kill();
        const bad = await command('status', '-o', 'json');
        expect(bad, bad.stdout).toMatchObject({ status: 1 });
        await haproxy.start();
      });

      test('a running pod is enrolled: open connections go on direct, new ones do not; and back', async () => {
        const held = await Promise.all(
          families.flatMap((family) => [
            connect('plain', addressOf('outsider', family)),
            connect('outsider', addressOf('plain', family)),
          ]),
        );
        const enrolled = await command('enroll', '--netns', plain.netns.path, '--pod', 'default/plain');
        expect(enrolled, enrolled.stderr).toMatchObject({ status: 0 });
        const before = counters(topology.stateDir);
        for (const [index, connection] of held.entries()) {
          await exchanged(connection, index % 2 === 0 ? 'plain' : 'outsider', 50_000);
        }
        expect(moved(before, plain)['pod_egress pass_direct']).toBeGreaterThan(0);
        expect(moved(before, plain)['pod_egress pass_no_proxy_socket']).toBeUndefined();
        for (const family of families) {
          expect(await goesDirect('plain', addressOf('outsider', family))).toBe(false);
          expect(await goesDirect('outsider', addressOf('plain', family))).toBe(false);
        }
        const unenrolled = await command('unenroll', '--pod', 'default/plain');
        expect(unenrolled, unenrolled.stderr).toMatchObject({ status: 0 });
        for (const family of families) {
          expect(await goesDirect('plain', addressOf('outsider', family))).toBe(true);
          expect(await goesDirect('outsider', addressOf('plain', family))).toBe(true);
        }
      });

      test.each(families)('IPv%i: DEL leaves the pod direct', async (family) => {
        if (family === 4) for (const pod of [client, open]) await topology.deleteOurs(pod);
        expect(await goesDirect('client', addressOf('outsider', family))).toBe(true);
        expect(await goesDirect('outsider', addressOf('client', family))).toBe(true);
        expect(await goesDirect('client', addressOf('plain', family))).toBe(true);
        // The other end is still enrolled.
        expect(await goesDirect('client', addressOf('server', family))).toBe(false);
      });

      test('DEL of the whole chain, twice, for every pod', async () => {
        for (const pod of [client, server, plain, open, proxy]) {
          await topology.deleteOurs(pod);
          await topology.delete(pod);
        }
        const left = counters(topology.stateDir).filter((one) => one.ifindex !== 0);
        expect(left).toEqual([]);
      });
    });
  });
}
