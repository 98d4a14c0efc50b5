// SPDX-License-Identifier: Apache-2.0
//
// The fall-backs for older kernels, forced: the same table of ways through the node for each of them.

import { everyWay } from './ways.ts';

for (const variant of ['no-redirect-peer', 'no-sk-lookup', 'no-sk-assign', 'full-sockets-only'] as const) {
  everyWay({ variant, primary: 'ptp', hook: 'tcx' });
  everyWay({ variant, primary: 'bridge', hook: 'clsact' });
}
