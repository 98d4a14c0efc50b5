// SPDX-License-Identifier: Apache-2.0
// VERSION (SPEC section "VERSION").

import { NEWEST_VERSION, SUPPORTED_VERSIONS } from '../cni/version.ts';

/**
 * One line of JSON. SPEC wants the version that the caller sent; runtimes that ask send anything, or nothing, so
 * input that does not help is no error.
 */
export function version(stdin: Buffer): string {
  return `${JSON.stringify({ cniVersion: askedVersion(stdin) ?? NEWEST_VERSION, supportedVersions: SUPPORTED_VERSIONS })}\n`;
}

function askedVersion(stdin: Buffer): string | undefined {
  let document: unknown;
  try {
    document = JSON.parse(stdin.toString('utf8'));
  } catch {
    return undefined;
  }
  if (typeof document !== 'object' || document === null || !Object.hasOwn(document, 'cniVersion')) return undefined;
  const { cniVersion } = document as { cniVersion: unknown };
  return SUPPORTED_VERSIONS.find((supported) => supported === cniVersion);
}
