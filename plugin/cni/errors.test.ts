// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { CniError, Code, errorDocument, registry } from './errors.ts';

test('codes and names are unique, and the codes are those of SPEC and ours', () => {
  expect(registry.map(({ code }) => code)).toEqual([
    1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 51, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111,
  ]);
  expect(new Set(registry.map(({ name }) => name)).size).toBe(registry.length);
  for (const { name, code, meaning } of registry) {
    expect(Code[name]).toBe(code);
    expect(meaning).toMatch(/^[A-Z].*\.$/);
  }
});

test('an error document is one line, whatever the text', () => {
  const document = errorDocument(new CniError(Code.ATTACH_FAILED, 'a\n"b"', '\ud800'), '1.0.0');
  expect(document).toBe('{"cniVersion":"1.0.0","code":102,"msg":"a\\n\\"b\\"","details":"\\ud800"}\n');
});

test("the README's table is the registry", () => {
  const readme = readFileSync(join(import.meta.dirname, '../../README.md'), 'utf8');
  const rows = readme.match(/^\| [0-9]+ \| `[A-Z_]+` \|.*$/gm);
  expect(rows).toEqual(registry.map(({ code, name, meaning }) => `| ${code} | \`${name}\` | ${meaning} |`));
});
