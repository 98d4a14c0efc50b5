// SPDX-License-Identifier: Apache-2.0
//
// Pods enter and leave the mesh while connections are opened to and from them every millisecond: none fails, and no SYN
// has to be sent twice, which would be a second that somebody waits.

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import type { Namespace } from '../netns.ts';
import { Mesh } from './mesh.ts';
import { greet, Openings, synsSentAgain } from './openings.ts';
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

/** From the client to both others, and from outside to the client. */
async function load(mesh: Mesh): Promise<Load> {
  const { testbed, outside, node } = mesh.topology;
  const { client, server, proxy } = mesh;
  for (const at of [client.netns, server.netns, outside]) await greet(testbed, at, GREETER);
  const all = (...to: ('client' | 'server' | 'outsider')[]) =>
    families.flatMap((family) => to.map((actor) => mesh.address(actor, family)));
  return {
    openings: [
      new Openings(testbed, client.netns, GREETER, all('outsider', 'server')),
      new Openings(testbed, outside, GREETER, all('client')),
    ],
    namespaces: [client.netns, server.netns, proxy.netns, outside, node],
  };
}

const some = ({ openings }: Load) => Promise.all(openings.map((one) => one.more(SOME)));

async function expectLossless({ openings, namespaces }: Load): Promise<void> {
  for (const { begun, greeted, failed } of await Promise.all(openings.map((one) => one.stop()))) {
    expect({ greeted, failed }).toEqual({ greeted: begun, failed: {} });
  }
  const again = Object.fromEntries(namespaces.map((one) => [one.name, synsSentAgain(one)]));
  expect(again).toEqual(Object.fromEntries(namespaces.map(({ name }) => [name, 0])));
}

describe.each(['tcx', 'clsact'] as const)('shared, %s: no SYN is lost', (hook) => {
  const start = async () => {
    const mesh = await Mesh.start({ hook });
    close = () => mesh.close();
    return mesh;
  };
  const left = async (mesh: Mesh) => {
    const rows = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; state: string }[];
    return rows.find(({ name }) => name === 'client')?.state === 'recorded';
  };

  test(
    'when a running pod leaves and comes back',
    async () => {
      const mesh = await start();
      const under = await load(mesh);
      for (let round = 0; round < ROUNDS; round++) {
        await some(under);
        await mesh.commanded('unenroll', '--pod', 'default/client');
        // Looking ends the drains that are over.
        while (!(await left(mesh))) await mesh.command('status');
        await some(under);
        await mesh.commanded('enroll', '--netns', mesh.client.netns.path, '--pod', 'default/client');
      }
      await some(under);
      await expectLossless(under);
    },
    60_000 + ROUNDS * 5_000,
  );

  test(
    'when the node is left',
    async () => {
      const mesh = await start();
      const directory = mkdtempSync(join(tmpdir(), 'ambient-redirect-openings-'));
      const before = close;
      close = () => {
        before();
        rmSync(directory, { recursive: true });
      };
      writeFileSync(join(directory, '10.conflist'), '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"}]}');
      const under = await load(mesh);
      for (let round = 0; round < ROUNDS; round++) {
        await some(under);
        const directories = ['--cni-net-dir', directory, '--cni-bin-dir', directory];
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
    },
    60_000 + ROUNDS * 5_000,
  );
});
