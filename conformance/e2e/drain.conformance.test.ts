// SPDX-License-Identifier: Apache-2.0
//
// unenroll: new connections go direct at once, those that the proxy has go on, and then the programs go.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { until } from '../netns.ts';
import { isDirect, Mesh } from './mesh.ts';
import { families } from './topology.ts';

describe.each(['tcx', 'clsact'] as const)('drain, %s', (hook) => {
  let mesh: Mesh;
  beforeAll(async () => {
    mesh = await Mesh.start({ hook });
  });
  afterAll(() => mesh?.close());

  const ways = families.flatMap((family) => [
    { family, from: 'client' as const, at: 'outsider' as const },
    { family, from: 'client' as const, at: 'server' as const },
    { family, from: 'outsider' as const, at: 'client' as const },
    { family, from: 'server' as const, at: 'client' as const },
  ]);
  const hold = () =>
    Promise.all(
      ways.map(async ({ family, from, at }) => ({
        from,
        at,
        connection: await mesh.connect(from, mesh.address(at, family)),
      })),
    );
  const shown = async () => {
    const list = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as {
      name: string;
      state: string;
      draining: boolean;
    }[];
    return list.find(({ name }) => name === 'client');
  };
  const enroll = () => mesh.commanded('enroll', '--netns', mesh.client.netns.path, '--pod', 'default/client');

  test('connections that the proxy has go on, then the programs go', async () => {
    const held = await hold();
    expect(held.map(({ connection }) => isDirect(connection))).toEqual(ways.map(() => false));
    const alive = () =>
      Promise.all(held.map(({ from, connection }) => mesh.endpoint(from).exchange(connection, 200_000)));
    // Data in flight.
    const [output] = await Promise.all([mesh.commanded('unenroll', '--pod', 'default/client'), alive()]);
    expect(output).toMatch(/^draining default\/client: .* \d+ sockets/);
    expect(await shown()).toMatchObject({ state: 'attached', draining: true });
    const before = mesh.counters();
    for (const family of families) {
      expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(true);
      expect(await mesh.goesDirect('outsider', mesh.address('client', family))).toBe(true);
      // The other end is enrolled still.
      expect(await mesh.goesDirect('client', mesh.address('server', family))).toBe(false);
    }
    expect(mesh.moved(before, mesh.client)['pod_egress pass_draining']).toBe(4);
    await alive();
    await mesh.commanded('status');
    expect(await shown()).toMatchObject({ state: 'attached', draining: true });
    for (const { from, connection } of held) await mesh.exchanged(connection, from);
    // The proxy's last sockets go a moment after their peers'.
    for (const end = Date.now() + 5_000; (await shown())?.state === 'attached' && Date.now() < end; ) {
      await mesh.commanded('status');
    }
    expect(await shown()).toMatchObject({ state: 'recorded', draining: false });
    for (const { family, from, at } of ways) {
      if (at === 'server' || from === 'server') continue;
      expect(await mesh.goesDirect(from, mesh.address(at, family))).toBe(true);
    }
    expect(mesh.moved(mesh.counters(), mesh.client)).toEqual({});
  });

  test('enrolled again while it drains: nothing happened', async () => {
    await enroll();
    const held = await hold();
    await mesh.commanded('unenroll', '--pod', 'default/client');
    const direct = await mesh.connect('client', mesh.address('outsider', 4));
    expect(isDirect(direct)).toBe(true);
    await enroll();
    expect(await shown()).toMatchObject({ state: 'attached', draining: false });
    expect(await mesh.goesDirect('client', mesh.address('outsider', 4))).toBe(false);
    await mesh.exchanged(direct, 'client');
    for (const { from, connection } of held) await mesh.exchanged(connection, from);
  });

  test.each(families)(
    'IPv%i: opened meanwhile from the port of a flow that the proxy had: goes on direct',
    async (family) => {
      await enroll();
      const proxied = await mesh.connect('client', mesh.address('outsider', family));
      expect(isDirect(proxied)).toBe(false);
      // The server closes first, so that the port is free at once.
      await mesh.endpoint('client').request(proxied, 'quit\n');
      await mesh.commanded('unenroll', '--pod', 'default/client');
      await until('the programs are gone', async () => {
        await mesh.commanded('status');
        return (await shown())?.state === 'recorded';
      });
      const sourcePort = proxied.localPort;
      const direct = await mesh.connect('client', mesh.address('outsider', family), undefined, { sourcePort });
      expect(isDirect(direct)).toBe(true);
      await enroll();
      await mesh.exchanged(direct, 'client');
      expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(false);
    },
  );

  test('--no-drain cuts', async () => {
    const held = await mesh.connect('client', mesh.address('outsider', 4));
    const output = await mesh.commanded('unenroll', '--no-drain', '--pod', 'default/client');
    expect(output).toMatch(/^unenrolled /);
    expect(await shown()).toMatchObject({ state: 'recorded' });
    await expect(mesh.endpoint('client').exchange(held, 1_000, 2_000)).rejects.toMatchObject({
      code: expect.stringMatching(/^(ECONNRESET|EPIPE|ETIMEDOUT)$/),
    });
    expect(await mesh.goesDirect('client', mesh.address('outsider', 4))).toBe(true);
  });

  test('nothing to drain: gone at once', async () => {
    await mesh.commanded('enroll', '--netns', mesh.plain.netns.path, '--pod', 'default/plain');
    expect(await mesh.commanded('unenroll', '--pod', 'default/plain')).toMatch(/^unenrolled /);
    expect(await mesh.goesDirect('plain', mesh.address('outsider', 4))).toBe(true);
  });
});
