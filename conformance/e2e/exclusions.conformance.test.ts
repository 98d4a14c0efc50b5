// SPDX-License-Identifier: Apache-2.0
//
// Excluded ports, ranges and prefixes: of the node, of a pod's annotations, and changed while connections are open.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { isDirect, Mesh, PORT } from './mesh.ts';
import { families } from './topology.ts';

const NODE_PORT = 7001;
const POD_PORT = 7002;
const IN_RANGE = 7107;
const AFTER_RANGE = 7108;

describe.each(['tcx', 'clsact'] as const)('exclusions, %s', (hook) => {
  let mesh: Mesh;
  beforeAll(async () => {
    mesh = await Mesh.start(
      {
        hook,
        entry: { exclude: { inboundPorts: [NODE_PORT], outboundPorts: [NODE_PORT] } },
        client: {
          enroll: true,
          entry: {
            runtimeConfig: {
              'io.kubernetes.cri.pod-annotations': {
                'ambient-redirect/enroll': 'true',
                'traffic.sidecar.istio.io/excludeOutboundPorts': `${POD_PORT}, 7100-${IN_RANGE}`,
                'traffic.sidecar.istio.io/excludeInboundPorts': `7100-${IN_RANGE}`,
                'traffic.sidecar.istio.io/excludeOutboundIPRanges': '10.88.0.1/32,fd88::1/128',
              },
            },
          },
        },
      },
      [PORT, NODE_PORT, POD_PORT, IN_RANGE, AFTER_RANGE],
    );
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: outbound ports and ranges, of the node and of the pod', async (family) => {
    const outsider = mesh.address('outsider', family);
    for (const [port, direct] of [
      [NODE_PORT, true],
      [POD_PORT, true],
      [IN_RANGE, true],
      [AFTER_RANGE, false],
      [PORT, false],
    ] as const) {
      const before = mesh.counters();
      expect(await mesh.goesDirect('client', outsider, port), `port ${port}`).toBe(direct);
      expect(mesh.moved(before, mesh.client)['pod_egress pass_excluded_port']).toBe(direct ? 1 : undefined);
    }
    // The pod's own are nobody else's.
    expect(await mesh.goesDirect('server', outsider, NODE_PORT)).toBe(true);
    expect(await mesh.goesDirect('server', outsider, POD_PORT)).toBe(false);
  });

  test.each(families)('IPv%i: inbound ports and ranges', async (family) => {
    const client = mesh.address('client', family);
    for (const [port, direct] of [
      [NODE_PORT, true],
      [IN_RANGE, true],
      [POD_PORT, false],
      [AFTER_RANGE, false],
    ] as const) {
      const before = mesh.counters();
      expect(await mesh.goesDirect('outsider', client, port), `port ${port}`).toBe(direct);
      expect(mesh.moved(before, mesh.client)['pod_ingress pass_excluded_port']).toBe(direct ? 1 : undefined);
    }
  });

  test.each(families)('IPv%i: outbound prefixes', async (family) => {
    const before = mesh.counters();
    expect(await mesh.goesDirect('client', mesh.address('host', family))).toBe(true);
    expect(mesh.moved(before, mesh.client)['pod_egress pass_excluded_cidr']).toBe(1);
    expect(await mesh.goesDirect('server', mesh.address('host', family))).toBe(false);
  });

  test('an excluded outbound port still goes through the proxy where the other pod takes it in', async () => {
    expect(await mesh.goesDirect('client', mesh.address('server', 4), POD_PORT)).toBe(false);
    expect(await mesh.goesDirect('client', mesh.address('server', 4), NODE_PORT)).toBe(true);
  });

  test('a value that does not parse: code 7 with the key and the value', async () => {
    const pod = mesh.topology.pod('wrong', {
      enroll: true,
      entry: {
        runtimeConfig: {
          'io.kubernetes.cri.pod-annotations': {
            'ambient-redirect/enroll': 'true',
            'traffic.sidecar.istio.io/excludeOutboundPorts': '80-',
          },
        },
      },
    });
    await mesh.topology.addPrimary(pod);
    await expect(mesh.topology.addOurs(pod)).rejects.toThrow(/"code":7.*excludeOutboundPorts.*80-/);
  });

  test('changed while they are open, connections go on as they began', async () => {
    const { server } = mesh;
    const enroll = (...options: string[]) => mesh.commanded('enroll', '--netns', server.netns.path, ...options);
    const hold = () =>
      Promise.all(
        families.flatMap((family) =>
          (
            [
              ['server', 'outsider'],
              ['outsider', 'server'],
            ] as const
          ).map(async ([from, at]) => ({
            from,
            connection: await mesh.connect(from, mesh.address(at, family), AFTER_RANGE),
          })),
        ),
      );
    type Held = Awaited<ReturnType<typeof hold>>;
    const all = (held: Held) => held.map((one) => isDirect(one.connection));
    const alive = (held: Held) =>
      Promise.all(held.map(({ from, connection }) => mesh.endpoint(from).exchange(connection, 100_000)));

    const proxied = await hold();
    expect(all(proxied)).toEqual([false, false, false, false]);
    // Data in flight while it is changed.
    const [changed] = await Promise.all([
      enroll('--exclude-outbound-ports', `7100-${AFTER_RANGE}`, '--exclude-inbound-ports', `${AFTER_RANGE}`),
      alive(proxied),
    ]);
    expect(changed).toContain('enrolled');
    const direct = await hold();
    expect(all(direct)).toEqual([true, true, true, true]);
    await alive(proxied);
    await Promise.all([enroll('--exclude-outbound-cidrs', '10.99.0.0/16,fd99::/16'), alive(direct), alive(proxied)]);
    const third = await hold();
    expect(all(third)).toEqual([true, false, true, false]);
    for (const held of [proxied, direct, third]) await alive(held);
    await enroll();
    expect(all(await hold())).toEqual([false, false, false, false]);
    for (const { from, connection } of [...proxied, ...direct, ...third]) await mesh.exchanged(connection, from);
  });

  test('ADD again changes nothing for connections, and brings back the exclusions that CHECK misses', async () => {
    await mesh.topology.checkOurs(mesh.client);
    await expect(mesh.topology.checkOurs(mesh.server)).rejects.toThrow(/exclusions of .* is not as ADD left it/);
    await mesh.topology.addOurs(mesh.server);
    await mesh.topology.checkOurs(mesh.server);
    const held = await mesh.connect('client', mesh.address('outsider', 4));
    const heldIn = await mesh.connect('outsider', mesh.address('client', 6));
    await Promise.all([
      mesh.topology.addOurs(mesh.client),
      mesh.endpoint('client').exchange(held, 2_000_000),
      mesh.endpoint('outsider').exchange(heldIn, 2_000_000),
    ]);
    await mesh.exchanged(held, 'client');
    await mesh.exchanged(heldIn, 'outsider');
    expect(await mesh.goesDirect('client', mesh.address('outsider', 4), POD_PORT)).toBe(true);
    await mesh.topology.checkOurs(mesh.client);
  });
});
