// SPDX-License-Identifier: Apache-2.0
// The verbs over the addon, loaded when an invocation has passed every check that needs no kernel.

import type { Verbs } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';

export function loadVerbs(): Verbs {
  throw new CniError(Code.INTERNAL, 'this build contains no verbs');
}
