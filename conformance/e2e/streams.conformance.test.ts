// SPDX-License-Identifier: Apache-2.0
//
// What TCP is made of, through the redirection: every byte, whatever the packets look like. Hashes are taken at both ends.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { must, type Namespace, until } from '../netns.ts';
import { Capture } from './capture.ts';
import type { StreamOptions } from './endpoint.ts';
import { type Actor, Mesh } from './mesh.ts';
import { type Addresses, type Family, families, sysctl, type TopologyOptions } from './topology.ts';

const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';
const STREAMS = 8200;
const MEGABYTE = 1 << 20;
const MANY = LONG ? 9_000 : 1_500;
/** Behind two routers, the link between which takes packets of 1,280 bytes. */
const farAddress: Addresses = { 4: '10.97.2.2', 6: 'fd97:2::2' };

type Options = Pick<TopologyOptions, 'primary' | 'hook'>;

describe.each<Options>([
  { primary: 'ptp', hook: 'tcx' },
  { primary: 'bridge', hook: 'clsact' },
])('streams, $primary, $hook', ({ primary, hook }) => {
  let mesh: Mesh;
  let far: ReturnType<typeof behindRouters>;
  let seed = 1_000_000;

  beforeAll(async () => {
    mesh = await Mesh.start({
      primary,
      hook,
      client: { enroll: true, entry: { exclude: { outboundPorts: [STREAMS + 1] } } },
    });
    far = behindRouters(mesh);
    for (const actor of ['client', 'server', 'plain', 'outsider'] as const) {
      await mesh.endpoint(actor).serveStreams(STREAMS);
    }
    await far.endpoint.serveStreams(STREAMS);
    await far.endpoint.serveStreams(STREAMS + 1);
  });
  afterAll(() => mesh?.close());

  /** A stream that has to arrive whole at both ends, and to take the proxy. */
  const stream = async (from: Actor, to: Actor, family: Family, options: Partial<StreamOptions> = {}) => {
    seed += 2;
    const own = { bytes: MEGABYTE, seed, sourcePort: mesh.nextPort(), ...options };
    const outcome = await mesh.endpoint(from).stream(mesh.address(to, family), STREAMS, own);
    expect(outcome.got).toBe(outcome.expected);
    const arrived = await mesh.endpoint(to).streamResult(STREAMS, own.seed);
    expect(arrived).toEqual({ bytes: own.bytes, sha256: outcome.sent, end: 'FIN' });
    expect(mesh.haproxy.proxied().map(({ clientPort }) => clientPort)).toContain(own.sourcePort);
    return outcome;
  };
  const ways: [Actor, Actor][] = [
    ['client', 'outsider'],
    ['client', 'server'],
    ['outsider', 'server'],
  ];
  const everyWay = families.flatMap((family) => ways.map(([from, to]) => ({ family, from, to })));

  test.each(everyWay)('IPv$family: $from to $to, writes of 64 KB', ({ family, from, to }) =>
    stream(from, to, family, { bytes: 8 * MEGABYTE }).then(() => undefined),
  );

  test.each(everyWay)('IPv$family: $from to $to, writes of a few bytes', ({ family, from, to }) =>
    stream(from, to, family, { bytes: 20_000, write: 7 }).then(() => undefined),
  );

  test.each(everyWay)('IPv$family: $from to $to, the server half-closes first', ({ family, from, to }) =>
    stream(from, to, family, { first: 'server' }).then(() => undefined),
  );

  // In npm test each on one of the two topologies.
  const offloads = [
    { name: 'without TCP segmentation offload', offload: { tso: false } },
    { name: 'without any segmentation offload', offload: { tso: false, gso: false } },
    { name: 'without checksum offload', offload: { checksum: false, tso: false, gso: false } },
    { name: 'with receive offload', offload: { gro: true } },
  ];
  describe.each(LONG || primary === 'ptp' ? offloads : [])('$name', ({ offload }) => {
    const set = async (undo: boolean) => {
      const wanted = Object.fromEntries(Object.entries(offload).map(([name, on]) => [name, on !== undo]));
      const actors = [mesh.client.endpoint, mesh.server.endpoint, mesh.topology.outsider, mesh.proxy.endpoint];
      for (const endpoint of actors) await endpoint.offload('eth0', wanted);
    };
    beforeAll(() => set(false));
    afterAll(() => set(true));
    test.each(everyWay)('IPv$family: $from to $to', ({ family, from, to }) =>
      stream(from, to, family).then(() => undefined),
    );
  });

  const sizes = [
    { name: 'pods of 1,280 bytes', pods: 1280, proxy: 1500 },
    { name: 'pods of 9,000 bytes', pods: 9000, proxy: 1500 },
    { name: 'a proxy of 1,280 bytes', pods: 1500, proxy: 1280 },
    { name: 'a proxy of 9,000 bytes', pods: 1500, proxy: 9000 },
  ];
  describe.each(LONG || primary === 'bridge' ? sizes : [])('MTU: $name', (mtu) => {
    const set = (pods: number, proxy: number) => {
      for (const [pod, size] of [
        [mesh.client, pods],
        [mesh.server, pods],
        [mesh.proxy, proxy],
      ] as const) {
        mesh.topology.node.ip('link', 'set', pod.hostIfname, 'mtu', String(size));
        pod.netns.ip('link', 'set', 'eth0', 'mtu', String(size));
      }
    };
    beforeAll(() => set(mtu.pods, mtu.proxy));
    afterAll(() => set(1500, 1500));
    test.each(everyWay)('IPv$family: $from to $to', ({ family, from, to }) =>
      stream(from, to, family).then(() => undefined),
    );
  });

  test.each(everyWay)('IPv$family: $from to $to, ECN is negotiated with the proxy', async ({ family, from, to }) => {
    const namespaces = [mesh.client.netns, mesh.server.netns, mesh.topology.outside, mesh.proxy.netns];
    for (const namespace of namespaces) sysctl(namespace, { 'net.ipv4.tcp_ecn': 1 });
    expect(await stream(from, to, family)).toMatchObject({ ecn: true, ect: true });
    for (const namespace of namespaces) sysctl(namespace, { 'net.ipv4.tcp_ecn': 2 });
    expect(await stream(from, to, family)).toMatchObject({ ecn: false });
  });

  test.each(everyWay)(
    'IPv$family: $from to $to, keepalives are answered by the proxy',
    async ({ family, from, to }) => {
      const connection = await mesh.connect(from, mesh.address(to, family));
      const namespace = from === 'outsider' ? mesh.topology.outside : mesh[from as 'client'].netns;
      const capture = await Capture.start(mesh.topology.testbed, namespace, 'eth0', `keepalive${connection.localPort}`);
      await mesh.endpoint(from).keepalive(connection);
      const filter = `tcp and dst port ${connection.localPort}`;
      const answers = await capture.until('two answers', filter, (all) => all.length >= 2, 10_000);
      expect(answers.map(({ flags, length }) => [flags, length])).toEqual(answers.map(() => ['.', 0]));
      await capture.stop();
      await mesh.exchanged(connection, from);
    },
  );

  test.each(everyWay)('IPv$family: $from to $to, a RST of the client ends it at the proxy', async (way) => {
    const connection = await mesh.connect(way.from, mesh.address(way.to, way.family));
    expect(socketsOf(mesh.proxy.netns, connection.localPort)).not.toBe('');
    const before = mesh.counters();
    await mesh.endpoint(way.from).abort(connection);
    await until('the proxy has no such connection', () => socketsOf(mesh.proxy.netns, connection.localPort) === '');
    const dropped = Object.keys(mesh.moved(before)).filter((key) => key.includes(' drop_'));
    expect(dropped).toEqual([]);
  });

  test.each(families)(
    `IPv%i: ${MANY} connections at once, each with its own bytes`,
    { timeout: 240_000 },
    async (family) => {
      seed += 2;
      const first = seed;
      seed += 2 * MANY;
      const before = mesh.counters();
      const options = { count: MANY, bytes: 3_000, seed: first, timeout: 120_000 };
      const outcome = await mesh.client.endpoint.streams(mesh.address('outsider', family), STREAMS, options);
      expect(outcome).toEqual({ open: MANY, right: MANY, failures: {}, sent: expect.any(String) });
      expect(await mesh.topology.outsider.streamResults(STREAMS, first, MANY)).toBe(outcome.sent);
      const moved = mesh.moved(before);
      expect(moved['pod_egress redirected_outbound']).toBeGreaterThanOrEqual(MANY);
      expect(Object.keys(moved).filter((key) => key.includes(' drop_'))).toEqual([]);
    },
  );

  describe.each(families)('path MTU discovery over a link of 1,280 bytes, IPv%i', (family) => {
    test('a megabyte each way through the proxy, from the pod', async () => {
      seed += 2;
      const before = mesh.counters();
      const options = { bytes: MEGABYTE, seed, sourcePort: mesh.nextPort() };
      const outcome = await mesh.client.endpoint.stream(farAddress[family], STREAMS, options);
      expect(outcome).toMatchObject({ got: outcome.expected });
      expect(await far.endpoint.streamResult(STREAMS, seed)).toMatchObject({ bytes: MEGABYTE, sha256: outcome.sent });
      expect(mesh.moved(before, mesh.client)['pod_ingress to_proxy_icmp_error']).toBeGreaterThan(0);
      far.forget(mesh);
    });

    test('a megabyte each way through the proxy, to the pod', async () => {
      seed += 2;
      const before = mesh.counters();
      const outcome = await far.endpoint.stream(mesh.address('server', family), STREAMS, { bytes: MEGABYTE, seed });
      expect(outcome).toMatchObject({ got: outcome.expected });
      expect(await mesh.server.endpoint.streamResult(STREAMS, seed)).toMatchObject({ sha256: outcome.sent });
      expect(mesh.moved(before, mesh.server)['pod_ingress to_proxy_icmp_error']).toBeGreaterThan(0);
      far.forget(mesh);
    });

    test('a megabyte each way past the proxy: the pod learns it', async () => {
      seed += 2;
      const before = mesh.counters();
      const options = { bytes: MEGABYTE, seed };
      const outcome = await mesh.client.endpoint.stream(farAddress[family], STREAMS + 1, options);
      expect(outcome).toMatchObject({ got: outcome.expected });
      const moved = mesh.moved(before, mesh.client);
      expect(moved['pod_ingress to_proxy_icmp_error']).toBeUndefined();
      expect(moved['pod_egress pass_excluded_port']).toBe(1);
      const learned = mesh.client.netns.ip(`-${family}`, 'route', 'get', farAddress[family]);
      expect(learned).toContain('mtu 1280');
      far.forget(mesh);
    });
  });
});

/** What a namespace has open with `port` at one end, TIME_WAIT aside. */
function socketsOf(namespace: Namespace, port: number): string {
  return must(namespace.argv(['ss', '-Htan', 'state', 'connected', 'exclude', 'time-wait', `( dport = :${port} )`]));
}

/** outsider ---1280--- router ------ far. The outsider forwards. */
function behindRouters(mesh: Mesh) {
  const { topology } = mesh;
  const [router, end] = [topology.namespace('router'), topology.namespace('far')];
  const outside = topology.outside;
  for (const namespace of [router, outside])
    sysctl(namespace, { 'net.ipv4.ip_forward': 1, 'net.ipv6.conf.all.forwarding': 1 });
  topology.testbed.veth(
    { namespace: outside, ifname: 'narrow', addresses: ['10.97.1.1/24', 'fd97:1::1/64'] },
    {
      namespace: router,
      ifname: 'narrow',
      addresses: ['10.97.1.2/24', 'fd97:1::2/64'],
      gateways: ['10.97.1.1', 'fd97:1::1'],
    },
  );
  topology.testbed.veth(
    { namespace: router, ifname: 'wide', addresses: ['10.97.2.1/24', 'fd97:2::1/64'] },
    {
      namespace: end,
      ifname: 'eth0',
      addresses: [`${farAddress[4]}/24`, `${farAddress[6]}/64`],
      gateways: ['10.97.2.1', 'fd97:2::1'],
    },
  );
  for (const namespace of [outside, router]) namespace.ip('link', 'set', 'narrow', 'mtu', '1280');
  outside.ip('route', 'add', '10.97.2.0/24', 'via', '10.97.1.2');
  outside.ip('-6', 'route', 'add', 'fd97:2::/64', 'via', 'fd97:1::2');
  return {
    endpoint: topology.endpoint(end, 'far'),
    /** Nobody remembers the path any more. */
    forget(of: Mesh) {
      for (const namespace of [end, of.client.netns, of.server.netns, of.proxy.netns, topology.node])
        for (const family of families) namespace.ip(`-${family}`, 'route', 'flush', 'cache');
    },
  };
}
