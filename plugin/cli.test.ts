// SPDX-License-Identifier: Apache-2.0
// The command line as a person meets it: usage, exit codes, where what is written. State and traffic: plugin/demo/.

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { runCommandLine } from './cli.ts';

const directory = mkdtempSync(join(tmpdir(), 'ambient-redirect-cli-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));
const none = ['--state-dir', join(directory, 'none'), '--run-dir', join(directory, 'run')];

async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const written = { out: '', err: '' };
  const same = (text: string) => text;
  const code = await runCommandLine(args, {
    out: (text) => {
      written.out += text;
    },
    err: (text) => {
      written.err += text;
    },
    green: same,
    red: same,
    yellow: same,
  });
  return { code, ...written };
}

test('--version is the package’s', async () => {
  const { version } = JSON.parse(readFileSync(join(import.meta.dirname, '../package.json'), 'utf8'));
  expect(await run('--version')).toEqual({ code: 0, out: `${version}\n`, err: '' });
});

test('--help names every command', async () => {
  const { code, out, err } = await run('--help');
  expect({ code, err }).toEqual({ code: 0, err: '' });
  const commands = [
    'status',
    'pods',
    'counters',
    'enroll',
    'unenroll',
    'proxy',
    'doctor',
    'install',
    'uninstall',
    'demo',
  ];
  expect(commands.filter((name) => !new RegExp(`^  ${name} `, 'm').test(out))).toEqual([]);
});

describe('wrong usage exits 2 and writes to stderr only', () => {
  const cases: readonly string[][] = [
    ['nonsense'],
    ['status', '--nonsense'],
    ['status', 'surplus'],
    ['status', '-o', 'yaml'],
    ['pods', '-o', 'prometheus'],
    ['counters', '--pod', 'no-namespace'],
    ['enroll'],
    ['unenroll'],
    ['unenroll', '--pod', 'a/b', '--netns', '/x'],
    ['proxy'],
    ['proxy', 'set'],
    ['demo', '--contract', 'sidecar'],
    ['demo', '--family', '5'],
    ['install', '--wait', 'soon'],
    ['install', '--cni-conf-name', '../x.conflist'],
    ['uninstall', '--drain-timeout', '-1'],
  ];
  test.each(cases.map((args) => [args.join(' '), args] as const))('%s', async (_name, args) => {
    const { code, out, err } = await run(...args);
    expect({ code, out }).toEqual({ code: 2, out: '' });
    expect(err).not.toBe('');
  });
});

describe('a machine without state', () => {
  test('status says so and is content', async () => {
    const { code, out, err } = await run('status', ...none);
    expect({ code, err }).toEqual({ code: 0, err: '' });
    expect(out).toBe(`No state in ${directory}/none: no pod was attached on this node since it booted.\n`);
  });

  test('status -o json', async () => {
    const { code, out } = await run('status', '-o', 'json', ...none);
    expect({ code, status: JSON.parse(out) }).toEqual({
      code: 0,
      status: { state: { dir: `${directory}/none`, present: false }, problems: [] },
    });
  });

  test('the environment names the directory, an option is stronger', async () => {
    vi.stubEnv('AMBIENT_REDIRECT_STATE_DIR', join(directory, 'elsewhere'));
    try {
      expect((await run('status')).out).toContain(`${directory}/elsewhere`);
      expect((await run('status', ...none)).out).toContain(`${directory}/none`);
    } finally {
      vi.unstubAllEnvs();
    }
  });

  test('state that was there since boot and is not any more is not the same as none', async () => {
    const runDir = mkdtempSync(join(directory, 'run-'));
    writeFileSync(join(runDir, 'state-dirs'), `${directory}/none\n`);
    const { code, out } = await run('status', '--state-dir', join(directory, 'none'), '--run-dir', runDir);
    expect(code).toBe(1);
    expect(out).toContain('running pods are not redirected any more');
  });

  test('pods, counters and proxy show have nothing', async () => {
    expect(await run('pods', '-o', 'json', ...none)).toEqual({ code: 0, out: '[]\n', err: '' });
    expect(await run('counters', '-o', 'json', ...none)).toEqual({ code: 0, out: '[]\n', err: '' });
    expect(await run('proxy', 'show', ...none)).toEqual({ code: 0, out: 'No proxy.\n', err: '' });
  });

  test('unenroll and proxy clear have nobody', async () => {
    const { code, err } = await run('unenroll', '--pod', 'shop/cart', ...none);
    expect({ code, err }).toEqual({
      code: 1,
      err: `ambient-redirect: no such enrolled pod: ${directory}/none has none\n`,
    });
    expect((await run('proxy', 'clear', ...none)).err).toBe(
      'ambient-redirect: no proxy was set by hand: there is none at all\n',
    );
  });
});

test('enroll names the namespace that is not there', async () => {
  const { code, out, err } = await run('enroll', '--netns', join(directory, 'netns'), ...none);
  expect({ code, out }).toEqual({ code: 1, out: '' });
  expect(err).toMatch(/^ambient-redirect: open network namespace .*\/netns: open.*: ENOENT\n$/);
});

test('--conf is validated as the plugin would', async () => {
  const file = join(directory, 'bad.conflist');
  writeFileSync(file, JSON.stringify({ name: 'n', plugins: [{ type: 'ambient-redirect', failurPolicy: 'open' }] }));
  const { code, err } = await run('enroll', '--netns', '/x', '--conf', file);
  expect({ code, err }).toEqual({
    code: 1,
    err: 'ambient-redirect: unsupported field "failurPolicy" = "open"\n',
  });
});

test('demo without root says in one line what it needs', async () => {
  vi.spyOn(process, 'getuid').mockReturnValue(1000);
  try {
    expect(await run('demo')).toEqual({
      code: 1,
      out: '',
      err: 'ambient-redirect: demo needs root: it makes network namespaces and loads BPF programs\n',
    });
  } finally {
    vi.restoreAllMocks();
  }
});
