// SPDX-License-Identifier: Apache-2.0
import { mkdirSync, statSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { must, type Running, Testbed, until } from '../../conformance/netns.ts';
import { native } from '../../native/native.testing.ts';
import { AgentSite } from './agent.testing.ts';
import { cgroupOf, isGone } from './cgroups.ts';

let bed: Testbed;
let mount: string;

beforeEach(() => {
  bed = Testbed.open();
  mount = bed.directory('cgroups');
  must(['mount', '-t', 'cgroup2', 'none', mount]);
  bed.defer(() => must(['umount', mount]));
});
afterEach(() => bed.close());

/** A process in a cgroup of its own. */
async function confined(name: string): Promise<{ process: Running; path: string }> {
  const path = join(mount, `ambient-redirect-test-${process.pid}-${name}`);
  mkdirSync(path);
  const started = bed.start(['sleep', '1000']);
  // It can be removed a moment after its last process has gone.
  const remove = `for i in $(seq 1000); do rmdir ${path} 2>/dev/null && exit 0; sleep 0.01; done; rmdir ${path}`;
  bed.defer(() => must(['sh', '-c', `kill -9 ${started.pid}; ${remove}`]));
  writeFileSync(join(path, 'cgroup.procs'), `${started.pid}`);
  return { process: started, path };
}

test('a process in a cgroup of its own: the directory and its inode', async () => {
  const { process: one, path } = await confined('a');
  // The machine may have mounted the same hierarchy elsewhere, too.
  const found = {
    id: statSync(path, { bigint: true }).ino,
    path: expect.stringMatching(new RegExp(`/${basename(path)}$`)),
  };
  expect(cgroupOf(one.pid)).toEqual(found);
  expect(isGone({ id: statSync(path, { bigint: true }).ino, path })).toBe(false);
  expect(isGone({ id: 1n, path })).toBe(true);
  expect(isGone({ id: 1n, path: `${path}-none` })).toBe(true);
});

test('the root cgroup, a process that is gone or out of sight: why not', async () => {
  const started = bed.start(['sleep', '1000']);
  writeFileSync(join(mount, 'cgroup.procs'), `${started.pid}`);
  expect(cgroupOf(started.pid)).toEqual({
    unusable: `process ${started.pid} is in the root cgroup, as everybody may be`,
  });
  await started.stop('SIGKILL');
  await until('it is gone', () => 'unusable' in cgroupOf(started.pid));
  expect(cgroupOf(started.pid)).toEqual({ unusable: `process ${started.pid} is gone` });
  expect(cgroupOf(0)).toEqual({ unusable: 'its process is not visible here (hostPID)' });
});

test('the agent writes down whose sockets may use the mark, or that it can be forged', async () => {
  const site = new AgentSite(bed);
  try {
    site.record(bed.namespace('pod'));
    const { agent } = await site.agent();
    const checks = () => site.withState((state) => native.settings(state).checkCgroups);
    const ids = () => site.withState((state) => native.listProxyCgroups(state));
    const { path } = await confined('ztunnel');
    const own = join(mount, cgroupPath());
    const ztunnel = site.ztunnel();
    await until('it is served', () => agent.zds?.isLive === true);
    // This process, which the stand-in runs in, is wherever the machine has put it.
    const finding = cgroupOf(process.pid);
    if ('id' in finding) {
      expect([checks(), ids()]).toEqual([true, [finding.id]]);
      expect(agent.forgeable).toBeNull();
    } else {
      expect([checks(), ids()]).toEqual([false, []]);
      expect(agent.forgeable).toBe(finding.unusable);
    }
    // And in one of its own, when it connects again.
    writeFileSync(join(path, 'cgroup.procs'), `${process.pid}`);
    try {
      ztunnel.dropConnection();
      const { ino } = statSync(path, { bigint: true });
      await until('the new cgroup is known', () => ids().includes(ino));
      expect(checks()).toBe(true);
      expect(agent.forgeable).toBeNull();
    } finally {
      writeFileSync(join(own, 'cgroup.procs'), `${process.pid}`);
    }
  } finally {
    await site.close();
  }
});

/** Where this process is, in the v2 hierarchy. */
function cgroupPath(): string {
  return /^0::(.*)$/m.exec(must(['cat', `/proc/${process.pid}/cgroup`]))?.[1] ?? '/';
}
