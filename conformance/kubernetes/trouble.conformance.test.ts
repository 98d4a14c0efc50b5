// SPDX-License-Identifier: Apache-2.0
//
// The agent while things go wrong: the API server away, tokens that expire, kill -9, an empty bpffs after a reboot, a
// clock that jumps, a second agent. What must hold each time: nothing is detached that the API does not say is to go,
// and in the end records, kernel, annotations and API agree.

import { existsSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { linkPin } from '../../plugin/attachments.ts';
import { NO_CAPACITY } from '../../plugin/migrate.ts';
import { counters, increases } from '../e2e/counters.ts';
import { HAProxy } from '../e2e/haproxy.ts';
import { isDirect } from '../e2e/mesh.ts';
import { executable, outsiderAddress } from '../e2e/topology.ts';
import { Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { NODE_PREFIX, REDIRECTION, Site, type SitePod } from './site.ts';

const MODE = 'istio.io/dataplane-mode';
const AMBIENT = { [MODE]: 'ambient' };
const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';
const FAKETIME = '/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1';

describe.runIf(missingControlPlane() === undefined)('trouble with kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let plane: ControlPlane;
  let count = 0;
  let site: Site;
  let namespace: string;
  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
    await plane.createNamespace('istio-system');
  }, 3_000_000);
  afterAll(() => testbed.close());
  beforeEach(async () => {
    namespace = `shop-${++count}`;
    await plane.createNamespace(namespace, AMBIENT);
    site = await Site.start(plane, `${NODE_PREFIX}${count}`);
    return () => site.close();
  });

  const role = async (pod: SitePod) => (await site.attachment(pod))?.role;
  async function enrolled(name: string): Promise<SitePod> {
    const pod = await site.createPod({ namespace, name });
    await site.untilRedirection(pod, 'enabled');
    return pod;
  }

  test('the API server is killed and comes back', async () => {
    site.startAgent();
    const web = await enrolled('web');
    const job = await enrolled('job');
    await plane.killApiServer();
    await until('the agent noticed', () => site.log().some(({ level, api }) => level === 'warn' && api === 'pods'));
    await site.agent?.stop('SIGKILL');
    // Also an agent that starts meanwhile leaves everything as it is, and says why it is not ready.
    site.startAgent();
    await until(
      'it is up',
      () =>
        site.page('8000/healthz').then(
          () => true,
          () => false,
        ),
      20_000,
    );
    expect(await site.page('8000/readyz')).toMatchObject({ status: 503, body: /^kubernetes: .*no list of pods yet/m });
    expect([await role(web), await role(job)]).toEqual(['pod', 'pod']);
    await plane.startApiServer();
    await plane.setPodStatus(namespace, 'job', 'Succeeded', [job.sandbox.addresses[4]]);
    await until('it leaves', async () => (await role(job)) === 'none', 40_000);
    await site.untilReady();
    expect([await role(web), await site.redirection(web)]).toEqual(['pod', 'enabled']);
  }, 120_000);

  test('what ended while the watch was too old (410)', async () => {
    site.startAgent();
    const web = await enrolled('web');
    const gone = await enrolled('gone');
    let refused = 0;
    site.front.fault = ({ watch, path }) =>
      watch && path === '/api/v1/pods' && refused++ === 0 ? { watchStatus: 410 } : undefined;
    site.front.silence();
    await plane.remove(site.path(gone), { gracePeriodSeconds: 0 });
    site.front.cutAll();
    await until('it is forgotten', async () => (await site.attachment(gone)) === undefined, 20_000);
    expect(await role(web)).toBe('pod');
    expect(await site.metric('ambient_redirect_api_watch_ends_total', { resource: 'pods', reason: 'expired' })).toBe(1);
  });

  test('a list that wrongly names no pod detaches none', async () => {
    site.startAgent();
    const web = await enrolled('web');
    // A 410, then a list without the pod: whoever is missing is asked for by itself.
    let lists = 0;
    site.front.fault = ({ watch, path, query }) => {
      if (path !== '/api/v1/pods') return undefined;
      if (watch) return lists === 0 ? { watchStatus: 410 } : undefined;
      query.set('fieldSelector', lists++ === 0 ? 'spec.nodeName=nobody' : `spec.nodeName=${site.nodeName}`);
      return undefined;
    };
    site.front.cutAll();
    await until(
      'it was asked for',
      () => site.front.requests(({ method, path }) => method === 'GET' && path === site.path(web)) > 0,
    );
    expect([await role(web), await site.redirection(web)]).toEqual(['pod', 'enabled']);
  });

  test('a patch that is refused (409) or fails (500) is sent again', async () => {
    const statuses = [409, 500, 429];
    site.front.fault = ({ method }) => {
      const status = method === 'PATCH' ? statuses.shift() : undefined;
      return status === undefined ? undefined : { status };
    };
    site.startAgent();
    await enrolled('web');
    expect(statuses).toEqual([]);
  });

  test('a token that expires, and is renewed', async () => {
    const uid = await plane.createServiceAccount('istio-system', `agent-${count}`);
    await plane.admin.create('/apis/rbac.authorization.k8s.io/v1/clusterrolebindings', {
      metadata: { name: `agent-${count}` },
      roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'ClusterRole', name: 'cluster-admin' },
      subjects: [{ kind: 'ServiceAccount', name: `agent-${count}`, namespace: 'istio-system' }],
    });
    const token = (seconds: number) => plane.serviceAccountToken('istio-system', `agent-${count}`, uid, seconds);
    site.tokenFile = join(site.topology.runDir, '..', 'token');
    writeFileSync(site.tokenFile, token(3_600));
    site.startAgent();
    const web = await enrolled('web');
    writeFileSync(site.tokenFile, token(-60));
    site.front.cutAll();
    await until('it is refused', () => /cannot be followed: .*401 Unauthorized/.test(site.agent?.output ?? ''), 20_000);
    expect(await role(web)).toBe('pod');
    writeFileSync(site.tokenFile, token(3_600));
    await enrolled('later');
  });

  test(`${LONG ? 500 : 20} pods from a cold start`, async () => {
    const count = LONG ? 500 : 20;
    const uids = await site.idlePods(namespace, count);
    site.startAgent();
    const answered = (page: string) => site.page(page).catch(() => undefined);
    await until('it is up', async () => (await answered('8000/healthz')) !== undefined, 60_000);
    // Throws where an answer takes 5 s: a kubelet that gets none in time kills the agent.
    do expect((await site.page('8000/healthz')).status).toBe(200);
    while ((await site.page('8000/readyz')).status !== 200);
    const annotated = async () => {
      const { items } = await plane.admin.list(`/api/v1/namespaces/${namespace}/pods`);
      return items.filter(({ metadata }) => {
        const { annotations } = metadata as { annotations?: Record<string, string> };
        return annotations?.[REDIRECTION] === 'enabled';
      }).length;
    };
    await until('every pod is annotated', async () => (await annotated()) === count, 600_000);
    const rows = await site.attachments();
    expect(new Set(rows.map((row) => `${row.role} ${row.state}`))).toEqual(new Set(['pod attached']));
    expect(rows.map(({ uid }) => uid).sort()).toEqual(uids.sort());
  }, 1_200_000);

  test(`kill -9 at ${LONG ? 50 : 4} random points while pods come, go and change sides`, async () => {
    site.startAgent();
    const stay = [
      await site.createPod({ namespace, name: 'stay-0' }),
      await site.createPod({ namespace, name: 'stay-1' }),
    ];
    let killing = true;
    const killed = (async () => {
      for (let i = 0; i < (LONG ? 50 : 4); i++) {
        await new Promise((resolve) => setTimeout(resolve, Math.random() * 1_500));
        await site.agent?.stop('SIGKILL');
        site.startAgent();
      }
      killing = false;
    })();
    for (let i = 0; killing; i++) {
      const pod = await site.createPod({ namespace, name: `come-${i}` });
      await plane.label(site.path(stay[i % 2] as SitePod), { [MODE]: i % 4 < 2 ? 'none' : null });
      await site.topology.delete(pod.sandbox);
      await plane.remove(site.path(pod), { gracePeriodSeconds: 0 });
    }
    await killed;
    for (const pod of stay) await plane.label(site.path(pod), { [MODE]: null });
    for (const pod of stay) await site.untilRedirection(pod, 'enabled', 20_000);
    await site.untilReady(60_000);
    await until(
      'only what is there is recorded',
      async () => (await site.attachments()).length === stay.length,
      20_000,
    ).catch(async (error: Error) => {
      const rows = (await site.attachments()).map(({ name, uid, role: what, state }) => ({ name, uid, what, state }));
      throw new Error(
        `${error.message}: ${JSON.stringify(rows)}; the agent said:\n${site.agent?.output.slice(-4_000)}`,
      );
    });
    expect((await site.attachments()).map((row) => `${row.name} ${row.role} ${row.state}`).sort()).toEqual([
      'stay-0 pod attached',
      'stay-1 pod attached',
    ]);
    const { node, stateDir, runDir } = site.topology;
    const status = await node.exec([executable, 'status', '-o', 'json', '--state-dir', stateDir, '--run-dir', runDir]);
    const { problems } = JSON.parse(status.stdout) as { problems: { object: string; severity: string }[] };
    // No proxy is here.
    expect(problems.filter(({ object }) => object !== 'proxy')).toEqual([]);
  }, 600_000);

  test('after a reboot: bpffs is empty, annotations still say "enabled"', async () => {
    site.startAgent();
    const web = await enrolled('web');
    const lost = await enrolled('lost');
    await site.process(web);
    await site.agent?.stop('SIGKILL');
    const { stateDir, runDir } = site.topology;
    rmSync(stateDir, { recursive: true });
    rmSync(runDir, { recursive: true });
    expect([existsSync(stateDir), await site.redirection(web), await site.redirection(lost)]).toEqual([
      false,
      'enabled',
      'enabled',
    ]);
    site.startAgent();
    // Nobody can tell where this one is: it is not redirected, and must not be said to be.
    await site.untilRedirection(lost, undefined, 20_000);
    await site.untilReady();
    expect(await site.redirection(web)).toBe('enabled');
    // What went around the proxy meanwhile cannot be undone, but it is said.
    expect(await site.metric('ambient_redirect_enrolments_total', { event: 'found_open' })).toBe(2);
    const rows = await site.attachments();
    expect(rows.map(({ name, role: what, state, addresses }) => ({ name, what, state, addresses }))).toEqual([
      { name: 'web', what: 'pod', state: 'attached', addresses: expect.arrayContaining([web.sandbox.addresses[4]]) },
    ]);
  });

  test.each(['closed', 'open'] as const)(
    'what a pod opens while the state is lost, failurePolicy %s',
    async (policy) => {
      const { topology } = site;
      const proxy = await site.proxy(`ztunnel-${count}`);
      await new HAProxy(topology.testbed, proxy.sandbox.netns, 'only').start();
      await topology.outsider.listen(8080);
      await plane.label(`/api/v1/namespaces/${namespace}`, { [MODE]: null });
      const web = await site.createPod({ namespace, name: 'web' });
      const { endpoint } = web.sandbox;
      const connect = () => endpoint.connect(outsiderAddress[4], 8080);
      const older = await connect();
      site.startAgent({ entry: { failurePolicy: policy } });
      await plane.label(`/api/v1/namespaces/${namespace}`, AMBIENT);
      await site.untilRedirection(web, 'enabled');
      const proxied = await connect();
      expect([isDirect(older), isDirect(proxied)]).toEqual([true, false]);
      await endpoint.exchange(older, 1_000);
      await site.process(web);
      await site.process(proxy);
      await site.agent?.stop('SIGKILL');
      rmSync(topology.stateDir, { recursive: true });
      // The kernel takes links away some time after their last pin.
      let meanwhile = proxied;
      await until('nothing of ours is there', async () => {
        const opened = await endpoint.connect(outsiderAddress[4], 8080, { timeout: 1_000 }).catch(() => proxied);
        meanwhile = opened;
        return isDirect(opened);
      });

      site.startAgent({ entry: { failurePolicy: policy } });
      await until('both are attached', async () => (await site.attachments()).length === 2, 20_000);
      await site.untilReady();
      expect(await site.redirection(web)).toBe('enabled');
      expect(isDirect(await connect())).toBe(false);
      // The proxy still has its socket, by which the programs know the connection.
      await endpoint.exchange(proxied, 1_000);
      const before = counters(topology.stateDir);
      if (policy === 'open') {
        await endpoint.exchange(meanwhile, 1_000);
        return;
      }
      await expect(endpoint.exchange(meanwhile, 1_000, 600)).rejects.toThrow();
      expect(increases(before, counters(topology.stateDir), web.sandbox.hostIfindex)).toHaveProperty([
        'pod_egress drop_orphaned_flow',
      ]);
      expect(site.log().map(({ msg }) => msg)).toContainEqual(
        expect.stringMatching(
          /shop-\d+\/web: its annotation .* connections opened until now were direct, and do not go on/,
        ),
      );
    },
  );

  test('an agent that another build has taken the node from attaches nothing', async () => {
    const native = loadNative();
    site.startAgent({ reconcileSeconds: 1 });
    const web = await enrolled('web');
    await site.untilReady();
    const { stateDir, runDir, node } = site.topology;
    const migrate = (build?: string) => {
      const script = join(import.meta.dirname, '../../plugin/migrate.testing.ts');
      const wanted = JSON.stringify({ stateDir, runDir, ...NO_CAPACITY });
      const env = {
        PATH: process.env.PATH ?? '',
        AMBIENT_REDIRECT_ADDON: join(import.meta.dirname, '../../build/Release/ambient_redirect_faults.node'),
        ...(build !== undefined && { AMBIENT_REDIRECT_OBJECT_ID: build }),
      };
      return node.exec([process.execPath, script, wanted, '0'], { env });
    };
    const builds = () => readdirSync(join(stateDir, 'programs'));
    const own = builds();
    const other = '0123456789abcdef';
    expect(await migrate(other)).toMatchObject({ status: 0 });
    expect(builds()).toEqual([other]);
    const state = native.openState(stateDir);
    try {
      const [found] = native.listAttachments(state);
      if (found === undefined) throw new Error('nothing is recorded');
      const pin = linkPin(stateDir, found.key, 'pod_egress');
      rmSync(pin);
      const later = await site.createPod({ namespace, name: 'later' });
      const said = (text: RegExp) => site.log().some((line) => text.test(JSON.stringify(line)));
      await until(
        'it is not repaired',
        () => said(/shop-\d+\/web.*could not be made again|could not be made again.*shop-\d+\/web/),
        20_000,
      );
      await until('nor enrolled', () => said(/later: another build has taken over/), 20_000);
      expect([builds(), await role(later), await site.redirection(later)]).toEqual([[other], 'none', undefined]);
      expect(await site.page('8000/readyz')).toMatchObject({
        status: 503,
        body: expect.stringMatching(/^build: .* has the programs of another build \(0123456789abcdef\)/),
      });
      // The way back.
      expect(await migrate()).toMatchObject({ status: 0 });
      await until('it is repaired', () => native.linkInfo(pin) !== null, 20_000);
      await site.untilRedirection(later, 'enabled', 20_000);
      expect([builds(), await role(web)]).toEqual([own, 'pod']);
    } finally {
      native.closeState(state);
    }
  });

  test('the state is removed and made anew beside the agent, as by uninstall and install', async () => {
    // It is not the next period that notices.
    site.startAgent({ reconcileSeconds: 3_600 });
    const web = await enrolled('web');
    await site.untilReady();
    await site.process(web);
    rmSync(site.topology.stateDir, { recursive: true });
    await until('it is noticed', () => site.log().some(({ msg }) => /^the state was removed/.test(String(msg))));
    await enrolled('later');
    const rows = async () =>
      (await site.attachments()).map(({ name, role: what, state }) => `${name} ${what} ${state}`);
    await until('both are in the new state', async () => (await rows()).length === 2, 20_000);
    expect((await rows()).sort()).toEqual(['later pod attached', 'web pod attached']);
    expect(await site.metric('ambient_redirect_drift_total', { kind: 'state' })).toBe(1);
    expect(await site.metric('ambient_redirect_enrolments_total', { event: 'found_open' })).toBe(1);
  });

  test('a second agent on the node says so and ends; the first goes on', async () => {
    const first = site.startAgent();
    await site.untilReady();
    const second = site.startAgent();
    await second.ended;
    expect(second.output).toMatch(new RegExp(`another agent \\(process \\d+\\) runs with ${site.topology.runDir}`));
    site.agent = first;
    expect(first.alive).toBe(true);
    await enrolled('web');
  });

  test.each([
    ['forward', '+90m'],
    ['back', '-90m'],
  ])('the clock jumps %s', async (_, jump) => {
    const file = join(site.topology.runDir, '..', 'clock');
    writeFileSync(file, '+0');
    const under = [
      'env',
      `LD_PRELOAD=${FAKETIME}`,
      `FAKETIME_TIMESTAMP_FILE=${file}`,
      'FAKETIME_NO_CACHE=1',
      'FAKETIME_DONT_FAKE_MONOTONIC=1',
    ];
    site.startAgent({ under });
    const web = await enrolled('web');
    writeFileSync(file, jump);
    await plane.label(site.path(web), { [MODE]: 'none' });
    await site.untilRedirection(web, undefined);
    await enrolled('later');
    await until('programs are gone', async () => (await role(web)) === 'none');
    expect(site.log().filter(({ level }) => level === 'error')).toEqual([]);
  });

  test('what was cut short is finished at once; what is at work is left alone', async () => {
    const native = loadNative();
    site.startAgent();
    const web = await enrolled('web');
    await site.untilReady();
    const path = join(site.topology.runDir, 'migration.lock');
    const state = native.openState(site.topology.stateDir);
    // As an ADD holds it that is at work.
    const lock = native.lockShared(path, 0);
    try {
      const [found] = native.listAttachments(state);
      if (found === undefined) throw new Error('nothing is recorded');
      const { key, record } = found;
      const now = () => native.getAttachment(state, key)?.state;
      native.putAttachment(state, key, { ...record, state: 'attaching', enrolledAt: Math.floor(Date.now() / 1000) });
      await plane.label(site.path(web), { look: 'again' });
      await until('it is left alone', async () => (await site.metric('ambient_redirect_queue_failing')) === 1, 20_000);
      expect(now()).toBe('attaching');
      native.close(lock);
      await plane.label(site.path(web), { look: 'once-more' });
      await until('it is finished', () => now() === 'attached');
    } finally {
      native.closeState(state);
    }
    await site.untilReady();
    expect([await role(web), await site.redirection(web)]).toEqual(['pod', 'enabled']);
  });

  test('annotations of a pod that change while the agent is away', async () => {
    site.startAgent();
    const web = await enrolled('web');
    const same = await enrolled('same');
    await site.agent?.stop('SIGKILL');
    const annotations = {
      'traffic.sidecar.istio.io/excludeOutboundIPRanges': '192.0.2.0/24',
      'ambient.istio.io/bypass-inbound-capture': 'true',
    };
    await plane.admin.mergePatch(site.path(web), { metadata: { annotations } });
    site.startAgent();
    const isWhole = async () => (await site.attachment(web))?.state === 'attached';
    await until('they are in force', async () => site.exclusions(web).length === 1 && (await isWhole()), 20_000);
    await site.agent?.stop('SIGKILL');
    const none = Object.fromEntries(Object.keys(annotations).map((key) => [key, null]));
    await plane.admin.mergePatch(site.path(web), { metadata: { annotations: none } });
    site.startAgent();
    await until('and gone', () => site.exclusions(web).length === 0, 20_000);
    await site.untilReady();
    expect([await site.redirection(web), await site.redirection(same)]).toEqual(['enabled', 'enabled']);
    expect(
      site
        .log()
        .filter(({ msg }) => /asks for something else/.test(`${msg}`))
        .map(({ uid }) => uid),
    ).toEqual([web.uid]);
    expect(await site.metric('ambient_redirect_enrolments_total', { event: 'found_open' })).toBe(0);
  });

  test('what a pod has is being changed when the agent is killed', async () => {
    const native = loadNative();
    site.startAgent();
    const web = await enrolled('web');
    await site.agent?.stop('SIGKILL');
    const annotations = { 'traffic.sidecar.istio.io/excludeOutboundPorts': '9999' };
    await plane.admin.mergePatch(site.path(web), { metadata: { annotations } });
    const state = native.openState(site.topology.stateDir);
    try {
      // As it leaves the record; its programs go on.
      for (const { key, record } of native.listAttachments(state)) {
        native.putAttachment(state, key, { ...record, state: 'attaching' });
      }
    } finally {
      native.closeState(state);
    }
    site.startAgent();
    // Long before the record is old enough to tell by itself that nobody is at work.
    await until('they are in force', () => site.exclusions(web).length === 1, 20_000);
    await site.untilReady();
    expect(await site.attachment(web)).toMatchObject({ role: 'pod', state: 'attached' });
    expect(await site.redirection(web)).toBe('enabled');
    // Nothing of it went around the proxy.
    expect(await site.metric('ambient_redirect_enrolments_total', { event: 'found_open' })).toBe(0);
  });

  test("a pod's exclusions change while it runs", async () => {
    site.startAgent();
    const web = await enrolled('web');
    const key = 'traffic.sidecar.istio.io/excludeOutboundPorts';
    await plane.admin.mergePatch(site.path(web), { metadata: { annotations: { [key]: '9999' } } });
    const exclusions = () => site.exclusions(web);
    await until('they are in force', () => exclusions().length === 1);
    await plane.admin.mergePatch(site.path(web), { metadata: { annotations: { [key]: null } } });
    await until('and gone', () => exclusions().length === 0);
    expect(await site.redirection(web)).toBe('enabled');
  });

  test('a pod that cannot be attached has an event that says why, and no annotation', async () => {
    site.startAgent();
    const annotations = { 'traffic.sidecar.istio.io/excludeOutboundPorts': 'all' };
    const web = await site.createPod({ namespace, name: 'web', annotations });
    const events = async () =>
      (await plane.admin.list(`/api/v1/namespaces/${namespace}/events`)).items.map(({ message }) => message);
    await until('there is an event', async () => (await events()).length > 0, 20_000);
    expect(await events()).toEqual([
      expect.stringMatching(/invalid pod annotation traffic.sidecar.istio.io\/excludeOutboundPorts.*"all"/),
    ]);
    expect([await role(web), await site.redirection(web)]).toEqual(['none', undefined]);
    expect(await site.metric('ambient_redirect_queue_failing')).toBe(1);
    await plane.admin.mergePatch(site.path(web), {
      metadata: { annotations: { 'traffic.sidecar.istio.io/excludeOutboundPorts': null } },
    });
    await site.untilRedirection(web, 'enabled');
  });
});
