// SPDX-License-Identifier: Apache-2.0
// node .ci/test.mjs [FILTER...]: types, lint, build, then every test (or those whose file matches a FILTER), then the
// native tests again under AddressSanitizer. The last line is "N passed, N failed", with ", N skipped" where some were.
//
// Exit code 1 for any failure, if no test ran, and in CI (CI=true) for any skipped test that is not "(optional)".
// AMBIENT_REDIRECT_LONG=1 (npm run test:long) makes tests use the full counts.

import { spawnSync } from 'node:child_process';
import { existsSync, globSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { release } from 'node:os';
import { dirname, join, relative } from 'node:path';

const ROOT = dirname(import.meta.dirname);
const BIN = join(ROOT, 'node_modules/.bin');
const RESULTS = join(ROOT, 'build/test-results');
const IN_CI = /^(1|true)$/i.test(process.env.CI ?? '');

/** Other people's programs that tests run against: how a test that did is recognised, and how to ask the version. */
const PEERS = [
  { name: 'HAProxy', pattern: /haproxy/i, version: ['haproxy', '-v'] },
  { name: 'containerd', pattern: /containerd/i, version: ['containerd', '--version'] },
  {
    name: "Debian's CNI plugins",
    pattern: /bandwidth|portmap|tuning|firewall|\bsbr\b/i,
    version: ['dpkg-query', '-W', 'containernetworking-plugins'],
  },
  { name: 'Prometheus', pattern: /prom(etheus|tool)/i, version: ['prometheus', '--version'] },
  { name: 'ztunnel', pattern: /real ztunnel/i, version: [process.env.ZTUNNEL_BINARY || 'ztunnel', 'version'] },
  { name: 'cnitool', pattern: /cnitool/i, version: ['go', 'version'] },
  {
    name: 'kube-apiserver',
    pattern: /kube-apiserver/i,
    version: [process.execPath, 'conformance/kubernetes/build.ts'],
  },
  { name: 'helm', pattern: /with helm/i, version: [process.execPath, 'conformance/chart/helm.ts'] },
];

process.chdir(ROOT);
const filters = process.argv.slice(2);
const KERNELS = join(RESULTS, 'kernels.json');
rmSync(KERNELS, { force: true });
const env = { ...process.env, PATH: `${BIN}:${process.env.PATH}` };
const total = { passed: 0, failed: 0, skipped: 0, optional: 0 };
const timings = [];

step('types', join(BIN, 'tsc'), ['--noEmit']);
step('lint', join(BIN, 'biome'), ['check', '--error-on-warnings', '.']);
// The API server and helm take minutes the first time, which no test's time limit is for; without Go there are none.
const isWanted = (...parts) =>
  filters.length === 0 || filters.some((filter) => parts.some((part) => filter.includes(part)));
if (isWanted('kube', 'chart')) step('kube-apiserver', process.execPath, ['conformance/kubernetes/build.ts']);
if (isWanted('chart', 'helm')) step('helm', process.execPath, ['conformance/chart/helm.ts']);
if (step('build', process.execPath, ['.ci/build.mjs', 'executable', 'faults', 'asan', 'image'])) {
  const reports = [suite('tests', filters)];
  const native = globSync('native/**/*.test.ts').filter(
    (file) => filters.length === 0 || filters.some((filter) => file.includes(filter)),
  );
  if (native.length > 0) reports.push(suite('addressSanitizer', native, ['--project', 'unit'], sanitizerEnvironment()));
  printPeers(reports.flat());
  printKernels();
}
finish();

/** Runs a step that is not a test; its failure counts as one. */
function step(name, command, args) {
  const started = performance.now();
  const { status, error } = spawnSync(command, args, { stdio: 'inherit', env });
  timings.push([name, performance.now() - started]);
  if (status === 0) return true;
  console.error(`test: ${name} failed${error ? `: ${error.message}` : ''}`);
  total.failed += 1;
  return false;
}

/** Runs vitest and adds its counts to `total`. Returns every test's full name, file and state. */
function suite(name, files, options = [], extra = {}) {
  mkdirSync(RESULTS, { recursive: true });
  const report = join(RESULTS, `${name}.json`);
  rmSync(report, { force: true });
  const started = performance.now();
  const { status, signal } = spawnSync(
    process.execPath,
    [
      'node_modules/vitest/vitest.mjs',
      'run',
      '--config',
      'conformance/vitest.config.ts',
      '--reporter=default',
      '--reporter=json',
      `--outputFile.json=${report}`,
      ...options,
      ...files,
    ],
    { stdio: 'inherit', env: { ...env, ...extra } },
  );
  timings.push([name, performance.now() - started]);
  if (!existsSync(report)) {
    console.error(`test: vitest ended (${signal ?? `exit ${status}`}) without a report`);
    total.failed += 1;
    return [];
  }
  const tests = [];
  let failed = 0;
  for (const file of JSON.parse(readFileSync(report, 'utf8')).testResults) {
    // A file that could not be loaded has no tests to count.
    if (file.status === 'failed' && file.assertionResults.every((test) => test.status !== 'failed')) failed += 1;
    for (const { status: state, fullName } of file.assertionResults) {
      tests.push({ name: fullName, file: relative(ROOT, file.name), state });
      if (state === 'passed') total.passed += 1;
      else if (state === 'failed') failed += 1;
      else {
        total.skipped += 1;
        if (fullName.includes('(optional)')) total.optional += 1;
        console.error(`test: ${state}: ${relative(ROOT, file.name)}: ${fullName}`);
      }
    }
  }
  if (status !== 0 && failed === 0) {
    console.error(`test: no test of "${name}" failed, but vitest ended with ${signal ?? `exit ${status}`}`);
    failed = 1;
  }
  total.failed += failed;
  return tests;
}

/** Node itself is not built with the sanitizer, so its run time has to be there first; V8 leaks on purpose. */
function sanitizerEnvironment() {
  const { stdout } = spawnSync('gcc', ['-print-file-name=libasan.so'], { encoding: 'utf8' });
  return {
    AMBIENT_REDIRECT_ADDON: join(ROOT, 'build/Release/ambient_redirect_asan.node'),
    LD_PRELOAD: stdout.trim(),
    ASAN_OPTIONS: 'detect_leaks=0:halt_on_error=1:abort_on_error=1',
  };
}

function printPeers(tests) {
  for (const { name, pattern, version } of PEERS) {
    const ranWithIt = ({ file, name: title, state }) =>
      state === 'passed' && file.startsWith('conformance/') && pattern.test(`${file} ${title}`);
    const count = tests.filter(ranWithIt).length;
    const { stdout } = spawnSync(version[0], version.slice(1), { encoding: 'utf8' });
    console.log(
      `peer ${name}: ${stdout ? stdout.split('\n')[0].trim() : 'not installed'}, ${count} tests passed with it`,
    );
  }
}

/** Of other kernels: what conformance/kernels wrote down. */
function printKernels() {
  console.log(`kernel ${release()}: this machine's`);
  const others = existsSync(KERNELS) ? JSON.parse(readFileSync(KERNELS, 'utf8')) : [];
  for (const { release, notRun, groups } of others) {
    const sum = (key) => groups.reduce((all, group) => all + group[key], 0);
    console.log(
      `kernel ${release}: ${notRun ? `not run: ${notRun}` : `${sum('passed')} passed, ${sum('failed')} failed`}`,
    );
  }
}

function finish() {
  console.log(timings.map(([name, ms]) => `${name} ${(ms / 1000).toFixed(1)} s`).join(', '));
  const { passed, failed, skipped, optional } = total;
  const refused = IN_CI && skipped > optional;
  if (refused) console.error('test: tests were skipped, which fails the run in CI');
  if (passed === 0 && failed === 0) console.error('test: no test ran');
  process.exitCode = failed > 0 || passed === 0 || refused ? 1 : 0;
  console.log(`${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`);
}
