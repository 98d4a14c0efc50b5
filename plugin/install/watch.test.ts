// SPDX-License-Identifier: Apache-2.0
// The conflist under other people's hands, on a real file system with inotify.

import { mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest';
import { until } from '../../conformance/netns.ts';
import { loadNative } from '../addon.ts';
import {
  type EntryOptions,
  installLocked,
  isUninstalled,
  markUninstalled,
  rememberInstall,
  unmarkUninstalled,
} from './entry.ts';
import { filesThatRefer } from './network-directory.ts';
import { ConflistWatch, type Pace } from './watch.ts';

const native = loadNative();
const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-watch-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

/** The periodic look is out of the way, so that what is seen was told by inotify. */
const pace: Pace = { settle: 5, first: 10, longest: 200, quiet: 60_000, period: 600_000 };
const entry = { type: 'ambient-redirect', enrollment: 'all' };

let netDir: string;
let runDir: string;
let watch: ConflistWatch | undefined;
let fights: string[];
let states: string[];
beforeEach(() => {
  netDir = mkdtempSync(join(root, 'net.d-'));
  runDir = mkdtempSync(join(root, 'run-'));
  fights = [];
  states = [];
});
afterEach(() => watch?.stop());

function start(more: Partial<EntryOptions> = {}, otherPace: Partial<Pace> = {}): ConflistWatch {
  rememberInstall(runDir, { netDir, groupRead: false, wanted: { entry }, ...more });
  watch = new ConflistWatch(native, runDir, { ...pace, ...otherPace });
  watch.on('fighting', (sentence) => fights.push(sentence));
  watch.on('state', ({ entry }) => states.push(entry));
  watch.start();
  return watch;
}

const conflist = (...types: string[]) =>
  JSON.stringify({ cniVersion: '1.0.0', name: 'pods', plugins: types.map((type) => ({ type })) }, null, 2);

/** As a careful installer writes: whole, by rename. */
function put(name: string, text: string): void {
  writeFileSync(join(netDir, `.new-${name}`), text);
  renameSync(join(netDir, `.new-${name}`), join(netDir, name));
}

const types = (name: string): string[] => {
  const { plugins } = JSON.parse(readFileSync(join(netDir, name), 'utf8')) as { plugins: { type: string }[] };
  return plugins.map(({ type }) => type);
};
const repaired = (name: string, expected: string[]) =>
  until(`${name} is ${expected}`, () => {
    try {
      return JSON.stringify(types(name)) === JSON.stringify(expected);
    } catch {
      return false; // half-written
    }
  });

test('it is there when start returns', () => {
  put('10.conflist', conflist('ptp'));
  expect(start().state).toMatchObject({ entry: 'there', file: '10.conflist', repairs: 1 });
  expect(types('10.conflist')).toEqual(['ptp', 'ambient-redirect']);
});

describe('repairs', () => {
  beforeEach(() => {
    put('10.conflist', conflist('ptp'));
    start();
  });

  test('a list that was written anew without us', async () => {
    put('10.conflist', conflist('ptp', 'portmap'));
    await repaired('10.conflist', ['ptp', 'portmap', 'ambient-redirect']);
  });

  test('a list that is written in pieces', async () => {
    const text = conflist('ptp', 'portmap');
    writeFileSync(join(netDir, '10.conflist'), text.slice(0, 20));
    await until('it was looked at', () => watch?.state.entry === 'absent');
    writeFileSync(join(netDir, '10.conflist'), text);
    await repaired('10.conflist', ['ptp', 'portmap', 'ambient-redirect']);
  });

  test('our entry with another setting, or twice, or first', async () => {
    const list = JSON.parse(conflist('ptp'));
    put('10.conflist', JSON.stringify({ ...list, plugins: [{ type: 'ptp' }, { ...entry, enrollment: 'annotation' }] }));
    await until('the setting is back', () => readFileSync(join(netDir, '10.conflist'), 'utf8').includes('"all"'));
    put('10.conflist', JSON.stringify({ ...list, plugins: [entry, { type: 'ptp' }, entry] }));
    await repaired('10.conflist', ['ptp', 'ambient-redirect']);
  });

  test('a list that was renamed', async () => {
    renameSync(join(netDir, '10.conflist'), join(netDir, '20.conflist'));
    writeFileSync(join(netDir, '20.conflist'), conflist('bridge'));
    await repaired('20.conflist', ['bridge', 'ambient-redirect']);
  });

  test('a new list that is read before', async () => {
    put('05.conflist', conflist('bridge'));
    await repaired('05.conflist', ['bridge', 'ambient-redirect']);
    rmSync(join(netDir, '05.conflist'));
    await until('the other one counts again', () => watch?.state.file === '10.conflist');
  });

  test('a list that became a lone configuration, and one again', async () => {
    put('10.conf', JSON.stringify({ cniVersion: '1.0.0', name: 'pods', type: 'bridge' }));
    rmSync(join(netDir, '10.conflist'));
    await repaired('10.conflist', ['bridge', 'ambient-redirect']);
    await until('the lone one is gone', () => !readdirSync(netDir).includes('10.conf'));
    put('10.conflist', conflist('ptp'));
    await repaired('10.conflist', ['ptp', 'ambient-redirect']);
  });

  test('the list goes and comes back', async () => {
    rmSync(join(netDir, '10.conflist'));
    await until('it is missed', () => watch?.state.entry === 'absent');
    expect(watch?.state.reason).toBe(`${netDir} does not have a network configuration of a primary plugin`);
    put('10.conflist', conflist('ptp'));
    await repaired('10.conflist', ['ptp', 'ambient-redirect']);
    expect(states).toEqual(['there', 'absent', 'there']);
  });
});

test('rewritten 100 times: it ends repaired, it did not spin, and it says who fights', async () => {
  put('10.conflist', conflist('ptp'));
  start();
  for (let round = 0; round < 100; round++) {
    put('10.conflist', conflist('ptp', 'istio-cni', `acme-${round}`));
    const { looks } = watch?.state ?? { looks: 0 };
    // Each round it had the time to look, so that the rewrites do not fall together into a few.
    if (round < 20) await until('it looked', () => (watch?.state.looks ?? 0) > looks);
  }
  await repaired('10.conflist', ['ptp', 'istio-cni', 'acme-99', 'ambient-redirect']);
  const { repairs, looks } = watch?.state ?? { repairs: 0, looks: 0 };
  expect(repairs).toBeGreaterThan(5);
  // Each repair is seen as a change itself.
  expect(looks).toBeLessThanOrEqual(2 * 101);
  expect(fights).toEqual([
    `${netDir}/10.conflist was changed back 5 times in a row: the istio-cni node agent may write it again and again; ` +
      'repairs are slowed down. An owned conflist (ISTIO_OWNED_CNI_CONFIG=true) leaves the file to it',
  ]);
});

test('who writes it back at once, for ever, gets a slower and slower answer', async () => {
  put('10.conflist', conflist('ptp'));
  const fought = start({}, { first: 20, longest: 80 });
  // The other side is as quick as can be: it answers within our own repair.
  const times: number[] = [];
  fought.on('repaired', () => {
    times.push(performance.now());
    put('10.conflist', conflist('ptp', 'portmap'));
  });
  put('10.conflist', conflist('ptp', 'portmap'));
  await until('six repairs', () => times.length >= 6);
  fought.removeAllListeners('repaired');
  const pauses = times.slice(1).map((time, i) => time - (times[i] ?? 0));
  // Timers fire no earlier than they are due (to the millisecond).
  for (const [i, least] of [40, 80, 80, 80].entries()) expect(pauses[i]).toBeGreaterThanOrEqual(least - 2);
});

test('repairs with quiet times between them are no fight', async () => {
  put('10.conflist', conflist('ptp'));
  const calm = start({}, { first: 5, quiet: 30, period: 20 });
  for (let round = 0; round < 8; round++) {
    put('10.conflist', conflist('ptp', `acme-${round}`));
    await repaired('10.conflist', ['ptp', `acme-${round}`, 'ambient-redirect']);
    const { looks } = calm.state;
    // 20 ms lie between each look and the next.
    await until('a quiet time', () => calm.state.looks > looks + 3);
  }
  expect([calm.state.repairs, fights]).toEqual([9, []]);
});

test('a change that inotify does not tell of is found by the periodic look', async () => {
  mkdirSync(join(netDir, 'sub'));
  put('10.conflist', conflist('ptp'));
  start({}, { period: 20 });
  // The watch is on the inode that is now elsewhere.
  renameSync(netDir, `${netDir}-old`);
  mkdirSync(netDir);
  writeFileSync(join(netDir, '10.conflist'), conflist('bridge'));
  await repaired('10.conflist', ['bridge', 'ambient-redirect']);
});

test('there is no directory yet', async () => {
  rmSync(netDir, { recursive: true });
  const early = start({}, { period: 20 });
  expect(early.state.entry).toBe('absent');
  mkdirSync(netDir);
  put('10.conflist', conflist('ptp'));
  await repaired('10.conflist', ['ptp', 'ambient-redirect']);
});

test('istio-cni in ambient mode comes: said, nothing written', async () => {
  put('10.conflist', conflist('ptp'));
  start();
  const istio = JSON.stringify({
    cniVersion: '1.0.0',
    name: 'pods',
    plugins: [{ type: 'ptp' }, { type: 'istio-cni', ambient_enabled: true }],
  });
  put('10.conflist', istio);
  await until('it is said', () => watch?.state.entry === 'failed');
  expect(watch?.state.reason).toContain('10.conflist has an entry of istio-cni with ambient_enabled');
  expect(readFileSync(join(netDir, '10.conflist'), 'utf8')).toBe(istio);
});

test('uninstall is not worked against, until somebody installs', async () => {
  put('10.conflist', conflist('ptp'));
  start({}, { period: 20 });
  markUninstalled(runDir);
  put('10.conflist', conflist('ptp'));
  await until('it knows', () => watch?.state.entry === 'uninstalled');
  expect([filesThatRefer(netDir), isUninstalled(runDir)]).toEqual([[], true]);
  unmarkUninstalled(runDir);
  await until(
    'it does not know of an install',
    () => watch?.state.reason === 'install was not run since this node booted',
  );
  rememberInstall(runDir, { netDir, groupRead: false, wanted: { entry } });
  await repaired('10.conflist', ['ptp', 'ambient-redirect']);
});

test('an install with other settings is followed', async () => {
  put('10.conflist', conflist('ptp'));
  start({}, { period: 20 });
  rememberInstall(runDir, { netDir, groupRead: false, ownedName: '01.conflist', wanted: { entry } });
  await repaired('01.conflist', ['ptp', 'ambient-redirect']);
  await repaired('10.conflist', ['ptp']);
});

test('while an install is at work it waits its turn', async () => {
  put('10.conflist', conflist('ptp'));
  const waiting = installLocked(native, runDir, () => {
    const begun = start();
    expect(begun.state).toMatchObject({ entry: 'unknown', repairs: 0 });
    return begun;
  });
  await until('its turn', () => waiting.state.entry === 'there');
});

test('stopped it does nothing any more', async () => {
  put('10.conflist', conflist('ptp'));
  const stopped = start({}, { period: 5 });
  stopped.stop();
  const { looks } = stopped.state;
  put('10.conflist', conflist('ptp'));
  rememberInstall(runDir, { netDir, groupRead: false, confName: 'none.conflist', wanted: { entry } });
  const other = new ConflistWatch(native, runDir, { ...pace, period: 5 });
  other.start();
  // Another watch of the same directory has looked some times meanwhile.
  await until('time has passed', () => other.state.looks > 5);
  other.stop();
  expect(stopped.state.looks).toBe(looks);
  expect(types('10.conflist')).toEqual(['ptp']);
});
