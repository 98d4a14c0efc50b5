// SPDX-License-Identifier: Apache-2.0
// The programs of the in-pod contract with crafted packets (in-pod.ts), and the stubs by which they are reached.

import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { reasonsInSource } from './coverage.ts';
import { inPod } from './in-pod.ts';
import { InPodDatapath, InPodNode } from './in-pod-node.ts';
import { VERDICT } from './node.ts';

const native = loadNative();
const seen = new Set<string>();
let node: InPodNode;
let datapath: InPodDatapath;

beforeAll(async () => {
  node = await InPodNode.open();
  datapath = new InPodDatapath(node, seen, 'test');
});
afterAll(() => node?.close());
beforeEach(() => datapath.reset());

inPod(() => datapath);

describe('whose stub it is', () => {
  test('a stub says its id and goes on; where nothing is to go on to, it does as told', () => {
    const { state } = datapath;
    const ids = [1, 0x7fffffff, 0x80000000, 0xffffffff];
    for (const program of ['inpod_egress', 'inpod_ingress', 'inpod_lookup'] as const) {
      expect(native.jumpTarget(state, program)).toBeGreaterThan(0);
      for (const id of ids) {
        const fd = native.loadStub(state, program, id, 'drop');
        expect(native.programInfo(fd).name).toBe(program);
        native.close(fd);
      }
    }
    native.deleteCounters(state, 0xfffffffe);
    const fd = native.loadStub(state, 'inpod_egress', 0xfffffffe, 'drop');
    const tagged = Buffer.concat([Buffer.alloc(12, 2), Buffer.from('81000000', 'hex'), Buffer.alloc(60)]);
    datapath.enrol({ id: 0xfffffffe });
    expect(native.testRun(fd, tagged).verdict).toBe(VERDICT.DROP);
    native.close(fd);
    const counted = native.counters(state).filter(({ ifindex }) => ifindex === 0xfffffffe);
    expect(counted).toMatchObject([{ program: 'inpod_egress', reason: 'drop_vlan_tagged', packets: 1n }]);
  });
});

/** In the source of a function that the program calls, but out of this program's reach, or of this suite's. */
const UNREACHABLE: Record<string, Record<string, string>> = {
  inpod_egress: {
    pass_bypass: 'a packet without a socket, which a test run’s has: in-pod-hooks.test.ts',
  },
  inpod_sign: { drop_redirect_failed: 'the bytes that are written have been read before' },
};

describe('reasons', () => {
  test.each([...reasonsInSource()].filter(([program]) => program.startsWith('inpod_')))(
    '%s: every reason in its source was seen, or is known to be out of reach',
    (program, reasons) => {
      const unseen = [...reasons].filter((reason) => !seen.has(`${program} ${reason}`)).sort();
      expect(unseen).toEqual(Object.keys(UNREACHABLE[program] ?? {}).sort());
    },
  );
});
