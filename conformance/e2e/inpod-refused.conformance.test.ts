// SPDX-License-Identifier: Apache-2.0
//
// Where the contract in-pod cannot be kept ADD says so and leaves nothing, in the kernel's own words and ours.

import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { acknowledge } from './inpod.ts';
import { executable, type Pod, requireExecutable, Topology } from './topology.ts';

const proxy = { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } };
let topology: Topology;
let pod: Pod;

const open = async (hook: 'tcx' | 'clsact', entry: Record<string, unknown> = {}) => {
  requireExecutable();
  topology = new Topology({ primary: 'ptp', hook, rpFilter: 1, entry: { proxy, ...entry } });
  await acknowledge(topology);
  pod = topology.pod('pod', { enroll: true });
  topology.wire(pod, 2);
};
afterEach(() => topology?.close());

const run = (verb: string) =>
  topology.node.exec([executable], {
    env: topology.environment(verb, pod),
    input: JSON.stringify(topology.entry(pod)),
  });
const dump = () => kernelState([topology.node, pod.netns], { pins: [topology.bpffs] });

/** What the pins say of an attachment. */
const ofAttachments = (state: KernelState) =>
  [...state.keys()].filter((key) => /\/(attachments|interfaces|endpoints|links)\b.*[[/]/.test(key));

/** The error of an ADD after which all is as before; the second time with the state, which the first one made. */
async function refused(): Promise<{ code: number; msg: string; details: string }> {
  const before = await dump();
  const first = await run('ADD');
  expect(first.status, first.stdout).toBe(1);
  const between = await dump();
  expect(differences(before, between, /^pins /)).toEqual([]);
  expect(ofAttachments(between)).toEqual([]);
  const second = await run('ADD');
  expect(second.stdout).toBe(first.stdout);
  expect(differences(between, await dump())).toEqual([]);
  return JSON.parse(first.stdout) as { code: number; msg: string; details: string };
}

describe.each(['no-sk-lookup', 'no-sk-assign', 'full-sockets-only'] as const)('variant %s', (variant) => {
  beforeEach(() => open('tcx', { variant }));

  test('102, since nothing could name the listener', async () => {
    expect(await refused()).toMatchObject({
      code: 102,
      msg: 'the contract "in-pod" needs socket lookup programs',
      details: 'the variant that this state was made with goes without them',
    });
    expect(await run('DEL')).toMatchObject({ status: 0, stdout: '' });
  });
});

describe.each(['tcx', 'clsact'] as const)('lo down in the pod, %s', (hook) => {
  beforeEach(() => open(hook));

  test('102 and what to do; ADD brings nothing up, and does well when it is', async () => {
    pod.netns.ip('link', 'set', 'lo', 'down');
    expect(await refused()).toMatchObject({
      code: 102,
      details: expect.stringMatching(/^RTM_NEWROUTE: ENETDOWN.*; lo is down there, .*has to bring it up$/),
    });
    expect(pod.netns.ip('-o', 'link', 'show', 'lo')).not.toMatch(/[<,]UP/);
    pod.netns.ip('link', 'set', 'lo', 'up');
    expect(await run('ADD')).toMatchObject({ status: 0 });
    expect(await run('CHECK')).toMatchObject({ status: 0 });
    expect(ofAttachments(await dump()).length).toBeGreaterThan(3);
  });
});
