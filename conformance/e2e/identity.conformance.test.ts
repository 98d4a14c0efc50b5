// SPDX-License-Identifier: Apache-2.0
//
// Numbers that come again: network namespace ids and inodes, interface indexes, addresses. Who has one now must not be
// taken for who had it before.

import { statSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { must, type Namespace, removeNetns, until } from '../netns.ts';
import { Capture } from './capture.ts';
import { HAProxy } from './haproxy.ts';
import { Mesh, PORT } from './mesh.ts';
import { families, PluginError, type Pod } from './topology.ts';

const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';
const kinds = [
  { hook: 'tcx', variant: 'auto' },
  { hook: 'clsact', variant: 'full-sockets-only' },
] as const;

describe.each(LONG ? kinds : kinds.slice(0, 1))('numbers that come again, $hook, $variant', ({ hook, variant }) => {
  let mesh: Mesh;
  let others = 0;
  beforeEach(async () => {
    mesh = await Mesh.start({ hook, entry: { variant } });
  });
  afterEach(() => mesh?.close());

  const link = (ifname: string) => {
    const [found] = JSON.parse(mesh.topology.node.ip('-j', 'link', 'show', 'dev', ifname)) as {
      ifindex: number;
      link_netnsid: number;
    }[];
    if (found === undefined) throw new Error(`no ${ifname}`);
    return found;
  };
  const gone = (ifname: string) =>
    until(`${ifname} is gone`, () => !mesh.topology.node.links().includes(ifname), 10_000);
  /** The namespace goes without a word: the runtime's DEL comes later, or never. */
  const vanish = async (pod: Pod) => {
    removeNetns(pod.netns);
    await gone(pod.hostIfname);
  };
  const other = (options?: Parameters<Mesh['topology']['pod']>[1]) => {
    others += 1;
    return mesh.topology.pod(`other${others}`, options);
  };
  const proxiedBothWays = async (address: string) => {
    expect(await mesh.goesDirect('client', address)).toBe(false);
    expect(await mesh.goesDirect('outsider', address)).toBe(false);
  };

  test('a namespace id that the record of a dead proxy names', async () => {
    const { link_netnsid: nsid } = link(mesh.proxy.hostIfname);
    await mesh.haproxy.kill();
    await vanish(mesh.proxy);
    let impostor: Pod;
    do {
      impostor = other();
      await mesh.topology.addPrimary(impostor);
    } while (link(impostor.hostIfname).link_netnsid !== nsid && others < 50);
    expect(link(impostor.hostIfname).link_netnsid).toBe(nsid);
    for (const port of [PORT, 15001, 15006, 15008]) await impostor.endpoint.listen(port);
    const capture = await Capture.start(mesh.topology.testbed, impostor.netns, 'eth0', 'impostor');
    const refused = async () => {
      for (const family of families) {
        expect(await mesh.refused('client', mesh.address('outsider', family))).toBe('ETIMEDOUT');
        expect(await mesh.refused('outsider', mesh.address('server', family))).toBe('ETIMEDOUT');
      }
    };
    await refused();
    // Its own ADD is the first plugin run that sees who is there now.
    await mesh.topology.addOurs(impostor);
    await refused();
    expect(capture.packets().map(({ text }) => text)).toEqual([]);

    const proxy = mesh.topology.pod('ztunnel-2', { namespace: 'istio-system' });
    await mesh.topology.add(proxy);
    await new HAProxy(mesh.topology.testbed, proxy.netns, 'second').start();
    for (const family of families) {
      const connection = await mesh.connect('client', mesh.address('outsider', family));
      expect(connection.seenPort).not.toBe(connection.localPort);
      await mesh.exchanged(connection, 'client');
    }
    expect(capture.packets().map(({ text }) => text)).toEqual([]);
  });

  test('an address that a dead pod had, for another pod in the mesh; the late DEL takes nothing away', async () => {
    const [first, second] = [other({ enroll: true }), other({ enroll: true })];
    mesh.topology.wire(first, 50);
    await mesh.topology.addOurs(first);
    await vanish(first);
    mesh.topology.wire(second, 50);
    await mesh.topology.addOurs(second);
    reachable(mesh, second);
    await second.endpoint.listen(PORT);
    for (const family of families) await proxiedBothWays(second.addresses[family]);
    await mesh.topology.deleteOurs(first);
    for (const family of families) await proxiedBothWays(second.addresses[family]);
    const shown = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; state: string }[];
    expect(shown.filter(({ name }) => name === first.label)).toEqual([]);
    expect(shown.filter(({ name }) => name === second.label)).toMatchObject([{ state: 'attached' }]);
  });

  test('an address that a dead pod had, for a pod that is not in the mesh', async () => {
    const [first, second] = [other({ enroll: true }), other()];
    mesh.topology.wire(first, 51);
    await mesh.topology.addOurs(first);
    await vanish(first);
    mesh.topology.wire(second, 51);
    await mesh.topology.addOurs(second);
    reachable(mesh, second);
    await second.endpoint.listen(PORT);
    for (const family of families) {
      expect(await mesh.goesDirect('client', second.addresses[family])).toBe(false);
      expect(await mesh.goesDirect('outsider', second.addresses[family])).toBe(true);
    }
  });

  test('the same address on two networks: the second pod is refused, and told of the first', async () => {
    const [first, second] = [other({ enroll: true }), other({ enroll: true })];
    mesh.topology.wire(first, 52);
    await mesh.topology.addOurs(first);
    reachable(mesh, first);
    await first.endpoint.listen(PORT);
    mesh.topology.wire(second, 53);
    const given = JSON.stringify(second.prevResult)
      .replaceAll('10.88.0.53', '10.88.0.52')
      .replaceAll('fd88::35', 'fd88::34');
    second.prevResult = JSON.parse(given) as typeof second.prevResult;
    for (const address of ['10.88.0.52/24', 'fd88::34/64']) second.netns.ip('address', 'add', address, 'dev', 'eth0');
    const error = await mesh.topology.addOurs(second).then(
      () => undefined,
      (caught: unknown) => caught,
    );
    expect(error).toBeInstanceOf(PluginError);
    const answer = JSON.parse((error as PluginError).outcome.stdout) as { code: number; msg: string; details: string };
    expect(answer.code).toBe(103);
    expect(`${answer.msg}: ${answer.details}`).toContain(`default/${first.label}`);
    for (const family of families) await proxiedBothWays(first.addresses[family]);
  });

  test('an interface index that a dead pod had', async () => {
    const [first, second] = [other({ enroll: true }), other()];
    mesh.topology.wire(first, 54);
    await mesh.topology.addOurs(first);
    await vanish(first);
    const index = ['index', String(first.hostIfindex)];
    const { node } = mesh.topology;
    must([
      'ip',
      '-n',
      node.name,
      'link',
      'add',
      'veth55',
      ...index,
      'type',
      'veth',
      'peer',
      'eth0',
      'netns',
      second.netns.name,
    ]);
    node.ip('link', 'set', 'veth55', 'up');
    second.netns.ip('link', 'set', 'eth0', 'up');
    mesh.topology.adopt(second, 55);
    expect(second.hostIfindex).toBe(first.hostIfindex);
    const capture = await Capture.start(mesh.topology.testbed, second.netns, 'eth0', `index${hook}`);
    await mesh.topology.addOurs(second);
    reachable(mesh, second);
    await second.endpoint.listen(PORT);
    const before = mesh.counters();
    for (const family of families) {
      // The dead pod's address leads nowhere, and not to this one.
      expect(await mesh.connect('client', first.addresses[family], PORT, { timeout: 600 }).catch(() => 'failed')).toBe(
        'failed',
      );
      expect(await mesh.goesDirect('outsider', second.addresses[family])).toBe(true);
      expect(await mesh.goesDirect('client', second.addresses[family])).toBe(false);
    }
    expect(mesh.moved(before, second)).toEqual({});
    const strangers = capture.packets(`tcp and (dst host ${first.addresses[4]} or dst host ${first.addresses[6]})`);
    expect(strangers.map(({ text }) => text)).toEqual([]);
    await mesh.topology.deleteOurs(first);
    second.options.enroll = true;
    await mesh.topology.addOurs(second);
    for (const family of families) await proxiedBothWays(second.addresses[family]);
  });

  test('path and inode of a dead proxy’s namespace: its late DEL leaves the new proxy alone', async () => {
    const old = mesh.proxy;
    const path = old.netns.path;
    const { ino } = statSync(path, { bigint: true });
    await mesh.haproxy.kill();
    await vanish(old);
    const proxy = mesh.topology.pod('ztunnel-1', { namespace: 'istio-system' });
    expect(proxy.netns.path).toBe(path);
    renewUntil(proxy.netns, ino);
    await mesh.topology.add(proxy);
    await new HAProxy(mesh.topology.testbed, proxy.netns, 'second').start();
    const works = async () => {
      for (const family of families) {
        const connection = await mesh.connect('client', mesh.address('outsider', family));
        expect(connection.seenPort).not.toBe(connection.localPort);
        await mesh.exchanged(connection, 'client');
      }
    };
    await works();
    const rules = proxy.netns.ip('rule') + proxy.netns.ip('-6', 'rule');
    await mesh.topology.deleteOurs(old);
    expect(proxy.netns.ip('rule') + proxy.netns.ip('-6', 'rule')).toBe(rules);
    await works();
  });
});

test('enroll and unenroll by namespace do not take a dead pod of the same inode for the one that is there', async () => {
  const mesh = await Mesh.start();
  try {
    const [first, second] = [mesh.topology.pod('first', { enroll: true }), mesh.topology.pod('second')];
    const { ino } = statSync(first.netns.path, { bigint: true });
    await mesh.topology.add(first);
    const { hostIfname } = first;
    removeNetns(first.netns);
    await until('the first pod is gone', () => !mesh.topology.node.links().includes(hostIfname), 10_000);
    renewUntil(second.netns, ino);
    mesh.topology.wire(second, 60);
    reachable(mesh, second);
    await second.endpoint.listen(PORT);
    expect(await mesh.commanded('enroll', '--netns', second.netns.path, '--pod', 'default/second')).toContain('second');
    for (const family of families) expect(await mesh.goesDirect('outsider', second.addresses[family])).toBe(false);
    const states = async () =>
      (JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; state: string }[])
        .filter(({ name }) => name === 'first' || name === 'second')
        .map(({ name, state }) => [name, state])
        .sort();
    expect(await states()).toEqual([
      ['first', 'attached'],
      ['second', 'attached'],
    ]);
    expect(await mesh.commanded('unenroll', '--no-drain', '--netns', second.netns.path)).toMatch(
      /^unenrolled default\/second: [^\n]*\n$/,
    );
    expect(await states()).toEqual([
      ['first', 'attached'],
      ['second', 'recorded'],
    ]);
  } finally {
    mesh.close();
  }
});

describe('two nodes on one machine', () => {
  let nodes: Mesh[] = [];
  beforeAll(async () => {
    nodes = [
      await Mesh.start({ primary: 'ptp', hook: 'tcx' }),
      await Mesh.start({ primary: 'bridge', hook: 'clsact' }),
    ];
  });
  afterAll(() => {
    for (const node of nodes) node.close();
  });

  test('with the same addresses and indexes: each has its own proxy, state and end', async () => {
    const [one, two] = nodes;
    if (one === undefined || two === undefined) throw new Error('no nodes');
    for (const family of families) expect(one.address('client', family)).toBe(two.address('client', family));
    const works = async (mesh: Mesh, not: Mesh | undefined) => {
      const before = not?.counters();
      for (const family of families) {
        expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(false);
        expect(await mesh.goesDirect('outsider', mesh.address('server', family))).toBe(false);
      }
      if (before === undefined) return;
      const moved = Object.keys(not?.moved(before) ?? {});
      // Neighbour discovery comes when it likes.
      expect(moved.filter((key) => !/ pass_(not_tcp|other_host)$/.test(key))).toEqual([]);
    };
    await works(one, two);
    await works(two, one);
    await one.haproxy.kill();
    expect(await one.refused('client', one.address('outsider', 4))).toBe('ETIMEDOUT');
    await works(two, one);
    for (const pod of [one.client, one.server, one.proxy]) await one.topology.delete(pod);
    await works(two, undefined);
    expect(await two.commanded('status')).toContain('2 enrolled');
  });
});

/** Routes as ptp makes them: everything of a wired pod goes to the node, which has a route to each of its addresses. */
function reachable(mesh: Mesh, pod: Pod): void {
  const { node } = mesh.topology;
  for (const family of families) {
    const prefix = family === 4 ? 32 : 128;
    node.ip(`-${family}`, 'route', 'replace', `${pod.addresses[family]}/${prefix}`, 'dev', pod.hostIfname);
    const nodeAddress = family === 4 ? '10.88.0.254' : 'fd88::fe';
    node.ip(
      'address',
      'replace',
      `${nodeAddress}/${prefix}`,
      'dev',
      pod.hostIfname,
      ...(family === 6 ? ['nodad'] : []),
    );
    pod.netns.ip(`-${family}`, 'route', 'del', family === 4 ? '10.88.0.0/24' : 'fd88::/64', 'dev', 'eth0');
    pod.netns.ip(`-${family}`, 'route', 'add', nodeAddress, 'dev', 'eth0');
    pod.netns.ip(`-${family}`, 'route', 'add', 'default', 'via', nodeAddress, 'dev', 'eth0');
  }
}

/**
 * Another namespace of the same name, with that inode if it can be had: the lowest free one is taken, and everybody on the
 * machine takes from the same numbers.
 */
function renewUntil(netns: Namespace, ino: bigint): void {
  for (let tries = 0; statSync(netns.path, { bigint: true }).ino !== ino && tries < 100; tries++) renew(netns);
}

/** The same name, another namespace. */
function renew(netns: Namespace): void {
  removeNetns(netns);
  must(['ip', 'netns', 'add', netns.name]);
  netns.ip('link', 'set', 'lo', 'up');
  must(netns.argv(['sysctl', '-qw', 'net.ipv6.conf.all.accept_dad=0', 'net.ipv6.conf.default.accept_dad=0']));
}
