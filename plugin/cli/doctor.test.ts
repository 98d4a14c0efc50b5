// SPDX-License-Identifier: Apache-2.0

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, test } from 'vitest';
import { capabilities, conflists } from './doctor.ts';

const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-doctor-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

describe('capabilities', () => {
  test('both there', () => {
    expect(capabilities((1n << 12n) | (1n << 21n)).map(({ level }) => level)).toEqual(['ok']);
  });

  test('each one that is missing is named', () => {
    expect(capabilities(1n << 12n)).toEqual([
      { level: 'fails', subject: 'capabilities', text: 'CAP_SYS_ADMIN is missing' },
    ]);
  });
});

describe('conflists', () => {
  const ours = {
    type: 'ambient-redirect',
    capabilities: { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true },
  };
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(root, 'net.d-'));
  });

  function write(name: string, plugins: readonly object[], cniVersion = '1.0.0'): void {
    writeFileSync(join(directory, name), JSON.stringify({ cniVersion, name: 'pods', plugins }));
  }

  function found(): string[] {
    return conflists(directory).map(({ level, text }) => `${level}: ${text}`);
  }

  test('a good chain is shown', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, { type: 'portmap' }, ours]);
    expect(found()).toEqual(['ok: chain: ptp, portmap, ambient-redirect']);
  });

  test('a file that sorts before ours is what a runtime reads', () => {
    write('05-other.conflist', [{ type: 'ptp' }]);
    write('10-pods.conflist', [{ type: 'ptp' }, ours]);
    expect(found()).toEqual(['warning: a file that sorts before it is read instead, by runtimes that take one']);
  });

  test('nothing before us in the chain', () => {
    write('10-pods.conflist', [ours, { type: 'ptp' }]);
    expect(found()).toEqual([
      'fails: our entry is the first of the chain; it needs the interface that another plugin made',
    ]);
  });

  test('annotations decide and do not come', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, { type: 'ambient-redirect' }]);
    expect(found()).toEqual([
      'fails: enrollment is "annotation", and the capability io.kubernetes.cri.pod-annotations is not declared',
    ]);
  });

  test('bandwidth behind us, unannounced', () => {
    write('10-pods.conflist', [
      { type: 'ptp' },
      { type: 'ambient-redirect', enrollment: 'all' },
      { type: 'bandwidth' },
    ]);
    expect(found()).toEqual([
      'warning: bandwidth follows, and our entry does not declare the capability "bandwidth": its queue would be skipped',
    ]);
  });

  test('a plugin behind us that changes the interface', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, ours, { type: 'portmap' }, { type: 'tuning' }]);
    expect(found()).toEqual([
      'fails: our entry is before portmap, tuning: what they change of the interface is not what we attached to',
    ]);
  });

  test('our entry twice', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, ours, ours]);
    expect(found()).toEqual(['fails: our entry is there 2 times']);
  });

  test('alone in a file of the old kind', () => {
    writeFileSync(join(directory, '10.conf'), JSON.stringify({ cniVersion: '1.0.0', name: 'n', ...ours }));
    expect(found()).toEqual([
      'fails: our entry is the first of the chain; it needs the interface that another plugin made',
    ]);
  });

  test.each<[object, string]>([
    [
      { type: 'istio-cni', Ambient_Enabled: true },
      'fails: istio-cni is in the same chain with ambient mode on: both redirect the same pods',
    ],
    [{ type: 'kmesh-cni' }, 'warning: kmesh-cni is in the same chain; it may redirect the same pods'],
    [{ type: 'merbridge-cni' }, 'warning: merbridge-cni is in the same chain; it may redirect the same pods'],
    [{ TYPE: 'linkerd-cni' }, 'warning: linkerd-cni is in the same chain; it may redirect the same pods'],
  ])('another mesh plugin in the chain: %j', (plugin, expected) => {
    write('10-pods.conflist', [{ type: 'ptp' }, ours, plugin]);
    expect(found()).toEqual([expected]);
  });

  test('istio-cni for sidecars', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, { type: 'istio-cni', ambient_enabled: false }, ours]);
    expect(found()).toEqual([
      'ok: chain: ptp, istio-cni, ambient-redirect',
      'note: istio-cni is in the same chain, for sidecars',
    ]);
  });

  test('a version that we do not speak', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, ours], '0.2.0');
    expect(found()).toEqual(['fails: cniVersion 0.2.0: ADD answers with code 1; install sets 1.0.0']);
  });

  test('loopback before us: containerd gives pods nothing else', () => {
    writeFileSync(join(directory, '01-lo.conf'), JSON.stringify({ type: 'loopback', name: 'lo' }));
    write('10-pods.conflist', [{ type: 'ptp' }, ours]);
    expect(found()).toEqual(['warning: a file that sorts before it is read instead, by runtimes that take one']);
  });

  test('an invalid entry is reported with its key', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, { ...ours, failurePolicy: 'ajar' }]);
    expect(found()).toEqual(['fails: invalid field "failurePolicy" = "ajar": expected one of "closed", "open"']);
  });

  test('cniVersion 1.1.0 and older containerd', () => {
    write('10-pods.conflist', [{ type: 'ptp' }, ours], '1.1.0');
    expect(found()).toEqual([
      'ok: chain: ptp, ambient-redirect',
      'note: cniVersion 1.1.0: containerd before 1.7 fails every ADD with it; 1.0.0 works everywhere',
    ]);
  });

  test('the first file is no JSON', () => {
    writeFileSync(join(directory, '01.conflist'), '{');
    write('10-pods.conflist', [{ type: 'ptp' }, ours]);
    expect(found()).toEqual([
      expect.stringMatching(/^warning: cannot decode .*; containerd starts no pod while this is its first file$/),
      'warning: a file that sorts before it is read instead, by runtimes that take one',
    ]);
  });

  test('no directory', () => {
    rmSync(directory, { recursive: true });
    expect(found()).toEqual([`note: ${directory} cannot be read: ENOENT`]);
  });
});
