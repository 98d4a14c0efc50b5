// SPDX-License-Identifier: Apache-2.0
// Section 2: pods come and go in every way that kubelet knows.

import { rmSync, writeFileSync } from 'node:fs';
import { until } from '../netns.ts';
import { isReady } from './cluster.ts';
import { type Ground, ONE, PORT, SERVER, SHOP, TWO } from './ground.ts';
import { controller, pod, podSpec, REDIRECTION, role, SYSTEM } from './manifests.ts';
import { address, ask, expectWay, logLines, sightings, urlOf } from './mesh.ts';

const MANY = 50;

export async function churn(ground: Ground): Promise<void> {
  const { step, section, cluster } = ground;
  section('2 Pods come and go');

  await step('a new pod is redirected from its first connection on', async () => {
    const far = ground.pod('far');
    const born = await ground.run({ name: 'born', node: ONE, command: role('load', urlOf(far, PORT), '50') });
    await until('it has asked', () => logLines(cluster, born).length >= 10, 20_000);
    const lines = logLines(cluster, born);
    const wrong = lines.find((line) => line.direct !== false);
    if (wrong !== undefined) throw new Error(`one of its requests: ${JSON.stringify(wrong)}`);
    const mine = sightings(cluster).filter(({ source }) => source === address(born));
    if (mine.length < lines.length) throw new Error(`${lines.length} requests, the proxies list ${mine.length}`);
    await ground.untilAnnotated('enabled');
  });
  await step('a deleted pod leaves nothing behind', async () => {
    const { metadata } = ground.pod('born');
    await ground.delete('born');
    await until(
      'its row is gone',
      async () => !(await ground.rows(ONE)).some(({ uid }) => uid === metadata.uid),
      20_000,
    );
  });
  await step('sandbox killed: the same pod in a new sandbox is redirected again', async () => {
    for (const [name, node] of [
      ['near', ONE],
      ['far', TWO],
    ] as const) {
      const { metadata } = ground.pod(name);
      const row = (await ground.rows(node)).find(({ uid }) => uid === metadata.uid);
      if (row === undefined) throw new Error(`${name} is not recorded`);
      await cluster.node(node).killTask(row.containerId);
      await until(
        `${name} has another sandbox`,
        async () => (await ground.rows(node)).some((now) => now.uid === row.uid && now.containerId !== row.containerId),
        60_000,
      );
      const [fresh] = (await ground.rows(node)).filter(
        (now) => now.uid === row.uid && now.containerId !== row.containerId,
      );
      // kubelet's report of the pod's new address comes later than that.
      await cluster.untilPod(
        SHOP,
        name,
        'is ready in it',
        (now) => isReady(now) && fresh?.addresses.includes(now.status.podIP ?? '') === true,
      );
      await until(
        `of ${name}'s old sandbox nothing is recorded`,
        async () => !(await ground.rows(node)).some((now) => now.containerId === row.containerId),
        20_000,
      );
    }
    await ground.untilAnnotated('enabled');
    await ground.refresh();
    await ground.traffic(true);
  });
  await step('a static pod is redirected and annotated', async () => {
    const node = cluster.node(TWO);
    const manifest = node.path('/etc/kubernetes/manifests/fixed.yaml');
    // A static pod cannot wait for a service account.
    writeFileSync(manifest, JSON.stringify(pod({ namespace: SHOP, name: 'fixed', ...SERVER })));
    const fixed = await cluster.untilReady(SHOP, `fixed-${TWO}`).catch((error: Error) => {
      // It is no part of the sections after this one.
      rmSync(manifest);
      throw error;
    });
    await cluster.untilPod(
      SHOP,
      `fixed-${TWO}`,
      'is annotated',
      ({ metadata }) => metadata.annotations?.[REDIRECTION] === 'enabled',
    );
    const client = ground.pod('client');
    await expectWay(cluster, client, urlOf(fixed, PORT), ground.ways(ONE, TWO, 'pod'), `fixed-${TWO}`);
    rmSync(manifest);
    await until('it is gone', async () => (await cluster.pod(SHOP, `fixed-${TWO}`)) === null, 60_000);
    const hash = fixed.metadata.annotations?.['kubernetes.io/config.hash'];
    await until('its row too', async () => !(await ground.rows(TWO)).some(({ uid }) => uid === hash), 20_000);
  });
  await step('a Job that finishes: by the proxies while it ran, and out of the mesh when it has ended', async () => {
    const name = 'once';
    await cluster.apply({
      apiVersion: 'batch/v1',
      kind: 'Job',
      metadata: { namespace: SHOP, name },
      spec: {
        backoffLimit: 0,
        template: {
          metadata: { labels: { app: name } },
          spec: podSpec({
            namespace: SHOP,
            name,
            node: ONE,
            command: role('ask', urlOf(ground.pod('far'), PORT)),
            more: { restartPolicy: 'Never' },
          }),
        },
      },
    });
    await until(
      'it has succeeded',
      async () => (await cluster.pods(SHOP, `app=${name}`))[0]?.status.phase === 'Succeeded',
      60_000,
    );
    const [ended] = await cluster.pods(SHOP, `app=${name}`);
    if (ended === undefined) throw new Error('its pod is gone');
    const [line] = logLines(cluster, ended);
    if (line === undefined || line.localPort === line.clientPort)
      throw new Error(`it went direct: ${JSON.stringify(line)}`);
    await until(
      'it is enrolled no more',
      async () => {
        const [now] = await cluster.pods(SHOP, `app=${name}`);
        const rows = await ground.enrolled();
        return (
          now?.metadata.annotations?.[REDIRECTION] === undefined && !rows.some(({ uid }) => uid === now?.metadata.uid)
        );
      },
      20_000,
    );
    await cluster.kubectl(['delete', 'job', '-n', SHOP, name]);
  });
  await step(`a Deployment from 0 to ${MANY} to 0`, () => scale(ground));
  await step('ADD fails while the agent is away, and the pod comes up enrolled when it is back', () => failing(ground));
  await step('a hostNetwork pod is not touched', () => hostNetwork(ground));
}

async function scale(ground: Ground): Promise<string> {
  const { cluster } = ground;
  const name = 'many';
  const count = (await ground.enrolled()).length;
  await cluster.apply(
    controller('Deployment', { namespace: SHOP, name, command: ['/bin/sleep', '100000'] }, { replicas: 0 }),
  );
  const size = (replicas: number) =>
    cluster.kubectl(['scale', 'deployment', '-n', SHOP, name, `--replicas=${replicas}`]);
  const begun = performance.now();
  await size(MANY);
  await cluster.untilAllReady(SHOP, `app=${name}`, MANY, 240_000);
  const up = performance.now();
  await ground.untilAnnotated('enabled', 60_000);
  const pods = await cluster.pods(SHOP, `app=${name}`);
  const rows = await ground.enrolled();
  const missing = pods.filter(({ metadata }) => !rows.some(({ uid }) => uid === metadata.uid));
  if (missing.length > 0) throw new Error(`${missing.length} are not enrolled: ${missing[0]?.metadata.name}`);
  const dead = rows.filter(({ programs }) => programs.alive !== programs.attached.length || programs.alive === 0);
  if (dead.length > 0) throw new Error(`programs are missing: ${JSON.stringify(dead[0])}`);
  await size(0);
  await until('all are gone', async () => (await cluster.pods(SHOP, `app=${name}`)).length === 0, 240_000);
  await until('their rows too', async () => (await ground.enrolled()).length === count, 20_000);
  await cluster.kubectl(['delete', 'deployment', '-n', SHOP, name]);
  return `${MANY} pods ready in ${((up - begun) / 1000).toFixed(0)} s`;
}

async function failing(ground: Ground): Promise<void> {
  const { cluster } = ground;
  const away = (labels: Record<string, string> | null) =>
    cluster.api.mergePatch(`/apis/apps/v1/namespaces/${SYSTEM}/daemonsets/istio-cni-node`, {
      spec: { template: { spec: { nodeSelector: labels } } },
    });
  const before = (await cluster.api.get(`/apis/apps/v1/namespaces/${SYSTEM}/daemonsets/istio-cni-node`)) as {
    spec: { template: { spec: { nodeSelector: Record<string, string> } } };
  };
  const wanted = before.spec.template.spec.nodeSelector;
  try {
    await away({ nowhere: 'at-all' });
    await until(
      'no agent runs',
      async () => (await cluster.pods(SYSTEM, 'k8s-app=istio-cni-node')).length === 0,
      60_000,
    );
    // Who is enrolled stays enrolled.
    await ground.traffic(true, ['near']);
    await cluster.apply(pod({ namespace: SHOP, name: 'late', node: ONE, ...SERVER }));
    await until(
      'kubelet tells of our error',
      async () => {
        const { items } = await cluster.api.list(`/api/v1/namespaces/${SHOP}/events`);
        const events = items as { reason?: string; message?: string; involvedObject?: { name?: string } }[];
        return events.some(
          ({ reason, message = '', involvedObject }) =>
            reason === 'FailedCreatePodSandBox' &&
            involvedObject?.name === 'late' &&
            message.includes('ambient-redirect'),
        );
      },
      60_000,
    );
  } finally {
    await away({ nowhere: null, ...wanted } as unknown as Record<string, string>);
    await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', 2);
  }
  const late = ground.keep(await cluster.untilReady(SHOP, 'late', 90_000));
  await ground.untilAnnotated('enabled');
  const answer = await ask(cluster, late, urlOf(ground.pod('near'), PORT));
  if (answer.localPort === answer.clientPort) throw new Error('its connection went direct');
  await ground.delete('late');
}

async function hostNetwork(ground: Ground): Promise<void> {
  const { cluster } = ground;
  const port = 18_080;
  const node = await ground.run({
    name: 'of-the-node',
    node: ONE,
    command: role('serve', String(port)),
    more: { hostNetwork: true },
  });
  const answer = await ask(cluster, node, urlOf(ground.pod('near'), PORT));
  if (answer.localPort !== answer.clientPort) throw new Error('its connection to a pod of its node was redirected');
  const { annotations } = node.metadata;
  if (annotations?.[REDIRECTION] !== undefined) throw new Error(`it is annotated ${annotations[REDIRECTION]}`);
  const rows = await ground.rows(ONE);
  if (rows.some(({ uid }) => uid === node.metadata.uid)) throw new Error('it is recorded');
  await ground.delete('of-the-node');
}
