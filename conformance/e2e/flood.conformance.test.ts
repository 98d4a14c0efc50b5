// SPDX-License-Identifier: Apache-2.0
//
// One pod's flood of new connections costs no other pod a connection: what was let go direct is remembered in a table
// of each pod's own, and for what is redirected the socket tables are the truth, the map only spares looking there.
// The tables are as small as they may be, so that a few hundred connections turn them over many times.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { counters, increases } from './counters.ts';
import type { Connection } from './endpoint.ts';
import { HAProxy, INNER_PORT } from './haproxy.ts';
import { families, outsiderAddress, type Pod, requireExecutable, Topology } from './topology.ts';

const PORT = INNER_PORT;
const FLOOD = 400;

describe('a flood', () => {
  let topology: Topology;
  let victim: Pod;
  let server: Pod;
  let flooder: Pod;
  let proxy: Pod;

  beforeAll(async () => {
    requireExecutable();
    // Strict reverse path filters: a reply whose way is not known would be dropped.
    topology = new Topology({
      primary: 'ptp',
      hook: 'tcx',
      rpFilter: 1,
      entry: { failurePolicy: 'open', maxFlows: 64, directFlowsPerPod: 16 },
    });
    victim = topology.pod('victim', { enroll: true });
    server = topology.pod('server', { enroll: true });
    flooder = topology.pod('flooder', { enroll: true });
    proxy = topology.pod('ztunnel-flood', { namespace: 'istio-system' });
    await topology.add(victim, server, flooder, proxy);
    for (const endpoint of [topology.outsider, server.endpoint]) await endpoint.listen(PORT);
  });
  afterAll(() => topology?.close());

  const held: { way: string; connection: Connection; direct: boolean }[] = [];
  const hold = async (way: string, address: string) => {
    const connection = await victim.endpoint.connect(address, PORT, { sourcePort: 20_000 + held.length });
    held.push({ way, connection, direct: connection.seenPort === connection.localPort });
  };
  const flood = async () => {
    const before = counters(topology.stateDir);
    for (const family of families) {
      await flooder.endpoint.many(outsiderAddress[family], PORT, FLOOD, 2_000);
      await flooder.endpoint.many(server.addresses[family], PORT, FLOOD, 2_000);
    }
    return increases(before, counters(topology.stateDir), flooder.hostIfindex);
  };
  const exchangeAll = async () => {
    for (const { connection } of held) await victim.endpoint.exchange(connection, 50_000);
  };

  test('of direct connections takes no place from another pod', async () => {
    for (const family of families) await hold(`IPv${family} direct to outside`, outsiderAddress[family]);
    expect(held.map(({ direct }) => direct)).toEqual([true, true]);
    const counted = await flood();
    expect(counted['pod_egress pass_failure_policy_open']).toBeGreaterThanOrEqual(4 * FLOOD);
    await exchangeAll();
  });

  test('of redirected connections takes no connection from another pod', async () => {
    const haproxy = new HAProxy(topology.testbed, proxy.netns, 'flood');
    await haproxy.start();
    for (const family of families) {
      await hold(`IPv${family} through the proxy to outside`, outsiderAddress[family]);
      await hold(`IPv${family} through the proxy to a pod`, server.addresses[family]);
    }
    expect(held.map(({ direct }) => direct)).toEqual([true, true, false, false, false, false]);
    const counted = await flood();
    expect(counted['pod_egress redirected_outbound']).toBeGreaterThanOrEqual(4 * FLOOD);
    await exchangeAll();
    for (const { connection } of held) expect(await victim.endpoint.finish(connection)).toBe('bye\n');
  });
});
