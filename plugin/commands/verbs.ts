// SPDX-License-Identifier: Apache-2.0
// The verbs over the addon, loaded when an invocation has passed every check that needs no kernel.

import { loadNative } from '../addon.ts';
import type { Verbs } from '../cni/dispatch.ts';
import { add } from './add.ts';
import { check } from './check.ts';
import { del } from './del.ts';
import { gc } from './gc.ts';
import { status } from './status.ts';

/** Throws AddonError. */
export function loadVerbs(): Verbs {
  const native = loadNative();
  return {
    add: (request) => add(native, request),
    del: (request) => del(native, request),
    check: (request) => check(native, request),
    gc: (request) => gc(native, request),
    status: (request) => status(native, request),
  };
}
