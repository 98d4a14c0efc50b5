// SPDX-License-Identifier: Apache-2.0
// Which CNI versions and verbs the plugin speaks. Versions match by exact string, as SPEC has no ranges.

import { CniError, Code } from './errors.ts';

export const SUPPORTED_VERSIONS = ['0.3.1', '0.4.0', '1.0.0', '1.1.0'] as const;
export const NEWEST_VERSION = '1.1.0';
/** What a configuration without the key means. */
export const UNDECLARED_VERSION = '0.1.0';

export type Verb = 'ADD' | 'DEL' | 'CHECK' | 'GC' | 'STATUS';

const MINIMUM: Readonly<Partial<Record<Verb, string>>> = { CHECK: '0.4.0', GC: '1.1.0', STATUS: '1.1.0' };

/**
 * Versions whose Results have one shape. '0.x': 0.3.0 to 0.4.0, with ips[].version. '1.x': 1.0.0 and 1.1.0, without.
 * undefined for anything else.
 */
export function resultFamily(version: string): '0.x' | '1.x' | undefined {
  switch (version) {
    case '0.3.0':
    case '0.3.1':
    case '0.4.0':
      return '0.x';
    case '1.0.0':
    case '1.1.0':
      return '1.x';
    default:
      return undefined;
  }
}

/** Throws CniError 1, or 6 where the verb has a minimum and the version is no version at all. */
export function assertVersion(version: string, verb: Verb): void {
  const minimum = MINIMUM[verb];
  if (minimum !== undefined) {
    const parts = parseVersion(version);
    if (compare(parts, parseVersion(minimum)) < 0) {
      const details = `config is ${JSON.stringify(version)}, ${verb} needs ${JSON.stringify(minimum)}`;
      throw new CniError(Code.INCOMPATIBLE_CNI_VERSION, `config version does not allow ${verb}`, details);
    }
    if (compare(parts, parseVersion(NEWEST_VERSION)) > 0) {
      const details = `config is ${JSON.stringify(version)}, plugin supports ${supported()}`;
      throw new CniError(Code.INCOMPATIBLE_CNI_VERSION, `plugin version does not allow ${verb}`, details);
    }
  }
  if (!(SUPPORTED_VERSIONS as readonly string[]).includes(version)) {
    const details = `config is ${JSON.stringify(version)}, plugin supports ${supported()}`;
    throw new CniError(Code.INCOMPATIBLE_CNI_VERSION, 'incompatible CNI versions', details);
  }
}

function supported(): string {
  return `[${SUPPORTED_VERSIONS.map((version) => JSON.stringify(version)).join(' ')}]`;
}

/** "1.1" is 1.1.0: the reference library reads one to three numbers. */
function parseVersion(version: string): readonly number[] {
  const parts = version.split('.');
  if (parts.length > 3 || !parts.every((part) => /^[0-9]{1,9}$/.test(part))) {
    const details = `cniVersion = ${JSON.stringify(version)}: expected up to three numbers separated by dots`;
    throw new CniError(Code.DECODING_FAILURE, 'invalid cniVersion', details);
  }
  return parts.map(Number);
}

function compare(left: readonly number[], right: readonly number[]): number {
  for (let i = 0; i < 3; i++) {
    const difference = (left[i] ?? 0) - (right[i] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}
