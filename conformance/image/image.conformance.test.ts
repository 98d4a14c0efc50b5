// SPDX-License-Identifier: Apache-2.0
// The image as others meet it: skopeo reads it, a real containerd imports and runs it, and what is in it is what is
// meant to be. It is built by `npm run image`, here once more beside the one that is there.

import { createHash } from 'node:crypto';
import { lstatSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { mkdir, readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { Version } from '@cyclonedx/cyclonedx-library/Spec';
import { JsonStrictValidator } from '@cyclonedx/cyclonedx-library/Validation';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { pathsBelow } from '../../deploy/image/files.ts';
import { imageArchive, imageReference, imageSbom, ROOT, VERSION } from '../../deploy/image/reference.ts';
import { network } from '../containerd/networks.ts';
import { ThrowawayNode } from '../containerd/throwaway-node.ts';
import { exec, must, type Outcome, Testbed } from '../netns.ts';
import { buildImage } from './build.ts';

const MEGABYTE = 1e6;
const archive = imageArchive('amd64');
const executable = join(ROOT, 'dist/ambient-redirect');

const testbed = Testbed.open();
afterAll(() => testbed.close());

interface Manifest {
  layers: { digest: string; size: number; mediaType: string }[];
  annotations: Record<string, string>;
}

interface Configuration {
  architecture: string;
  created: string;
  config: Record<string, unknown> & { Labels: Record<string, string> };
}

/** Unpacks both layers over each other, as a runtime does. */
function unpack(manifest: Manifest, directory: string): void {
  for (const { digest } of manifest.layers) {
    const layer = `blobs/${digest.replace(':', '/')}`;
    must(['sh', '-c', `tar -xOf '${archive}' '${layer}' | tar -xz -C '${directory}' --same-permissions`]);
  }
}

let manifest: Manifest;
let configuration: Configuration;
let root: string;

beforeAll(async () => {
  await buildImage();
  manifest = JSON.parse(must(['skopeo', 'inspect', '--raw', `oci-archive:${archive}`])) as Manifest;
  configuration = JSON.parse(must(['skopeo', 'inspect', '--config', `oci-archive:${archive}`])) as Configuration;
  root = testbed.directory('root');
  unpack(manifest, root);
}, 300_000);

test('built once more, in another time zone and under another umask, it is the same to the byte', async () => {
  const again = testbed.directory('again');
  await buildImage(`--output '${again}'`, 'umask 077; export TZ=Pacific/Auckland LC_ALL=C.UTF-8;');
  const sum = (file: string) => createHash('sha256').update(readFileSync(file)).digest('hex');
  for (const file of [archive, imageSbom('amd64')]) expect(sum(join(again, basename(file)))).toBe(sum(file));
}, 300_000);

test('it is smaller than 60 MB, and its larger layer has nothing of Debian', () => {
  expect(statSync(archive).size).toBeLessThan(60 * MEGABYTE);
  expect(manifest.layers.map(({ mediaType }) => mediaType)).toEqual([
    'application/vnd.oci.image.layer.v1.tar+gzip',
    'application/vnd.oci.image.layer.v1.tar+gzip',
  ]);
  const [debian, ours] = manifest.layers as [Manifest['layers'][0], Manifest['layers'][0]];
  // What a node fetches once, as long as Debian's packages stay the same.
  expect(debian.size).toBeLessThan(6 * MEGABYTE);
  const layer = `blobs/${ours.digest.replace(':', '/')}`;
  const names = must(['sh', '-c', `tar -xOf '${archive}' '${layer}' | tar -tz`]);
  expect(
    names
      .split('\n')
      .filter((name) => name !== '' && !name.endsWith('/'))
      .sort(),
  ).toEqual([
    './usr/bin/ambient-redirect',
    ...[
      'LICENSE',
      'LICENSES/BSD-2-Clause.txt',
      'LICENSES/GPL-2.0-only.txt',
      'THIRD-PARTY-NOTICES',
      'sbom.cdx.json',
    ].map((name) => `./usr/share/doc/ambient-redirect/${name}`),
  ]);
});

test('labels and annotations say what it is, and of which commit', () => {
  const revision = must(['git', '-C', ROOT, 'rev-parse', 'HEAD']).trim();
  const { Labels, ...config } = configuration.config;
  expect(Labels).toEqual({
    'org.opencontainers.image.title': 'ambient-redirect',
    'org.opencontainers.image.description': expect.stringContaining('CNI plugin'),
    'org.opencontainers.image.version': VERSION,
    'org.opencontainers.image.licenses': 'Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)',
    'org.opencontainers.image.created': new Date(configuration.created).toISOString(),
    'org.opencontainers.image.revision': expect.stringMatching(new RegExp(`^${revision}(?:-dirty)?$`)),
  });
  expect(manifest.annotations).toEqual(Labels);
  expect(config).toEqual({
    User: '0:0',
    Env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'],
    Entrypoint: ['/usr/bin/ambient-redirect'],
    WorkingDir: '/',
    StopSignal: 'SIGTERM',
  });
  expect(configuration.architecture).toBe('amd64');
});

describe('the files', () => {
  test('are those of root, and give nobody else a right or root a wrong one', () => {
    const odd = pathsBelow(root).flatMap((path) => {
      const { mode, uid, gid } = lstatSync(join(root, path));
      const kind = mode & 0o170000;
      const link = kind === 0o120000;
      const plain = kind === 0o100000 || kind === 0o040000;
      const right = link || (plain && (mode & 0o7022) === 0 && (mode & 0o444) === 0o444);
      return right && uid === 0 && gid === 0 ? [] : [`${path} ${mode.toString(8)} ${uid}:${gid}`];
    });
    expect(odd).toEqual([]);
  });

  test('are three programs, the libraries that these need, and papers', () => {
    const files = pathsBelow(root).filter((path) => lstatSync(join(root, path)).isFile());
    const isElf = (path: string) => readFileSync(join(root, path)).subarray(0, 4).toString('latin1') === '\x7fELF';
    const elf = files.filter(isElf);
    const libraries = elf.filter((path) => path.startsWith('usr/lib/x86_64-linux-gnu/'));
    expect(elf.filter((path) => !libraries.includes(path))).toEqual([
      'usr/bin/ambient-redirect',
      'usr/bin/nsenter',
      'usr/sbin/nft',
    ]);
    const needed = new Set(
      elf.flatMap((path) =>
        [...must(['readelf', '--dynamic', '--wide', join(root, path)]).matchAll(/\(NEEDED\).*\[(.*)\]/g)].map(
          ([, name]) => name ?? '',
        ),
      ),
    );
    const sonames = libraries.map(
      (path) => /\(SONAME\).*\[(.*)\]/.exec(must(['readelf', '--dynamic', '--wide', join(root, path)]))?.[1] ?? path,
    );
    // Name service: what glibc 2.36 opens for a resolver of before 2.34, and libpthread's and librt's stubs.
    expect(sonames.filter((name) => !needed.has(name)).sort()).toEqual(['libresolv.so.2', 'librt.so.1']);
    expect([...needed].filter((name) => !sonames.includes(name))).toEqual([]);

    const papers = files.filter((path) => !elf.includes(path));
    expect(papers.filter((path) => !/^usr\/share\/doc\/|^var\/lib\/dpkg\/status\.d\//.test(path))).toEqual([
      'etc/group',
      'etc/nsswitch.conf',
      'etc/passwd',
      'usr/lib/os-release',
    ]);
  });

  test('are the executable of the build, to the byte', () => {
    expect(readFileSync(join(root, 'usr/bin/ambient-redirect')).equals(readFileSync(executable))).toBe(true);
  });
});

describe('the list of ingredients', () => {
  interface Ingredient {
    name: string;
    version: string;
    type: string;
    purl?: string;
    components?: Ingredient[];
    hashes?: { content: string }[];
  }
  let text: string;
  let components: Ingredient[];

  beforeAll(() => {
    text = readFileSync(imageSbom('amd64'), 'utf8');
    ({ components } = JSON.parse(text) as { components: Ingredient[] });
  });

  test('is valid CycloneDX 1.6, and the same inside the image', async () => {
    expect(await new JsonStrictValidator(Version.v1dot6).validate(text)).toBeNull();
    expect(readFileSync(join(root, 'usr/share/doc/ambient-redirect/sbom.cdx.json'), 'utf8')).toBe(text);
  });

  test('has each Debian package of the image, in the version whose control file is there', () => {
    const status = join(root, 'var/lib/dpkg/status.d');
    const control = readdirSync(status).map((name) => {
      const fields = readFileSync(join(status, name), 'utf8');
      return { name, version: /^Version: (.*)$/m.exec(fields)?.[1] };
    });
    const listed = components.filter(({ purl, hashes }) => purl?.startsWith('pkg:deb/') && hashes);
    expect(listed.map(({ name, version }) => ({ name, version }))).toEqual(
      control.sort((a, b) => (a.name < b.name ? -1 : 1)),
    );
    for (const { name } of control) {
      // GCC's packages have one copyright between them.
      const owner = /^lib(gcc-s1|stdc\+\+6)$/.test(name) ? 'gcc-12-base' : name;
      expect(statSync(join(root, 'usr/share/doc', owner, 'copyright')).size).toBeGreaterThan(500);
    }
  });

  test('has what is linked in, Node with its OpenSSL, and each npm package of the notices', () => {
    const named = (name: string) => components.filter((one) => one.name === name);
    for (const [name, debian] of [
      ['libbpf', 'libbpf-dev'],
      ['libelf', 'libelf-dev'],
      ['zlib', 'zlib1g-dev'],
      ['libstdc++', 'libstdc++6'],
    ] as const) {
      const version = must(['dpkg-query', '-W', '-f', `\${Version}`, debian]);
      const [component, ...more] = named(name);
      expect(more).toEqual([]);
      expect(decodeURIComponent(component?.purl ?? '')).toContain(`pkg:deb/debian/${debian}@${version}?`);
      expect(version).toContain(component?.version);
    }
    const [node] = named('node');
    expect(node?.version).toBe(process.versions.node);
    expect(node?.components?.find(({ name }) => name === 'openssl')?.version).toBe(process.versions.openssl);

    const notices = readFileSync(join(root, 'usr/share/doc/ambient-redirect/THIRD-PARTY-NOTICES'), 'utf8');
    const inNotices = [...notices.matchAll(/^npm package (.*)\.$/gm)].map(([, name]) => name ?? '');
    const inList = components.flatMap(({ purl }) => /^pkg:npm\/(.*)@/.exec(decodeURIComponent(purl ?? ''))?.[1] ?? []);
    expect(inList.length).toBeGreaterThan(10);
    expect(inNotices).toEqual(expect.arrayContaining(inList));
    // Compiled into the addon, where nothing of it is left but inlined calls.
    expect(inNotices.filter((name) => !inList.includes(name))).toEqual(['node-addon-api']);
    const [own] = named('ambient-redirect');
    expect(own?.hashes?.[0]?.content).toBe(createHash('sha256').update(readFileSync(executable)).digest('hex'));
  });
});

describe('on a node with containerd', () => {
  let node: ThrowawayNode;
  let containers = 0;

  /** `ctr run`; without a command the entry point runs. */
  async function run(options: string[], command: string[]): Promise<Outcome> {
    const name = `image-${++containers}`;
    const cgroup = ['--cgroup', `/${node.name}/${name}`];
    const ctr = ['ctr', '-n', 'k8s.io', 'run', '--rm', ...cgroup, ...options, imageReference(), name, ...command];
    return await exec(node.argv(ctr), { timeout: 40_000 });
  }

  beforeAll(async () => {
    node = await ThrowawayNode.start(testbed);
    await node.writeConflist(network('ptp'));
    await node.startContainerd();
  });

  test('ctr imports it, and kubelet finds it under its name', async () => {
    await node.run(['ctr', '-n', 'k8s.io', 'images', 'import', archive], { timeout: 60_000 });
    const { images } = await node.cri.call('ListImages', {});
    expect(images.flatMap(({ repo_tags }) => repo_tags)).toContain(imageReference());
  });

  test('its entry point is the plugin, which says what it is when no runtime calls it', async () => {
    const { status, stderr } = await run([], []);
    expect(stderr).toContain('CNI protocol versions supported: 0.3.1, 0.4.0, 1.0.0, 1.1.0');
    expect(status).toBe(0);
  });

  test('--version, with a root file system that cannot be written to', async () => {
    const { status, stdout, stderr } = await run(['--read-only'], ['ambient-redirect', '--version']);
    expect({ status, stdout: stdout.trim(), stderr }).toEqual({ status: 0, stdout: VERSION, stderr: '' });
  });

  test('doctor finds what the node has', async () => {
    const binds = ['/etc/cni/net.d', '/opt/cni/bin', '/sys/fs/bpf'].flatMap((path) => [
      ...['--mount', `type=bind,src=${path},dst=${path},options=rbind:rw`],
    ]);
    const doctor = ['ambient-redirect', 'doctor', '-o', 'json'];
    const { status, stdout, stderr } = await run(['--privileged', '--net-host', ...binds], doctor);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    const said = JSON.parse(stdout) as {
      kernel: { release: string; features: Record<string, unknown> };
      findings: { level: string; text: string }[];
    };
    expect(said.kernel.release).toBe(must(['uname', '-r']).trim());
    const native = JSON.parse(await node.run([executable, 'doctor', '-o', 'json'])) as typeof said;
    expect(said.kernel.features).toEqual(native.kernel.features);
    expect(said.findings.filter(({ level }) => level === 'fails')).toEqual([]);
  });

  test('install puts executable and entry onto the node, whose next pod is recorded by them', async () => {
    const binds = [
      ['/opt/cni/bin', '/host/opt/cni/bin'],
      ['/etc/cni/net.d', '/host/etc/cni/net.d'],
      ['/run/ambient-redirect', '/run/ambient-redirect'],
    ].flatMap(([src, dst]) => ['--mount', `type=bind,src=${src},dst=${dst},options=rbind:rw`]);
    await mkdir(node.path('/run/ambient-redirect'));
    const { status, stdout, stderr } = await run(
      ['--net-host', '--read-only', '--mount', 'type=bind,src=/sys/fs/bpf,dst=/sys/fs/bpf,options=rbind:rw', ...binds],
      [
        ...['ambient-redirect', 'install', '--enrollment', 'annotation'],
        ...['--cni-bin-dir', '/host/opt/cni/bin', '--cni-net-dir', '/host/etc/cni/net.d'],
      ],
    );
    expect(stdout + stderr).toContain('added our entry');
    expect(status).toBe(0);
    const installed = await readFile(node.path('/opt/cni/bin/ambient-redirect'));
    expect(installed.equals(await readFile(executable))).toBe(true);
    const conflist = JSON.parse(await readFile(node.path('/etc/cni/net.d/10-throwaway.conflist'), 'utf8')) as {
      plugins: { type: string }[];
    };
    expect(conflist.plugins.map(({ type }) => type)).toEqual(['ptp', 'portmap', 'ambient-redirect']);

    const pod = await node.runPod('shop', 'client', { annotations: { 'ambient-redirect/enroll': 'true' } });
    try {
      const rows = JSON.parse(await node.run([executable, 'pods', '-o', 'json'])) as { name: string; state: string }[];
      expect(rows).toMatchObject([{ name: 'client', state: 'attached' }]);
    } finally {
      await node.removePod(pod);
    }
  });

  test('nft makes rules in another network namespace, as on kernels without sk_lookup', async () => {
    await node.run(['ip', 'netns', 'add', 'proxy']);
    const binds = ['--mount', 'type=bind,src=/run/netns,dst=/run/netns,options=rbind:rw'];
    const nft = ['nft', 'add', 'table', 'inet', 'image'];
    const { status, stderr } = await run(['--privileged', ...binds], ['nsenter', '--net=/run/netns/proxy', ...nft]);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(await node.run(['nft', 'list', 'ruleset'], { netns: '/run/netns/proxy' })).toContain('table inet image');
    expect(await node.run(['nft', 'list', 'ruleset'])).not.toContain('table inet image');
  });
});
