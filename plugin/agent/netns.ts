// SPDX-License-Identifier: Apache-2.0
// Finding the network namespace of a recorded pod again: no descriptor of it is kept, so that nothing of a pod that is
// gone stays, and an agent that starts anew finds it in the same way.

import { readdirSync, statSync } from 'node:fs';
import type { Native } from '../native.ts';
import type { NetnsHandle } from './registry.ts';

/**
 * A descriptor, the caller's; null if neither the recorded path nor any process leads to that namespace. (One whose path
 * is gone may still be alive, held by sockets or descriptors.)
 */
export function openWorkloadNetns(native: Native, wanted: NetnsHandle): number | null {
  return openIfSame(native, wanted.path, wanted) ?? openOfProcess(native, wanted);
}

function openIfSame(native: Native, path: string, wanted: NetnsHandle): number | null {
  let fd: number;
  try {
    fd = native.openNetns(path);
  } catch {
    return null;
  }
  try {
    const { dev, ino, cookie } = native.netnsIdentity(fd);
    // Inode numbers come back; cookies, where the kernel has them, do not.
    if (dev === wanted.dev && ino === wanted.ino && cookie === wanted.cookie) return fd;
  } catch {
    // As below.
  }
  native.close(fd);
  return null;
}

/** Runtimes that do not bind the namespace to a path, and paths that were unmounted under a living pod. */
function openOfProcess(native: Native, wanted: NetnsHandle): number | null {
  for (const pid of readdirSync('/proc')) {
    if (!/^[0-9]+$/.test(pid)) continue;
    const path = `/proc/${pid}/ns/net`;
    try {
      const { dev, ino } = statSync(path, { bigint: true });
      if (dev !== wanted.dev || ino !== wanted.ino) continue;
    } catch {
      continue;
    }
    const fd = openIfSame(native, path, wanted);
    if (fd !== null) return fd;
  }
  return null;
}
