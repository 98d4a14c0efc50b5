// SPDX-License-Identifier: Apache-2.0
// What of Debian is in the image: the files that the executable and the two programs it spawns need, and nothing else.
// apt chooses the version (the newest that the machine's sources have) and checks what it downloads.

import { createHash } from 'node:crypto';
import {
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { pathsBelow } from './files.ts';
import { type Architecture, ROOT } from './reference.ts';
import { run } from './run.ts';

interface Wanted {
  name: string;
  /** Base names: a library by its soname, with the file that the soname links to. */
  files: string[];
}

/** glibc's name service and locale data are inside libc.so.6 as far as they are needed. */
const WANTED: readonly Wanted[] = [
  { name: 'base-files', files: ['os-release'] },
  {
    name: 'libc6',
    files: [
      'ld-linux-x86-64.so.2',
      'ld-linux-aarch64.so.1',
      ...['libc.so.6', 'libdl.so.2', 'libm.so.6', 'libpthread.so.0', 'libresolv.so.2', 'librt.so.1'],
    ],
  },
  // The copyright of everything that comes from GCC.
  { name: 'gcc-12-base', files: [] },
  { name: 'libgcc-s1', files: ['libgcc_s.so.1'] },
  { name: 'libstdc++6', files: ['libstdc++.so.6'] },
  // On kernels where TPROXY rules choose the listener, agent and uninstall run nft in the proxy's namespace.
  { name: 'util-linux', files: ['nsenter'] },
  { name: 'libselinux1', files: ['libselinux.so.1'] },
  { name: 'libpcre2-8-0', files: ['libpcre2-8.so.0'] },
  { name: 'nftables', files: ['nft'] },
  { name: 'libnftables1', files: ['libnftables.so.1'] },
  { name: 'libnftnl11', files: ['libnftnl.so.11'] },
  { name: 'libmnl0', files: ['libmnl.so.0'] },
  { name: 'libxtables12', files: ['libxtables.so.12'] },
  { name: 'libjansson4', files: ['libjansson.so.4'] },
  { name: 'libgmp10', files: ['libgmp.so.10'] },
  { name: 'libedit2', files: ['libedit.so.2'] },
  { name: 'libtinfo6', files: ['libtinfo.so.6'] },
  { name: 'libbsd0', files: ['libbsd.so.0'] },
  { name: 'libmd0', files: ['libmd.so.0'] },
];

export interface DebianPackage {
  name: string;
  version: string;
  /** Of the source package, which the security tracker goes by. */
  source: string;
  architecture: string;
  sha256: string;
  /** Path of the .deb. */
  file: string;
}

/** The packages of the image, downloaded unless they are in build/debian. Throws if apt cannot get one. */
export function debianPackages(architecture: Architecture): DebianPackage[] {
  return downloadDebian(
    architecture,
    WANTED.map(({ name }) => name),
  );
}

/** The newest versions that apt knows, in the order of `names`. */
export function downloadDebian(architecture: Architecture, names: readonly string[]): DebianPackage[] {
  const apt = aptFor(architecture);
  let packages = candidates(apt, names);
  if (packages.length < names.length) packages = afterUpdate(apt, names);
  const directory = join(ROOT, 'build/debian');
  mkdirSync(directory, { recursive: true });
  const absent = (all: DebianPackage[]) => all.filter(({ file, sha256 }) => !existsSync(file) || sum(file) !== sha256);
  const download = (all: DebianPackage[]) => {
    if (absent(all).length === 0) return;
    const versions = absent(all).map(({ name, version }) => `${name}=${version}`);
    run(['apt-get', ...apt, '-q', 'download', ...versions], { cwd: directory });
  };
  try {
    download(packages);
  } catch {
    // A version that was replaced since apt last looked is no longer to be had.
    packages = afterUpdate(apt, names);
    download(packages);
  }
  const [wrong] = absent(packages);
  if (wrong) throw new Error(`${wrong.file}: not what the package list says (SHA-256 ${wrong.sha256})`);
  return packages;
}

/**
 * Options of apt. Another architecture than the machine's gets package lists of its own, so that dpkg need not be told
 * of it: what is installed here does not change.
 */
function aptFor(architecture: Architecture): string[] {
  const own = ['-o', 'APT::Sandbox::User=root'];
  if (architecture === { x64: 'amd64', arm64: 'arm64' }[process.arch as 'x64' | 'arm64']) return own;
  const state = join(ROOT, 'build/apt', architecture);
  for (const directory of ['lists/partial', 'cache/archives/partial']) {
    mkdirSync(join(state, directory), { recursive: true });
  }
  const settings = {
    'APT::Architecture': architecture,
    'Dir::State': state,
    'Dir::State::lists': join(state, 'lists'),
    'Dir::State::status': '/dev/null',
    'Dir::Cache': join(state, 'cache'),
    // Lists that are not for programs cost more time than all others.
    'Acquire::Languages': 'none',
    'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled': 'false',
  };
  return [
    ...own,
    '-o',
    `APT::Architectures::=${architecture}`,
    ...Object.entries(settings).flatMap(([key, value]) => ['-o', `${key}=${value}`]),
  ];
}

function afterUpdate(apt: string[], names: readonly string[]): DebianPackage[] {
  run(['apt-get', ...apt, '-q', 'update']);
  const packages = candidates(apt, names);
  const missing = names.filter((name) => !packages.some((one) => one.name === name));
  if (missing.length > 0) throw new Error(`apt knows no package ${missing.join(', ')}`);
  return packages;
}

function candidates(apt: string[], names: readonly string[]): DebianPackage[] {
  // Names that it does not know are an error of its own; what it knows of the others comes all the same.
  const records = run(['apt-cache', ...apt, 'show', '--no-all-versions', ...names], { mayFail: true });
  const packages = records.split(/\n\n+/).flatMap((record) => {
    const field = (name: string) => new RegExp(`^${name}: *(.*)$`, 'm').exec(record)?.[1];
    const [name, version, architecture, sha256] = ['Package', 'Version', 'Architecture', 'SHA256'].map(field);
    if (!name || !version || !architecture || !sha256) return [];
    const source = field('Source')?.split(' ')[0] ?? name;
    const file = join(ROOT, 'build/debian', `${name}_${version.replace(':', '%3a')}_${architecture}.deb`);
    return [{ name, version, source, architecture, sha256, file }];
  });
  return names.flatMap((name) => packages.find((one) => one.name === name) ?? []);
}

function sum(file: string): string {
  return createHash('sha256').update(readFileSync(file)).digest('hex');
}

/**
 * Puts the wanted files of the packages into `tree`, where /lib, /bin and /sbin are links into /usr as in Debian, with
 * each package's copyright, and its control file where scanners of images without a package manager look for it
 * (/var/lib/dpkg/status.d). Throws if a wanted file is in none of them.
 */
export function unpackDebian(packages: readonly DebianPackage[], tree: string): void {
  for (const directory of ['bin', 'sbin', 'lib', 'lib64']) {
    mkdirSync(join(tree, 'usr', directory), { recursive: true });
    symlinkSync(`usr/${directory}`, join(tree, directory));
  }
  const status = join(tree, 'var/lib/dpkg/status.d');
  mkdirSync(status, { recursive: true });
  for (const { name, file } of packages) {
    const wanted = WANTED.find((one) => one.name === name)?.files ?? [];
    const contents = mkdtempSync(join(dirname(tree), `${name}-`));
    run(['dpkg-deb', '--extract', file, contents]);
    const found = pathsBelow(contents).filter((path) => /^(?:usr\/)?(?:s?bin|lib(?:64)?|etc|share\/doc)\//.test(path));
    const linked = found
      .filter((path) => wanted.includes(baseName(path)) && lstatSync(join(contents, path)).isSymbolicLink())
      .map((path) => baseName(readlinkSync(join(contents, path))));
    const copyright = `usr/share/doc/${name}/copyright`;
    const taken = found.filter((path) => path === copyright || [...wanted, ...linked].includes(baseName(path)));
    for (const path of taken)
      copyEntry(join(contents, path), join(tree, path.replace(/^(s?bin|lib(?:64)?)\//, 'usr/$1/')));
    for (const one of wanted) {
      const other = one.startsWith('ld-linux-') && taken.some((path) => baseName(path).startsWith('ld-linux-'));
      if (!other && !taken.some((path) => baseName(path) === one)) throw new Error(`${file}: has no file ${one}`);
    }
    writeFileSync(join(status, name), run(['dpkg-deb', '--field', file]));
    rmSync(contents, { recursive: true });
  }
}

function copyEntry(from: string, to: string): void {
  mkdirSync(dirname(to), { recursive: true });
  cpSync(from, to, { verbatimSymlinks: true });
}

function baseName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}
