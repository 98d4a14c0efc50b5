// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { rememberInstall } from '../install/entry.ts';
import { entrySettings } from './entry-settings.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'ambient-redirect-entry-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

const settings = (conf?: string) => ({ stateDir: '/sys/fs/bpf/elsewhere', runDir: directory, conf });
const remember = (confName?: string) =>
  rememberInstall(directory, {
    netDir: directory,
    confName,
    ownedName: undefined,
    groupRead: false,
    wanted: {
      entry: { type: 'ambient-redirect', enrollment: 'agent', proxy: { contract: 'in-pod' } },
      cniVersion: undefined,
      replaceIstio: false,
    },
  });
const list = (name: string, network: string) =>
  writeFileSync(join(directory, name), `{"cniVersion":"1.0.0","name":"${network}","plugins":[{"type":"ptp"}]}`);

test('without --conf the settings are those of the last install, the directories the agent’s own', () => {
  remember();
  const { config } = entrySettings(settings());
  expect(config.enrollment).toBe('agent');
  expect(config.proxy.contract).toBe('in-pod');
  expect(config.stateDir).toBe('/sys/fs/bpf/elsewhere');
  expect(config.runDir).toBe(directory);
});

test.each([
  [undefined, 'first'],
  ['20.conflist', 'second'],
])('the network is that of the list with the entry (install was told %s)', (confName, network) => {
  list('10.conflist', 'first');
  list('20.conflist', 'second');
  remember(confName);
  expect(entrySettings(settings()).network).toBe(network);
});

test('no list there at the moment, no install at all, and --conf', () => {
  remember();
  expect(entrySettings(settings()).network).toBe('ambient-redirect');
  const conf = join(directory, 'entry');
  writeFileSync(conf, '{"type":"ambient-redirect","enrollment":"all","name":"mine"}');
  expect(entrySettings(settings(conf))).toMatchObject({ network: 'mine', config: { enrollment: 'all' } });
  list('10.conflist', 'first');
  writeFileSync(conf, '{"type":"ambient-redirect","enrollment":"all"}');
  expect(entrySettings(settings(conf))).toMatchObject({ network: 'first', config: { enrollment: 'all' } });
  rmSync(join(directory, 'install.json'));
  expect(entrySettings(settings(conf)).network).toBe('ambient-redirect');
  expect(entrySettings(settings())).toMatchObject({
    network: 'ambient-redirect',
    config: { enrollment: 'annotation', proxy: { contract: 'shared' } },
  });
});
