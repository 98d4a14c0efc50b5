// SPDX-License-Identifier: Apache-2.0
//
// Dashboard and alerts on a real Prometheus that scrapes a real agent, with an API server and a ztunnel (the stand-in)
// beside it: every query has an answer, and what is wrong on the node shows.

import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { linkPin } from '../../plugin/attachments.ts';
import type { Counter } from '../../plugin/native.ts';
import { executable, outsiderAddress } from '../e2e/topology.ts';
import { missingControlPlane } from '../kubernetes/build.ts';
import { ControlPlane } from '../kubernetes/control-plane.ts';
import { NODE_PREFIX, Site, type SitePod } from '../kubernetes/site.ts';
import { type Running, Testbed, until } from '../netns.ts';
import { alerts, dashboard, metricOf, selectors } from './monitoring.ts';
import { Prometheus } from './prometheus.ts';

const NODE = `${NODE_PREFIX}1`;
const APP = 8080;
const PRIMARY = '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"}]}';

/** Queries without an answer while all is well, and why; each has one as soon as what it shows is there. */
const QUIET: Readonly<Record<string, string>> = {
  'Not ready, by condition': 'every agent is ready',
  'Dropped and reset, by reason': 'nothing has been dropped',
};

/** Selectors of alerts on packets that this node never sees: programs of the repository's own tests send them. */
const UNSEEN = /reason=~?"(drop_\((redirect_failed|forged_sign)|pass_failure_policy_open)/;

describe.runIf(missingControlPlane() === undefined)('Prometheus, with kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let site: Site;
  let prometheus: Prometheus;
  let ztunnel: Running;
  let web: SitePod;
  let conflist: string;
  let began: number;
  beforeAll(async () => {
    const plane = await ControlPlane.start(testbed);
    await plane.createNamespace('istio-system');
    await plane.createNamespace('shop', { 'istio.io/dataplane-mode': 'ambient' });
    const proxy = { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } };
    site = await Site.start(plane, NODE, { entry: { proxy, enrollment: 'agent' } });
    await install();
    site.startAgent({ reconcileSeconds: 1 });
    await site.untilReady();
    startZtunnel();
    await until('ztunnel is there', () => site.metric('ztunnel_connected').then((value) => value === 1), 10_000);
    // Asked for by its ADD, so that the plugin has a question to count.
    web = await site.createPod({ namespace: 'shop', name: 'web', serviceAccount: 'web' });
    know(web);
    await site.untilRedirection(web, 'enabled');
    await site.topology.outsider.listen(APP);
    began = Date.now() / 1000;
    const agent = {
      name: 'istio-cni-node-x7k2p',
      node: NODE,
      ip: '127.0.0.1',
      app: 'istio-cni-node',
      phase: 'Running',
    };
    prometheus = await Prometheus.start(testbed, site.topology.node, [
      // One for each of its container's ports.
      agent,
      agent,
      { ...agent, name: 'istio-cni-node-9dj4w', node: 'node-2', ip: '::1' },
      { ...agent, name: 'istio-cni-node-w2b8c', node: 'node-3', ip: '127.0.0.9', phase: 'Failed' },
      { ...agent, name: 'istio-cni-node-l5m3t', node: 'node-4', ip: '', phase: 'Pending' },
      { ...agent, name: 'web', node: 'node-5', ip: '127.0.0.10', app: 'web' },
    ]);
    await until('it has scraped', async () => (await prometheus.query('up == 1')).length === 1, 10_000);
    // Observations after the first scrape: what has no increase has no quantiles.
    know(web, await site.createPod({ namespace: 'shop', name: 'server', serviceAccount: 'server' }));
    await talk();
  }, 3_000_000);
  afterAll(async () => {
    await site?.close();
    testbed.close();
  });

  async function install(): Promise<void> {
    const { node, stateDir, runDir } = site.topology;
    const netDir = testbed.directory('net.d');
    conflist = join(netDir, '10-pods.conflist');
    writeFileSync(conflist, PRIMARY);
    const directories = ['--state-dir', stateDir, '--run-dir', runDir, '--cni-net-dir', netDir];
    const { status, stderr } = await node.exec([
      ...[executable, 'install', ...directories, '--cni-bin-dir', testbed.directory('bin')],
      ...['--contract', 'in-pod', '--enrollment', 'agent'],
    ]);
    expect({ status, stderr }).toMatchObject({ status: 0 });
  }

  const xds = () => join(site.topology.runDir, '..', 'xds.yaml');
  const know = (...pods: SitePod[]) => {
    const rows = pods.map(({ namespace, name, sandbox: { addresses } }) => ({
      ...{ namespace, name, serviceAccount: name },
      addresses: [addresses[4], addresses[6]],
    }));
    writeFileSync(xds(), JSON.stringify(rows));
  };
  function startZtunnel(): void {
    if (web === undefined) writeFileSync(xds(), '[]');
    const { testbed: bed, node } = site.topology;
    const options = ['--socket', site.zdsSocket, '--xds', xds(), '--drain-ms', '0'];
    ztunnel = bed.start(node.argv([executable, 'stand-in-ztunnel', ...options]));
  }
  /** Through ztunnel to the outside. */
  async function talk(): Promise<void> {
    for (const family of [4, 6] as const) {
      const { endpoint } = web.sandbox;
      const connection = await endpoint.connect(outsiderAddress[family], APP);
      await endpoint.exchange(connection, 10_000);
      await endpoint.close(connection);
    }
  }

  const panels = dashboard('10s');
  const queries = panels.flatMap(({ title, queries: all }) => all.map((query) => ({ title, query })));
  /** Titles of panels with a query that has had no number since Prometheus began. */
  const silent = async (wanted: typeof queries): Promise<string[]> => {
    const titles: string[] = [];
    for (const { title, query } of wanted) if ((await prometheus.range(query, began)).length === 0) titles.push(title);
    return titles;
  };
  const named = async (state?: string): Promise<string[]> =>
    (await prometheus.alerts())
      .filter((alert) => state === undefined || alert.state === state)
      .map(({ labels }) => `${labels.alertname} ${labels.instance}`)
      .sort();

  test('the scrape configuration takes each agent once, by its node', async () => {
    expect(
      (await prometheus.targets())
        .map(({ labels, scrapeUrl }) => `${labels.instance} ${labels.pod} ${scrapeUrl}`)
        .sort(),
    ).toEqual([
      'node-1 istio-cni-node-x7k2p http://127.0.0.1:15014/metrics',
      'node-2 istio-cni-node-9dj4w http://[::1]:15014/metrics',
    ]);
  });

  test('every metric of ours is shown or watched, and none is that the agent does not have', async () => {
    const { body } = await site.page('15014/metrics');
    const exported = [...body.matchAll(/^# TYPE (\S+)/gm)].map(([, name]) => name);
    const used = new Set(
      [...queries.map(({ query }) => query), ...alerts().map(({ expr }) => expr)].flatMap((text) =>
        selectors(text).map(metricOf),
      ),
    );
    expect([...used].filter((name) => !exported.includes(name))).toEqual([]);
    const ours = exported.filter((name) => /^(ambient_redirect|istio_cni|nodeagent|ztunnel)_/.test(name ?? ''));
    expect(ours.filter((name) => !used.has(name ?? ''))).toEqual([]);
    expect(ours.length).toBeGreaterThan(20);
  });

  test('while all is well every query of the dashboard has an answer, and only a node that is down alerts', async () => {
    const loud = queries.filter(({ title }) => QUIET[title] === undefined);
    let left: string[] = [];
    await until(
      'every query has an answer',
      async () => {
        await talk();
        left = await silent(loud);
        return left.length === 0;
      },
      30_000,
    ).catch((error: Error) => {
      throw new Error(`${error.message}; without one: ${left.join(', ')}`);
    });
    for (const title of Object.keys(QUIET)) {
      const own = queries.filter((one) => one.title === title);
      expect(own.length).toBeGreaterThan(0);
      for (const { query } of own)
        expect({ title, answers: await prometheus.query(query) }).toEqual({ title, answers: [] });
    }
    // Where ztunnel runs in a v2 cgroup of its own its mark cannot be forged; the stand-in does on no machine for certain.
    const forgeable = 'AmbientRedirectMarkForgeable node-1';
    expect((await named()).filter((alert) => alert !== forgeable)).toEqual(['AmbientRedirectAgentDown node-2']);
    expect((await named()).includes(forgeable)).toBe((await site.metric('ambient_redirect_mark_forgeable')) === 1);
  });

  test('no ztunnel: what is dropped shows, and the alerts begin', async () => {
    await ztunnel.stop('SIGKILL');
    const refused = () =>
      web.sandbox.endpoint.connect(outsiderAddress[4], APP, { timeout: 200 }).then(
        () => expect.unreachable('there is nobody to connect to'),
        () => {},
      );
    const wanted = ['AmbientRedirectNoListener node-1', 'AmbientRedirectZtunnelGone node-1'];
    await until(
      'the alerts are pending',
      async () => {
        await refused();
        const pending = await named('pending');
        return wanted.every((alert) => pending.includes(alert));
      },
      30_000,
    );
    const shown = queries.filter(({ title }) => title === 'Dropped and reset, by reason');
    // An increase is what a later scrape has more than an earlier one that had the counter already.
    await until(
      'the panel shows it',
      async () => {
        await refused();
        return (await silent(shown)).length === 0;
      },
      30_000,
    );
    startZtunnel();
    await until('ztunnel is there again', () => site.metric('ztunnel_connected').then((value) => value === 1), 10_000);
    await until('one has ended', async () => !(await named()).includes('AmbientRedirectZtunnelGone node-1'), 20_000);
  });

  test('no conflist: the condition shows, and its alert begins', async () => {
    const before = readFileSync(conflist);
    rmSync(conflist);
    await until(
      'the alert',
      async () => (await named('pending')).includes('AmbientRedirectEntryMissing node-1'),
      30_000,
    );
    const shown = queries.filter(({ title }) => title === 'Not ready, by condition');
    await until('the panel shows it', async () => (await silent(shown)).length === 0, 10_000);
    writeFileSync(conflist, before);
    await until('it has ended', async () => !(await named()).includes('AmbientRedirectEntryMissing node-1'), 30_000);
  });

  test('a program that somebody takes away: drift fires at once', async () => {
    const native = loadNative();
    const { stateDir } = site.topology;
    const state = native.openState(stateDir);
    const found = native.listAttachments(state).find(({ record }) => record.podUid === web.uid);
    native.closeState(state);
    if (found === undefined) throw new Error('web is not recorded');
    rmSync(linkPin(stateDir, found.key, 'inpod_egress'));
    await until('the alert', async () => (await named('firing')).includes('AmbientRedirectDrift node-1'), 30_000);
    expect(await prometheus.query('increase(ambient_redirect_drift_total{kind="link"}[1m]) > 0')).toHaveLength(1);
  });

  test('each selector of an alert has had series', async () => {
    const wanted = [...new Set(alerts().flatMap(({ expr }) => selectors(expr)))].filter((one) => !UNSEEN.test(one));
    expect(wanted.length).toBeGreaterThan(15);
    const missing: string[] = [];
    for (const selector of wanted) {
      // What alerts on answers that are none is watched by the metric without them.
      const query = selector.replace(', response_code!="200"', '');
      if ((await prometheus.range(query, began)).length === 0) missing.push(selector);
    }
    expect(missing).toEqual([]);
  });

  test('an agent that starts again counts from 0, not what the kernel has counted before it', async () => {
    const { node, stateDir, runDir } = site.topology;
    const name = 'ambient_redirect_packets_total{program="inpod_egress",reason="redirected_outbound"}';
    const counted = async () =>
      Number(
        (await site.page('15014/metrics')).body
          .split('\n')
          .find((line) => line.startsWith(name))
          ?.split(' ')
          .at(-1),
      );
    const inKernel = async () => {
      const argv = [executable, 'counters', '-o', 'json', '--state-dir', stateDir, '--run-dir', runDir];
      const counters = JSON.parse((await node.exec(argv)).stdout) as (Counter & { packets: number })[];
      const wanted = counters.filter(
        ({ program, reason }) => program === 'inpod_egress' && reason === 'redirected_outbound',
      );
      return wanted.reduce((sum, { packets }) => sum + packets, 0);
    };
    await talk();
    await site.agent?.stop('SIGKILL');
    const before = await inKernel();
    expect(before).toBeGreaterThan(1);
    site.startAgent({ reconcileSeconds: 1 });
    await site.untilReady();
    expect(await counted()).toBe(0);
    await until('ztunnel is there again', () => site.metric('ztunnel_connected').then((value) => value === 1), 20_000);
    await talk();
    expect(await counted()).toBe((await inKernel()) - before);
  });
});
