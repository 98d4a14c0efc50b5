// SPDX-License-Identifier: Apache-2.0
//
// What else can be on a pod's interface (bandwidth, portmap, tuning, sbr, firewall; foreign tc programs), in a selection
// that has every pair; all of it with AMBIENT_REDIRECT_LONG=1. `npm run coexistence` prints the same as a table.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { always, type Combination, describeCombination, endingOf, pairwise, product } from './combinations.ts';
import { Site } from './site.ts';

const all = product();
const long = process.env.AMBIENT_REDIRECT_LONG === '1';
const groups = Map.groupBy(long ? all : pairwise(all, always), ({ primary, hook }) => `${primary}, ${hook}`);
/** A pod's processes stay until its site closes. */
const PODS_OF_A_SITE = 20;

for (const [name, group] of groups) {
  for (let from = 0; from < group.length; from += PODS_OF_A_SITE) {
    const [first, ...rest] = group.slice(from, from + PODS_OF_A_SITE) as [Combination, ...Combination[]];
    describe(`coexistence, ${name}, from ${from}`, () => {
      let site: Site;
      beforeAll(async () => {
        site = new Site(first.primary, first.hook);
        await site.start();
      });
      afterAll(() => site?.close());

      test.each([first, ...rest].map((one): [string, Combination] => [describeCombination(one), one]))(
        '%s',
        async (_name, one) => expect(await site.run(one)).toBe(endingOf(one)),
      );
    });
  }
}
