// SPDX-License-Identifier: Apache-2.0
// Which cgroup a ztunnel is in. The programs take a packet with ztunnel's mark for ztunnel's own only if its socket is
// of such a cgroup: the mark alone can be set by whoever has CAP_NET_RAW in a pod.

import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
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
  for (const mount of hierarchies()) {
    const place = relativeTo(mount.root, path);
    if (place === undefined) continue;
    const isRoot = place.unknown === 0 && place.tail === '';
    if (isRoot && mount.isWhole) return { unusable: `process ${pid} is in the root cgroup, as everybody may be` };
    for (const above of directoriesBelow(mount.path, place.unknown)) {
      const directory = join(above, place.tail);
      try {
        // What a path means depends on the cgroup namespace it is read in; who is inside does not.
        const inside = readFileSync(join(directory, 'cgroup.procs'), 'utf8').split('\n');
        if (inside.includes(`${pid}`)) return { id: statSync(directory, { bigint: true }).ino, path: directory };
      } catch {
        // Not here.
      }
    }
  }
  return { unusable: `no mount of the v2 hierarchy shows ${path}` };
}

/**
 * Both paths are as this process's cgroup namespace has them: "/.." is the parent of its root. A container with a
 * namespace of its own sees the node's mount as "/../../../..", and a pod beside its own as "/../../POD/CONTAINER": how
 * many directories there are between the two is known, and not what they are called. undefined: it is not below.
 */
export function relativeTo(root: string, path: string): { unknown: number; tail: string } | undefined {
  const [above, below] = [climbs(root), climbs(path)];
  const unknown = above.up - below.up;
  if (unknown < 0 || (unknown > 0 && above.down.length > 0)) return undefined;
  if (above.down.some((name, i) => name !== below.down[i])) return undefined;
  return { unknown, tail: below.down.slice(above.down.length).join('/') };
}

function climbs(path: string): { up: number; down: string[] } {
  const names = path.split('/').filter((name) => name !== '');
  const up = names.findIndex((name) => name !== '..');
  return up < 0 ? { up: names.length, down: [] } : { up, down: names.slice(up) };
}

/** Those that are `levels` below, itself for 0. */
function directoriesBelow(directory: string, levels: number): string[] {
  let found = [directory];
  for (let level = 0; level < levels; level++) {
    found = found.flatMap((above) => {
      try {
        const entries = readdirSync(above, { withFileTypes: true });
        return entries.filter((entry) => entry.isDirectory()).map(({ name }) => join(above, name));
      } catch {
        return [];
      }
    });
  }
  return found;
}

/** A cgroup that is gone has no sockets any more, and its id does not come back. */
export function isGone({ id, path }: { id: bigint; path: string }): boolean {
  try {
    return statSync(path, { bigint: true }).ino !== id;
  } catch {
    return true;
  }
}

interface Hierarchy {
  /** of what is mounted, as this process's cgroup namespace has it */
  root: string;
  path: string;
  /** nothing is above `root` */
  isWhole: boolean;
}

function hierarchies(): Hierarchy[] {
  return ['', '/proc/1/root'].flatMap((process) => {
    try {
      return readFileSync(process === '' ? '/proc/self/mountinfo' : '/proc/1/mountinfo', 'utf8')
        .split('\n')
        .flatMap((line) => {
          const [before = '', after = ''] = line.split(' - ');
          if (!after.startsWith('cgroup2 ')) return [];
          const [, , , root = '', point = ''] = before.split(' ').map(unescaped);
          const path = process + point;
          // All cgroups but the root have this file.
          return [{ root, path, isWhole: !existsSync(join(path, 'cgroup.type')) }];
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
