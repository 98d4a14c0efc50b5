// SPDX-License-Identifier: Apache-2.0
//
// Somebody takes away a program, link, map entry, rule, route or sysctl of an attachment, or the proxy stops listening:
// the agent names it, counts it and, where it is ours, puts it right, within one period.

import { rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { hex, linkPin } from '../../plugin/attachments.ts';
import type { AttachmentRecord, State } from '../../plugin/native.ts';
import { ROUTE_PROTOCOL, ROUTE_TABLE } from '../../plugin/redirect/plan.ts';
import { HAProxy } from '../e2e/haproxy.ts';
import { must, Testbed, until } from '../netns.ts';
import { missingControlPlane } from './build.ts';
import { ControlPlane } from './control-plane.ts';
import { Site, type SitePod } from './site.ts';

const PERIOD_MS = 1_000;

describe.runIf(missingControlPlane() === undefined).each(['tcx', 'clsact'] as const)(
  'drift of %s, kube-apiserver (optional)',
  (hook) => {
    const testbed = Testbed.open();
    const native = loadNative();
    let site: Site;
    let web: SitePod;
    let ztunnel: SitePod;
    let haproxy: HAProxy;
    let state: State;
    beforeAll(async () => {
      const plane = await ControlPlane.start(testbed);
      await plane.createNamespace('istio-system');
      await plane.createNamespace('shop', { 'istio.io/dataplane-mode': 'ambient' });
      site = await Site.start(plane, 'node-1', { hook });
      ztunnel = await site.proxy('ztunnel-1');
      haproxy = new HAProxy(site.topology.testbed, ztunnel.sandbox.netns, 'only');
      await haproxy.start();
      web = await site.createPod({ namespace: 'shop', name: 'web' });
      site.startAgent({ reconcileSeconds: PERIOD_MS / 1000 });
      await site.untilRedirection(web, 'enabled');
      const opened = native.openState(site.topology.stateDir);
      state = opened;
      testbed.defer(() => native.closeState(opened));
    }, 3_000_000);
    afterAll(async () => {
      await site?.close();
      testbed.close();
    });

    const found = (pod: SitePod) => {
      const one = native.listAttachments(state).find(({ record }) => record.podUid === pod.uid);
      if (one === undefined) throw new Error(`${pod.name} is not recorded`);
      return one;
    };
    const inProxy = <T>(body: (netns: number) => T): T => {
      const netns = native.openNetns(ztunnel.sandbox.netns.path);
      try {
        return body(netns);
      } finally {
        native.close(netns);
      }
    };
    const drifts = () => site.log().filter(({ msg }) => msg === 'the kernel is not as recorded');

    /** Breaks, waits until `whole` holds again, and returns what the agent said about it. */
    async function brokenAndRepaired(pod: SitePod, breaks: () => void, whole: () => boolean) {
      const before = drifts().length;
      const repairs = () =>
        site
          .log()
          .filter(({ msg, pod: name }) => msg === 'made again as recorded' && name === `${pod.namespace}/${pod.name}`)
          .length;
      const repaired = repairs();
      expect(whole()).toBe(true);
      breaks();
      expect(whole()).toBe(false);
      await until('it is whole again', whole, 2 * PERIOD_MS + 3_000);
      await until('it is said', () => repairs() > repaired);
      return drifts()
        .slice(before)
        .map(({ kind, pod: name }) => `${kind} of ${name}`);
    }

    const hookOf = (record: AttachmentRecord, program: string) => {
      const one = record.hooks.find((candidate) => candidate.program === program);
      if (one === undefined) throw new Error(`no hook ${program}`);
      return one;
    };

    if (hook === 'tcx') {
      test('a link whose pin was removed', async () => {
        const { key } = found(web);
        const pin = linkPin(site.topology.stateDir, key, 'pod_egress');
        expect(
          await brokenAndRepaired(
            web,
            () => rmSync(pin),
            () => native.linkInfo(pin) !== null,
          ),
        ).toEqual(['link of shop/web']);
      });

      test('a link that was given another program', async () => {
        const { key, record } = found(web);
        const pin = linkPin(site.topology.stateDir, key, 'pod_egress');
        const other = join(site.topology.stateDir, 'programs', record.programTag, 'pod_ingress');
        const { programId } = hookOf(record, 'pod_egress');
        const replace = () => {
          const program = native.openProgram(other);
          native.updateLink(pin, program);
          native.close(program);
        };
        expect(await brokenAndRepaired(web, replace, () => native.linkInfo(pin)?.programId === programId)).toEqual([
          'program of shop/web',
        ]);
      });
    } else {
      test('a filter that was deleted', async () => {
        const { record } = found(web);
        const { ifindex, direction, priority, handle } = hookOf(record, 'pod_egress');
        const node = native.openNetns(site.topology.node.path);
        testbed.defer(() => native.close(node));
        const there = () => native.filters(node, ifindex, direction).some((filter) => filter.handle === handle);
        const remove = () => native.deleteFilter(node, ifindex, direction, { priority, handle });
        expect(await brokenAndRepaired(web, remove, there)).toEqual(['program of shop/web']);
      });

      test('the whole clsact qdisc', async () => {
        const { record } = found(web);
        const node = native.openNetns(site.topology.node.path);
        testbed.defer(() => native.close(node));
        const whole = () =>
          (['pod_egress', 'pod_ingress'] as const).every((program) => {
            const { ifindex, direction, handle } = hookOf(record, program);
            return native.filters(node, ifindex, direction).some((filter) => filter.handle === handle);
          });
        const remove = () => site.topology.node.run(['tc', 'qdisc', 'del', 'dev', record.hostIfname, 'clsact']);
        expect(await brokenAndRepaired(web, remove, whole)).toEqual(['program of shop/web', 'program of shop/web']);
      });
    }

    test('entries of maps', async () => {
      const { record } = found(web);
      const [address] = record.addresses;
      if (address === undefined) throw new Error('no address');
      expect(
        await brokenAndRepaired(
          web,
          () => native.deleteEndpoint(state, address),
          () => native.getEndpoint(state, address) !== null,
        ),
      ).toEqual(['map of shop/web']);
      expect(
        await brokenAndRepaired(
          web,
          () => native.deleteInterface(state, record.hostIfindex),
          () => native.getInterface(state, record.hostIfindex)?.flags === record.flags,
        ),
      ).toEqual(['map of shop/web']);
    });

    test('the list of proxies', async () => {
      const { key } = found(ztunnel);
      const listed = () => native.getProxies(state).proxies.some((proxy) => hex(proxy.key) === hex(key));
      const clear = () => native.putProxies(state, native.getProxies(state).generation + 1, []);
      expect(await brokenAndRepaired(ztunnel, clear, listed)).toEqual(['map of istio-system/ztunnel-1']);
    });

    test('a rule, a route and the sysctl in the proxy', async () => {
      const { record } = found(ztunnel);
      const rules = () =>
        inProxy((netns) => native.rules(netns, 4).filter(({ protocol }) => protocol === ROUTE_PROTOCOL));
      const [rule] = rules();
      if (rule === undefined) throw new Error('no rule');
      expect(
        await brokenAndRepaired(
          ztunnel,
          () => inProxy((netns) => native.deleteRule(netns, rule)),
          () => rules().length === 1,
        ),
      ).toEqual(['rule of istio-system/ztunnel-1']);
      const route = { family: 6, table: ROUTE_TABLE, protocol: ROUTE_PROTOCOL } as const;
      expect(
        await brokenAndRepaired(
          ztunnel,
          () => inProxy((netns) => native.deleteLocalRoute(netns, route)),
          () => inProxy((netns) => native.localRoutes(netns, 6, ROUTE_TABLE).length === 1),
        ),
      ).toEqual(['route of istio-system/ztunnel-1']);
      expect(
        await brokenAndRepaired(
          ztunnel,
          () => inProxy((netns) => native.setAcceptLocal(netns, record.podIfindex, false)),
          () => inProxy((netns) => native.acceptLocal(netns, record.podIfindex)),
        ),
      ).toEqual(['sysctl of istio-system/ztunnel-1']);
    });

    test("a listener is named, and is the proxy's own affair", async () => {
      const before = drifts().length;
      await haproxy.kill();
      await until('it is said', () => drifts().length >= before + 6, 2 * PERIOD_MS + 3_000);
      expect(
        new Set(
          drifts()
            .slice(before)
            .map(({ kind, object }) => `${kind}: ${object}`),
        ),
      ).toEqual(
        new Set(
          [4, 6].flatMap((family) =>
            [15001, 15006, 15008].map((port) => `listener: IPv${family} listener on port ${port}`),
          ),
        ),
      );
    });

    test('an interface that is gone: its entries go, and the pod is not said to be redirected', async () => {
      const other = await site.createPod({ namespace: 'shop', name: 'other' });
      await site.untilRedirection(other, 'enabled');
      const { record } = found(other);
      const before = drifts().length;
      other.sandbox.netns.run(['ip', 'link', 'del', 'eth0']);
      await until('it is not enrolled', () => found(other).record.role === 'none', 2 * PERIOD_MS + 3_000);
      await site.untilRedirection(other, undefined);
      expect(
        drifts()
          .slice(before)
          .map(({ kind, pod }) => `${kind} of ${pod}`),
      ).toEqual(['interface of shop/other']);
      expect(native.getInterface(state, record.interfaceId)).toBeNull();
      expect(record.addresses.map((address) => native.getEndpoint(state, address))).toEqual(
        record.addresses.map(() => null),
      );
    });

    test('an interface that was made anew is attached to', async () => {
      const other = await site.createPod({ namespace: 'shop', name: 'renewed' });
      await site.untilRedirection(other, 'enabled');
      const { record } = found(other);
      const { netns, addresses } = other.sandbox;
      const { node } = site.topology;
      const batch = [
        'link del eth0',
        `link add eth0 type veth peer name renewed0 netns ${node.name}`,
        `address add ${addresses[4]}/32 dev eth0`,
        `address add ${addresses[6]}/128 dev eth0 nodad`,
        'link set eth0 up',
      ];
      must(['ip', '-n', netns.name, '-batch', '-'], `${batch.join('\n')}\n`);
      node.run(['ip', 'link', 'set', 'renewed0', 'up']);
      const now = () => found(other).record;
      await until('it is attached', () => now().hostIfname === 'renewed0' && now().state === 'attached');
      expect(now().hostIfindex).not.toBe(record.hostIfindex);
      expect(native.getInterface(state, now().hostIfindex)?.podMac).toBe(now().podMac);
      expect([now().role, await site.redirection(other)]).toEqual(['pod', 'enabled']);
      expect(drifts().filter(({ kind, pod }) => kind === 'interface' && pod === 'shop/renewed')).toHaveLength(1);
    });

    test('each kind is counted', async () => {
      for (const kind of [
        'program',
        'map',
        'rule',
        'route',
        'sysctl',
        'listener',
        'interface',
        ...(hook === 'tcx' ? ['link'] : []),
      ]) {
        const counted = await site.metric('ambient_redirect_drift_total', { kind });
        expect({ kind, counted }).toEqual({ kind, counted: drifts().filter((drift) => drift.kind === kind).length });
        expect(counted).toBeGreaterThan(0);
      }
    });

    test('nothing was said of what was whole', () => {
      expect(site.log().filter(({ msg }) => msg === 'could not be made again')).toEqual([]);
      expect(found(web).record.state).toBe('attached');
    });
  },
);
