// SPDX-License-Identifier: Apache-2.0
//
// The programs' counters, read with bpftool from the pinned map: nothing of the product is between kernel and test.
// The words come from bpf/redirect.h.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { must } from '../netns.ts';

const header = readFileSync(join(import.meta.dirname, '../../bpf/redirect.h'), 'utf8');

function enumeration(name: string, prefix: string): Map<number, string> {
  const body = new RegExp(`enum ${name} \\{([^}]*)\\}`).exec(header)?.[1] ?? '';
  const entries = [...body.matchAll(new RegExp(`^\\s*${prefix}(\\w+) = (\\d+)`, 'gm'))];
  if (entries.length === 0) throw new Error(`bpf/redirect.h: enum ${name} not found`);
  return new Map(entries.map(([, word = '', number]) => [Number(number), word.toLowerCase()]));
}

const reasons = enumeration('reason', 'REASON_');
const programs = enumeration('program', '');

export interface Count {
  /** Host-side interface index; 0 for proxy_ingress. */
  ifindex: number;
  program: string;
  reason: string;
  packets: number;
}

type Dump = { key: string[]; values: { cpu: number; value: string[] }[] }[];

function bytes(text: readonly string[]): DataView {
  return new DataView(Uint8Array.from(text, (byte) => Number.parseInt(byte, 16)).buffer);
}

/** Every counter of a state directory, CPUs summed. */
export function counters(stateDir: string): Count[] {
  const dump = JSON.parse(must(['bpftool', '-j', 'map', 'dump', 'pinned', join(stateDir, 'counters')])) as Dump;
  return dump.map(({ key, values }) => {
    const view = bytes(key);
    const program = view.getUint16(4, true);
    const reason = view.getUint16(6, true);
    return {
      ifindex: view.getUint32(0, true),
      program: programs.get(program) ?? `program ${program}`,
      reason: reasons.get(reason) ?? `reason ${reason}`,
      packets: values.reduce((sum, { value }) => sum + Number(bytes(value).getBigUint64(0, true)), 0),
    };
  });
}

/** Packets counted since `before`, by "program reason", of one interface or (undefined) of all. Zeroes left out. */
export function increases(before: readonly Count[], after: readonly Count[], ifindex?: number): Record<string, number> {
  const sums = new Map<string, number>();
  const add = (counts: readonly Count[], sign: 1 | -1) => {
    for (const one of counts) {
      if (ifindex !== undefined && one.ifindex !== ifindex) continue;
      const key = `${one.program} ${one.reason}`;
      sums.set(key, (sums.get(key) ?? 0) + sign * one.packets);
    }
  };
  add(after, 1);
  add(before, -1);
  return Object.fromEntries([...sums].filter(([, packets]) => packets !== 0).sort());
}

/** The five bytes of the source MAC by which the programs know each other's frames (struct settings.sign). */
export function sign(stateDir: string): Uint8Array {
  const [entry] = JSON.parse(must(['bpftool', '-j', 'map', 'dump', 'pinned', join(stateDir, 'settings')])) as {
    value: string[];
  }[];
  // layout, max_pods, max_flows, direct_flows, three marks, variant: eight 32-bit words before it.
  return Uint8Array.from((entry?.value ?? []).slice(32, 37), (byte) => Number.parseInt(byte, 16));
}
