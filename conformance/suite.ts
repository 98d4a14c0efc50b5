// SPDX-License-Identifier: Apache-2.0
//
// Runs the rules of cases/ against a plugin and says which it keeps.

import { addRules } from './cases/add.ts';
import { checkRules } from './cases/check.ts';
import { delRules } from './cases/del.ts';
import { environmentRules } from './cases/environment.ts';
import { gcRules } from './cases/gc.ts';
import { processRules } from './cases/process.ts';
import type { Rule } from './cases/rule.ts';
import { statusRules } from './cases/status.ts';
import { stdinRules } from './cases/stdin.ts';
import { NotApplicable, Subject, type SubjectOptions, VERSIONS, type Version, Violation } from './cases/subject.ts';
import { supportedVersions, versionRules } from './cases/version.ts';
import { older } from './runtime.ts';

export const RULES: readonly Rule[] = [
  ...processRules,
  ...environmentRules,
  ...stdinRules,
  ...addRules,
  ...delRules,
  ...checkRules,
  ...gcRules,
  ...statusRules,
  ...versionRules,
];

export type Verdict = 'pass' | 'fail' | 'not applicable';

export interface Finding {
  id: string;
  level: Rule['level'];
  spec: string;
  title: string;
  /** Version of the configuration; absent for rules that run once. */
  version?: Version;
  verdict: Verdict;
  /** Why it failed or does not apply. */
  reason?: string;
  /** Milliseconds. */
  ms: number;
}

/** What to run: rule ids or families (A4, A4.13); empty means all. */
export function selected(only: readonly string[]): Rule[] {
  const unknown = only.filter((one) => !RULES.some(({ id }) => id === one || id.startsWith(`${one}.`)));
  if (unknown.length > 0) throw new Error(`no such rule: ${unknown.join(', ')}`);
  return RULES.filter(({ id }) => only.length === 0 || only.some((one) => id === one || id.startsWith(`${one}.`)));
}

function versionsOf(rule: Rule, supported: readonly Version[]): (Version | undefined)[] {
  const { versions } = rule;
  if (versions === undefined) return [undefined];
  if (versions === 'all') return [...supported];
  if ('since' in versions) return supported.filter((one) => !older(one, versions.since));
  return supported.filter((one) => versions.includes(one));
}

/** Runs the rules one after the other on a node of their own; `each` sees a finding as soon as it is there. */
export async function conformance(
  options: SubjectOptions,
  only: readonly string[] = [],
  each: (finding: Finding) => void = () => undefined,
): Promise<Finding[]> {
  const rules = selected(only);
  const findings: Finding[] = [];
  const subject = new Subject(options);
  try {
    try {
      subject.supported = await supportedVersions(subject);
    } catch (error) {
      if (!(error instanceof Violation)) throw error;
    }
    // A plugin without a working VERSION is tried at every version; A8.1 reports it.
    if (subject.supported.length === 0) subject.supported = [...VERSIONS];
    for (const rule of rules) {
      const versions = versionsOf(rule, subject.supported).filter(
        (version) => version === undefined || !options.versions || options.versions.includes(version),
      );
      const { id, level, spec, title } = rule;
      const report = (finding: Pick<Finding, 'verdict' | 'ms' | 'version' | 'reason'>) => {
        findings.push({ id, level, spec, title, ...finding });
        each(findings.at(-1) as Finding);
      };
      if (versions.length === 0) {
        report({ verdict: 'not applicable', reason: `supports ${subject.supported.join(', ')}`, ms: 0 });
      }
      for (const version of versions) {
        const start = performance.now();
        const found = await judge(rule, subject, version);
        await subject.tidy();
        report({ ...found, ...(version && { version }), ms: Math.round(performance.now() - start) });
      }
    }
  } finally {
    subject.close();
  }
  return findings;
}

async function judge(
  rule: Rule,
  subject: Subject,
  version: Version | undefined,
): Promise<{ verdict: Verdict; reason?: string }> {
  try {
    await rule.run(subject, version ?? subject.newest);
    return { verdict: 'pass' };
  } catch (error) {
    if (error instanceof Violation) return { verdict: 'fail', reason: error.message };
    if (error instanceof NotApplicable) return { verdict: 'not applicable', reason: error.message };
    throw new Error(`${rule.id}${version ? ` at ${version}` : ''}: the suite itself failed`, { cause: error });
  }
}

/** Ids of the rules a plugin broke; with the versions (`A4.1@0.3.1`) where it kept it at some. */
export function deviations(findings: readonly Finding[]): string[] {
  const ids = new Set(findings.filter(({ verdict }) => verdict === 'fail').map(({ id }) => id));
  return [...ids].flatMap((id) => {
    const runs = findings.filter((one) => one.id === id);
    const broken = runs.filter(({ verdict }) => verdict === 'fail');
    return broken.length === runs.length ? [id] : broken.map(({ version }) => `${id}@${version}`);
  });
}
