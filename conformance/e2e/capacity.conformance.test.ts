// SPDX-License-Identifier: Apache-2.0
// The number of pods that a node can have: what maxPods says, and not one less because of pods that are gone.

import { afterEach, expect, test } from 'vitest';
import { executable, type Pod, requireExecutable, Topology } from './topology.ts';

let topology: Topology;
afterEach(() => topology?.close());

const MAX_PODS = 3;

async function add(pod: Pod): Promise<{ code: number; msg: string } | null> {
  const { status, stdout } = await topology.node.exec([executable], {
    env: topology.environment('ADD', pod),
    input: JSON.stringify(topology.entry(pod)),
  });
  return status === 0 ? null : (JSON.parse(stdout) as { code: number; msg: string });
}

test.each(['tcx', 'clsact'] as const)(
  '%s: full is an error that names maxPods; dead pods take no place',
  async (hook) => {
    requireExecutable();
    topology = new Topology({ primary: 'ptp', hook, rpFilter: 1, entry: { maxPods: MAX_PODS } });
    const pods = Array.from({ length: MAX_PODS + 2 }, (_, i) => {
      const pod = topology.pod(`pod${i}`, { enroll: true });
      topology.wire(pod, i + 2);
      return pod;
    });
    const [first, , , last, extra] = pods as [Pod, Pod, Pod, Pod, Pod];
    for (const pod of pods.slice(0, MAX_PODS)) expect(await add(pod)).toBeNull();
    expect(await add(last)).toMatchObject({
      code: 103,
      msg: `a map in ${topology.stateDir} is full; "maxPods" sizes it`,
    });
    // Its namespace goes, and nobody calls DEL.
    topology.node.ip('link', 'del', first.hostIfname);
    topology.node.run(['ip', 'netns', 'del', first.netns.name]);
    expect(await add(last)).toBeNull();
    expect(await add(extra)).toMatchObject({ code: 103 });
  },
);
