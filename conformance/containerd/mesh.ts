// SPDX-License-Identifier: Apache-2.0
import { existsSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { fileURLToPath } from 'node:url';
import { kernelState } from '../kernel-state.ts';
import type { Testbed } from '../netns.ts';
import { type Conflist, type Pod, ThrowawayNode } from './throwaway-node.ts';

const executable = fileURLToPath(new URL('../../dist/ambient-redirect', import.meta.url));

/** A node whose containerd has `conflist` for its network and the built executable in /opt/cni/bin. */
export async function meshNode(testbed: Testbed, conflist: Conflist): Promise<ThrowawayNode> {
  if (!existsSync(executable)) throw new Error(`${executable} is not there: npm run build`);
  const node = await ThrowawayNode.start(testbed);
  await node.installPlugin('ambient-redirect', executable);
  await node.writeConflist(conflist);
  await node.startContainerd();
  return node;
}

/** A pod with one container that serves HTTP on port 80 and can ask others. */
export type Workload = { pod: Pod; container: string };

/** Runs pod shop/`name`. */
export async function runWorkload(
  node: ThrowawayNode,
  name: string,
  more: Parameters<ThrowawayNode['runPod']>[2] = {},
): Promise<Workload> {
  const pod = await node.runPod('shop', name, more);
  return { pod, container: await node.runContainer(pod, 'web', ['httpd', '-f', '-p', '80', '-h', '/www']) };
}

/** `client` is the address that the server's socket had for its peer. */
export type Answer = { uri: string; client: string; server: string };

let requests = 0;

/**
 * One HTTP request, under a URI that no other has.
 * @param from a workload, or the node itself: then it comes from a socket of the host, as a kubelet's probe does
 * @param port 80 is the workload's own
 * @throws if it is refused, or not answered within `seconds`
 */
export async function ask(
  node: ThrowawayNode,
  from: Workload | 'node',
  address: string,
  { port = 80, seconds = 5 } = {},
): Promise<Answer> {
  const uri = `/cgi-bin/whoami?${++requests}`;
  const url = `http://${isIPv6(address) ? `[${address}]` : address}:${port}${uri}`;
  const command = ['timeout', `${seconds}`, 'wget', '-q', '-O', '-', url];
  let body: string;
  if (from === 'node') {
    body = await node.run(['busybox', ...command]);
  } else {
    const { stdout, stderr, code } = await node.exec(from.container, command, seconds + 5);
    if (code !== 0) throw new Error(`${from.pod.config.metadata.name}: GET ${url}: exit ${code}: ${stderr.trim()}`);
    body = stdout;
  }
  const { client, server } = JSON.parse(body) as { client: string; server: string };
  // busybox's server listens on [::] and names an IPv4 peer in its mapped form.
  return { uri, client: client.replace(/^\[(?:::ffff:)?(.*)\]$/, '$1'), server };
}

/**
 * What the plugin's state directory holds for pods: links, and map entries. Programs and empty maps stay by design, and
 * so do `settings` (of the directory), `jump` and `jump_lookup` (of the programs), counters without an interface (of all
 * proxies together) and `flows` (an LRU cache of tuples that the kernel empties).
 */
export async function podState(
  node: ThrowawayNode,
  stateDirectory = '/sys/fs/bpf/ambient-redirect',
): Promise<string[]> {
  const state = await kernelState([], { pins: [node.path(stateDirectory)] });
  if (state.size === 0) throw new Error(`${stateDirectory} of ${node.name} holds nothing at all`);
  const held: string[] = [];
  for (const [key, value] of state) {
    const [, map, entry] = /([^/]+)\[([0-9a-f]+)\]$/.exec(key) ?? [];
    if (map === undefined || entry === undefined) {
      if (value.startsWith('link ')) held.push(`${key}: ${value}`);
      continue;
    }
    const stays =
      map === 'settings' ||
      map === 'jump' ||
      map === 'jump_lookup' ||
      map === 'flows' ||
      (map === 'counters' && entry.startsWith('00000000')) ||
      // struct proxies begins with the number of proxies.
      (map === 'proxies' && value.startsWith('00000000'));
    if (!stays) held.push(`${key}: ${value}`);
  }
  return held;
}
