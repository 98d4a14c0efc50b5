// SPDX-License-Identifier: Apache-2.0
// Which cgroup a ztunnel is in. The programs take a packet with ztunnel's mark for ztunnel's own only if its socket is
// of such a cgroup: the mark alone can be set by whoever has CAP_NET_RAW in a pod.

import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';

/** `id`: as bpf_skb_cgroup_id() has it, the inode number of the cgroup's directory. */
export type CgroupFinding = { id: bigint; path: string } | { unusable: string };

/** Looks at /proc and at what is mounted of the v2 hierarchy, in this process's view and in that of process 1. */
export function cgroupOf(pid: number): CgroupFinding {
  if (pid === 0) return { unusable: 'its process is not visible here (hostPID)' };
  let path: string | undefined;
  try {
    path = /^0::(.*)$/m.exec(readFileSync(`/proc/${pid}/cgroup`, 'utf8'))?.[1];
  } catch {
    return { unusable: `process ${pid} is gone` };
  }
  if (path === undefined) return { unusable: 'the kernel has no v2 cgroups' };
  if (path === '/') return { unusable: `process ${pid} is in the root cgroup, as everybody may be` };
  for (const mount of mountPoints()) {
    const directory = join(mount, path);
    try {
      // What a path means depends on the cgroup namespace it is read in; who is inside does not.
      const inside = readFileSync(join(directory, 'cgroup.procs'), 'utf8').split('\n');
      if (inside.includes(`${pid}`)) return { id: statSync(directory, { bigint: true }).ino, path: directory };
    } catch {
      // Not this mount.
    }
  }
  return { unusable: `no mount of the v2 hierarchy shows ${path}` };
}

/** A cgroup that is gone has no sockets any more, and its id does not come back. */
export function isGone({ id, path }: { id: bigint; path: string }): boolean {
  try {
    return statSync(path, { bigint: true }).ino !== id;
  } catch {
    return true;
  }
}

function mountPoints(): string[] {
  return ['', '/proc/1/root'].flatMap((root) => {
    try {
      return readFileSync(root === '' ? '/proc/self/mountinfo' : '/proc/1/mountinfo', 'utf8')
        .split('\n')
        .flatMap((line) => {
          const [before = '', after = ''] = line.split(' - ');
          return after.startsWith('cgroup2 ') ? [root + unescaped(before.split(' ')[4] ?? '')] : [];
        });
    } catch {
      return [];
    }
  });
}

/** proc(5): space, tab, newline and backslash are octal escapes. */
function unescaped(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}
