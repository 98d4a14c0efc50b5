// SPDX-License-Identifier: Apache-2.0
//
// Who saw the traffic. A request tells by itself whether somebody was between: the port that the server's socket has for
// its peer is the client's own, or it is not. The proxy's own list of connections, which it writes to its log, says
// which of them it was.

import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { until } from '../netns.ts';
import type { Cluster, PodObject } from './cluster.ts';
import { role, SYSTEM } from './manifests.ts';
import type { Answer } from './pod.ts';

/** A connection that a proxy accepted. */
export interface Sighting {
  node: string;
  at: number;
  listener: 'outbound' | 'inboundPlaintext' | 'inboundHBONE';
  source: string;
  destination: string;
  port: number;
}

/** Lines of a container's log, from the node's disk: there while API server, kubelet and the pod are not. */
export function logLines(cluster: Cluster, pod: PodObject, container = 'app'): Record<string, unknown>[] {
  const { name, namespace, uid } = pod.metadata;
  const node = cluster.node(pod.spec.nodeName);
  const directory = join(node.disk, 'upper/var/log/pods', `${namespace}_${name}_${uid}`, container);
  if (!existsSync(directory)) return [];
  const files = readdirSync(directory).sort((a, b) => Number.parseInt(a, 10) - Number.parseInt(b, 10));
  return files.flatMap((file) =>
    readFileSync(join(directory, file), 'utf8')
      .split('\n')
      // "TIME stdout F TEXT"
      .map((line) => line.split(' ').slice(3).join(' '))
      .filter((text) => text.startsWith('{') && text.endsWith('}'))
      .map((text) => JSON.parse(text) as Record<string, unknown>),
  );
}

/** The words of a node's proxies, of dead ones too as long as their log is there. */
function proxyLines(cluster: Cluster, node: string): Record<string, unknown>[] {
  const pods = join(cluster.node(node).disk, 'upper/var/log/pods');
  if (!existsSync(pods)) return [];
  return readdirSync(pods)
    .filter((name) => name.startsWith(`${SYSTEM}_ztunnel-`))
    .flatMap((directory) => {
      const [namespace = '', name = '', uid = ''] = directory.split('_');
      return logLines(cluster, { metadata: { namespace, name, uid }, spec: { nodeName: node } } as PodObject);
    });
}

/** What the proxies of all nodes have seen. */
export function sightings(cluster: Cluster): Sighting[] {
  return cluster.nodes.flatMap(({ name: node }) =>
    proxyLines(cluster, node)
      .filter(({ listener }) => listener !== undefined)
      .map((line) => ({ node, ...line }) as unknown as Sighting),
  );
}

/** What went wrong in the proxies between two moments, by their own words: "NODE: N x WHAT, ...". */
export function troubles(cluster: Cluster, from: number, to: number): string {
  const counts = new Map<string, number>();
  for (const { name } of cluster.nodes) {
    for (const { at, trouble } of proxyLines(cluster, name)) {
      if (trouble === undefined || Number(at) < from || Number(at) > to) continue;
      const what = `${name}: ${trouble}`;
      counts.set(what, (counts.get(what) ?? 0) + 1);
    }
  }
  const all = [...counts].map(([what, count]) => `${count} x ${what}`);
  return all.length === 0 ? 'none' : all.slice(0, 12).join(', ');
}

/** The stand-in of the in-pod contract knows workloads from the API server, as ztunnel does: some time after kubelet. */
function isKnown(cluster: Cluster, node: string, host: string): boolean {
  const [newest] = proxyLines(cluster, node)
    .filter(({ known }) => known !== undefined)
    .sort((a, b) => Number(b.at) - Number(a.at));
  return (newest?.known as string[] | undefined)?.includes(host) === true;
}

/** One request from a pod. Throws if it is not answered. */
export async function ask(cluster: Cluster, from: PodObject, url: string, seconds = 5): Promise<Answer> {
  const command = role('ask', url, String(seconds));
  const text = await cluster.exec(from.metadata.namespace, from.metadata.name, command, (seconds + 25) * 1_000);
  return JSON.parse(text) as Answer;
}

export function address(pod: PodObject, family: 4 | 6 = 4): string {
  const found = pod.status.podIPs?.find(({ ip }) => ip.includes(':') === (family === 6));
  if (found === undefined) throw new Error(`${pod.metadata.name} has no IPv${family} address`);
  return found.ip;
}

export function urlOf(pod: PodObject, port: number, family: 4 | 6 = 4): string {
  const host = address(pod, family);
  return `http://${family === 6 ? `[${host}]` : host}:${port}/`;
}

/**
 * A request, the way it must go, and who says so: the server's socket for its peer, and the proxies' lists. The server
 * must see the client's own address either way.
 * @param seen the proxies that must have accepted a connection of this client for it, in this order: "NODE LISTENER";
 *   [] if it must go direct
 */
export async function expectWay(
  cluster: Cluster,
  from: PodObject,
  url: string,
  seen: readonly string[],
  server?: string,
): Promise<Answer> {
  const source = address(from, url.includes('[') ? 6 : 4);
  const mine = () => sightings(cluster).filter((one) => one.source === source);
  if (seen.some((one) => one.endsWith(' inboundHBONE'))) {
    const host = new URL(url).hostname.replace(/[[\]]/g, '');
    const node = from.spec.nodeName;
    await until(`the proxy of ${node} knows ${host}`, () => isKnown(cluster, node, host), 20_000);
  }
  const before = mine().length;
  const answer = await ask(cluster, from, url);
  const what = `${from.metadata.namespace}/${from.metadata.name} to ${url}`;
  if (answer.client !== source) throw new Error(`${what}: the server saw ${answer.client}, not ${source}`);
  if (server !== undefined && answer.server !== server) {
    throw new Error(`${what}: ${answer.server} answered, not ${server}`);
  }
  const direct = answer.clientPort === answer.localPort;
  if (direct !== (seen.length === 0)) throw new Error(`${what}: went ${direct ? 'direct' : 'by a proxy'}`);
  await until(`${what}: the proxies list it`, () => mine().length >= before + seen.length);
  const found = mine()
    .sort((a, b) => a.at - b.at)
    .slice(before)
    .map(({ node, listener }) => `${node} ${listener}`);
  // Clocks of one machine; two in one millisecond are in any order.
  if (found.toSorted().join() !== seen.toSorted().join()) {
    throw new Error(`${what}: the proxies list ${found.join(', ') || 'nothing'}, not ${seen.join(', ') || 'nothing'}`);
  }
  return answer;
}
