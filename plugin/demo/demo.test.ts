// SPDX-License-Identifier: Apache-2.0
// The demo as a person runs it, and the command line on the state of one that was kept: real namespaces, programs and
// traffic. Runs from source; conformance/ has the executable.

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { loadNative } from '../addon.ts';
import { removeDemo } from './demo.ts';
import type { DemoNative } from './native-topology.ts';
import { listDemos, livingOwner, pathsOf, Topology } from './topology.ts';
import { requestEcho } from './traffic.ts';

const MAIN = join(import.meta.dirname, '../main.ts');
const native = loadNative() as DemoNative;

/** Names of demos that this file's processes made. */
const own = new Set<string>();
const children = new Set<ChildProcess>();
afterEach(async () => {
  for (const child of children) child.kill('SIGKILL');
  children.clear();
});
afterAll(async () => {
  for (const name of listDemos()) if (own.has(name)) await removeDemo(native, name);
});

/** What the demo could leave in the host's namespaces. */
function surroundings(): unknown {
  return {
    links: readFileSync('/proc/net/dev', 'utf8').match(/^ *[^:\n]+(?=:)/gm),
    mounts: readFileSync('/proc/self/mountinfo', 'utf8')
      .split('\n')
      .filter((line) => [...own].some((name) => line.includes(name))),
    demos: listDemos().filter((name) => own.has(name)),
    processes: readdirSync('/proc').filter(
      (pid) => /^\d+$/.test(pid) && [...own].some((name) => commandLine(pid).includes(name)),
    ),
  };
}

function commandLine(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8');
  } catch {
    return '';
  }
}

function start(args: readonly string[], netns = -1): ChildProcess {
  const child = native.inNetns(netns, () =>
    spawn(process.execPath, [MAIN, ...args], { stdio: ['ignore', 'pipe', 'pipe'], timeout: 50_000 }),
  );
  children.add(child);
  if (args[0] === 'demo' && args[1] !== '--remove') own.add(`ambient-redirect-demo-${child.pid}`);
  return child;
}

async function outcome(child: ChildProcess): Promise<{ code: number | null; out: string; err: string }> {
  if (child.stdout === null || child.stderr === null) throw new Error('no pipes');
  const ended = once(child, 'close');
  const [out, err] = await Promise.all([text(child.stdout), text(child.stderr)]);
  const [code] = await ended;
  return { code, out, err };
}

async function until(what: string, condition: () => boolean): Promise<void> {
  for (const deadline = performance.now() + 20_000; !condition(); ) {
    if (performance.now() > deadline) throw new Error(`${what}: not within 20 s`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

describe.each([
  ['shared', 'both', 18],
  ['shared', '4', 9],
  ['shared', '6', 9],
  ['in-pod', 'both', 16],
  ['in-pod', '6', 8],
])('demo --contract %s --family %s', (contract, family, rows) => {
  test(`all ${rows} rows are right, and nothing stays`, async () => {
    const before = surroundings();
    const { code, out, err } = await outcome(start(['demo', '--contract', contract, '--family', family]));
    expect({ code, err, last: out.trimEnd().split('\n').at(-1) }).toEqual({
      code: 0,
      err: '',
      last: `${rows} of ${rows} rows right.`,
    });
    expect(out.match(/ right$/gm)).toHaveLength(rows);
    expect(out).not.toContain('\u001b');
    expect(surroundings()).toEqual(before);
  });
});

describe('a demo that is interrupted leaves nothing', () => {
  const moments: readonly [string, (child: ChildProcess) => Promise<void>][] = [
    ['while it is set up', (child) => until('directory', () => existsSync(`/run/ambient-redirect-demo-${child.pid}`))],
    [
      'within the first ADD',
      (child) => until('state', () => existsSync(pathsOf(`ambient-redirect-demo-${child.pid}`).stateDir)),
    ],
    [
      'between requests',
      (child) =>
        until('records', () => existsSync(join(pathsOf(`ambient-redirect-demo-${child.pid}`).stateDir, 'links'))),
    ],
  ];
  test.each(
    moments.flatMap(([when, moment]) => [
      ['SIGINT', 130, when, moment] as const,
      ['SIGTERM', 143, when, moment] as const,
    ]),
  )('%s (exit %i) %s', async (signal, expected, _when, moment) => {
    const before = surroundings();
    const child = start(['demo', '--family', '4']);
    const ended = outcome(child);
    await moment(child);
    child.kill(signal);
    const { code, out, err } = await ended;
    expect({ code, err, finished: out.includes('rows right') }).toEqual({ code: expected, err: '', finished: false });
    expect(surroundings()).toEqual(before);
  });

  test('the agent and ztunnel of the contract in-pod among them', async () => {
    const before = surroundings();
    const child = start(['demo', '--contract', 'in-pod', '--family', '4']);
    const ended = outcome(child);
    const name = `ambient-redirect-demo-${child.pid}`;
    await until('records', () => existsSync(join(pathsOf(name).stateDir, 'links')));
    child.kill('SIGTERM');
    expect((await ended).code).toBe(143);
    await until('no process', () => !readdirSync('/proc').some((pid) => commandLine(pid).includes(name)));
    expect(surroundings()).toEqual(before);
  });

  test.each(['shared', 'in-pod'])('SIGKILL: the next one takes away what is left (%s)', async (contract) => {
    const before = surroundings();
    const child = start(['demo', '--contract', contract, '--family', '4']);
    const ended = outcome(child);
    await until('state', () => existsSync(pathsOf(`ambient-redirect-demo-${child.pid}`).stateDir));
    child.kill('SIGKILL');
    await ended;
    expect(listDemos()).toContain(`ambient-redirect-demo-${child.pid}`);
    expect((await outcome(start(['demo', '--family', '4']))).code).toBe(0);
    expect(surroundings()).toEqual(before);
  });
});

describe('the command line on a demo that was kept', () => {
  let name: string;
  let topology: Topology;
  let options: string[];
  let before: unknown;

  beforeAll(async () => {
    before = surroundings();
    const child = start(['demo', '--keep']);
    name = `ambient-redirect-demo-${child.pid}`;
    const { code, out, err } = await outcome(child);
    expect({ code, err }).toEqual({ code: 0, err: '' });
    expect(out).toContain(`demo --remove ${name}\n`);
    topology = Topology.open(native, name);
    options = ['--state-dir', topology.paths.stateDir, '--run-dir', topology.paths.runDir];
  });

  /** In the node's namespace, as the command line on a node. */
  async function cli(...args: string[]) {
    return outcome(start([...args, ...options], topology.places.node.netns));
  }

  async function json(...args: string[]) {
    const { out } = await cli(...args, '-o', 'json');
    return JSON.parse(out);
  }

  const toServer = () => requestEcho(native, topology.places.client.netns, '192.0.2.3', 8080);

  test('status', async () => {
    const { code, out, err } = await cli('status');
    expect({ code, err }).toEqual({ code: 0, err: '' });
    expect(out).toMatch(/^proxy {5}demo-mesh\/proxy: shared, netns .*\n {10}port 15001 outbound: listening\n/m);
    expect(out).toMatch(/^pods {6}2 enrolled, 0 seen and not enrolled\n/m);
    expect(out).toMatch(/^problems {2}none\n/m);
    expect(await json('status')).toMatchObject({
      state: { present: true },
      pods: { enrolled: 2, proxies: 1, recorded: 0, attaching: 0 },
      proxies: [{ name: 'demo-mesh/proxy', present: true }],
      problems: [],
    });
  });

  test('pods', async () => {
    const pods = await json('pods');
    expect(pods).toMatchObject([
      { namespace: 'demo-mesh', name: 'proxy', role: 'proxy', programs: { alive: 4 } },
      {
        namespace: 'demo',
        name: 'client',
        interface: 'eth0',
        addresses: ['192.0.2.2', '2001:db8:1::2'],
        role: 'pod',
        contract: 'shared',
        state: 'attached',
        failurePolicy: 'closed',
        hostInterface: { name: 'veth-client', present: true },
        programs: { alive: 2, attached: [{ program: 'pod_egress' }, { program: 'pod_ingress' }] },
        drops: 0,
      },
      { namespace: 'demo', name: 'server', role: 'pod', programs: { alive: 2 } },
    ]);
    const { out } = await cli('pods', '-o', 'wide');
    expect(out).toMatch(/^demo\/client .* 2\/2 .* veth-client +(tcx|clsact) +closed +demo /m);
  });

  test('counters, of one pod and of all', async () => {
    await toServer();
    const names = (list: { pod: string }[]) => [...new Set(list.map(({ pod }) => pod))].sort();
    expect(names(await json('counters'))).toEqual(['', 'client', 'proxy', 'server']);
    const client = await json('counters', '--pod', 'demo/client');
    expect(names(client)).toEqual(['client']);
    const find = (list: { reason: string; packets: number }[]) =>
      list.find(({ reason }) => reason === 'redirected_outbound')?.packets ?? 0;
    await toServer();
    expect(find(await json('counters', '--pod', 'demo/client'))).toBe(find(client) + 1);
    const { out } = await cli('counters', '-o', 'prometheus');
    expect(out).toMatch(
      /^ambient_redirect_packets_total\{program="pod_egress",namespace="demo",pod="client",reason="redirected_outbound"\} \d+$/m,
    );
  });

  test('unenroll lets a pod go direct, enroll takes it in again under the same key', async () => {
    const [before] = (await json('pods')).filter((pod: { name: string }) => pod.name === 'client');
    expect(await cli('unenroll', '--no-drain', '--pod', 'demo/client')).toMatchObject({
      code: 0,
      out: 'unenrolled demo/client: eth0 through veth-client\n',
    });
    expect(await json('pods')).toMatchObject([{}, { name: 'client', role: 'none', state: 'recorded' }, {}]);
    await toServer();
    expect(await json('counters', '--pod', 'demo/client')).toEqual([]);
    expect((await cli('status')).code).toBe(0);

    expect(await cli('enroll', '--netns', topology.places.client.path)).toMatchObject({
      code: 0,
      out: 'enrolled demo/client: eth0 (192.0.2.2, 2001:db8:1::2) through veth-client\n',
    });
    const [after] = (await json('pods')).filter((pod: { name: string }) => pod.name === 'client');
    expect(after).toMatchObject({ key: before.key, role: 'pod', state: 'attached', programs: { alive: 2 } });
    await toServer();
    expect(await json('counters', '--pod', 'demo/client')).toContainEqual(
      expect.objectContaining({ reason: 'redirected_outbound', packets: 1 }),
    );
  });

  test('enroll refuses another name for an interface that is recorded', async () => {
    const { code, err } = await cli('enroll', '--netns', topology.places.client.path, '--container-id', 'other');
    expect(code).toBe(1);
    expect(err).toMatch(
      /eth0 in .*\/client is already recorded: as demo\/client, container id client-\d+, not other\n$/,
    );
  });

  test('enroll refuses the node’s own namespace', async () => {
    const { code, err } = await cli('enroll', '--netns', topology.places.node.path);
    expect(code).toBe(1);
    expect(err).toContain("the plugin's own network namespace");
  });

  test('without a proxy: impaired, until there is one again', async () => {
    expect(await cli('proxy', 'clear')).toMatchObject({ code: 1, out: '' });
    expect(await cli('proxy', 'clear', '--netns', topology.places.proxy.path)).toMatchObject({ code: 0 });
    expect(await cli('status')).toMatchObject({
      code: 1,
      out: expect.stringMatching(
        /^problem {3}impaired: proxy: there is none: new connections of 2 pods are dropped\n/m,
      ),
    });
    expect(await cli('proxy', 'set', '--netns', topology.places.proxy.path, '--pod', 'mesh/zt')).toMatchObject({
      code: 0,
    });
    expect(await json('proxy', 'show')).toMatchObject([
      {
        name: 'mesh/zt',
        present: true,
        listeners: [{ kind: 'outbound', port: 15001, ipv4: 'listening', ipv6: 'listening' }, {}, {}],
      },
    ]);
    expect((await cli('status')).code).toBe(0);
    await toServer();
    expect(await cli('proxy', 'clear')).toMatchObject({ code: 0, out: 'proxy mesh/zt cleared\n' });
    expect(await cli('proxy', 'set', '--netns', topology.places.proxy.path)).toMatchObject({ code: 0 });
  });

  test('a program that somebody took away: impaired, and doctor says the same', async () => {
    const [pod] = (await json('pods')).filter(({ name: podName }: { name: string }) => podName === 'server');
    const pin = join(topology.paths.stateDir, 'links', pod.key, 'pod_ingress');
    expect(native.detachLink(pin)).toBe(true);
    const { code, out } = await cli('status');
    expect(code).toBe(1);
    expect(out).toMatch(
      /^problem {3}impaired: demo\/server: pod_ingress on egress of veth-server .*found no pinned link\n/m,
    );
    expect(await cli('pods')).toMatchObject({ out: expect.stringMatching(/^demo\/server .* 1\/2 /m) });
    const doctor = await json('doctor', '--conf-dir', '/nowhere');
    expect(doctor.findings).toContainEqual(expect.objectContaining({ level: 'fails', subject: 'demo/server' }));
    expect(await cli('enroll', '--netns', topology.places.server.path)).toMatchObject({ code: 0 });
    expect((await cli('status')).code).toBe(0);
  });

  test('doctor names somebody else’s filter on a pod’s interface', async () => {
    const { node } = topology.places;
    const link = native.linkByName(node.netns, 'veth-client');
    if (link === null) throw new Error('no veth-client');
    native.addClsact(node.netns, link.ifindex);
    // A program of ours that has no business there stands for one that is not ours.
    const pin = join(topology.paths.stateDir, 'programs', native.objectId, 'proxy_guard');
    const program = native.openProgram(pin);
    const filter = { priority: 9, handle: 1 };
    native.attachFilter(node.netns, link.ifindex, 'egress', program, { ...filter, name: 'theirs', replace: false });
    native.close(program);
    try {
      const { findings } = await json('doctor', '--conf-dir', '/nowhere');
      expect(findings).toContainEqual({
        level: 'note',
        subject: 'egress of veth-client',
        text: 'a bpf filter of priority 9 (theirs) is there too; ours lets on whatever it does not redirect or drop',
      });
    } finally {
      native.deleteFilter(node.netns, link.ifindex, 'egress', filter);
    }
  });

  test('a proxy that stops listening, comes back on IPv4 only, then without IP_TRANSPARENT', async () => {
    const server = livingOwner(topology.paths);
    if (server === undefined) throw new Error('nobody serves');
    process.kill(server, 'SIGTERM');
    await until('the proxy is gone', () => native.listeners(topology.places.proxy.netns).length === 0);
    const problems = async () => (await json('status')).problems.map(({ text }: { text: string }) => text);
    const dropped = 'new connections of 2 pods are dropped';
    expect(await problems()).toEqual(
      [4, 6].flatMap((family) =>
        ['15001 (outbound)', '15006 (inboundPlaintext)', '15008 (inboundHBONE)'].map(
          (port) => `no IPv${family} listener on port ${port}: ${dropped}`,
        ),
      ),
    );

    const listeners: number[] = [];
    const { netns } = topology.places.proxy;
    const common = { backlog: 1, reusePort: false, v6only: false, mark: 0 };
    try {
      for (const port of [15001, 15006, 15008]) {
        listeners.push(native.listenTransparent(netns, { ...common, family: 4, address: '0.0.0.0', port }));
      }
      expect(await problems()).toEqual(
        ['15001 (outbound)', '15006 (inboundPlaintext)', '15008 (inboundHBONE)'].map(
          (port) => `no IPv6 listener on port ${port}: ${dropped}`,
        ),
      );
      expect((await cli('status')).out).toContain('port 15001 outbound: listening on IPv4 only\n');
      native.close(listeners.shift() ?? -1);
      listeners.push(native.listenPlain(netns, { address: '::', port: 15001, backlog: 1 }));
      expect(await json('proxy', 'show')).toMatchObject([
        { listeners: [{ port: 15001, ipv4: 'not transparent', ipv6: 'not transparent' }, {}, {}] },
      ]);
      expect(await problems()).toContain(`the IPv4 listener on port 15001 is not transparent (outbound): ${dropped}`);
    } finally {
      for (const fd of listeners) native.close(fd);
    }
  });

  test('demo --remove takes it away, once', async () => {
    topology.close();
    expect(await outcome(start(['demo', '--remove', name]))).toEqual({ code: 0, out: `removed ${name}\n`, err: '' });
    expect(surroundings()).toEqual(before);
    expect((await outcome(start(['demo', '--remove', name]))).err).toContain(`no demo ${name} on this machine`);
  });
});
