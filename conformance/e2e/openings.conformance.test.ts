// SPDX-License-Identifier: Apache-2.0
//
// Pods enter and leave the mesh while connections are opened to and from them every few milliseconds: none fails, and no
// SYN has to be sent twice, which would be a second that somebody waits.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import type { Namespace } from '../netns.ts';
import { InPodMesh } from './inpod.ts';
import { Mesh } from './mesh.ts';
import { greet, Openings, resends } from './openings.ts';
import { families } from './topology.ts';

const GREETER = 8300;
const ROUNDS = process.env.AMBIENT_REDIRECT_LONG === '1' ? 40 : 3;
/** Between two changes. */
const SOME = 60;

let close: () => void = () => {};
afterEach(() => {
  close();
  close = () => {};
});

interface Load {
  openings: Openings[];
  namespaces: Namespace[];
}

/** From the client to both others, and from outside to the client; a connection each `period` seconds. */
async function load(mesh: Mesh | InPodMesh, period: number): Promise<Load> {
  const { testbed, outside, node } = mesh.topology;
  const { client, server } = mesh;
  for (const at of [client.netns, server.netns, outside]) await greet(testbed, at, GREETER);
  const all = (...to: ('client' | 'server' | 'outsider')[]) =>
    families.flatMap((family) => to.map((actor) => mesh.address(actor, family)));
  return {
    openings: [
      new Openings(testbed, client.netns, GREETER, all('outsider', 'server'), period),
      new Openings(testbed, outside, GREETER, all('client'), period),
    ],
    namespaces: [client.netns, server.netns, ...(mesh instanceof Mesh ? [mesh.proxy.netns] : []), outside, node],
  };
}

const some = ({ openings }: Load) => Promise.all(openings.map((one) => one.more(SOME)));

/** The client leaves, and comes back. */
async function leaveAndComeBack(mesh: Mesh | InPodMesh, under: Load, ...options: string[]): Promise<void> {
  const left = async () => {
    const rows = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; state: string }[];
    return rows.find(({ name }) => name === 'client')?.state === 'recorded';
  };
  await some(under);
  await mesh.commanded('unenroll', '--pod', 'default/client');
  // Looking ends the drains that are over.
  while (!(await left())) await mesh.command('status');
  await some(under);
  await mesh.commanded('enroll', '--netns', mesh.client.netns.path, '--pod', 'default/client', ...options);
}

async function expectLossless({ openings, namespaces }: Load): Promise<void> {
  for (const { begun, greeted, failed } of await Promise.all(openings.map((one) => one.stop()))) {
    expect({ greeted, failed }).toEqual({ greeted: begun, failed: {} });
  }
  const seen = Object.fromEntries(namespaces.map((one) => [one.name, resends(one)]));
  expect(seen).toEqual(Object.fromEntries(namespaces.map(({ name }) => [name, { syns: 0, listenerFull: 0 }])));
}

describe.each(['tcx', 'clsact'] as const)('shared, %s: no SYN is lost', (hook) => {
  const start = async () => {
    const mesh = await Mesh.start({ hook });
    close = () => mesh.close();
    return mesh;
  };

  test('when a running pod leaves and comes back', { timeout: 60_000 + ROUNDS * 5_000 }, async () => {
    const mesh = await start();
    const under = await load(mesh, 0.002);
    for (let i = 0; i < ROUNDS; i++) await leaveAndComeBack(mesh, under);
    await some(under);
    await expectLossless(under);
  });

  test('when the node is left', { timeout: 60_000 + ROUNDS * 5_000 }, async () => {
    const mesh = await start();
    const directory = mesh.topology.testbed.directory('net.d');
    writeFileSync(join(directory, '10.conflist'), '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"}]}');
    const directories = ['--cni-net-dir', directory, '--cni-bin-dir', directory];
    const under = await load(mesh, 0.002);
    for (let i = 0; i < ROUNDS; i++) {
      await some(under);
      const said = await mesh.commanded('uninstall', ...directories, '--executable-delay', '0');
      expect(said).toContain('2 pods unenrolled');
      await some(under);
      await mesh.commanded('proxy', 'set', '--netns', mesh.proxy.netns.path);
      for (const pod of [mesh.client, mesh.server]) {
        await mesh.commanded('enroll', '--netns', pod.netns.path, '--pod', `default/${pod.label}`);
      }
    }
    await some(under);
    await expectLossless(under);
  });
});

describe.each(['tcx', 'clsact'] as const)('in-pod, %s: no SYN is lost', (hook) => {
  test('when a running pod leaves and comes back', { timeout: 60_000 + ROUNDS * 5_000 }, async () => {
    const mesh = await InPodMesh.start({ hook });
    close = () => mesh.close();
    await mesh.proxies.client.start();
    await mesh.proxies.server.start();
    const conf = join(mesh.topology.testbed.directory('conf'), 'entry.json');
    writeFileSync(conf, JSON.stringify({ type: 'ambient-redirect', hook, proxy: { contract: 'in-pod' } }));
    // The proxies of this test have a thread for each connection.
    const under = await load(mesh, 0.005);
    for (let i = 0; i < ROUNDS; i++) await leaveAndComeBack(mesh, under, '--conf', conf);
    await some(under);
    await expectLossless(under);
  });
});
