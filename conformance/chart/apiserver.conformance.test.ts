// SPDX-License-Identifier: Apache-2.0
//
// What helm renders, taken by a real API server: each rendering as a server-side dry run, and the last step of
// `helm uninstall` with nothing but its own role.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { EXECUTABLE } from '../chain.ts';
import { missingControlPlane } from '../kubernetes/build.ts';
import { ControlPlane } from '../kubernetes/control-plane.ts';
import { Front } from '../kubernetes/front.ts';
import { exec, type Running, Testbed, until } from '../netns.ts';
import { helmProgram, missingHelm } from './helm.ts';
import { type KubernetesObject, MATRIX, objectsOf, render } from './render.ts';

/** Of the kinds that the chart has. */
const COLLECTIONS: Record<string, string> = {
  ServiceAccount: 'api/v1/namespaces/NS/serviceaccounts',
  ConfigMap: 'api/v1/namespaces/NS/configmaps',
  ResourceQuota: 'api/v1/namespaces/NS/resourcequotas',
  ClusterRole: 'apis/rbac.authorization.k8s.io/v1/clusterroles',
  ClusterRoleBinding: 'apis/rbac.authorization.k8s.io/v1/clusterrolebindings',
  Role: 'apis/rbac.authorization.k8s.io/v1/namespaces/NS/roles',
  RoleBinding: 'apis/rbac.authorization.k8s.io/v1/namespaces/NS/rolebindings',
  DaemonSet: 'apis/apps/v1/namespaces/NS/daemonsets',
  Job: 'apis/batch/v1/namespaces/NS/jobs',
};

function collectionOf({ kind, metadata }: KubernetesObject): string {
  const collection = COLLECTIONS[kind];
  if (collection === undefined) throw new Error(`no collection for ${kind}`);
  return `/${collection.replace('NS', metadata.namespace ?? '')}`;
}

describe.runIf(missingHelm() === undefined && missingControlPlane() === undefined)(
  'the chart, with helm and kube-apiserver (optional)',
  () => {
    const testbed = Testbed.open();
    let plane: ControlPlane;
    beforeAll(async () => {
      await helmProgram();
      plane = await ControlPlane.start(testbed);
      for (const name of ['istio-system', 'mesh']) await plane.createNamespace(name);
    }, 3_000_000);
    afterAll(() => testbed.close());

    // Strict: a field that the API server does not know is an error, not a warning.
    const dryRun = (object: KubernetesObject) =>
      plane.admin.create(`${collectionOf(object)}?dryRun=All&fieldValidation=Strict`, object);

    test.each(MATRIX)('$name: every object is taken', async (rendering) => {
      for (const object of objectsOf(await render(rendering))) {
        const taken = await dryRun(object).catch((error: Error) => error.message);
        expect(taken).toMatchObject({ kind: object.kind, metadata: { name: object.metadata.name } });
      }
    });

    test('a field that does not exist is not', async () => {
      const [object] = objectsOf(await render(MATRIX[0] as (typeof MATRIX)[0])).filter(
        ({ kind }) => kind === 'DaemonSet',
      );
      if (object === undefined) throw new Error('there is no DaemonSet');
      (object.spec as Record<string, unknown>).replicas = 3;
      await expect(dryRun(object)).rejects.toThrow(/unknown field "spec.replicas"/);
    });

    describe('wait-uninstalled', () => {
      const NAMESPACE = 'istio-system';
      const DAEMON_SETS = `/apis/apps/v1/namespaces/${NAMESPACE}/daemonsets`;
      const REMOVAL = `${DAEMON_SETS}/istio-cni-node-uninstall`;
      const AGENTS = `${DAEMON_SETS}/istio-cni-node`;
      let tokenFile: string;
      beforeAll(async () => {
        const rendering = MATRIX.find(({ name }) => name === 'default');
        if (rendering === undefined) throw new Error('no default');
        const account = 'ambient-redirect-uninstall';
        for (const object of objectsOf(await render(rendering))) {
          const made = await plane.admin.create(collectionOf(object), object);
          if (object.kind !== 'ServiceAccount' || object.metadata.name !== account) continue;
          tokenFile = join(testbed.directory('token'), 'token');
          const { uid } = made.metadata as { uid: string };
          writeFileSync(tokenFile, plane.serviceAccountToken(NAMESPACE, account, uid, 3_600));
        }
      });

      const command = (timeout: string, url = plane.url) => [
        ...[EXECUTABLE, 'wait-uninstalled', '--kube-api', url, '--kube-ca-file', plane.caFile],
        ...['--kube-token-file', tokenFile, '--daemon-set', `${NAMESPACE}/istio-cni-node-uninstall`],
        ...['--agents', `${NAMESPACE}/istio-cni-node`, '--timeout', timeout],
      ];

      /** What the controller of DaemonSets says. */
      const report = (desired: number, ready: number, updated = desired) =>
        plane.admin.mergePatch(`${REMOVAL}/status`, {
          status: {
            ...{ observedGeneration: 1, currentNumberScheduled: desired, numberMisscheduled: 0 },
            ...{ desiredNumberScheduled: desired, numberReady: ready, updatedNumberScheduled: updated },
          },
        });

      const deleting = async (path: string) =>
        ((await plane.admin.get(path))?.metadata as { deletionTimestamp?: string } | undefined)?.deletionTimestamp;

      test('a node that is not left: it fails, names the node, and deletes nothing', async () => {
        await plane.admin.create(`/api/v1/namespaces/${NAMESPACE}/pods`, {
          metadata: { name: 'istio-cni-node-uninstall-x', labels: { 'k8s-app': 'istio-cni-node-uninstall' } },
          spec: { nodeName: 'worker-2', containers: [{ name: 'stay', image: 'x' }] },
        });
        await report(2, 1);
        const outcome = await exec(command('1'), { env: {} });
        expect(outcome).toMatchObject({
          status: 1,
          stdout: '1 of 2 nodes left\n',
          stderr: 'ambient-redirect: given up: 1 of 2 nodes left, not yet: worker-2 (istio-cni-node-uninstall-x)\n',
        });
        expect(await deleting(AGENTS)).toBeUndefined();
      });

      test('when all are left the agents go, and only when they are gone it is done', async () => {
        // Not seen by the controller yet, or of an older template: not done.
        await report(2, 2, 1);
        const waiting: Running = testbed.start(command('60'));
        await until('it has looked', () => waiting.output === '2 of 2 nodes left\n', 20_000);
        expect(await deleting(AGENTS)).toBeUndefined();
        await report(2, 2);
        await until('the agents are being deleted', async () => (await deleting(AGENTS)) !== undefined, 20_000);
        // A node comes; its pod of the agents runs install before it is gone.
        await report(3, 2);
        await plane.admin.mergePatch(AGENTS, { metadata: { finalizers: null } });
        await until('it waits for the new node', () => waiting.output.endsWith('2 of 3 nodes left\n'), 20_000);
        expect(waiting.output).toContain('removed istio-system/istio-cni-node\n');
        await report(3, 3);
        await waiting.ended;
        expect(waiting.output).toMatch(/\n3 nodes left\n$/);
        expect(await plane.admin.get(REMOVAL)).not.toBeNull();
      });

      test('cut short after that, it is done', async () => {
        expect(await exec(command('5'), { env: {} })).toMatchObject({
          status: 0,
          stdout: '3 nodes left\n',
          stderr: '',
        });
      });

      test('while the API server cannot be reached it says so, goes on, and says when it answers again', async () => {
        const front = await Front.start(testbed, plane);
        front.fault = () => ({ cut: true });
        const waiting = testbed.start(command('60', front.url));
        await until('it has asked more than once', () => front.asked.length > 2, 30_000);
        front.fault = () => undefined;
        await waiting.ended;
        expect(waiting.output.split('\n')).toEqual([
          expect.stringMatching(/^the API server cannot be reached, trying for \d+ s more: GET \/apis\/apps\/.+: .+/),
          'the API server answers again',
          '3 nodes left',
          '',
        ]);
      });

      test('when the time is over before the API server answers, that is why it ends', async () => {
        const front = await Front.start(testbed, plane);
        front.fault = () => ({ cut: true });
        const outcome = await exec(command('1', front.url), { env: {} });
        expect(outcome).toMatchObject({ status: 1, stdout: '' });
        expect(outcome.stderr).toMatch(/^the API server cannot be reached, .+\nambient-redirect: GET .+\n$/);
      });

      test.each([
        ['x', '--daemon-set x: it must be NAMESPACE/NAME'],
        // The role names the two that it may look at.
        ['istio-system/other', '403 Forbidden: daemonsets.apps "other" is forbidden'],
      ])('--daemon-set %s', async (name, words) => {
        const outcome = await exec([...command('1'), '--daemon-set', name], { env: {} });
        expect(outcome).toMatchObject({ status: 1, stdout: '', stderr: expect.stringContaining(words) });
      });
    });
  },
);
