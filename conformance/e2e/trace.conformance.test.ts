// SPDX-License-Identifier: Apache-2.0
//
// `trace`: every decision as it is made, filtered in the kernel, off when nobody listens.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { must, type Running, until } from '../netns.ts';
import { Mesh, PORT } from './mesh.ts';
import { executable, families } from './topology.ts';

describe('trace', () => {
  let mesh: Mesh;
  beforeAll(async () => {
    mesh = await Mesh.start();
  });
  afterAll(() => mesh?.close());

  const isOn = () => {
    const dump = must(['bpftool', '-j', 'map', 'dump', 'pinned', `${mesh.topology.stateDir}/trace`]);
    return Number.parseInt((JSON.parse(dump) as { value: string[] }[])[0]?.value[0] ?? '', 16) === 1;
  };
  const start = async (...args: string[]): Promise<Running> => {
    const { topology } = mesh;
    const directories = ['--state-dir', topology.stateDir, '--run-dir', topology.runDir];
    const running = topology.testbed.start(topology.node.argv([executable, 'trace', ...args, ...directories]));
    await until('the trace is on', () => {
      if (!running.alive) throw new Error(`trace ended: ${running.output}`);
      return isOn();
    });
    return running;
  };
  const lines = (running: Running) => running.output.split('\n').filter((line) => line !== '');

  test.each(families)('IPv%i: a connection as sentences', async (family) => {
    const running = await start();
    const connection = await mesh.connect('client', mesh.address('outsider', family));
    await mesh.exchanged(connection, 'client');
    const end = (address: string, port: number) => (family === 6 ? `[${address}]:${port}` : `${address}:${port}`);
    const from = end(mesh.address('client', family), connection.localPort);
    const to = end(mesh.address('outsider', family), PORT);
    const wanted = [
      `from default/client: TCP ${from} > ${to} SYN, `,
      `inside the proxy: TCP ${from} > ${to} SYN, `,
      `from proxy istio-system/ztunnel-1: TCP ${to} > ${from} SYN ACK, `,
      `to default/client: TCP ${to} > `,
    ];
    await until('the sentences', () => wanted.every((text) => running.output.includes(text))).catch((error: Error) => {
      throw new Error(`${error.message}: ${running.output}`);
    });
    const [syn = ''] = lines(running).filter((line) => line.includes(wanted[0] ?? ''));
    expect(syn).toMatch(/^\d\d:\d\d:\d\d\.\d{6} .* \d+ bytes: redirected_outbound by pod_egress$/);
    await running.stop('SIGINT');
    expect(isOn()).toBe(false);
  });

  test('--pod, --reason and --count', async () => {
    const running = await start(
      '--pod',
      'default/server',
      '--reason',
      'redirected_inbound',
      '--count',
      '2',
      '-o',
      'json',
    );
    await mesh.exchanged(await mesh.connect('client', mesh.address('outsider', 4)), 'client');
    const ports: number[] = [];
    for (const family of families) {
      const connection = await mesh.connect('outsider', mesh.address('server', family));
      ports.push(connection.localPort);
      await mesh.exchanged(connection, 'outsider');
    }
    await running.ended;
    const events = lines(running).map((line) => JSON.parse(line) as Record<string, unknown>);
    expect(events).toHaveLength(2);
    expect(events.map((event) => event.sourcePort)).toEqual(ports);
    for (const [index, family] of families.entries()) {
      expect(events[index]).toMatchObject({
        namespace: 'default',
        pod: 'server',
        program: 'pod_ingress',
        reason: 'redirected_inbound',
        protocol: 'TCP',
        source: mesh.address('outsider', family),
        destination: mesh.address('server', family),
        destinationPort: PORT,
        flags: expect.arrayContaining(['SYN']),
      });
      const age = Date.now() - Date.parse(String(events[index]?.time));
      expect(Math.abs(age)).toBeLessThan(30_000);
    }
    expect(isOn()).toBe(false);
  });

  test('what does not fit into the buffer is counted and said', async () => {
    const running = await start();
    running.kill('SIGSTOP');
    await mesh.client.endpoint.many(mesh.address('server', 4), PORT, 1000, 20_000);
    const connection = await mesh.connect('client', mesh.address('server', 4));
    await mesh.exchanged(connection, 'client', 30_000_000);
    running.kill('SIGCONT');
    await until('lost ones are said', () => /\d+ events? lost/.test(running.output));
    await running.stop('SIGINT');
    expect(isOn()).toBe(false);
  });

  test('a reader that has enough ends it', async () => {
    const { topology } = mesh;
    const directories = ['--state-dir', topology.stateDir, '--run-dir', topology.runDir];
    const script = '"$@" | head -n 1';
    const running = topology.testbed.start(
      topology.node.argv(['sh', '-c', script, 'sh', executable, 'trace', ...directories]),
    );
    await until('the trace is on', isOn);
    await mesh.exchanged(await mesh.connect('client', mesh.address('server', 4)), 'client');
    await until('one line came', () => lines(running).length === 1);
    await mesh.exchanged(await mesh.connect('client', mesh.address('server', 4)), 'client');
    await running.ended;
    expect(isOn()).toBe(false);
  });

  test('one at a time; a pod or a reason that is not there', async () => {
    const running = await start('--reason', 'drop_spoofed_source');
    expect(await mesh.command('trace')).toMatchObject({ status: 1, stderr: expect.stringContaining('another trace') });
    await running.stop('SIGTERM');
    expect(lines(running)).toEqual([]);
    expect(await mesh.command('trace', '--pod', 'default/plain')).toMatchObject({ status: 1 });
    expect(await mesh.command('trace', '--reason', 'whim')).toMatchObject({ status: 1 });
    expect(await mesh.command('trace', '--count', '0')).toMatchObject({ status: 2 });
    expect(isOn()).toBe(false);
  });
});
