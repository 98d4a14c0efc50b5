// SPDX-License-Identifier: Apache-2.0
//
// The alerts, as Prometheus itself reads them.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { parse } from 'yaml';
import { loadNative } from '../../plugin/addon.ts';
import { exec } from '../netns.ts';
import { ALERTS, alerts, dashboard } from './monitoring.ts';

const UNIT_TESTS = join(import.meta.dirname, 'alerts.test.yaml');
const README = readFileSync(join(import.meta.dirname, '../../README.md'), 'utf8');

interface RuleTest {
  name: string;
  alert_rule_test: { eval_time: string; alertname: string; exp_alerts?: object[] }[];
}

test('promtool finds nothing wrong with them', async () => {
  const { status, stdout, stderr } = await exec(['promtool', 'check', 'rules', '--lint-fatal', ALERTS]);
  expect({ status, stderr, stdout }).toEqual({
    status: 0,
    stderr: '',
    stdout: expect.stringContaining(`SUCCESS: ${alerts().length} rules found`),
  });
});

test('promtool runs their unit tests', async () => {
  const { status, stdout, stderr } = await exec(['promtool', 'test', 'rules', UNIT_TESTS]);
  expect({ status, output: stdout + stderr }).toEqual({ status: 0, output: expect.stringContaining('SUCCESS') });
});

describe.each(alerts())('$alert', ({ alert, labels, annotations }) => {
  test('has a unit test in which it is quiet, and fires', () => {
    const { tests } = parse(readFileSync(UNIT_TESTS, 'utf8')) as { tests: RuleTest[] };
    const own = tests.flatMap((group) => group.alert_rule_test).filter(({ alertname }) => alertname === alert);
    expect(own.some(({ exp_alerts }) => exp_alerts === undefined)).toBe(true);
    expect(own.some(({ exp_alerts }) => exp_alerts !== undefined && exp_alerts.length > 0)).toBe(true);
  });

  test('says what is the matter, how bad it is, and where to read on', () => {
    expect(['critical', 'warning']).toContain(labels.severity);
    expect(Object.keys(annotations).sort()).toEqual(['description', 'runbook', 'summary']);
    const anchor = alert.toLowerCase();
    expect(annotations.runbook).toBe(`README.md#${anchor}`);
    expect(README).toContain(`<a id="${anchor}"></a>\`${alert}\``);
  });
});

test('README has a runbook of no alert that is not there', () => {
  const described = [...README.matchAll(/<a id="\w+"><\/a>`(AmbientRedirect\w+)`/g)].map(([, name]) => name);
  expect(described).toEqual(alerts().map(({ alert }) => alert));
});

test('each reason that alerts and dashboard ask for is one that the programs have', () => {
  const reasons = Object.keys(loadNative().reasons);
  const texts = [...alerts().map(({ expr }) => expr), ...dashboard('5m').flatMap(({ queries }) => queries)];
  const asked = texts.flatMap((text) => [...text.matchAll(/reason=~?"([^"]*)"/g)].map(([, pattern = '']) => pattern));
  expect(asked.length).toBeGreaterThan(5);
  // An alternative that matches nothing is one that was renamed.
  const alternatives = new Set(asked.flatMap(expanded));
  const unknown = [...alternatives].filter((one) => !reasons.some((reason) => new RegExp(`^${one}$`).test(reason)));
  expect(unknown).toEqual([]);
});

/** "drop_(a|b)" is drop_a and drop_b; "a|b" a and b. */
function expanded(pattern: string): string[] {
  const group = /^(.*)\(([^)]*)\)(.*)$/.exec(pattern);
  if (group === null) return pattern.split('|');
  const [, before = '', middle = '', after = ''] = group;
  return middle.split('|').map((one) => `${before}${one}${after}`);
}
