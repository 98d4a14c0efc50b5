// SPDX-License-Identifier: Apache-2.0
//
// Primary plugins and their settings, several networks of one pod, and interfaces that have no host side.

import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { removeNetns } from '../netns.ts';
import { isDirect, Mesh, PORT } from './mesh.ts';
import { BRIDGE, executable, type Family, families, outsiderAddress, type Pod, Topology } from './topology.ts';

const DEBIAN = '/usr/lib/cni';

describe.each([
  { hairpinMode: true, promiscMode: false },
  { hairpinMode: false, promiscMode: false },
  // The plugin refuses both at once.
  { hairpinMode: false, promiscMode: true },
])('bridge, hairpinMode $hairpinMode, promiscMode $promiscMode', (bridge) => {
  let mesh: Mesh;
  beforeAll(async () => {
    mesh = await Mesh.start({ primary: 'bridge', bridge });
  });
  afterAll(() => mesh?.close());

  test('the bridge is as it was asked for', () => {
    const [link] = JSON.parse(mesh.topology.node.ip('-d', '-j', 'link', 'show', 'dev', BRIDGE)) as {
      promiscuity: number;
    }[];
    expect((link?.promiscuity ?? 0) > 0).toBe(bridge.promiscMode);
    const [port] = JSON.parse(mesh.topology.node.ip('-d', '-j', 'link', 'show', 'dev', mesh.client.hostIfname)) as {
      linkinfo: { info_slave_data: { hairpin: boolean } };
    }[];
    expect(port?.linkinfo.info_slave_data.hairpin).toBe(bridge.hairpinMode);
  });

  test.each(families)('IPv%i: every way is as it should be, each SYN counted once', async (family) => {
    const ways = [
      { from: 'client', to: 'server', proxied: true },
      { from: 'client', to: 'outsider', proxied: true },
      { from: 'client', to: 'plain', proxied: true },
      { from: 'client', to: 'host', proxied: true },
      { from: 'outsider', to: 'server', proxied: true },
      { from: 'plain', to: 'server', proxied: true },
      { from: 'host', to: 'server', proxied: false },
      { from: 'plain', to: 'outsider', proxied: false },
    ] as const;
    for (const { from, to, proxied } of ways) {
      const before = mesh.counters();
      expect(await mesh.goesDirect(from, mesh.address(to, family)), `${from} to ${to}`).toBe(!proxied);
      const moved = mesh.moved(before);
      const taken = (moved['pod_egress redirected_outbound'] ?? 0) + (moved['pod_ingress redirected_inbound'] ?? 0);
      expect(taken, `${from} to ${to}: ${JSON.stringify(moved)}`).toBe(proxied ? 1 : 0);
      expect(Object.keys(moved).filter((key) => key.includes(' drop_'))).toEqual([]);
    }
  });
});

/** What a second network of a pod is. */
const second = {
  name: 'second',
  subnets: { 4: '10.89.0.0/24', 6: 'fd89::/64' },
  gateways: { 4: '10.89.0.1', 6: 'fd89::1' },
};

const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';
const hooks = ['tcx', 'clsact'] as const;

describe.each(LONG ? hooks : hooks.slice(0, 1))('secondary networks, %s', (hook) => {
  let mesh: Mesh;
  let ipam: string;
  beforeAll(async () => {
    mesh = await Mesh.start({ hook });
    ipam = mesh.topology.testbed.directory('second');
  });
  afterAll(() => mesh?.close());

  const run = async (path: string, command: string, pod: Pod, conf: object) => {
    const env = { ...mesh.topology.environment(command, pod), CNI_IFNAME: 'net1' };
    const outcome = await mesh.topology.node.exec([path], { env, input: JSON.stringify(conf) });
    expect(outcome, `${command}: ${outcome.stdout}`).toMatchObject({ status: 0 });
    return outcome.stdout;
  };
  const primary = () => ({
    cniVersion: '1.0.0',
    name: second.name,
    type: 'ptp',
    ipam: {
      type: 'host-local',
      dataDir: ipam,
      ranges: families.map((family) => [{ subnet: second.subnets[family], gateway: second.gateways[family] }]),
    },
  });
  const ours = (pod: Pod, prevResult: unknown) => ({ ...mesh.topology.entry(pod), name: second.name, prevResult });

  /** A pod on both networks; with net1's addresses the routes of net1. */
  const pod = async (label: string, interfaces?: string) => {
    const annotations = {
      'ambient-redirect/enroll': 'true',
      ...(interfaces !== undefined && { 'ambient-redirect/interfaces': interfaces }),
    };
    const entry = { runtimeConfig: { 'io.kubernetes.cri.pod-annotations': annotations } };
    const made = mesh.topology.pod(label, { enroll: true, entry });
    await mesh.topology.add(made);
    await made.endpoint.listen(PORT);
    const result = JSON.parse(await run(join(DEBIAN, 'ptp'), 'ADD', made, primary())) as {
      ips: { address: string }[];
      interfaces: { name: string; sandbox?: string }[];
    };
    const stdout = await run(executable, 'ADD', made, ours(made, result));
    expect(JSON.parse(stdout)).toMatchObject({ ips: result.ips });
    const addresses = { 4: '', 6: '' };
    for (const { address } of result.ips) addresses[address.includes(':') ? 6 : 4] = address.replace(/\/.*/, '');
    for (const family of families) {
      const table = `-${family}`;
      made.netns.ip(table, 'rule', 'add', 'from', addresses[family], 'table', '77');
      made.netns.ip(table, 'route', 'add', 'default', 'via', second.gateways[family], 'dev', 'net1', 'table', '77');
    }
    const hostIfname = result.interfaces.find(({ sandbox }) => !sandbox)?.name ?? '';
    const [link] = JSON.parse(mesh.topology.node.ip('-j', 'link', 'show', 'dev', hostIfname)) as { ifindex: number }[];
    return { pod: made, addresses, result, hostIfindex: link?.ifindex ?? 0 };
  };
  type Both = Awaited<ReturnType<typeof pod>>;

  /** Direct or not, from the pod and to it, with the addresses of one of its networks. */
  const direct = async (both: Both, address: string, family: Family) => {
    const out = await both.pod.endpoint.connect(outsiderAddress[family], PORT, {
      source: address,
      sourcePort: mesh.nextPort(),
    });
    expect(out.seen).toBe(address);
    await both.pod.endpoint.exchange(out, 50_000);
    const into = await mesh.connect('outsider', address);
    await mesh.exchanged(into, 'outsider');
    return [isDirect(out), isDirect(into)];
  };

  test.each([
    { interfaces: undefined, eth0: true, net1: false },
    { interfaces: 'eth0,net1', eth0: true, net1: true },
    { interfaces: 'net1', eth0: false, net1: true },
  ])('annotation ambient-redirect/interfaces: $interfaces', async ({ interfaces, eth0, net1 }) => {
    const both = await pod(`pod-${interfaces?.replace(',', '-') ?? 'none'}`, interfaces);
    const before = mesh.counters();
    for (const family of families) {
      expect(await direct(both, both.pod.addresses[family], family), `eth0, IPv${family}`).toEqual([!eth0, !eth0]);
      expect(await direct(both, both.addresses[family], family), `net1, IPv${family}`).toEqual([!net1, !net1]);
    }
    const counted = mesh.counters().filter(({ ifindex }) => ifindex === both.hostIfindex);
    expect(counted.length > 0).toBe(net1);
    expect(Object.keys(mesh.moved(before)).filter((key) => key.includes(' drop_'))).toEqual([]);

    // Both attachments are known by themselves, and one goes without the other.
    const rows = (
      JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; interface: string; state: string }[]
    )
      .filter(({ name }) => name === both.pod.label)
      .map((row) => [row.interface, row.state]);
    expect(rows.sort()).toEqual([
      ['eth0', eth0 ? 'attached' : 'recorded'],
      ['net1', net1 ? 'attached' : 'recorded'],
    ]);
    await run(executable, 'CHECK', both.pod, ours(both.pod, both.result));
    await run(executable, 'DEL', both.pod, ours(both.pod, both.result));
    for (const family of families) {
      expect(await direct(both, both.addresses[family], family)).toEqual([true, true]);
      expect(await direct(both, both.pod.addresses[family], family)).toEqual([!eth0, !eth0]);
    }
    await run(join(DEBIAN, 'ptp'), 'DEL', both.pod, primary());
    await mesh.topology.delete(both.pod);
  });
});

describe('interfaces without a host side', () => {
  let topology: Topology;
  let pods = 0;
  beforeAll(() => {
    topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1 });
  });
  afterAll(() => topology?.close());

  const plugins = [
    {
      name: 'macvlan',
      conf: () => ({
        type: 'macvlan',
        master: 'outside0',
        mode: 'bridge',
        ipam: { type: 'static', addresses: addresses() },
      }),
      why: /eth0 is a macvlan, not a veth/,
    },
    {
      name: 'host-device',
      conf: () => {
        const device = `spare${pods}`;
        topology.testbed.veth(
          { namespace: topology.node, ifname: device },
          { namespace: topology.outside, ifname: device },
        );
        return { type: 'host-device', device, ipam: { type: 'static', addresses: addresses() } };
      },
      why: /the peer of eth0 has index \d+; on the node there is no such link/,
    },
  ];
  const addresses = () => [{ address: `10.99.0.${100 + pods}/24` }, { address: `fd99::${100 + pods}/64` }];

  test.each(plugins)(
    '$name: 101 says what is in the way and what to do, and nothing is left',
    async ({ name, conf, why }) => {
      pods += 1;
      const pod = topology.pod(`sideless${pods}`, { enroll: true });
      const env = topology.environment('ADD', pod);
      const base = { cniVersion: '1.0.0', name: 'sideless', ...conf() };
      const first = await topology.node.exec([join(DEBIAN, base.type)], { env, input: JSON.stringify(base) });
      expect(first, first.stdout).toMatchObject({ status: 0 });
      const entry = { ...topology.entry(pod), prevResult: JSON.parse(first.stdout) as unknown };
      const outcome = await topology.node.exec([executable], { env, input: JSON.stringify(entry) });
      expect(outcome.status).toBe(1);
      const error = JSON.parse(outcome.stdout) as { code: number; msg: string; details: string };
      expect(error.code).toBe(101);
      expect(error.msg).toContain('eth0');
      expect(error.details).toMatch(why);
      expect(error.details).toMatch(/ptp, bridge/);
      expect(error.details).toContain('ambient-redirect/enroll: "false"');
      const shown = await topology.node.exec([executable, 'pods', '-o', 'json', '--state-dir', topology.stateDir]);
      expect(shown.stdout.trim() === '' || shown.stdout.trim() === '[]', shown.stdout).toBe(true);

      // Not in the mesh it starts.
      const outside = { ...entry, runtimeConfig: { 'io.kubernetes.cri.pod-annotations': {} } };
      const passed = await topology.node.exec([executable], { env, input: JSON.stringify(outside) });
      expect(passed, passed.stdout).toMatchObject({ status: 0 });
      await pod.endpoint.listen(PORT);
      if (name === 'macvlan') {
        expect((await topology.outsider.connect(`10.99.0.${100 + pods}`, PORT)).seen).toBe(outsiderAddress[4]);
      }
      const del = { env: { ...env, CNI_COMMAND: 'DEL' }, input: JSON.stringify(entry) };
      expect(await topology.node.exec([executable], del)).toMatchObject({ status: 0 });
      removeNetns(pod.netns);
    },
  );

  test('the node’s own namespace by mistake: 8, and nothing is changed', async () => {
    const pod = topology.pod(`own-${randomUUID().slice(0, 8)}`, { enroll: true });
    await topology.addPrimary(pod);
    const before = topology.node.ip('-d', 'link');
    const env = { ...topology.environment('ADD', pod), CNI_NETNS: topology.node.path, CNI_IFNAME: 'outside0' };
    const outcome = await topology.node.exec([executable], { env, input: JSON.stringify(topology.entry(pod)) });
    expect(JSON.parse(outcome.stdout)).toMatchObject({
      code: 8,
      msg: expect.stringContaining('own network namespace'),
    });
    expect(topology.node.ip('-d', 'link')).toBe(before);
  });
});
