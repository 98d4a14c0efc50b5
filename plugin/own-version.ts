// SPDX-License-Identifier: Apache-2.0

import { readFileSync } from 'node:fs';
import { join } from 'node:path';

/** Set by the build. */
declare const AMBIENT_REDIRECT_VERSION: string | undefined;

/** Of package.json: "0.1.0". */
export function ownVersion(): string {
  if (typeof AMBIENT_REDIRECT_VERSION === 'string') return AMBIENT_REDIRECT_VERSION;
  const description: unknown = JSON.parse(readFileSync(join(import.meta.dirname, '../package.json'), 'utf8'));
  return (description as { version: string }).version;
}
