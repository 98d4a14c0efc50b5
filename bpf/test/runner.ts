// SPDX-License-Identifier: Apache-2.0
//
// BPF_PROG_TEST_RUN looks devices and sockets up in the network namespace of the thread that calls it, so this program
// is started with nsenter(1) in the namespace that the tests want, and told over IPC what to run (node.ts).

import { loadNative } from '../../plugin/addon.ts';
import { HOST } from '../../plugin/native.ts';

/** One BPF_PROG_TEST_RUN of the program pinned at `path`. */
export interface TestRunCall {
  call: 'testRun';
  path: string;
  packet: Uint8Array;
  skb: { mark: number; ingressIfindex: number; ifindex: number; interfaceId?: number };
}

/** The id that the namespace at `path` has as seen from the runner's; one is allocated where there is none. */
export interface NetnsIdCall {
  call: 'netnsId';
  path: string;
}

export interface TestRunResult {
  verdict: number;
  packet: Uint8Array;
  mark: number;
  interfaceId: number;
}

export type Answer = { id: number; result: unknown } | { id: number; error: string };

const native = loadNative();
const programs = new Map<string, number>();

function programAt(path: string): number {
  let fd = programs.get(path);
  if (fd === undefined) {
    fd = native.openProgram(path);
    programs.set(path, fd);
  }
  return fd;
}

function answer(call: TestRunCall | NetnsIdCall): unknown {
  if (call.call === 'testRun') return native.testRun(programAt(call.path), call.packet, call.skb);
  const netns = native.openNetns(call.path);
  try {
    if (netns === HOST) throw new Error(`${call.path}: no descriptor`);
    return native.netnsId(netns, true);
  } finally {
    native.close(netns);
  }
}

process.on('message', (call: (TestRunCall | NetnsIdCall) & { id: number }) => {
  let reply: Answer;
  try {
    reply = { id: call.id, result: answer(call) };
  } catch (error) {
    reply = { id: call.id, error: error instanceof Error ? error.message : String(error) };
  }
  process.send?.(reply);
});
process.on('disconnect', () => process.exit(0));
