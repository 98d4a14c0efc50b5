// SPDX-License-Identifier: Apache-2.0
// The image, as an OCI archive: a layer with what is of Debian, which stays the same from version to version of ours,
// and one with the executable. No time, owner, order or name of the building machine is in it, so that the same inputs
// give the same bytes.

import { createHash } from 'node:crypto';
import {
  chmodSync,
  copyFileSync,
  cpSync,
  createReadStream,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { debianPackages, unpackDebian } from './debian.ts';
import { type Architecture, IMAGE, imageReference, ROOT, VERSION } from './reference.ts';
import { archive, run } from './run.ts';
import { billOfMaterials, type LinkedLibrary } from './sbom.ts';

export interface ImageInputs {
  architecture: Architecture;
  /** Path of the executable, for that architecture. */
  executable: string;
  /** Path of the notices that have to go with it. */
  notices: string;
  npm: readonly string[];
  linked: readonly LinkedLibrary[];
}

export interface ImageOutputs {
  archive: string;
  /** The image's list of ingredients, also in the image. */
  sbom: string;
}

const DESCRIPTION =
  'Chained CNI plugin and node agent that redirect pod traffic through the ambient mesh proxy with tc eBPF programs';

/** When and from what this was made: the commit's time, so that it is the same in every checkout of it. */
export interface Origin {
  /** Seconds since 1970; SOURCE_DATE_EPOCH of the environment wins. */
  epoch: number;
  /** Commit id, with "-dirty" if tracked files differ from it; undefined outside of a repository. */
  revision: string | undefined;
}

export function origin(env: NodeJS.ProcessEnv = process.env): Origin {
  const git = (...args: string[]) => run(['git', '-C', ROOT, ...args], { mayFail: true }).trim();
  const commit = git('rev-parse', 'HEAD');
  const dirty = commit !== '' && git('status', '--porcelain', '--untracked-files=no') !== '';
  const epoch = Number(env.SOURCE_DATE_EPOCH || git('show', '--no-patch', '--format=%ct', 'HEAD') || 0);
  if (!Number.isSafeInteger(epoch))
    throw new Error(`SOURCE_DATE_EPOCH "${env.SOURCE_DATE_EPOCH}": not a number of seconds`);
  return { epoch, revision: commit === '' ? undefined : `${commit}${dirty ? '-dirty' : ''}` };
}

/** What the archive depends on, for a build that makes it only when that has changed. */
export function imageInputs(inputs: ImageInputs): string {
  const sources = ['build', 'debian', 'files', 'reference', 'run', 'sbom'].map((name) =>
    join(import.meta.dirname, `${name}.ts`),
  );
  const packages = debianPackages(inputs.architecture).map(({ name, sha256 }) => [name, sha256]);
  const files = [inputs.executable, inputs.notices, ...sources].map((file) => readFileSync(file));
  const sum = createHash('sha256');
  for (const part of [JSON.stringify([inputs, packages, origin(), VERSION]), ...files]) sum.update(part).update('\0');
  return sum.digest('hex');
}

/** Writes both files, whole or not at all. */
export async function buildImage(inputs: ImageInputs, outputs: ImageOutputs): Promise<void> {
  const { architecture, executable, notices, npm, linked } = inputs;
  const { epoch, revision } = origin();
  const created = new Date(epoch * 1000).toISOString();
  const work = `${outputs.archive}.new.d`;
  rmSync(work, { recursive: true, force: true });
  try {
    const base = join(work, 'base');
    mkdirSync(base, { recursive: true });
    const debian = debianPackages(architecture);
    unpackDebian(debian, base);
    accounts(base);

    const ours = join(work, 'ours');
    const documents = join(ours, 'usr/share/doc', IMAGE);
    mkdirSync(join(ours, 'usr/bin'), { recursive: true });
    mkdirSync(documents, { recursive: true });
    copyFileSync(executable, join(ours, 'usr/bin', IMAGE));
    chmodSync(join(ours, 'usr/bin', IMAGE), 0o755);
    copyFileSync(notices, join(documents, 'THIRD-PARTY-NOTICES'));
    copyFileSync(join(ROOT, 'LICENSE'), join(documents, 'LICENSE'));
    cpSync(join(ROOT, 'LICENSES'), join(documents, 'LICENSES'), { recursive: true });
    const sum = createHash('sha256');
    await pipeline(createReadStream(executable), sum);
    const sbom = billOfMaterials({ architecture, executable: sum.digest('hex'), npm, linked, debian, epoch });
    writeFileSync(join(documents, 'sbom.cdx.json'), sbom);

    const layout = join(work, 'layout');
    const image = `${layout}:${VERSION}`;
    const history = (by: string) => ['--history.created', created, '--history.created_by', by];
    run(['umoci', 'init', '--layout', layout]);
    run(['umoci', 'new', '--image', image]);
    for (const [tree, title] of [
      [base, `Debian: ${debian.map(({ name, version }) => `${name} ${version}`).join(', ')}`],
      [ours, `${IMAGE} ${VERSION}`],
    ] as const) {
      const layer = `${tree}.tar`;
      archive(tree, layer, 0, '.');
      run(['umoci', 'raw', 'add-layer', '--image', image, ...history(title), layer]);
      rmSync(layer);
    }
    const annotations = {
      'org.opencontainers.image.title': IMAGE,
      'org.opencontainers.image.description': DESCRIPTION,
      'org.opencontainers.image.version': VERSION,
      'org.opencontainers.image.created': created,
      'org.opencontainers.image.licenses': 'Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)',
      ...(revision === undefined ? {} : { 'org.opencontainers.image.revision': revision }),
    };
    run([
      ...['umoci', 'config', '--image', image, '--no-history', '--created', created],
      ...['--os', 'linux', '--architecture', architecture],
      // The agent needs root's files of the node and capabilities, which the pod's securityContext cuts down.
      ...['--config.user', '0:0', '--config.entrypoint', `/usr/bin/${IMAGE}`, '--config.workingdir', '/'],
      ...['--config.env', 'PATH=/usr/sbin:/usr/bin:/sbin:/bin', '--config.stopsignal', 'SIGTERM'],
      ...Object.entries(annotations).flatMap(([key, value]) => [
        ...['--config.label', `${key}=${value}`],
        ...['--manifest.annotation', `${key}=${value}`],
      ]),
    ]);
    // The manifests between the first and this one.
    run(['umoci', 'gc', '--layout', layout]);
    nameImage(join(layout, 'index.json'));

    const whole = join(work, 'image.tar');
    archive(layout, whole, 0, 'oci-layout', 'index.json', 'blobs');
    for (const path of [outputs.archive, outputs.sbom]) mkdirSync(dirname(path), { recursive: true });
    writeFileSync(`${outputs.sbom}.new`, sbom);
    renameSync(`${outputs.sbom}.new`, outputs.sbom);
    renameSync(whole, outputs.archive);
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

/** What the C library asks: who root is, and where names of hosts come from. */
function accounts(tree: string): void {
  mkdirSync(join(tree, 'etc'), { recursive: true });
  writeFileSync(join(tree, 'etc/passwd'), 'root:x:0:0:root:/:/usr/sbin/nologin\n');
  writeFileSync(join(tree, 'etc/group'), 'root:x:0:\n');
  writeFileSync(join(tree, 'etc/nsswitch.conf'), 'passwd: files\ngroup: files\nhosts: files dns\n');
}

/** umoci's tags have no hub; containerd takes the whole reference from an annotation of its own. */
function nameImage(file: string): void {
  const index = JSON.parse(readFileSync(file, 'utf8')) as { manifests: { annotations?: Record<string, string> }[] };
  for (const manifest of index.manifests) {
    manifest.annotations = { ...manifest.annotations, 'io.containerd.image.name': imageReference() };
  }
  writeFileSync(file, JSON.stringify(index));
}
