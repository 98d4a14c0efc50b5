// SPDX-License-Identifier: Apache-2.0
// Exit code 0 if node_modules has what package-lock.json names, in the very versions, else 1. Compares the lock file
// with npm's own record of what it put there, so it also holds after `npm install`. Runs on the system's Node.

import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

const root = dirname(import.meta.dirname ?? new URL('.', import.meta.url).pathname.replace(/\/$/, ''));

function packagesOf(file) {
  return JSON.parse(readFileSync(join(root, file), 'utf8')).packages;
}

/** npm leaves out optional packages that are for another system, and what only those need. */
function isNeeded({ optional, os, cpu, libc }) {
  if (!optional) return true;
  if (!os && !cpu) return false;
  const fits = (list, value) => !list || list.includes(value);
  return fits(os, process.platform) && fits(cpu, process.arch) && fits(libc, 'glibc');
}

function isInstalled() {
  if (!existsSync(join(root, 'node_modules/.package-lock.json'))) return false;
  const wanted = packagesOf('package-lock.json');
  const present = packagesOf('node_modules/.package-lock.json');
  return Object.entries(wanted).every(([path, entry]) => {
    if (path === '' || !isNeeded(entry)) return true;
    const { version, integrity } = present[path] ?? {};
    return version === entry.version && integrity === entry.integrity && existsSync(join(root, path, 'package.json'));
  });
}

process.exitCode = isInstalled() ? 0 : 1;
