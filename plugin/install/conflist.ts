// SPDX-License-Identifier: Apache-2.0
// Our entry in a network configuration: text in, text out. Everything that is not ours keeps its bytes, and what is
// changed beside the entry is written down in the entry's own `args`, so that both are there or gone together, also
// when another tool writes the file anew, and uninstall can put it back.

import { isDeepStrictEqual } from 'node:util';
import { CniError, Code, quote } from '../cni/errors.ts';
import { SUPPORTED_VERSIONS } from '../cni/version.ts';
import {
  appendElement,
  arrayOf,
  elementSpan,
  type Fields,
  foldedField,
  type JsonText,
  type Layout,
  layoutOf,
  memberOf,
  readJsonText,
  removeElement,
  restoreElement,
  spanOf,
  splice,
  toBytes,
  writeJson,
} from './json-text.ts';

/** Of the entry, and the file name of the executable. */
export const PLUGIN_TYPE = 'ambient-redirect';

/** containerd before 1.7 fails every ADD of a network with 1.1.0. */
export const DEFAULT_CNI_VERSION = '1.0.0';

/** What Istio calls a lone configuration that has no name when it makes a list of it. */
const UNNAMED_NETWORK = 'k8s-pod-network';

const LISTS = /\.conflist$/;
const SINGLES = /\.(conf|json)$/;

export interface ListedPlugin {
  /** '' never: such a file is not valid */
  type: string;
  fields: Fields;
}

/** A file that a runtime would take. */
export interface NetworkFile {
  /** without its directory */
  name: string;
  /** single: one plugin, from before lists; runtimes make a list of it */
  kind: 'list' | 'single';
  network: string;
  /** undefined: not said */
  cniVersion: string | undefined;
  plugins: readonly ListedPlugin[];
  json: JsonText;
}

/** What a runtime looks at in its directory. */
export function isNetworkFileName(name: string): boolean {
  return LISTS.test(name) || SINGLES.test(name);
}

/** Throws CniError 6 or 7 for what the runtimes' library refuses. Keys of the list itself have no case but their own. */
export function readNetworkFile(name: string, bytes: Buffer): NetworkFile {
  const json = readJsonText(bytes);
  const { fields } = json;
  const invalid = (details: string) =>
    new CniError(Code.INVALID_NETWORK_CONFIG, `${name} is no network configuration`, details);
  if (SINGLES.test(name)) {
    const type = foldedField(fields, 'type');
    if (typeof type !== 'string' || type === '') throw invalid('it has no "type"');
    const network = foldedField(fields, 'name');
    return {
      name,
      kind: 'single',
      network: typeof network === 'string' && network !== '' ? network : UNNAMED_NETWORK,
      cniVersion: versionOf(foldedField(fields, 'cniVersion'), invalid),
      plugins: [{ type, fields }],
      json,
    };
  }
  const { name: network, plugins } = fields;
  if (typeof network !== 'string') throw invalid('it has no "name"');
  if (!Array.isArray(plugins) || plugins.length === 0) throw invalid('it has no "plugins"');
  return {
    name,
    kind: 'list',
    network,
    cniVersion: versionOf(fields.cniVersion, invalid),
    plugins: plugins.map((plugin: unknown, i) => {
      if (!isObject(plugin)) {
        throw invalid(`plugins[${i}] = ${quote(plugin)} is no object`);
      }
      const type = foldedField(plugin, 'type');
      if (typeof type !== 'string' || type === '') throw invalid(`plugins[${i}] has no "type"`);
      return { type, fields: plugin };
    }),
    json,
  };
}

function versionOf(value: unknown, invalid: (details: string) => CniError): string | undefined {
  if (value === undefined || value === '') return undefined;
  if (typeof value !== 'string') throw invalid(`cniVersion = ${quote(value)} is no string`);
  return value;
}

/** Plugins that are not what gives a pod its network: alone in a file they make no primary one. */
const NEVER_PRIMARY = ['loopback', 'istio-cni', PLUGIN_TYPE];

export function canBePrimary(file: NetworkFile): boolean {
  return file.plugins.some(({ type }) => !NEVER_PRIMARY.includes(type));
}

/**
 * Plugins that make the interface we attach to, move it or change its address: ours comes after them. What nobody here
 * has heard of may stay behind us: its tool may want the last place too, and two that want it would never end.
 */
const MAKES_INTERFACE = [
  ...['bridge', 'ptp', 'host-device', 'macvlan', 'ipvlan', 'vlan', 'tap', 'calico', 'flannel', 'cilium-cni', 'antrea'],
  ...['aws-cni', 'azure-vnet', 'ovn-k8s-cni-overlay', 'kube-ovn', 'weave-net', 'kube-router', 'multus', 'terway'],
  ...['tuning', 'vrf', 'sbr'],
];

export function isRightPlace(plugins: readonly ListedPlugin[], at: number): boolean {
  return at > 0 && plugins.slice(at + 1).every(({ type }) => !MAKES_INTERFACE.includes(type));
}

/** istio-cni with ambient redirection on: it and we would redirect the same pods. */
export function isAmbientIstio({ type, fields }: ListedPlugin): boolean {
  return type === 'istio-cni' && foldedField(fields, 'ambient_enabled') === true;
}

/** What install changed beside adding the entry. */
export interface Undo {
  /** entries that were taken out: their place among those that are not ours, and their text with the comma */
  replaced?: { at: number; text: string }[];
  /** the lone configuration that this list was made of */
  single?: string;
  /** of the list; null: it had none */
  cniVersion?: string | null;
  /** this whole file is ours, made from that one */
  owned?: string;
}

const UNDO_KEY = PLUGIN_TYPE;

/** {} for what somebody has edited into something else. */
export function undoOf({ fields }: ListedPlugin): Undo {
  const { args } = fields;
  const undo: unknown = isObject(args) ? args[UNDO_KEY] : undefined;
  if (!isObject(undo)) return {};
  const { replaced, single, cniVersion, owned } = undo;
  return {
    ...(Array.isArray(replaced) && replaced.every(isReplaced) && { replaced }),
    ...(typeof single === 'string' && { single }),
    ...((typeof cniVersion === 'string' || cniVersion === null) && { cniVersion }),
    ...(typeof owned === 'string' && { owned }),
  };
}

function isReplaced(value: unknown): boolean {
  return isObject(value) && Number.isSafeInteger(value.at) && Number(value.at) >= 0 && typeof value.text === 'string';
}

function isObject(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** The list that is ours alone (owned-conflist option). */
export function isOwned(file: NetworkFile): boolean {
  return file.plugins.some((plugin) => plugin.type === PLUGIN_TYPE && undoOf(plugin).owned !== undefined);
}

export interface Wanted {
  /** the entry as it is to stand there, without `args` of ours */
  entry: Fields;
  /** instead of what the file says; undefined: kept where we speak it, else DEFAULT_CNI_VERSION */
  cniVersion?: string | undefined;
  /** takes an active istio-cni out instead of refusing to be beside it */
  replaceIstio?: boolean | undefined;
}

/** A file to be written in place of another, or beside it. */
export interface Edit {
  name: string;
  bytes: Buffer;
  /** goes after `name` is written */
  removes?: string;
  /** what was done, for people */
  notes: string[];
}

/** Beside a rival that redirects the same pods. */
export class RivalError extends Error {
  override readonly name = 'RivalError';
}

/** `file` with our entry in its right place, once. null: it is so already. Throws RivalError. */
export function withEntry(file: NetworkFile, wanted: Wanted): Edit | null {
  const notes: string[] = [];
  const undo: Undo = {};
  let name = file.name;
  let list = file;
  let start = file.json.text;
  if (file.kind === 'single') {
    name = file.name.replace(SINGLES, '.conflist');
    undo.single = file.name;
    start = wrap(file);
    list = readNetworkFile(name, toBytes(start));
    notes.push(`made a list of ${file.name}`);
  }
  const text = editList(list, start, wanted, undo, notes);
  if (text === file.json.text) return null;
  const edit: Edit = { name, bytes: toBytes(text), notes };
  return file.kind === 'single' ? { ...edit, removes: file.name } : edit;
}

/** A list of ours called `name`, with what `primary` has and our entry. null: `current` is that already. */
export function ownedList(
  primary: NetworkFile,
  name: string,
  wanted: Wanted,
  current: Buffer | undefined,
): Edit | null {
  const start = primary.kind === 'single' ? wrap(primary) : primary.json.text;
  const notes = [`made ${name} from ${primary.name}`];
  const text = editList(readNetworkFile(name, toBytes(start)), start, wanted, { owned: primary.name }, notes);
  const bytes = toBytes(text);
  return current?.equals(bytes) ? null : { name, bytes, notes };
}

function wrap({ json, network, cniVersion }: NetworkFile): string {
  const layout: Layout = { newline: '\n', indent: '', unit: '  ' };
  const version = cniVersion ?? DEFAULT_CNI_VERSION;
  return (
    `{\n  "cniVersion": ${writeJson(version, layout)},\n  "name": ${writeJson(network, layout)},\n` +
    `  "plugins": [\n    ${json.text.trim()}\n  ]\n}\n`
  );
}

/** `text` is that of `file`; `undo` gets what is changed beside the entry. */
function editList(file: NetworkFile, text: string, wanted: Wanted, undo: Undo, notes: string[]): string {
  let list = file;
  const change = (to: string) => {
    text = to;
    list = readNetworkFile(list.name, toBytes(to));
  };
  const own = positions(list, ({ type }) => type === PLUGIN_TYPE);
  const kept = own.find((at) => isRightPlace(list.plugins, at)) ?? own[0];
  const before = kept === undefined ? {} : undoOf(list.plugins[kept] as ListedPlugin);
  Object.assign(undo, { ...undo, ...before, ...(undo.owned !== undefined && { owned: undo.owned }) });
  for (const at of own.toReversed()) {
    if (at === kept) continue;
    change(removeElement(text, elements(list), at));
    notes.push('took out a second entry of ours');
  }

  const rivals = positions(list, isAmbientIstio);
  if (rivals.length > 0 && wanted.replaceIstio !== true) {
    throw new RivalError(
      `${file.name} has an entry of istio-cni with ambient_enabled: both would redirect the same pods; ` +
        'switch its ambient mode off, or let it be replaced (--replace-istio-cni)',
    );
  }
  // Its tool may have put it back since: what counts is how it was the last time.
  if (rivals.length > 0) undo.replaced = [];
  for (const at of rivals.toReversed()) {
    const { start, end } = elementSpan(elements(list), at);
    const ownBefore = positions(list, ({ type }) => type === PLUGIN_TYPE).filter((position) => position < at).length;
    undo.replaced?.unshift({ at: at - ownBefore, text: text.slice(start, end) });
    change(removeElement(text, elements(list), at));
    notes.push('took out the entry of istio-cni; uninstall puts it back');
  }

  const version = wantedVersion(list, wanted.cniVersion);
  if (version !== list.cniVersion) {
    if (!('cniVersion' in undo)) undo.cniVersion = list.cniVersion ?? null;
    notes.push(`cniVersion ${version} instead of ${list.cniVersion ?? 'none'}`);
    change(setVersion(text, list, version));
  }

  const { args } = wanted.entry;
  const told = Object.keys(undo).length > 0 ? { args: { ...(args as Fields | undefined), [UNDO_KEY]: undo } } : {};
  const entry = { ...wanted.entry, ...told };
  const at = positions(list, ({ type }) => type === PLUGIN_TYPE)[0];
  if (at !== undefined && isRightPlace(list.plugins, at)) {
    if (isDeepStrictEqual(plain(list.plugins[at]?.fields), plain(entry))) return text;
    const { start, end } = spanOf(elementAt(list, at));
    notes.push('changed our entry');
    return splice(text, start, end, writeJson(entry, layoutOf(text, elements(list))));
  }
  if (at !== undefined) {
    notes.push('moved our entry to its place');
    change(removeElement(text, elements(list), at));
  } else {
    notes.push('added our entry');
  }
  const array = elements(list);
  return appendElement(text, array, writeJson(entry, layoutOf(text, array)));
}

/** `cniVersions` is the newer libcni's choice, from which it takes one that plugins speak. */
function wantedVersion(list: NetworkFile, told: string | undefined): string | undefined {
  if (told !== undefined) return told;
  const speaks = (version: unknown) => (SUPPORTED_VERSIONS as readonly unknown[]).includes(version);
  const { cniVersions } = list.json.fields;
  if (speaks(list.cniVersion) || (Array.isArray(cniVersions) && cniVersions.some(speaks))) return list.cniVersion;
  return DEFAULT_CNI_VERSION;
}

/** undefined: none, and the member goes. */
function setVersion(text: string, { json: { root } }: NetworkFile, version: string | undefined): string {
  const member = memberOf(root, 'cniVersion');
  if (member !== undefined && version !== undefined) {
    const { start, end } = spanOf(member.value);
    return splice(text, start, end, JSON.stringify(version));
  }
  const [first, second] = root.members;
  if (first === undefined) return text;
  if (member === undefined) {
    const { start } = spanOf(first);
    const gap = text.slice(spanOf(root).start + 1, start);
    return version === undefined ? text : splice(text, start, start, `"cniVersion": ${JSON.stringify(version)},${gap}`);
  }
  // Only what setVersion itself put in front is taken out.
  return member === first && second !== undefined ? splice(text, spanOf(first).start, spanOf(second).start, '') : text;
}

export type Removal = Edit | { removes: string; notes: string[] };

/** `file` as it was before our entry. null: it has none. */
export function withoutEntry(file: NetworkFile): Removal | null {
  const own = positions(file, ({ type }) => type === PLUGIN_TYPE);
  if (own.length === 0) return null;
  if (file.kind === 'single' || isOwned(file)) return { removes: file.name, notes: [`removed ${file.name}`] };
  let list = file;
  let { text } = file.json;
  const change = (to: string) => {
    text = to;
    list = { ...list, ...readList(list.name, to) };
  };
  const undo: Undo = Object.assign({}, ...own.map((at) => undoOf(file.plugins[at] as ListedPlugin)));
  for (const at of own.toReversed()) change(removeElement(text, elements(list), at));
  const notes = [`took our entry out of ${file.name}`];
  const back = list.plugins.some(({ type }) => type === 'istio-cni');
  for (const { at, text: replaced } of back ? [] : (undo.replaced ?? [])) {
    const array = elements(list);
    change(array.elements.length > 0 ? restoreElement(text, array, at, replaced) : text);
    notes.push('put the entry of istio-cni back');
  }
  if (undo.cniVersion !== undefined) change(setVersion(text, list, undo.cniVersion ?? undefined));
  const [only, ...others] = elements(list).elements;
  if (undo.single !== undefined && isLoneName(undo.single) && only !== undefined && others.length === 0) {
    const { start, end } = spanOf(only.value);
    notes.push(`put ${undo.single} back`);
    return { name: undo.single, bytes: toBytes(`${text.slice(start, end)}\n`), removes: file.name, notes };
  }
  return { name: file.name, bytes: toBytes(text), notes };
}

/** As readNetworkFile, for a list that may have no plugin left. */
function readList(name: string, text: string): Pick<NetworkFile, 'json' | 'plugins'> {
  const json = readJsonText(toBytes(text));
  const { plugins } = json.fields;
  return Array.isArray(plugins) && plugins.length > 0 ? readNetworkFile(name, toBytes(text)) : { json, plugins: [] };
}

function isLoneName(name: unknown): boolean {
  return typeof name === 'string' && SINGLES.test(name) && !name.includes('/') && !name.startsWith('.');
}

function positions(file: NetworkFile, matches: (plugin: ListedPlugin) => boolean): number[] {
  return file.plugins.flatMap((plugin, at) => (matches(plugin) ? [at] : []));
}

function elements({ json, name }: NetworkFile) {
  const array = arrayOf(json.root, 'plugins');
  if (array === undefined) throw new TypeError(`${name}: its plugins are not where they were read`);
  return array;
}

function elementAt(file: NetworkFile, at: number) {
  const element = elements(file).elements[at];
  if (element === undefined) throw new TypeError(`${file.name}: no plugin ${at}`);
  return element.value;
}

/** With ordinary prototypes, and without what JSON does not say. */
function plain(value: unknown): unknown {
  return value === undefined ? undefined : JSON.parse(JSON.stringify(value));
}
