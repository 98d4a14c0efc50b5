// SPDX-License-Identifier: Apache-2.0
// `npm run release`: what is handed out belongs together, and is refused where it does not.

import { cpSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { parse } from 'yaml';
import { imageArchive, imageSbom, ROOT, VERSION } from '../../deploy/image/reference.ts';
import { release } from '../../deploy/release.ts';
import { CHART, helm, missingHelm } from '../chart/helm.ts';
import { must, Testbed } from '../netns.ts';
import { buildImage } from './build.ts';

const testbed = Testbed.open();
afterAll(() => testbed.close());

// Without helm there is no chart to hand out, and so no release.
const without = missingHelm();
const title = (text: string) => (without === undefined ? text : `(optional) ${text}: ${without}`);
const run = test.skipIf(without !== undefined);

const output = join(testbed.directory('release'), 'out');
/** An arm64 image of an earlier commit may be lying there. */
const architectures = ['amd64'] as const;
let names: string[];

beforeAll(async () => {
  if (without !== undefined) return;
  await buildImage();
  names = await release({ output, architectures });
}, 300_000);

run(title('has executable, image, chart, ingredients, notices and checksums, all of one version'), async () => {
  expect(names).toEqual([
    'SHA256SUMS',
    'THIRD-PARTY-NOTICES',
    `ambient-redirect-${VERSION}-image-amd64.cdx.json`,
    `ambient-redirect-${VERSION}-image-amd64.tar`,
    `ambient-redirect-${VERSION}-linux-amd64.tar.gz`,
    `ambient-redirect-${VERSION}.tgz`,
  ]);
  const file = (name: string) => join(output, name);
  must(['sh', '-c', `cd '${output}' && sha256sum --check --strict --quiet SHA256SUMS`]);
  const summed = readFileSync(file('SHA256SUMS'), 'utf8').trim().split('\n');
  expect(summed.map((line) => line.split('  ')[1])).toEqual(names.filter((name) => name !== 'SHA256SUMS'));

  for (const one of [imageArchive('amd64'), imageSbom('amd64')]) {
    const released = file(basename(one).replace('ambient-redirect-', `ambient-redirect-${VERSION}-`));
    expect(readFileSync(released).equals(readFileSync(one))).toBe(true);
  }

  const unpacked = testbed.directory('unpacked');
  must(['tar', '-xzf', file(`ambient-redirect-${VERSION}-linux-amd64.tar.gz`), '-C', unpacked]);
  const directory = join(unpacked, `ambient-redirect-${VERSION}-linux-amd64`);
  expect(must(['ls', directory]).trim().split('\n')).toEqual(
    [
      ...['CHANGELOG.md', 'LICENSE', 'LICENSES', 'README.md', 'THIRD-PARTY-NOTICES'],
      ...['ambient-redirect', 'cni-conf.example.json'],
    ].sort(),
  );
  expect(must([join(directory, 'ambient-redirect'), '--version']).trim()).toBe(VERSION);
  expect(must(['stat', '-c', '%a', join(directory, 'ambient-redirect')]).trim()).toBe('755');

  const shown = await helm(['show', 'chart', file(`ambient-redirect-${VERSION}.tgz`)]);
  expect(shown.stderr).toBe('');
  expect(parse(shown.stdout)).toMatchObject({ name: 'ambient-redirect', version: VERSION, appVersion: VERSION });
  const template = await helm(['template', 'ambient', file(`ambient-redirect-${VERSION}.tgz`), '-n', 'istio-system']);
  expect(template.stdout).toContain('kind: DaemonSet');
});

run(
  title('is the same to the byte when it is made again'),
  async () => {
    const again = join(testbed.directory('again'), 'out');
    await release({ output: again, architectures });
    expect(readFileSync(join(again, 'SHA256SUMS'), 'utf8')).toBe(readFileSync(join(output, 'SHA256SUMS'), 'utf8'));
  },
  180_000,
);

run(title('is refused, and no folder left, where the chart or the change log has another version'), async () => {
  const work = testbed.directory('other');
  const chart = join(work, 'chart');
  cpSync(CHART, chart, { recursive: true });
  const description = join(chart, 'Chart.yaml');
  const text = readFileSync(description, 'utf8');
  const target = join(work, 'out');
  for (const key of ['version', 'appVersion']) {
    writeFileSync(description, text.replace(new RegExp(`^${key}: .*`, 'm'), `${key}: 9.8.7`));
    await expect(release({ output: target, chart, architectures })).rejects.toThrow(
      `Chart.yaml, ${key}: version 9.8.7, but package.json has ${VERSION}`,
    );
  }
  const changelog = join(work, 'CHANGELOG.md');
  writeFileSync(changelog, readFileSync(join(ROOT, 'CHANGELOG.md'), 'utf8').replace(`[${VERSION}]`, '[9.8.7]'));
  await expect(release({ output: target, changelog, architectures })).rejects.toThrow(
    'CHANGELOG.md, newest: version 9.8.7',
  );
  expect(existsSync(target)).toBe(false);
});
