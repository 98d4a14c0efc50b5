// SPDX-License-Identifier: Apache-2.0
// node steps.testing.ts ACTION OPTIONS N: does ACTION of plugin/install/ with the JSON OPTIONS, and kills itself, as
// nothing else can, when the N-th step is on disk. Prints the steps, a line each. N of 0: goes to the end.

import { writeSync } from 'node:fs';
import { loadNative } from '../addon.ts';
import { type EntryOptions, ensureEntry, removeEntries } from './entry.ts';
import { placeExecutable, removeExecutable } from './executable.ts';
import { uninstall } from './uninstall.ts';

const [action = '', json = '{}', last = '0'] = process.argv.slice(2);
const options = JSON.parse(json);
let steps = 0;
const step = (name: string) => {
  writeSync(1, `${name}\n`);
  steps += 1;
  if (steps === Number(last)) process.kill(process.pid, 'SIGKILL');
};

const actions: Record<string, () => unknown> = {
  ensureEntry: () => ensureEntry(options as EntryOptions, step),
  removeEntries: () => removeEntries(options.netDir, step),
  placeExecutable: () =>
    placeExecutable({ path: options.path, addon: Buffer.from(options.addon) }, options.binDir, step),
  removeExecutable: () => removeExecutable(options.binDir, step),
  uninstall: () => uninstall(loadNative(), options, () => {}, step),
};
await actions[action]?.();
