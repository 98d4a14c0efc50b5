// SPDX-License-Identifier: Apache-2.0
//
// dist/ambient-redirect keeps every rule of cases/ at every version.

import { describe, expect, test } from 'vitest';
import { EXECUTABLE, LIVE_STATE } from './chain.ts';
import { conformance } from './suite.ts';

describe.each([
  ['TCX', 'tcx'],
  ['clsact', 'clsact'],
])('the executable, on %s', (_name, hook) => {
  // Those that a hook can break; npm run test:long repeats all of ADD, DEL and CHECK.
  const state = ['A3.11', 'A3.12', 'A4.13', 'A4.14', 'A4.15', 'A4.16', 'A4.17', 'A5.1', 'A5.7', 'A5.8'];
  const ofHook = process.env.AMBIENT_REDIRECT_LONG === '1' ? ['A0.6', 'A3', 'A4', 'A5'] : state;
  const only = hook === 'tcx' ? [] : ofHook;
  test('keeps the rules of CNI', { timeout: 240_000 }, async () => {
    const findings = await conformance(
      {
        plugin: EXECUTABLE,
        entry: {
          type: 'ambient-redirect',
          enrollment: 'all',
          excludeNamespaces: [],
          hook,
          // biome-ignore lint/suspicious/noTemplateCurlyInString: replaced by the suite
          stateDir: '${BPFFS}/state',
          // biome-ignore lint/suspicious/noTemplateCurlyInString: replaced by the suite
          runDir: '${DIR}/run',
          capabilities: { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true },
        },
        capabilityArgs: { 'io.kubernetes.cri.pod-annotations': {} },
        badKeys: { enrollment: 'sometimes' },
        passThrough: true,
        liveState: LIVE_STATE,
        ...(hook === 'clsact' && { versions: ['1.1.0'] }),
      },
      only,
    );
    const broken = findings.filter(({ verdict }) => verdict === 'fail');
    expect(broken.map(({ id, version, reason }) => `${id} ${version ?? ''}: ${reason}`)).toEqual([]);
    const unconcerned = findings.filter(({ verdict }) => verdict === 'not applicable').map(({ id }) => id);
    expect(unconcerned).toEqual(only.includes('A5') ? ['A5.9'] : []);
  });
});
