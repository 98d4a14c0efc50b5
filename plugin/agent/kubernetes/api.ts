// SPDX-License-Identifier: Apache-2.0
// A Kubernetes API client that does what the agent needs: get, list, watch, merge patch, create, delete. Over node:https, so
// that it costs the agent no library: a process that follows 1,000 pods has 100 MiB with this, and 140 MiB with
// @kubernetes/client-node 2.0.1. The rules of the API server that it follows are in the tests against a real one.
//
// Token and CA are read from their files for each request: both are replaced while the agent runs, and the connection
// pool tells connections of another CA apart by itself.

import { readFileSync } from 'node:fs';
import { Agent, type IncomingMessage, type RequestOptions, request as requestHttp } from 'node:http';
import { request as requestHttps, Agent as TlsAgent } from 'node:https';

export interface ClusterAccess {
  /** "https://10.96.0.1:443"; http only for an API server behind a local proxy */
  server: string;
  /** PEM; undefined: the system's */
  caFile?: string | undefined;
  tokenFile?: string | undefined;
}

export type Query = Readonly<Record<string, string | number | boolean>>;

/** What the API server answered instead of what was asked for. */
export class ApiError extends Error {
  /** HTTP status, or the code of a Status that came inside a watch */
  readonly status: number;
  /** "Expired", "Forbidden", ...; '' if the answer was no Status */
  readonly reason: string;
  /** what the server asks for; undefined if it does not */
  readonly retryAfterMs: number | undefined;

  constructor(what: string, status: number, reason: string, message: string, retryAfterMs?: number) {
    super(`${what}: ${status}${reason === '' ? '' : ` ${reason}`}: ${message}`);
    this.status = status;
    this.reason = reason;
    this.retryAfterMs = retryAfterMs;
  }
}

/** No answer, or one that broke off. */
export class ApiUnreachable extends Error {}

export interface WatchEvent {
  type: 'ADDED' | 'MODIFIED' | 'DELETED' | 'BOOKMARK';
  object: Readonly<Record<string, unknown>>;
}

export interface List {
  resourceVersion: string;
  items: Readonly<Record<string, unknown>>[];
}

interface RequestInput {
  query?: Query;
  body?: unknown;
  contentType?: string;
  signal?: AbortSignal | undefined;
  /** milliseconds, instead of the client's own */
  timeout?: number;
}

const REQUEST_TIMEOUT_MS = 30_000;
/** Objects in one page of a list. */
const PAGE = 500;
/** Requests other than watches at a time; more wait for a connection. */
const CONNECTIONS = 8;
const MERGE_PATCH = 'application/merge-patch+json';

export class Api {
  readonly #access: ClusterAccess;
  readonly #timeout: number;
  readonly #plain = new Agent({ keepAlive: true, maxSockets: CONNECTIONS });
  readonly #tls = new TlsAgent({ keepAlive: true, maxSockets: CONNECTIONS });
  /** A watch holds its connection, so it is not one of the pool's. */
  readonly #watches = new TlsAgent({ keepAlive: false });

  /** `timeout`: milliseconds until an answer that is no watch must be complete. */
  constructor(access: ClusterAccess, timeout = REQUEST_TIMEOUT_MS) {
    this.#access = access;
    this.#timeout = timeout;
  }

  close(): void {
    for (const agent of [this.#plain, this.#tls, this.#watches]) agent.destroy();
  }

  /** The object, or null if there is none. Throws ApiError, ApiUnreachable. */
  async get(path: string, signal?: AbortSignal): Promise<Readonly<Record<string, unknown>> | null> {
    try {
      return await this.#json('GET', path, { signal });
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return null;
      throw error;
    }
  }

  /** The whole collection as it is at one resource version. Throws ApiError, ApiUnreachable. */
  async list(path: string, query: Query = {}, signal?: AbortSignal, pageSize = PAGE): Promise<List> {
    const items: List['items'] = [];
    for (let token = ''; ; ) {
      const page = await this.#json('GET', path, {
        query: { ...query, limit: pageSize, ...(token !== '' && { continue: token }) },
        signal,
      });
      const { metadata = {}, items: more = [] } = page as {
        metadata?: { resourceVersion?: string; continue?: string };
        items?: List['items'];
      };
      items.push(...more);
      token = metadata.continue ?? '';
      if (token === '') return { resourceVersion: metadata.resourceVersion ?? '', items };
    }
  }

  /** Throws ApiError (422 where metadata.uid in the patch is another's, 404, 403), ApiUnreachable. */
  async mergePatch(path: string, patch: unknown, signal?: AbortSignal): Promise<Readonly<Record<string, unknown>>> {
    return this.#json('PATCH', path, { body: patch, contentType: MERGE_PATCH, signal });
  }

  async create(path: string, object: unknown, signal?: AbortSignal): Promise<Readonly<Record<string, unknown>>> {
    return this.#json('POST', path, { body: object, contentType: 'application/json', signal });
  }

  /**
   * false: there was none. `foreground`: it stays until what belongs to it is gone. Throws ApiError (409 where `uid` is
   * not the object's), ApiUnreachable.
   */
  async delete(path: string, uid: string, foreground: boolean): Promise<boolean> {
    const body = {
      kind: 'DeleteOptions',
      apiVersion: 'v1',
      preconditions: { uid },
      propagationPolicy: foreground ? 'Foreground' : 'Background',
    };
    try {
      await this.#json('DELETE', path, { body, contentType: 'application/json' });
      return true;
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return false;
      throw error;
    }
  }

  /**
   * Follows changes from `resourceVersion` on until the server ends the watch, which it does after `seconds`. Throws
   * ApiError for a Status inside the watch too (410: the version is too old, list again), and ApiUnreachable if the
   * connection breaks or nothing comes for `idleMs`: bookmarks come every minute, so that is a connection whose other
   * end is gone.
   */
  async watch(
    path: string,
    options: { query?: Query; resourceVersion: string; seconds: number; idleMs: number; signal?: AbortSignal },
    onEvent: (event: WatchEvent) => void,
  ): Promise<void> {
    const what = `watch ${path}`;
    const query = {
      ...options.query,
      watch: true,
      allowWatchBookmarks: true,
      resourceVersion: options.resourceVersion,
      timeoutSeconds: options.seconds,
    };
    const response = await this.#open('GET', path, { query, signal: options.signal, timeout: options.idleMs }, true);
    response.socket.setTimeout(0);
    const idle = setTimeout(() => response.destroy(new Error(`nothing came for ${options.idleMs} ms`)), options.idleMs);
    let rest = '';
    try {
      response.setEncoding('utf8');
      for await (const chunk of response) {
        idle.refresh();
        const lines = (rest + chunk).split('\n');
        rest = lines.pop() ?? '';
        for (const line of lines) {
          const event = JSON.parse(line) as WatchEvent | { type: 'ERROR'; object: unknown };
          if (event.type === 'ERROR') throw statusError(what, 500, event.object);
          onEvent(event);
        }
      }
    } catch (error) {
      if (error instanceof ApiError) throw error;
      throw new ApiUnreachable(`${what}: ${(error as Error).message}`, { cause: error });
    } finally {
      clearTimeout(idle);
      response.destroy();
    }
  }

  async #json(method: string, path: string, input: RequestInput): Promise<Readonly<Record<string, unknown>>> {
    const response = await this.#open(method, path, input);
    return JSON.parse(await readAll(response, `${method} ${path}`)) as Record<string, unknown>;
  }

  /** A response with a status of success, its body unread. */
  async #open(method: string, path: string, input: RequestInput, watch = false): Promise<IncomingMessage> {
    const response = await this.#send(method, path, input, watch);
    const status = response.statusCode ?? 0;
    if (status >= 200 && status < 300) return response;
    const what = `${method} ${path}`;
    const text = await readAll(response, what);
    throw statusError(what, status, parsed(text), retryAfterHeader(response));
  }

  #send(method: string, path: string, input: RequestInput, watch: boolean): Promise<IncomingMessage> {
    const { server, caFile, tokenFile } = this.#access;
    const url = new URL(path, server);
    for (const [key, value] of Object.entries(input.query ?? {})) url.searchParams.set(key, String(value));
    const body = input.body === undefined ? undefined : Buffer.from(JSON.stringify(input.body));
    const secure = url.protocol === 'https:';
    const what = `${method} ${path}`;
    const timeout = input.timeout ?? this.#timeout;
    return new Promise((resolve, reject) => {
      let options: RequestOptions & { ca?: Buffer };
      try {
        options = {
          method,
          agent: secure ? (watch ? this.#watches : this.#tls) : this.#plain,
          ...(input.signal && { signal: input.signal }),
          ...(secure && caFile !== undefined && { ca: readFileSync(caFile) }),
          headers: {
            accept: 'application/json',
            'user-agent': 'ambient-redirect',
            ...(tokenFile !== undefined && { authorization: `Bearer ${readFileSync(tokenFile, 'utf8').trim()}` }),
            ...(body && { 'content-type': input.contentType, 'content-length': body.length }),
          },
        };
      } catch (error) {
        reject(new ApiUnreachable(`${what}: ${(error as Error).message}`, { cause: error }));
        return;
      }
      const sent = (secure ? requestHttps : requestHttp)(url, options);
      // From the first byte sent to the last one received; a watch has a limit of its own.
      const limit = setTimeout(() => sent.destroy(new Error(`no answer within ${timeout} ms`)), timeout);
      sent.once('response', (response) => {
        if (watch) clearTimeout(limit);
        else response.once('close', () => clearTimeout(limit));
        resolve(response);
      });
      sent.on('error', (error) => {
        clearTimeout(limit);
        reject(
          new ApiUnreachable(`${what}: ${error.message || (error as NodeJS.ErrnoException).code}`, { cause: error }),
        );
      });
      // Where the network forgets a connection without a word.
      sent.once('socket', (socket) => socket.setKeepAlive(true, 15_000));
      sent.end(body);
    });
  }
}

async function readAll(response: IncomingMessage, what: string): Promise<string> {
  try {
    let text = '';
    response.setEncoding('utf8');
    for await (const chunk of response) text += chunk;
    return text;
  } catch (error) {
    throw new ApiUnreachable(`${what}: ${(error as Error).message}`, { cause: error });
  }
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function statusError(what: string, httpStatus: number, answer: unknown, retryAfterMs?: number): ApiError {
  if (typeof answer !== 'object' || answer === null) {
    return new ApiError(what, httpStatus, '', String(answer).slice(0, 200), retryAfterMs);
  }
  const { code, reason, message, details } = answer as {
    code?: number;
    reason?: string;
    message?: string;
    details?: { retryAfterSeconds?: number };
  };
  const seconds = details?.retryAfterSeconds;
  const wait = seconds === undefined ? retryAfterMs : seconds * 1000;
  return new ApiError(what, code ?? httpStatus, reason ?? '', message ?? '', wait);
}

function retryAfterHeader(response: IncomingMessage): number | undefined {
  const seconds = Number(response.headers['retry-after']);
  return Number.isFinite(seconds) && seconds > 0 ? seconds * 1000 : undefined;
}
