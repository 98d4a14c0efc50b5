// SPDX-License-Identifier: Apache-2.0
//
// Which programs a function of bpf/ is in, and the sources without the others: those need neither be compiled nor
// loaded to find out what became of a change of that function.

/** A definition begins in column 0 and ends with a brace in column 0. */
const DEFINITION = /^(?:static |int )[^;{}]*?(\w+)\([^;{}]*?\)\n\{\n([\s\S]*?)^\}/gm;
const PROGRAM = /^(SEC\("(tc|classifier|sk_lookup)"\)\nint (\w+)\([^;{}]*?\)\n\{\n)([\s\S]*?)^\}/gm;

export class Programs {
  readonly #bodies = new Map<string, string>();
  readonly #names: string[];

  constructor(sources: ReadonlyMap<string, string>) {
    const text = [...sources.values()].join('\n').replaceAll(/\/\*[\s\S]*?\*\//g, '');
    for (const [, name = '', body = ''] of text.matchAll(DEFINITION)) this.#bodies.set(name, body);
    this.#names = [...text.matchAll(PROGRAM)].map(([, , , name = '']) => name);
  }

  get names(): readonly string[] {
    return this.#names;
  }

  /** Programs that call this function, however deep, or are it. */
  with(name: string): string[] {
    return this.#names.filter((program) => program === name || this.#calls(program, name, new Set()));
  }

  #calls(from: string, wanted: string, visited: Set<string>): boolean {
    if (visited.has(from)) return false;
    visited.add(from);
    return [...(this.#bodies.get(from) ?? '').matchAll(/\b(\w+)\(/g)].some(
      ([, callee = '']) => callee === wanted || this.#calls(callee, wanted, visited),
    );
  }
}

/** `source`, all programs but these doing nothing. */
export function only(source: string, programs: readonly string[]): string {
  return source.replaceAll(PROGRAM, (whole, head: string, kind: string, name: string) =>
    programs.includes(name) ? whole : `${head}\treturn ${kind === 'sk_lookup' ? 1 : -1};\n}`,
  );
}
