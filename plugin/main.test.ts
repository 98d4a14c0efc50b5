// SPDX-License-Identifier: Apache-2.0
// The process edge as a runtime meets it, from source: what becomes of odd descriptors, signals and stray exceptions.
// No verb is reached, so neither the addon nor root is needed.

import { type ChildProcess, execFileSync, type SpawnOptions, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  constants,
  createReadStream,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { afterAll, describe, expect, test } from 'vitest';

const MAIN = join(import.meta.dirname, 'main.ts');
const TARGET = { CNI_CONTAINERID: 'c1', CNI_NETNS: '/nowhere', CNI_IFNAME: 'eth0' };
const ADD = { ...TARGET, CNI_COMMAND: 'ADD' };
const DEL = { ...TARGET, CNI_COMMAND: 'DEL' };

const directory = mkdtempSync(join(tmpdir(), 'ambient-redirect-main-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

function start(
  env: NodeJS.ProcessEnv,
  stdio: SpawnOptions['stdio'] = 'pipe',
  args: readonly string[] = [],
): ChildProcess {
  return spawn(process.execPath, [MAIN, ...args], { env: { PATH: process.env.PATH, ...env }, stdio, timeout: 20_000 });
}

/** The same through a shell, for redirections that spawn does not have. */
function startShell(env: NodeJS.ProcessEnv, redirections: string, stdio: SpawnOptions['stdio'] = 'pipe'): ChildProcess {
  return spawn('bash', ['--norc', '-c', `exec "$NODE" "$MAIN" ${redirections}`], {
    env: { PATH: process.env.PATH, NODE: process.execPath, MAIN, ...env },
    stdio,
    timeout: 20_000,
  });
}

/** NODE_OPTIONS: runs `code` in the plugin's process before anything else. */
function preload(code: string): string {
  const file = join(directory, `preload-${++files}.cjs`);
  writeFileSync(file, code);
  return `--require=${file}`;
}
let files = 0;

/** An ADD that has turned its event loop at least once, so has read what was on stdin and waits for more. */
async function startListening(stdio: SpawnOptions['stdio']): Promise<ChildProcess> {
  const ready =
    "process.on('newListener', (name) => name === 'SIGTERM' && setImmediate(setImmediate, console.error, 'ready'))";
  const child = start({ ...ADD, NODE_OPTIONS: preload(ready) }, stdio);
  if (child.stderr === null) expect.unreachable();
  await once(child.stderr, 'data');
  return child;
}

/** Both ends of a named pipe, blocking or not as the plugin may find them. */
function openPipe(): { reader: number; writer: number } {
  const path = join(directory, `pipe-${++files}`);
  execFileSync('mkfifo', [path]);
  const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  return { reader, writer: openSync(path, constants.O_WRONLY) };
}

async function finish(child: ChildProcess) {
  const [stdout, stderr, [code, signal]] = await Promise.all([
    child.stdout ? text(child.stdout) : '',
    child.stderr ? text(child.stderr) : '',
    once(child, 'close'),
  ]);
  return { stdout, stderr, code, signal };
}

/** Writes until nothing more fits. Returns how much did. */
function fill(writer: number): number {
  for (let filled = 0; ; ) {
    try {
      filled += writeSync(writer, 'x'.repeat(4096));
    } catch (error) {
      expect(error).toMatchObject({ code: 'EAGAIN' });
      return filled;
    }
  }
}

/** To its end; closes the descriptor. */
async function readAll(reader: number): Promise<string> {
  const path = `/proc/self/fd/${reader}`;
  const stream = createReadStream(path);
  await once(stream, 'open');
  closeSync(reader);
  return text(stream);
}

async function runWith(env: NodeJS.ProcessEnv, stdin: string | Buffer) {
  const child = start(env);
  // The plugin may answer before it has read everything.
  child.stdin?.on('error', () => {});
  child.stdin?.end(stdin);
  return finish(child);
}

const document = (code: number, msg: string, details: string, cniVersion = '1.1.0') =>
  `${JSON.stringify({ cniVersion, code, msg, details })}\n`;
const EMPTY = document(6, 'cannot decode network configuration', 'stdin is empty');
const NO_VERSION = document(
  1,
  'incompatible CNI versions',
  'config is "0.1.0", plugin supports ["0.3.1" "0.4.0" "1.0.0" "1.1.0"]',
);

test('without CNI_COMMAND and arguments it says what it is, on stderr', async () => {
  for (const env of [{}, { CNI_COMMAND: '' }]) {
    const { stdout, stderr, code } = await finish(start(env, ['ignore', 'pipe', 'pipe']));
    expect([stdout, code]).toEqual(['', 0]);
    expect(stderr).toContain('CNI protocol versions supported: 0.3.1, 0.4.0, 1.0.0, 1.1.0\n');
  }
});

describe('stdin', () => {
  test('is a socket that fills slowly', async () => {
    const child = start(ADD);
    child.stdin?.write('{"na', () => child.stdin?.end('me":"n"}'));
    expect(await finish(child)).toMatchObject({ stdout: NO_VERSION, code: 1 });
  });

  test('is a pipe that fills slowly', async () => {
    const { reader, writer } = openPipe();
    writeSync(writer, '{"na');
    const child = await startListening([reader, 'pipe', 'pipe']);
    closeSync(reader);
    writeSync(writer, 'me":"n"}');
    closeSync(writer);
    expect(await finish(child)).toMatchObject({ stdout: NO_VERSION, code: 1 });
  });

  test('is a file, read from where it stands', async () => {
    const path = join(directory, 'conf.json');
    writeFileSync(path, 'skipped\n{"name":"n"}');
    const file = openSync(path, 'r');
    readSync(file, Buffer.alloc(8));
    const child = start(ADD, [file, 'pipe', 'pipe']);
    closeSync(file);
    expect(await finish(child)).toMatchObject({ stdout: NO_VERSION, code: 1 });
  });

  test.each(['<&-', '</dev/null'])('is empty: %s', async (redirection) => {
    expect(await finish(startShell(ADD, redirection))).toMatchObject({ stdout: EMPTY, code: 1, signal: null });
  });

  test('is a directory', async () => {
    expect(await finish(startShell(ADD, '</'))).toMatchObject({
      stdout: document(5, 'error reading from stdin', 'EISDIR: illegal operation on a directory, read'),
      code: 1,
    });
  });

  test('is too long', async () => {
    const path = join(directory, 'long.json');
    writeFileSync(path, '');
    truncateSync(path, 9 << 20);
    expect(await finish(startShell(ADD, `<"${path}"`))).toMatchObject({
      stdout: document(5, 'error reading from stdin', 'stdin is longer than 8388608 bytes'),
      code: 1,
    });
  });

  // A terminal's master end whose slave nobody opens: there is nothing to read, and no end.
  test('is not read by VERSION where it is a device', async () => {
    const { stdout, code } = await finish(startShell({ CNI_COMMAND: 'VERSION' }, '</dev/ptmx'));
    expect([JSON.parse(stdout).cniVersion, code]).toEqual(['1.1.0', 0]);
  });
});

describe('stdout', () => {
  const lost =
    /^ambient-redirect: DEL failed with code 6: [^\n]*\nambient-redirect: DEL: the answer could not [^\n]*\n$/;

  test('is a pipe that nobody reads', async () => {
    const { reader, writer } = openPipe();
    closeSync(reader);
    const child = start(DEL, ['ignore', writer, 'pipe']);
    closeSync(writer);
    const { stderr, code, signal } = await finish(child);
    expect([code, signal]).toEqual([1, null]);
    expect(stderr).toMatch(lost);
  });

  test('is full', async () => {
    const { stderr, code } = await finish(startShell(DEL, '</dev/null >/dev/full'));
    expect(code).toBe(1);
    expect(stderr).toMatch(lost);
  });

  // Node opens /dev/null in place of a standard descriptor that is closed.
  test('is closed', async () => {
    const { stdout, code } = await finish(startShell(DEL, '</dev/null >&-'));
    expect([stdout, code]).toEqual(['', 1]);
  });

  test('is a non-blocking pipe, full and read late', async () => {
    const { reader, writer } = openPipe();
    const nonBlocking = openSync(`/proc/self/fd/${writer}`, constants.O_WRONLY | constants.O_NONBLOCK);
    closeSync(writer);
    const filled = fill(nonBlocking);
    // spawn makes descriptors 0 to 2 blocking, so it comes as 3.
    const waiting = 'const { wait } = Atomics; Atomics.wait = (...all) => (console.error("waiting"), wait(...all))';
    const env = { ...DEL, NODE_OPTIONS: preload(waiting) };
    const child = startShell(env, '>&3', ['ignore', 'ignore', 'pipe', nonBlocking]);
    closeSync(nonBlocking);
    if (child.stderr === null) expect.unreachable();
    await once(child.stderr, 'data');
    const [stdout, { code }] = await Promise.all([readAll(reader), finish(child)]);
    expect([stdout.slice(filled), code]).toEqual([EMPTY, 1]);
  });

  test('a long answer arrives whole', async () => {
    const id = '/'.repeat(100_000);
    const { stdout, code } = await runWith({ ...ADD, CNI_CONTAINERID: id }, '{}');
    expect([stdout === document(4, 'CNI_CONTAINERID: invalid characters in containerID', id), code]).toEqual([true, 1]);
  });
});

describe('one error document, and no second', () => {
  test.each(['socket', 'pipe'])('SIGTERM while stdin, a %s, is open', async (kind) => {
    const { reader, writer } = openPipe();
    const child = await startListening([kind === 'pipe' ? reader : 'pipe', 'pipe', 'pipe']);
    child.kill('SIGTERM');
    const { stdout, code, signal } = await finish(child);
    closeSync(reader);
    closeSync(writer);
    expect({ stdout, code, signal }).toEqual({
      stdout: document(11, 'ADD was interrupted by SIGTERM', 'what was begun is recorded, and DEL removes it'),
      code: 1,
      signal: null,
    });
  });

  test.each([
    ['exception', 'setImmediate(() => { throw new Error("stray") })'],
    ['rejection', 'setImmediate(() => { Promise.reject(new Error("stray")) })'],
    ['two exceptions', 'for (const n of [1, 2]) setImmediate(() => { throw new Error(n === 1 ? "stray" : "second") })'],
  ])('stray %s', async (_name, code) => {
    const outcome = await finish(start({ ...ADD, NODE_OPTIONS: preload(code) }));
    expect(outcome).toMatchObject({ stdout: document(111, 'internal error', 'stray'), code: 1, signal: null });
    expect(outcome.stderr).toContain('Error: stray\n    at ');
  });

  test.each([
    ['DEL', 109],
    ['STATUS', 50],
  ])('%s without the addon', async (command, code) => {
    const env = { ...TARGET, CNI_COMMAND: command, AMBIENT_REDIRECT_ADDON: join(directory, 'none.node') };
    const outcome = await runWith(env, '{"name":"n","cniVersion":"1.1.0"}');
    expect([outcome.code, JSON.parse(outcome.stdout).code]).toEqual([1, code]);
    expect(JSON.parse(outcome.stdout).details).toContain('none.node');
  });
});
