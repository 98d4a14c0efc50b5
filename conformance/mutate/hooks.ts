// SPDX-License-Identifier: Apache-2.0
// node --import: the suite's "vitest" is vitest.ts beside this file.

import { registerHooks } from 'node:module';

registerHooks({
  resolve: (specifier, context, next) =>
    specifier === 'vitest'
      ? { url: new URL('./vitest.ts', import.meta.url).href, shortCircuit: true }
      : next(specifier, context),
});
