// SPDX-License-Identifier: Apache-2.0
//
// Every way through the node, for one variant of the programs: the table that each of them has to pass, on this kernel
// and on others (conformance/kernels).

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { until } from '../netns.ts';
import { TUNNELLED_PORT } from './haproxy.ts';
import { type Actor, isDirect, Mesh, PORT } from './mesh.ts';
import { clusterAddress, type Family, families } from './topology.ts';

export interface Site {
  variant: 'auto' | 'no-redirect-peer' | 'no-sk-lookup' | 'no-sk-assign' | 'full-sockets-only';
  primary: 'ptp' | 'bridge';
  hook: 'tcx' | 'clsact';
}

interface Way {
  name: string;
  from: Actor;
  to: (family: Family) => string;
  port?: number;
  listeners: readonly string[];
}

export function everyWay({ variant, primary, hook }: Site): void {
  describe(`variant ${variant}, ${primary}, ${hook}`, () => {
    let mesh: Mesh;
    beforeAll(async () => {
      mesh = await Mesh.start({ primary, hook, entry: { variant } });
      mesh.topology.service(clusterAddress, 8000, mesh.server, PORT);
    });
    afterAll(() => mesh?.close());

    const to = (actor: Actor) => (family: Family) => mesh.address(actor, family);
    const ways: Way[] = [
      { name: 'pod to pod', from: 'client', to: to('server'), listeners: ['outbound'] },
      { name: 'pod to outside', from: 'client', to: to('outsider'), listeners: ['outbound'] },
      { name: 'pod to a pod that is not enrolled', from: 'client', to: to('plain'), listeners: ['outbound'] },
      { name: 'pod to the node', from: 'client', to: to('host'), listeners: ['outbound'] },
      { name: 'outside to pod', from: 'outsider', to: to('server'), listeners: ['inbound'] },
      { name: 'outside to pod, HBONE', from: 'outsider', to: to('server'), port: 15008, listeners: ['hbone'] },
      { name: 'two legs', from: 'client', to: to('server'), port: TUNNELLED_PORT, listeners: ['outbound', 'hbone'] },
      {
        name: 'pod to a service',
        from: 'client',
        to: (family) => clusterAddress[family],
        port: 8000,
        listeners: ['outbound', 'inbound'],
      },
      { name: 'probe', from: 'host', to: to('server'), listeners: [] },
      { name: 'outside to a pod that is not enrolled', from: 'outsider', to: to('plain'), listeners: [] },
    ];

    test.each(families.flatMap((family) => ways.map((way) => ({ family, ...way }))))(
      'IPv$family: $name',
      async ({ family, from, to, port = PORT, listeners }) => {
        const before = mesh.haproxy.proxied().length;
        const connection = await mesh.connect(from, to(family), port);
        const counted = mesh.counters();
        await mesh.exchanged(connection, from, 200_000).catch((error: Error) => {
          throw new Error(`${error.message}; counted: ${JSON.stringify(mesh.moved(counted))}`);
        });
        await until('HAProxy has logged it', () => mesh.haproxy.proxied().length >= before + listeners.length);
        expect(
          mesh.haproxy
            .proxied()
            .slice(before)
            .map(({ listener }) => listener),
        ).toEqual(listeners);
        expect(isDirect(connection)).toBe(listeners.length === 0);
      },
    );

    test.each(families)('IPv%i: a source port is used again at once', async (family) => {
      const sourcePort = mesh.nextPort();
      for (let round = 0; round < 3; round++) {
        const connection = await mesh.client.endpoint.connect(mesh.address('outsider', family), PORT, { sourcePort });
        expect(isDirect(connection)).toBe(false);
        expect(await mesh.client.endpoint.request(connection, 'quit\n')).toBe('');
      }
    });

    test.each(families)('IPv%i: many at once, and the proxy dies', async (family) => {
      const many = await mesh.client.endpoint.many(mesh.address('server', family), PORT, 100, 10_000);
      expect(many).toEqual({ answered: 100, failures: {}, sources: [mesh.address('client', family)] });
      await mesh.haproxy.kill();
      expect(await mesh.refused('client', mesh.address('outsider', family))).toBe('ETIMEDOUT');
      expect(await mesh.goesDirect('host', mesh.address('server', family))).toBe(true);
      await mesh.haproxy.start();
      expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(false);
    });

    test('DEL of the proxy leaves nothing in its namespace', async () => {
      await mesh.topology.deleteOurs(mesh.proxy);
      expect(mesh.proxy.netns.run(['nft', 'list', 'ruleset'])).toBe('');
      expect(mesh.proxy.netns.ip('rule')).not.toMatch(/41905/);
    });
  });
}
