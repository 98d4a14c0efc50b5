// SPDX-License-Identifier: Apache-2.0
//
// Whole chains through the libcni look-alike, on a node of their own: real primaries (ptp, bridge) and the plugins that
// stand beside ours in real conflists, at every version they have; scripted neighbours for what those cannot do.

import { readlinkSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { LIVE_STATE, Node, Pod } from './chain.ts';
import { differences } from './kernel-state.ts';
import { Namespace, removeNetns, until } from './netns.ts';
import { decodeResult, type JsonObject, type NetworkList, type PluginConf, PluginError } from './runtime.ts';

let node: Node;
beforeEach(() => {
  node = new Node();
});
afterEach(() => node.close());

const ptp = (node: Node): PluginConf => ({ type: 'ptp', ipMasq: false, ipam: node.ipam('10.77.0.0/24') });
const bridge = (node: Node): PluginConf => ({
  type: 'bridge',
  bridge: 'cni0',
  isGateway: true,
  ipam: node.ipam('10.78.0.0/24', 'fd00:78::/64'),
});
const portmap: PluginConf = { type: 'portmap', capabilities: { portMappings: true }, snat: true };
const bandwidth: PluginConf = { type: 'bandwidth', capabilities: { bandwidth: true } };
const tuning = (node: Node): PluginConf => ({ type: 'tuning', mtu: 1400, dataDir: join(node.directory, 'tuning') });
const scripted: PluginConf = {
  type: 'primary',
  addresses: ['10.79.0.2/24', 'fd00:79::2/64'],
  gateways: ['10.79.0.1', 'fd00:79::1'],
};

/** What kubelet asks for: a host port and limits. */
const capabilityArgs: JsonObject = {
  portMappings: [{ hostPort: 8080, containerPort: 80, protocol: 'tcp' }],
  bandwidth: { ingressRate: 8_000_000, ingressBurst: 8_000_000, egressRate: 8_000_000, egressBurst: 8_000_000 },
};

function rtOf(pod: Pod) {
  const rt = pod.rt();
  return { ...rt, capabilityArgs: { ...rt.capabilityArgs, ...capabilityArgs } };
}

/** portmap's DEL makes a table that stays. */
const SHARED = new RegExp(`${LIVE_STATE.source}|nft table ip6 nat`);

/** The list with another address for what the scripted primary makes. */
function only(list: NetworkList, address: string): NetworkList {
  const plugins = list.plugins.map((one) =>
    one.type === 'primary' ? { ...one, addresses: [address], gateways: ['10.79.1.1'] } : one,
  );
  return { ...list, plugins };
}

/** ADD, CHECK, DEL, DEL of one pod; what ours printed is what it was given, and nothing is left. */
async function lifecycle(list: NetworkList): Promise<void> {
  // What all pods share (bridge, chains, maps) comes with the first pod. It stays, and so does the bridge's carrier.
  const first = node.pod({ name: 'first' });
  const firstList = only(list, '10.79.0.3/24');
  await node.runtime.add(firstList, {
    ...rtOf(first),
    capabilityArgs: { portMappings: [{ hostPort: 8081, containerPort: 80, protocol: 'tcp' }] },
  });

  const pod = node.pod({ name: 'web-0', namespace: 'shop' });
  const before = await node.state(pod);
  const result = await node.runtime.add(list, rtOf(pod));
  expect(result.cniVersion).toBe(list.cniVersion);
  const call = node.runtime.calls.findLast(({ type }) => type === 'ambient-redirect');
  const { prevResult } = JSON.parse(call?.stdin ?? '{}') as { prevResult: JsonObject };
  const printed = JSON.parse(call?.outcome.stdout ?? '{}') as JsonObject;
  expect(printed).toEqual(prevResult);
  expect(decodeResult(printed)).toEqual(decodeResult(prevResult));

  const rows = (await node.attachments()).filter(({ containerId }) => containerId === pod.containerId);
  const addresses = (result.ips as { address: string }[]).map(({ address }) => address.split('/')[0]);
  expect(rows).toHaveLength(1);
  expect(rows[0]).toMatchObject({
    namespace: 'shop',
    name: 'web-0',
    uid: pod.identity.uid,
    containerId: pod.containerId,
    interface: 'eth0',
    role: 'pod',
    state: 'attached',
  });
  expect(rows[0]?.addresses.toSorted()).toEqual(addresses.toSorted());
  expect(rows[0]?.programs.alive).toBe(rows[0]?.programs.attached.length);
  expect(rows[0]?.programs.alive).toBeGreaterThan(0);

  if (list.cniVersion !== '0.3.1') {
    // portmap 1.1.1's CHECK always fails (reference.conformance.test.ts).
    const plugins = list.plugins.filter(({ type }) => type !== 'portmap');
    // The first one takes over a MAC address that a later plugin has set.
    await node.runtime.check({ ...list, plugins }, rtOf(pod));
    const during = await node.state(pod);
    expect([...during.keys()].filter((key) => /^node (tcx|filter) vh|^node (tcx|filter) veth/.test(key))).not.toEqual(
      [],
    );
    await node.runtime.check({ ...list, plugins }, rtOf(pod));
    expect(differences(during, await node.state(pod), LIVE_STATE)).toEqual([]);
  }
  await node.runtime.status({ ...list, plugins: list.plugins.filter(({ type }) => type === 'ambient-redirect') });
  await node.runtime.del(list, rtOf(pod));
  await node.runtime.del(list, rtOf(pod));
  expect((await node.attachments()).map(({ containerId }) => containerId)).toEqual([first.containerId]);
  expect(differences(before, await node.state(pod), SHARED)).toEqual([]);
  await node.runtime.del(firstList, rtOf(first));
  expect(await node.attachments()).toEqual([]);
}

describe.each(['0.3.1', '0.4.0', '1.0.0'])('after real plugins, at %s', (version) => {
  test('ptp, portmap, bandwidth, tuning, ours', async () => {
    await lifecycle(node.list(version, ptp(node), portmap, bandwidth, tuning(node), node.ours()));
  });

  test('bridge (IPv4 and IPv6), bandwidth, tuning, ours', async () => {
    await lifecycle(node.list(version, bridge(node), bandwidth, tuning(node), node.ours()));
  });
});

describe.each(['0.3.1', '0.4.0', '1.0.0', '1.1.0'])('between scripted plugins, at %s', (version) => {
  test('primary, ours, a plugin that comes later', async () => {
    const later: PluginConf = {
      type: 'recorder',
      log: join(node.directory, 'log'),
      mac: '02:00:5e:00:53:01',
      extra: { name: 'later0', mac: '02:00:5e:00:53:02' },
    };
    await lifecycle(node.list(version, scripted, node.ours(), later));
  });
});

test('bridge makes the order: ours first, then bandwidth and tuning', async () => {
  const mac = { type: 'tuning', mac: '02:00:5e:00:53:03', dataDir: join(node.directory, 'tuning') };
  await lifecycle(node.list('1.0.0', bridge(node), node.ours(), bandwidth, mac));
});

describe('what a runtime does about failures', () => {
  test('a later plugin fails ADD: the runtime sends DEL without prevResult, and nothing is left', async () => {
    const log = join(node.directory, 'log');
    const failing: PluginConf = {
      type: 'recorder',
      log,
      fail: { ADD: { code: 11, msg: 'not now', details: 'later' } },
    };
    const good = node.list('1.0.0', scripted, node.ours());
    const bad = node.list('1.0.0', scripted, node.ours(), failing);
    const first = node.pod();
    await node.runtime.add(good, first.rt());
    await node.runtime.del(good, first.rt());

    const pod = node.pod();
    const before = await node.state(pod);
    const failure = await node.runtime.add(bad, pod.rt()).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(PluginError);
    expect(failure).toMatchObject({ type: 'recorder', code: 11, details: 'later' });
    await node.runtime.del(bad, pod.rt());
    expect(node.log(log).map(({ command, conf }) => [command, 'prevResult' in conf])).toEqual([
      ['ADD', true],
      ['DEL', false],
    ]);
    expect(await node.attachments()).toEqual([]);
    expect(differences(before, await node.state(pod))).toEqual([]);
  });

  test('a later plugin prints no Result: libcni fails ADD after the fact, DEL cleans up', async () => {
    const list = node.list('1.0.0', scripted, node.ours(), { type: 'recorder', garbage: true });
    const pod = node.pod();
    await expect(node.runtime.add(list, pod.rt())).rejects.toThrow('output is not one JSON object');
    await node.runtime.del(list, pod.rt());
    expect(await node.attachments()).toEqual([]);
    expect(node.namespace.links()).toEqual(['lo']);
  });

  test('ours fails ADD: the primary is undone, ours left nothing, the message names what and why', async () => {
    const list = node.list('1.0.0', { ...scripted, kind: 'inside' }, node.ours());
    const pod = node.pod();
    const failure = await node.runtime.add(list, pod.rt()).catch((error: unknown) => error);
    expect(failure).toMatchObject({ type: 'ambient-redirect', code: 101 });
    expect(String(failure)).toContain('eth0');
    await node.runtime.del(list, pod.rt());
    expect(await node.attachments()).toEqual([]);
  });
});

describe('what primaries leave out of their Result', () => {
  test.each([
    ['no interfaces', ['interfaces']],
    ['no interface index', ['index']],
    ['no sandbox', ['sandbox']],
    ['no MAC addresses', ['mac']],
  ])('%s', async (_what, omit) => {
    const list = node.list('1.0.0', { ...scripted, omit }, node.ours());
    const pod = node.pod();
    await node.runtime.add(list, pod.rt());
    const [row] = await node.attachments();
    expect(row).toMatchObject({ role: 'pod', state: 'attached', addresses: ['10.79.0.2', 'fd00:79::2'] });
    await node.runtime.check(list, pod.rt());
    await node.runtime.del(list, pod.rt());
    expect(await node.attachments()).toEqual([]);
  });
});

describe('GC through the runtime (1.1.0)', () => {
  const own = (index: number): PluginConf => ({
    type: 'primary',
    addresses: [`10.79.0.${index}/24`],
    gateways: [`10.79.1.${index}`],
  });

  test('keeps the valid, DELs what is cached, collects what it forgot', async () => {
    const pods = [node.pod(), node.pod(), node.pod()];
    const lists = pods.map((_pod, index) => node.list('1.1.0', own(index + 2), node.ours()));
    for (const [index, pod] of pods.entries()) await node.runtime.add(lists[index] as NetworkList, pod.rt());
    const [valid, cached, orphan] = pods as [Pod, Pod, Pod];
    // The runtime lost its cache of the third: only GC can find it.
    rmSync(node.runtime.cacheFile(lists[0]?.name ?? '', orphan.rt()));
    await node.runtime.gc(lists[0] as NetworkList, [{ containerID: valid.containerId, ifname: 'eth0' }]);
    expect((await node.attachments()).map(({ containerId }) => containerId)).toEqual([valid.containerId]);
    const commands = node.runtime.calls
      .filter(({ type, command }) => type === 'ambient-redirect' && command !== 'ADD')
      .map(({ command, env }) => [command, env.CNI_CONTAINERID]);
    expect(commands).toEqual([
      ['DEL', cached.containerId],
      ['GC', ''],
    ]);
    await node.runtime.check(lists[0] as NetworkList, valid.rt());
  });

  test.each([
    ['[]', []],
    ['null', null],
  ] as const)('%s removes all, a living one too', async (_form, valid) => {
    const list = node.list('1.1.0', own(2), node.ours());
    const pod = node.pod();
    await node.runtime.add(list, pod.rt());
    expect(await node.attachments()).toHaveLength(1);
    rmSync(node.runtime.cacheFile(list.name, pod.rt()));
    await node.runtime.gc(list, valid);
    expect(await node.attachments()).toEqual([]);
  });

  test('no key keeps what lives and removes what is dead', async () => {
    const [alive, dead] = [node.pod(), node.pod()];
    const lists = [node.list('1.1.0', own(2), node.ours()), node.list('1.1.0', own(3), node.ours())] as const;
    await node.runtime.add(lists[0], alive.rt());
    await node.runtime.add(lists[1], dead.rt());
    for (const pod of [alive, dead]) rmSync(node.runtime.cacheFile(lists[0].name, pod.rt()));
    await end(dead);
    await node.runtime.gc(lists[0], undefined);
    expect((await node.attachments()).map(({ containerId }) => containerId)).toEqual([alive.containerId]);
  });
});

/** The pod's namespace goes, and with it its interfaces. */
async function end(pod: Pod): Promise<void> {
  const links = node.namespace.links().length;
  removeNetns(pod.namespace);
  await until('its host interface is gone', () => node.namespace.links().length < links);
}

/** What runtimes and kubelet really do, as measured with kubelet 1.37, containerd 1.6 and 2.4. */
describe('kubelet and containerd', () => {
  const annotated = { 'ambient-redirect/enroll': 'true' };

  test('a static pod: K8S_POD_UID is the hash of its configuration', async () => {
    const uid = '8f2c1d3b4a5968778695a4b3c2d1e0f9';
    const pod = node.pod({ name: 'static-node-1', uid, annotations: annotated });
    const list = node.list('1.0.0', scripted, node.ours({ enrollment: 'annotation' }));
    await node.runtime.add(list, pod.rt());
    expect(await node.attachments()).toMatchObject([{ uid, name: 'static-node-1', role: 'pod', state: 'attached' }]);
    await node.runtime.del(list, pod.rt());
    expect(await node.attachments()).toEqual([]);
  });

  test('the sandbox is made anew: DEL of the old id, ADD of a new one with the same UID and another address', async () => {
    const list = node.list('1.0.0', bridge(node), node.ours());
    const old = node.pod();
    await node.runtime.add(list, old.rt());
    const [before] = await node.attachments();
    await node.runtime.del(list, old.rt());
    removeNetns(old.namespace);
    const anew = node.again(old);
    await node.runtime.add(list, anew.rt());
    const rows = await node.attachments();
    expect(rows).toMatchObject([{ containerId: anew.containerId, uid: old.identity.uid, state: 'attached' }]);
    expect(rows[0]?.addresses).not.toEqual(before?.addresses);
    // A late DEL of the old id changes nothing for the new one.
    await node.runtime.del(list, old.rt({ netns: '' }));
    expect(await node.attachments()).toEqual(rows);
    await node.runtime.check(list, anew.rt());
    await node.runtime.del(list, anew.rt());
  });

  test('a sandbox made anew before the old one was deleted, with the same address', async () => {
    const list = node.list('1.0.0', scripted, node.ours());
    const old = node.pod();
    await node.runtime.add(list, old.rt());
    await end(old);
    const anew = node.again(old);
    await node.runtime.add(list, anew.rt());
    await node.runtime.del(list, old.rt({ netns: '' }));
    const rows = await node.attachments();
    expect(rows).toMatchObject([{ containerId: anew.containerId, state: 'attached' }]);
    await node.runtime.check(list, anew.rt());
    await node.runtime.del(list, anew.rt());
    expect(await node.attachments()).toEqual([]);
  });

  test('the node reboots: DEL of each old id with an empty CNI_NETNS and prevResult, then ADD with a new id', async () => {
    const list = node.list('1.0.0', bridge(node), node.ours());
    const old = [node.pod(), node.pod()];
    for (const pod of old) await node.runtime.add(list, pod.rt());
    // Namespaces, links and pins go; the runtime's cache and IPAM's directory are on disk and stay.
    for (const pod of old) await end(pod);
    node.namespace.ip('link', 'del', 'cni0');
    node.namespace.run(['umount', '--lazy', join(node.stateDir, '..')]);
    node.namespace.run(['mount', '-t', 'bpf', 'bpf', join(node.stateDir, '..')]);
    const calls = node.runtime.calls.length;
    for (const pod of old) await node.runtime.del(list, pod.rt({ netns: '' }));
    for (const { stdin, env } of node.runtime.calls.slice(calls)) {
      expect(stdin).toContain('prevResult');
      expect(env.CNI_NETNS).toBe('');
    }
    const [first] = old as [Pod];
    const anew = node.again(first);
    await node.runtime.add(list, anew.rt());
    expect(await node.attachments()).toMatchObject([{ uid: first.identity.uid, containerId: anew.containerId }]);
    await node.runtime.del(list, anew.rt());
  });

  test('ADD fails, DEL follows at once, the next try has a new id', async () => {
    const list = node.list('1.0.0', scripted, node.ours());
    const pod = node.pod();
    await expect(node.runtime.add(list, pod.rt({ ifname: 'absent/0' }))).rejects.toThrow();
    await node.runtime.del(list, pod.rt());
    const next = node.pod(pod.identity);
    await node.runtime.add(list, next.rt());
    expect(await node.attachments()).toMatchObject([{ containerId: next.containerId }]);
    await node.runtime.del(list, next.rt());
  });

  test('removal: DEL with prevResult, then DEL twice with an empty CNI_NETNS and none', async () => {
    const list = node.list('1.0.0', bridge(node), node.ours());
    const warm = node.pod();
    await node.runtime.add(list, warm.rt());
    const before = await node.state();
    const pod = node.pod();
    await node.runtime.add(list, pod.rt());
    await node.runtime.del(list, pod.rt());
    const calls = node.runtime.calls.length;
    await node.runtime.del(list, pod.rt({ netns: '' }));
    await node.runtime.del(list, pod.rt({ netns: '' }));
    for (const { stdin } of node.runtime.calls.slice(calls)) expect(stdin).not.toContain('prevResult');
    expect(await node.attachments()).toMatchObject([{ containerId: warm.containerId }]);
    expect(differences(before, await node.state(), LIVE_STATE)).toEqual([]);
  });

  test('STATUS of every plugin every five seconds: ready with no pod, with a pod, and without a proxy', async () => {
    const list = node.list('1.1.0', scripted, node.ours());
    const status = () => node.runtime.status({ ...list, plugins: list.plugins.slice(1) });
    await status();
    const pod = node.pod();
    await node.runtime.add(list, pod.rt());
    const before = await node.state(pod);
    await status();
    expect(differences(before, await node.state(pod), LIVE_STATE)).toEqual([]);
    await node.runtime.del(list, pod.rt());
    // Never called at 1.0.0.
    const calls = node.runtime.calls.length;
    await node.runtime.status({ ...list, cniVersion: '1.0.0' });
    expect(node.runtime.calls).toHaveLength(calls);
  });

  test('annotations of every kind come with the sandbox: quotes, newlines, a whole manifest', async () => {
    const manifest = JSON.stringify({ metadata: { name: 'a', annotations: { x: '"\n\\ <&>\u2028 ' } }, spec: {} });
    const annotations = {
      ...annotated,
      'kubernetes.io/config.seen': '2026-01-01T00:00:00.000000000Z',
      'kubernetes.io/config.source': 'file',
      'kubectl.kubernetes.io/last-applied-configuration': `${manifest}\n`,
      'example.com/large': 'x'.repeat(200_000),
      'example.com/empty': '',
      'example.com/odd': '\u0000\u0007"\'`$(reboot)\ud83d\ude00\r\n\t',
    };
    const list = node.list('1.0.0', scripted, node.ours({ enrollment: 'annotation' }));
    const pod = node.pod({ annotations });
    await node.runtime.add(list, pod.rt());
    expect(await node.attachments()).toMatchObject([{ role: 'pod', state: 'attached' }]);
    await node.runtime.del(list, pod.rt());

    const other = node.pod({ annotations: { ...annotations, 'ambient-redirect/enroll': 'false' } });
    await node.runtime.add(list, other.rt());
    expect(await node.attachments()).toMatchObject([{ role: 'none', programs: { alive: 0, attached: [] } }]);
    await node.runtime.del(list, other.rt());
  });

  test('a pod with a user namespace of its own: its netns belongs to that', async () => {
    const holder = node.testbed.start(['unshare', '--user', '--map-root-user', '--net', 'sleep', '600']);
    await until('it runs in a namespace of its own', () => isInside(holder.pid));
    const name = `${node.testbed.id}.userns`;
    const namespace = new Namespace(name);
    node.namespace.run(['ip', 'netns', 'attach', name, String(holder.pid)]);
    node.testbed.defer(() => {
      node.namespace.run(['ip', 'netns', 'del', name]);
    });
    const list = node.list('1.0.0', scripted, node.ours());
    const pod = new Pod(namespace, node.pod().identity);
    await node.runtime.add(list, pod.rt());
    expect(await node.attachments()).toMatchObject([{ state: 'attached', addresses: ['10.79.0.2', 'fd00:79::2'] }]);
    await node.runtime.check(list, pod.rt());
    await node.runtime.del(list, pod.rt());
    expect(await node.attachments()).toEqual([]);
  });

  test('20 pods at once, each with its own chain: all attached, all removed', async () => {
    const list = node.list('1.0.0', bridge(node), bandwidth, node.ours());
    const warm = node.pod();
    await node.runtime.add(list, rtOf(warm));
    const before = await node.state();
    const pods = Array.from({ length: 20 }, () => node.pod());
    await Promise.all(pods.map((pod) => node.runtime.add(list, rtOf(pod))));
    const rows = await node.attachments();
    const ids = [warm, ...pods].map(({ containerId }) => containerId);
    expect(rows.map(({ containerId }) => containerId).sort()).toEqual(ids.sort());
    expect(new Set(rows.flatMap(({ addresses }) => addresses)).size).toBe(42);
    await Promise.all(pods.map((pod) => node.runtime.del(list, rtOf(pod))));
    expect(await node.attachments()).toMatchObject([{ containerId: warm.containerId }]);
    await node.runtime.check(list, rtOf(warm));
    expect(differences(before, await node.state(), LIVE_STATE)).toEqual([]);
  });
});

/** Whether the process has left this network namespace. */
function isInside(pid: number): boolean {
  const own = readlinkSync('/proc/self/ns/net');
  return readlinkSync(`/proc/${pid}/ns/net`) !== own && readlinkSync(`/proc/${pid}/exe`).endsWith('/sleep');
}
