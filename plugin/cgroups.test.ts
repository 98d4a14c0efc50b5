// SPDX-License-Identifier: Apache-2.0

import { spawn } from 'node:child_process';
import { mkdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { must, Testbed, until } from '../conformance/netns.ts';
import { native, stateDirectory } from '../native/native.testing.ts';
import { cgroupOf, forgetOtherProxies, trustProxy } from './cgroups.ts';

let bed: Testbed;
beforeEach(() => {
  bed = Testbed.open();
});
afterEach(() => bed.close());

/** A process in a cgroup of its own, below the mounted v2 hierarchy. */
async function contained(label: string): Promise<{ pid: number; id: bigint }> {
  const mount = must(['sh', '-c', 'awk \'$3 == "cgroup2" { print $2; exit }\' /proc/mounts']).trim();
  const cgroup = join(mount, `ambient-${process.pid}-${label}`);
  mkdirSync(cgroup);
  // It can be removed a moment after the process has left it.
  bed.defer(() => must(['timeout', '5', 'sh', '-c', `until rmdir ${cgroup} 2>/dev/null; do :; done`]));
  const child = spawn('sh', ['-c', `echo $$ > ${cgroup}/cgroup.procs && exec sleep 60`]);
  bed.defer(() => child.kill('SIGKILL'));
  const id = statSync(cgroup, { bigint: true }).ino;
  await until('the process is in its cgroup', () => cgroupOf(child.pid ?? 0) === id);
  return { pid: child.pid ?? 0, id };
}

test('the cgroup of a process is its directory’s inode', async () => {
  const { pid, id } = await contained('one');
  expect(cgroupOf(pid)).toBe(id);
});

test('a process that is gone has none', () => {
  expect(cgroupOf(0x3fffffff)).toBeNull();
});

test('trusted proxies are listed, switch the check on, and are forgotten', async () => {
  const { dir } = stateDirectory(bed);
  const state = native.openState(dir);
  bed.defer(() => native.closeState(state));
  const [one, two] = [await contained('first'), await contained('second')];
  expect(native.settings(state).checkCgroups).toBe(false);
  expect(trustProxy(native, state, 0x3fffffff)).toBe(false);
  expect(native.settings(state).checkCgroups).toBe(false);
  expect(trustProxy(native, state, one.pid)).toBe(true);
  expect(trustProxy(native, state, two.pid)).toBe(true);
  expect(native.settings(state).checkCgroups).toBe(true);
  expect(native.listProxyCgroups(state).sort()).toEqual([one.id, two.id].sort());
  forgetOtherProxies(native, state, [two.pid]);
  expect(native.listProxyCgroups(state)).toEqual([two.id]);
});
