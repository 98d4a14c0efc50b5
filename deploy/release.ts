// SPDX-License-Identifier: Apache-2.0
// node deploy/release.ts [--output DIRECTORY]: everything that is handed out, in one folder, with checksums. Refuses if
// the version that package.json has is not what executable, image, chart and change log say. The same bytes from the same
// commit; needs what `npm run image` builds, and helm.

import { createHash } from 'node:crypto';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { basename, join } from 'node:path';
import { parseArgs } from 'node:util';
import { parse } from 'yaml';
import { CHART, helmProgram } from '../conformance/chart/helm.ts';
import { origin } from './image/build.ts';
import { type Architecture, IMAGE, imageArchive, imageSbom, ROOT, VERSION } from './image/reference.ts';
import { archive, run } from './image/run.ts';

export interface ReleaseOptions {
  /** Emptied first. */
  output: string;
  /** Directory of the chart's sources. */
  chart?: string;
  changelog?: string;
  /** Without it those whose image is there. */
  architectures?: readonly Architecture[];
}

interface Executable {
  architecture: Architecture;
  path: string;
}

/** Fills the folder and returns the names of its files. Throws if versions differ, and leaves no folder then. */
export async function release({
  output,
  chart = CHART,
  changelog = join(ROOT, 'CHANGELOG.md'),
  architectures = (['amd64', 'arm64'] as const).filter((one) => existsSync(imageArchive(one))),
}: ReleaseOptions): Promise<string[]> {
  const executables = builtExecutables(architectures);
  requireOneCommit(architectures);
  requireOneVersion(chart, changelog);
  rmSync(output, { recursive: true, force: true });
  mkdirSync(output, { recursive: true });
  try {
    for (const { architecture, path } of executables) {
      requireVersion(`${imageArchive(architecture)}, label`, imageLabel(architecture, 'version'));
      packExecutable(architecture, path, changelog, output);
      copyFileSync(imageArchive(architecture), join(output, `${IMAGE}-${VERSION}-image-${architecture}.tar`));
      copyFileSync(imageSbom(architecture), join(output, `${IMAGE}-${VERSION}-image-${architecture}.cdx.json`));
    }
    copyFileSync(join(ROOT, 'dist/THIRD-PARTY-NOTICES'), join(output, 'THIRD-PARTY-NOTICES'));
    await packChart(chart, output);
    const names = readdirSync(output).sort();
    const sums = names.map((name) => `${sha256(join(output, name))}  ${name}\n`);
    writeFileSync(join(output, 'SHA256SUMS'), sums.join(''));
    return [...names, 'SHA256SUMS'].sort();
  } catch (error) {
    rmSync(output, { recursive: true, force: true });
    throw error;
  }
}

/** Those that an image was made of. */
function builtExecutables(architectures: readonly Architecture[]): Executable[] {
  const all: Executable[] = [
    { architecture: 'amd64', path: join(ROOT, 'dist', IMAGE) },
    { architecture: 'arm64', path: join(ROOT, 'dist', `${IMAGE}-arm64`) },
  ];
  const built = all.filter(({ architecture }) => architectures.includes(architecture));
  if (!existsSync(imageArchive('amd64'))) {
    throw new Error(`${imageArchive('amd64')} is not there: npm run image`);
  }
  for (const { architecture, path } of built) {
    const { components } = JSON.parse(readFileSync(imageSbom(architecture), 'utf8')) as {
      components: { 'bom-ref': string; hashes?: { content: string }[] }[];
    };
    const inImage = components.find((component) => component['bom-ref'] === 'executable')?.hashes?.[0]?.content;
    if (inImage !== sha256(path)) throw new Error(`${path} is not the one in the image: npm run image`);
  }
  return built;
}

function requireOneVersion(chart: string, changelog: string): void {
  requireVersion('executable, --version', run([join(ROOT, 'dist', IMAGE), '--version']).trim());
  const { version, appVersion } = parse(readFileSync(join(chart, 'Chart.yaml'), 'utf8')) as Record<string, unknown>;
  requireVersion('Chart.yaml, version', version);
  requireVersion('Chart.yaml, appVersion', appVersion);
  const [, newest] = /^## \[?(\d+\.\d+\.\d+[^\]\s]*)/m.exec(readFileSync(changelog, 'utf8')) ?? [];
  requireVersion(`${basename(changelog)}, newest`, newest);
}

function requireOneCommit(architectures: readonly Architecture[]): void {
  const revisions = architectures.map((one) => `${one} ${imageLabel(one, 'revision')}`);
  if (new Set(revisions.map((text) => text.split(' ')[1])).size > 1) {
    throw new Error(`the images are of different commits (${revisions.join(', ')}): npm run image -- --arch arm64`);
  }
}

function requireVersion(where: string, found: unknown): void {
  if (found !== VERSION) throw new Error(`${where}: version ${String(found)}, but package.json has ${VERSION}`);
}

function imageLabel(architecture: Architecture, name: string): string | undefined {
  const blob = (digest: string) =>
    JSON.parse(run(['tar', '-xOf', imageArchive(architecture), `blobs/${digest.replace(':', '/')}`])) as Record<
      string,
      unknown
    >;
  const index = JSON.parse(run(['tar', '-xOf', imageArchive(architecture), 'index.json'])) as {
    manifests: { digest: string }[];
  };
  const manifest = blob(index.manifests[0]?.digest ?? '') as { config: { digest: string } };
  const { config } = blob(manifest.config.digest) as { config: { Labels: Record<string, string> } };
  return config.Labels[`org.opencontainers.image.${name}`];
}

/** For a node without Kubernetes: the executable, an example of its entry, and the papers. */
function packExecutable(architecture: Architecture, path: string, changelog: string, output: string): void {
  const name = `${IMAGE}-${VERSION}-linux-${architecture}`;
  const work = mkdtempSync(join(output, '.pack-'));
  const directory = join(work, name);
  mkdirSync(join(directory, 'LICENSES'), { recursive: true });
  copyFileSync(path, join(directory, IMAGE));
  copyFileSync(changelog, join(directory, 'CHANGELOG.md'));
  for (const file of ['README.md', 'LICENSE', 'cni-conf.example.json']) {
    copyFileSync(join(ROOT, file), join(directory, file));
  }
  for (const file of readdirSync(join(ROOT, 'LICENSES'))) {
    copyFileSync(join(ROOT, 'LICENSES', file), join(directory, 'LICENSES', file));
  }
  copyFileSync(join(ROOT, 'dist/THIRD-PARTY-NOTICES'), join(directory, 'THIRD-PARTY-NOTICES'));
  archive(work, join(output, `${name}.tar.gz`), origin().epoch, name);
  rmSync(work, { recursive: true });
}

/** helm decides what belongs to the chart; the time that it packed it does not. */
async function packChart(chart: string, output: string): Promise<void> {
  const helm = await helmProgram();
  const work = mkdtempSync(join(output, '.chart-'));
  run([helm, 'package', chart, '--destination', work], {
    env: { ...process.env, HOME: work, HELM_CONFIG_HOME: work, HELM_DATA_HOME: work, HELM_CACHE_HOME: work },
  });
  const packed = `${IMAGE}-${VERSION}.tgz`;
  run(['tar', '-xzf', join(work, packed), '-C', work]);
  archive(work, join(output, packed), origin().epoch, IMAGE);
  rmSync(work, { recursive: true });
}

function sha256(file: string): string {
  return createHash('sha256').update(readFileSync(file)).digest('hex');
}

if (import.meta.main) {
  const { values } = parseArgs({ options: { output: { type: 'string', default: join(ROOT, 'dist/release') } } });
  try {
    for (const name of await release({ output: values.output })) console.log(join(values.output, name));
  } catch (error) {
    console.error(`release: ${(error as Error).message}`);
    process.exitCode = 1;
  }
}
