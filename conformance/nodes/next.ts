// SPDX-License-Identifier: Apache-2.0
//
// The image of a next version: this checkout with another version number and another object of programs, built by the
// build that the release is built by, in a folder below build/.

import { cpSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { imageArchive, ROOT, VERSION } from '../../deploy/image/reference.ts';
import { exec } from '../netns.ts';

const PARTS = ['.ci', 'bpf', 'native', 'plugin', 'deploy', 'LICENSE', 'LICENSES', 'binding.gyp', 'tsconfig.json'];

export interface Image {
  version: string;
  /** for ctr images import */
  archive: string;
}

export function currentImage(): Image {
  return { version: VERSION, archive: imageArchive('amd64') };
}

/** Minutes with an empty compiler cache, seconds after. */
export async function nextImage(): Promise<Image> {
  const directory = join(ROOT, 'build/next');
  mkdirSync(directory, { recursive: true });
  for (const part of PARTS) {
    rmSync(join(directory, part), { recursive: true, force: true });
    // make goes by the times.
    cpSync(join(ROOT, part), join(directory, part), { recursive: true, preserveTimestamps: true });
  }
  rmSync(join(directory, 'node_modules'), { force: true });
  symlinkSync(join(ROOT, 'node_modules'), join(directory, 'node_modules'));
  const [major = 0, minor = 0] = VERSION.split('.').map(Number);
  const version = `${major}.${minor + 1}.0`;
  const text = (name: string) => readFileSync(join(ROOT, name), 'utf8');
  writeFileSync(join(directory, 'package.json'), text('package.json').replace(`"${VERSION}"`, `"${version}"`));
  writeFileSync(join(directory, 'package-lock.json'), text('package-lock.json'));
  // Another object, so other programs to attach, which do the same.
  const source = join('bpf', 'redirect.bpf.c');
  writeFileSync(join(directory, source), `${text(source)}\nconst char next_version[] SEC("next") = "${version}";\n`);
  const { GIT_DIR: _, ...env } = process.env;
  const argv = [process.execPath, join(directory, '.ci/build.mjs'), 'image'];
  const outcome = await exec(argv, { cwd: directory, timeout: 900_000, env: env as Record<string, string> });
  if (outcome.status !== 0)
    throw new Error(`${argv.join(' ')}: exit ${outcome.status}: ${outcome.stderr.slice(-2_000)}`);
  return { version, archive: join(directory, 'dist', imageArchive('amd64').split('/').at(-1) ?? '') };
}
