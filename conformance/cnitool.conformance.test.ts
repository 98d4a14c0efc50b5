// SPDX-License-Identifier: Apache-2.0
//
// The same chains driven by the real libcni: cnitool, built once with Go into a cache outside the checkout. Where there
// is no Go this is "not run", and said so.

import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { DEBIAN, EXECUTABLE, LIVE_STATE, Node, type Pod, reportPeer, SCRIPTED } from './chain.ts';
import { differences } from './kernel-state.ts';
import { exec, type Outcome } from './netns.ts';
import type { JsonObject, NetworkList, PluginConf } from './runtime.ts';

const VERSION = 'v1.3.0';

function onPath(name: string): boolean {
  return (process.env.PATH ?? '').split(delimiter).some((directory) => existsSync(join(directory, name)));
}

/** Path of cnitool; built if it is not in the cache. */
async function build(): Promise<string> {
  const cache = process.env.XDG_CACHE_HOME ?? (process.getuid?.() === 0 ? '/var/cache' : join(homedir(), '.cache'));
  const directory = join(cache, 'ambient-redirect', `cnitool-${VERSION}`);
  const program = join(directory, 'cnitool');
  if (existsSync(program)) return program;
  const fresh = `${directory}.${process.pid}`;
  mkdirSync(fresh, { recursive: true });
  const { GOFLAGS: _, ...env } = process.env;
  const outcome = await exec(['go', 'install', `github.com/containernetworking/cni/cnitool@${VERSION}`], {
    env: { ...(env as Record<string, string>), GOBIN: fresh, HOME: homedir() },
    timeout: 300_000,
  });
  if (outcome.status !== 0) {
    rmSync(fresh, { recursive: true });
    throw new Error(`go install cnitool@${VERSION}: exit ${outcome.status}: ${outcome.stderr}`);
  }
  // Somebody else may have been quicker.
  if (existsSync(directory)) rmSync(fresh, { recursive: true });
  else renameSync(fresh, directory);
  return program;
}

const ARGS = [
  ['IgnoreUnknown', '1'],
  ['K8S_POD_NAMESPACE', 'shop'],
  ['K8S_POD_NAME', 'web-0'],
  ['K8S_POD_UID', '0123'],
] as const;

const HAVE_GO = onPath('go');

afterAll(() => reportPeer('cnitool', VERSION, HAVE_GO, 'no "go" in PATH to build it with'));

describe.runIf(HAVE_GO)('cnitool (optional)', () => {
  let cnitool: string;
  let node: Node;
  beforeAll(async () => {
    cnitool = await build();
  }, 310_000);
  beforeEach(() => {
    node = new Node();
  });
  afterEach(() => node.close());

  /** Runs cnitool on the node, with a /var/lib/cni of its own: its cache has no other place. */
  async function run(verb: string, list: NetworkList, pod: Pod, capabilities: JsonObject): Promise<Outcome> {
    const directory = join(node.directory, 'net.d');
    const cache = join(node.directory, 'var-lib-cni');
    for (const one of [directory, cache]) mkdirSync(one, { recursive: true });
    writeFileSync(join(directory, '10-chain.conflist'), JSON.stringify(list));
    const script =
      'mount -t tmpfs none /var/lib && mkdir /var/lib/cni && mount --bind "$1" /var/lib/cni && shift && exec "$@"';
    const argv = [cnitool, verb, list.name, pod.namespace.path];
    return await node.namespace.exec(['unshare', '--mount', 'sh', '-c', script, 'sh', cache, ...argv], {
      env: {
        PATH: process.env.PATH ?? '',
        CNI_PATH: [DEBIAN, SCRIPTED, dirname(EXECUTABLE)].join(':'),
        NETCONFPATH: directory,
        CAP_ARGS: JSON.stringify(capabilities),
        CNI_ARGS: ARGS.map((pair) => pair.join('=')).join(';'),
      },
    });
  }

  async function must(verb: string, list: NetworkList, pod: Pod, capabilities: JsonObject = {}): Promise<string> {
    const { status, stdout, stderr } = await run(verb, list, pod, capabilities);
    expect(`${verb}: exit ${status}${status === 0 ? '' : `: ${stdout}${stderr}`}`).toBe(`${verb}: exit 0`);
    return stdout;
  }

  /** cnitool's container id: of the absolute netns path. */
  const idOf = (pod: Pod) => `cnitool-${createHash('sha512').update(pod.namespace.path).digest('hex').slice(0, 20)}`;

  const ptp = (): PluginConf => ({ type: 'ptp', ipam: node.ipam('10.77.0.0/24') });
  const bridge = (): PluginConf => ({
    type: 'bridge',
    bridge: 'cni0',
    isGateway: true,
    ipam: node.ipam('10.78.0.0/24', 'fd00:78::/64'),
  });
  const others = (): PluginConf[] => [
    { type: 'bandwidth', capabilities: { bandwidth: true } },
    { type: 'tuning', mtu: 1400, dataDir: join(node.directory, 'tuning') },
  ];
  const portmap: PluginConf = { type: 'portmap', capabilities: { portMappings: true } };
  const limits = { ingressRate: 8e6, ingressBurst: 8e6, egressRate: 8e6, egressBurst: 8e6 };

  async function lifecycle(list: NetworkList, capabilities: JsonObject): Promise<void> {
    const first = node.pod();
    await must('add', list, first, { bandwidth: limits });
    const pod = node.pod();
    const before = await node.state(pod);
    const result = JSON.parse(await must('add', list, pod, capabilities)) as JsonObject;
    expect(result.cniVersion).toBe(list.cniVersion);
    const rows = await node.attachments();
    expect(rows.map(({ containerId }) => containerId).sort()).toEqual([first, pod].map(idOf).sort());
    expect(rows.find(({ containerId }) => containerId === idOf(pod))).toMatchObject({
      namespace: 'shop',
      name: 'web-0',
      role: 'pod',
      state: 'attached',
      interface: 'eth0',
    });
    if (list.cniVersion !== '0.3.1') {
      // portmap 1.1.1's CHECK always fails.
      const plugins = list.plugins.filter(({ type }) => type !== 'portmap');
      await must('check', { ...list, plugins }, pod, capabilities);
    }
    await must('del', list, pod, capabilities);
    await must('del', list, pod, capabilities);
    expect((await node.attachments()).map(({ containerId }) => containerId)).toEqual([idOf(first)]);
    const shared = new RegExp(`${LIVE_STATE.source}|nft `);
    expect(differences(before, await node.state(pod), shared)).toEqual([]);
  }

  test.each(['0.3.1', '0.4.0', '1.0.0'])('ptp, portmap, bandwidth, tuning, ours at %s', async (version) => {
    await lifecycle(node.list(version, ptp(), portmap, ...others(), node.ours()), {
      portMappings: [{ hostPort: 8080, containerPort: 80, protocol: 'tcp' }],
      bandwidth: limits,
    });
  });

  test.each(['0.3.1', '0.4.0', '1.0.0'])('bridge, bandwidth, tuning, ours at %s', async (version) => {
    await lifecycle(node.list(version, bridge(), ...others(), node.ours()), { bandwidth: limits });
  });

  test('a scripted primary and ours at 1.1.0: add, check, status, gc, del', async () => {
    const list = node.list('1.1.0', { type: 'primary', addresses: ['10.79.0.2/24'] }, node.ours());
    const pod = node.pod();
    await must('status', list, pod);
    await must('add', list, pod);
    await must('check', list, pod);
    await must('status', list, pod);
    expect(await node.attachments()).toMatchObject([{ containerId: idOf(pod), state: 'attached' }]);
    // Without GCArgs, as here, every attachment that libcni knows gets DEL, and the plugins see neither key.
    await must('gc', list, pod);
    expect(await node.attachments()).toEqual([]);
    await must('del', list, pod);
  });

  test('the look-alike of runtime.ts gives plugins what the real libcni gives them', async () => {
    const capabilityArgs = { portMappings: [{ hostPort: 1, note: '<&>' }], bandwidth: { ingressRate: 8 }, other: 1 };
    const logs: Record<'real' | 'alike', string> = {
      real: join(node.directory, 'a'),
      alike: join(node.directory, 'b'),
    };
    for (const version of ['0.3.1', '0.4.0', '1.0.0', '1.1.0']) {
      const pod = node.pod();
      const lists = Object.fromEntries(
        Object.entries(logs).map(([who, log]) => {
          const recorder: PluginConf = {
            type: 'recorder',
            log,
            capabilities: { portMappings: true, bandwidth: false, absent: true },
            extra: { name: 'ifb0', mtu: 1400, unknown: 'dropped by libcni' },
          };
          const primary: PluginConf = {
            type: 'primary',
            addresses: ['10.79.0.2/24', 'fd00:79::2/64'],
            gateways: ['10.79.0.1', 'fd00:79::1'],
          };
          return [who, node.list(version, primary, recorder, { ...recorder, extra: null })];
        }),
      ) as Record<'real' | 'alike', NetworkList>;
      const verbs = ['add', ...(version === '0.3.1' ? [] : ['check']), 'del', 'del', 'status', 'gc'];
      const rt = { ...pod.rt(), containerId: idOf(pod), capabilityArgs, args: ARGS };
      for (const verb of verbs) await must(verb, lists.real, pod, capabilityArgs);
      await node.runtime.add(lists.alike, rt);
      if (version !== '0.3.1') await node.runtime.check(lists.alike, rt);
      await node.runtime.del(lists.alike, rt);
      await node.runtime.del(lists.alike, rt);
      await node.runtime.status(lists.alike);
      await node.runtime.gc(lists.alike, undefined);
    }
    // Each run has its own MAC addresses and log, and the runtimes their own search paths.
    const seen = (log: string): unknown[] =>
      node.log(log).map((call) => {
        const plain = { ...call, env: { ...call.env, CNI_PATH: '' }, conf: { ...call.conf, log: '' } };
        return JSON.parse(JSON.stringify(plain).replace(/([0-9a-f]{2}:){5}[0-9a-f]{2}/g, 'MAC'));
      });
    expect(seen(logs.real).length).toBeGreaterThan(30);
    expect(seen(logs.alike)).toEqual(seen(logs.real));
  });

  test('what ours says about a failure reaches the operator', async () => {
    const list = node.list('1.0.0', { type: 'primary', kind: 'inside' }, node.ours());
    const { status, stderr, stdout } = await run('add', list, node.pod(), {});
    expect(status).toBe(1);
    expect(`${stdout}${stderr}`).toMatch(/type="ambient-redirect".*failed \(add\): .*eth0/);
  });
});
