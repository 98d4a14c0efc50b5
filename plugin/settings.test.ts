// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command } from 'commander';
import { afterAll, describe, expect, test } from 'vitest';
import { AGENT_SETTINGS } from './agent/settings.ts';
import { entryOptions } from './cli/install.ts';
import {
  CONFLIST_SETTINGS,
  DIRECTORY_SETTINGS,
  ENTRY_SETTINGS,
  entryOf,
  INSTALL_SETTINGS,
  MESH_SETTINGS,
  readSettings,
  type SettingTable,
  settingOptions,
  UNINSTALL_SETTINGS,
  WAIT_UNINSTALLED_SETTINGS,
} from './settings.ts';

const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-settings-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

const tables = { ...INSTALL_SETTINGS, ...UNINSTALL_SETTINGS, ...MESH_SETTINGS, ...WAIT_UNINSTALLED_SETTINGS };

test('each setting is called as its flag', () => {
  const attributes = settingOptions(tables).map((option) => option.attributeName());
  expect(attributes).toEqual(Object.keys(tables));
});

test('what the agent has too is called and preset the same there', () => {
  const other: SettingTable = AGENT_SETTINGS;
  const shared = Object.keys(tables).filter((name) => name in other);
  expect(shared).toEqual(expect.arrayContaining(['stateDir', 'runDir', 'conf', 'nodeName', 'kubeApi', 'redirectMode']));
  const facts = (table: SettingTable) =>
    shared.map((name) => [table[name]?.flag, table[name]?.environment, table[name]?.fallback ?? '']);
  // The level of the plugin is the entry's own, that of the agent has a default.
  const differs = ([flag]: unknown[]) => flag !== '--log-level <level>';
  expect(facts(tables).filter(differs)).toEqual(facts(other).filter(differs));
});

test('no variable belongs to two settings', () => {
  const variables = Object.values(tables).flatMap(({ environment }) => environment);
  expect(variables.filter((name, i) => variables.indexOf(name) !== i)).toEqual([]);
});

test('a default is what its own parser takes', () => {
  expect(() => readSettings(tables, {}, {})).not.toThrow();
});

/** Istio's charts and code, contracts of installs that are to be taken over. */
test.each([
  ['CNI_NET_DIR', 'cniNetDir', '/host/net.d', '/host/net.d'],
  ['MOUNTED_CNI_NET_DIR', 'cniNetDir', '/host/net.d/', '/host/net.d'],
  ['CNI_CONF_NAME', 'cniConfName', '10-x.conflist', '10-x.conflist'],
  ['CHAINED_CNI_PLUGIN', 'chained', 'false', false],
  ['ISTIO_OWNED_CNI_CONFIG', 'ownedConflist', 'true', true],
  // What Istio's code reads, and what its chart writes.
  ['ISTIO_OWNED_CNI_CONFIG_FILENAME', 'ownedConflistName', '01.conflist', '01.conflist'],
  ['ISTIO_OWNED_CNI_CONF_FILENAME', 'ownedConflistName', '01.conflist', '01.conflist'],
  ['CNI_CONF_GROUP_READ', 'confGroupRead', '1', true],
  ['EXCLUDE_NAMESPACES', 'excludeNamespaces', 'kube-system, a,', ['kube-system', 'a']],
  ['AMBIENT_DNS_CAPTURE', 'dnsCapture', 'TRUE', true],
  ['LOG_LEVEL', 'logLevel', 'debug', 'debug'],
  ['SYSTEM_NAMESPACE', 'proxyNamespace', 'mesh', 'mesh'],
  ['REDIRECT_MODE', 'redirectMode', 'eBPF', 'ebpf'],
  [
    'AMBIENT_ENABLEMENT_SELECTOR',
    'enablementSelectors',
    '- podSelector:\n    matchLabels: {a: b}\n',
    [{ pod: [{ key: 'a', operator: 'In', values: ['b'] }], namespace: [] }],
  ],
])('$%s', (variable, name, text, value) => {
  const settings = readSettings(tables, {}, { [variable]: text }) as Record<string, unknown>;
  expect(settings[name]).toEqual(value);
});

test('a flag is stronger than a variable, the first variable than the second, an empty one is none', () => {
  const environment = { MOUNTED_CNI_NET_DIR: '/a', CNI_NET_DIR: '/b' };
  expect(readSettings(DIRECTORY_SETTINGS, { cniNetDir: '/c' }, environment).cniNetDir).toBe('/c');
  expect(readSettings(DIRECTORY_SETTINGS, {}, environment).cniNetDir).toBe('/a');
  expect(readSettings(DIRECTORY_SETTINGS, {}, { ...environment, MOUNTED_CNI_NET_DIR: '' }).cniNetDir).toBe('/b');
});

test.each([
  ['CNI_CONF_NAME', '../x.conflist', 'It must be a file name ending in .conf or .conflist.'],
  ['CNI_CONF_NAME', 'x.txt', 'It must be a file name ending in .conf or .conflist.'],
  ['CNI_NET_DIR', 'etc', 'It must be an absolute path.'],
  ['CHAINED_CNI_PLUGIN', 'maybe', 'It must be true or false.'],
  ['AMBIENT_REDIRECT_WAIT', '-1', 'It must be a number of seconds, or "forever".'],
  ['AMBIENT_REDIRECT_MAX_PODS', '4k', 'It must be a number.'],
  ['REDIRECT_MODE', 'iptables', 'It must be ebpf.'],
  ['AMBIENT_ENABLEMENT_SELECTOR', 'a: 1', 'invalid enablementSelectors = {"a":1}: expected a list'],
  ['AMBIENT_ENABLEMENT_SELECTOR', '[', 'Flow sequence must end with a ]'],
])('%s=%s is named', (variable, text, reason) => {
  expect(() => readSettings(tables, {}, { [variable]: text })).toThrow(`${variable}=${text}: ${reason}`);
});

test('seconds', () => {
  expect(readSettings(INSTALL_SETTINGS, {}, {}).wait).toBe(Number.POSITIVE_INFINITY);
  expect(readSettings(INSTALL_SETTINGS, { wait: '2.5' }, {}).wait).toBe(2.5);
});

test('--help has flag, variables and default of each', () => {
  const command = new Command('x');
  for (const option of settingOptions(tables)) command.addOption(option);
  const help = command.configureHelp({ helpWidth: 400 }).helpInformation();
  for (const { flag, environment, fallback } of Object.values(tables)) {
    const line = help.split('\n').find((text) => text.includes(flag)) ?? '';
    for (const variable of environment) expect(line).toContain(`$${variable}`);
    if (fallback) expect(line).toContain(`default: ${fallback}`);
  }
});

describe('the entry', () => {
  const entry = (options: Record<string, string> = {}, environment: Record<string, string> = {}) => {
    const values = readSettings({ ...DIRECTORY_SETTINGS, ...ENTRY_SETTINGS }, options, environment);
    return entryOf(values, values);
  };
  const capabilities = { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true };

  test('without settings', () => {
    expect(entry()).toEqual({ type: 'ambient-redirect', capabilities });
  });

  test('from flags and variables', () => {
    const options = { enrollment: 'all', contract: 'shared', proxyName: 'haproxy-*', maxPods: '100', stateDir: '/s/x' };
    expect(entry(options, { SYSTEM_NAMESPACE: 'mesh', EXCLUDE_NAMESPACES: 'a' })).toEqual({
      type: 'ambient-redirect',
      enrollment: 'all',
      proxy: { contract: 'shared', match: { namespace: 'mesh', name: 'haproxy-*' } },
      maxPods: 100,
      excludeNamespaces: ['a'],
      stateDir: '/s/x',
      capabilities,
    });
  });

  test('over those of a file: the entry alone, or the conflist it is in', () => {
    const conf = join(root, 'entry.json');
    const own = {
      type: 'ambient-redirect',
      failurePolicy: 'open',
      proxy: { ports: { dns: 0 } },
      capabilities: { a: true },
    };
    for (const document of [own, { cniVersion: '1.0.0', name: 'pods', plugins: [{ type: 'ptp' }, own] }]) {
      writeFileSync(conf, JSON.stringify(document));
      expect(entry({ conf, contract: 'shared' })).toEqual({
        ...own,
        proxy: { ports: { dns: 0 }, contract: 'shared' },
      });
    }
  });

  test.each([
    [{ enrollment: 'some' }, 'invalid field "enrollment" = "some"'],
    [{ maxPods: '0' }, 'invalid field "maxPods" = 0'],
  ])('%j would be refused by the plugin', (options, message) => {
    expect(() => entry(options as Record<string, string>)).toThrow(message);
  });
});

test('a network of its own cannot be', () => {
  const table = { ...DIRECTORY_SETTINGS, ...ENTRY_SETTINGS, ...CONFLIST_SETTINGS };
  expect(() => entryOptions(readSettings(table, {}, { CHAINED_CNI_PLUGIN: 'false' }))).toThrow(
    'CHAINED_CNI_PLUGIN=false cannot be',
  );
});

describe('README', () => {
  const readme = readFileSync(join(import.meta.dirname, '../README.md'), 'utf8');
  const [, section = ''] = /\n## Install on a node\n([\s\S]*?)\n## /.exec(readme) ?? [];
  const rowsOf = (table: SettingTable) =>
    Object.values(table).map(({ flag, environment, fallback, meaning }) =>
      `| \`${flag}\` | ${environment.map((name) => `\`${name}\``).join(', ')} | ${fallback ? `\`${fallback}\`` : ''} | ${meaning} |`.replace(
        /\| +\|/,
        '| |',
      ),
    );

  test.each([
    ['install', INSTALL_SETTINGS],
    ['uninstall', UNINSTALL_SETTINGS],
  ] as const)('has every setting of %s, with its variables and its default', (_command, table) => {
    const rows = section.split('\n').filter((line) => line.startsWith('| `--'));
    expect(rows).toEqual(expect.arrayContaining(rowsOf(table)));
  });

  test('has no other', () => {
    const rows = section.split('\n').filter((line) => line.startsWith('| `--'));
    const known = new Set([...rowsOf(INSTALL_SETTINGS), ...rowsOf(UNINSTALL_SETTINGS)]);
    expect(rows.filter((row) => !known.has(row))).toEqual([]);
  });
});
