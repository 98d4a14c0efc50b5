// SPDX-License-Identifier: Apache-2.0
// A copy of one collection of the API server, kept up to date: list, watch, and both again after whatever ends a watch.
// While the API server is away the copy stays as it was: nothing is deleted because nobody can be asked.

import { type Api, ApiError, type Query } from './api.ts';
import { Backoff } from './backoff.ts';

export interface MirrorOptions<T> {
  api: Api;
  /** "/api/v1/pods" */
  path: string;
  query?: Query;
  /** What is kept of an object. */
  project: (object: Readonly<Record<string, unknown>>) => T;
  /** `before` is null for a new object, `after` for one that is gone (also one that went while nobody watched). */
  onChange: (before: T | null, after: T | null) => void;
  /** A list is in the copy: the first, or one after changes may have been missed. */
  onSynced?: () => void;
  onTrouble?: (error: Error) => void;
  /** the server ends a watch after that; default 300 */
  watchSeconds?: number;
  /** milliseconds without a byte, bookmarks included, that end a watch; default 90,000 */
  idleMs?: number;
}

export type MirrorState = 'listing' | 'watching' | 'waiting' | 'stopped';

const SHORT_WATCH_MS = 1_000;

interface Entry<T> {
  uid: string;
  value: T;
}

export class Mirror<T> {
  state: MirrorState = 'waiting';
  /** a whole list has arrived since start */
  synced = false;
  /** why the last list or watch ended early; null while all is well */
  trouble: Error | null = null;
  /** performance.now() of the last thing that the API server said about this collection */
  heardAt = Number.NEGATIVE_INFINITY;
  /** ends of watches by reason: "end", "expired", "error" */
  readonly ends: Record<'end' | 'expired' | 'error', number> = { end: 0, expired: 0, error: 0 };
  readonly #options: MirrorOptions<T>;
  readonly #entries = new Map<string, Entry<T>>();
  readonly #stop = new AbortController();
  readonly #backoff = new Backoff(200, 15_000);
  #wake: (() => void) | undefined;

  constructor(options: MirrorOptions<T>) {
    this.#options = options;
  }

  /** "NAMESPACE/NAME", or "NAME" for what has no namespace. */
  get(key: string): T | undefined {
    return this.#entries.get(key)?.value;
  }

  values(): T[] {
    return [...this.#entries.values()].map(({ value }) => value);
  }

  get size(): number {
    return this.#entries.size;
  }

  /** Does not wait any longer: the token has been renewed, or somebody asks. */
  retryNow(): void {
    this.#wake?.();
  }

  stop(): void {
    this.#stop.abort();
    this.#wake?.();
  }

  /** Until stop(). Never throws. */
  async run(): Promise<void> {
    const { signal } = this.#stop;
    let version = '';
    while (!signal.aborted) {
      try {
        if (version === '') version = await this.#list();
        this.state = 'watching';
        const since = performance.now();
        version = await this.#watch(version);
        this.ends.end++;
        this.trouble = null;
        // Something between us and the server may end each watch as soon as it has begun.
        if (performance.now() - since < SHORT_WATCH_MS) await this.#pause(this.#backoff.next());
        else this.#backoff.reset();
      } catch (error) {
        if (signal.aborted) break;
        const cause = error instanceof WatchBroke ? error.cause : (error as Error);
        const expired = cause instanceof ApiError && (cause.status === 410 || cause.reason === 'Expired');
        if (this.state === 'watching') this.ends[expired ? 'expired' : 'error']++;
        if (error instanceof WatchBroke) version = error.version;
        const tooOld = cause instanceof ApiError && cause.status !== 401 && cause.status !== 403;
        // Whatever the server said about the version that it was asked for, a list answers it.
        if (tooOld) version = '';
        this.trouble = cause;
        this.#options.onTrouble?.(cause);
        this.state = 'waiting';
        const asked = cause instanceof ApiError ? cause.retryAfterMs : undefined;
        await this.#pause(Math.max(asked ?? 0, this.#backoff.next()));
      }
    }
    this.state = 'stopped';
  }

  async #list(): Promise<string> {
    this.state = 'listing';
    const { api, path, query, onSynced } = this.#options;
    const { items, resourceVersion } = await api.list(path, query, this.#stop.signal);
    const gone = new Set(this.#entries.keys());
    for (const item of items) gone.delete(this.#put(item));
    for (const key of gone) this.#drop(key);
    this.#heard();
    this.synced = true;
    this.trouble = null;
    onSynced?.();
    return resourceVersion;
  }

  /** Returns the version to go on from. */
  async #watch(from: string): Promise<string> {
    const { api, path, query, watchSeconds = 300, idleMs = 90_000 } = this.#options;
    let version = from;
    try {
      await api.watch(
        path,
        {
          ...(query && { query }),
          resourceVersion: from,
          // Spread, so that the watches of all nodes do not end together.
          seconds: Math.ceil(watchSeconds * (1 + Math.random())),
          idleMs,
          signal: this.#stop.signal,
        },
        ({ type, object }) => {
          this.#heard();
          version = metadataOf(object).resourceVersion;
          this.#backoff.reset();
          if (type === 'BOOKMARK') return;
          if (type === 'DELETED') this.#drop(keyOf(object));
          else this.#put(object);
        },
      );
    } catch (error) {
      throw new WatchBroke(version, error as Error);
    }
    return version;
  }

  #put(object: Readonly<Record<string, unknown>>): string {
    const key = keyOf(object);
    const { uid } = metadataOf(object);
    const old = this.#entries.get(key);
    // A namesake is another object.
    if (old !== undefined && old.uid !== uid) this.#drop(key);
    const before = old?.uid === uid ? old.value : null;
    const value = this.#options.project(object);
    this.#entries.set(key, { uid, value });
    this.#options.onChange(before, value);
    return key;
  }

  #drop(key: string): void {
    const entry = this.#entries.get(key);
    if (entry === undefined) return;
    this.#entries.delete(key);
    this.#options.onChange(entry.value, null);
  }

  #heard(): void {
    this.heardAt = performance.now();
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer);
        this.#wake = undefined;
        resolve();
      };
      const timer = setTimeout(done, ms);
      this.#wake = done;
    });
  }
}

/** A watch that broke has brought the copy up to a version all the same. */
class WatchBroke extends Error {
  readonly version: string;
  override readonly cause: Error;

  constructor(version: string, cause: Error) {
    super(cause.message);
    this.version = version;
    this.cause = cause;
  }
}

interface Metadata {
  name: string;
  namespace?: string;
  uid: string;
  resourceVersion: string;
}

function metadataOf(object: Readonly<Record<string, unknown>>): Metadata {
  return object.metadata as Metadata;
}

function keyOf(object: Readonly<Record<string, unknown>>): string {
  const { namespace, name } = metadataOf(object);
  return namespace === undefined ? name : `${namespace}/${name}`;
}
