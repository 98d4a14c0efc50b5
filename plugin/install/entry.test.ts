// SPDX-License-Identifier: Apache-2.0
// Directories as runtimes, primary plugins and people leave them, and what becomes of them.

import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  chownSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, test } from 'vitest';
import { isNetworkFileName } from './conflist.ts';
import { type EntryOptions, ensureEntry, removeEntries } from './entry.ts';
import { placeExecutable, removeExecutable } from './executable.ts';
import { filesThatRefer } from './network-directory.ts';

const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-entry-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

const entry = { type: 'ambient-redirect', enrollment: 'all' };
let netDir: string;
beforeEach(() => {
  netDir = mkdtempSync(join(root, 'net.d-'));
});

function options(more: Partial<EntryOptions> = {}): EntryOptions {
  return { netDir, confName: undefined, ownedName: undefined, groupRead: false, wanted: { entry }, ...more };
}

const conflist = (...types: string[]) =>
  `${JSON.stringify({ cniVersion: '1.0.0', name: 'pods', plugins: types.map((type) => ({ type })) }, null, 2)}\n`;
const lone = (type: string) => `${JSON.stringify({ cniVersion: '0.4.0', name: 'lone', type })}\n`;

function write(files: Readonly<Record<string, string>>): void {
  for (const [name, text] of Object.entries(files)) writeFileSync(join(netDir, name), text);
}

/** Every file, hidden ones too. */
function contents(directory = netDir): Record<string, string> {
  const names = readdirSync(directory).sort();
  return Object.fromEntries(names.map((name) => [name, readFileSync(join(directory, name), 'utf8')]));
}

/** The chain of each file; null: no list. */
function chains(): Record<string, string[] | null> {
  return Object.fromEntries(
    Object.entries(contents()).map(([name, text]) => {
      try {
        return [name, (JSON.parse(text).plugins as { type: string }[]).map(({ type }) => type)];
      } catch {
        return [name, null];
      }
    }),
  );
}

describe('which file', () => {
  test.each<[string, Record<string, string>, string | undefined, string]>([
    [
      'the first by name',
      { '20-b.conflist': conflist('ptp'), '10-a.conflist': conflist('ptp') },
      undefined,
      '10-a.conflist',
    ],
    [
      'the first by name, in bytes',
      { 'a.conflist': conflist('ptp'), 'B.conflist': conflist('ptp') },
      undefined,
      'B.conflist',
    ],
    ['not one that no runtime takes', { '05.conflist': '{', '10.conflist': conflist('ptp') }, undefined, '10.conflist'],
    ['not loopback', { '05-lo.conf': lone('loopback'), '10.conflist': conflist('ptp') }, undefined, '10.conflist'],
    [
      'not a stand-alone istio-cni',
      { '05.conf': lone('istio-cni'), '10.conflist': conflist('a') },
      undefined,
      '10.conflist',
    ],
    [
      'not what is no configuration',
      { '05.txt': conflist('ptp'), '10.conflist': conflist('a') },
      undefined,
      '10.conflist',
    ],
    [
      'a lone configuration that is first',
      { '05.conf': lone('bridge'), '10.conflist': conflist('a') },
      undefined,
      '05.conflist',
    ],
    ['the one named', { '05.conflist': conflist('a'), '10.conflist': conflist('b') }, '10.conflist', '10.conflist'],
    ['.conf named, .conflist there', { '10.conflist': conflist('b') }, '10.conf', '10.conflist'],
    ['.conflist named, .conf there', { '10.conf': lone('b') }, '10.conflist', '10.conflist'],
  ])('%s', (_what, files, confName, expected) => {
    write(files);
    expect(ensureEntry(options({ confName }))?.name).toBe(expected);
    expect(filesThatRefer(netDir)).toEqual([expected]);
  });

  test.each<[string, Record<string, string>, string | undefined]>([
    ['an empty directory', {}, undefined],
    ['loopback alone', { '99-lo.conf': lone('loopback') }, undefined],
    ['another than the one named', { '10.conflist': conflist('ptp') }, '20.conflist'],
    ['our entry alone', { '10.conflist': conflist('ambient-redirect') }, undefined],
  ])('none yet: %s', (_what, files, confName) => {
    write(files);
    expect(ensureEntry(options({ confName }))).toBeNull();
    expect(contents()).toEqual(files);
  });

  test('a directory and a dead link with such names are no files', () => {
    mkdirSync(join(netDir, '01.conflist'));
    symlinkSync('/nowhere', join(netDir, '02.conflist'));
    writeFileSync(join(netDir, '10.conflist'), conflist('ptp'));
    expect(ensureEntry(options())?.name).toBe('10.conflist');
  });

  test('a link becomes a file: runtimes do not see a change behind it', () => {
    const target = join(root, 'elsewhere.conflist');
    writeFileSync(target, conflist('ptp'));
    symlinkSync(target, join(netDir, '10.conflist'));
    ensureEntry(options());
    expect(chains()).toEqual({ '10.conflist': ['ptp', 'ambient-redirect'] });
    expect(readFileSync(target, 'utf8')).toBe(conflist('ptp'));
  });
});

describe('how', () => {
  test('mode and owner stay', () => {
    write({ '10.conflist': conflist('ptp'), '20.conf': lone('ptp') });
    for (const name of ['10.conflist', '20.conf']) {
      chownSync(join(netDir, name), 12, 34);
      chmodSync(join(netDir, name), 0o604);
    }
    ensureEntry(options());
    ensureEntry(options({ confName: '20.conf' }));
    for (const name of ['10.conflist', '20.conflist']) {
      const { mode, uid, gid } = statSync(join(netDir, name));
      expect([mode & 0o7777, uid, gid]).toEqual([0o604, 12, 34]);
    }
    removeEntries(netDir);
    const { mode, uid } = statSync(join(netDir, '20.conf'));
    expect([mode & 0o7777, uid]).toEqual([0o604, 12]);
  });

  test('a second time touches nothing', () => {
    write({ '10.conf': lone('ptp') });
    expect(ensureEntry(options())?.notes).toEqual(['made a list of 10.conf', 'added our entry']);
    const { ino, mtimeMs } = statSync(join(netDir, '10.conflist'));
    expect(ensureEntry(options())?.notes).toEqual([]);
    expect(statSync(join(netDir, '10.conflist'))).toMatchObject({ ino, mtimeMs });
  });

  test('what a kill left unfinished goes', () => {
    write({ '10.conflist': conflist('ptp'), '.10.conflist.ambient-redirect.4242': '{', '.keep': 'x' });
    ensureEntry(options());
    expect(Object.keys(contents())).toEqual(['.keep', '10.conflist']);
  });

  test('beside a foreign list of the name that a lone configuration would get: nothing', () => {
    const files = { '10.conf': lone('ptp'), '10.conflist': conflist('bridge') };
    write(files);
    expect(() => ensureEntry(options())).toThrow(
      '10.conf cannot become 10.conflist: there is another file of that name',
    );
    expect(contents()).toEqual(files);
  });

  test('the primary writes its lone configuration again: wrapped again, over our own list', () => {
    write({ '10.conf': lone('ptp') });
    ensureEntry(options());
    write({ '10.conf': lone('bridge') });
    ensureEntry(options());
    expect(chains()).toEqual({ '10.conflist': ['bridge', 'ambient-redirect'] });
  });

  test('another tool writes while we do: its change is not lost', () => {
    write({ '10.conflist': conflist('ptp') });
    let meddled = false;
    ensureEntry(options(), (step) => {
      if (meddled || !step.includes('unnamed')) return;
      meddled = true;
      writeFileSync(join(netDir, '.other'), conflist('ptp', 'portmap'));
      renameSync(join(netDir, '.other'), join(netDir, '10.conflist'));
    });
    expect(chains()).toEqual({ '10.conflist': ['ptp', 'portmap', 'ambient-redirect'] });
  });

  test('another tool that never stops is named as such', () => {
    write({ '10.conflist': conflist('ptp') });
    let round = 0;
    const meddle = (step: string) => {
      if (step.includes('unnamed')) write({ '10.conflist': conflist('ptp', `portmap${round++}`) });
    };
    expect(() => ensureEntry(options(), meddle)).toThrow(/10.conflist was changed while it was edited/);
    expect(Object.keys(contents())).toEqual(['10.conflist']);
  });
});

describe('a list of our own', () => {
  const ownedName = '02-ambient-redirect.conflist';

  test('is written before the primary, which stays as it is', () => {
    write({ '10.conflist': conflist('ptp') });
    expect(ensureEntry(options({ ownedName }))).toMatchObject({ name: ownedName, primary: '10.conflist' });
    expect(chains()).toEqual({ [ownedName]: ['ptp', 'ambient-redirect'], '10.conflist': ['ptp'] });
    const { mode, uid } = statSync(join(netDir, ownedName));
    expect([mode & 0o7777, uid]).toEqual([0o600, 0]);
    expect(ensureEntry(options({ ownedName }))?.notes).toEqual([]);
  });

  test('the group may read it', () => {
    write({ '10.conflist': conflist('ptp') });
    ensureEntry(options({ ownedName, groupRead: true }));
    expect(statSync(join(netDir, ownedName)).mode & 0o7777).toBe(0o640);
  });

  test('goes with the option, and under another name with the old one', () => {
    write({ '10.conf': lone('ptp') });
    ensureEntry(options({ ownedName }));
    ensureEntry(options({ ownedName: '01-first.conflist' }));
    expect(Object.keys(contents())).toEqual(['01-first.conflist', '10.conf']);
    ensureEntry(options());
    expect(chains()).toEqual({ '10.conflist': ['ptp', 'ambient-redirect'] });
    ensureEntry(options({ ownedName }));
    expect(contents()).toMatchObject({ '10.conf': lone('ptp') });
    removeEntries(netDir);
    expect(contents()).toEqual({ '10.conf': lone('ptp') });
  });

  test('must be read first', () => {
    write({ '01.conflist': conflist('ptp') });
    expect(() => ensureEntry(options({ ownedName }))).toThrow('would be read after 01.conflist');
  });

  test("is never somebody else's file", () => {
    write({ [ownedName]: conflist('bridge'), '10.conflist': conflist('ptp') });
    expect(() => ensureEntry(options({ ownedName, confName: '10.conflist' }))).toThrow('is not ours');
  });
});

describe('leaving', () => {
  test('every file is as it was', () => {
    const files = {
      '05.conf': lone('ptp'),
      '10.conflist': conflist('bridge', 'portmap'),
      '20.conflist': JSON.stringify({ name: 'n', plugins: [{ type: 'ptp' }] }),
      '30.conflist': '{ broken',
      '40.txt': 'ambient-redirect',
    };
    write(files);
    ensureEntry(options());
    for (const confName of ['10.conflist', '20.conflist']) ensureEntry(options({ confName }));
    expect(filesThatRefer(netDir)).toEqual(['05.conflist', '10.conflist', '20.conflist']);
    removeEntries(netDir);
    expect(contents()).toEqual(files);
    expect(filesThatRefer(netDir)).toEqual([]);
    expect(removeEntries(netDir)).toEqual([]);
  });

  test('a lone configuration that is there again is not written over', () => {
    write({ '10.conf': lone('ptp') });
    ensureEntry(options());
    write({ '10.conf': lone('bridge') });
    removeEntries(netDir);
    expect(contents()).toEqual({ '10.conf': lone('bridge') });
  });

  test('what cannot be read as a network but names us counts, and drop-ins too', () => {
    write({ '10.conflist': '{ "type": "ambient-redirect" ' });
    mkdirSync(join(netDir, 'pods'));
    writeFileSync(join(netDir, 'pods', '50.conf'), JSON.stringify(entry));
    expect(filesThatRefer(netDir)).toEqual(['10.conflist', 'pods/50.conf']);
  });

  test('there is no directory', () => {
    rmSync(netDir, { recursive: true });
    expect([ensureEntry(options()), removeEntries(netDir), filesThatRefer(netDir)]).toEqual([null, [], []]);
  });
});

describe('kill -9 after each step, and again', () => {
  /** Runs to its end, or to step `last`; returns the steps done. */
  function run(action: string, what: object, last = 0): string[] {
    const script = join(import.meta.dirname, 'steps.testing.ts');
    const { status, signal, stdout, stderr } = spawnSync(
      process.execPath,
      [script, action, JSON.stringify(what), String(last)],
      { encoding: 'utf8' },
    );
    if (last === 0 ? status !== 0 : signal !== 'SIGKILL') throw new Error(`${action}: ${status ?? signal}: ${stderr}`);
    return stdout.split('\n').filter((line) => line !== '');
  }

  /** `undisturbed` and every run that was cut short end the same way; returns how many steps there are. */
  function killed(action: string, what: () => object, prepare: () => void, look: () => unknown): string[] {
    prepare();
    const steps = run(action, what());
    const expected = look();
    for (let last = 1; last <= steps.length; last++) {
      prepare();
      expect(run(action, what(), last).length).toBe(last);
      // What a runtime reads meanwhile is whole.
      for (const name of readdirSync(netDir).filter(isNetworkFileName)) JSON.parse(contents()[name] ?? '');
      run(action, what());
      expect({ last, found: look() }).toEqual({ last, found: expected });
    }
    return steps;
  }

  const fresh = (files: Readonly<Record<string, string>>) => () => {
    netDir = mkdtempSync(join(root, 'net.d-'));
    write(files);
  };
  const named = () => JSON.parse(JSON.stringify(options()));

  test.each<[string, Record<string, string>]>([
    ['a list', { '10.conflist': conflist('ptp') }],
    ['a lone configuration', { '10.conf': lone('ptp') }],
  ])('the entry into %s, and out', (_what, files) => {
    expect(killed('ensureEntry', named, fresh(files), contents).length).toBeGreaterThan(1);
    const installed = contents();
    killed('removeEntries', named, fresh(installed), contents);
    expect(contents()).toEqual(files);
  });

  test('a list of our own', () => {
    const owned = () => ({ ...named(), ownedName: '02-ambient-redirect.conflist' });
    killed('ensureEntry', owned, fresh({ '10.conf': lone('ptp') }), contents);
  });

  test('the executable in, upgraded, and out', () => {
    const source = join(root, 'new-executable');
    writeFileSync(source, 'new');
    let binDir = '';
    const what = () => ({ path: source, addon: 'new addon', binDir });
    const old = () => {
      binDir = mkdtempSync(join(root, 'bin-'));
      for (const [name, text] of [
        ['ambient-redirect', 'old'],
        ['ambient-redirect.node', 'old addon'],
        ['ptp', 'x'],
      ] as const) {
        writeFileSync(join(binDir, name), text, { mode: 0o755 });
      }
    };
    const look = () => contents(binDir);
    killed('placeExecutable', what, old, look);
    expect(look()).toEqual({ 'ambient-redirect': 'new', 'ambient-redirect.node': 'new addon', ptp: 'x' });
    killed('removeExecutable', what, old, look);
    expect(look()).toEqual({ ptp: 'x' });
  });

  test('at each step of an upgrade there is an addon for the executable that is there', () => {
    const source = join(root, 'next-executable');
    writeFileSync(source, 'next');
    const binDir = mkdtempSync(join(root, 'bin-'));
    placeExecutable({ path: source, addon: Buffer.from('1') }, binDir, () => {});
    writeFileSync(source, 'after next');
    const pairs: [string, boolean][] = [];
    placeExecutable({ path: source, addon: Buffer.from('2') }, binDir, () => {
      const { 'ambient-redirect': executable = '', ...others } = contents(binDir);
      pairs.push([executable, Object.values(others).includes(executable === 'next' ? '1' : '2')]);
    });
    expect(pairs.length).toBeGreaterThan(4);
    expect(pairs.every(([, whole]) => whole)).toBe(true);
    expect(pairs.at(-1)?.[0]).toBe('after next');
  });
});

test('a directory of plugins that is not there is named', () => {
  const executable = { path: process.execPath, addon: Buffer.from('addon') };
  expect(() => placeExecutable(executable, join(root, 'nowhere'), () => {})).toThrow(
    `${root}/nowhere does not exist: it has to be where the runtime looks for plugins (bin_dir)`,
  );
});

test('an executable that is there already is left alone', () => {
  const source = join(root, 'same');
  writeFileSync(source, 'same');
  const binDir = mkdtempSync(join(root, 'bin-'));
  const executable = { path: source, addon: Buffer.from('addon') };
  expect(placeExecutable(executable, binDir, () => {})).toBe(true);
  const { ino, mode, uid } = statSync(join(binDir, 'ambient-redirect'));
  expect([mode & 0o7777, uid]).toEqual([0o755, 0]);
  expect(placeExecutable(executable, binDir, () => {})).toBe(false);
  expect(statSync(join(binDir, 'ambient-redirect')).ino).toBe(ino);
  // The one that runs from there installs itself.
  const itself = { ...executable, path: join(binDir, 'ambient-redirect') };
  expect(placeExecutable(itself, binDir, () => {})).toBe(false);
  removeExecutable(binDir, () => {});
  removeExecutable(binDir, () => {});
  expect(readdirSync(binDir)).toEqual([]);
});
