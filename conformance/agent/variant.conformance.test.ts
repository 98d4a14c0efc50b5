// SPDX-License-Identifier: Apache-2.0
//
// Another `variant` in the entry than the pods of the node have: refused by whoever would attach with it, and no pod that
// runs has less for it.

import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { linkPin } from '../../plugin/attachments.ts';
import { executable, PluginError, requireExecutable, Topology } from '../e2e/topology.ts';
import { until } from '../netns.ts';
import { AgentSite } from './processes.ts';

let topology: Topology;
afterEach(() => topology?.close());

test('ADD, install and the agent refuse another variant, and pods that run are repaired with theirs', async () => {
  requireExecutable();
  topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1, entry: { variant: 'no-redirect-peer' } });
  const { node, stateDir, runDir, testbed } = topology;
  const site = new AgentSite(topology);
  const there = topology.pod('there', { enroll: true });
  await topology.add(there);

  const details = new RegExp(
    `^variant = "auto": the state in ${stateDir} was made with "no-redirect-peer", .*"uninstall", then "install"`,
  );
  const later = topology.pod('later', { enroll: true, entry: { variant: 'auto' } });
  await topology.addPrimary(later);
  const refused = await topology.addOurs(later).catch((error: unknown) => error);
  expect(refused).toBeInstanceOf(PluginError);
  expect(JSON.parse((refused as PluginError).outcome.stdout)).toMatchObject({
    code: 7,
    msg: 'variant differs from the one in use',
    details: expect.stringMatching(details),
  });
  await topology.checkOurs(there);
  // Where nobody says which, it is that of the state.
  const byHand = await node.exec(
    [executable, 'enroll', '--netns', later.netns.path].concat('--state-dir', stateDir, '--run-dir', runDir),
  );
  expect(byHand, byHand.stderr).toMatchObject({ status: 0 });

  const base = testbed.directory('node');
  const [netDir, binDir, conf] = [join(base, 'net.d'), join(base, 'bin'), join(base, 'entry.json')];
  for (const directory of [netDir, binDir]) mkdirSync(directory);
  const primary = join(netDir, '10-pods.conflist');
  const conflist = JSON.stringify({ cniVersion: '1.0.0', name: 'pods', plugins: [{ type: 'ptp' }] });
  writeFileSync(primary, conflist);
  const entry = { type: 'ambient-redirect', hook: 'tcx', stateDir, runDir };
  writeFileSync(conf, JSON.stringify(entry));
  const directories = ['--state-dir', stateDir, '--run-dir', runDir];
  const places = ['--cni-net-dir', netDir, '--cni-bin-dir', binDir, '--wait', '0'];
  const install = () => node.exec([executable, 'install', '--conf', conf, ...directories, ...places]);
  const outcome = await install();
  expect([outcome.status, outcome.stderr]).toEqual([
    1,
    expect.stringMatching(/variant differs from the one in use[\s\S]*"uninstall", then "install"/),
  ]);
  expect([readdirSync(binDir), readFileSync(primary, 'utf8')]).toEqual([[], conflist]);

  const agent = await site.agent(...['--conf', conf, '--reconcile-seconds', '1'], '--health-port', '8000');
  const ready = await node.exec(['curl', '-s', 'http://127.0.0.1:8000/readyz']);
  expect(ready.stdout).toMatch(/variant: variant differs from the one in use: variant = "auto"/);
  const native = loadNative();
  const state = native.openState(stateDir);
  testbed.defer(() => native.closeState(state));
  const found = native.listAttachments(state).find(({ record }) => record.podName === 'there');
  if (found === undefined) throw new Error('nothing is recorded');
  const pin = linkPin(stateDir, found.key, 'pod_egress');
  rmSync(pin);
  await until('it is repaired', () => native.linkInfo(pin) !== null, 20_000);
  await until('it is said', () => agent.log.some(({ msg }) => msg === 'made again as recorded'));
  await topology.checkOurs(there);

  writeFileSync(conf, JSON.stringify({ ...entry, variant: 'no-redirect-peer' }));
  expect(await install()).toMatchObject({ status: 0 });
}, 60_000);
