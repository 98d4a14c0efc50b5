// SPDX-License-Identifier: Apache-2.0
// Where a command writes. Colour goes to a terminal only, and not where NO_COLOR asks for none (no-color.org).

import { stripVTControlCharacters, styleText } from 'node:util';

export interface Terminal {
  /** stdout */
  out(text: string): void;
  /** stderr */
  err(text: string): void;
  green(text: string): string;
  red(text: string): string;
  yellow(text: string): string;
}

export function processTerminal(): Terminal {
  // A reader that has enough (head, less) is not an error.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(0);
    throw error;
  });
  const coloured = process.stdout.isTTY === true && (process.env.NO_COLOR ?? '') === '' && process.env.TERM !== 'dumb';
  const colour = (style: 'green' | 'red' | 'yellow') => (text: string) =>
    coloured ? styleText(style, text, { validateStream: false }) : text;
  return {
    out: (text) => process.stdout.write(text),
    err: (text) => process.stderr.write(text),
    green: colour('green'),
    red: colour('red'),
    yellow: colour('yellow'),
  };
}

/** Characters that a terminal shows for a text; escape sequences show none. */
export function width(text: string): number {
  return [...stripVTControlCharacters(text)].length;
}

/**
 * A name from outside (a pod's, a program's), fit for a terminal: control characters, which could rewrite what is on
 * the screen, are shown as escapes.
 */
export function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is looked for
  return text.replace(/[\u0000-\u001f\u007f-\u009f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, '0')}`);
}
