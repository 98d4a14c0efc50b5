// SPDX-License-Identifier: Apache-2.0
// Whose the proxy's mark is. In the in-pod contract SO_MARK 0x539 says "the proxy", and whoever has CAP_NET_RAW can set
// it; the kernel knows each socket's v2 cgroup, which no pod can choose. Called by the agent when ztunnel connects.

import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import type { Native, State } from './native.ts';

/**
 * Id of the v2 cgroup that a process is in. null: there is no v2 hierarchy here, the process is gone, or it is in the
 * root cgroup, which tells it from nobody.
 */
export function cgroupOf(pid: number): bigint | null {
  const mount = v2Mount();
  if (mount === null) return null;
  try {
    const path = /^0::(.*)$/m.exec(readFileSync(`/proc/${pid}/cgroup`, 'utf8'))?.[1];
    // A process outside this cgroup namespace is shown as "/../...".
    if (path === undefined || path === '/' || path.startsWith('/..')) return null;
    return statSync(join(mount, path), { bigint: true }).ino;
  } catch (error) {
    if (['ENOENT', 'ESRCH'].includes((error as NodeJS.ErrnoException).code ?? '')) return null;
    throw error;
  }
}

/** Where the whole v2 hierarchy of this cgroup namespace is mounted. */
function v2Mount(): string | null {
  const mount = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => {
      const [mounted = '', type = ''] = line.split(' - ');
      const [, , , root, path = ''] = mounted.split(' ');
      return type.startsWith('cgroup2 ') && root === '/' ? path : null;
    })
    .find((path) => path !== null);
  return mount ?? null;
}

/**
 * From the next packet on, the mark counts on sockets of this process's cgroup, and only on those of cgroups that were
 * named so. false: its cgroup tells nothing; then the check is not switched on, and anybody's mark counts, as `status`
 * says, unless it is on already for another proxy.
 */
export function trustProxy(native: Native, state: State, pid: number): boolean {
  const id = cgroupOf(pid);
  if (id === null) return false;
  native.putProxyCgroup(state, id);
  native.setCheckCgroups(state, true);
  return true;
}

/** The cgroups of `pids` are the proxy's and no others; those of proxies that are gone are forgotten. */
export function forgetOtherProxies(native: Native, state: State, pids: readonly number[]): void {
  const kept = new Set(pids.map(cgroupOf));
  for (const id of native.listProxyCgroups(state)) {
    if (!kept.has(id)) native.deleteProxyCgroup(state, id);
  }
}
