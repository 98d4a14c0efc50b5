// SPDX-License-Identifier: Apache-2.0
//
// Leaky builds: the harness must fail on each of them. A variant is the checkout with a few lines changed, built in a directory of its own; the executables are kept outside the checkout under a hash of all that went in.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  cpSync,
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import { join } from 'node:path';
import { executable } from '../e2e/topology.ts';

const root = join(import.meta.dirname, '../..');
const cache = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'ambient-redirect-noleak');

interface Change {
  /** In the checkout. */
  file: string;
  /** Must be there exactly once. */
  find: RegExp;
  replace: string;
}

export interface Variant {
  name: string;
  changes: readonly Change[];
  /** No build of its own: answers ADD at once, and does it afterwards. */
  late?: boolean;
  /** Default tcx. */
  hook?: 'tcx' | 'clsact';
  /** Each of these has to be the judge's name of a leak. */
  caughtAs: readonly RegExp[];
}

export const variants: readonly Variant[] = [
  {
    name: 'ipv6-passed',
    changes: [
      { file: 'bpf/parse.h', find: /(if \(eth\.h_proto == bpf_htons\(ETH_P_IPV6\))\)/g, replace: '$1 && 0)' },
      { file: 'bpf/parse.h', find: /(if \(eth->h_proto == bpf_htons\(ETH_P_IPV6\))\)/g, replace: '$1 && 0)' },
    ],
    caughtAs: [/^small: SYN$/],
  },
  {
    name: 'orphans-passed',
    changes: [
      { file: 'bpf/redirect.bpf.c', find: /if \(f\) \{(?=\s+z = all \? listening_proxy)/g, replace: 'if (0 && f) {' },
      { file: 'bpf/decide.h', find: /if \(self->flags & INTERFACE_STRICT\)/g, replace: 'if (0)' },
    ],
    caughtAs: [/^held: data$/],
  },
  {
    name: 'two-tags-passed',
    changes: [
      { file: 'bpf/parse.h', find: /if \(skb->vlan_present\)\s+return 1;/g, replace: '' },
      { file: 'bpf/parse.h', find: /return protocol == bpf_htons\(ETH_P_8021Q\) \|\| [^;]*;/g, replace: 'return 0;' },
    ],
    caughtAs: [/^tagged frame: SYN/],
  },
  {
    name: 'short-fragment-passed',
    changes: [
      {
        file: 'bpf/decide.h',
        find: /drop\((?=r, REASON_DROP_SHORT_FIRST_FRAGMENT\))/g,
        replace: 'pass(',
      },
    ],
    caughtAs: [/^fragments: first fragment/],
  },
  {
    name: 'cookie-passed',
    changes: [
      {
        file: 'bpf/redirect.bpf.c',
        find: /return to_proxy\(r, z, REASON_TO_PROXY_COOKIE,[^;]*;/g,
        replace: 'return pass(r, REASON_TO_PROXY_COOKIE);',
      },
    ],
    caughtAs: [/^small: ACK$/],
  },
  {
    name: 'forged-sign-obeyed',
    changes: [{ file: 'bpf/redirect.bpf.c', find: /drop\((?=&r, REASON_DROP_FORGED_SIGN\))/g, replace: 'pass(' }],
    caughtAs: [/^forged frame: /],
  },
  {
    name: 'foreign-filter-ahead',
    changes: [
      {
        file: 'plugin/datapath.ts',
        find: /(?<=if \(blocking !== undefined\) \{\s+if \()config\.failurePolicy === 'closed'(?=\))/g,
        replace: 'false',
      },
    ],
    hook: 'clsact',
    caughtAs: [/^small: SYN$/],
  },
  { name: 'add-before-attach', changes: [], late: true, caughtAs: [/^small: SYN$/] },
];

/** Variants whose leaks have names of their own, in one build. */
export function together(names: readonly string[]): Variant {
  const chosen = variants.filter(({ name }) => names.includes(name));
  if (chosen.length !== names.length || chosen.some(({ late, hook }) => late || hook)) throw new Error(names.join());
  return {
    name: names.join('+'),
    changes: chosen.flatMap(({ changes }) => changes),
    caughtAs: chosen.flatMap(({ caughtAs }) => caughtAs),
  };
}

/** What a build depends on besides the changes. */
const inputs = ['bpf/*.{c,h}', 'native/*.{c,cc,h,map}', 'plugin/**/*.ts', '.ci/bpf', '.ci/*.mjs', 'binding.gyp'].concat(
  'package.json',
  'package-lock.json',
);

const lateAdd = `#!/bin/sh
real='${executable}'
[ "$CNI_COMMAND" = ADD ] || exec "$real" "$@"
input=$(cat)
printf %s "$input" | python3 -c 'import json, sys
entry = json.load(sys.stdin)
print(json.dumps({**entry["prevResult"], "cniVersion": entry["cniVersion"]}))'
(sleep 0.4; printf %s "$input" | "$real") >/dev/null 2>&1 &
`;

function identity(variant: Variant): string {
  const sum = createHash('sha256')
    .update(variant.late ? lateAdd : '')
    .update(JSON.stringify(variant.changes.map((one) => [one.file, `${one.find}`, one.replace])));
  const files = globSync(inputs, { cwd: root }).filter((file) => !/\.test\.ts$|\.testing\.ts$/.test(file));
  for (const file of files.sort())
    sum
      .update(file)
      .update('\0')
      .update(readFileSync(join(root, file)))
      .update('\0');
  return sum.digest('hex').slice(0, 24);
}

/** The executable of a leaky build; builds it if it is not there yet. */
export function buildVariant(variant: Variant, say: (line: string) => void): string {
  const output = join(cache, `${variant.name}.${identity(variant)}`);
  if (existsSync(output)) return output;
  const started = performance.now();
  mkdirSync(cache, { recursive: true, mode: 0o700 });
  if (variant.late) {
    writeFileSync(output, lateAdd, { mode: 0o700 });
    return output;
  }
  const copy = mkdtempSync(join(tmpdir(), 'ambient-redirect-noleak.'));
  try {
    copyCheckout(copy);
    for (const { file, find, replace } of variant.changes) change(join(copy, file), find, replace);
    const { status, stderr } = spawnSync(process.execPath, ['.ci/build.mjs'], {
      cwd: copy,
      encoding: 'utf8',
      env: { ...process.env, AMBIENT_REDIRECT_BUILD_LOCKED: '' },
    });
    if (status !== 0) throw new Error(`variant ${variant.name}: the build ended with ${status}:\n${stderr}`);
    // Of sources that have changed since: 120 MB each.
    for (const old of readdirSync(cache).filter((name) => name.startsWith(`${variant.name}.`)))
      rmSync(join(cache, old));
    // Another file system, perhaps: a copy first, then the name.
    cpSync(join(copy, 'dist/ambient-redirect'), `${output}.new`);
    renameSync(`${output}.new`, output);
  } finally {
    rmSync(copy, { recursive: true, force: true });
  }
  say(`built variant ${variant.name} in ${((performance.now() - started) / 1000).toFixed(1)} s`);
  return output;
}

/**
 * The sources, and the build tree under the build's own lock: what the changes do not touch is not compiled again. With
 * their times, by which make judges.
 */
function copyCheckout(copy: string): void {
  mkdirSync(join(root, 'build/stamps'), { recursive: true });
  const script = `mkdir "$2/build" "$2/build/bundle"
    cp -a "$1/bpf" "$1/native" "$1/plugin" "$1/.ci" "$1/LICENSES" "$1/LICENSE" "$2"
    cp -a "$1"/*.json "$1/binding.gyp" "$2"
    for part in Makefile Release config.gypi skeletons stamps $(cd "$1/build" && ls *.mk *.Makefile 2>/dev/null); do
      [ ! -e "$1/build/$part" ] || cp -a "$1/build/$part" "$2/build"
    done`;
  const { status, stderr } = spawnSync(
    'flock',
    [join(root, 'build/stamps/lock'), 'sh', '-ec', script, 'sh', root, copy],
    { encoding: 'utf8' },
  );
  if (status !== 0) throw new Error(`copying the checkout ended with ${status}: ${stderr}`);
  symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'));
}

function change(file: string, find: RegExp, replace: string): void {
  const text = readFileSync(file, 'utf8');
  const found = text.match(find)?.length ?? 0;
  if (found !== 1) throw new Error(`${file}: ${find} is there ${found} times: the variant has to follow the program`);
  writeFileSync(file, text.replace(find, replace));
  const now = new Date();
  utimesSync(file, now, now);
}
