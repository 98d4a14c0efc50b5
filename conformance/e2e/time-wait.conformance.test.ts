// SPDX-License-Identifier: Apache-2.0
//
// A client that uses its source port again while the proxy still remembers the connection (TIME_WAIT) connects with its
// first SYN, whoever closed first.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Capture } from './capture.ts';
import { isDirect, Mesh, PORT } from './mesh.ts';
import { families } from './topology.ts';

const ROUNDS = 5;

describe.each(['auto', 'no-sk-lookup'] as const)('TIME_WAIT, variant %s', (variant) => {
  let mesh: Mesh;
  let captures: Record<'client' | 'outsider', Capture>;
  beforeAll(async () => {
    mesh = await Mesh.start({ entry: { variant } });
    const { testbed } = mesh.topology;
    captures = {
      client: await Capture.start(testbed, mesh.topology.node, mesh.client.hostIfname, 'client'),
      outsider: await Capture.start(testbed, mesh.topology.node, 'outside0', 'outsider'),
    };
  });
  afterAll(() => mesh?.close());

  const ways = families.flatMap((family) =>
    (
      [
        ['client', 'outsider'],
        ['client', 'server'],
        ['outsider', 'server'],
      ] as const
    ).flatMap(([from, at]) =>
      (['the server', 'the client', 'the client with half-close'] as const).map((first) => ({
        family,
        from,
        at,
        first,
      })),
    ),
  );

  test.each(ways)('IPv$family: $from to $at, $first closes first', async ({ family, from, at, first }) => {
    const sourcePort = mesh.nextPort();
    const endpoint = mesh.endpoint(from);
    const before = mesh.counters();
    for (let round = 0; round < ROUNDS; round++) {
      const connection = await endpoint.connect(mesh.address(at, family), PORT, { sourcePort });
      expect(isDirect(connection)).toBe(false);
      if (first === 'the server') expect(await endpoint.request(connection, 'quit\n')).toBe('');
      else if (first === 'the client with half-close') expect(await endpoint.finish(connection)).toBe('bye\n');
      else {
        await endpoint.exchange(connection, 1000);
        await endpoint.abort(connection);
      }
    }
    const filter = `${family === 4 ? 'ip' : 'ip6'} and src port ${sourcePort}`;
    const isSyn = (packet: { flags: string }) => /^S[EW]*$/.test(packet.flags);
    const packets = await captures[from].until('the last SYN', filter, (seen) => seen.filter(isSyn).length >= ROUNDS);
    const reused = mesh.moved(before)['proxy_ingress proxy_time_wait'] ?? 0;
    if (variant === 'auto') expect(packets.filter(isSyn)).toHaveLength(ROUNDS);
    if (first !== 'the server') return;
    expect(reused).toBeGreaterThan(0);
    // Without the program the SYN is challenged and sent again: what this test would see if it did nothing.
    if (variant === 'no-sk-lookup') expect(packets.filter(isSyn).length).toBeGreaterThan(ROUNDS);
  });
});
