// SPDX-License-Identifier: Apache-2.0
//
// DNS capture: what enrolled pods ask any resolver on port 53 is answered by the proxy's listener, and looks as if the
// resolver had answered. Nothing listens on the resolvers' addresses.

import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Running, until } from '../netns.ts';
import { Capture } from './capture.ts';
import { Mesh } from './mesh.ts';
import { type Family, families, outsiderAddress } from './topology.ts';

const OTHER: Record<Family, string> = { 4: '10.99.0.77', 6: 'fd99::77' };

describe.each(['ptp', 'bridge'] as const)('DNS capture, %s', (primary) => {
  let mesh: Mesh;
  let resolver: Running;
  let atOutsider: Capture;
  let sourcePort = 25_000;

  const start = async () => {
    const { testbed } = mesh.topology;
    const program = join(import.meta.dirname, 'resolver.py');
    resolver = testbed.start(mesh.proxy.netns.argv(['/usr/bin/python3', program, '15053']));
    await until('the DNS server listens', () => {
      if (!resolver.alive) throw new Error(`it ended: ${resolver.output}`);
      return resolver.output.includes('ready');
    });
  };

  beforeAll(async () => {
    mesh = await Mesh.start({
      primary,
      hook: primary === 'ptp' ? 'tcx' : 'clsact',
      entry: { dnsCapture: true },
      server: { enroll: true, entry: { failurePolicy: 'open' } },
    });
    await mesh.topology.outsider.serveUDP(53);
    atOutsider = await Capture.start(mesh.topology.testbed, mesh.topology.outside, 'eth0', 'outsider');
    await start();
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: UDP, from the resolver that was asked', async (family) => {
    const before = mesh.counters();
    const [answer] = await mesh.client.endpoint.dns([[outsiderAddress[family], 'a.test', 0x1234]]);
    expect(answer).toEqual([outsiderAddress[family], 0x1234, `udp ${mesh.address('client', family)}`]);
    expect(mesh.moved(before, mesh.client)['pod_egress dns_captured']).toBe(1);
    expect(mesh.moved(before, mesh.proxy)['proxy_egress dns_answered']).toBe(1);
    expect(atOutsider.lines('udp port 53')).toEqual([]);
  });

  test.each(families)('IPv%i: TCP', async (family) => {
    const before = mesh.counters();
    const [answer] = await mesh.client.endpoint.dns([[OTHER[family], 'a.test', 1]], { transport: 'tcp' });
    expect(answer).toEqual([OTHER[family], 1, `tcp ${mesh.address('client', family)}`]);
    expect(mesh.moved(before, mesh.client)['pod_egress dns_captured']).toBe(1);
    expect(mesh.haproxy.proxied().filter((one) => one.destinationPort === 53)).toEqual([]);
  });

  test('UDP without a checksum', async () => {
    const [answer] = await mesh.client.endpoint.dns([[outsiderAddress[4], 'a.test', 7]], { checksum: false });
    expect(answer).toEqual([outsiderAddress[4], 7, `udp ${mesh.address('client', 4)}`]);
  });

  test.each(families)('IPv%i: two resolvers asked from one port are told apart', async (family) => {
    sourcePort += 1;
    const answers = await mesh.client.endpoint.dns(
      [
        [outsiderAddress[family], 'a.test', 1],
        [OTHER[family], 'a.test', 2],
      ],
      { sourcePort },
    );
    expect(answers.map(([from, id]) => [from, id]).sort((a, b) => Number(a[1]) - Number(b[1]))).toEqual([
      [outsiderAddress[family], 1],
      [OTHER[family], 2],
    ]);
  });

  test.each(families)('IPv%i: the same question to two resolvers at once (musl) is answered twice', async (family) => {
    sourcePort += 1;
    const both = [outsiderAddress[family], OTHER[family]];
    const answers = await mesh.client.endpoint.dns(
      both.map((resolver) => [resolver, 'a.test', 9] as [string, string, number]),
      { sourcePort },
    );
    // By port and id they are one question: each answer comes from a resolver that was asked.
    for (const [from, id] of answers) {
      expect(both).toContain(from);
      expect(id).toBe(9);
    }
    // And one after the other they are told apart.
    for (const resolver of both) {
      const [answer] = await mesh.client.endpoint.dns([[resolver, 'a.test', 9]], { sourcePort });
      expect(answer?.[0]).toBe(resolver);
    }
  });

  test.each(families)('IPv%i: an answer of 4 KB arrives in fragments', async (family) => {
    const atClient = await Capture.start(mesh.topology.testbed, mesh.client.netns, 'eth0', `fragments${family}`);
    const [answer] = await mesh.client.endpoint.dns([[outsiderAddress[family], '4000.big', 3]]);
    expect(answer).toEqual([outsiderAddress[family], 3, 'x'.repeat(4000)]);
    const filter = family === 4 ? 'ip[6:2] & 0x3fff != 0' : 'ip6[6] == 44';
    await until('the fragments were captured', () => atClient.lines(filter).length >= 3);
    await atClient.stop();
  });

  test('a hundred questions, no answer lost or mixed up', async () => {
    const questions = Array.from(
      { length: 100 },
      (_, id) => [id % 2 === 0 ? outsiderAddress[4] : OTHER[4], 'a.test', id] as [string, string, number],
    );
    const answers = await mesh.client.endpoint.dns(questions);
    expect(answers).toHaveLength(100);
    for (const [from, id] of answers) expect(from).toBe(id % 2 === 0 ? outsiderAddress[4] : OTHER[4]);
  });

  test.each(families)('IPv%i: nobody answers: closed drops, open asks the resolver itself', async (family) => {
    await resolver.stop('SIGKILL');
    const before = mesh.counters();
    await expect(
      mesh.client.endpoint.dns([[outsiderAddress[family], 'a.test', 5]], { timeout: 400 }),
    ).rejects.toMatchObject({ code: 'ETIMEDOUT' });
    expect(mesh.moved(before, mesh.client)['pod_egress drop_no_listener']).toBe(1);
    expect(await mesh.server.endpoint.udp(outsiderAddress[family], 53, 'question')).toBe(
      `${mesh.address('server', family)} question`,
    );
    expect(mesh.moved(before, mesh.server)['pod_egress pass_failure_policy_open']).toBe(1);
    await start();
    const [answer] = await mesh.server.endpoint.dns([[outsiderAddress[family], 'a.test', 6]]);
    expect(answer?.[2]).toBe(`udp ${mesh.address('server', family)}`);
  });

  test('a pod that is not enrolled asks its resolver', async () => {
    expect(await mesh.plain.endpoint.udp(outsiderAddress[4], 53, 'question')).toBe(
      `${mesh.address('plain', 4)} question`,
    );
  });
});
