// SPDX-License-Identifier: Apache-2.0
//
// A real Prometheus in a namespace, with the scrape configuration and the alerts of deploy/monitoring.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';
import { type Namespace, type Running, type Testbed, until } from '../netns.ts';
import { ALERTS, SCRAPE } from './monitoring.ts';

const PORT = 9090;
export const SCRAPE_MS = 500;

/** What discovery in Kubernetes says of a container port of a pod. */
export interface DiscoveredPod {
  name: string;
  node: string;
  ip: string;
  app: string;
  phase: string;
}

export interface Series {
  metric: Record<string, string>;
  /** [seconds, number] */
  values: [number, string][];
}

export interface ActiveAlert {
  labels: Record<string, string>;
  state: 'pending' | 'firing';
}

export class Prometheus {
  readonly #namespace: Namespace;
  readonly #process: Running;

  private constructor(namespace: Namespace, process: Running) {
    this.#namespace = namespace;
    this.#process = process;
  }

  /** Debian's build does not have the discovery in Kubernetes: a file with the same labels stands in for it. */
  static async start(testbed: Testbed, namespace: Namespace, pods: readonly DiscoveredPod[]): Promise<Prometheus> {
    const directory = testbed.directory('prometheus');
    const targets = join(directory, 'targets.json');
    writeFileSync(
      targets,
      JSON.stringify(
        pods.map(({ name, node, ip, app, phase }) => ({
          targets: [`${ip === '' ? 'none' : ip.includes(':') ? `[${ip}]` : ip}:8000`],
          labels: {
            __meta_kubernetes_pod_name: name,
            __meta_kubernetes_pod_node_name: node,
            __meta_kubernetes_pod_ip: ip,
            __meta_kubernetes_pod_phase: phase,
            __meta_kubernetes_pod_label_k8s_app: app,
          },
        })),
      ),
    );
    const { scrape_configs } = parse(readFileSync(SCRAPE, 'utf8')) as { scrape_configs: Record<string, unknown>[] };
    const jobs = scrape_configs.map(({ kubernetes_sd_configs: _, ...job }) => ({
      ...job,
      file_sd_configs: [{ files: [targets] }],
    }));
    const global = { scrape_interval: `${SCRAPE_MS}ms`, scrape_timeout: `${SCRAPE_MS}ms`, evaluation_interval: '1s' };
    const config = join(directory, 'prometheus.yaml');
    // JSON is YAML.
    writeFileSync(config, JSON.stringify({ global, rule_files: [ALERTS], scrape_configs: jobs }));
    const running = testbed.start(
      namespace.argv([
        'prometheus',
        ...[`--config.file=${config}`, `--storage.tsdb.path=${join(directory, 'tsdb')}`],
        ...[`--web.listen-address=127.0.0.1:${PORT}`, '--log.level=warn'],
      ]),
    );
    const prometheus = new Prometheus(namespace, running);
    await until(
      'Prometheus answers',
      () =>
        prometheus.#get('/-/ready').then(
          () => true,
          () => false,
        ),
      30_000,
    );
    return prometheus;
  }

  async #get(path: string): Promise<string> {
    const script = 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())';
    const { status, stdout, stderr } = await this.#namespace.exec([
      'python3',
      ...['-c', script, `http://127.0.0.1:${PORT}${path}`],
    ]);
    if (status !== 0) throw new Error(`${path}: ${stderr.trim().split('\n').at(-1)}; ${this.#process.output}`);
    return stdout;
  }

  async #api<T>(path: string, parameters: Record<string, string> = {}): Promise<T> {
    const answer = JSON.parse(await this.#get(`/api/v1/${path}?${new URLSearchParams(parameters)}`)) as { data: T };
    return answer.data;
  }

  /** Every second from `from` (seconds since 1970) to now; series that never had a number are left out. */
  async range(query: string, from: number): Promise<Series[]> {
    const end = String(Date.now() / 1000);
    const { result } = await this.#api<{ result: Series[] }>('query_range', {
      query,
      start: String(from),
      end,
      step: '1',
    });
    return result.filter(({ values }) => values.some(([, value]) => Number.isFinite(Number(value))));
  }

  /** Now. */
  async query(query: string): Promise<{ metric: Record<string, string>; value: number }[]> {
    type Sample = { metric: Record<string, string>; value: [number, string] };
    const { result } = await this.#api<{ result: Sample[] }>('query', { query });
    return result.map(({ metric, value }) => ({ metric, value: Number(value[1]) }));
  }

  async alerts(): Promise<ActiveAlert[]> {
    return (await this.#api<{ alerts: ActiveAlert[] }>('alerts')).alerts;
  }

  async targets(): Promise<{ labels: Record<string, string>; scrapeUrl: string; health: string }[]> {
    type Target = { labels: Record<string, string>; scrapeUrl: string; health: string };
    return (await this.#api<{ activeTargets: Target[] }>('targets')).activeTargets;
  }
}
