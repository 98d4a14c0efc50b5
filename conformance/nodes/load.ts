// SPDX-License-Identifier: Apache-2.0
// Requests at a fixed rate from a pod, each on a connection of its own, and what became of each.

import { until } from '../netns.ts';
import type { PodObject } from './cluster.ts';
import type { Ground } from './ground.ts';
import { role } from './manifests.ts';
import { logLines, troubles } from './mesh.ts';

export interface Result {
  number: number;
  /** Unix time in milliseconds */
  begun: number;
  ms: number;
  server?: string;
  /** nobody was between client and server */
  direct?: boolean;
  error?: string;
}

export class Load {
  readonly #ground: Ground;
  readonly #pod: PodObject;

  private constructor(ground: Ground, pod: PodObject) {
    this.#ground = ground;
    this.#pod = pod;
  }

  static async start(ground: Ground, name: string, node: string, url: string, period = 50): Promise<Load> {
    const pod = await ground.run({
      name,
      node,
      command: role('load', url, String(period)),
      more: { terminationGracePeriodSeconds: 15 },
    });
    const load = new Load(ground, pod);
    await until(`${name} has asked`, () => load.results().length >= 10, 30_000);
    return load;
  }

  get name(): string {
    return this.#pod.metadata.name;
  }

  results(): Result[] {
    return logLines(this.#ground.cluster, this.#pod).filter(
      ({ number }) => number !== undefined,
    ) as unknown as Result[];
  }

  /** Waits for answers to `count` requests that begin from now on. */
  async untilAnswered(count: number, limit = 60_000): Promise<void> {
    const now = Date.now();
    const answered = () => this.results().filter(({ begun, error }) => begun > now && error === undefined).length;
    await until(`${this.name}: ${count} more requests are answered`, () => answered() >= count, limit);
  }

  /** Ends it, and throws if one request was lost, or one went another way; returns what it was. */
  async end({ way, lossy = false }: { way: 'direct' | 'proxied' | 'either'; lossy?: boolean }): Promise<string> {
    const ended = () => logLines(this.#ground.cluster, this.#pod).some((line) => line.ended !== undefined);
    const deleted = this.#ground.delete(this.name).then(
      () => undefined,
      (error: Error) => error,
    );
    // kubelet removes the log with the pod, so it is read until then.
    let last = this.results();
    await until(
      `${this.name} has ended`,
      () => {
        const now = this.results();
        if (now.length >= last.length) last = now;
        return ended() || now.length < last.length;
      },
      30_000,
    );
    const now = this.results();
    const results = now.length >= last.length ? now : last;
    const failure = await deleted;
    if (failure !== undefined) throw failure;
    const failed = results.filter(({ error }) => error !== undefined);
    if (!lossy && failed.length > 0) {
      const [first, last] = [failed[0], failed.at(-1)];
      const kinds = [...new Set(failed.map(({ error }) => error))].join(', ');
      const proxies = troubles(this.#ground.cluster, first?.begun ?? 0, (last?.begun ?? 0) + (last?.ms ?? 0));
      throw new Error(
        `${failed.length} of ${results.length} requests of ${this.name} failed (${kinds}), ${JSON.stringify(first)} ` +
          `to ${JSON.stringify(last)}; troubles of the proxies meanwhile: ${proxies}`,
      );
    }
    const wrong = results.filter(
      ({ direct }) => direct !== undefined && way !== 'either' && direct !== (way === 'direct'),
    );
    if (wrong.length > 0) {
      throw new Error(
        `${wrong.length} of ${results.length} requests of ${this.name} were not ${way}: ${JSON.stringify(wrong[0])}`,
      );
    }
    const slowest = Math.max(...results.filter(({ error }) => error === undefined).map(({ ms }) => ms));
    return `${this.name}: ${results.length} requests, ${failed.length} failed, slowest ${slowest} ms`;
  }
}
