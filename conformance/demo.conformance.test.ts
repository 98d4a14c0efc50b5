// SPDX-License-Identifier: Apache-2.0
// The executable's own demo, black box. How it behaves when interrupted, and what it leaves: plugin/demo/.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { expect, test } from 'vitest';

const EXECUTABLE = join(import.meta.dirname, '../dist/ambient-redirect');

test('needs no PATH, no HOME, and heeds no NODE_OPTIONS', async () => {
  const env = { NODE_OPTIONS: '--require=/nonexistent', NODE_EXTRA_CA_CERTS: '/nonexistent' };
  const child = spawn(EXECUTABLE, ['demo'], { env, cwd: '/', stdio: ['ignore', 'pipe', 'pipe'] });
  const ended = once(child, 'close');
  const [out, err] = await Promise.all([text(child.stdout), text(child.stderr)]);
  const [code] = await ended;
  // Node itself warns about NODE_EXTRA_CA_CERTS.
  const errors = err.split('\n').filter((line) => line !== '' && !line.startsWith('Warning: Ignoring extra certs'));
  expect({ code, errors, last: out.trimEnd().split('\n').at(-1) }).toEqual({
    code: 0,
    errors: [],
    last: '18 of 18 rows right.',
  });
  expect(existsSync(`/run/ambient-redirect-demo-${child.pid}`)).toBe(false);
});

test('a reader that goes away leaves nothing behind', async () => {
  const child = spawn(EXECUTABLE, ['demo', '--family', '4'], { stdio: ['ignore', 'pipe', 'ignore'] });
  const ended = once(child, 'exit');
  await once(child.stdout, 'data');
  child.stdout.destroy();
  await ended;
  expect(existsSync(`/run/ambient-redirect-demo-${child.pid}`)).toBe(false);
});

test('--keep and --remove', async () => {
  const child = spawn(EXECUTABLE, ['demo', '--keep', '--family', '6'], { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(child, 'exit');
  const out = await text(child.stdout);
  expect(await ended).toEqual([0, null]);
  const name = `ambient-redirect-demo-${child.pid}`;
  try {
    expect(out).toContain(`${EXECUTABLE} demo --remove ${name}\n`);
    expect(existsSync(`/run/${name}/client`)).toBe(true);
  } finally {
    const remove = spawn(EXECUTABLE, ['demo', '--remove', name], { stdio: ['ignore', 'ignore', 'inherit'] });
    expect(await once(remove, 'exit')).toEqual([0, null]);
  }
  expect(existsSync(`/run/${name}`)).toBe(false);
});
