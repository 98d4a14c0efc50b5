// SPDX-License-Identifier: Apache-2.0

import { readdirSync } from 'node:fs';
import { join } from 'node:path';

/** Everything below a directory, by path from there, sorted. Links to directories are not followed. */
export function pathsBelow(directory: string, prefix = ''): string[] {
  return readdirSync(join(directory, prefix), { withFileTypes: true })
    .flatMap((entry) => {
      const path = join(prefix, entry.name);
      return entry.isDirectory() ? [path, ...pathsBelow(directory, path)] : [path];
    })
    .sort();
}
