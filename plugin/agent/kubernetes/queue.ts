// SPDX-License-Identifier: Apache-2.0
// Work by key: one piece at a time for a key, several keys at a time. What is added while a key is worked on is done
// once more afterwards, with the state that is the latest then. What fails is retried for ever.

import { Backoff } from './backoff.ts';

export interface QueueOptions {
  /** keys worked on at a time */
  parallel: number;
  /** milliseconds between tries: the first and the longest */
  retry: readonly [first: number, longest: number];
  work: (key: string) => Promise<void>;
  onFailure: (key: string, error: Error, tries: number) => void;
  /** seconds from the first request that a run covers to its end */
  onDone?: (key: string, seconds: number) => void;
}

interface Item {
  /** performance.now() of the oldest request that is not served */
  since: number;
  state: 'ready' | 'running' | 'again' | 'waiting';
  tries: number;
  backoff: Backoff;
  timer?: NodeJS.Timeout;
}

export class WorkQueue {
  readonly #options: QueueOptions;
  readonly #items = new Map<string, Item>();
  readonly #ready: string[] = [];
  #running = 0;
  #stopped = false;
  #idle: (() => void)[] = [];

  constructor(options: QueueOptions) {
    this.#options = options;
  }

  /** What is known about the key has changed; a retry that waits is not waited for. */
  add(key: string): void {
    if (this.#stopped) return;
    const item = this.#items.get(key);
    if (item === undefined) {
      const [first, longest] = this.#options.retry;
      const since = performance.now();
      this.#items.set(key, { since, state: 'ready', tries: 0, backoff: new Backoff(first, longest) });
      this.#ready.push(key);
    } else if (item.state === 'running') {
      item.state = 'again';
    } else if (item.state === 'waiting') {
      clearTimeout(item.timer);
      item.state = 'ready';
      item.backoff.reset();
      this.#ready.push(key);
    }
    this.#pump();
  }

  /** Keys with work to do. */
  get depth(): number {
    return this.#items.size;
  }

  /** Keys whose last try failed. */
  get failing(): number {
    return [...this.#items.values()].filter(({ tries }) => tries > 0).length;
  }

  /** Seconds that the oldest work has been waiting for its end; 0 if there is none. */
  get age(): number {
    const oldest = Math.min(...[...this.#items.values()].map(({ since }) => since));
    return Number.isFinite(oldest) ? (performance.now() - oldest) / 1000 : 0;
  }

  /** Resolves when nothing is ready or running; what waits for a retry does not count. */
  settled(): Promise<void> {
    if (this.#running === 0 && this.#ready.length === 0) return Promise.resolve();
    return new Promise((resolve) => this.#idle.push(resolve));
  }

  /** Begins nothing more; resolves when what runs has ended. */
  stop(): Promise<void> {
    this.#stopped = true;
    this.#ready.length = 0;
    for (const { timer } of this.#items.values()) clearTimeout(timer);
    return this.settled();
  }

  #pump(): void {
    while (!this.#stopped && this.#running < this.#options.parallel) {
      const key = this.#ready.shift();
      if (key === undefined) break;
      const item = this.#items.get(key);
      if (item === undefined) continue;
      item.state = 'running';
      this.#running++;
      void this.#run(key, item);
    }
    if (this.#running === 0 && this.#ready.length === 0) {
      for (const resolve of this.#idle.splice(0)) resolve();
    }
  }

  async #run(key: string, item: Item): Promise<void> {
    const { work, onFailure, onDone } = this.#options;
    try {
      await work(key);
      item.tries = 0;
      item.backoff.reset();
      onDone?.(key, (performance.now() - item.since) / 1000);
      if (item.state === 'again') {
        item.since = performance.now();
        item.state = 'ready';
        this.#ready.push(key);
      } else {
        this.#items.delete(key);
      }
    } catch (error) {
      item.tries++;
      onFailure(key, error as Error, item.tries);
      if (item.state === 'again') {
        item.state = 'ready';
        this.#ready.push(key);
      } else {
        item.state = 'waiting';
        item.timer = setTimeout(() => {
          item.state = 'ready';
          this.#ready.push(key);
          this.#pump();
        }, item.backoff.next());
      }
    } finally {
      this.#running--;
      this.#pump();
    }
  }
}
