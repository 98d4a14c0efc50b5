// SPDX-License-Identifier: Apache-2.0
// A ztunnel as the proxy inside both pods: the one that ZTUNNEL_BINARY names, or in tests one that stands in for it.
// This process tells it of the pods over ZDS, as a node agent does, whatever redirects their traffic to it.

import { accessSync, constants, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import { ZdsServer, type ZdsWorkload } from '../../plugin/zds/server.ts';
import type { Pod } from '../e2e/topology.ts';
import { must, type Namespace, type Testbed, until } from '../netns.ts';
import { nativeCount, type ProxyCount, type RunningProxy } from './proxies.ts';

export interface Ztunnel {
  kind: 'binary' | 'stand-in';
  path: string;
}

const NODE = 'node-1';
const CLUSTER = 'Kubernetes';
const NAMESPACE = 'default';

/** What ZTUNNEL_BINARY names; throws if that cannot be run. It needs to be a build that takes FAKE_CA. */
export function givenZtunnel(): Ztunnel | undefined {
  const path = process.env.ZTUNNEL_BINARY ?? '';
  if (path === '') return undefined;
  accessSync(path, constants.X_OK);
  return { kind: 'binary', path };
}

/** ztunnel-stand-in.ts, with the bench's own native program (programs.ts). */
export const standInZtunnel = (peer: string): Ztunnel => ({ kind: 'stand-in', path: peer });

/** By pod and listener. A ztunnel does not say how many bytes until a connection has ended. */
type Counts = Record<string, ProxyCount>;

interface Started {
  argv: string[];
  environment: Record<string, string>;
  count: () => Counts;
}

const none = (): ProxyCount[string] => ({ accepted: 0, connected: 0, failed: 0, bytes: null });

const STAND_IN = join(import.meta.dirname, 'ztunnel-stand-in.ts');

function standIn(peer: string, socket: string, directory: string, pods: readonly Pod[]): Started {
  return {
    argv: [process.execPath, STAND_IN, socket, directory, peer],
    environment: { PATH: process.env.PATH ?? '' },
    count: () =>
      Object.fromEntries(labels(pods).map((label) => [label, nativeCount(join(directory, label), LISTENERS)])),
  };
}

/** As ztunnel-stand-in.ts has them. */
const LISTENERS = ['outbound', 'inbound', 'hbone'];

/** `istio_tcp_connections_opened_total` of ztunnel's metrics, by who reports. */
export function parseMetrics(text: string, pods: readonly string[]): Counts {
  const counts: Counts = Object.fromEntries(pods.map((pod) => [pod, { outbound: none(), inbound: none() }]));
  for (const [, labels = '', value] of text.matchAll(/^istio_tcp_connections_opened_total\{([^}]*)\} (\d+)/gm)) {
    const label = (name: string) => new RegExp(`(?:^|,)${name}="([^"]*)"`).exec(labels)?.[1] ?? '';
    const source = label('reporter') === 'source';
    const count = counts[label(source ? 'source_workload' : 'destination_workload')]?.[source ? 'outbound' : 'inbound'];
    if (count) count.accepted += Number(value);
  }
  return counts;
}

function binary(path: string, socket: string, directory: string, node: Namespace, pods: readonly Pod[]): Started {
  const xds = join(directory, 'local.yaml');
  const workloads = pods.map((pod) => ({
    uid: `${CLUSTER}//Pod/${NAMESPACE}/${pod.label}`,
    name: pod.label,
    namespace: NAMESPACE,
    serviceAccount: pod.label,
    workloadName: pod.label,
    workloadIps: Object.values(pod.addresses),
    protocol: 'HBONE',
    node: NODE,
    network: '',
    services: {},
  }));
  writeFileSync(xds, JSON.stringify({ workloads, policies: [], services: [] }));
  return {
    argv: [path, 'proxy', 'ztunnel'],
    environment: {
      PATH: process.env.PATH ?? '',
      INPOD_UDS: socket,
      LOCAL_XDS_PATH: xds,
      XDS_ADDRESS: '',
      FAKE_CA: 'true',
      NODE_NAME: NODE,
      CLUSTER_ID: CLUSTER,
      RUST_LOG: 'warn',
    },
    count: () => parseMetrics(must(node.argv(['curl', '-sf', 'http://127.0.0.1:15020/metrics'])), labels(pods)),
  };
}

const labels = (pods: readonly Pod[]) => pods.map(({ label }) => label);

function workload(pod: Pod): ZdsWorkload {
  const { dev, ino } = statSync(pod.netns.path, { bigint: true });
  return {
    uid: pod.label,
    names: { name: pod.label, namespace: NAMESPACE, serviceAccount: pod.label },
    netns: { dev, ino },
    openNetns: () => loadNative().openNetns(pod.netns.path),
  };
}

/** Starts it on the node and waits until it has acknowledged the pods and listens in them. By pod. */
export async function startZtunnel(
  ztunnel: Ztunnel,
  testbed: Testbed,
  node: Namespace,
  directory: string,
  pods: readonly Pod[],
): Promise<Record<string, RunningProxy>> {
  const socket = join(directory, 'ztunnel.sock');
  const workloads = pods.map(workload);
  const server = ZdsServer.start(loadNative(), {
    path: socket,
    workloads: () => workloads,
    workload: (uid) => workloads.find((one) => one.uid === uid),
    known: Promise.resolve(),
    events: { log() {}, message() {}, connected() {}, changed() {} },
  });
  testbed.defer(() => server.close());
  const { argv, environment, count } =
    ztunnel.kind === 'binary'
      ? binary(ztunnel.path, socket, directory, node, pods)
      : standIn(ztunnel.path, socket, directory, pods);
  const running = testbed.start(node.argv(argv), environment);
  await until(
    `ztunnel serves ${labels(pods).join(' and ')}`,
    () => {
      if (!running.alive) throw new Error(`ztunnel ended: ${running.output}`);
      return pods.every(
        ({ label, netns }) => server.answerOf(label) === null && /:15001\s/.test(netns.run(['ss', '-Hltn'])),
      );
    },
    20_000,
  );
  const stop = () => running.stop('SIGKILL');
  return Object.fromEntries(
    pods.map(({ label }) => [label, { pid: running.pid, stop, count: () => count()[label] ?? {} }]),
  );
}
