// SPDX-License-Identifier: Apache-2.0
import { mkdirSync, statSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { must, type Running, Testbed, until } from '../../conformance/netns.ts';
import { native } from '../../native/native.testing.ts';
import { AgentSite } from './agent.testing.ts';
import { cgroupOf, isGone, relativeTo } from './cgroups.ts';

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
  bed.defer(() => remove(path));
  bed.defer(() => must(['kill', '-9', `${started.pid}`]));
  writeFileSync(join(path, 'cgroup.procs'), `${started.pid}`);
  return { process: started, path };
}

/** With those inside. One can be removed a moment after its last process has gone. */
function remove(path: string): void {
  const gone = `find ${path} -depth -type d -exec rmdir {} + 2>/dev/null`;
  must(['sh', '-c', `for i in $(seq 1000); do ${gone} && exit 0; sleep 0.01; done; find ${path}; exit 1`]);
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

test.each([
  ['/', '/a/b', { unknown: 0, tail: 'a/b' }],
  ['/', '/', { unknown: 0, tail: '' }],
  ['/a', '/a/b', { unknown: 0, tail: 'b' }],
  ['/a', '/b', undefined],
  ['/', '/../a', undefined],
  ['/../../../..', '/../../pod/container', { unknown: 2, tail: 'pod/container' }],
  ['/../../../..', '/../../../../system.slice', { unknown: 0, tail: 'system.slice' }],
  ['/../../../..', '/../../../..', { unknown: 0, tail: '' }],
  ['/../..', '/child', { unknown: 2, tail: 'child' }],
  ['/../../x', '/../y', undefined],
])('a mount of %s and a process in %s', (root, path, wanted) => {
  expect(relativeTo(root, path)).toEqual(wanted);
});

test('from a cgroup namespace of its own, as containers have on nodes with v2 alone', async () => {
  const [beside, root] = [await confined('pods'), bed.start(['sleep', '1000'])];
  // Like kubepods/pod/container: the agent's and ztunnel's are two below what they have in common.
  const [ztunnel, inside] = ['pod-z', 'pod-a'].map((name) => join(beside.path, name, 'container'));
  if (ztunnel === undefined || inside === undefined) throw new Error('two');
  for (const path of [ztunnel, inside]) mkdirSync(path, { recursive: true });
  writeFileSync(join(ztunnel, 'cgroup.procs'), `${beside.process.pid}`);
  writeFileSync(join(mount, 'cgroup.procs'), `${root.pid}`);
  const source = `import { cgroupOf } from '${join(import.meta.dirname, 'cgroups.ts')}';
    console.log(JSON.stringify([${beside.process.pid}, ${root.pid}].map((pid) => {
      const { id, path, unusable } = cgroupOf(pid);
      return { id: String(id), path, unusable };
    })));`;
  const script = 'echo $$ >"$1/cgroup.procs" && exec unshare --cgroup "$2" --input-type=module -e "$3"';
  const found = JSON.parse(must(['sh', '-c', script, 'sh', inside, process.execPath, source]));
  expect(found).toEqual([
    { id: `${statSync(ztunnel, { bigint: true }).ino}`, path: expect.stringMatching(/\/pod-z\/container$/) },
    { id: 'undefined', unusable: `process ${root.pid} is in the root cgroup, as everybody may be` },
  ]);
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
