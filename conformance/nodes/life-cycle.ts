// SPDX-License-Identifier: Apache-2.0
// The sections in their order. Each builds on the nodes as the one before left them.

import { churn } from './churn.ts';
import { failures } from './failures.ts';
import type { Ground } from './ground.ts';
import { before, enrol, install } from './install.ts';
import { neighbours } from './neighbours.ts';
import { quickStart } from './quick-start.ts';
import { dumps, removal } from './removal.ts';
import { upgrade } from './upgrade.ts';

export async function lifeCycle(ground: Ground, only: readonly string[] | undefined): Promise<void> {
  const wanted = (section: string) => only === undefined || only.includes(section);
  if (!(await before(ground))) return;
  const clean = await dumps(ground);
  // The quick start is one's own way in and out.
  if (only?.join() === '7') {
    await quickStart(ground);
    return;
  }
  if (!(await install(ground))) return;
  if (wanted('1')) await enrol(ground);
  else {
    await ground.step('the namespace is labelled', async () => {
      await ground.label('ambient');
      await ground.untilAnnotated('enabled');
    });
  }
  if (wanted('2')) await churn(ground);
  if (wanted('3')) await upgrade(ground);
  if (wanted('4')) await failures(ground);
  if (wanted('5')) await neighbours(ground);
  if (wanted('6')) await removal(ground, clean);
  if (wanted('6') && wanted('7')) await quickStart(ground);
}
