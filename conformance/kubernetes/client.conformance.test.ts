// SPDX-License-Identifier: Apache-2.0
//
// The API client and the copy it keeps, against a real kube-apiserver, with what stands between them misbehaving.

import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { Api, ApiError, ApiUnreachable } from '../../plugin/agent/kubernetes/api.ts';
import { Mirror } from '../../plugin/agent/kubernetes/mirror.ts';
import { reportPeer } from '../chain.ts';
import { Testbed, until } from '../netns.ts';
import { KUBERNETES, missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { type Asked, Front } from './front.ts';

const MISSING = missingControlPlane();
const NODE = 'node-1';
const PODS = '/api/v1/pods';
const isWatch = ({ path, watch }: Asked) => path === PODS && watch;
const isList = ({ path, watch, method }: Asked) => path === PODS && !watch && method === 'GET';

afterAll(() => reportPeer('kube-apiserver', KUBERNETES, MISSING === undefined, MISSING));

describe.runIf(MISSING === undefined)('kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let plane: ControlPlane;
  let front: Front;
  let api: Api;
  let tokenFile: string;
  let run: { mirror: Mirror<string>; log: string[]; troubles: Error[]; ended: Promise<void> }[] = [];

  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
    tokenFile = join(testbed.directory('client'), 'token');
    front = await Front.start(testbed, plane);
  }, 3_000_000);
  afterAll(() => testbed.close());
  let count = 0;
  let namespace: string;
  beforeEach(async () => {
    namespace = `space-${++count}`;
    await plane.createNamespace(namespace);
    writeFileSync(tokenFile, 'admin-token');
    front.fault = () => undefined;
    front.asked.length = 0;
    api = new Api({ server: front.url, caFile: plane.caFile, tokenFile });
  });
  afterEach(async () => {
    for (const { mirror, ended } of run) {
      mirror.stop();
      await ended;
    }
    run = [];
    api.close();
  });

  /** A copy of this node's pods in this test's namespace; the log has "+name", "~name", "-name". */
  function mirror(more: { watchSeconds?: number; idleMs?: number } = {}) {
    const log: string[] = [];
    const troubles: Error[] = [];
    const one = new Mirror<string>({
      api,
      path: PODS,
      query: { fieldSelector: `spec.nodeName=${NODE},metadata.namespace=${namespace}` },
      project: (object) => (object.metadata as { name: string }).name,
      onChange: (before, after) =>
        log.push(after === null ? `-${before}` : before === null ? `+${after}` : `~${after}`),
      onTrouble: (error) => troubles.push(error),
      ...more,
    });
    const started = { mirror: one, log, troubles, ended: one.run() };
    run.push(started);
    return started;
  }
  const pod = (name: string, node = NODE) => plane.createPod({ namespace, name, node });
  const remove = (name: string) =>
    plane.remove(`/api/v1/namespaces/${namespace}/pods/${name}`, { gracePeriodSeconds: 0 });

  test('lists, then follows: new, changed, deleted, and only this node', async () => {
    await pod('a');
    await pod('elsewhere', 'node-2');
    const { mirror: copy, log } = mirror();
    await until('the list is there', () => copy.synced);
    expect(log).toEqual(['+a']);
    await pod('b');
    await plane.label(`/api/v1/namespaces/${namespace}/pods/a`, { x: 'y' });
    await remove('b');
    await until('all changes came', () => log.includes('-b'));
    expect(log.filter((entry) => entry !== '~b')).toEqual(['+a', '+b', '~a', '-b']);
    expect(copy.values()).toEqual(['a']);
  });

  test('a list of several pages', async () => {
    const names = Array.from({ length: 12 }, (_, i) => `p-${i}`).sort();
    for (const name of names) await pod(name);
    const list = await api.list(`/api/v1/namespaces/${namespace}/pods`, {}, undefined, 5);
    expect(list.items.map(({ metadata }) => (metadata as { name: string }).name)).toEqual(names);
    expect(front.requests(({ path }) => path === `/api/v1/namespaces/${namespace}/pods`)).toBe(3);
  });

  test('goes on at the end of a watch without listing again', async () => {
    const { log } = mirror({ watchSeconds: 1 });
    await until('two watches have ended', () => front.requests(isWatch) >= 3, 15_000);
    await pod('late');
    await until('the pod came', () => log.includes('+late'));
    expect(front.requests(isList)).toBe(1);
  });

  test('a cut watch goes on from where it was', async () => {
    const { mirror: copy, log } = mirror();
    await until('it watches', () => copy.state === 'watching' && front.requests(isWatch) === 1);
    await pod('before');
    await until('the pod came', () => log.includes('+before'));
    front.cutAll();
    await pod('meanwhile');
    await until('the pod came', () => log.includes('+meanwhile'));
    expect(log.filter((entry) => entry.startsWith('+'))).toEqual(['+before', '+meanwhile']);
    expect(front.requests(isList)).toBe(1);
    expect(copy.ends.error).toBe(1);
  });

  test('410 in a watch: lists again, and tells what was deleted meanwhile', async () => {
    await pod('stays');
    await pod('goes');
    const { mirror: copy, log } = mirror();
    await until('it watches', () => copy.state === 'watching' && front.requests(isWatch) === 1);
    // The next watch is refused as too old; what happens until then nobody reports.
    let refused = 0;
    front.fault = (asked) => (isWatch(asked) && refused++ === 0 ? { watchStatus: 410 } : undefined);
    const gone = remove('goes');
    front.cutAll();
    await gone;
    await pod('comes');
    await until('the copy is right again', () => copy.values().sort().join() === 'comes,stays');
    expect(copy.ends.expired).toBe(1);
    expect(front.requests(isList)).toBe(2);
    expect(log).toContain('-goes');
    expect(log).toContain('+comes');
  });

  test('a namesake that came while nobody watched is another pod', async () => {
    await pod('web-0');
    const { mirror: copy, log } = mirror();
    await until('it watches', () => copy.state === 'watching');
    let blocked = true;
    front.fault = (asked) => (blocked && asked.path === PODS ? { cut: true } : undefined);
    front.cutAll();
    await remove('web-0');
    await pod('web-0');
    let first = true;
    front.fault = (asked) => {
      if (!isWatch(asked) || !first) return undefined;
      first = false;
      return { watchStatus: 410 };
    };
    blocked = false;
    await until('it is told', () => log.filter((entry) => entry !== '~web-0').length === 3);
    expect(log.filter((entry) => entry !== '~web-0')).toEqual(['+web-0', '-web-0', '+web-0']);
  });

  test('504 on list: waits as long as the server asks', async () => {
    let refused = 0;
    front.fault = (asked) =>
      isList(asked) && refused++ === 0 ? { status: 504, reason: 'Timeout', retryAfterSeconds: 1 } : undefined;
    const started = performance.now();
    const { mirror: copy, troubles } = mirror();
    await until('the list is there', () => copy.synced);
    expect(performance.now() - started).toBeGreaterThanOrEqual(1_000);
    expect(troubles.map(({ message }) => message)).toEqual([`GET ${PODS}: 504 Timeout: injected`]);
  });

  test('a version of the future is answered with 504', async () => {
    const future = { resourceVersion: '999999999', resourceVersionMatch: 'NotOlderThan' };
    const error = await api.list(PODS, future).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ status: 504, reason: 'Timeout', retryAfterMs: 1_000 });
    expect((error as Error).message).toContain('Too large resource version');
  });

  test('a connection whose other end is gone is noticed by its silence', async () => {
    const { mirror: copy, log, troubles } = mirror({ idleMs: 1_500 });
    await until('it watches', () => copy.state === 'watching' && front.requests(isWatch) === 1);
    front.silence();
    await pod('unheard');
    await until('the pod came', () => log.includes('+unheard'));
    expect(troubles[0]?.message).toBe(`watch ${PODS}: nothing came for 1500 ms`);
  });

  test('an answer that does not come is given up', async () => {
    front.fault = (asked) => (asked.method === 'PATCH' ? { silent: true } : undefined);
    const hasty = new Api({ server: front.url, caFile: plane.caFile, tokenFile }, 300);
    const patch = hasty.mergePatch('/api/v1/namespaces/default', {});
    await expect(patch).rejects.toThrow(/no answer within 300 ms/);
    await expect(patch).rejects.toBeInstanceOf(ApiUnreachable);
    hasty.close();
  });

  test('the token is read anew for each request', async () => {
    writeFileSync(tokenFile, 'no-such-token');
    const { mirror: copy, troubles } = mirror();
    await until('it was refused', () => troubles.length > 0);
    expect(troubles[0]).toMatchObject({ status: 401, reason: 'Unauthorized' });
    expect(copy.synced).toBe(false);
    writeFileSync(tokenFile, 'admin-token');
    await until('the list is there', () => copy.synced);
  });

  test('an expired token of a service account, renewed', async () => {
    const uid = await plane.createServiceAccount(namespace, 'agent');
    writeFileSync(tokenFile, plane.serviceAccountToken(namespace, 'agent', uid, -60));
    await expect(api.get('/api/v1/namespaces/default')).rejects.toMatchObject({ status: 401 });
    writeFileSync(tokenFile, plane.serviceAccountToken(namespace, 'agent', uid, 600));
    // Known now, and without a role.
    await expect(api.get('/api/v1/namespaces/default')).rejects.toMatchObject({ status: 403, reason: 'Forbidden' });
    await expect(api.get('/api/v1/namespaces/default')).rejects.toThrow(
      `User "system:serviceaccount:${namespace}:agent" cannot get resource "namespaces"`,
    );
  });

  test('a token file that is away for a moment', async () => {
    rmSync(tokenFile);
    await expect(api.get('/api/v1/namespaces/default')).rejects.toThrow(/ENOENT.*token/);
    writeFileSync(tokenFile, 'admin-token');
    expect(await api.get('/api/v1/namespaces/default')).toMatchObject({ kind: 'Namespace' });
  });

  test('patches: another UID 422, gone 404, an old version 409', async () => {
    const uid = await pod('web-0');
    const path = `/api/v1/namespaces/${namespace}/pods/web-0/status`;
    const annotate = (metadata: object) =>
      api.mergePatch(path, { metadata: { annotations: { 'ambient.istio.io/redirection': 'enabled' }, ...metadata } });
    await annotate({ uid });
    expect(await plane.annotation(namespace, 'web-0', 'ambient.istio.io/redirection')).toBe('enabled');
    await expect(annotate({ uid: crypto.randomUUID() })).rejects.toMatchObject({ status: 422 });
    await expect(annotate({ resourceVersion: '1' })).rejects.toMatchObject({ status: 409 });
    await remove('web-0');
    await expect(annotate({ uid })).rejects.toMatchObject({ status: 404 });
  });

  test('the API server is killed and comes back: nothing is forgotten meanwhile', async () => {
    await pod('a');
    const { mirror: copy, log, troubles } = mirror();
    await until('it watches', () => copy.state === 'watching' && front.requests(isWatch) === 1);
    await plane.killApiServer();
    await until('it noticed', () => troubles.length > 1, 20_000);
    expect(copy.values()).toEqual(['a']);
    expect(log).toEqual(['+a']);
    await plane.startApiServer();
    await pod('b');
    await until('it follows again', () => log.includes('+b'), 40_000);
    expect(log.filter((entry) => entry.startsWith('-'))).toEqual([]);
  }, 120_000);

  test('a CA that did not sign the certificate is refused', async () => {
    const other = new Api({ server: front.url, caFile: '/etc/ssl/certs/ca-certificates.crt', tokenFile });
    await expect(other.get('/api/v1/namespaces/default')).rejects.toBeInstanceOf(ApiUnreachable);
    await expect(other.get('/api/v1/namespaces/default')).rejects.not.toBeInstanceOf(ApiError);
    other.close();
  });
});
