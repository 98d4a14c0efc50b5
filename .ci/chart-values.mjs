// SPDX-License-Identifier: Apache-2.0
// node .ci/chart-values.mjs [--write]: the README's table of the chart's values, made of the comments in values.yaml.
// Exit code 1 if the one in deploy/chart/README.md is another; with --write it is replaced.

import { readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { parseDocument, visit } from 'yaml';

const CHART = join(dirname(import.meta.dirname), 'deploy/chart');
const VALUES = join(CHART, 'values.yaml');
const README = join(CHART, 'README.md');
const [BEGIN, END] = ['<!-- made by .ci/chart-values.mjs -->\n', '<!-- end -->\n'];

/** "-- " lines of the comment above a key, which come in one piece with others above them. */
function meaningOf(comment) {
  const lines = (comment ?? '').split('\n').filter((line) => line.startsWith(' -- '));
  return lines.length === 0 ? undefined : lines.map((line) => line.slice(4).trim()).join(' ');
}

/** One row for each value with a meaning; a key inside one that has a meaning needs none of its own. */
export function valuesTable(text = readFileSync(VALUES, 'utf8')) {
  const document = parseDocument(text);
  if (document.errors.length > 0) throw document.errors[0];
  const rows = [];
  const without = [];
  visit(document, {
    Pair(_key, pair, path) {
      const keys = [...path.filter((node) => node.key !== undefined), pair].map(({ key }) => key.value);
      // The parser gives the comment above a map's first key to the map.
      const isFirst = path.at(-1)?.items?.[0] === pair;
      const above = pair.key.commentBefore ?? (isFirst ? path.at(-1).commentBefore : undefined);
      const meaning = meaningOf(above);
      if (meaning !== undefined) {
        const value = JSON.stringify(pair.value?.toJSON?.() ?? null);
        rows.push(
          `| \`${keys.join('.')}\` | \`${value === 'null' ? '' : value}\` | ${meaning} |`.replace('| `` |', '| |'),
        );
        return visit.SKIP;
      }
      if (pair.value?.items === undefined) without.push(keys.join('.'));
      return undefined;
    },
  });
  if (without.length > 0) throw new Error(`${VALUES}: no "# -- " above ${without.join(', ')}`);
  return ['| value | preset | meaning |', '|---|---|---|', ...rows, ''].join('\n');
}

function replaced(readme) {
  const [begin, end] = [readme.indexOf(BEGIN), readme.indexOf(END)];
  if (begin < 0 || end < begin) throw new Error(`${README}: no place for the table`);
  return readme.slice(0, begin + BEGIN.length) + valuesTable() + readme.slice(end);
}

if (import.meta.main) {
  const readme = readFileSync(README, 'utf8');
  const wanted = replaced(readme);
  if (process.argv.includes('--write')) writeFileSync(README, wanted);
  else if (readme !== wanted) {
    console.error(`${README}: the table is not that of values.yaml; node .ci/chart-values.mjs --write`);
    process.exitCode = 1;
  }
}
