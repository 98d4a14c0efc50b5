// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { readSettings, settingOptions } from '../settings.ts';
import { AGENT_SETTINGS } from './settings.ts';

test('each setting is called as its flag, and has a variable of its own', () => {
  const attributes = settingOptions(AGENT_SETTINGS).map((option) => option.attributeName());
  expect(attributes).toEqual(Object.keys(AGENT_SETTINGS));
  const variables = Object.values(AGENT_SETTINGS).flatMap(({ environment }) => environment);
  expect(new Set(variables).size).toBe(variables.length);
});

test('defaults, where Istio has them Istio’s', () => {
  expect(readSettings(AGENT_SETTINGS, {}, {})).toEqual({
    stateDir: '/sys/fs/bpf/ambient-redirect',
    runDir: '/run/ambient-redirect',
    conf: undefined,
    workloads: undefined,
    zdsSocket: '/var/run/ztunnel/ztunnel.sock',
    address: '',
    monitoringPort: 15_014,
    healthPort: 8_000,
    logLevel: 'info',
    nodeName: '',
    kubeApi: undefined,
    kubeCaFile: undefined,
    kubeTokenFile: undefined,
    criSocket: undefined,
    enablementSelectors: undefined,
    redirectMode: undefined,
    ambientConfigDir: '/etc/ambient-config',
    reconcileSeconds: 30,
    ztunnelWaitSeconds: 2,
  });
});

test.each([
  ['ZTUNNEL_UDS_ADDRESS', 'zdsSocket', '/run/z.sock', '/run/z.sock'],
  ['MONITORING_PORT', 'monitoringPort', '0', 0],
  ['LOG_LEVEL', 'logLevel', 'trace', 'trace'],
  ['NODE_NAME', 'nodeName', 'n1', 'n1'],
])('$%s', (variable, name, text, value) => {
  expect(readSettings(AGENT_SETTINGS, {}, { [variable]: text })).toMatchObject({ [name]: value });
});

test.each([
  ['zdsSocket', 'ztunnel.sock', 'It must be an absolute path of at most 107 bytes.'],
  ['zdsSocket', `/${'x'.repeat(107)}`, 'It must be an absolute path'],
  ['monitoringPort', '65536', 'It must be a port, or 0.'],
  ['logLevel', 'loud', 'It must be one of error, warn, info, debug, trace.'],
  ['reconcileSeconds', '-1', 'It must be 0 to 86400.'],
])('%s = %s', (name, text, message) => {
  expect(() => readSettings(AGENT_SETTINGS, { [name]: text }, {})).toThrow(message);
});
