// SPDX-License-Identifier: Apache-2.0
//
// STATUS, CHECK and `status` when the node is not as it should be: missing rights, no bpffs, and a state directory that
// somebody removed by hand, which detaches every program.

import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { Outcome } from '../netns.ts';
import { executable, type Pod, requireExecutable, Topology } from './topology.ts';

let topology: Topology;
let pod: Pod;

beforeAll(async () => {
  requireExecutable();
  topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 0 });
  pod = topology.pod('pod', { enroll: true });
  await topology.add(pod);
});
afterAll(() => topology?.close());

const verb = (
  command: string,
  entry: Record<string, unknown> = {},
  wrapper: readonly string[] = [],
): Promise<Outcome> =>
  topology.node.exec([...wrapper, executable], {
    env: topology.environment(command, pod),
    input: JSON.stringify({ ...topology.entry(pod), ...entry, cniVersion: '1.1.0' }),
  });
const errorOf = ({ status, stdout }: Outcome) => {
  expect(status).toBe(1);
  return JSON.parse(stdout) as { code: number; msg: string; details: string };
};

test('STATUS of a node in order says nothing', async () => {
  expect(await verb('STATUS')).toMatchObject({ status: 0, stdout: '' });
});

test.each(['net_admin', 'sys_admin'])('STATUS without CAP_%s is 50 and names it', async (capability) => {
  const error = errorOf(await verb('STATUS', {}, ['setpriv', `--bounding-set=-${capability}`]));
  expect(error).toMatchObject({ code: 50, details: expect.stringContaining(`CAP_${capability.toUpperCase()}`) });
});

test('ADD without CAP_SYS_ADMIN is 110, and changes nothing', async () => {
  const error = errorOf(await verb('ADD', {}, ['setpriv', '--bounding-set=-sys_admin']));
  expect(error).toMatchObject({ code: 110, details: expect.stringContaining('EPERM') });
  expect(await verb('CHECK')).toMatchObject({ status: 0, stdout: '' });
});

test('STATUS where no state could be made is 50', async () => {
  const directory = topology.testbed.directory('no-bpffs');
  const error = errorOf(await verb('STATUS', { stateDir: join(directory, 'state') }));
  expect(error).toMatchObject({ code: 50, details: `${directory} is not on a bpf file system` });
});

test('a state directory that was removed by hand: STATUS 51, CHECK 106, status exits 1, DEL succeeds', async () => {
  rmSync(topology.stateDir, { recursive: true });
  expect(errorOf(await verb('STATUS'))).toMatchObject({ code: 51, msg: `the state in ${topology.stateDir} is gone` });
  expect(errorOf(await verb('CHECK'))).toMatchObject({
    code: 106,
    details: expect.stringContaining('removed by hand'),
  });
  const directories = ['--state-dir', topology.stateDir, '--run-dir', topology.runDir];
  const status = await topology.node.exec([executable, 'status', ...directories]);
  expect(status).toMatchObject({ status: 1, stdout: expect.stringContaining('has been removed') });
  expect(await verb('DEL')).toMatchObject({ status: 0, stdout: '' });
});

test('after that an ADD makes the state anew, and STATUS is content', async () => {
  expect(await verb('ADD')).toMatchObject({ status: 0 });
  expect(await verb('STATUS')).toMatchObject({ status: 0, stdout: '' });
  expect(await verb('CHECK')).toMatchObject({ status: 0, stdout: '' });
});

test('a state directory whose parent is not there is an error of ADD, and DEL succeeds', async () => {
  const other = topology.testbed.bpffs('other');
  mkdirSync(join(other, 'maps'));
  const entry = { stateDir: join(other, 'maps', 'deeper', 'state') };
  expect(errorOf(await verb('ADD', entry))).toMatchObject({ code: 103 });
  expect(await verb('DEL', entry)).toMatchObject({ status: 0, stdout: '' });
});
