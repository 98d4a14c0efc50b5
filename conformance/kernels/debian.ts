// SPDX-License-Identifier: Apache-2.0
//
// Debian's kernels, to boot and never to install: downloaded by apt-get with lists and status of its own, unpacked with
// dpkg -x, kept in the user's cache by version. From the mirror that the system itself uses, whichever that is.

import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { exec } from '../netns.ts';

/** Suites of Debian's archive, and the kernel series that each has. */
export const SUITES = { bullseye: '5.10', bookworm: '6.1', trixie: '6.12', testing: 'newest' } as const;
export type Suite = keyof typeof SUITES;

export interface Kernel {
  suite: Suite;
  /** As uname -r prints it. */
  release: string;
  /** Version of the Debian package. */
  version: string;
  image: string;
  /** Directory that has lib/modules/<release>, with modules.dep. */
  root: string;
}

/** Why a kernel cannot be had here: no network, no such suite on the mirror. */
export class NoKernel extends Error {}

const CACHE = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'ambient-redirect/kernels');
const META_PACKAGE = 'linux-image-cloud-amd64';
const MINUTES = 60_000;

/**
 * The kernel of a suite: the cached one, else (and with `refresh`) the newest on the mirror. Throws NoKernel where the
 * mirror or the suite is not there.
 */
export async function findKernel(suite: Suite, { refresh = false } = {}): Promise<Kernel> {
  const known = join(CACHE, suite);
  if (!refresh && existsSync(known)) {
    const kernel = kernelIn(suite, join(CACHE, readFileSync(known, 'utf8')));
    if (kernel) return kernel;
  }
  mkdirSync(CACHE, { recursive: true });
  const work = mkdtempSync(join(CACHE, '.work-'));
  try {
    const apt = await Apt.of(work, suite);
    const packages = await apt.kernelPackages();
    const name = `${packages[0]?.name}_${packages[0]?.version}`;
    const final = join(CACHE, name);
    if (!kernelIn(suite, final)) {
      const unpacked = join(work, 'unpacked');
      for (const file of await apt.download(packages)) await run(['dpkg', '-x', file, unpacked]);
      await arrange(unpacked);
      // Another run may have been faster; what is there is whole.
      if (!existsSync(final)) renameSync(unpacked, final);
    }
    writeFileSync(join(work, 'name'), name);
    renameSync(join(work, 'name'), known);
    const kernel = kernelIn(suite, final);
    if (!kernel) throw new NoKernel(`${suite}: ${name} has no kernel image where one was expected`);
    return kernel;
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

function kernelIn(suite: Suite, root: string): Kernel | undefined {
  const modules = join(root, 'lib/modules');
  const release = existsSync(modules) ? readdirSync(modules)[0] : undefined;
  const image = join(root, 'vmlinuz');
  if (release === undefined || !existsSync(image) || !existsSync(join(modules, release, 'modules.dep')))
    return undefined;
  return { suite, release, version: root.replace(/^.*_/, ''), image, root };
}

/** One layout for the packages of every suite: vmlinuz, and lib/modules/<release> with its index. */
async function arrange(unpacked: string): Promise<void> {
  const usr = join(unpacked, 'usr/lib/modules');
  if (existsSync(usr)) {
    mkdirSync(join(unpacked, 'lib'), { recursive: true });
    renameSync(usr, join(unpacked, 'lib/modules'));
  }
  const [release = ''] = readdirSync(join(unpacked, 'lib/modules'));
  const images = [join(unpacked, 'boot', `vmlinuz-${release}`), join(unpacked, 'lib/modules', release, 'vmlinuz')];
  const image = images.find((path) => existsSync(path));
  if (image === undefined) throw new NoKernel(`${release}: no vmlinuz in its packages`);
  renameSync(image, join(unpacked, 'vmlinuz'));
  await run(['depmod', '-b', unpacked, release]);
}

interface Package {
  name: string;
  version: string;
}

class Apt {
  readonly #directory: string;
  readonly #options: string[];

  private constructor(directory: string) {
    this.#directory = directory;
    for (const part of ['state/lists/partial', 'cache/archives/partial']) {
      mkdirSync(join(directory, part), { recursive: true });
    }
    this.#options = Object.entries({
      'Dir::State': join(directory, 'state'),
      'Dir::State::status': join(directory, 'status'),
      'Dir::Cache': join(directory, 'cache'),
      'Dir::Etc::sourcelist': join(directory, 'sources.list'),
      'Dir::Etc::sourceparts': '/dev/null',
      'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled': 'false',
      'Acquire::Languages': 'none',
      // It works in a directory of root's.
      'APT::Sandbox::User': 'root',
    }).flatMap(([key, value]) => ['-o', `${key}=${value}`]);
    writeFileSync(join(directory, 'status'), '');
  }

  static async of(directory: string, suite: Suite): Promise<Apt> {
    const apt = new Apt(directory);
    const mirror = await systemMirror();
    writeFileSync(join(directory, 'sources.list'), `deb ${mirror.signedBy}${mirror.address} ${suite} main\n`);
    const { status, stderr } = await exec(['apt-get', ...apt.#options, '-q', 'update'], { timeout: 5 * MINUTES });
    // apt-get update is content with old lists when a mirror does not answer, and here are none.
    if (status !== 0 || /^(W|E): Failed to fetch/m.test(stderr)) {
      throw new NoKernel(`${suite} cannot be read from the mirror: ${stderr.trim().split('\n')[0]}`);
    }
    return apt;
  }

  /** The image first, then the packages that it is made of where it is empty itself (from 7.0 on). */
  async kernelPackages(): Promise<Package[]> {
    const [image] = (await this.#depends(META_PACKAGE)).filter((name) => name.startsWith('linux-image-'));
    if (image === undefined) throw new NoKernel(`the mirror has no ${META_PACKAGE} with a kernel`);
    const parts = (await this.#depends(image)).filter((name) => /^linux-(binary|modules)-/.test(name));
    return await Promise.all([image, ...parts].map(async (name) => ({ name, version: await this.#version(name) })));
  }

  async #depends(name: string): Promise<string[]> {
    const out = await run(['apt-cache', ...this.#options, 'depends', '--important', name]);
    return [...out.matchAll(/^\s+(?:Pre)?Depends: (\S+)$/gm)].map(([, depended = '']) => depended);
  }

  async #version(name: string): Promise<string> {
    const out = await run(['apt-cache', ...this.#options, 'show', '--no-all-versions', name]);
    return /^Version: (\S+)$/m.exec(out)?.[1] ?? '';
  }

  async download(packages: readonly Package[]): Promise<string[]> {
    const names = packages.map(({ name, version }) => `${name}=${version}`);
    const { status, stderr } = await exec(['apt-get', ...this.#options, '-q', 'download', ...names], {
      cwd: this.#directory,
      timeout: 10 * MINUTES,
    });
    if (status !== 0) throw new NoKernel(`${names.join(', ')} cannot be downloaded: ${stderr.trim().split('\n')[0]}`);
    return readdirSync(this.#directory)
      .filter((name) => name.endsWith('.deb'))
      .map((name) => join(this.#directory, name));
  }
}

/** Where this system gets Debian from, and the key that signs it, in the form of a sources.list option. */
async function systemMirror(): Promise<{ address: string; signedBy: string }> {
  const format = '$(ORIGIN)\t$(LABEL)\t$(REPO_URI)';
  const out = await run(['apt-get', 'indextargets', '--format', format, 'Created-By: Packages']);
  const debian = out.split('\n').map((line) => line.split('\t'));
  const address = debian.find(([origin, label]) => origin === 'Debian' && label === 'Debian')?.[2];
  if (address === undefined) throw new NoKernel("none of the system's sources is Debian's archive");
  const keyring = '/usr/share/keyrings/debian-archive-keyring.gpg';
  return { address, signedBy: existsSync(keyring) ? `[signed-by=${keyring}] ` : '' };
}

async function run(argv: readonly string[]): Promise<string> {
  const { status, stdout, stderr } = await exec(argv, { timeout: 5 * MINUTES });
  if (status !== 0) throw new Error(`${argv[0]} ${argv.at(-1)}: exit ${status}: ${stderr.trim()}`);
  return stdout;
}
