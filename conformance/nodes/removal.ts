// SPDX-License-Identifier: Apache-2.0
// Section 6: helm uninstall with running pods, and what is left of us on the nodes.

import { createHash } from 'node:crypto';
import { lstatSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { Namespace, until } from '../netns.ts';
import { NODE_NAMES } from './cluster.ts';
import { type Ground, ONE, PORT, SERVER, SHOP, TWO } from './ground.ts';
import { Load } from './load.ts';
import { REDIRECTION, SYSTEM } from './manifests.ts';
import { urlOf } from './mesh.ts';
import type { RealNode } from './node.ts';

/** Where we write. */
const DIRECTORIES = [
  '/etc/cni',
  '/opt/cni/bin',
  '/etc/ambient-config',
  '/run/ambient-redirect',
  '/run/ztunnel',
  '/run/istio-cni',
  '/sys/fs/bpf',
];

/** Of pods, which have other names in every sandbox, and of kube-proxy, which follows them. */
const OF_PODS =
  / (link|address|neighbour|route|qdisc|sysctl) .*(veth|cni-|10\.20[12]\.|fd00:20[12])| nft | sysctl ipv[46]\/(conf|neigh)\/veth| route ff00|nf_conntrack|cni0/;

/**
 * What is to be there: directories that kubelet makes for a hostPath (/run/ztunnel for ztunnel's own, too), and until the
 * next install or boot the mark by which an agent that still runs stands aside, with locks that somebody may hold.
 */
const KEPT = /^file (\/etc\/ambient-config|\/run\/ztunnel|\/run\/ambient-redirect(\/uninstalled|\/([a-z]+\.)?lock)?)$/;

/** Everything of a node that could be ours: files, pins, and the kernel's objects of the node and of its pods. */
async function dump(node: RealNode): Promise<KernelState> {
  const state = new Map<string, string>();
  for (const [key, value] of await kernelState([node.namespace], { pins: [node.path('/sys/fs/bpf')] })) {
    // A reboot gives the node another first process, and the other end of its cable another index.
    state.set(key.replace(`/proc/${node.pid}/root`, ''), value.replace(/"link_index":\d+,/, ''));
  }
  for (const directory of DIRECTORIES) files(node, directory, state);
  for (const name of readdirSync(node.path('/run/netns'))) {
    const path = node.path(`/run/netns/${name}`);
    const pod = new (class extends Namespace {
      override get path(): string {
        return path;
      }
    })(`pod ${name}`);
    // A pod's own: rules, filters, TCX, sysctls.
    for (const [key, value] of await kernelState([pod])) {
      if (/ (rule4|rule6|filter|tcx|qdisc|route .* table (?!main|local|255))/.test(key))
        state.set(key.replace(name, ''), value);
    }
  }
  return state;
}

function files(node: RealNode, path: string, state: Map<string, string>): void {
  const real = node.path(path);
  const stats = lstatSync(real, { throwIfNoEntry: false });
  if (stats === undefined) return;
  const mode = (stats.mode & 0o7777).toString(8);
  if (stats.isDirectory()) {
    state.set(`file ${path}`, `directory ${mode}`);
    for (const name of readdirSync(real)) files(node, join(path, name), state);
  } else if (stats.isSymbolicLink()) state.set(`file ${path}`, readlinkSync(real));
  else if (stats.isFile() && !path.startsWith('/sys/')) {
    state.set(`file ${path}`, `${mode} ${createHash('sha256').update(readFileSync(real)).digest('hex')}`);
  } else state.set(`file ${path}`, `special ${mode}`);
}

/** To be taken before anything of ours is there. */
export async function dumps(ground: Ground): Promise<KernelState[]> {
  return Promise.all(NODE_NAMES.map((name) => dump(ground.cluster.node(name))));
}

export async function removal(ground: Ground, before: readonly KernelState[]): Promise<void> {
  const { step, section, cluster } = ground;
  section('6 helm uninstall with running pods');
  const loads: Load[] = [];
  await step('requests on one node and across', async () => {
    loads.push(await Load.start(ground, 'last-near', ONE, urlOf(ground.pod('near'), PORT)));
    loads.push(await Load.start(ground, 'last-far', ONE, urlOf(ground.pod('far'), PORT)));
  });
  await step('helm uninstall', async () => {
    await cluster.helm(['uninstall', 'ambient-redirect', '-n', SYSTEM], 420_000);
    const left = await cluster.pods(SYSTEM, 'app.kubernetes.io/name=ambient-redirect');
    if (left.some(({ metadata }) => metadata.deletionTimestamp === undefined)) {
      throw new Error(`pods of the release are left: ${left.map(({ metadata }) => metadata.name).join(', ')}`);
    }
  });
  await step('pods go on: direct now, and none of them is annotated', async () => {
    await ground.traffic(false);
    const annotated = (await cluster.pods(SHOP)).filter(({ metadata }) => metadata.annotations?.[REDIRECTION]);
    if (annotated.length > 0) throw new Error(`${annotated[0]?.metadata.name} is annotated`);
  });
  for (const load of loads) await step(`${load.name}: no request lost`, () => load.end({ way: 'either' }));
  await step('a new pod starts, and its connections are direct', async () => {
    for (const node of [ONE, TWO]) await ground.run({ name: `after-${node}`, node, ...SERVER });
    for (const node of [ONE, TWO]) await ground.delete(`after-${node}`);
  });
  await step('nothing of ours is left on the nodes', async () => {
    await cluster.kubectl(['delete', 'daemonset', '-n', SYSTEM, 'ztunnel', '--wait'], { timeout: 60_000 });
    await until('its pods are gone', async () => (await cluster.pods(SYSTEM, 'app=ztunnel')).length === 0, 60_000);
    const lines: string[] = [];
    for (const [index, name] of NODE_NAMES.entries()) {
      const now = await dump(cluster.node(name));
      lines.push(...differences(before[index] ?? new Map(), now, new RegExp(`${OF_PODS.source}|${KEPT.source}`)));
    }
    if (lines.length > 0) throw new Error(lines.slice(0, 40).join('\n'));
    return `${before.map(({ size }) => size).join(' and ')} facts before, the same after`;
  });
}
