// SPDX-License-Identifier: Apache-2.0
// node migrate.testing.ts WANTED N: migrates the state of the JSON WANTED, and kills itself, as nothing else can, when
// the N-th step is done. Prints the steps, a line each, then the outcome as JSON. N of 0: goes to the end.

import { writeSync } from 'node:fs';
import { loadNative } from './addon.ts';
import { migrateState } from './migrate.ts';

const [wanted = '{}', last = '0'] = process.argv.slice(2);
let steps = 0;
const migrated = migrateState(loadNative(), JSON.parse(wanted), (name) => {
  writeSync(1, `${name}\n`);
  steps += 1;
  if (steps === Number(last)) process.kill(process.pid, 'SIGKILL');
});
writeSync(1, `${JSON.stringify(migrated)}\n`);
