// SPDX-License-Identifier: Apache-2.0
//
// What holds in the shared contract holds in the in-pod contract too: policies, exclusions, fragments, drain, CHECK; and
// what only this one has: the proxy's mark, which can be forged, and interfaces without a host-side peer.

import { mkdirSync, readdirSync, rmdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { Foreign } from '../coexistence/foreign.ts';
import { must, until } from '../netns.ts';
import { Capture } from './capture.ts';
import type { Connection, Endpoint, RawClient } from './endpoint.ts';
import { ACK, SYN, tcpFrame } from './frames.ts';
import { HAProxy } from './haproxy.ts';
import { type Actor, APP, InPodMesh, InPodProxy, ONE_SYN } from './inpod.ts';
import { executable, type Family, families, type Pod } from './topology.ts';

const EXCLUDED = 7001;
const PROXY_MARK = 0x539;
/** What a container has by default and what setting SO_MARK takes (5.17), and nothing else. */
const NET_RAW_ONLY = ['--bounding-set=-all,+net_raw', '--inh-caps=-all,+net_raw'];
const isDirect = (connection: Connection) => connection.seenPort === connection.localPort;
const hooks = ['tcx', 'clsact'] as const;

function dropped(moved: Record<string, number>): string[] {
  return Object.keys(moved).filter((key) => key.includes(' drop_'));
}

async function untilMoved(
  mesh: InPodMesh,
  pod: Pod,
  before: ReturnType<InPodMesh['counters']>,
  key: string,
  packets = 1,
) {
  await until(`${key} at ${pod.label}`, () => (mesh.moved(before, pod)[key] ?? 0) >= packets).catch((error) => {
    throw new Error(`${error.message}; counted: ${JSON.stringify(mesh.moved(before, pod))}`);
  });
}

describe.each(hooks)('the proxy’s mark, %s', (hook) => {
  let mesh: InPodMesh;
  let ofClient: Capture;
  let ofServer: Capture;
  let cgroup: string;
  const native = loadNative();

  const withState = <T>(body: (state: ReturnType<typeof native.openState>) => T): T => {
    const state = native.openState(mesh.topology.stateDir);
    try {
      return body(state);
    } finally {
      native.closeState(state);
    }
  };

  beforeAll(async () => {
    mesh = await InPodMesh.start({ hook });
    const { testbed } = mesh.topology;
    const mount = testbed.directory('cgroup');
    must(['mount', '-t', 'cgroup2', 'none', mount]);
    testbed.defer(() => must(['umount', mount]));
    cgroup = join(mount, `ambient-${process.pid}-${hook}`);
    mkdirSync(cgroup);
    testbed.defer(async () => rmdirSync(cgroup));
    // Killed before the cgroup goes: what is deferred last is done first.
    const into = ['sh', '-c', `echo $$ > ${cgroup}/cgroup.procs; exec "$@"`, 'sh'];
    await mesh.proxies.client.start([], into);
    await mesh.proxies.server.start([], into);
    ofClient = await mesh.capture(mesh.client, 'client');
    ofServer = await mesh.capture(mesh.server, 'server');
  });
  afterAll(async () => {
    await Promise.all([mesh?.proxies.client.kill(), mesh?.proxies.server.kill()]);
    mesh?.close();
  });

  test.each(families)('IPv%i: without the check whoever sets it is the proxy', async (family) => {
    const forged = await mesh.connect('client', mesh.address('outsider', family), APP, { mark: PROXY_MARK });
    expect(isDirect(forged)).toBe(true);
  });

  describe('with the check', () => {
    beforeAll(() => {
      withState((state) => {
        native.setCheckCgroups(state, true);
        native.putProxyCgroup(state, statSync(cgroup, { bigint: true }).ino);
        expect(native.settings(state).checkCgroups).toBe(true);
        expect(native.listProxyCgroups(state)).toEqual([statSync(cgroup, { bigint: true }).ino]);
      });
    });

    test.each(families)('IPv%i: the proxy works as before', async (family) => {
      const before = [mesh.counters(), mesh.counters()] as const;
      const out = await mesh.connect('client', mesh.address('outsider', family));
      expect(isDirect(out)).toBe(false);
      await mesh.exchanged(out, 'client', 500_000);
      const within = await mesh.connect('outsider', mesh.address('server', family));
      expect(isDirect(within)).toBe(false);
      await mesh.exchanged(within, 'outsider', 500_000);
      await mesh.topology.outsider.many(mesh.address('server', family), APP, 50, 10_000);
      expect(dropped(mesh.moved(before[0], mesh.client))).toEqual([]);
      expect(dropped(mesh.moved(before[1], mesh.server))).toEqual([]);
    });

    test.each(families)('IPv%i: a connection with the mark goes through the proxy', async (family) => {
      const forged = await mesh.connect('client', mesh.address('outsider', family), APP, { mark: PROXY_MARK });
      expect(isDirect(forged)).toBe(false);
      expect(mesh.proxies.client.from(forged.localPort)[0]?.listener).toBe('outbound');
      expect(ofClient.packets(`tcp src port ${forged.localPort}`)).toEqual([]);
    });

    test.each(families)('IPv%i: its segments past the hook are no proxy’s', async (family) => {
      const forged = await mesh.connect('client', mesh.address('outsider', family), APP, { mark: PROXY_MARK });
      const before = mesh.counters();
      const bypass = tcpFrame({
        source: mesh.client.mac,
        destination: mesh.client.gatewayMac,
        from: mesh.address('client', family),
        to: mesh.address('outsider', family),
        sourcePort: forged.localPort,
        destinationPort: APP,
        flags: ACK,
        payload: 'past the hook',
      });
      await mesh.client.endpoint.frame('eth0', bypass, 1, true);
      await untilMoved(mesh, mesh.client, before, 'inpod_guard drop_unjudged');
    });

    test.each(families)('IPv%i: TIME_WAIT of the proxy, which no socket answers for, still answers', async (family) => {
      const sourcePort = mesh.nextPort();
      const connection = await mesh.connect('outsider', mesh.address('server', family), APP, { sourcePort });
      await mesh.topology.outsider.request(connection, 'quit\n');
      const state = ['ss', '-Htan', 'state', 'time-wait', `( dport = :${sourcePort} )`];
      await until('TIME_WAIT in the pod', () => mesh.server.netns.run(state).includes(`:${sourcePort}`));
      const sent = () => ofServer.packets(`tcp dst port ${sourcePort}`).length;
      const before = sent();
      const old = tcpFrame({
        source: mesh.topology.outside.mac('eth0'),
        destination: mesh.topology.node.mac('outside0'),
        from: mesh.address('outsider', family),
        to: mesh.address('server', family),
        sourcePort,
        destinationPort: APP,
        flags: ACK,
        payload: 'again',
      });
      await mesh.topology.outsider.frame('eth0', old);
      await until('the answer on the host-side veth', () => sent() > before);
    });

    describe('by a process that has CAP_NET_RAW alone', () => {
      let forger: Pod;
      let within: Endpoint;
      let alone: Endpoint;
      let ofForger: Capture;
      beforeAll(async () => {
        const { topology } = mesh;
        const status = topology.node.run(['setpriv', ...NET_RAW_ONLY, 'cat', '/proc/self/status']);
        expect(status).toMatch(/^CapEff:\t0000000000002000$/m);
        forger = topology.pod('forger', { enroll: true });
        await topology.add(forger);
        within = topology.endpoint(mesh.client.netns, 'beside the proxy', NET_RAW_ONLY);
        alone = topology.endpoint(forger.netns, 'without a proxy', NET_RAW_ONLY);
        ofForger = await mesh.capture(forger, 'forger');
      });
      const marked = () => ({ mark: PROXY_MARK, sourcePort: mesh.nextPort() });
      const toApp = () => ofForger.packets(`tcp dst port ${APP}`).map(({ text }) => text);

      test.each(families)('IPv%i: through the proxy like everything else', async (family) => {
        const before = mesh.counters();
        const forged = await within.connect(mesh.address('outsider', family), APP, marked());
        expect(mesh.proxies.client.from(forged.localPort)[0]?.listener).toBe('outbound');
        expect(isDirect(forged)).toBe(false);
        await within.exchange(forged, 20_000);
        expect(ofClient.packets(`tcp src port ${forged.localPort}`)).toEqual([]);
        expect(mesh.moved(before, mesh.client)['inpod_egress redirected_outbound']).toBe(1);
      });

      test.each(families)('IPv%i: dropped where there is no proxy', async (family) => {
        const before = mesh.counters();
        const outsider = mesh.address('outsider', family);
        await expect(alone.connect(outsider, APP, { ...marked(), timeout: 600 })).rejects.toMatchObject({
          code: 'ETIMEDOUT',
        });
        expect(mesh.moved(before, forger)['inpod_egress drop_no_listener']).toBe(1);
        expect(toApp()).toEqual([]);
      });

      test('a listener with the mark gets what its own pod sends, and can send nothing on', async () => {
        await alone.listen(15001, PROXY_MARK, true);
        for (const family of families) {
          const outsider = mesh.address('outsider', family);
          const seen = async () => (await mesh.topology.outsider.seen(APP, family)).length;
          const before = await seen();
          const taken = async () => (await alone.seen(15001, family)).map(([source, port]) => `${source} ${port}`);
          const plain = await alone.connect(outsider, APP, { sourcePort: mesh.nextPort() });
          const forged = await alone.connect(outsider, APP, marked());
          const ports = [plain, forged].map(({ localPort }) => `${forger.addresses[family]} ${localPort}`);
          expect(await taken()).toEqual(ports);
          await alone.exchange(forged, 20_000);
          expect(await seen()).toBe(before);
        }
        expect(toApp()).toEqual([]);
      });
    });

    test('a cgroup that is not the proxy’s any more', async () => {
      withState((state) => {
        for (const id of native.listProxyCgroups(state)) expect(native.deleteProxyCgroup(state, id)).toBe(true);
      });
      // New sockets show their cgroup anew: what the proxy opens now loops back to it, and reaches nobody.
      const before = mesh.counters();
      await expect(mesh.connect('client', mesh.address('outsider', 4), APP, { timeout: 600 })).rejects.toThrow();
      expect(mesh.moved(before, mesh.client)['inpod_egress pass_proxy_own']).toBeUndefined();
    });
  });
});

describe.each(hooks)('policies, exclusions and fragments, %s', (hook) => {
  let mesh: InPodMesh;
  let ofClient: Capture;

  beforeAll(async () => {
    mesh = await InPodMesh.start(
      {
        hook,
        primary: hook === 'tcx' ? 'bridge' : 'ptp',
        entry: {
          exclude: { outboundPorts: [EXCLUDED], inboundPorts: [`${EXCLUDED}-${EXCLUDED + 1}`], outboundCIDRs: [] },
        },
        client: { entry: { closedAction: 'reset' } },
        server: { entry: { failurePolicy: 'open' } },
      },
      [APP, EXCLUDED],
    );
    ofClient = await mesh.capture(mesh.client, 'client');
    for (const netns of [mesh.client.netns, mesh.topology.outside]) {
      netns.run(
        ['nft', '-f', '-'],
        'table inet mute { chain output { type filter hook output priority 0; tcp flags & rst == rst tcp sport 25000-29999 drop; }\n}\n',
      );
    }
  });
  afterAll(() => mesh?.close());

  const excludedGoDirect = async (family: Family) => {
    for (const [from, at] of [
      ['client', 'outsider'],
      ['outsider', 'client'],
    ] as [Actor, Actor][]) {
      const connection = await mesh.connect(from, mesh.address(at, family), EXCLUDED);
      expect(isDirect(connection)).toBe(true);
      await mesh.exchanged(connection, from);
    }
  };

  test.each(families)('IPv%i: reset: refused at once, both ways', async (family) => {
    const before = mesh.counters();
    expect(await mesh.refused('client', mesh.address('outsider', family))).toBe('ECONNREFUSED');
    for (const from of ['outsider', 'plain'] as const) {
      expect(await mesh.refused(from, mesh.address('client', family)), from).toBe('ECONNREFUSED');
    }
    const moved = mesh.moved(before, mesh.client);
    expect(moved['inpod_egress reset_no_listener']).toBe(1);
    expect(moved['inpod_ingress reset_no_listener']).toBe(2);
  });

  test.each(families)('IPv%i: open: direct, and it stays so when the proxy comes', async (family) => {
    const out = await mesh.connect('server', mesh.address('outsider', family));
    const within = await mesh.connect('outsider', mesh.address('server', family));
    expect([isDirect(out), isDirect(within)]).toEqual([true, true]);
    await mesh.proxies.server.start();
    await mesh.exchanged(out, 'server');
    await mesh.exchanged(within, 'outsider');
    const next = await mesh.connect('server', mesh.address('outsider', family));
    expect(isDirect(next)).toBe(false);
    await mesh.proxies.server.kill();
  });

  test.each(families)('IPv%i: excluded ports go direct without a proxy', excludedGoDirect);

  describe('with a proxy', () => {
    beforeAll(() => mesh.proxies.client.start());

    test.each(families)('IPv%i: excluded ports go direct', async (family) => {
      await excludedGoDirect(family);
      expect(mesh.proxies.client.proxied().filter(({ destinationPort }) => destinationPort === EXCLUDED)).toEqual([]);
    });

    let port = 25_000;
    const raw = (from: 'client' | 'outsider', family: Family, destination = APP): RawClient => {
      port += 1;
      const client = from === 'client';
      return {
        ifname: 'eth0',
        mac: client ? mesh.client.mac : mesh.topology.outside.mac('eth0'),
        gateway: client ? mesh.client.gatewayMac : mesh.topology.node.mac('outside0'),
        source: mesh.address(from, family),
        sourcePort: port,
        address: mesh.address(client ? 'outsider' : 'client', family),
        port: destination,
      };
    };

    test.each(families)('IPv%i: short first fragments and fragmented SYNs are dropped', async (family) => {
      const before = mesh.counters();
      for (const flags of [SYN, ACK]) {
        await mesh.client.endpoint.loneFragment(raw('client', family), flags, 8).catch(() => {});
      }
      await untilMoved(mesh, mesh.client, before, 'inpod_egress drop_short_first_fragment', 2);
      await mesh.client.endpoint.loneFragment(raw('client', family), SYN, 24).catch(() => {});
      await untilMoved(mesh, mesh.client, before, 'inpod_egress drop_syn_fragment');
      await mesh.topology.outsider.loneFragment(raw('outsider', family), SYN, 24);
      await untilMoved(mesh, mesh.client, before, 'inpod_ingress drop_syn_fragment');
    });

    test.each(families)('IPv%i: data in fragments follows its connection, in and out', async (family) => {
      const before = mesh.counters();
      const ping = await mesh.client.endpoint.ping(mesh.address('outsider', family));
      expect(ping).toBeUndefined();
      const inbound = raw('outsider', family);
      const { greeting, echo } = await mesh.topology.outsider.segments(inbound, [[0, 1, 2]]);
      expect(greeting.split(' ')[0]).toBe(mesh.address('outsider', family));
      expect(Number(greeting.split(' ')[1])).not.toBe(inbound.sourcePort);
      expect(echo).toBe('0123456789abcdef'.repeat(4));
      expect(dropped(mesh.moved(before, mesh.client))).toEqual([]);
      const excluded = raw('client', family, EXCLUDED);
      const direct = await mesh.client.endpoint.segments(excluded, [[0, 1, 2]]);
      expect(Number(direct.greeting.split(' ')[1])).toBe(excluded.sourcePort);
      expect(mesh.moved(before, mesh.client)['inpod_egress pass_fragment']).toBe(2);
    });

    test('a tagged frame of the pod', async () => {
      const before = mesh.counters();
      const tagged = tcpFrame({
        source: mesh.client.mac,
        destination: mesh.client.gatewayMac,
        tags: [{ protocol: 0x8100, id: 0 }],
        from: mesh.address('client', 4),
        to: mesh.address('outsider', 4),
        sourcePort: mesh.nextPort(),
        destinationPort: APP,
      });
      await mesh.client.endpoint.frame('eth0', tagged).catch(() => {});
      await untilMoved(mesh, mesh.client, before, 'inpod_egress drop_vlan_tagged');
      await mesh.client.endpoint.frame('eth0', tagged, 1, true);
      await untilMoved(mesh, mesh.client, before, 'inpod_guard drop_vlan_tagged');
      expect(ofClient.lines('vlan and tcp dst port 1')).toEqual([]);
    });
  });
});

describe.each(hooks)('closedAction reset where inpod_sign is gone, %s', (hook) => {
  let mesh: InPodMesh;
  beforeAll(async () => {
    mesh = await InPodMesh.start({ hook, client: { entry: { closedAction: 'reset' } } });
    const { stateDir, node } = mesh.topology;
    if (hook === 'clsact') {
      node.run(['tc', 'filter', 'del', 'dev', mesh.client.hostIfname, 'egress']);
      return;
    }
    for (const key of readdirSync(join(stateDir, 'links'))) rmSync(join(stateDir, 'links', key, 'inpod_sign'));
    // A link without a pin ends, a moment later.
    const native = loadNative();
    const netns = native.openNetns(node.path);
    const attached = () => native.queryTcx(netns, mesh.client.hostIfindex, 'egress').length;
    await until('it is detached', () => attached() === 0).finally(() => native.close(netns));
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: the node itself is refused as others are', async (family) => {
    const before = mesh.counters();
    for (const from of ['host', 'plain'] as const) {
      expect(await mesh.refused(from, mesh.address('client', family)), from).toBe('ECONNREFUSED');
    }
    const moved = mesh.moved(before, mesh.client);
    expect(moved['inpod_ingress reset_no_listener']).toBe(2);
    expect(moved['inpod_egress pass_bypass']).toBe(2);
    expect(dropped(moved)).toEqual([]);
  });
});

describe.each(hooks)('two addresses of each family, DNS captured, %s', (hook) => {
  let mesh: InPodMesh;
  let pod: Pod;
  let others: Record<Family, string>;

  beforeAll(async () => {
    mesh = await InPodMesh.start({ hook, entry: { dnsCapture: true } });
    const { topology } = mesh;
    pod = topology.pod('two', { enroll: true });
    await topology.addPrimary(pod);
    others = { 4: '10.88.0.201', 6: 'fd88::c9' };
    pod.netns.ip('address', 'add', `${others[4]}/32`, 'dev', 'eth0');
    pod.netns.ip('address', 'add', `${others[6]}/128`, 'dev', 'eth0', 'nodad');
    for (const family of families) topology.node.ip('route', 'add', others[family], 'dev', pod.hostIfname);
    await topology.addOurs(pod);
    await pod.endpoint.listen(APP);
    await new InPodProxy(topology, pod).start();
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: each query is answered to the address that asked', async (family) => {
    const resolver = mesh.address('outsider', family);
    const sourcePort = mesh.nextPort();
    const capture = await mesh.capture(pod, `two${family}`);
    const before = mesh.counters();
    let id = 0;
    // Of the same port one after the other: what was kept for one address is not taken for the next.
    for (const source of [others[family], pod.addresses[family], others[family], pod.addresses[family]]) {
      id += 1;
      expect(await pod.endpoint.dns([[resolver, 'a.test', id]], { source, sourcePort })).toEqual([
        [resolver, id, `udp ${resolver}`],
      ]);
      const tcp = await pod.endpoint.dns([[resolver, 'a.test', id]], { source, transport: 'tcp' });
      expect(tcp).toEqual([[resolver, id, `tcp ${resolver}`]]);
      const [large] = await pod.endpoint.dns([[resolver, '4000.big', id]], { source });
      expect(large).toEqual([resolver, id, 'x'.repeat(4000)]);
    }
    // At once, of ports of their own.
    const both = [others[family], pod.addresses[family]].map((source, at) =>
      pod.endpoint.dns([[resolver, 'a.test', 20 + at]], { source }),
    );
    expect(await Promise.all(both)).toEqual([20, 21].map((one) => [[resolver, one, `udp ${resolver}`]]));
    expect(dropped(mesh.moved(before, pod))).toEqual([]);
    expect(capture.lines('port 53')).toEqual([]);
  });

  test.each(families)('IPv%i: connections from and to both are proxied', async (family) => {
    for (const address of [others[family], pod.addresses[family]]) {
      const out = await pod.endpoint.connect(mesh.address('outsider', family), APP, {
        source: address,
        sourcePort: mesh.nextPort(),
      });
      expect(isDirect(out)).toBe(false);
      await pod.endpoint.exchange(out, 20_000);
      const within = await mesh.connect('outsider', address);
      expect([within.seen, isDirect(within)]).toEqual([mesh.address('outsider', family), false]);
      await mesh.exchanged(within, 'outsider');
    }
  });

  test.each(families)('IPv%i: one that came later is reached through the proxy, and opens nothing', async (family) => {
    const late = family === 4 ? '10.88.0.202' : 'fd88::ca';
    pod.netns.ip(
      'address',
      'add',
      `${late}/${family === 4 ? 32 : 128}`,
      'dev',
      'eth0',
      ...(family === 6 ? ['nodad'] : []),
    );
    mesh.topology.node.ip('route', 'add', late, 'dev', pod.hostIfname);
    const within = await mesh.connect('outsider', late);
    expect([within.seen, isDirect(within)]).toEqual([mesh.address('outsider', family), false]);
    await mesh.exchanged(within, 'outsider');
    const before = mesh.counters();
    await expect(
      pod.endpoint.connect(mesh.address('outsider', family), APP, { source: late, timeout: ONE_SYN }),
    ).rejects.toThrow('ETIMEDOUT');
    expect(mesh.moved(before, pod)['inpod_egress drop_spoofed_source']).toBe(1);
  });
});

describe('enrolling, draining, CHECK', () => {
  let mesh: InPodMesh;
  let proxy: InPodProxy;
  let config: string;

  const enroll = () =>
    mesh.commanded('enroll', '--netns', mesh.plain.netns.path, '--pod', 'default/plain', '--conf', config);

  beforeAll(async () => {
    mesh = await InPodMesh.start();
    proxy = new InPodProxy(mesh.topology, mesh.plain);
    await proxy.start();
    await mesh.proxies.server.start();
    config = join(mesh.topology.testbed.directory('config'), '10.conflist');
    const { prevResult: _, runtimeConfig: __, ...entry } = mesh.topology.entry(mesh.plain);
    writeFileSync(config, JSON.stringify({ cniVersion: '1.0.0', name: 'pods', plugins: [entry] }));
  });
  afterAll(() => mesh?.close());

  test('a running pod: open connections go on, new ones are proxied, draining ends them gently', async () => {
    const old = await mesh.connect('plain', mesh.address('outsider', 4));
    await enroll();
    await mesh.endpoint('plain').exchange(old, 10_000);
    const held = await mesh.connect('plain', mesh.address('outsider', 6));
    expect(isDirect(held)).toBe(false);
    // Again: settings are replaced where they are, and nothing is cut.
    await enroll();
    await mesh.endpoint('plain').exchange(held, 10_000);
    expect(await mesh.commanded('unenroll', '--pod', 'default/plain')).toMatch(/^draining default\/plain/);
    expect(isDirect(await mesh.connect('plain', mesh.address('outsider', 4)))).toBe(true);
    await mesh.exchanged(held, 'plain');
    await mesh.exchanged(old, 'plain');
    const state = async () => {
      const list = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string; state: string }[];
      return list.find(({ name }) => name === 'plain')?.state;
    };
    for (const end = Date.now() + 5_000; (await state()) === 'attached' && Date.now() < end; ) {
      await mesh.command('status');
    }
    expect(await state()).toBe('recorded');
    expect(mesh.plain.netns.run(['ip', 'rule', 'show'])).not.toContain('41905');
  });

  test('a setting of the namespace stays on until the last interface of the pod goes', async () => {
    const { topology } = mesh;
    const annotations = { 'ambient-redirect/enroll': 'true', 'ambient-redirect/interfaces': 'eth0,net1' };
    const entry = { runtimeConfig: { 'io.kubernetes.cri.pod-annotations': annotations } };
    const pod = topology.pod('twice', { enroll: true, entry });
    await topology.add(pod);
    const second = topology.testbed.directory('twice');
    const run = async (path: string, command: string, conf: object) => {
      const env = { ...topology.environment(command, pod), CNI_IFNAME: 'net1' };
      const outcome = await topology.node.exec([path], { env, input: JSON.stringify(conf) });
      expect(outcome, `${command}: ${outcome.stdout}`).toMatchObject({ status: 0 });
      return outcome.stdout;
    };
    const ipam = { type: 'host-local', dataDir: second, ranges: [[{ subnet: '198.51.100.0/24' }]] };
    const primary = { cniVersion: '1.0.0', name: 'second', type: 'ptp', ipam };
    const prevResult = JSON.parse(await run('/usr/lib/cni/ptp', 'ADD', primary));
    const ours = { ...topology.entry(pod), name: 'second', prevResult };
    await run(executable, 'ADD', ours);
    const setting = () => pod.netns.run(['sysctl', '-n', 'net.ipv4.tcp_migrate_req']).trim();
    expect(setting()).toBe('1');
    await topology.deleteOurs(pod);
    expect(setting()).toBe('1');
    await run(executable, 'DEL', ours);
    expect(setting()).toBe('0');
    await run('/usr/lib/cni/ptp', 'DEL', primary);
  });

  describe.each(hooks)('CHECK names what is missing, %s', (hook) => {
    const checked = async (): Promise<{ code: number; msg: string; details: string } | null> => {
      const { topology, server } = mesh;
      const outcome = await topology.node.exec([executable], {
        env: topology.environment('CHECK', server),
        input: JSON.stringify({ ...topology.entry(server), hook }),
      });
      return outcome.status === 0
        ? null
        : (JSON.parse(outcome.stdout) as { code: number; msg: string; details: string });
    };
    const again = async () => {
      const { topology, server } = mesh;
      for (const verb of ['DEL', 'ADD']) {
        const outcome = await topology.node.exec([executable], {
          env: topology.environment(verb, server),
          input: JSON.stringify({ ...topology.entry(server), hook }),
        });
        expect(outcome, outcome.stdout).toMatchObject({ status: 0 });
      }
    };

    test.each([
      ['rule', ['ip', 'rule', 'del', 'pref', '20000'], /IPv4 routing .* rule to table 41905/],
      ['IPv6 route', ['ip', '-6', 'route', 'flush', 'table', '41905'], /IPv6 routing .* local route/],
      ['sysctl', ['sysctl', '-qw', 'net.ipv4.conf.eth0.accept_local=0'], /accept_local/],
      ['sysctl of the namespace', ['sysctl', '-qw', 'net.ipv4.tcp_migrate_req=0'], /net.ipv4.tcp_migrate_req/],
    ] as [string, string[], RegExp][])('%s', async (_, command, words) => {
      await again();
      expect(await checked()).toBeNull();
      mesh.server.netns.run(command);
      const error = await checked();
      expect(error?.code).toBe(106);
      expect(`${error?.msg} ${error?.details}`).toMatch(words);
    });

    test('program', async () => {
      await again();
      const { stateDir } = mesh.topology;
      if (hook === 'tcx') must(['sh', '-c', `rm ${stateDir}/links/*/inpod_egress`]);
      else mesh.server.netns.run(['tc', 'filter', 'del', 'dev', 'eth0', 'egress']);
      const error = await checked();
      expect(error?.code).toBe(105);
      expect(`${error?.msg} ${error?.details}`).toContain('inpod_egress');
      await again();
      expect(await checked()).toBeNull();
    });
  });
});

describe.each(hooks)('somebody else’s programs inside the pod, %s', (hook) => {
  let mesh: InPodMesh;
  const named = async () => {
    const { stdout } = await mesh.command('doctor', '--conf-dir', '/nowhere', '-o', 'json');
    const { findings } = JSON.parse(stdout) as { findings: { level: string; subject: string; text: string }[] };
    return findings
      .filter(({ text }) => text.includes('foreign_'))
      .map(({ level, subject, text }) => `${level}: ${subject}: ${text}`.replace(/program \d+/, 'program N'));
  };
  const checked = async (): Promise<string> => {
    const { topology, client } = mesh;
    const outcome = await topology.node.exec([executable], {
      env: topology.environment('CHECK', client),
      input: JSON.stringify(topology.entry(client)),
    });
    expect(outcome).toMatchObject({ status: 0, stdout: '' });
    return outcome.stderr;
  };

  beforeAll(async () => {
    mesh = await InPodMesh.start({ hook });
    await mesh.proxies.client.start();
  });
  afterAll(() => mesh?.close());

  test('named by doctor, and by CHECK if ahead of ours, with the namespace', async () => {
    expect(await named()).toEqual([]);
    expect(await checked()).toBe('');
    const { netns } = mesh.client;
    const place = `eth0 in ${netns.path}`;
    const foreign = new Foreign(mesh.topology.testbed, netns, mesh.topology.bpffs);
    const [link] = JSON.parse(netns.ip('-j', 'link', 'show', 'dev', 'eth0')) as { ifindex: number }[];
    const ahead = 'runs before ours; what it ends the chain for (TC_ACT_OK) is not redirected';
    const behind = 'is there too; ours lets on whatever it does not redirect or drop';
    const both = (level: string, program: string, text: string) =>
      ['egress', 'ingress'].map(
        (direction) => `${level}: ${direction} of ${place}: TCX program N (${program}) ${text}`,
      );

    foreign.tcx(link?.ifindex ?? 0, 'foreign_pass', 'last');
    expect(isDirect(await mesh.connect('client', mesh.address('outsider', 4)))).toBe(false);
    // Every TCX program runs before a filter.
    const first = hook === 'tcx' ? both('note', 'foreign_pass', behind) : both('warning', 'foreign_pass', ahead);
    expect((await named()).sort()).toEqual(first);
    expect((await checked()) === '').toBe(hook === 'tcx');

    foreign.tcx(link?.ifindex ?? 0, 'foreign_ok', 'first');
    // Nothing is looped any more, and inpod_guard lets nothing out that was not judged.
    const before = mesh.counters();
    expect(await mesh.refused('client', mesh.address('outsider', 4))).toBe('ETIMEDOUT');
    expect(mesh.moved(before, mesh.client)).toEqual({ 'inpod_guard drop_unjudged': 1 });
    expect((await named()).sort()).toEqual([...first, ...both('warning', 'foreign_ok', ahead)].sort());
    const said = await checked();
    for (const direction of ['ingress', 'egress']) {
      expect(said).toMatch(new RegExp(`warn: ${direction} of ${place}: TCX program \\d+ .foreign_ok. runs before`));
    }
  });
});

describe('status', () => {
  let mesh: InPodMesh;
  let runs = 0;
  const problems = async (pod: string) => {
    // Where no agent is asked: what the kernel has is to be seen without one.
    const { node, stateDir, testbed } = mesh.topology;
    runs += 1;
    const runDir = testbed.directory(`run${runs}`);
    const outcome = await node.exec([executable, 'status', '-o', 'json', '--state-dir', stateDir, '--run-dir', runDir]);
    const document = JSON.parse(outcome.stdout) as { problems: { severity: string; object: string; text: string }[] };
    return document.problems.filter(({ object }) => object === pod || object === 'in-pod contract');
  };

  beforeAll(async () => {
    mesh = await InPodMesh.start();
  });
  afterAll(() => mesh?.close());

  test.each([
    ['no proxy', null, ['no IPv4 listener on port 15001', 'no IPv6 listener on port 15008']],
    ['without the mark', ['--no-mark'], ['no IPv4 listener on port 15001']],
    ['IPv4 only', ['--ipv4-only'], ['no IPv6 listener on port 15001', 'no IPv6 listener on port 15006']],
    ['not transparent', ['--no-transparent'], ['IPv4 listener on port 15001 is not transparent']],
    ['as it is to be', [], []],
  ] as [string, string[] | null, string[]][])('%s', async (_, args, expected) => {
    if (args !== null) await mesh.proxies.client.start(args);
    const found = await problems('default/client');
    const texts = found.filter(({ object }) => object === 'default/client').map(({ text }) => text);
    for (const words of expected)
      expect(
        texts.filter((text) => text.includes(words)),
        texts.join('\n'),
      ).toHaveLength(1);
    if (expected.length === 0) expect(texts).toEqual([]);
    else expect(found.some(({ severity }) => severity === 'impaired')).toBe(true);
    if (args?.includes('--ipv4-only')) expect(texts.filter((text) => text.includes('IPv4'))).toEqual([]);
    await mesh.proxies.client.kill();
  });

  test('forgeable until cgroups are checked', async () => {
    const forgeable = async () => (await problems('')).filter(({ text }) => text.startsWith('forgeable'));
    expect(await forgeable()).toHaveLength(1);
    const native = loadNative();
    const state = native.openState(mesh.topology.stateDir);
    native.setCheckCgroups(state, true);
    native.closeState(state);
    expect(await forgeable()).toEqual([]);
  });
});

describe('shared and in-pod on one node', () => {
  let mesh: InPodMesh;
  let ztunnel: Pod;
  let haproxy: HAProxy;

  beforeAll(async () => {
    const shared = { proxy: { contract: 'shared', match: { namespace: 'istio-system', name: 'ztunnel-*' } } };
    mesh = await InPodMesh.start({ server: { entry: shared } });
    ztunnel = mesh.topology.pod('ztunnel-1', { namespace: 'istio-system', entry: shared });
    await mesh.topology.add(ztunnel);
    haproxy = new HAProxy(mesh.topology.testbed, ztunnel.netns, 'only');
    await haproxy.start();
    await mesh.proxies.client.start();
  });
  afterAll(() => mesh?.close());

  test.each(families)('IPv%i: each pod through its own proxy, both ways', async (family) => {
    const there = await mesh.connect('client', mesh.address('server', family));
    await mesh.exchanged(there, 'client');
    expect(mesh.proxies.client.from(there.localPort)[0]?.listener).toBe('outbound');
    expect(haproxy.proxied().at(-1)).toMatchObject({ listener: 'inbound', client: mesh.address('client', family) });
    const back = await mesh.connect('server', mesh.address('client', family));
    await mesh.exchanged(back, 'server');
    expect(haproxy.proxied().at(-1)).toMatchObject({ listener: 'outbound', clientPort: back.localPort });
    const last = mesh.proxies.client.proxied().at(-1);
    expect(last).toMatchObject({ listener: 'inbound', source: mesh.address('server', family) });
  });

  test('pods tells the contracts apart', async () => {
    const list = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as {
      name: string;
      contract: string;
      role: string;
    }[];
    const contracts = Object.fromEntries(list.map(({ name, contract, role }) => [name, `${contract} ${role}`]));
    expect(contracts).toMatchObject({ client: 'in-pod pod', server: 'shared pod', 'ztunnel-1': 'shared proxy' });
  });

  describe('a pod changes its contract', () => {
    const conf: Record<string, string> = {};
    beforeAll(() => {
      const directory = mesh.topology.testbed.directory('contracts');
      for (const contract of ['shared', 'in-pod']) {
        conf[contract] = join(directory, `${contract}.json`);
        const proxy = { contract, match: { namespace: 'istio-system', name: 'ztunnel-*' } };
        writeFileSync(conf[contract], JSON.stringify({ ...mesh.topology.entry(mesh.server), proxy }));
      }
    });
    const enroll = (contract: string, ...more: string[]) =>
      mesh.command('enroll', '--netns', mesh.server.netns.path, '--conf', conf[contract] ?? '', ...more);
    const server = async () => {
      const list = JSON.parse(await mesh.commanded('pods', '-o', 'json')) as { name: string }[];
      return list.find(({ name }) => name === 'server');
    };
    const direct = async () => isDirect(await mesh.connect('server', mesh.address('outsider', 4)));

    test('new connections go direct at once, those that its proxy has go on, and the next run ends it', async () => {
      const held = await Promise.all(
        families.flatMap((family) => [
          mesh.connect('server', mesh.address('outsider', family)),
          mesh.connect('outsider', mesh.address('server', family)),
        ]),
      );
      const ends = ['server', 'outsider', 'server', 'outsider'] as const;
      expect(held.map(isDirect)).toEqual([false, false, false, false]);
      const { status, stderr } = await enroll('in-pod');
      expect({ status, stderr }).toMatchObject({
        status: 1,
        stderr: expect.stringMatching(/default\/server leaves the contract "shared" first: .* \d+ sockets/),
      });
      expect(await server()).toMatchObject({ contract: 'shared', state: 'attached', draining: true });
      expect(await direct()).toBe(true);
      for (const [index, connection] of held.entries()) await mesh.exchanged(connection, ends[index] ?? 'server');
      await until('the drain is over', async () => {
        // It ends drains, and then exits 1 because what stands for the agent reports nothing.
        await mesh.command('status');
        return ((await server()) as { state?: string } | undefined)?.state === 'recorded';
      });
      expect(await direct()).toBe(true);
    });

    test('then it is in the other one, and --no-drain cuts', async () => {
      await mesh.proxies.server.start();
      expect(await enroll('in-pod')).toMatchObject({ status: 0 });
      expect(await server()).toMatchObject({ contract: 'in-pod', state: 'attached' });
      const held = await mesh.connect('server', mesh.address('outsider', 4));
      expect(mesh.proxies.server.from(held.localPort)[0]?.listener).toBe('outbound');
      expect(await enroll('shared', '--no-drain')).toMatchObject({ status: 0 });
      expect(await server()).toMatchObject({ contract: 'shared', state: 'attached' });
      await expect(mesh.endpoint('server').exchange(held, 1_000, 2_000)).rejects.toMatchObject({
        code: expect.stringMatching(/^(ECONNRESET|EPIPE|ETIMEDOUT)$/),
      });
      expect(await direct()).toBe(false);
      expect(haproxy.proxied().at(-1)).toMatchObject({ listener: 'outbound', client: mesh.address('server', 4) });
    });
  });
});

describe.each(hooks)('a macvlan interface, without a host-side peer, %s', (hook) => {
  let mesh: InPodMesh;
  let pod: Pod;
  let proxy: InPodProxy;
  let uplink: Capture;

  beforeAll(async () => {
    mesh = await InPodMesh.start({ hook, entry: { dnsCapture: true } });
    const { topology } = mesh;
    pod = topology.pod('macvlan', { enroll: true });
    topology.testbed.veth(
      { namespace: topology.node, ifname: 'uplink' },
      { namespace: topology.outside, ifname: 'lan0', addresses: ['10.77.0.1/24', 'fd77::1/64'] },
    );
    topology.node.ip('link', 'add', 'mv', 'link', 'uplink', 'type', 'macvlan', 'mode', 'bridge');
    topology.node.ip('link', 'set', 'mv', 'netns', pod.netns.path.replace(/.*\//, ''));
    pod.netns.ip('link', 'set', 'mv', 'name', 'eth0');
    for (const address of ['10.77.0.2/24', 'fd77::2/64'])
      pod.netns.ip('addr', 'add', address, 'dev', 'eth0', ...(address.includes(':') ? ['nodad'] : []));
    for (const device of ['lo', 'eth0']) pod.netns.ip('link', 'set', device, 'up');
    for (const gateway of ['10.77.0.1', 'fd77::1']) pod.netns.ip('route', 'add', 'default', 'via', gateway);
    pod.prevResult = {
      interfaces: [{ name: 'eth0', mac: pod.netns.mac('eth0'), sandbox: pod.netns.path }],
      ips: ['10.77.0.2/24', 'fd77::2/64'].map((address) => ({ interface: 0, address })),
    };
    pod.addresses = { 4: '10.77.0.2', 6: 'fd77::2' };
    await topology.addOurs(pod);
    proxy = new InPodProxy(topology, pod);
    await pod.endpoint.listen(APP);
    uplink = await Capture.start(topology.testbed, topology.outside, 'lan0', 'lan');
  });
  afterAll(() => mesh?.close());

  const far: Record<Family, string> = { 4: '10.77.0.1', 6: 'fd77::1' };

  test.each(families)('IPv%i: closed without a proxy, proxied with one, in and out', async (family) => {
    const sourcePort = mesh.nextPort();
    await expect(pod.endpoint.connect(far[family], APP, { sourcePort, timeout: 600 })).rejects.toMatchObject({
      code: 'ETIMEDOUT',
    });
    expect(uplink.packets(`tcp src port ${sourcePort}`)).toEqual([]);
    await proxy.start();
    const out = await pod.endpoint.connect(far[family], APP, { sourcePort: mesh.nextPort() });
    expect(isDirect(out)).toBe(false);
    await pod.endpoint.exchange(out, 100_000);
    expect(uplink.packets(`tcp src port ${out.localPort}`)).toEqual([]);
    const within = await mesh.topology.outsider.connect(pod.addresses[family], APP, { sourcePort: mesh.nextPort() });
    expect([within.seen, isDirect(within)]).toEqual([far[family], false]);
    expect(await pod.endpoint.dns([[far[family], 'a.test', 5]])).toEqual([[far[family], 5, `udp ${far[family]}`]]);
    await proxy.kill();
  });

  test('the shared contract refuses it: 101', async () => {
    const { topology } = mesh;
    const entry = { ...topology.entry(pod), proxy: { contract: 'shared' } };
    const outcome = await topology.node.exec([executable], {
      env: { ...topology.environment('ADD', pod), CNI_CONTAINERID: 'other' },
      input: JSON.stringify(entry),
    });
    expect(JSON.parse(outcome.stdout)).toMatchObject({ code: 101 });
  });

  test('its id is none that a device has; CHECK, DEL without the namespace', async () => {
    const { topology } = mesh;
    const dump = JSON.parse(
      must(['bpftool', '-j', 'map', 'dump', 'pinned', join(topology.stateDir, 'interfaces')]),
    ) as {
      key: string[];
    }[];
    expect(dump.some(({ key }) => Number.parseInt(key[3] ?? '', 16) >= 0x80)).toBe(true);
    const run = (verb: string, more: Record<string, string> = {}) =>
      topology.node.exec([executable], {
        env: { ...topology.environment(verb, pod), ...more },
        input: JSON.stringify(topology.entry(pod)),
      });
    const checked = await run('CHECK');
    expect(checked, checked.stdout).toMatchObject({ status: 0 });
    expect(await run('DEL', { CNI_NETNS: '' })).toMatchObject({ status: 0 });
    const after = JSON.parse(
      must(['bpftool', '-j', 'map', 'dump', 'pinned', join(topology.stateDir, 'interfaces')]),
    ) as {
      key: string[];
    }[];
    expect(after.some(({ key }) => Number.parseInt(key[3] ?? '', 16) >= 0x80)).toBe(false);
    const direct = await pod.endpoint.connect(far[4], APP, { sourcePort: mesh.nextPort() });
    expect(isDirect(direct)).toBe(true);
  });
});
