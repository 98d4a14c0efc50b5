// SPDX-License-Identifier: Apache-2.0
//
// The agent against a real API server: who is enrolled, how pods get in and out, and in what order.

import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { HAProxy } from '../e2e/haproxy.ts';
import { isDirect } from '../e2e/mesh.ts';
import { outsiderAddress } from '../e2e/topology.ts';
import { Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { NODE_PREFIX, Site, type SitePod } from './site.ts';
import { Steady } from './steady.ts';

const MODE = 'istio.io/dataplane-mode';
const AMBIENT = { [MODE]: 'ambient' };
const PORT = 8080;
const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';

describe.runIf(missingControlPlane() === undefined)('enrolment through kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let plane: ControlPlane;
  let count = 0;
  let site: Site;
  /** With the label of the mesh, and one without. */
  let inside: string;
  let outside: string;
  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
    await plane.createNamespace('istio-system');
  }, 3_000_000);
  afterAll(() => testbed.close());
  beforeEach(async () => {
    count++;
    [inside, outside] = [`inside-${count}`, `outside-${count}`];
    await plane.createNamespace(inside, AMBIENT);
    await plane.createNamespace(outside);
    site = await Site.start(plane, `${NODE_PREFIX}${count}`);
    return () => site.close();
  });

  async function startProxy(): Promise<HAProxy> {
    const ztunnel = await site.proxy(`ztunnel-${count}`);
    const haproxy = new HAProxy(site.topology.testbed, ztunnel.sandbox.netns, 'only');
    await haproxy.start();
    await site.topology.outsider.listen(PORT);
    return haproxy;
  }
  async function goesDirect(pod: SitePod, family: 4 | 6 = 4): Promise<boolean> {
    const connection = await pod.sandbox.endpoint.connect(outsiderAddress[family], PORT);
    await pod.sandbox.endpoint.close(connection);
    return isDirect(connection);
  }
  const role = async (pod: SitePod) => (await site.attachment(pod))?.role;

  test('labels move a running pod in and out; open connections go on', async () => {
    await startProxy();
    const web = await site.createPod({ namespace: outside, name: 'web' });
    const { endpoint } = web.sandbox;
    site.startAgent();
    await site.untilReady();
    expect(await goesDirect(web)).toBe(true);
    const older = await endpoint.connect(outsiderAddress[4], PORT);

    await plane.label(`/api/v1/namespaces/${outside}`, AMBIENT);
    await site.untilRedirection(web, 'enabled');
    expect([await goesDirect(web, 4), await goesDirect(web, 6)]).toEqual([false, false]);
    await endpoint.exchange(older, 100_000);
    const proxied = await endpoint.connect(outsiderAddress[6], PORT);
    expect(isDirect(proxied)).toBe(false);

    await plane.label(site.path(web), { [MODE]: 'none' });
    await site.untilRedirection(web, undefined);
    await until('new connections go direct', () => goesDirect(web));
    // The programs stay until the proxy has no connection of the pod any more.
    expect(await site.attachment(web)).toMatchObject({ role: 'pod', state: 'attached' });
    await endpoint.exchange(proxied, 100_000);
    await endpoint.close(proxied);
    await until('the programs are gone', async () => (await role(web)) === 'none');
    await endpoint.exchange(older, 100_000);

    await plane.label(site.path(web), { [MODE]: null });
    await site.untilRedirection(web, 'enabled');
    expect(await goesDirect(web)).toBe(false);
  });

  test('a pod whose label comes back while it drains', async () => {
    await startProxy();
    const web = await site.createPod({ namespace: inside, name: 'web' });
    site.startAgent();
    await site.untilRedirection(web, 'enabled');
    const { endpoint } = web.sandbox;
    const proxied = await endpoint.connect(outsiderAddress[4], PORT);
    await plane.label(site.path(web), { [MODE]: 'none' });
    await until('new connections go direct', () => goesDirect(web));
    await plane.label(site.path(web), { [MODE]: null });
    await site.untilRedirection(web, 'enabled');
    expect(await goesDirect(web)).toBe(false);
    await endpoint.exchange(proxied, 100_000);
  });

  test('label flips under requests at a fixed rate: none is lost', async () => {
    await startProxy();
    const web = await site.createPod({ namespace: outside, name: 'web' });
    site.startAgent();
    await site.untilReady();
    const out = new Steady(site.topology.testbed, web.sandbox.netns, outsiderAddress[4], PORT, 50);
    await web.sandbox.endpoint.listen(PORT);
    const into = new Steady(site.topology.testbed, site.topology.outside, web.sandbox.addresses[6], PORT, 50);
    const flips = LONG ? 100 : 6;
    for (let i = 0; i < flips; i++) {
      await plane.label(`/api/v1/namespaces/${outside}`, { [MODE]: i % 2 === 0 ? 'ambient' : null });
      await site.untilRedirection(web, i % 2 === 0 ? 'enabled' : undefined);
      await Promise.all([out.more(10), into.more(10)]);
    }
    expect(await Promise.all([out.stop(), into.stop()])).toEqual([[], []]);
  }, 600_000);

  test('every row of the predicate', async () => {
    const daemonSet = (name: string) => [
      { apiVersion: 'apps/v1', kind: 'DaemonSet', name, uid: crypto.randomUUID(), controller: true },
    ];
    const none = { [MODE]: 'none' };
    await plane.label('/api/v1/namespaces/kube-system', AMBIENT);
    type Row = [name: string, spec: Partial<Parameters<Site['createPod']>[0]>, role: 'pod' | 'none' | 'proxy'];
    const rows: Row[] = [
      ['by-namespace', { namespace: inside }, 'pod'],
      ['by-pod', { namespace: outside, labels: AMBIENT }, 'pod'],
      ['neither', { namespace: outside }, 'none'],
      ['opted-out', { namespace: inside, labels: none }, 'none'],
      ['opted-out-by-annotation', { namespace: inside, annotations: { 'ambient-redirect/enroll': 'false' } }, 'none'],
      ['sidecar', { namespace: inside, annotations: { 'sidecar.istio.io/status': '{}' } }, 'none'],
      ['excluded', { namespace: 'kube-system', labels: AMBIENT }, 'none'],
      [
        `ztunnel-${count}`,
        { namespace: 'istio-system', serviceAccount: 'ztunnel', ownerReferences: daemonSet('ztunnel') },
        'proxy',
      ],
      [`ztunnel-impostor-${count}`, { namespace: 'istio-system', serviceAccount: 'other', labels: AMBIENT }, 'none'],
      [`ztunnel-${count}`, { namespace: inside }, 'pod'],
      [`ambient-redirect-${count}`, { namespace: 'istio-system', labels: AMBIENT }, 'none'],
    ];
    const pods: [Row, SitePod][] = [];
    for (const row of rows) {
      const [name, spec] = row;
      pods.push([row, await site.createPod({ namespace: outside, ...spec, name })]);
    }
    const finished = await site.createPod({ namespace: inside, name: 'finished' });
    await plane.setPodStatus(inside, 'finished', 'Succeeded', [finished.sandbox.addresses[4]]);
    pods.push([['finished', {}, 'none'], finished]);
    // There is no sandbox of ours for it, and no failure about it.
    await plane.createPod({ namespace: inside, name: 'host', node: site.nodeName, hostNetwork: true });
    await plane.setPodStatus(inside, 'host', 'Running', ['10.0.0.1']);
    site.startAgent();
    await site.untilReady();
    for (const [[name, , wanted], pod] of pods) {
      if (wanted === 'pod') await site.untilRedirection(pod, 'enabled');
      expect({ name, role: await role(pod), redirection: await site.redirection(pod) }).toEqual({
        name,
        role: wanted,
        redirection: wanted === 'pod' ? 'enabled' : undefined,
      });
    }
    expect(await plane.annotation(inside, 'host', 'ambient.istio.io/redirection')).toBeUndefined();
    expect(await site.metric('ambient_redirect_queue_failing')).toBe(0);
  }, 120_000);

  test("enablementSelectors of Istio's chart", async () => {
    const web = await site.createPod({ namespace: inside, name: 'web' });
    const team = await site.createPod({ namespace: outside, name: 'team', labels: { team: 'payments' } });
    const selectors = '- podSelector: {matchLabels: {team: payments}}';
    site.startAgent({ more: ['--enablement-selectors', selectors] });
    await site.untilRedirection(team, 'enabled');
    await site.untilReady();
    expect(await site.redirection(web)).toBeUndefined();
  });

  test('a static pod: the runtime knows it by the hash of its manifest', async () => {
    const hash = 'c0ffee00c0ffee00c0ffee00c0ffee00';
    const annotations = { 'kubernetes.io/config.hash': hash, 'kubernetes.io/config.mirror': hash };
    const pod = await site.createPod({ namespace: inside, name: 'etcd', annotations }, { staticUid: hash });
    site.startAgent();
    await site.untilRedirection(pod, 'enabled');
    expect(await role(pod)).toBe('pod');
    expect(pod.sandbox.options.uid).toBe(hash);
  });

  test('a sandbox that is made anew under the same UID', async () => {
    const web = await site.createPod({ namespace: inside, name: 'web' });
    site.startAgent();
    await site.untilRedirection(web, 'enabled');
    await site.topology.delete(web.sandbox);
    const again = await site.newSandbox(web);
    await until('the new one is attached', async () => (await site.attachment(again))?.role === 'pod');
    const rows = (await site.attachments()).filter(({ uid }) => uid === web.uid);
    expect(rows.map(({ addresses }) => addresses.includes(again.sandbox.addresses[4]))).toEqual([true]);
    expect(await site.redirection(again)).toBe('enabled');
  });

  test('a pod without a record is found by its UID in the cgroup of its processes', async () => {
    const web = await site.createPod({ namespace: inside, name: 'web' }, { plugin: false });
    // Another pod's process has the UID in its cgroup, but not its address: it does not count.
    const stranger = await site.createPod({ namespace: outside, name: 'stranger' }, { plugin: false });
    const containerId = web.sandbox.containerId.repeat(2);
    const endStranger = await site.process({ ...stranger, uid: web.uid }, containerId);
    site.startAgent();
    await until('it is refused', () => /has none of the pod's addresses/.test(site.agent?.output ?? ''), 20_000);
    expect(await site.redirection(web)).toBeUndefined();
    await endStranger();
    await site.process(web, containerId);
    await site.untilRedirection(web, 'enabled', 20_000);
    // Recorded under the id of its container, as its DEL names it.
    const ids = (await site.attachments()).map(({ containerId, role: what }) => ({ containerId, role: what }));
    expect(ids).toEqual([{ containerId, role: 'pod' }]);
  });

  describe('leaving', () => {
    test('the pod has finished', async () => {
      const job = await site.createPod({ namespace: inside, name: 'job' });
      site.startAgent();
      await site.untilRedirection(job, 'enabled');
      await plane.setPodStatus(inside, 'job', 'Failed', [job.sandbox.addresses[4]]);
      await site.untilRedirection(job, undefined);
      await until('the programs are gone', async () => (await role(job)) === 'none');
    });

    test('the pod was deleted while nobody watched, and its DEL never came', async () => {
      const web = await site.createPod({ namespace: inside, name: 'web' });
      const other = await site.createPod({ namespace: inside, name: 'other' });
      site.startAgent();
      await site.untilRedirection(web, 'enabled');
      await site.untilRedirection(other, 'enabled');
      await site.agent?.stop('SIGKILL');
      await plane.remove(site.path(web), { gracePeriodSeconds: 0 });
      site.startAgent();
      await until('it is forgotten', async () => (await site.attachment(web)) === undefined, 20_000);
      expect(await role(other)).toBe('pod');
      // What the runtime does late changes nothing.
      await site.topology.delete(web.sandbox);
    });

    test('a namesake that came later does not get the annotation of the one before', async () => {
      const first = await site.createPod({ namespace: inside, name: 'web-0' });
      site.startAgent();
      await site.untilRedirection(first, 'enabled');
      // What is patched about the second itself, which is not in the mesh, comes after this test has looked.
      let patches = 0;
      site.front.fault = ({ method }) => (method === 'PATCH' ? { delayMs: patches++ === 0 ? 500 : 5_000 } : undefined);
      // The patch about the first is on its way when the second takes its name.
      await plane.label(site.path(first), { [MODE]: 'none' });
      await until('the patch is sent', () => site.front.requests(({ method }) => method === 'PATCH') >= 2);
      await plane.remove(site.path(first), { gracePeriodSeconds: 0 });
      const uid = await plane.createPod({
        namespace: inside,
        name: 'web-0',
        node: site.nodeName,
        labels: { second: 'x' },
      });
      await plane.admin.mergePatch(`/api/v1/namespaces/${inside}/pods/web-0/status`, {
        metadata: { uid, annotations: { 'ambient.istio.io/redirection': 'mine' } },
      });
      await until('it was refused', () => site.front.answered.some(({ status }) => status === 422));
      expect(await plane.annotation(inside, 'web-0', 'ambient.istio.io/redirection')).toBe('mine');
    });

    test('the namespace is gone before its pods', async () => {
      const space = `doomed-${count}`;
      await plane.createNamespace(space, AMBIENT);
      const web = await site.createPod({ namespace: space, name: 'web' });
      site.startAgent();
      await site.untilRedirection(web, 'enabled');
      await site.agent?.stop('SIGKILL');
      await plane.remove(site.path(web), { gracePeriodSeconds: 0 });
      await plane.removeNamespace(space);
      site.startAgent();
      await until('it is forgotten', async () => (await site.attachment(web)) === undefined, 20_000);
    });
  });

  describe('what ADD asks', () => {
    test('a pod that is known, one that comes in time, one that does not exist', async () => {
      const uid = await plane.createPod({
        namespace: inside,
        name: 'known',
        node: site.nodeName,
        serviceAccount: 'web',
      });
      site.startAgent();
      await site.untilReady();
      expect(await site.ask(inside, 'known', uid)).toEqual({
        status: 200,
        body: { enrol: true, reason: 'an enablement selector matches its labels', serviceAccount: 'web' },
      });
      const late = site.ask(outside, 'late');
      await plane.createPod({ namespace: outside, name: 'late', node: site.nodeName });
      expect(await late).toMatchObject({ status: 200, body: { enrol: false } });
      expect(await site.ask(inside, 'nobody', uid)).toMatchObject({
        status: 200,
        body: { enrol: false, reason: `the API has no pod ${inside}/nobody with UID ${uid}` },
      });
      // A namesake of the one that is asked for.
      expect(await site.ask(inside, 'known', crypto.randomUUID())).toMatchObject({ body: { enrol: false } });
    });

    test('a pod that the watch has not brought is asked for by itself', async () => {
      site.startAgent();
      await site.untilReady();
      site.front.silence();
      await plane.createPod({ namespace: inside, name: 'unheard', node: site.nodeName, labels: {} });
      const before = site.front.requests(({ path }) => path.endsWith('/pods/unheard'));
      expect(await site.ask(inside, 'unheard')).toMatchObject({ status: 200, body: { enrol: true } });
      expect(site.front.requests(({ path }) => path.endsWith('/pods/unheard'))).toBe(before + 1);
    });

    test('an API that is away is an error, not a no', async () => {
      site.startAgent();
      await site.untilReady();
      site.front.fault = () => ({ cut: true });
      site.front.cutAll();
      const { status, body } = await site.ask(inside, 'unknown');
      expect({ status, msg: body.msg }).toEqual({ status: 500, msg: 'the node agent failed' });
    });
  });
});
