// SPDX-License-Identifier: Apache-2.0
// Section 1: the mesh comes to nodes with running pods, and the namespace goes in and out.

import { until } from '../netns.ts';
import type { PodObject } from './cluster.ts';
import { type Ground, ONE, PORT, SERVER, SHOP, TWO } from './ground.ts';
import { clusterService, namespace, pod, role, SYSTEM, ztunnel } from './manifests.ts';
import { address, ask, expectWay, logLines, sightings } from './mesh.ts';
import { DNS_SERVICE } from './node.ts';

const AMBIENT_LINE = 'ambient Writing ambient config: {"ztunnelReady":true,"redirectMode":"eBPF"}';
const RAW_PORT = 8081;
const PROBED = ['probed-1', 'probed-2'] as const;

/** Pods that live through all sections, from before anything of ours is there. */
export async function before(ground: Ground): Promise<boolean> {
  const { step, cluster } = ground;
  const up = await step('workloads run on both nodes, before anything of ours is there', async () => {
    const names = [
      ['client', ONE],
      ['near', ONE],
      ['far', TWO],
    ] as const;
    await cluster.apply(namespace(SHOP), namespace(SYSTEM));
    await cluster.apply(
      ...names.map(([name, node]) => pod({ namespace: SHOP, name, node, ...SERVER })),
      clusterService(SHOP, 'near', PORT),
      clusterService(SHOP, 'far', PORT),
    );
    for (const [name] of names) ground.keep(await cluster.untilReady(SHOP, name));
  });
  if (!up) return false;
  const direct = 'pod to pod, on one node and across, and through Service addresses (kube-proxy): direct';
  return step(direct, () => ground.traffic(false));
}

/** ztunnel and the chart, on nodes whose pods run. */
export async function install(ground: Ground): Promise<boolean> {
  const { step, section, cluster, contract } = ground;
  section('1 Install on nodes with running pods');
  await step('ztunnel as a DaemonSet runs on both nodes', async () => {
    await cluster.apply(...ztunnel(contract));
    await cluster.untilAllReady(SYSTEM, 'app=ztunnel', 2);
  });
  return step('helm install: the agent is ready on both nodes', async () => {
    await cluster.helm(['install', ...ground.release(cluster.images.current.version)]);
    await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
  });
}

export async function enrol(ground: Ground): Promise<void> {
  const { step, cluster, contract } = ground;
  if (contract === 'shared') {
    await step('the line of Istio’s document is in the agents’ logs, read through the API', async () => {
      for (const { metadata } of await cluster.pods(SYSTEM, 'k8s-app=istio-cni-node')) {
        const said = async () => {
          const log = await cluster.logs(SYSTEM, metadata.name, 'agent');
          return log.split('\n').some((line) => says(line, AMBIENT_LINE));
        };
        await until(`${metadata.name} says ${AMBIENT_LINE}`, said, 20_000);
      }
    });
  }
  await step('the namespace is not labelled: traffic goes direct', () => ground.traffic(false));
  await step('the namespace is labelled: every running pod is annotated', async () => {
    await ground.label('ambient');
    await ground.untilAnnotated('enabled');
  });
  await step('pod to pod, on one node and across, and through Service addresses: by the proxies', () =>
    ground.traffic(true),
  );
  await step('HTTP, TCP and startup probes reach enrolled pods from the node itself, past the proxy', () =>
    probes(ground),
  );
  await step('names: DNS of an enrolled pod is answered, the connection to the name goes by the proxies', () =>
    names(ground),
  );
  await step('the namespace is not labelled any more: annotations go, new connections are direct', async () => {
    await ground.label(null);
    await ground.untilAnnotated(undefined);
    await ground.traffic(false);
  });
  await step('labelled again', async () => {
    await ground.label('ambient');
    await ground.untilAnnotated('enabled');
    await ground.traffic(true);
  });
}

async function probes(ground: Ground): Promise<void> {
  const { cluster } = ground;
  const container = {
    startupProbe: { httpGet: { path: '/startup', port: PORT }, periodSeconds: 1, failureThreshold: 60 },
    livenessProbe: { httpGet: { path: '/liveness', port: PORT }, periodSeconds: 1 },
    readinessProbe: { tcpSocket: { port: RAW_PORT }, periodSeconds: 1 },
  };
  const command = role('serve', String(PORT), String(RAW_PORT));
  const pods: PodObject[] = [];
  for (const [index, name] of PROBED.entries()) {
    pods.push(await ground.run({ name, node: [ONE, TWO][index] as string, command, container }));
  }
  await ground.untilAnnotated('enabled');
  for (const one of pods) {
    const node = cluster.node(one.spec.nodeName);
    const own = new Set(await node.addresses());
    const at = Date.now();
    const seen = () => logLines(cluster, one).filter((line) => Number(line.at) > at);
    await until(
      `${one.metadata.name} is probed while it is enrolled`,
      () => seen().some(({ url }) => url === '/liveness') && seen().some(({ connected }) => connected !== undefined),
      20_000,
    );
    const startup = logLines(cluster, one).filter(({ url }) => url === '/startup');
    if (startup.length === 0) throw new Error(`${one.metadata.name} saw no startup probe`);
    for (const { client, connected } of [...seen(), ...startup]) {
      const source = String(client ?? connected);
      if (!own.has(source)) throw new Error(`a probe of ${one.metadata.name} came from ${source}, not from the node`);
    }
    const proxied = sightings(cluster).filter(({ source, at: when }) => own.has(source) && when > at);
    if (proxied.length > 0) throw new Error(`a proxy saw the node's connection: ${JSON.stringify(proxied[0])}`);
    const now = await cluster.untilReady(SHOP, one.metadata.name);
    const restarts = now.status.containerStatuses?.[0]?.restartCount;
    if (restarts !== 0) throw new Error(`${one.metadata.name} was restarted ${restarts} times`);
  }
  for (const name of PROBED) await ground.delete(name);
}

async function names(ground: Ground): Promise<void> {
  const { cluster } = ground;
  const far = await ground.serviceAddress(SHOP, 'far');
  await cluster.apply(
    clusterService('kube-system', 'kube-dns', 53, {
      clusterIP: DNS_SERVICE,
      selector: { app: 'dns' },
      ports: [{ port: 53, protocol: 'UDP' }],
    }),
  );
  const name = `far.${SHOP}.svc.cluster.local`;
  const dns = await ground.run({ namespace: 'kube-system', name: 'dns', command: role('dns', `${name}=${far}`) });
  const client = ground.pod('client');
  // kube-proxy takes a moment to know the endpoint.
  await until(
    `${name} is resolved`,
    () =>
      ask(cluster, client, `http://far:${PORT}/`).then(
        () => true,
        () => false,
      ),
    20_000,
  );
  await expectWay(cluster, client, `http://${name}:${PORT}/`, ground.ways(ONE, TWO, 'service'), 'far');
  const asked = logLines(cluster, dns).filter((line) => line.name === name);
  if (!asked.some((line) => line.client === address(client))) {
    throw new Error(`the resolver was asked by ${asked.map((line) => line.client).join(', ') || 'nobody'}`);
  }
}

/** A line of the agent's log is JSON. */
function says(line: string, text: string): boolean {
  return line.startsWith('{') && (JSON.parse(line) as { msg?: string }).msg === text;
}
