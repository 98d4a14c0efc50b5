// SPDX-License-Identifier: Apache-2.0
// npm run bench -- add [--rounds N] [--attachments 1,1000]

import { parseArgs } from 'node:util';
import { benchAdd } from './add.ts';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    rounds: { type: 'string', default: '30' },
    attachments: { type: 'string', default: '1,1000' },
  },
});
const [what] = positionals;
const rounds = Number(values.rounds);
const attachments = values.attachments.split(',').map(Number);
if (what !== 'add' || !(rounds > 0) || !attachments.every((count) => Number.isInteger(count) && count >= 0)) {
  process.stderr.write('usage: npm run bench -- add [--rounds N] [--attachments N,N]\n');
  process.exit(2);
}
await benchAdd(rounds, attachments);
