// SPDX-License-Identifier: Apache-2.0
// The agent beside what install put in place: it keeps the entry, ends without taking anything away, and stands aside
// when uninstall is run.
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest';
import { isDirect, Mesh } from '../e2e/mesh.ts';
import { executable, families } from '../e2e/topology.ts';
import { type Running, until } from '../netns.ts';

const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-agent-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

const primary = '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"}]}';

let mesh: Mesh;
let netDir: string;
let binDir: string;
let file: string;
let agent: Running;
beforeEach(async () => {
  mesh = await Mesh.start();
  netDir = mkdtempSync(join(root, 'net.d-'));
  binDir = mkdtempSync(join(root, 'bin-'));
  file = join(netDir, '10.conflist');
  writeFileSync(file, primary);
  await mesh.commanded('install', '--cni-net-dir', netDir, '--cni-bin-dir', binDir);
});
afterEach(() => mesh?.close());

function startAgent(...more: string[]): Running {
  const { testbed, node, stateDir, runDir } = mesh.topology;
  const options = ['--state-dir', stateDir, '--run-dir', runDir, '--zds-socket', join(root, 'ztunnel.sock')];
  const ports = ['--monitoring-port', '0', '--health-port', '0', '--reconcile-seconds', '1'];
  agent = testbed.start(node.argv([executable, 'agent', ...options, ...ports, ...more]));
  return agent;
}

const served = () => until('the agent serves', () => agent.output.includes('the agent serves'), 20_000);
const types = () =>
  (JSON.parse(readFileSync(file, 'utf8')) as { plugins: { type: string }[] }).plugins.map(({ type }) => type);
const expectRedirected = async (redirected: boolean) => {
  for (const family of families) {
    expect(await mesh.goesDirect('client', mesh.address('outsider', family))).toBe(!redirected);
  }
};

describe('ends and leaves everything in place', () => {
  test.each(['SIGTERM', 'SIGKILL'] as const)('%s', async (signal) => {
    startAgent();
    await served();
    const held = await mesh.connect('client', mesh.address('outsider', 4));
    const before = [readFileSync(file, 'utf8'), readdirSync(binDir), readdirSync(mesh.topology.stateDir)];
    agent.kill(signal);
    await agent.ended;
    expect([readFileSync(file, 'utf8'), readdirSync(binDir), readdirSync(mesh.topology.stateDir)]).toEqual(before);
    expect(isDirect(held)).toBe(false);
    await mesh.exchanged(held, 'client');
    await expectRedirected(true);
  });
});

test('it keeps the entry that install made, and says so', async () => {
  startAgent();
  await served();
  writeFileSync(file, primary);
  await until('the entry is back', () => types().includes('ambient-redirect'), 20_000);
  expect(types()).toEqual(['ptp', 'ambient-redirect']);
  await until('it is said', () => agent.output.includes('the entry was put into the conflist'));
});

test('uninstall while it runs: neither entry nor programs come back', async () => {
  startAgent();
  await served();
  await mesh.commanded('uninstall', '--cni-net-dir', netDir, '--cni-bin-dir', binDir, '--executable-delay', '0');
  expect(types()).toEqual(['ptp']);
  await until('the agent knows', () => agent.output.includes('uninstall was run on this node'), 20_000);
  // Written by somebody, and its own period comes round: nothing of it leads to a repair.
  writeFileSync(file, primary);
  const state = () => JSON.stringify([types(), existsSync(mesh.topology.stateDir), readdirSync(binDir)]);
  const lines = agent.output.length;
  await mesh.commanded('status').catch(() => {});
  expect(state()).toBe(JSON.stringify([['ptp'], false, []]));
  await expectRedirected(false);
  expect(agent.output.slice(lines)).not.toContain('put into the conflist');
  agent.kill('SIGTERM');
  await agent.ended;
  expect(state()).toBe(JSON.stringify([['ptp'], false, []]));
});

test('config.json is as Istio 1.20 wrote it, and the line comes when the proxy listens', async () => {
  const directory = join(root, 'ambient-config');
  startAgent('--redirect-mode', 'eBPF', '--ambient-config-dir', directory);
  const line = 'ambient Writing ambient config: {\\"ztunnelReady\\":true,\\"redirectMode\\":\\"eBPF\\"}';
  await until('the line', () => agent.output.includes(line), 20_000);
  const config = () => readFileSync(join(directory, 'config.json'), 'utf8');
  expect(config()).toBe('{"ztunnelReady":true,"redirectMode":"ebpf"}');
  await mesh.haproxy.kill();
  await until('the file says that it is gone', () => config().includes('"ztunnelReady":false'), 10_000);
  await mesh.haproxy.start();
  await until('and that it is back', () => config().includes('"ztunnelReady":true'), 10_000);
  expect(agent.output.split(line).length - 1).toBe(1);
});

test('a port that somebody has is named, and the agent ends', async () => {
  const { node } = mesh.topology;
  const taken = mesh.topology.testbed.start(
    node.argv([
      process.execPath,
      '-e',
      "require('net').createServer().listen(18000,'127.0.0.1',()=>console.log('taken'))",
    ]),
  );
  await until('the port is taken', () => taken.output.includes('taken'));
  startAgent('--address', '127.0.0.1', '--health-port', '18000');
  await agent.ended;
  expect(agent.output).toContain('the agent cannot run');
  expect(agent.output).toMatch(/EADDRINUSE.*18000/);
});
