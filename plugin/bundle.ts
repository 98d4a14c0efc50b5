// SPDX-License-Identifier: Apache-2.0
// The command line is a bundle of its own, an asset of the executable that is compiled only when a person runs it:
// the plugin path stays a few kilobytes.

import { getAsset, isSea } from 'node:sea';
import { compileFunction } from 'node:vm';

/** What plugin/cli.ts exports. */
export type CommandLine = typeof import('./cli.ts');

/** Name of the SEA asset with the CommonJS bundle of plugin/cli.ts. */
export const COMMAND_LINE_ASSET = 'command-line.cjs';

/** The command line: from the executable's asset, or from source. */
export async function loadCommandLine(): Promise<CommandLine> {
  if (!isSea()) return import('./cli.ts');
  const module = { exports: {} };
  const wrapper = compileFunction(
    getAsset(COMMAND_LINE_ASSET, 'utf8'),
    ['exports', 'require', 'module', '__filename', '__dirname'],
    { filename: COMMAND_LINE_ASSET },
  );
  wrapper(module.exports, requireBuiltin, module, COMMAND_LINE_ASSET, '/');
  return module.exports as CommandLine;
}

/** The bundle contains everything but Node's own modules. */
function requireBuiltin(id: string): unknown {
  const builtin: unknown = process.getBuiltinModule(id);
  if (builtin === undefined) throw new Error(`the executable contains no module ${id}`);
  return builtin;
}
