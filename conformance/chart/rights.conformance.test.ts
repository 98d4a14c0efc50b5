// SPDX-License-Identifier: Apache-2.0
//
// With exactly the rights that the chart gives them, install, agent and uninstall do everything on a real containerd. What
// each right is for is tried by npm run chart:rights; here it is looked at that none was added without an entry there.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { missingControlPlane } from '../kubernetes/build.ts';
import { Testbed } from '../netns.ts';
import { helmProgram, missingHelm } from './helm.ts';
import { EXPECTED, FEATURES, RightsNode, variantsOf } from './rights.ts';

describe.runIf(missingHelm() === undefined && missingControlPlane() === undefined)(
  "the rights of the chart's pods, with helm, kube-apiserver and containerd (optional)",
  () => {
    const testbed = Testbed.open();
    let world: RightsNode;
    beforeAll(async () => {
      await helmProgram();
      world = await RightsNode.start(testbed);
    }, 3_000_000);
    afterAll(() => testbed.close());

    test('everything works', async () => {
      const { works, why } = await world.try();
      expect([...why]).toEqual([]);
      expect(works).toEqual(FEATURES);
    }, 120_000);

    test('each right has something that does not work without it', () => {
      const variants = variantsOf(world.podOf('istio-cni-node')).map(({ name }) => name);
      expect(variants.sort()).toEqual(Object.keys(EXPECTED).sort());
      expect(Object.entries(EXPECTED).filter(([, features]) => features.length === 0)).toEqual([]);
    });
  },
);
