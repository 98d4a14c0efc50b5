// SPDX-License-Identifier: Apache-2.0
//
// The rules of cases/ prove themselves: a plugin that keeps them all passes, each rule fails for a plugin that breaks
// it, and Debian's plugins (containernetworking-plugins 1.1.1) break those that are listed here, no more and no fewer.

import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import type { SubjectOptions, Version } from './cases/subject.ts';
import type { JsonObject } from './runtime.ts';
import { conformance, deviations, type Finding, RULES } from './suite.ts';

/**
 * npm run test:long takes every version, every way to be wrong and every rule for every plugin. npm test takes the
 * newest version that each plugin supports, one way to be wrong for each family of rules, and of Debian's plugins the
 * families where each has ways of its own.
 */
const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';

const reference: SubjectOptions = {
  plugin: join(import.meta.dirname, 'plugins', 'passthrough'),
  // biome-ignore lint/suspicious/noTemplateCurlyInString: replaced by the suite
  entry: { type: 'passthrough', stateDir: '${BPFFS}', mode: 'plain' },
  badKeys: { mode: 'no such mode' },
  passThrough: true,
};

function failures(findings: readonly Finding[]): string[] {
  return findings
    .filter(({ verdict }) => verdict === 'fail')
    .map(({ id, version, reason }) => `${id} ${version}: ${reason}`);
}

describe('a plugin that keeps the rules', () => {
  test('passes them all', { timeout: 180_000 }, async () => {
    const findings = await conformance({ ...reference, ...(!LONG && { versions: ['1.1.0'] }) });
    expect(failures(findings)).toEqual([]);
    // A5.9 is about 0.3.1.
    const unconcerned = findings.filter(({ verdict }) => verdict === 'not applicable').map(({ id }) => id);
    expect(unconcerned).toEqual(LONG ? [] : ['A5.9']);
    expect(new Set(findings.map(({ id }) => id))).toEqual(new Set(RULES.map(({ id }) => id)));
  });

  test('without state of its own passes too; rules about state do not apply', async () => {
    const findings = await conformance({ ...reference, entry: { type: 'passthrough' } }, [
      'A3.12',
      'A4.13',
      'A4.1',
      'A6.4',
    ]);
    expect(failures(findings)).toEqual([]);
    expect(findings.filter(({ verdict }) => verdict === 'not applicable').map(({ id }) => id)).toContain('A4.13');
    expect(findings.filter(({ id, verdict }) => id === 'A4.1' && verdict === 'pass')).toHaveLength(4);
  });
});

/** What the reference plugin is told to get wrong, and the rules that must notice. */
const WRONG: [word: string, ...rules: string[]][] = [
  ['exit-zero', 'A0.1'],
  ['error-no-version', 'A0.2'],
  ['two-errors', 'A0.3'],
  ['string-code', 'A0.3'],
  ['stderr', 'A0.3'],
  ['reserved-code', 'A0.5'],
  ['mixes', 'A0.6'],
  ['needs-status', 'A0.7'],
  ['strict-keys', 'A0.8'],
  ['signal', 'A0.9'],
  ['one-read', 'A0.10'],
  ['pipe-hang', 'A0.11'],
  ['needs-home', 'A0.12'],
  ['unwritten', 'A0.13'],
  ['no-command', 'A1.1'],
  ['any-case', 'A1.2'],
  ['no-required', 'A1.3'],
  ['one-by-one', 'A1.4'],
  ['any-id', 'A1.5', 'A4.18'],
  ['any-ifname', 'A1.6'],
  ['characters', 'A1.6'],
  ['nameless', 'A1.7'],
  ['judges-all', 'A1.8'],
  ['wants-path', 'A1.9'],
  ['forgets-path', 'A1.10'],
  ['short-id', 'A1.11'],
  ['decode-code', 'A2.1'],
  ['no-name', 'A2.2'],
  ['any-name', 'A2.3'],
  ['prefix-version', 'A2.4'],
  ['no-prev-ok', 'A2.5', 'A5.2'],
  ['prev-code', 'A2.6', 'A5.3'],
  ['early', 'A2.7'],
  ['prev-unread', 'A2.7'],
  ['prev-shape-code', 'A2.8'],
  ['io-code', 'A2.9'],
  ['any-version', 'A2.10'],
  ['proto', 'A2.11'],
  ['any-mode', 'A2.12', 'A7.4'],
  ['result-version', 'A3.1'],
  ['drops-routes', 'A3.2'],
  ['wants-prev-version', 'A3.3'],
  ['keeps-version', 'A3.4'],
  ['exact-prev', 'A3.4'],
  ['any-family', 'A3.5'],
  ['strips-extras', 'A3.6'],
  ['blind', 'A3.7', 'A3.8'],
  ['makes-file', 'A3.9'],
  ['own-netns', 'A3.10'],
  ['exclusive', 'A3.11'],
  ['counts', 'A3.11', 'A3.12'],
  ['same-path', 'A3.13'],
  ['del-gone', 'A3.14', 'A4.5'],
  ['wants-index', 'A3.15'],
  ['del-talks', 'A4.1'],
  ['del-once', 'A4.1', 'A4.2', 'A6.9'],
  ['wants-netns', 'A4.3', 'A4.4'],
  ['del-unlink', 'A4.6'],
  ['del-file', 'A4.6', 'A4.7'],
  ['del-prev', 'A4.8'],
  ['del-prev-given', 'A4.9'],
  ['del-link', 'A4.10', 'A4.11'],
  ['del-own', 'A4.12'],
  ['del-nothing', 'A4.13'],
  ['del-by-netns', 'A4.14'],
  ['del-by-prev', 'A4.15'],
  ['del-all', 'A4.16'],
  ['one-id', 'A4.17'],
  ['del-strict', 'A4.19'],
  ['exclusive,del-nothing', 'A4.20'],
  ['check-talks', 'A5.1'],
  ['check-strict', 'A5.4'],
  ['check-no-link', 'A5.5', 'A5.6'],
  ['check-no-state', 'A5.7'],
  ['check-repairs', 'A5.8'],
  ['any-verb-version', 'A5.9', 'A6.10', 'A7.3'],
  ['gc-no-null', 'A6.1'],
  ['gc-new-key,gc-absent-all', 'A6.2'],
  ['gc-nothing', 'A6.3', 'A6.4', 'A6.5'],
  ['gc-absent-all', 'A6.6'],
  ['gc-wants-key', 'A6.1'],
  ['gc-all-networks', 'A6.7'],
  ['gc-any', 'A6.8'],
  ['status-fails', 'A7.1'],
  ['status-writes', 'A7.2'],
  ['version-empty', 'A8.1'],
  ['version-newest', 'A8.2'],
  ['version-stdin', 'A8.3'],
  ['drops-0.3.1', 'A8.4'],
  ['hides-0.3.1', 'A8.4'],
  ['wants-all', 'A8.5'],
  ['strips-version', 'A9.1'],
  ['args-order', 'A10.1'],
  ['args', 'A10.2'],
];

describe('each rule can fail', () => {
  test('every rule is broken by something below', () => {
    const broken = new Set(WRONG.flatMap(([, ...rules]) => rules));
    expect(RULES.map(({ id }) => id).filter((id) => !broken.has(id))).toEqual([]);
  });

  const family = ([, rule = '']: (typeof WRONG)[number]) => rule.split('.')[0];
  const first = WRONG.filter((one) => WRONG.find((other) => family(other) === family(one)) === one);
  test.each(LONG ? WRONG : first)('%s', async (word, ...rules) => {
    const findings = await conformance({ ...reference, environment: { WRONG: word } }, rules);
    const failed = new Set(findings.filter(({ verdict }) => verdict === 'fail').map(({ id }) => id));
    expect(failed).toEqual(new Set(rules));
  });
});

/**
 * What skel 1.1 and its plugins do otherwise, each:
 * A0.2 errors have no cniVersion; A1.7 names no variable; A1.9 wants CNI_PATH; A2.6, A2.8, A5.3 untyped errors (999);
 * A6.10, A7.3 an unknown verb is code 3; A8.2 VERSION answers its newest.
 */
const SKEL = ['A0.2', 'A1.7', 'A1.9', 'A2.6', 'A2.8', 'A5.3', 'A6.10', 'A7.3', 'A8.2@0.4.0'];
/** DEL parses prevResult, and fails with it. */
const DEL_PARSES = ['A4.9'];

interface Known {
  entry: JsonObject;
  badKeys: JsonObject;
  capabilityArgs?: JsonObject;
  passThrough?: boolean;
  newest: Version;
  /** Families of rules that npm test runs, absent: all. What skel does is the same in each of them. */
  families?: readonly string[];
  deviations: string[];
}

const DEBIAN: Record<string, Known> = {
  bandwidth: {
    entry: { ingressRate: 1_000_000, ingressBurst: 1_000_000, egressRate: 1_000_000, egressBurst: 1_000_000 },
    badKeys: { ingressRate: 'x' },
    newest: '1.0.0',
    deviations: [
      ...SKEL,
      ...DEL_PARSES,
      'A8.2@0.3.1',
      'A2.12', // 999
      // DEL leaves tbf and ingress qdisc on the host veth, whose end it expects; a new ADD meets them ("file exists").
      ...['A1.11', 'A3.11', 'A3.12', 'A4.13', 'A4.20'],
      'A4.19',
    ],
  },
  tuning: {
    // biome-ignore lint/suspicious/noTemplateCurlyInString: replaced by the suite
    entry: { mtu: 1400, sysctl: { 'net.ipv4.conf.eth0.rp_filter': '1' }, dataDir: '${DIR}' },
    badKeys: { mtu: 'x' },
    newest: '1.0.0',
    families: ['A3', 'A4', 'A10'],
    deviations: [
      ...SKEL,
      ...DEL_PARSES,
      'A8.2@0.3.1',
      'A2.12', // 999
      'A3.7', // an interface that is absent fails, but the sysctl is set by then
      'A3.12', // the second ADD saves the tuned MTU as the original
      'A4.13', // sysctls are never restored
      'A4.17', // DEL restores the MTU of whatever has the path
      'A4.19',
      'A10.2', // wants well-formed CNI_ARGS
    ],
  },
  sbr: {
    entry: {},
    badKeys: { table: 'x' },
    passThrough: true,
    newest: '1.0.0',
    families: ['A3', 'A4', 'A5'],
    deviations: [
      ...SKEL,
      ...DEL_PARSES,
      'A8.2@0.3.1',
      'A2.12', // ignored
      'A3.3',
      'A3.9', // opens its lock with O_CREAT at the netns path
      'A3.10',
      ...['A1.11', 'A3.11', 'A4.20'], // ADD again: "file exists"
      ...['A3.12', 'A4.13'], // routes moved to another table do not come back
      // DEL needs the namespace, and the interface in it.
      ...['A3.14', 'A4.3', 'A4.4', 'A4.5', 'A4.6', 'A4.7', 'A4.10', 'A4.11', 'A4.12', 'A4.14', 'A4.15'],
      'A4.17',
      ...['A5.2', 'A5.5', 'A5.6', 'A5.7'], // CHECK does nothing
    ],
  },
  portmap: {
    entry: { snat: true, capabilities: { portMappings: true } },
    capabilityArgs: { portMappings: [{ hostPort: 8080, containerPort: 80, protocol: 'tcp' }] },
    badKeys: { snat: 'x' },
    passThrough: true,
    newest: '1.0.0',
    families: ['A3', 'A5'],
    deviations: [
      ...SKEL,
      ...DEL_PARSES,
      'A8.2@0.3.1',
      'A2.12', // 999
      ...['A3.7', 'A3.8', 'A3.10'], // never looks into the namespace
      // CHECK looks for IPv4's chain and rules among IPv6's and never succeeds.
      ...['A4.16', 'A4.17', 'A5.1', 'A5.4', 'A5.8'],
      'A4.19',
    ],
  },
  firewall: {
    entry: { backend: 'iptables' },
    badKeys: { backend: 'x' },
    passThrough: true,
    newest: '1.0.0',
    families: ['A3', 'A5'],
    deviations: [
      ...SKEL,
      ...DEL_PARSES,
      'A2.12', // ignored
      ...['A3.7', 'A3.8', 'A3.10', 'A5.5', 'A5.6'], // never looks into the namespace
      'A4.15', // rules are found by prevResult's addresses alone
    ],
  },
};

describe("Debian's plugins deviate as known", () => {
  test.each(Object.entries(DEBIAN))('%s', { timeout: 300_000 }, async (name, known) => {
    const { newest, deviations: list, families = [], ...options } = known;
    const only = LONG ? [] : families;
    const findings = await conformance(
      { plugin: `/usr/lib/cni/${name}`, ...options, ...(!LONG && { versions: [newest] }) },
      only,
    );
    const concerned = (id: string) =>
      LONG ||
      ((!id.includes('@') || id.endsWith(`@${newest}`)) &&
        (only.length === 0 || only.includes(id.split('.')[0] ?? '')));
    expect(deviations(findings).sort()).toEqual(list.filter(concerned).sort());
  });
});
