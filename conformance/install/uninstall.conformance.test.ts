// SPDX-License-Identifier: Apache-2.0
// `uninstall` under traffic, and cut short by kill -9 after each of its steps.
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeEach, expect, test } from 'vitest';
import { isDirect, Mesh } from '../e2e/mesh.ts';
import { executable, families } from '../e2e/topology.ts';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { exec, until } from '../netns.ts';

const steps = fileURLToPath(new URL('../../plugin/install/steps.testing.ts', import.meta.url));
const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-uninstall-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

const conflist = '{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"ptp"},{"type":"ambient-redirect"}]}';

let mesh: Mesh;
let netDir: string;
let binDir: string;
beforeEach(async () => {
  mesh = await Mesh.start();
  netDir = mkdtempSync(join(root, 'net.d-'));
  binDir = mkdtempSync(join(root, 'bin-'));
  writeFileSync(join(netDir, '10.conflist'), conflist);
  writeFileSync(join(binDir, 'ambient-redirect'), '');
});
afterEach(() => mesh?.close());

const uninstall = (...more: string[]) =>
  mesh.command('uninstall', '--cni-net-dir', netDir, '--cni-bin-dir', binDir, '--executable-delay', '0', ...more);

async function expectGone(before: KernelState): Promise<void> {
  expect(readFileSync(join(netDir, '10.conflist'), 'utf8')).toBe(conflist.replace(',{"type":"ambient-redirect"}', ''));
  expect(readdirSync(binDir)).toEqual([]);
  const left = readdirSync(mesh.topology.runDir).filter((name) => name !== 'migration.lock');
  expect(left.sort()).toEqual(['install.lock', 'lock', 'uninstalled']);
  expect(differences(before, await state())).toEqual([]);
  for (const family of families) {
    expect(await mesh.goesDirect('client', mesh.address('server', family))).toBe(true);
    expect(await mesh.goesDirect('outsider', mesh.address('client', family))).toBe(true);
  }
}

const state = () =>
  kernelState([mesh.topology.node, mesh.client.netns, mesh.server.netns, mesh.proxy.netns], { pins: [] });

test('connections through the proxy go on until they end, and then everything goes', async () => {
  const held = await mesh.connect('client', mesh.address('outsider', 4));
  expect(isDirect(held)).toBe(false);
  const leaving = uninstall('--drain-timeout', '60');
  const exchanges = async () => {
    for (let i = 0; i < 20; i++) await mesh.endpoint('client').exchange(held, 50_000);
    await mesh.exchanged(held, 'client');
  };
  const [outcome] = await Promise.all([leaving, exchanges()]);
  expect(outcome).toMatchObject({ status: 0, stderr: '' });
  expect(outcome.stdout).toContain('2 pods unenrolled');
  expect(await mesh.goesDirect('client', mesh.address('outsider', 4))).toBe(true);
});

test('after the time that it is given it cuts, and says how many', async () => {
  const held = await mesh.connect('client', mesh.address('outsider', 6));
  expect(isDirect(held)).toBe(false);
  const outcome = await uninstall('--drain-timeout', '0');
  expect(outcome).toMatchObject({
    status: 0,
    stderr: expect.stringMatching(/^\d+ connections? through the proxy cut\n$/),
  });
  expect(await mesh.goesDirect('client', mesh.address('outsider', 6))).toBe(true);
});

test('the executable stays while any file names it, and goes when none does', async () => {
  const broken = join(netDir, '50-broken.conflist');
  writeFileSync(broken, '{"type":"ambient-redirect"');
  expect(await uninstall()).toMatchObject({
    status: 0,
    stderr: `${binDir}/ambient-redirect stays: ${broken} still names it\n`,
  });
  expect(readdirSync(binDir)).toEqual(['ambient-redirect']);
  rmSync(broken);
  expect(await uninstall()).toMatchObject({ status: 0, stderr: '' });
  expect(readdirSync(binDir)).toEqual([]);
});

test("CRI-O calls DEL with its cache's configuration: the executable stays until no pod there names it", async () => {
  const { stateDir, runDir } = mesh.topology;
  const cniCacheDir = mkdtempSync(join(root, 'cache-'));
  const cached = join(cniCacheDir, 'results', 'pods-1234-eth0');
  mkdirSync(join(cniCacheDir, 'results'));
  writeFileSync(cached, JSON.stringify({ kind: 'cniCacheV1', config: Buffer.from(conflist).toString('base64') }));
  writeFileSync(join(cniCacheDir, 'results', 'other'), 'no JSON');
  const options = { stateDir, runDir, netDir, binDir, drainTimeout: 0, executableDelay: 0, cniCacheDir };
  const run = async (crioSocket: string) => {
    const more = JSON.stringify({ ...options, crioSocket });
    const outcome = await exec(mesh.topology.node.argv([process.execPath, steps, 'uninstall', more]));
    expect(outcome, outcome.stderr).toMatchObject({ status: 0 });
    return readdirSync(binDir);
  };
  expect(await run(cniCacheDir)).toEqual(['ambient-redirect']);
  rmSync(cached);
  expect(await run(cniCacheDir)).toEqual([]);
  // Without CRI-O the cache is of no interest: containerd calls DEL with the list that is there.
  writeFileSync(join(binDir, 'ambient-redirect'), '');
  writeFileSync(cached, JSON.stringify({ config: Buffer.from(conflist).toString('base64') }));
  expect(await run('/nowhere.sock')).toEqual([]);
});

test('kill -9 after each step: the next uninstall finishes', async () => {
  const { topology } = mesh;
  const { stateDir, runDir } = topology;
  const options = { stateDir, runDir, netDir, binDir, drainTimeout: 5, executableDelay: 0, cniCacheDir: '/nowhere' };
  /** Goes on to the end, or to step `last`; returns the steps done. */
  const run = async (last: number): Promise<string[]> => {
    const argv = topology.node.argv([process.execPath, steps, 'uninstall', JSON.stringify(options), `${last}`]);
    const { status, signal, stdout, stderr } = await exec(argv);
    expect({ stderr, status, signal }).toEqual({
      stderr: '',
      status: last ? null : 0,
      signal: last ? 'SIGKILL' : null,
    });
    return stdout.trim().split('\n');
  };
  const enrolled = async () => {
    writeFileSync(join(netDir, '10.conflist'), conflist);
    writeFileSync(join(binDir, 'ambient-redirect'), '');
    await mesh.commanded('proxy', 'set', '--netns', mesh.proxy.netns.path);
    for (const pod of [mesh.client, mesh.server]) {
      await mesh.commanded('enroll', '--netns', pod.netns.path, '--pod', `default/${pod.label}`);
    }
    for (const family of families) expect(await mesh.goesDirect('client', mesh.address('server', family))).toBe(false);
  };
  await run(0);
  const empty = await state();
  await enrolled();
  const all = await run(0);
  expect(all).toContain('draining');
  await expectGone(empty);
  for (let last = 1; last < all.length; last++) {
    await enrolled();
    expect((await run(last)).length).toBe(last);
    await run(0);
    await expectGone(empty);
  }
}, 120_000);

test('it tells an executable that it removed from one that is not there, and from a directory that it does not see', async () => {
  const path = `${binDir}/ambient-redirect`;
  const last = (stdout: string) => stdout.trimEnd().split('\n').at(-1);
  const first = await uninstall();
  expect(first).toMatchObject({ status: 0, stderr: '' });
  expect(last(first.stdout)).toBe(`removed ${path}`);
  const second = await uninstall();
  expect(second).toMatchObject({ status: 0, stderr: '' });
  expect(last(second.stdout)).toBe(`${path}: not there`);
  rmSync(binDir, { recursive: true });
  const third = await uninstall();
  expect(third).toMatchObject({
    status: 0,
    stderr: `${binDir} does not exist here: if the node has ${path}, it stays\n`,
  });
  expect(last(third.stdout)).toBe('0 pods unenrolled');
});

test('--stay: what an install puts in place afterwards goes, too, until it is ended', async () => {
  const { testbed, node, stateDir, runDir } = mesh.topology;
  const directories = ['--state-dir', stateDir, '--run-dir', runDir, '--cni-net-dir', netDir, '--cni-bin-dir', binDir];
  const staying = testbed.start(
    node.argv([executable, 'uninstall', ...directories, '--executable-delay', '0', '--stay']),
  );
  const left = () => staying.output.match(/^.*bin-\w+\/ambient-redirect.*$/gm) ?? [];
  await until('the node is left', () => left().length === 1, 20_000);
  await mesh.commanded('install', '--cni-net-dir', netDir, '--cni-bin-dir', binDir);
  await until('and again', () => left().length === 2, 20_000);
  expect(left()).toEqual(Array(2).fill(`removed ${binDir}/ambient-redirect`));
  expect(readFileSync(join(netDir, '10.conflist'), 'utf8')).not.toContain('ambient-redirect');
  expect(readdirSync(binDir)).toEqual([]);
  await staying.stop('SIGTERM');
  // Nobody is there any more who would take it away.
  await mesh.commanded('install', '--cni-net-dir', netDir, '--cni-bin-dir', binDir);
  expect(readdirSync(binDir)).toContain('ambient-redirect');
  expect(left().length).toBe(2);
});
