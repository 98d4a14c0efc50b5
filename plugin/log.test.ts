// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { createLog, LOG_LEVELS } from './log.ts';

test.each([
  ['error', ['error']],
  ['warn', ['error', 'warn']],
  ['info', ['error', 'warn', 'info']],
  ['debug', ['error', 'warn', 'info', 'debug']],
] as const)('level %s', (level, written) => {
  const lines: string[] = [];
  const log = createLog(level, (line) => lines.push(line));
  for (const line of LOG_LEVELS) log[line]('one\ntwo');
  expect(lines).toEqual(written.map((line) => `ambient-redirect: ${line}: one\\ntwo\n`));
});
