// SPDX-License-Identifier: Apache-2.0
//
// A node with private directories, pods without interfaces, and conflists that use both: what tests of whole chains
// start from.

import { randomBytes } from 'node:crypto';
import { appendFileSync, existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type KernelState, kernelState } from './kernel-state.ts';
import { type Namespace, Testbed } from './netns.ts';
import { type JsonObject, type NetworkList, type PluginConf, Runtime, type RuntimeConf } from './runtime.ts';

export const DEBIAN = '/usr/lib/cni';
export const SCRIPTED = join(import.meta.dirname, 'plugins');
/** Another build can be put in its place; its file name is to be the same. */
export const EXECUTABLE =
  process.env.AMBIENT_REDIRECT_EXECUTABLE ?? join(import.meta.dirname, '..', 'dist', 'ambient-redirect');

/** Counters change with every packet of a pod that lives. */
export const LIVE_STATE = /^pins .*\/counters\[/;

export class Node {
  readonly testbed = Testbed.open();
  readonly namespace: Namespace;
  /** Private directory of everything that has state: IPAM, tuning, runDir, the runtime's cache, logs. */
  readonly directory: string;
  readonly stateDir: string;
  readonly runtime: Runtime;
  #count = 0;

  constructor() {
    this.namespace = this.#namespace('node');
    this.directory = this.testbed.directory('var');
    this.stateDir = join(this.testbed.bpffs('bpf'), 'state');
    this.runtime = this.#runtime();
  }

  /** Without IPv6 duplicate address detection, which takes 1 to 2 s and changes routes after it. */
  #namespace(label: string): Namespace {
    const namespace = this.testbed.namespace(label);
    const names = ['all', 'default'].map((one) => `net.ipv6.conf.${one}.accept_dad=0`);
    namespace.run(['sysctl', '-qw', ...names]);
    return namespace;
  }

  #runtime(): Runtime {
    return new Runtime({
      path: [DEBIAN, SCRIPTED, join(EXECUTABLE, '..')],
      cacheDir: join(this.directory, 'cache'),
      node: this.namespace,
    });
  }

  close(): void {
    this.testbed.close();
  }

  /** A pod as a runtime has it before ADD: a namespace with nothing but lo, and CNI_ARGS as containerd sends them. */
  pod(pod: { name?: string; namespace?: string; uid?: string; annotations?: Record<string, string> } = {}): Pod {
    const number = ++this.#count;
    return new Pod(this.#namespace(`pod${number}`), {
      namespace: pod.namespace ?? 'default',
      name: pod.name ?? `pod-${number}`,
      uid: pod.uid ?? crypto.randomUUID(),
      annotations: pod.annotations ?? {},
    });
  }

  /** The same pod in a new sandbox: another namespace, another container id. */
  again(pod: Pod): Pod {
    return new Pod(this.#namespace(`pod${++this.#count}`), pod.identity);
  }

  /** Our conflist entry with this node's private directories. */
  ours(more: JsonObject = {}): PluginConf {
    return {
      type: 'ambient-redirect',
      enrollment: 'all',
      excludeNamespaces: [],
      stateDir: this.stateDir,
      runDir: join(this.directory, 'run'),
      capabilities: { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true },
      ...more,
    };
  }

  ipam(...subnets: string[]): JsonObject {
    return {
      type: 'host-local',
      dataDir: join(this.directory, 'ipam'),
      ranges: subnets.map((subnet) => [{ subnet }]),
      routes: subnets.map((subnet) => ({ dst: subnet.includes(':') ? '::/0' : '0.0.0.0/0' })),
    };
  }

  list(cniVersion: string, ...plugins: PluginConf[]): NetworkList {
    return { name: `net-${this.testbed.id.replace('.', '-')}`, cniVersion, plugins };
  }

  state(...pods: Pod[]): Promise<KernelState> {
    return kernelState([this.namespace, ...pods.map((pod) => pod.namespace)], { pins: [this.stateDir] });
  }

  /** `ambient-redirect pods -o json` on this node. */
  async attachments(): Promise<Attachment[]> {
    const { status, stdout, stderr } = await this.namespace.exec([EXECUTABLE, 'pods', '-o', 'json'], {
      env: { PATH: process.env.PATH ?? '', AMBIENT_REDIRECT_STATE_DIR: this.stateDir },
    });
    if (status !== 0) throw new Error(`pods: exit ${status}: ${stderr}`);
    return JSON.parse(stdout) as Attachment[];
  }

  /** What the recorder wrote to a log file. */
  log(file: string): { command: string; env: Record<string, string>; conf: JsonObject }[] {
    if (!existsSync(file)) return [];
    const lines = readFileSync(file, 'utf8').trim().split('\n');
    return lines.map((line) => JSON.parse(line) as { command: string; env: Record<string, string>; conf: JsonObject });
  }
}

/** The part of a row of `pods -o json` that these tests look at. */
export interface Attachment {
  namespace: string;
  name: string;
  uid: string;
  containerId: string;
  interface: string;
  addresses: string[];
  role: string;
  state: string;
  programs: { alive: number; attached: unknown[] };
}

export class Pod {
  readonly namespace: Namespace;
  readonly identity: { namespace: string; name: string; uid: string; annotations: Record<string, string> };
  containerId = randomBytes(32).toString('hex');

  constructor(namespace: Namespace, identity: Pod['identity']) {
    this.namespace = namespace;
    this.identity = identity;
  }

  /** RuntimeConf as containerd makes it; the order of CNI_ARGS is random there (a Go map). */
  rt(more: Partial<RuntimeConf> = {}): RuntimeConf {
    const { namespace, name, uid, annotations } = this.identity;
    const args: [string, string][] = [
      ['IgnoreUnknown', '1'],
      ['K8S_POD_NAMESPACE', namespace],
      ['K8S_POD_NAME', name],
      ['K8S_POD_INFRA_CONTAINER_ID', this.containerId],
      ['K8S_POD_UID', uid],
    ];
    return {
      containerId: this.containerId,
      netns: this.namespace.path,
      ifname: 'eth0',
      args: shuffled(args),
      capabilityArgs: { 'io.kubernetes.cri.pod-annotations': annotations },
      ...more,
    };
  }
}

function shuffled<T>(list: readonly T[]): T[] {
  return list
    .map((one) => [Math.random(), one] as const)
    .sort(([a], [b]) => a - b)
    .map(([, one]) => one);
}

/** A line of the report of foreign programs that took part, for whoever set AMBIENT_PEERS_FILE. */
export function reportPeer(peer: string, version: string, ran: boolean, reason?: string): void {
  const line = JSON.stringify({ peer, version, ran, ...(!ran && { reason }) });
  const file = process.env.AMBIENT_PEERS_FILE;
  if (file) appendFileSync(file, `${line}\n`);
  else console.log(ran ? `peer: ${peer} ${version}` : `peer: ${peer} not run: ${reason}`);
}
