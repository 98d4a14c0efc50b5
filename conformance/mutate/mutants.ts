// SPDX-License-Identifier: Apache-2.0
//
// One small change of the BPF sources at a time, by token, inside function bodies only: what a wrong condition, bound,
// constant or reason would look like. Declarations, maps and layouts are left alone, they have tests of their own.

export interface Mutant {
  /** File below bpf/. */
  file: string;
  function: string;
  line: number;
  /** The line as it is and as it becomes, without indentation. */
  from: string;
  to: string;
  /** Text of the function's body, and where in it the change begins: the same wherever the function is moved to. */
  body: string;
  within: number;
  /** Offset in the file, and what is put in place of the characters up to `end`. */
  start: number;
  end: number;
  text: string;
  /** A number; all else is a condition, a comparison or a reason. */
  constant: boolean;
}

/** Another value of the same kind, for each operator. */
const SWAPPED: Record<string, string> = {
  '==': '!=',
  '!=': '==',
  '<': '<=',
  '<=': '<',
  '>': '>=',
  '>=': '>',
  '&&': '||',
  '||': '&&',
};

/** Words, numbers and operators that may be changed; comments, strings and preprocessor lines go by unchanged. */
const TOKEN =
  /\/\*[\s\S]*?\*\/|\/\/[^\n]*|"(?:\\.|[^"\\])*"|^#[^\n]*(?:\\\n[^\n]*)*|[A-Za-z_]\w*|0[xX][0-9a-fA-F]+[uUlL]*|\d+[uUlL]*|<<=?|>>=?|->|[=!<>]=|&&|\|\||[-+*/%&|^]=|\+\+|--|\?|[\s\S]/gm;

/** All mutants of one file. `reasons`: the enumerators of enum reason, in order. */
export function mutantsOf(file: string, source: string, reasons: readonly string[]): Mutant[] {
  const mutants: Mutant[] = [];
  for (const { name, start, end } of functions(source)) {
    const body = source.slice(start, end);
    let before = '';
    for (const match of source.slice(start, end).matchAll(TOKEN)) {
      const [token] = match;
      const at = start + match.index;
      const add = (text: string, from = at, to = at + token.length) =>
        mutants.push({
          ...mutant(file, source, name, from, to, text, /^\d/.test(token)),
          body,
          within: from - start,
        });
      if (token in SWAPPED) add(SWAPPED[token] ?? '');
      else if (/^\d/.test(token) && !(token === '0' && (before === '=' || isFlags(source, at))) && !isSize(source, at))
        add(`(${token} + 1)`);
      else if (/^REASON_/.test(token)) add(otherReason(token, reasons));
      else if (token === 'if' || token === 'while') {
        const condition = parenthesised(source, at + token.length);
        // Of a single comparison or negation the operator itself is changed.
        if (condition && !isSimple(source.slice(condition.start + 1, condition.end - 1)))
          add(`(!${source.slice(condition.start, condition.end)})`, condition.start, condition.end);
      } else if (token === '?') {
        const from = ternaryStart(source, at, start);
        const condition = source.slice(from, at).trim();
        if (!isSimple(condition)) add(` !(${condition}) `, from, at);
      } else if (token === '!' && source[at + 1] !== '=') add('');
      if (!/^\s$/.test(token)) before = token;
    }
  }
  return mutants;
}

function mutant(
  file: string,
  source: string,
  name: string,
  start: number,
  end: number,
  text: string,
  constant: boolean,
): Omit<Mutant, 'body' | 'within'> {
  const lineStart = source.lastIndexOf('\n', start - 1) + 1;
  const found = source.indexOf('\n', end);
  const lineEnd = found === -1 ? source.length : found;
  const oneLine = (code: string) => code.replaceAll(/\s+/g, ' ').trim();
  return {
    file,
    function: name,
    line: source.slice(0, start).split('\n').length,
    from: oneLine(source.slice(lineStart, lineEnd)),
    to: oneLine(source.slice(lineStart, start) + text + source.slice(end, lineEnd)),
    start,
    end,
    text,
    constant,
  };
}

export function applied(source: string, { start, end, text }: Mutant): string {
  return source.slice(0, start) + text + source.slice(end);
}

/** A definition begins in column 0; its body is between braces in column 0. */
function functions(source: string): { name: string; start: number; end: number }[] {
  return [...source.matchAll(/^(?:static |int |long |void )[^;{}]*?(\w+)\([^;{}]*?\)\n\{\n([\s\S]*?)^\}/gm)].map(
    (match) => {
      const end = match.index + match[0].length - 1;
      return { name: match[1] ?? '', start: end - (match[2] ?? '').length, end };
    },
  );
}

/** The flags of bpf_skb_store_bytes: about checksums that no test on a veth sees. */
function isFlags(source: string, at: number): boolean {
  const call = source.slice(source.lastIndexOf('bpf_skb_store_bytes(', at), at);
  return source[at + 1] === ')' && !/[;{}]/.test(call) && call.startsWith('bpf_skb_store_bytes(');
}

/** The length in the declaration of an array: one more is never read. */
function isSize(source: string, at: number): boolean {
  return /^\s+(?:struct |const )*__?[a-z]+\d+[\w\s,[\]]*\[$/.test(source.slice(source.lastIndexOf('\n', at) + 1, at));
}

function isSimple(condition: string): boolean {
  if (/&&|\|\|/.test(condition)) return false;
  return condition.startsWith('!') || /[=!<>]=|<|(?<!-)>/.test(condition);
}

function parenthesised(source: string, from: number): { start: number; end: number } | undefined {
  const start = source.indexOf('(', from);
  let depth = 0;
  for (let at = start; at >= 0 && at < source.length; at++) {
    if (source[at] === '(') depth += 1;
    if (source[at] === ')' && --depth === 0) return { start, end: at + 1 };
  }
  return undefined;
}

/** Where the condition of the `?` at `at` begins: behind the `=`, `return`, `(`, `,`, `:`, `{` or `;` that it follows. */
function ternaryStart(source: string, at: number, limit: number): number {
  let depth = 0;
  for (let back = at - 1; back >= limit; back--) {
    const character = source[back] ?? '';
    if (character === ')') depth += 1;
    if (character === '(' && depth-- === 0) return back + 1;
    if (depth > 0) continue;
    const assignment = character === '=' && !/[=!<>]/.test(source[back - 1] ?? '') && source[back + 1] !== '=';
    if (assignment || /[,:{;]/.test(character)) return back + 1;
    if (/\breturn$/.test(source.slice(Math.max(limit, back - 6), back + 1)) && /\s/.test(source[back + 1] ?? ''))
      return back + 1;
  }
  return limit;
}

/** The one that follows in the enum; the first one after the last. */
function otherReason(reason: string, reasons: readonly string[]): string {
  return reasons[(reasons.indexOf(reason) + 1) % reasons.length] ?? reason;
}
