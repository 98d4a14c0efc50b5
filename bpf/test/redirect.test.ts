// SPDX-License-Identifier: Apache-2.0
// The five programs, one packet at a time: every branch that BPF_PROG_TEST_RUN reaches, IPv4 and IPv6.

import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { reasonsInSource } from './coverage.ts';
import { tcpFrame } from './frames.ts';
import { addresses, Datapath, fromPod, Node } from './node.ts';
import { DATAPATHS, type DatapathName, suite } from './suite.ts';

const seen = new Set<string>();
let node: Node;
const datapaths = new Map<DatapathName, Datapath>();
const datapath = (name: DatapathName): Datapath => {
  const found = datapaths.get(name);
  if (found === undefined) throw new Error(`${name} is not loaded`);
  return found;
};

beforeAll(async () => {
  node = await Node.open();
  for (const [name, variant] of Object.entries(DATAPATHS)) {
    datapaths.set(name as DatapathName, new Datapath(node, seen, variant));
  }
});
afterAll(() => node?.close());
beforeEach(() => {
  for (const one of datapaths.values()) one.reset();
});

suite(datapath);

describe('variants', () => {
  const names = Object.keys(loadNative().flags).filter((name) => name.startsWith('VARIANT_'));
  const all = names.map((name) => name.replace('VARIANT_', ''));
  test.each([...all.map((name) => [name]), all].map((names) => ({ names })))(
    'every program loads: $names',
    ({ names }) => {
      const { native } = node;
      const { state, directory, tag } = new Datapath(node, new Set(), names, 'all');
      expect(native.settings(state).variant).not.toBe(0);
      const without = names.some((name) => ['NO_SK_LOOKUP', 'NO_SK_ASSIGN', 'FULL_SOCKETS_ONLY'].includes(name))
        ? ['proxy_lookup', 'inpod_egress', 'inpod_ingress', 'inpod_lookup', 'inpod_sign', 'inpod_guard']
        : [];
      for (const program of Object.keys(native.programs).filter((name) => !without.includes(name))) {
        const fd = native.openProgram(join(directory, 'programs', tag, program));
        expect(native.programInfo(fd).name).toBe(program);
        native.close(fd);
      }
      native.closeState(state);
    },
  );
});

describe('counters', () => {
  test('add up packets and bytes', async () => {
    const { pod } = node.ifindex;
    const [ends, more] = [
      { address: addresses[4].outside, port: 1 },
      { address: addresses[4].pod, port: 2 },
    ];
    const standard = datapath('standard');
    node.native.deleteCounters(standard.state, pod);
    const frames = [0, 100, 1000].map((length) => tcpFrame(fromPod, ends, more, { payload: Buffer.alloc(length) }));
    for (const frame of frames) await standard.run('pod_egress', frame);
    expect(standard.counters(pod)).toEqual([
      { program: 'pod_egress', reason: 'drop_spoofed_source', packets: 3n, bytes: BigInt(3 * 54 + 1100) },
    ]);
  });
});

/** Enumerators of an enum of redirect.h, in lower case and without the prefix. */
function enumerators(name: string, prefix: string): Record<string, number> {
  const header = readFileSync(join(dirname(import.meta.dirname), 'redirect.h'), 'utf8');
  const body = new RegExp(`enum ${name} \\{([^}]*)\\}`).exec(header)?.[1] ?? '';
  const all = [...body.matchAll(/^\s*(\w+) = (\d+),/gm)];
  return Object.fromEntries(
    all.map(([, word = '', number]) => [word.replace(prefix, '').toLowerCase(), Number(number)]),
  );
}

describe('the words of redirect.h', () => {
  test('reasons are those of the addon, number by number', () => {
    const { max, ...reasons } = enumerators('reason', 'REASON_');
    expect(reasons).toEqual(loadNative().reasons);
    expect(Object.keys(reasons).length).toBeGreaterThan(30);
    expect(Math.max(...Object.values(reasons))).toBeLessThan(max ?? 0);
  });
  test('programs are those of the addon, number by number', () => {
    const programs = enumerators('program', '');
    expect(programs).toEqual(loadNative().programs);
    expect(Object.keys(programs).sort()).toEqual([...reasonsInSource().keys()].sort());
  });
  test('a program’s name fits into the kernel’s 15 bytes', () => {
    for (const program of Object.keys(loadNative().programs)) expect(program.length).toBeLessThan(16);
  });
});

/** In the source of a function that the program calls, but out of this program's reach, or of this suite's. */
const UNREACHABLE: Record<string, Record<string, string>> = {
  pod_egress: {
    dns_captured: 'needs a UDP listener: conformance/e2e',
    pass_fragment: 'conformance/e2e',
    drop_redirect_failed: 'the 12 bytes that bpf_skb_store_bytes writes have been read before',
    redirected_inbound: 'new_connection() for the other direction',
  },
  pod_ingress: {
    dns_captured: 'new_connection() for the other direction',
    pass_fragment: 'conformance/e2e',
    drop_redirect_failed: 'as in pod_egress',
    redirected_outbound: 'new_connection() for the other direction',
  },
  proxy_egress: { dns_answered: 'conformance/e2e', drop_redirect_failed: 'as in pod_egress' },
};

describe('reasons', () => {
  // Those of the in-pod contract: conformance/e2e/inpod.
  test.each([...reasonsInSource()].filter(([program]) => !program.startsWith('inpod_')))(
    '%s: every reason in its source was seen, or is known to be out of reach',
    (program, reasons) => {
      const unseen = [...reasons].filter((reason) => !seen.has(`${program} ${reason}`)).sort();
      expect(unseen).toEqual(Object.keys(UNREACHABLE[program] ?? {}).sort());
    },
  );
  test('no program counted a reason that its source does not have', () => {
    const inSource = reasonsInSource();
    const stray = [...seen].filter((pair) => {
      const [program = '', reason = ''] = pair.split(' ');
      return !inSource.get(program)?.has(reason);
    });
    expect(stray).toEqual([]);
  });
});
