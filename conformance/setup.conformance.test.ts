// SPDX-License-Identifier: Apache-2.0
// .ci/setup on a machine it cannot prepare: one line that says what is missing, and nothing done.

import { cpSync, mkdirSync, symlinkSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { exec, Testbed } from './netns.ts';

const ROOT = dirname(import.meta.dirname);
const SETUP = join(ROOT, '.ci/setup');
const testbed = Testbed.open();
afterAll(() => testbed.close());

test('without root', async () => {
  const { status, stdout, stderr } = await exec(['setpriv', '--reuid=65534', '--clear-groups', 'sh', SETUP, 'test']);
  expect({ status, stdout, stderr }).toEqual({
    status: 1,
    stdout: '',
    stderr: 'setup: needs root (network namespaces, BPF, apt-get); run it as root or with sudo\n',
  });
});

test('on a system without apt', async () => {
  const bin = testbed.directory('bin');
  for (const name of ['sh', 'dirname', 'uname', 'id']) symlinkSync(`/usr/bin/${name}`, join(bin, name));
  const { status, stdout, stderr } = await exec(['/bin/sh', SETUP, 'test'], { env: { PATH: bin } });
  expect({ status, stdout, stderr }).toEqual({
    status: 1,
    stdout: '',
    stderr: 'setup: needs a system with apt (Debian 12): apt-get is missing\n',
  });
});

test('in a checkout whose path contains whitespace', async () => {
  const checkout = join(testbed.directory('checkout'), 'my checkout');
  mkdirSync(join(checkout, '.ci'), { recursive: true });
  cpSync(SETUP, join(checkout, '.ci/setup'));
  const { status, stdout, stderr } = await exec(['sh', join(checkout, '.ci/setup'), 'build']);
  expect({ status, stdout, stderr }).toEqual({
    status: 1,
    stdout: '',
    stderr: `setup: the path of the checkout contains whitespace, which node-gyp cannot handle: ${checkout}\n`,
  });
});

test('with everything in place it does nothing, and soon', async () => {
  const { status, stdout, stderr, ms } = await exec(['sh', SETUP, 'test'], { cwd: '/' });
  expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: '', stderr: '' });
  expect(ms).toBeLessThan(3_000);
});
