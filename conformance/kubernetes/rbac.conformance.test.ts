// SPDX-License-Identifier: Apache-2.0
//
// The agent with exactly the role of the chart, and with each right taken out of it: every one is needed, and what is
// missing is said.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { grantRole, roleRules } from './role.ts';
import { Site, type SitePod } from './site.ts';

const RULES = roleRules();
const ROLES = '/apis/rbac.authorization.k8s.io/v1/clusterroles';
const MODE = 'istio.io/dataplane-mode';

/** Each right by itself: ["pods", "get"]. */
const rights = RULES.flatMap(({ resources, verbs }) =>
  resources.flatMap((resource) => verbs.map((verb): [string, string] => [resource, verb])),
);

describe.runIf(missingControlPlane() === undefined)('the role, with kube-apiserver (optional)', () => {
  const testbed = Testbed.open();
  let plane: ControlPlane;
  let site: Site;
  let uid: string;
  let namespace: string;
  let count = 0;
  beforeAll(async () => {
    plane = await ControlPlane.start(testbed);
    await plane.createNamespace('istio-system');
    uid = await grantRole(plane, 'istio-system', 'ambient-redirect');
  }, 3_000_000);
  afterAll(() => testbed.close());
  beforeEach(async () => {
    namespace = `shop-${++count}`;
    await plane.createNamespace(namespace, { [MODE]: 'ambient' });
    site = await Site.start(plane, `node-${count}`);
    site.topology.testbed.defer(() => site.agent?.kill('SIGKILL'));
    site.tokenFile = join(site.topology.runDir, '..', 'token');
    writeFileSync(site.tokenFile, plane.serviceAccountToken('istio-system', 'ambient-redirect', uid, 3_600));
    return () => site.close();
  });

  /** The role without one right. The authorizer follows by a watch of its own. */
  async function grant(without?: [string, string]): Promise<void> {
    const rules = RULES.map((rule) => ({
      ...rule,
      verbs: rule.verbs.filter((verb) => rule.resources[0] !== without?.[0] || verb !== without?.[1]),
    }));
    await plane.admin.mergePatch(`${ROLES}/ambient-redirect`, {
      rules: rules.filter(({ verbs }) => verbs.length > 0),
    });
    for (const [resource = '', verb = ''] of rights) {
      const wanted = resource !== without?.[0] || verb !== without[1];
      await until(
        `the API server knows of ${verb} ${resource}`,
        async () => (await allowed(resource, verb)) === wanted,
      );
    }
  }

  async function allowed(resource: string, verb: string): Promise<boolean> {
    const [name, subresource] = resource.split('/');
    const review = await plane.admin.create('/apis/authorization.k8s.io/v1/subjectaccessreviews', {
      spec: {
        user: 'system:serviceaccount:istio-system:ambient-redirect',
        groups: ['system:serviceaccounts', 'system:authenticated'],
        resourceAttributes: { verb, resource: name, subresource, ...(verb !== 'list' && { namespace }) },
      },
    });
    return (review.status as { allowed: boolean }).allowed;
  }

  /** A pod whose programs cannot be attached: nobody can say where its network namespace is. */
  async function lostPod(): Promise<SitePod> {
    const pod = await site.createPod({ namespace, name: 'lost' }, { plugin: false });
    return pod;
  }

  async function eventsOf(pod: SitePod): Promise<{ reason: string; message: string; type: string }[]> {
    const { items } = await plane.admin.list(`/api/v1/namespaces/${pod.namespace}/events`, {
      fieldSelector: `involvedObject.uid=${pod.uid}`,
    });
    return items as never;
  }

  test('with the whole role nothing is refused', async () => {
    await grant();
    const web = await site.createPod({ namespace, name: 'web' });
    const lost = await lostPod();
    site.startAgent();
    await site.untilRedirection(web, 'enabled', 20_000);
    await until('the failure is an event', async () => (await eventsOf(lost)).length > 0, 20_000);
    expect(await eventsOf(lost)).toMatchObject([
      {
        type: 'Warning',
        reason: 'AmbientRedirectionFailed',
        message: `no network namespace found for ${namespace}/lost (UID ${lost.uid})`,
      },
    ]);
    await plane.label(site.path(web), { [MODE]: 'none' });
    await site.untilRedirection(web, undefined);
    expect(site.log().filter((line) => JSON.stringify(line).includes('403'))).toEqual([]);
    await site.untilReady();
  });

  const said: Record<string, RegExp> = {
    'pods list':
      /pods cannot be followed: .*403 Forbidden: .*cannot list resource "pods".*the role of the agent is too small/,
    'pods watch':
      /pods cannot be followed: .*403 Forbidden: .*cannot watch resource "pods".*the role of the agent is too small/,
    'pods get': /403 Forbidden: .*cannot get resource "pods"/,
    'namespaces list':
      /namespaces cannot be followed: .*cannot list resource "namespaces".*the role of the agent is too small/,
    'namespaces watch':
      /namespaces cannot be followed: .*cannot watch resource "namespaces".*the role of the agent is too small/,
    'namespaces get': /403 Forbidden: .*cannot get resource "namespaces"/,
    'pods/status patch': /web: PATCH .*403 Forbidden: .*cannot patch resource "pods\/status"/,
    'events create': /event for .*\/lost is lost: .*403 Forbidden: .*cannot create resource "events"/,
  };

  test.each(rights)('without %s %s', async (resource, verb) => {
    const right = `${resource} ${verb}`;
    await grant([resource, verb]);
    const web = await site.createPod({ namespace, name: 'web' });
    await lostPod();
    site.startAgent();
    const asks = { 'pods get': [namespace, 'unknown'], 'namespaces get': null }[right];
    if (right === 'namespaces get') {
      // The copy of the namespaces does not have it: as if it were made a moment ago.
      site.front.fault = ({ path }) => (path === '/api/v1/namespaces' ? { silent: true } : undefined);
      await site.agent?.stop();
      site.startAgent();
    }
    if (asks !== undefined) {
      const [askedNamespace, name] = asks ?? [namespace, 'web'];
      await until(
        'it answers',
        () =>
          site.page('8000/healthz').then(
            () => true,
            () => false,
          ),
        20_000,
      );
      const answer = await site.ask(askedNamespace ?? '', name ?? '');
      expect(answer.status).toBe(500);
    }
    await until(
      'it is said',
      () => site.log().some((line) => said[right]?.test(`${line.msg} ${line.details ?? ''}`) === true),
      20_000,
    ).catch((error: Error) => {
      throw new Error(`${error.message}:\n${site.agent?.output}`);
    });
    if (right.endsWith('list')) {
      expect((await site.page('8000/readyz')).body).toMatch(
        new RegExp(`kubernetes: no list of ${resource} yet: .*403`),
      );
    }
    if (right === 'pods/status patch') expect(await site.redirection(web)).toBeUndefined();
  });
});
