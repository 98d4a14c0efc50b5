// SPDX-License-Identifier: Apache-2.0
//
// The state of the kernel as far as a CNI plugin can change it, as flat text that can be compared before and after:
// links, addresses, permanent neighbours, rules, routes, qdiscs, filters, TCX, nftables (iptables-nft too), sysctls
// of a namespace, and what is pinned below a directory, map entries included.
//
// Left out because the kernel changes them by itself: counters and timers, object ids, IPv6 link-local addresses and
// their routes (they come a second after the link, when duplicate detection ends), multicast routes.

import { existsSync, mkdirSync, renameSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { exec, must, type Namespace } from './netns.ts';

/** Key (`node link veth0`, `node qdisc veth0 ...`, `pins /path[key]`) to value. */
export type KernelState = ReadonlyMap<string, string>;

export interface StateOptions {
  /** Directories below which bpffs objects are pinned; one that is absent has no keys. */
  pins?: readonly string[];
  /** Also /proc/sys/net of each namespace (about 10 ms a namespace). Default true. */
  sysctls?: boolean;
}

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Row = { [key: string]: Json };

/** The state of the namespaces given; those that are gone have no keys. */
export async function kernelState(
  namespaces: readonly Namespace[],
  options: StateOptions = {},
): Promise<Map<string, string>> {
  const state = new Map<string, string>();
  const parts = namespaces.filter((namespace) => existsSync(namespace.path)).map((one) => namespaceState(one, options));
  const pins = (options.pins ?? []).filter((directory) => existsSync(directory));
  if (pins.length > 0)
    parts.push(tool(['pins', ...pins]).then((rows) => rows.map(([key, value]) => [`pins ${key}`, value])));
  for (const rows of await Promise.all(parts)) {
    for (const [key, value] of rows) {
      // Two equal nftables rules in a chain are two keys.
      let unique = key;
      for (let copy = 2; state.has(unique); copy++) unique = `${key} #${copy}`;
      state.set(unique, value);
    }
  }
  return state;
}

/** Lines `- key: value` and `+ key: value`; empty if both are the same but for keys that match `ignore`. */
export function differences(before: KernelState, after: KernelState, ignore?: RegExp): string[] {
  const lines: string[] = [];
  for (const key of [...new Set([...before.keys(), ...after.keys()])].sort()) {
    if (ignore?.test(key) || before.get(key) === after.get(key)) continue;
    if (before.has(key)) lines.push(`- ${key}: ${before.get(key)}`);
    if (after.has(key)) lines.push(`+ ${key}: ${after.get(key)}`);
  }
  return lines;
}

type Rows = [key: string, value: string][];

async function namespaceState(namespace: Namespace, options: StateOptions): Promise<Rows> {
  const label = namespace.name.replace(/^ar[0-9a-z]+\.[0-9a-f]+\./, '');
  const script = [
    'ip -j -d link show',
    'ip -j address show',
    'ip -j neigh show nud permanent',
    'ip -j -4 rule show',
    'ip -j -6 rule show',
    'ip -j -4 route show table all',
    'ip -j -6 route show table all',
    'tc -j qdisc show',
  ];
  // Each answer is one JSON document; RS (0x1e) between them. iproute2 prints nothing at all for some empty lists.
  const listing = await inNamespace(namespace, script.join("; printf '\\036'; "));
  const [links, addresses, neighbours, rules4, rules6, routes4, routes6, qdiscs] = listing
    .split('\x1e')
    .map((text) => (text.trim() === '' ? [] : (JSON.parse(text) as Row[])));
  const queued = new Set((qdiscs ?? []).filter((one) => one.kind !== 'noqueue').map((one) => String(one.dev)));
  const [filters, nft, sysctls, tcx] = await Promise.all([
    filterRows(namespace, [...queued]),
    inNamespace(namespace, 'if command -v nft >/dev/null; then nft -s list ruleset; fi'),
    options.sysctls === false ? '' : inNamespace(namespace, 'cd /proc/sys/net && grep -rs . . ; true'),
    tool(['tcx'], namespace),
  ]);

  const rows: Rows = [];
  for (const link of links ?? []) rows.push([`link ${link.ifname}`, stable(link)]);
  for (const link of addresses ?? []) {
    for (const address of (link.addr_info as Row[]).filter((one) => !linkLocal(String(one.local)))) {
      rows.push([`address ${link.ifname} ${address.local}/${address.prefixlen}`, stable(address)]);
    }
  }
  for (const one of neighbours ?? []) rows.push([`neighbour ${one.dev} ${one.dst}`, stable(one)]);
  rows.push(...numbered('rule4', rules4 ?? []), ...numbered('rule6', rules6 ?? []));
  const routes = [...(routes4 ?? []), ...(routes6 ?? [])].filter((one) => !linkLocal(String(one.dst)));
  for (const one of routes) rows.push([`route ${one.dst} table ${one.table ?? 'main'} dev ${one.dev}`, stable(one)]);
  for (const one of qdiscs ?? []) {
    // An empty ingress or clsact qdisc does nothing, and cannot be removed without a race once it is shared.
    const hooks = one.kind === 'clsact' || one.kind === 'ingress';
    if (hooks && !filters.some(([key]) => key.startsWith(`filter ${one.dev} `))) continue;
    rows.push([`qdisc ${one.dev} ${one.parent ?? 'root'}`, stable(one)]);
  }
  rows.push(...filters);
  for (const [key, value] of tcx) rows.push([`tcx ${key}`, value]);
  let chain = '';
  for (const line of nft.split('\n').filter((text) => text.trim() !== '')) {
    if (/^\s*(table|chain|set|map) /.test(line)) chain = line.trim();
    else if (line.trim() !== '}') rows.push([`nft ${chain} ${line.trim()}`, 'present']);
    if (/^\s*(table|chain|set|map) /.test(line)) rows.push([`nft ${chain}`, 'present']);
  }
  for (const line of sysctls.split('\n')) {
    const [, path, value] = /^\.\/([^:]+):(.*)$/.exec(line) ?? [];
    if (path && !/nf_conntrack_count|stable_secret/.test(path)) rows.push([`sysctl ${path}`, value ?? '']);
  }
  return rows.map(([key, value]) => [`${label} ${key}`, value]);
}

/** Rules have no key of their own; several may share a priority. */
function numbered(kind: string, rules: readonly Row[]): Rows {
  return rules.map((rule, index) => {
    const before = rules.slice(0, index).filter((one) => one.priority === rule.priority).length;
    return [`${kind} ${rule.priority}${before > 0 ? `.${before}` : ''}`, stable(rule)];
  });
}

/** Filters of the interfaces that have a qdisc; there are none without. */
async function filterRows(namespace: Namespace, names: readonly string[]): Promise<Rows> {
  if (names.length === 0) return [];
  const commands = names.flatMap((name) => ['', 'ingress', 'egress'].map((parent) => ({ name, parent })));
  const script = commands
    .map(({ name, parent }) => `tc -j filter show dev '${name}' ${parent} 2>/dev/null; printf '\\036'`)
    .join('; ');
  const answers = (await inNamespace(namespace, script)).split('\x1e');
  const rows: Rows = [];
  for (const [index, { name, parent }] of commands.entries()) {
    const text = answers[index]?.trim() ?? '';
    for (const filter of text === '' ? [] : (JSON.parse(text) as Row[])) {
      if (filter.options === undefined) continue;
      const options = filter.options as Row;
      const handle = String(options.handle ?? options.fh ?? '');
      rows.push([`filter ${name} ${parent || 'root'} pref ${filter.pref} ${filter.kind} ${handle}`, stable(filter)]);
    }
  }
  return rows;
}

async function inNamespace(namespace: Namespace, script: string): Promise<string> {
  const outcome = await namespace.exec(['sh', '-c', script]);
  if (outcome.status !== 0) throw new Error(`${namespace.name}: ${script}: exit ${outcome.status}: ${outcome.stderr}`);
  return outcome.stdout;
}

function linkLocal(address: string): boolean {
  return /^fe80:|^ff00:|^multicast/.test(address);
}

const volatile =
  /timer$|^(stats(64)?|bytes|packets|drops|overlimits|requeues|backlog|qlen|valid_life_time|id|tentative)$/;
const volatileKeys = /^(preferred_life_time|gc_.*|topology_change.*|jited|expires|used|age)$/;

/** JSON without what changes by itself; keys sorted. */
function stable(value: Json): string {
  return JSON.stringify(value, (key, one: Json) => {
    if (volatile.test(key) || volatileKeys.test(key)) return undefined;
    if (one === null || typeof one !== 'object' || Array.isArray(one)) return one;
    return Object.fromEntries(Object.entries(one).sort(([a], [b]) => (a < b ? -1 : 1)));
  });
}

/** Builds bpf-dump.c when it is newer than its last build, then runs it. */
async function tool(args: readonly string[], namespace?: Namespace): Promise<Rows> {
  const source = join(import.meta.dirname, 'bpf-dump.c');
  const directory = join(import.meta.dirname, '..', 'node_modules', '.cache', 'ambient-redirect');
  const program = join(directory, 'bpf-dump');
  if (!existsSync(program) || statSync(program).mtimeMs < statSync(source).mtimeMs) {
    mkdirSync(directory, { recursive: true });
    const fresh = `${program}.${process.pid}`;
    must(['cc', '-O1', '-Wall', '-Wextra', '-o', fresh, source]);
    renameSync(fresh, program);
  }
  const argv = [program, ...args];
  const outcome = await (namespace ? namespace.exec(argv) : exec(argv));
  if (outcome.status !== 0) throw new Error(`bpf-dump ${args.join(' ')}: exit ${outcome.status}: ${outcome.stderr}`);
  return outcome.stdout
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => {
      const [key = '', value = ''] = line.split('\t');
      return [key, value];
    });
}
