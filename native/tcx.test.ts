// SPDX-License-Identifier: Apache-2.0
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { must, type Namespace, Testbed } from '../conformance/netns.ts';
import {
  cause,
  currentNetns,
  descriptors,
  native,
  opened,
  type StateFixture,
  stateDirectory,
} from './native.testing.ts';

const bed = Testbed.open();
afterAll(() => bed.close());

let node: Namespace;
let netns: number;
let state: StateFixture;
let egress: number;
let ingress: number;
beforeAll(() => {
  node = bed.namespace('node');
  netns = opened(bed, node);
  state = stateDirectory(bed);
  egress = state.program('pod_egress');
  ingress = state.program('pod_ingress');
});

let count = 0;
let device = '';
let ifindex = 0;
let pin = '';
beforeEach(() => {
  device = `v${count++}`;
  pin = join(state.links, device);
  node.ip('link', 'add', device, 'up', 'type', 'veth', 'peer', 'name', `${device}p`);
  ifindex = native.linkByName(netns, device)?.ifindex ?? 0;
});

const id = (fd: number) => native.programInfo(fd).id;

test('the kernel of this machine has TCX', () => {
  expect(native.features().tcx).toBe(true);
});

describe('a TCX link', () => {
  test('is attached, pinned, told from others, and detached', () => {
    const here = currentNetns();
    const { linkId } = native.attachTcx(netns, ifindex, 'ingress', egress, 'first', pin);
    expect(currentNetns()).toBe(here);
    expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([{ programId: id(egress), linkId }]);
    expect(native.queryTcx(netns, ifindex, 'egress')).toEqual([]);
    expect(native.linkInfo(pin)).toEqual({
      kind: 'tcx',
      linkId,
      programId: id(egress),
      ifindex,
      direction: 'ingress',
      netnsIno: 0n,
    });
    const shown = JSON.parse(must(['bpftool', '-j', 'link', 'show', 'pinned', pin])) as { id: number; prog_id: number };
    expect(shown).toMatchObject({ id: linkId, prog_id: id(egress) });
    expect(native.detachLink(pin)).toBe(true);
    expect(existsSync(pin)).toBe(false);
    expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([]);
    expect(native.detachLink(pin)).toBe(false);
    expect(native.linkInfo(pin)).toBeNull();
  });

  test('is attached and detached on another thread, and the event loop goes on meanwhile', async () => {
    const here = currentNetns();
    let turns = 0;
    const count = () => {
      turns++;
      timer = setImmediate(count);
    };
    let timer = setImmediate(count);
    const { linkId } = await native.attachTcxAside(netns, ifindex, 'egress', egress, 'first', pin);
    const attached = turns;
    expect(native.queryTcx(netns, ifindex, 'egress')).toEqual([{ programId: id(egress), linkId }]);
    expect(native.linkInfo(pin)).toMatchObject({ linkId, ifindex, direction: 'egress' });
    turns = 0;
    expect(await native.detachLinkAside(pin)).toBe(true);
    clearImmediate(timer);
    expect(attached).toBeGreaterThan(0);
    expect(turns).toBeGreaterThan(0);
    expect(native.queryTcx(netns, ifindex, 'egress')).toEqual([]);
    expect(existsSync(pin)).toBe(false);
    expect(await native.detachLinkAside(pin)).toBe(false);
    await expect(native.attachTcxAside(netns, 4711, 'ingress', egress, 'first', pin)).rejects.toMatchObject({
      code: 'ENODEV',
      syscall: 'bpf(BPF_LINK_CREATE)',
    });
    expect(currentNetns()).toBe(here);
  });

  test('goes first or last', () => {
    const guard = state.program('proxy_guard');
    const middle = native.attachTcx(netns, ifindex, 'egress', ingress, 'first', pin);
    const last = native.attachTcx(netns, ifindex, 'egress', egress, 'last', `${pin}_last`);
    const first = native.attachTcx(netns, ifindex, 'egress', guard, 'first', `${pin}_first`);
    expect(native.queryTcx(netns, ifindex, 'egress')).toEqual([
      { programId: id(guard), linkId: first.linkId },
      { programId: id(ingress), linkId: middle.linkId },
      { programId: id(egress), linkId: last.linkId },
    ]);
    expect(native.linkInfo(`${pin}_last`)?.direction).toBe('egress');
  });

  test('can be given another program', () => {
    const { linkId } = native.attachTcx(netns, ifindex, 'ingress', egress, 'first', pin);
    native.updateLink(pin, ingress);
    expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([{ programId: id(ingress), linkId }]);
    expect(cause(() => native.updateLink(pin, 1_000_000))).toMatchObject({
      code: 'EBADF',
      syscall: 'bpf(BPF_LINK_UPDATE)',
    });
    expect(cause(() => native.updateLink(`${pin}_none`, ingress)).code).toBe('ENOENT');
  });

  test.each([
    ['a directory that is not there', () => join(state.dir, 'absent/pin'), 'ENOENT'],
    ['a name that is taken', () => join(state.dir, 'settings'), 'EEXIST'],
    ['a name with a dot', () => `${pin}.dot`, 'EPERM'],
    ['another file system', () => join(bed.directory(device), 'pin'), 'EPERM'],
  ])('that cannot be pinned does not stay attached: %s', (_, path, code) => {
    const before = descriptors();
    expect(cause(() => native.attachTcx(netns, ifindex, 'ingress', egress, 'first', path()))).toMatchObject({
      code,
      syscall: 'bpf(BPF_OBJ_PIN)',
    });
    expect(native.queryTcx(netns, ifindex, 'ingress')).toEqual([]);
    expect(descriptors()).toEqual(before);
  });

  test('whose device is gone is a dead pin: ifindex 0, and detaching removes it', () => {
    native.attachTcx(netns, ifindex, 'ingress', egress, 'first', pin);
    node.ip('link', 'del', device);
    expect(native.linkInfo(pin)).toMatchObject({ ifindex: 0, programId: id(egress) });
    expect(cause(() => native.updateLink(pin, ingress)).code).toBe('ENOLINK');
    expect(native.detachLink(pin)).toBe(true);
    expect(existsSync(pin)).toBe(false);
  });

  test('survives a lost namespace name and dies with the namespace', async () => {
    const pod = bed.namespace(`pod${count}`);
    const fd = native.openNetns(pod.path);
    native.attachTcx(fd, 1, 'ingress', egress, 'first', pin);
    must(['ip', 'netns', 'del', pod.name]);
    expect(native.queryTcx(fd, 1, 'ingress')).toHaveLength(1);
    native.close(fd);
    await expect.poll(() => native.linkInfo(pin)?.ifindex, { timeout: 10_000 }).toBe(0);
    expect(native.detachLink(pin)).toBe(true);
  });

  test('a device that is not there: ENODEV', () => {
    expect(cause(() => native.attachTcx(netns, 4711, 'ingress', egress, 'first', pin))).toEqual({
      code: 'ENODEV',
      errno: 19,
      syscall: 'bpf(BPF_LINK_CREATE)',
    });
    expect(cause(() => native.queryTcx(netns, 4711, 'ingress'))).toMatchObject({ syscall: 'bpf(BPF_PROG_QUERY)' });
  });

  test('no pin of another kind is taken for a link', () => {
    const map = join(state.dir, 'settings');
    expect(cause(() => native.linkInfo(map)).code).toBe('EINVAL');
    expect(cause(() => native.detachLink(map)).code).toBe('EINVAL');
    expect(existsSync(map)).toBe(true);
  });
});
