// SPDX-License-Identifier: Apache-2.0
//
// The same with ztunnel itself, where there is one: ZTUNNEL_BINARY, or "ztunnel" on PATH. It needs a build that takes
// FAKE_CA. No registry has one, so on most machines this file has nothing to do, and the summary of the tests says so.

import { accessSync, constants, writeFileSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { Capture } from '../e2e/capture.ts';
import { families, type Pod, requireExecutable, Topology } from '../e2e/topology.ts';
import { type Running, until } from '../netns.ts';
import { AgentSite } from './processes.ts';

const APP = 8080;
const NODE = 'node-1';
const CLUSTER = 'Kubernetes';

function find(): string | undefined {
  const named = process.env.ZTUNNEL_BINARY ?? '';
  const candidates =
    named !== '' ? [named] : (process.env.PATH ?? '').split(delimiter).map((dir) => join(dir, 'ztunnel'));
  return candidates.find((path) => {
    try {
      accessSync(path, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

const binary = find();
let topology: Topology | undefined;
afterEach(() => topology?.close());

/** What istiod would tell; names and addresses of the pods. */
function writeXds(path: string, pods: readonly Pod[]): void {
  const workloads = pods.map((pod) => ({
    uid: `${CLUSTER}//Pod/default/${pod.label}`,
    name: pod.label,
    namespace: 'default',
    serviceAccount: `${pod.label}-sa`,
    workloadIps: [pod.addresses[4], pod.addresses[6]],
    protocol: 'HBONE',
    node: NODE,
    network: '',
    services: {},
  }));
  // JSON is YAML.
  writeFileSync(path, JSON.stringify({ workloads, policies: [], services: [] }));
}

test.skipIf(binary === undefined)(
  'real ztunnel: two pods speak HBONE, sources kept; it survives the agent, and forgets a pod (optional)',
  { timeout: 120_000 },
  async () => {
    requireExecutable();
    topology = new Topology({
      primary: 'ptp',
      hook: 'tcx',
      rpFilter: 1,
      entry: { proxy: { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } } },
    });
    const site = new AgentSite(topology);
    const pods = ['client', 'server'].map((label) =>
      (topology as Topology).pod(label, { enroll: true, uid: `uid-${label}` }),
    );
    const [client, server] = pods as [Pod, Pod];
    site.know(client, server);
    for (const pod of pods) await topology.addPrimary(pod);
    const xds = join(topology.testbed.directory('xds'), 'local.yaml');
    writeXds(xds, pods);
    const agent = await site.agent('--ztunnel-wait-seconds', '30');
    const ztunnel: Running = topology.testbed.start(topology.node.argv([binary as string, 'proxy', 'ztunnel']), {
      PATH: process.env.PATH ?? '',
      INPOD_UDS: site.zdsSocket,
      LOCAL_XDS_PATH: xds,
      XDS_ADDRESS: '',
      FAKE_CA: 'true',
      NODE_NAME: NODE,
      CLUSTER_ID: CLUSTER,
      RUST_LOG: 'info',
    });
    for (const pod of pods) await topology.addOurs(pod);
    await server.endpoint.listen(APP);
    const seen = await Capture.start(topology.testbed, topology.node, client.hostIfname, 'client');
    const talk = async (family: 4 | 6) => {
      const connection = await client.endpoint.connect(server.addresses[family], APP, { timeout: 10_000 });
      await client.endpoint.exchange(connection, 20_000, 10_000);
      await client.endpoint.finish(connection);
      return connection.seen;
    };
    for (const family of families) expect(await talk(family), ztunnel.output).toBe(client.addresses[family]);
    await seen.until('HBONE', 'tcp port 15008', (packets) => packets.length > 0);
    expect(seen.packets(`tcp port ${APP}`)).toEqual([]);

    await agent.kill();
    expect(await talk(4)).toBe(client.addresses[4]);
    const again = await site.agent();
    const connections = async () =>
      (await again.get<{ zds: { connections: { phase: string; pods: number }[] } }>('/v1/status')).zds.connections;
    await until('it has connected again', async () => (await connections())[0]?.phase === 'live', 30_000);
    expect((await connections())[0]?.pods).toBe(2);
    expect(await talk(6)).toBe(client.addresses[6]);
    expect(seen.packets(`tcp port ${APP}`)).toEqual([]);

    await topology.deleteOurs(server);
    await until('it has forgotten the pod', async () => (await connections())[0]?.pods === 1);
    expect(ztunnel.alive, ztunnel.output).toBe(true);
  },
);
