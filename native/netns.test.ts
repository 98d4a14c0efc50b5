// SPDX-License-Identifier: Apache-2.0
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { must, Testbed } from '../conformance/netns.ts';
import { cause, currentNetns, descriptors, native, opened } from './native.testing.ts';

let bed: Testbed;
beforeEach(() => {
  bed = Testbed.open();
});
afterEach(() => bed.close());

describe('openNetns', () => {
  test('identity is the inode of the namespace, and a cookie of its own', () => {
    const [a, b] = [bed.namespace('a'), bed.namespace('b')];
    const identities = [a, b].map((namespace) => native.netnsIdentity(opened(bed, namespace)));
    for (const [index, namespace] of [a, b].entries()) {
      const { dev, ino } = statSync(namespace.path, { bigint: true });
      expect(identities[index]).toMatchObject({ dev, ino });
    }
    const [first, second] = identities.map(({ cookie }) => cookie);
    expect(first).not.toBe(0n);
    expect(first).not.toBe(second);
    expect(native.netnsIdentity(opened(bed, a)).cookie).toBe(first);
  });

  test('HOST is where the process is', () => {
    const { dev, ino } = statSync('/proc/self/ns/net', { bigint: true });
    expect(native.netnsIdentity(-1)).toMatchObject({ dev, ino });
    const node = bed.namespace('node');
    const fd = opened(bed, node);
    expect(native.inNetns(fd, () => native.netnsIdentity(-1).ino)).toBe(statSync(node.path, { bigint: true }).ino);
  });

  test.each([
    ['a file that is not there', '/proc/nonexistent', 'ENOENT'],
    ['a file', '/etc/hostname', 'EINVAL'],
    ['a directory', '/', 'EINVAL'],
    ['a namespace of another type', '/proc/self/ns/mnt', 'EINVAL'],
    ['a device', '/dev/null', 'EINVAL'],
  ])('%s: %s', (_, path, code) => {
    const before = descriptors();
    expect(cause(() => native.openNetns(path)).code).toBe(code);
    expect(descriptors()).toEqual(before);
  });

  test('a FIFO does not block', () => {
    const fifo = join(bed.directory('d'), 'fifo');
    must(['mkfifo', fifo]);
    expect(cause(() => native.openNetns(fifo)).code).toBe('EINVAL');
  });

  test('a namespace whose name was removed stays usable by its descriptor', () => {
    const gone = bed.namespace('gone');
    const fd = opened(bed, gone);
    must(['ip', 'netns', 'del', gone.name]);
    expect(native.linkByName(fd, 'lo')).toMatchObject({ ifindex: 1, up: true });
  });
});

test('the thread is back after every call, failed ones included', () => {
  const here = currentNetns();
  const fd = opened(bed, bed.namespace('pod'));
  native.linkByName(fd, 'lo');
  expect(currentNetns()).toBe(here);
  native.netnsIdentity(fd);
  expect(currentNetns()).toBe(here);
  expect(cause(() => native.addClsact(fd, 4711)).code).toBe('ENODEV');
  expect(currentNetns()).toBe(here);
  expect(cause(() => native.queryTcx(fd, 4711, 'ingress')).code).toBe('ENODEV');
  expect(currentNetns()).toBe(here);
});

test('netnsId: absent, allocated once, as ip netns sees it', () => {
  const [node, pod] = [bed.namespace('node'), bed.namespace('pod')];
  const [nodeFd, podFd] = [opened(bed, node), opened(bed, pod)];
  native.inNetns(nodeFd, () => {
    expect(native.netnsId(podFd, false)).toBe(-1);
    const id = native.netnsId(podFd, true);
    expect(id).toBeGreaterThanOrEqual(0);
    expect(native.netnsId(podFd, true)).toBe(id);
    expect(native.netnsId(podFd, false)).toBe(id);
    const listed = JSON.parse(node.run(['ip', '-j', 'netns', 'list-id'])) as { nsid: number; name: string }[];
    expect(listed).toMatchObject([{ nsid: id, name: pod.name }]);
  });
});

describe('lockFile', () => {
  test('excludes, times out, and is released by close', async () => {
    const path = join(bed.directory('d'), 'lock');
    const first = native.lockFile(path, 0);
    expect(statSync(path).mode & 0o7777).toBe(0o600);
    const begun = performance.now();
    expect(cause(() => native.lockFile(path, 60))).toEqual({ code: 'ETIMEDOUT', errno: 110, syscall: 'flock' });
    expect(performance.now() - begun).toBeGreaterThan(55);
    native.close(first);
    native.close(native.lockFile(path, 0));
  });

  test('is granted as soon as another process ends', async () => {
    const path = join(bed.directory('d'), 'lock');
    const holder = spawn('flock', [path, 'sh', '-c', 'echo held; sleep 0.2'], { stdio: ['ignore', 'pipe', 'inherit'] });
    await once(holder.stdout, 'data');
    expect(cause(() => native.lockFile(path, 0)).code).toBe('ETIMEDOUT');
    native.close(native.lockFile(path, 5_000));
    await once(holder, 'exit');
  });

  test('a file that its holder removed is not taken for the lock', async () => {
    const path = join(bed.directory('d'), 'lock');
    const holder = spawn('flock', [path, 'sh', '-c', `echo held; sleep 0.1; rm ${path}`], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    await once(holder.stdout, 'data');
    const fd = native.lockFile(path, 5_000);
    expect(statSync(`/proc/self/fd/${fd}`).ino).toBe(statSync(path).ino);
    native.close(fd);
  });

  test('a symbolic link is refused', () => {
    const directory = bed.directory('d');
    must(['ln', '-s', '/etc/hostname', join(directory, 'lock')]);
    expect(cause(() => native.lockFile(join(directory, 'lock'), 0)).code).toBe('ELOOP');
  });
});

describe('files', () => {
  test('directories and files report whether they were there', () => {
    const directory = bed.directory('d');
    const inner = join(directory, 'inner');
    expect(native.makeDirectory(inner, 0o700)).toBe(true);
    expect(native.makeDirectory(inner, 0o700)).toBe(false);
    expect(statSync(inner).mode & 0o7777).toBe(0o700);
    writeFileSync(join(inner, 'file'), '');
    expect(cause(() => native.removeDirectory(inner)).code).toBe('ENOTEMPTY');
    expect(cause(() => native.makeDirectory(join(inner, 'file'), 0o700)).code).toBe('ENOTDIR');
    expect(native.removeFile(join(inner, 'file'))).toBe(true);
    expect(native.removeFile(join(inner, 'file'))).toBe(false);
    expect(cause(() => native.removeFile(inner)).code).toBe('EISDIR');
    expect(native.removeDirectory(inner)).toBe(true);
    expect(native.removeDirectory(inner)).toBe(false);
    expect(cause(() => native.makeDirectory(join(inner, 'deep'), 0o700)).code).toBe('ENOENT');
  });

  test('bpffs is told from other file systems, and mounted', () => {
    const directory = bed.directory('d');
    expect(native.isBpffs(directory)).toBe(false);
    expect(native.isBpffs(join(directory, 'absent'))).toBe(false);
    const mountPoint = join(directory, 'bpf');
    mkdirSync(mountPoint);
    native.mountBpffs(mountPoint);
    try {
      expect(native.isBpffs(mountPoint)).toBe(true);
      // bpffs adds the sticky bit to the mode that was asked for.
      expect(statSync(mountPoint).mode & 0o7777).toBe(0o1700);
      const mount = readFileSync('/proc/self/mounts', 'utf8')
        .split('\n')
        .find((line) => line.split(' ')[1] === mountPoint);
      expect(mount).toMatch(/^bpf \S+ bpf rw,nosuid,nodev,noexec,/);
    } finally {
      must(['umount', mountPoint]);
    }
    expect(cause(() => native.mountBpffs(join(directory, 'absent')))).toMatchObject({
      code: 'ENOENT',
      syscall: 'mount',
    });
  });

  test('capabilities are the effective ones', () => {
    const effective = /^CapEff:\s+([0-9a-f]+)$/m.exec(readFileSync('/proc/thread-self/status', 'utf8'))?.[1];
    expect(native.capabilities()).toBe(BigInt(`0x${effective}`));
    const addon = join(import.meta.dirname, '../build/Release/ambient_redirect.node');
    const script = join(bed.directory('s'), 'capabilities.cjs');
    writeFileSync(
      script,
      `const m = { exports: {} }; process.dlopen(m, ${JSON.stringify(addon)}); console.log(String(m.exports.capabilities()));`,
    );
    chmodSync(script, 0o644);
    const dropped = execFileSync('setpriv', ['--bounding-set', '-all', '--', process.execPath, script], {
      encoding: 'utf8',
    });
    expect(dropped.trim()).toBe('0');
  });
});
