// SPDX-License-Identifier: Apache-2.0
// Lines on stderr. On success libcni hands them to the runtime's log, on failure it drops them: what an operator needs
// then belongs into CniError.details.

import { writeSync } from 'node:fs';

export const LOG_LEVELS = ['error', 'warn', 'info', 'debug'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];
export type Log = Readonly<Record<LogLevel, (line: string) => void>>;

/** A line is written if its level is `level` or more severe. `sink` gets whole lines. */
export function createLog(level: LogLevel, sink: (line: string) => void = writeStderr): Log {
  const severity = LOG_LEVELS.indexOf(level);
  const at = (lineLevel: LogLevel) =>
    LOG_LEVELS.indexOf(lineLevel) <= severity
      ? (line: string) => sink(`ambient-redirect: ${lineLevel}: ${line.replaceAll('\n', '\\n')}\n`)
      : () => {};
  return { error: at('error'), warn: at('warn'), info: at('info'), debug: at('debug') };
}

/** A log that nobody reads, or reads too slowly, must not fail the verb. */
function writeStderr(line: string): void {
  try {
    writeSync(2, line);
  } catch {
    // EPIPE, EAGAIN, EBADF: there is no other place to say so.
  }
}
