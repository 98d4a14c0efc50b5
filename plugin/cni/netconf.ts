// SPDX-License-Identifier: Apache-2.0
// stdin -> NetConf (SPEC section "Execution configuration"). Keys are matched by exact case: libcni writes them so.

import { IDENTIFIER } from './env.ts';
import { CniError, Code, quote } from './errors.ts';
import { type Result, validateResult } from './result.ts';
import { UNDECLARED_VERSION, type Verb } from './version.ts';

export interface NetConf {
  name: string;
  cniVersion: string;
  /** the whole document; it and every object in it have no prototype */
  raw: Readonly<Record<string, unknown>>;
  /** as it came, but labelled with cniVersion; never there for GC and STATUS */
  prevResult?: Result;
  /** DEL: what was wrong with prevResult, which is then absent */
  prevResultError?: CniError;
  /** {} if absent */
  runtimeConfig: Readonly<Record<string, unknown>>;
  /** GC: attachments that are still wanted. null: the runtime did not say; []: none is. null for the other verbs. */
  validAttachments: readonly ValidAttachment[] | null;
}

export interface ValidAttachment {
  containerID: string;
  ifname: string;
}

/** Deeper than any configuration, shallower than what JSON.stringify can write. */
const MAX_DEPTH = 200;

/** The document as an object without prototypes. Throws CniError 6. */
export function decodeDocument(stdin: Buffer): Readonly<Record<string, unknown>> {
  if (stdin.length === 0) throw undecodable('stdin is empty');
  // Unlike TextDecoder, toString keeps a byte order mark, and JSON.parse refuses it.
  const text = stdin.toString('utf8');
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch (cause) {
    const reason = text.startsWith('\uFEFF') ? 'begins with a byte order mark' : 'is not one JSON document';
    throw undecodable(`stdin (${stdin.length} bytes) ${reason}`, { cause });
  }
  // The reference library takes null for an empty configuration and goes on to miss the name.
  if (document === null) return Object.create(null);
  if (typeof document !== 'object' || Array.isArray(document)) {
    throw undecodable(
      `stdin is ${Array.isArray(document) ? 'a JSON list' : `a JSON ${typeof document}`}, not an object`,
    );
  }
  removePrototypes(document);
  return document as Record<string, unknown>;
}

/** Throws CniError 6 or 7. */
export function networkName(raw: Readonly<Record<string, unknown>>): string {
  const name = raw.name ?? '';
  if (typeof name !== 'string') throw undecodable(`name = ${quote(name)}: expected a string`);
  if (name === '') throw new CniError(Code.INVALID_NETWORK_CONFIG, 'missing network name');
  if (!IDENTIFIER.test(name)) {
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'invalid characters found in network name', name);
  }
  return name;
}

/** Throws CniError 6 if it is no string; any string may come back. */
export function configVersion(raw: Readonly<Record<string, unknown>>): string {
  const version = raw.cniVersion ?? '';
  if (typeof version !== 'string') throw undecodable(`cniVersion = ${quote(version)}: expected a string`);
  return version === '' ? UNDECLARED_VERSION : version;
}

/** The rest of the document, as `verb` needs it. Throws CniError 6 or 7, for DEL never. */
export function decodeNetConf(raw: Readonly<Record<string, unknown>>, verb: Verb): NetConf {
  const cniVersion = configVersion(raw);
  const conf: NetConf = {
    name: networkName(raw),
    cniVersion,
    raw,
    runtimeConfig: decodeRuntimeConfig(raw, verb),
    validAttachments: verb === 'GC' ? decodeValidAttachments(raw) : null,
  };
  if (verb === 'GC' || verb === 'STATUS') return conf;

  const prevResult = raw.prevResult ?? undefined;
  if (prevResult === undefined) {
    if (verb === 'DEL') return conf;
    const details = `prevResult is missing; ${verb} needs the Result of the plugin that made the interface`;
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'must be called as a chained plugin', details);
  }
  try {
    conf.prevResult = validateResult(prevResult, cniVersion);
  } catch (error) {
    // A DEL that fails is repeated until it succeeds, and the pod stays; the state is found by key alone.
    if (verb !== 'DEL' || !(error instanceof CniError)) throw error;
    conf.prevResultError = error;
  }
  return conf;
}

function decodeRuntimeConfig(raw: Readonly<Record<string, unknown>>, verb: Verb): Readonly<Record<string, unknown>> {
  const value = raw.runtimeConfig ?? Object.create(null);
  if (isObject(value)) return value;
  if (verb === 'DEL') return Object.create(null);
  throw undecodable(`runtimeConfig = ${quote(value)}: expected an object`);
}

/**
 * The key was cni.dev/attachments in SPEC 1.1.0 as released and is cni.dev/valid-attachments since; libcni sends both.
 * null in place of a list is Go's empty list.
 */
function decodeValidAttachments(raw: Readonly<Record<string, unknown>>): readonly ValidAttachment[] | null {
  const key = ['cni.dev/valid-attachments', 'cni.dev/attachments'].find((name) => raw[name] !== undefined);
  if (key === undefined) return null;
  const value = raw[key] ?? [];
  const invalid = (path: string, found: unknown, expected: string) =>
    new CniError(Code.INVALID_NETWORK_CONFIG, `invalid ${key}`, `${path} = ${quote(found)}: expected ${expected}`);
  if (!Array.isArray(value)) throw invalid(key, value, 'a list');
  return value.map((entry: unknown, i) => {
    const path = `${key}[${i}]`;
    if (!isObject(entry)) throw invalid(path, entry, 'an object');
    const { containerID, ifname } = entry;
    if (typeof containerID !== 'string' || !IDENTIFIER.test(containerID)) {
      throw invalid(`${path}.containerID`, containerID, 'a container id');
    }
    if (typeof ifname !== 'string' || ifname === '') throw invalid(`${path}.ifname`, ifname, 'an interface name');
    return { containerID, ifname };
  });
}

/** JSON.parse makes "__proto__" an own key, but reading any key that is absent would look into Object.prototype. */
function removePrototypes(document: object): void {
  let level: object[] = [document];
  for (let depth = 1; level.length > 0; depth++) {
    if (depth > MAX_DEPTH) throw undecodable(`stdin is nested deeper than ${MAX_DEPTH} levels`);
    const next: object[] = [];
    for (const object of level) {
      if (!Array.isArray(object)) Object.setPrototypeOf(object, null);
      for (const value of Object.values(object)) {
        if (typeof value === 'object' && value !== null) next.push(value);
      }
    }
    level = next;
  }
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function undecodable(details: string, options?: ErrorOptions): CniError {
  return new CniError(Code.DECODING_FAILURE, 'cannot decode network configuration', details, options);
}
