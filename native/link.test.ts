// SPDX-License-Identifier: Apache-2.0
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { must, type Namespace, Testbed } from '../conformance/netns.ts';
import { ADDON_ENVIRONMENT, cause, native, opened } from './native.testing.ts';

const bed = Testbed.open();
afterAll(() => bed.close());

let node: Namespace;
let pod: Namespace;
let nodeFd: number;
let podFd: number;
beforeAll(() => {
  node = bed.namespace('node');
  pod = bed.namespace('pod');
  [nodeFd, podFd] = [opened(bed, node), opened(bed, pod)];
  bed.bridge(node, 'br0', ['192.0.2.1/24']);
  bed.veth(
    { namespace: node, ifname: 'veth0123456789a', bridge: 'br0', mtu: 1400 },
    {
      namespace: pod,
      ifname: 'eth0',
      addresses: ['192.0.2.2/24', '2001:db8::2/64'],
      mac: '02:00:5e:10:00:01',
      mtu: 1400,
    },
  );
  node.ip('link', 'add', 'same0', 'type', 'veth', 'peer', 'name', 'same1');
});

interface IpLink {
  ifindex: number;
  ifname: string;
  address: string;
  mtu: number;
  flags: string[];
  link_index?: number;
  link_netnsid?: number;
  link?: string;
  master?: string;
  linkinfo?: { info_kind: string };
}
const ipLink = (namespace: Namespace, name: string): IpLink => {
  const [link] = JSON.parse(namespace.ip('-j', '-d', 'link', 'show', 'dev', name)) as IpLink[];
  if (!link) throw new Error(`no ${name}`);
  return link;
};

describe('accept_local', () => {
  test('is what sysctl says, of the device and namespace asked for', () => {
    const ifindex = native.linkByName(podFd, 'eth0')?.ifindex ?? 0;
    const sysctl = (namespace: Namespace, device: string) =>
      namespace.run(['sysctl', '-n', `net.ipv4.conf.${device}.accept_local`]).trim();
    for (const on of [true, false]) {
      native.setAcceptLocal(podFd, ifindex, on);
      expect(native.acceptLocal(podFd, ifindex)).toBe(on);
      expect(sysctl(pod, 'eth0')).toBe(on ? '1' : '0');
      expect(sysctl(pod, 'all')).toBe('0');
      expect(sysctl(node, 'br0')).toBe('0');
    }
    pod.run(['sysctl', '-q', '-w', 'net.ipv4.conf.eth0.accept_local=1']);
    expect(native.acceptLocal(podFd, ifindex)).toBe(true);
    pod.run(['sysctl', '-q', '-w', 'net.ipv4.conf.eth0.accept_local=0']);
  });

  test('of no device is ENODEV', () => {
    expect(cause(() => native.acceptLocal(podFd, 4711))).toMatchObject({ code: 'ENODEV', syscall: 'RTM_GETLINK' });
    expect(cause(() => native.setAcceptLocal(podFd, 4711, true))).toMatchObject({ code: 'ENODEV' });
  });
});

describe('tcp_migrate_req', () => {
  const sysctl = (namespace: Namespace) => namespace.run(['sysctl', '-n', 'net.ipv4.tcp_migrate_req']).trim();

  test('is what sysctl says, of the namespace asked for', () => {
    for (const on of [true, false]) {
      native.setMigrateRequests(podFd, on);
      expect(native.migrateRequests(podFd)).toBe(on);
      expect(sysctl(pod)).toBe(on ? '1' : '0');
      expect(sysctl(node)).toBe('0');
    }
  });

  test('is set where /proc/sys is read-only, as it is in a container', () => {
    const script = `
      const { loadNative } = await import('${new URL('../plugin/addon.ts', import.meta.url)}');
      const native = loadNative();
      const netns = native.openNetns('${pod.path}');
      native.setMigrateRequests(netns, true);
      console.log(native.migrateRequests(netns));
      native.close(netns);`;
    const shell = [
      'mount --bind /proc/sys /proc/sys',
      'mount -o remount,bind,ro /proc/sys',
      '! echo 0 >/proc/sys/net/ipv4/tcp_migrate_req',
      'exec "$@"',
    ].join(' && ');
    const node = ['env', ...ADDON_ENVIRONMENT, process.execPath, '--input-type=module', '-e', script];
    expect(must(['unshare', '--mount', 'sh', '-c', shell, 'sh', ...node])).toBe('true\n');
    expect(sysctl(pod)).toBe('1');
    native.setMigrateRequests(podFd, false);
  });
});

describe('a link', () => {
  test.each([
    ['the host end, by its longest possible name', () => node, 'veth0123456789a'],
    ['the pod end', () => pod, 'eth0'],
    ['a bridge', () => node, 'br0'],
    ['loopback', () => node, 'lo'],
    ['a veth whose peer is in the same namespace, down', () => node, 'same0'],
  ])('%s is as ip shows it', (_, namespace, name) => {
    const netns = namespace() === node ? nodeFd : podFd;
    const expected = ipLink(namespace(), name);
    const link = native.linkByName(netns, name);
    expect(link).toEqual({
      ifindex: expected.ifindex,
      name,
      kind: expected.linkinfo?.info_kind ?? '',
      mac: expected.address,
      mtu: expected.mtu,
      up: expected.flags.includes('UP'),
      peerIfindex: expected.link_index ?? (expected.link ? ipLink(namespace(), expected.link).ifindex : 0),
      peerNetnsId: expected.link_netnsid ?? -1,
      master: expected.master ? ipLink(namespace(), expected.master).ifindex : 0,
    });
    expect(native.linkByIndex(netns, expected.ifindex)).toEqual(link);
  });

  test('peers name each other', () => {
    const host = native.linkByName(nodeFd, 'veth0123456789a');
    const inside = native.linkByName(podFd, 'eth0');
    expect(host).toMatchObject({ kind: 'veth', peerIfindex: inside?.ifindex, mtu: 1400, up: true });
    expect(inside).toMatchObject({ kind: 'veth', peerIfindex: host?.ifindex, mac: '02:00:5e:10:00:01' });
    native.inNetns(nodeFd, () => expect(native.netnsId(podFd, false)).toBe(host?.peerNetnsId));
    const same = native.linkByName(nodeFd, 'same0');
    expect(same).toMatchObject({
      peerIfindex: native.linkByName(nodeFd, 'same1')?.ifindex,
      peerNetnsId: -1,
      up: false,
    });
  });

  test('that is not there is null', () => {
    expect(native.linkByName(podFd, 'eth1')).toBeNull();
    expect(native.linkByIndex(podFd, 4711)).toBeNull();
    expect(native.linkByName(podFd, 'br0')).toBeNull();
  });
});

describe('addresses', () => {
  test('of both families, IPv4 in 128-bit space', () => {
    const ifindex = native.linkByName(podFd, 'eth0')?.ifindex ?? 0;
    const found = native.linkAddresses(podFd, ifindex).map((entry) => ({
      address: Buffer.from(entry.address).toString('hex'),
      prefix: entry.prefix,
      scope: entry.scope,
    }));
    expect(found).toContainEqual({ address: '00000000000000000000ffffc0000202', prefix: 96 + 24, scope: 0 });
    expect(found).toContainEqual({ address: '20010db8000000000000000000000002', prefix: 64, scope: 0 });
    expect(found).toContainEqual({ address: 'fe8000000000000000005efffe100001', prefix: 64, scope: 253 });
    expect(found).toHaveLength(3);
  });

  test('of a point-to-point address it is the own end', () => {
    node.ip('address', 'add', '198.51.100.1', 'peer', '198.51.100.2/32', 'dev', 'same0');
    node.ip('-6', 'address', 'add', '2001:db8:1::1', 'peer', '2001:db8:1::2/128', 'dev', 'same0', 'nodad');
    const ifindex = native.linkByName(nodeFd, 'same0')?.ifindex ?? 0;
    expect(native.linkAddresses(nodeFd, ifindex).map((entry) => Buffer.from(entry.address).toString('hex'))).toEqual([
      '00000000000000000000ffffc6336401',
      '20010db8000100000000000000000001',
    ]);
  });

  test('more than one netlink message holds', () => {
    const batch = Array.from({ length: 600 }, (_, i) => `address add 10.9.${i >> 8}.${i & 255}/32 dev same1`).join(
      '\n',
    );
    node.run(['ip', '-batch', '-'], `${batch}\n`);
    const ifindex = native.linkByName(nodeFd, 'same1')?.ifindex ?? 0;
    const found = new Set(native.linkAddresses(nodeFd, ifindex).map((entry) => entry.address.join('.')));
    expect(found.size).toBe(600);
  });

  test('of a device that is not there: ENODEV with the request', () => {
    expect(cause(() => native.linkAddresses(podFd, 4711))).toEqual({
      code: 'ENODEV',
      errno: 19,
      syscall: 'RTM_GETADDR',
    });
  });
});

test('events: a link that comes and one whose qdisc goes are named, others are not', () => {
  // Of the process's own namespace: a process of its own, in one that nobody else uses.
  const script = `
    const { loadNative } = await import('${new URL('../plugin/addon.ts', import.meta.url)}');
    const { execFileSync } = await import('node:child_process');
    const native = loadNative();
    delete process.env.LD_PRELOAD;
    const ip = (...args) => execFileSync('ip', args);
    ip('link', 'add', 'quiet0', 'type', 'bridge');
    const socket = native.openLinkEvents();
    const nothing = native.readLinkEvents(socket);
    ip('link', 'add', 'new0', 'type', 'bridge');
    const index = native.linkByName(-1, 'new0').ifindex;
    const added = native.readLinkEvents(socket);
    execFileSync('tc', ['qdisc', 'add', 'dev', 'new0', 'clsact']);
    const shaped = native.readLinkEvents(socket);
    ip('link', 'del', 'new0');
    console.log(JSON.stringify({ nothing, added, shaped, removed: native.readLinkEvents(socket), index }));
    native.close(socket);`;
  const alone = bed.namespace('alone');
  const { nothing, added, shaped, removed, index } = JSON.parse(
    alone.run(['env', ...ADDON_ENVIRONMENT, process.execPath, '--input-type=module', '-e', script]),
  );
  expect({ nothing, added, shaped, removed }).toEqual({
    nothing: [],
    added: [index],
    shaped: [index],
    removed: [index],
  });
});
