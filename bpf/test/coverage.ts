// SPDX-License-Identifier: Apache-2.0
//
// Which reasons each program can count, from its source: those written in the function itself and in every function of
// bpf/ that it calls, however deep. A function that serves two programs or two directions names reasons that
// one of them cannot reach; those are the exceptions in redirect.test.ts.

import { globSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

const directory = dirname(import.meta.dirname);

/** Program to its reasons as the words of redirect.h. */
export function reasonsInSource(): Map<string, Set<string>> {
  const text = globSync(['*.h', '*.bpf.c'], { cwd: directory })
    .map((name) => readFileSync(join(directory, name), 'utf8'))
    .join('\n')
    .replaceAll(/\/\*[\s\S]*?\*\//g, '');
  const bodies = new Map<string, string>();
  // A definition begins in column 0 and ends with a brace in column 0.
  for (const [, name = '', body = ''] of text.matchAll(
    /^(?:static |int )[^;{]*?(\w+)\([^;{]*?\)\n\{\n([\s\S]*?)^\}/gm,
  )) {
    bodies.set(name, body);
  }
  const programs = [...text.matchAll(/^SEC\("(?:tc|sk_lookup)"\)\nint (\w+)\(/gm)].map(([, name = '']) => name);
  return new Map(programs.map((program) => [program, reasonsOf(program, bodies, new Set())]));
}

function reasonsOf(name: string, bodies: ReadonlyMap<string, string>, visited: Set<string>): Set<string> {
  const reasons = new Set<string>();
  const body = bodies.get(name);
  if (body === undefined || visited.has(name)) return reasons;
  visited.add(name);
  for (const [, word = ''] of body.matchAll(/\bREASON_(\w+)/g)) reasons.add(word.toLowerCase());
  for (const [, callee = ''] of body.matchAll(/\b(\w+)\(/g)) {
    for (const reason of reasonsOf(callee, bodies, visited)) reasons.add(reason);
  }
  return reasons;
}
