// SPDX-License-Identifier: Apache-2.0
//
// Things that change while bytes are on their way: a pod is enrolled, a pod leaves, the proxy is replaced.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { until } from '../netns.ts';
import { Capture } from './capture.ts';
import type { StreamOutcome } from './endpoint.ts';
import { EndpointError } from './endpoint.ts';
import { HAProxy } from './haproxy.ts';
import { type Actor, Mesh } from './mesh.ts';
import { type Family, families, type Pod } from './topology.ts';

const STREAMS = 8200;
const BYTES = 12 << 20;

const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';
const kinds = [
  { primary: 'bridge', hook: 'clsact' },
  { primary: 'ptp', hook: 'tcx' },
] as const;

describe.each(LONG ? kinds : kinds.slice(0, 1))('under load, $primary, $hook', ({ primary, hook }) => {
  let mesh: Mesh;
  let atOutsider: Capture;
  let second: { pod: Pod; haproxy: HAProxy };
  let seed = 5_000_000;
  beforeAll(async () => {
    mesh = await Mesh.start({ primary, hook });
    for (const actor of ['client', 'server', 'plain', 'outsider'] as const) {
      await mesh.endpoint(actor).serveStreams(STREAMS);
    }
    atOutsider = await Capture.start(mesh.topology.testbed, mesh.topology.outside, 'eth0', 'outsider');
    // Slow enough that what is done meanwhile is done meanwhile: 12 MB take a second and more.
    for (const namespace of [mesh.topology.outside, mesh.plain.netns, mesh.client.netns, mesh.server.netns]) {
      const rate = ['rate', '80mbit', 'burst', '256kb', 'latency', '100ms'];
      namespace.run(['tc', 'qdisc', 'add', 'dev', 'eth0', 'root', 'tbf', ...rate]);
    }
  });
  afterAll(() => mesh?.close());

  interface Begun {
    from: Actor;
    to: Actor;
    seed: number;
    outcome: Promise<StreamOutcome>;
  }
  /** Streams on all these ways, in both families. */
  const begin = (ways: readonly (readonly [Actor, Actor])[]): Begun[] =>
    families.flatMap((family) =>
      ways.map(([from, to]) => {
        seed += 2;
        const options = { bytes: BYTES, seed, sourcePort: mesh.nextPort(), timeout: 60_000 };
        const outcome = mesh.endpoint(from).stream(mesh.address(to, family), STREAMS, options);
        return { from, to, seed, outcome };
      }),
    );
  /** Every one has arrived whole, at both ends. */
  const arrived = async (begun: readonly Begun[]) => {
    for (const one of begun) {
      const outcome = await one.outcome;
      expect(outcome.got, `${one.from} to ${one.to}`).toBe(outcome.expected);
      const got = await mesh.endpoint(one.to).streamResult(STREAMS, one.seed);
      expect(got).toEqual({ bytes: BYTES, sha256: outcome.sent, end: 'FIN' });
    }
  };
  const untilMoved = (pod: Pod, key: string, packets: number) => {
    const before = mesh.counters();
    return until(`${packets} ${key} at ${pod.label}`, () => (mesh.moved(before, pod)[key] ?? 0) >= packets, 20_000);
  };

  test('a running pod is enrolled: what was under way goes on direct, both ways', async () => {
    const older = begin([
      ['plain', 'outsider'],
      ['outsider', 'plain'],
    ]);
    const count = () => atOutsider.packets(`tcp and src host ${mesh.address('plain', 4)} and greater 200`).length;
    await until('bytes on their way', () => count() > 50);
    await mesh.commanded('enroll', '--netns', mesh.plain.netns.path, '--pod', 'default/plain');
    await untilMoved(mesh.plain, 'pod_egress pass_direct', 100);
    await untilMoved(mesh.plain, 'pod_ingress pass_direct', 100);
    expect(mesh.haproxy.proxied()).toEqual([]);
    // New ones do not.
    const newer = begin([['plain', 'outsider']]);
    await untilMoved(mesh.plain, 'pod_egress to_proxy_established', 100);
    await Promise.all([arrived(older), arrived(newer)]);
  });

  test('it leaves: what the proxy has goes on through it, and then the programs go', async () => {
    const held = begin([
      ['plain', 'outsider'],
      ['outsider', 'plain'],
    ]);
    await untilMoved(mesh.plain, 'pod_ingress to_proxy_established', 50);
    await mesh.commanded('unenroll', '--pod', 'default/plain');
    await untilMoved(mesh.plain, 'pod_egress to_proxy_established', 50);
    const newer = begin([['plain', 'outsider']]);
    await untilMoved(mesh.plain, 'pod_egress pass_draining', 2);
    await Promise.all([arrived(held), arrived(newer)]);
    const state = async () =>
      (JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; state: string }[]).find(
        ({ name }) => name === 'plain',
      )?.state;
    await until('the programs are gone', async () => {
      await mesh.commanded('status');
      return (await state()) === 'recorded';
    });
  });

  test('the proxy is replaced, pod and namespace: what the old one has goes on, nothing goes around', async () => {
    const ways = [
      ['client', 'outsider'],
      ['outsider', 'server'],
      ['client', 'server'],
    ] as const;
    const held = begin(ways);
    await untilMoved(mesh.client, 'pod_egress to_proxy_established', 50);
    const load = new Load(mesh, 15_000);
    const pod = mesh.topology.pod('ztunnel-2', { namespace: 'istio-system' });
    await mesh.topology.add(pod);
    const haproxy = new HAProxy(mesh.topology.testbed, pod.netns, 'second');
    second = { pod, haproxy };
    await haproxy.start();
    await until('the new proxy has connections', () => haproxy.proxied().length >= 4, 20_000);
    await arrived(held);
    // No connection was lost while both were there.
    expect(load.failures).toEqual([]);

    await mesh.haproxy.kill();
    await mesh.topology.delete(mesh.proxy);
    const before = haproxy.proxied().length;
    await until('it has more', () => haproxy.proxied().length >= before + 8, 20_000);
    await load.stop();
    expect(load.direct).toEqual([]);
    // Those that were in the old one when it was killed; never one that timed out.
    expect(load.failures.filter((code) => code === 'ETIMEDOUT')).toEqual([]);
    await arrived(begin(ways));
  });

  test('a gap without any proxy: nothing goes around, and all is well with the next', async () => {
    const load = new Load(mesh, 1_500);
    await until('load', () => load.begun >= 4, 20_000);
    await second.haproxy.kill();
    await mesh.topology.delete(second.pod);
    const gap = load.begun;
    await until('load in the gap', () => load.begun >= gap + 4, 20_000);
    const pod = mesh.topology.pod('ztunnel-3', { namespace: 'istio-system' });
    await mesh.topology.add(pod);
    const haproxy = new HAProxy(mesh.topology.testbed, pod.netns, 'third');
    await haproxy.start();
    await until('the next proxy has connections', () => haproxy.proxied().length >= 8, 20_000);
    await load.stop();
    expect(load.direct).toEqual([]);
    expect(load.failures.length).toBeGreaterThan(0);
    await arrived(begin([['client', 'server']]));
  });
});

/** Small connections in both directions and families, one after the other, until stop(). */
class Load {
  /** "from to family" of connections whose server saw the client's own port. */
  readonly direct: string[] = [];
  /** Errno names of those that did not end well. */
  readonly failures: string[] = [];
  begun = 0;
  readonly #mesh: Mesh;
  readonly #timeout: number;
  readonly #loops: Promise<void>[];
  #stopping = false;

  /** `timeout`: milliseconds for each connect. */
  constructor(mesh: Mesh, timeout: number) {
    this.#mesh = mesh;
    this.#timeout = timeout;
    this.#loops = families.flatMap((family) => [
      this.#loop('client', 'outsider', family),
      this.#loop('outsider', 'server', family),
    ]);
  }

  async #loop(from: Actor, to: Actor, family: Family): Promise<void> {
    const mesh = this.#mesh;
    while (!this.#stopping) {
      this.begun += 1;
      try {
        const connection = await mesh.connect(from, mesh.address(to, family), undefined, { timeout: this.#timeout });
        if (connection.seenPort === connection.localPort) this.direct.push(`${from} ${to} ${family}`);
        await mesh.exchanged(connection, from, 5_000);
      } catch (error) {
        if (!(error instanceof EndpointError)) throw error;
        this.failures.push(error.code);
      }
    }
  }

  async stop(): Promise<void> {
    this.#stopping = true;
    await Promise.all(this.#loops);
  }
}
