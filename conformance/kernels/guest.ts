// SPDX-License-Identifier: Apache-2.0
//
// What has to hold on every kernel, run inside a machine that has it: the executable's own checks, an attachment's life,
// and the ways through the node. $AMBIENT_REDIRECT_SITES says which of those: "VARIANT PRIMARY HOOK,...";
// $AMBIENT_REDIRECT_WAYS_ONLY: nothing else.

import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { acknowledge } from '../e2e/inpod.ts';
import { Mesh } from '../e2e/mesh.ts';
import { executable, families, type Pod, Topology } from '../e2e/topology.ts';
import { everyWay, type Site } from '../e2e/ways.ts';
import { exec, type Outcome } from '../netns.ts';

const sites = (process.env.AMBIENT_REDIRECT_SITES ?? '').split(',').map((site) => {
  const [variant, primary, hook] = site.split(' ');
  return { variant, primary, hook } as Site;
});
const release = readFileSync('/proc/sys/kernel/osrelease', 'utf8').trim();

/** Is this kernel of version `since` ("5.10") or later? */
function isAtLeast(since: string): boolean {
  const [major = 0, minor = 0] = release.split('.').map(Number);
  const [wantedMajor = 0, wantedMinor = 0] = since.split('.').map(Number);
  return major > wantedMajor || (major === wantedMajor && minor >= wantedMinor);
}

const ATTACHED = {
  shared: ['pod_egress', 'pod_ingress'],
  // In the pod's namespace, and on its host-side interface.
  'in-pod': ['inpod_egress', 'inpod_guard', 'inpod_ingress', 'inpod_sign'],
};

function everythingElse(): void {
  describe('doctor', () => {
    test('finds the features that this version has, and no other', async () => {
      const { stdout } = await exec([executable, 'doctor']);
      expect(stdout).toContain(release);
      const rows = [...stdout.matchAll(/^(\w+) +(\d+\.\d+) +(yes|no) /gm)];
      expect(rows.length).toBeGreaterThan(6);
      expect(rows.map(([, feature, since, here]) => `${feature} ${since} ${here}`)).toEqual(
        rows.map(([, feature, since = '']) => `${feature} ${since} ${isAtLeast(since) ? 'yes' : 'no'}`),
      );
    });
  });

  describe.each(['shared', 'in-pod'])('demo: %s', (contract) => {
    test('every row is right', async () => {
      const { status, stdout, stderr } = await exec([executable, 'demo', '--contract', contract], { timeout: 60_000 });
      expect(stdout, stderr).toMatch(/\n(\d+) of \1 rows right\.\n$/);
      expect(status).toBe(0);
    });
  });

  describe.each(
    [...new Set(sites.map(({ hook }) => hook))].flatMap((hook) => [
      { contract: 'shared' as const, hook },
      { contract: 'in-pod' as const, hook },
    ]),
  )('ADD, CHECK, DEL: $contract, $hook', ({ contract, hook }) => {
    let topology: Topology;
    let pod: Pod;
    beforeAll(async () => {
      const proxy = { contract, match: { namespace: 'istio-system', name: 'ztunnel-*' } };
      topology = new Topology({ primary: 'ptp', hook, rpFilter: 1, entry: { proxy } });
      if (contract === 'in-pod') await acknowledge(topology);
      pod = topology.pod('client', { enroll: true });
      await topology.addPrimary(pod);
    });
    afterAll(() => topology?.close());

    const verb = (command: string): Promise<Outcome> =>
      topology.node.exec([executable], {
        env: topology.environment(command, pod),
        input: JSON.stringify(topology.entry(pod)),
      });
    const attached = () =>
      [topology.node, pod.netns].flatMap(
        (netns) => netns.run(['bpftool', 'net', 'show']).match(/(?:in)?pod_(?:egress|ingress|guard|sign)/g) ?? [],
      );

    test('ADD attaches its programs and hands prevResult on', async () => {
      const { status, stdout } = await verb('ADD');
      expect({ status, stdout: JSON.parse(stdout) }).toMatchObject({ status: 0, stdout: { ips: pod.prevResult?.ips } });
      // What bpftool on this machine knows of: clsact everywhere, TCX not.
      if (hook === 'clsact') expect(attached().sort()).toEqual(ATTACHED[contract]);
    });
    test('CHECK finds them, and misses one that is taken away', async () => {
      expect(await verb('CHECK')).toMatchObject({ status: 0, stdout: '' });
      if (hook !== 'clsact') return;
      topology.node.run(['tc', 'filter', 'delete', 'dev', pod.hostIfname, 'egress']);
      const { status, stdout } = await verb('CHECK');
      expect({ status, code: JSON.parse(stdout).code }).toEqual({ status: 1, code: 105 });
    });
    test('DEL takes away what is left, and may be repeated', async () => {
      expect(await verb('DEL')).toMatchObject({ status: 0, stdout: '' });
      expect(attached()).toEqual([]);
      expect(await verb('DEL')).toMatchObject({ status: 0, stdout: '' });
      await topology.deletePrimary(pod);
    });
  });

  describe.each(sites.filter(({ variant }) => variant === 'auto'))(
    'closedAction reset: $primary, $hook',
    ({ primary, hook }) => {
      let mesh: Mesh;
      beforeAll(async () => {
        mesh = await Mesh.start({ primary, hook, entry: { closedAction: 'reset' } });
        await mesh.haproxy.kill();
      });
      afterAll(() => mesh?.close());

      test.each(families)('IPv%i: without a listener both directions are refused', async (family) => {
        const before = mesh.counters();
        expect(await mesh.refused('client', mesh.address('outsider', family))).toBe('ECONNREFUSED');
        expect(await mesh.refused('outsider', mesh.address('server', family))).toBe('ECONNREFUSED');
        expect(mesh.moved(before, mesh.client)['pod_egress reset_no_listener']).toBe(1);
        expect(mesh.moved(before, mesh.server)['pod_ingress reset_no_listener']).toBe(1);
      });
    },
  );
}

if (process.env.AMBIENT_REDIRECT_WAYS_ONLY === undefined) everythingElse();
for (const site of sites) everyWay(site);
