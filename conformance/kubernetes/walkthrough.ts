// SPDX-License-Identifier: Apache-2.0
//
// npm run walkthrough: a node as a cluster has it, step by step, and what becomes of its pods' traffic. etcd and
// kube-apiserver, containerd with a plain network, two pods that run already; then install, the agent with the role of
// the chart, and a proxy; then a label on the namespace, and off again. Every step is done by the programs themselves,
// in namespaces that go with it. Ends with exit code 1 at the first step that does not come out as it says.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { HAProxy } from '../containerd/haproxy.ts';
import { ask, type Workload } from '../containerd/mesh.ts';
import { network } from '../containerd/networks.ts';
import { ThrowawayNode } from '../containerd/throwaway-node.ts';
import { executable, requireExecutable } from '../e2e/topology.ts';
import { type Running, Testbed, until } from '../netns.ts';
import { KUBERNETES, missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { Front } from './front.ts';
import { grantRole } from './role.ts';

const NODE = 'worker';
const MODE = 'istio.io/dataplane-mode';
const REDIRECTION = 'ambient.istio.io/redirection';

class Walk {
  readonly testbed: Testbed;
  readonly say: (line: string) => void;
  readonly plane: ControlPlane;
  readonly node: ThrowawayNode;
  agent: Running | undefined;

  private constructor(testbed: Testbed, say: (line: string) => void, plane: ControlPlane, node: ThrowawayNode) {
    this.testbed = testbed;
    this.say = say;
    this.plane = plane;
    this.node = node;
  }

  static async begin(testbed: Testbed, say: (line: string) => void): Promise<Walk> {
    const plane = await ControlPlane.start(testbed);
    say(`etcd and kube-apiserver ${KUBERNETES} answer on ${plane.url}`);
    const node = await ThrowawayNode.start(testbed);
    await node.writeConflist(network('bridge'));
    await node.startContainerd();
    const version = await node.run(['containerd', '--version']);
    say(`node "${NODE}" runs containerd ${version.split(' ')[2]}; its network: bridge, portmap`);
    return new Walk(testbed, say, plane, node);
  }

  /** What API server, scheduler and kubelet do with a pod. */
  async pod(namespace: string, name: string, more: { daemonSet?: string; serviceAccount?: string } = {}) {
    const { plane, node } = this;
    const { daemonSet, serviceAccount } = more;
    const owner = { apiVersion: 'apps/v1', kind: 'DaemonSet', name: daemonSet, uid: crypto.randomUUID() };
    const uid = await plane.createPod({
      namespace,
      name,
      node: NODE,
      ...(serviceAccount !== undefined && { serviceAccount }),
      ...(daemonSet !== undefined && { ownerReferences: [owner] }),
    });
    const pod = await node.runPod(namespace, name, { uid });
    await plane.setPodStatus(namespace, name, 'Running', pod.addresses);
    this.say(`pod ${namespace}/${name} runs, ${pod.addresses.join(' and ')}`);
    return pod;
  }

  async workload(name: string): Promise<Workload> {
    const pod = await this.pod('shop', name);
    return { pod, container: await this.node.runContainer(pod, 'web', ['httpd', '-f', '-p', '80', '-h', '/www']) };
  }

  /** The agent as the DaemonSet runs it: its own service account, nothing but the role. */
  async startAgent(): Promise<void> {
    const { plane, node, testbed } = this;
    const uid = await grantRole(plane, 'istio-system', 'ambient-redirect');
    const token = join(plane.directory, 'agent.token');
    writeFileSync(token, plane.serviceAccountToken('istio-system', 'ambient-redirect', uid, 3_600));
    const front = await Front.start(testbed, plane, node.namespace);
    const agent = node.launch([
      ...['/opt/cni/bin/ambient-redirect', 'agent', '--node-name', NODE, '--address', '127.0.0.1'],
      ...['--conf', '/etc/cni/net.d/10-throwaway.conflist', '--reconcile-seconds', '1'],
      ...['--kube-api', front.url, '--kube-ca-file', plane.caFile, '--kube-token-file', token],
    ]);
    this.agent = agent;
    const ready = ['busybox', 'wget', '-q', '-O', '-', 'http://127.0.0.1:8000/readyz'];
    await until(
      'the agent is ready',
      async () => {
        if (!agent.alive) throw new Error(`the agent ended: ${agent.output}`);
        return (await node.run(ready).catch(() => '')) === 'ok\n';
      },
      30_000,
    );
    this.say('the agent runs with the role of the chart, and is ready');
  }

  /** A request over IPv4; who saw it on its way? */
  async request(from: Workload, to: Workload, proxy: HAProxy | null, wanted: 'direct' | 'through the proxy') {
    const address = to.pod.addresses[0] ?? '';
    const { uri, client } = await ask(this.node, from, address);
    // HAProxy logs a request when it has ended; one that is direct it never logs.
    const seen =
      wanted === 'direct' ? (proxy?.seen ?? []).filter((one) => one.uri === uri) : await proxy?.sightingsOf(uri);
    const ways = (seen ?? []).map(({ listener }) => listener);
    const found = ways.length === 0 ? 'direct' : 'through the proxy';
    if (found !== wanted || client !== from.pod.addresses[0]) {
      throw new Error(`a request went ${found} (${ways.join(', ')}), from ${client}; it was to go ${wanted}`);
    }
    const name = ({ pod }: Workload) => pod.config.metadata.name;
    const by = ways.length === 0 ? '' : `: ${ways.join(', ')}`;
    this.say(`a request from ${name(from)} to ${name(to)} goes ${wanted}${by}; ${name(to)} sees ${client}`);
  }

  async annotated(pods: readonly string[], wanted: string | undefined): Promise<void> {
    for (const name of pods) {
      await until(
        `shop/${name} is annotated ${wanted}`,
        async () => (await this.plane.annotation('shop', name, REDIRECTION)) === wanted,
        20_000,
      ).catch((error: Error) => {
        throw new Error(`${error.message}; the agent said:\n${this.agent?.output}`);
      });
    }
    this.say(`${pods.join(' and ')}: annotation ${REDIRECTION} ${wanted === undefined ? 'is gone' : `= ${wanted}`}`);
  }

  async label(value: string | null): Promise<void> {
    await this.plane.label('/api/v1/namespaces/shop', { [MODE]: value });
    this.say(`kubectl label namespace shop ${MODE}${value === null ? '-' : `=${value}`}`);
  }
}

async function walk(testbed: Testbed, say: (line: string) => void): Promise<void> {
  const walking = await Walk.begin(testbed, say);
  const { plane, node } = walking;
  await plane.createNamespace('istio-system');
  await plane.createNamespace('shop');
  const client = await walking.workload('client');
  const server = await walking.workload('server');

  const installed = await node.run([executable, 'install', '--enrollment', 'agent', '--wait', '10']);
  say(`ambient-redirect install: ${installed.trim().split('\n').join('; ')}`);
  await walking.startAgent();
  const ztunnel = await walking.pod('istio-system', 'ztunnel-x7k2p', {
    daemonSet: 'ztunnel',
    serviceAccount: 'ztunnel',
  });
  const proxy = await HAProxy.start(node, ztunnel);
  say('HAProxy listens there as the proxy, on 15001, 15006 and 15008');
  await walking.request(client, server, proxy, 'direct');

  await walking.label('ambient');
  await walking.annotated(['client', 'server'], 'enabled');
  const trace = node.launch([
    ...[
      '/opt/cni/bin/ambient-redirect',
      'trace',
      '--pod',
      'shop/client',
      '--reason',
      'redirected_outbound',
      '--count',
      '1',
    ],
  ]);
  await walking.request(client, server, proxy, 'through the proxy');
  await walking.request(server, client, proxy, 'through the proxy');
  // One packet after trace has begun to listen is enough.
  while (trace.alive) await ask(node, client, server.pod.addresses[0] ?? '');
  await trace.ended;
  const line = trace.output.split('\n').find((one) => one.includes('redirected_outbound'));
  if (line === undefined) throw new Error(`trace printed no decision: ${trace.output}`);
  say(`ambient-redirect trace: ${line.trim()}`);

  await walking.label(null);
  await walking.annotated(['client', 'server'], undefined);
  await until('new connections go direct', async () => {
    const { uri } = await ask(node, client, server.pod.addresses[0] ?? '');
    return !proxy.seen.some((one) => one.uri === uri);
  });
  await walking.request(client, server, proxy, 'direct');

  await walking.label('ambient');
  await walking.annotated(['client', 'server'], 'enabled');
  for (const { pod } of [client, server]) {
    await node.removePod(pod);
    await plane.remove(`/api/v1/namespaces/shop/pods/${pod.config.metadata.name}`, { gracePeriodSeconds: 0 });
  }
  const rows = JSON.parse(await node.run(['/opt/cni/bin/ambient-redirect', 'pods', '-o', 'json'])) as {
    name: string;
  }[];
  const left = rows.map(({ name }) => name).join(', ');
  if (left !== 'ztunnel-x7k2p') throw new Error(`attachments of ${left} are left`);
  say('the pods are removed; of their attachments nothing is left');
  await walking.agent?.stop();
}

if (import.meta.main) {
  const missing = missingControlPlane();
  if (missing !== undefined) {
    console.error(`walkthrough: no kube-apiserver: ${missing}`);
    process.exit(1);
  }
  requireExecutable();
  let step = 0;
  using testbed = Testbed.open();
  try {
    await walk(testbed, (line) => console.log(`${String(++step).padStart(2)}  ${line}`));
  } catch (error) {
    console.error(`walkthrough: ${(error as Error).message}`);
    process.exitCode = 1;
  }
}
