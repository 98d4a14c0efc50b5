// SPDX-License-Identifier: Apache-2.0
//
// A pod's DEL while the agent works on that pod: two processes that know nothing of each other. Whatever the agent has
// read before and writes after, nothing of the pod is left: DEL is not sent again.
//
// AMBIENT_REDIRECT_LONG=1 tries more points in time. AMBIENT_REDIRECT_SEED repeats a run's choice of them.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { hex } from '../../plugin/attachments.ts';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { type Running, until } from '../netns.ts';
import { type Pod, requireExecutable, Topology } from './topology.ts';

const script = join(import.meta.dirname, 'known-pod.ts');
const addon = join(import.meta.dirname, '../../build/Release/ambient_redirect_faults.node');
const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';
const seed = Number(process.env.AMBIENT_REDIRECT_SEED ?? Date.now() % 1_000_000);
/** Kernel calls from one point in time to the next, besides those before each write to a map. */
const STEP = LONG ? 3 : 100;

let topology: Topology;
afterEach(() => topology?.close());

const inPod = { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } };

/** The process as the agent's, with the fault-injecting addon. */
function known(pod: Pod, env: Record<string, string>): Running {
  const native = loadNative();
  const state = native.openState(topology.stateDir);
  const key = native.listAttachments(state).map((one) => hex(one.key));
  native.closeState(state);
  const argv = [process.execPath, script, JSON.stringify(topology.entry(pod)), ...key];
  const variables = { PATH: process.env.PATH ?? '', AMBIENT_REDIRECT_ADDON: addon, ...env };
  return topology.testbed.start(topology.node.argv(argv), variables);
}

function isStopped({ pid }: Running): boolean {
  return /\) T /.test(readFileSync(`/proc/${pid}/stat`, 'latin1'));
}

describe.each([
  ['shared', 'tcx', {}],
  ['shared', 'clsact', {}],
  ['in-pod', 'tcx', { proxy: inPod }],
  ['in-pod', 'clsact', { proxy: inPod }],
] as const)('%s, %s', (_, hook, entry) => {
  test('DEL at any moment leaves nothing', { timeout: 1_200_000 }, async () => {
    requireExecutable();
    topology = new Topology({ primary: 'ptp', hook, rpFilter: 1, entry });
    const pod = topology.pod('app', {});
    topology.wire(pod, 2);
    const dump = (): Promise<KernelState> => kernelState([topology.node, pod.netns], { pins: [topology.bpffs] });
    await topology.addOurs(pod);
    // The first time programs are loaded.
    const file = join(topology.testbed.directory('calls'), 'calls');
    await known(pod, {}).ended;
    const whole = known(pod, { AMBIENT_REDIRECT_CALLS_FILE: file });
    await whole.ended;
    expect(whole.output).toBe('attached, detached');
    const calls = readFileSync(file, 'utf8').trim().split('\n');
    await topology.deleteOurs(pod);
    const before = await dump();
    const outcomes = new Set<string>();
    for (const [index, name] of calls.entries()) {
      if (name !== 'bpf(BPF_MAP_UPDATE_ELEM)' && index % STEP !== seed % STEP) continue;
      const call = index + 1;
      const title = `stopped before call ${call} of ${calls.length}, ${name}, seed ${seed}`;
      await topology.addOurs(pod);
      const running = known(pod, { AMBIENT_REDIRECT_STOP_CALL: `${call}` });
      await until(title, () => isStopped(running), 20_000);
      await topology.deleteOurs(pod);
      running.kill('SIGCONT');
      await running.ended;
      expect(running.output, title).toMatch(/^(attached, detached|refused \(\d+\): .+|)$/);
      outcomes.add(running.output);
      expect(differences(before, await dump()), title).toEqual([]);
    }
    expect([...outcomes]).toContain('attached, detached');
    expect([...outcomes].join('\n')).toMatch(/refused \(100\): .*is gone: DEL of eth0 .* was run meanwhile/);
  });
});
