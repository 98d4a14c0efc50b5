// SPDX-License-Identifier: Apache-2.0
// Many pods that only are there, and a stopwatch for what a runtime starts.

import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface, type Interface } from 'node:readline';
import { type Addresses, executable } from '../e2e/topology.ts';
import { must, type Namespace, type Testbed } from '../netns.ts';

export interface Sample {
  ms: number;
  /** KiB */
  rss: number;
  stdout: string;
}

export interface Command {
  argv: string[];
  env: Record<string, string>;
  stdin: string;
}

/** One python process that starts, times and reaps; see measure.py. */
export class Stopwatch {
  readonly #child: ChildProcessWithoutNullStreams;
  readonly #lines: AsyncIterator<string>;
  readonly #reader: Interface;

  /** The commands run in `namespace`: python is started there, and what it starts stays there. */
  constructor(testbed: Testbed, namespace: Namespace) {
    const [file = '', ...rest] = namespace.argv(['python3', join(import.meta.dirname, 'measure.py')]);
    this.#child = spawn(file, rest);
    this.#child.stderr.pipe(process.stderr);
    this.#reader = createInterface(this.#child.stdout);
    this.#lines = this.#reader[Symbol.asyncIterator]();
    testbed.defer(() => {
      this.#child.stdin.end();
      this.#reader.close();
    });
  }

  async run(what: string, command: Command): Promise<Sample> {
    this.#child.stdin.write(`${JSON.stringify(command)}\n`);
    const { value } = await this.#lines.next();
    const answer = JSON.parse(value ?? '{}') as Sample & { status: number };
    if (answer.status !== 0) throw new Error(`${what}: exit ${answer.status}: ${answer.stdout}`);
    return answer;
  }
}

/** A namespace with a veth to the node, an address, and nothing that runs in it. */
export interface IdlePod {
  namespace: string;
  ifname: string;
  hostIfname: string;
  /** Of each family. */
  addresses: Addresses;
  containerId: string;
}

/** Objects that one `ip -batch` makes. */
const BATCH = 100;

/** `count` pods of a routed network in batches; namespaces go with their veths when the testbed closes. */
export function makePods(testbed: Testbed, node: Namespace, count: number): IdlePod[] {
  const pods = Array.from({ length: count }, (_, i) => ({
    namespace: `${testbed.id}.p${i}`,
    ifname: 'eth0',
    hostIfname: `v${i}`,
    addresses: { 4: `10.90.${Math.floor(i / 250)}.${(i % 250) + 2}`, 6: `fd90::${(i + 2).toString(16)}` },
    containerId: `bench${i}`,
  }));
  const batch = (argv: readonly string[], line: (pod: IdlePod) => string) => {
    // A thousand namespaces or links are more than a busy machine makes within a command's time limit.
    for (let i = 0; i < pods.length; i += BATCH)
      must(
        argv,
        pods
          .slice(i, i + BATCH)
          .map(line)
          .join(''),
      );
  };
  testbed.defer(() => batch(['ip', '-force', '-batch', '-'], (pod) => `netns del ${pod.namespace}\n`));
  batch(['ip', '-batch', '-'], (pod) => `netns add ${pod.namespace}\n`);
  batch(
    ['ip', '-batch', '-'],
    (pod) => `link add ${pod.hostIfname} netns ${node.name} type veth peer name eth0 netns ${pod.namespace}\n`,
  );
  batch(['ip', '-n', node.name, '-batch', '-'], (pod) => `link set ${pod.hostIfname} up\n`);
  for (const pod of pods) {
    const lines = [
      `address add ${pod.addresses[4]}/32 dev eth0`,
      `address add ${pod.addresses[6]}/128 dev eth0 nodad`,
      'link set lo up',
      'link set eth0 up',
    ];
    must(['ip', '-n', pod.namespace, '-batch', '-'], `${lines.join('\n')}\n`);
  }
  return pods;
}

export const PLUGINS = {
  ours: executable,
  bandwidth: '/usr/lib/cni/bandwidth',
  portmap: '/usr/lib/cni/portmap',
} as const;

/** A plugin as a runtime runs it. `prevResult`: default what a primary plugin would have said of the pod. */
export function verb(
  pod: IdlePod,
  plugin: string,
  command: string,
  entry: Record<string, unknown>,
  prevResult?: unknown,
): Command {
  return {
    argv: [plugin],
    env: {
      PATH: '/usr/sbin:/usr/bin:/sbin:/bin',
      CNI_COMMAND: command,
      CNI_CONTAINERID: pod.containerId,
      CNI_NETNS: `/run/netns/${pod.namespace}`,
      CNI_IFNAME: pod.ifname,
      CNI_PATH: '/opt/cni/bin',
      CNI_ARGS: `IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=${pod.containerId};K8S_POD_UID=${pod.containerId}`,
    },
    stdin: JSON.stringify({
      cniVersion: '1.0.0',
      name: 'bench',
      ...entry,
      prevResult: prevResult ?? {
        cniVersion: '1.0.0',
        interfaces: [{ name: pod.hostIfname }, { name: pod.ifname, sandbox: `/run/netns/${pod.namespace}` }],
        ips: [
          { interface: 1, address: `${pod.addresses[4]}/32` },
          { interface: 1, address: `${pod.addresses[6]}/128` },
        ],
      },
    }),
  };
}
