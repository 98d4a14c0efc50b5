// SPDX-License-Identifier: Apache-2.0
// The Result of an earlier plugin: checked as far as SPEC goes, handed on as it came. Nothing is converted, because a
// predecessor that conforms answers in the configuration's version.

import { parseAddress, parsePrefix } from './address.ts';
import { CniError, Code, quote } from './errors.ts';
import { resultFamily } from './version.ts';

/** Only keys that are read or checked are named; all others pass as well. */
export interface Result {
  cniVersion: string;
  interfaces?: readonly ResultInterface[] | null;
  ips?: readonly ResultIp[] | null;
  [key: string]: unknown;
}

export interface ResultInterface {
  name?: string | null;
  /** As the predecessor wrote it: some put a number of their own here for interfaces that do not exist. */
  mac?: string | null;
  /** path of a network namespace; absent or '' for an interface of the host */
  sandbox?: string | null;
  [key: string]: unknown;
}

export interface ResultIp {
  /** CIDR notation, valid */
  address: string;
  /** index into interfaces; may be negative or out of range */
  interface?: number | null;
  gateway?: string | null;
  [key: string]: unknown;
}

type Dictionary = Readonly<Record<string, unknown>>;

/**
 * Checks a decoded prevResult and labels it with the configuration's version. Throws CniError 6 where a value has the
 * wrong JSON type, 7 where it says something impossible or is of a version with another shape.
 */
export function validateResult(value: unknown, version: string): Result {
  const result = dictionary(value, 'prevResult');
  const own = optionalString(result, 'cniVersion', 'prevResult') ?? '';
  if (own !== '' && (resultFamily(own) === undefined || resultFamily(own) !== resultFamily(version))) {
    const details = `prevResult has cniVersion ${quote(own)}, the configuration ${quote(version)}`;
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'prevResult is of an incompatible version', details);
  }

  for (const [link, path] of entries(result, 'interfaces', 'prevResult')) {
    // Older Results of some plugins carry nothing but a name, or not even that: then no interface is meant.
    for (const key of ['name', 'mac', 'sandbox', 'socketPath', 'pciID']) optionalString(link, key, path);
    optionalInteger(link, 'mtu', path);
  }
  for (const [ip, path] of entries(result, 'ips', 'prevResult')) {
    optionalInteger(ip, 'interface', path);
    optionalString(ip, 'version', path);
    requirePrefix(ip, 'address', path);
    optionalAddress(ip, 'gateway', path);
  }
  for (const [route, path] of entries(result, 'routes', 'prevResult')) {
    requirePrefix(route, 'dst', path);
    optionalAddress(route, 'gw', path);
    for (const key of ['mtu', 'advmss', 'priority', 'table', 'scope']) optionalInteger(route, key, path);
  }
  const dns = result.dns ?? undefined;
  if (dns !== undefined) {
    const path = 'prevResult.dns';
    optionalString(dictionary(dns, path), 'domain', path);
    for (const key of ['nameservers', 'search', 'options']) {
      for (const [i, text] of list(dns as Dictionary, key, path).entries()) {
        if (typeof text !== 'string') throw wrongType(`${path}.${key}[${i}]`, text, 'a string');
      }
    }
  }
  return relabel(result as Result, version);
}

/** The same Result, `cniVersion` first and set to `version`. */
export function relabel(result: Readonly<Record<string, unknown>>, version: string): Result {
  // Without a prototype "__proto__" is a key like any other.
  const labelled: Record<string, unknown> = Object.create(null);
  labelled.cniVersion = version;
  for (const key of Object.keys(result)) {
    if (key !== 'cniVersion') labelled[key] = result[key];
  }
  return labelled as Result;
}

/** `null` and an absent key are the same: Go writes nil pointers and slices as null. */
function optionalString(object: Dictionary, key: string, path: string): string | undefined {
  const value = object[key] ?? undefined;
  if (value !== undefined && typeof value !== 'string') throw wrongType(`${path}.${key}`, value, 'a string');
  return value;
}

function optionalInteger(object: Dictionary, key: string, path: string): void {
  const value = object[key] ?? undefined;
  if (value !== undefined && !Number.isSafeInteger(value)) throw wrongType(`${path}.${key}`, value, 'an integer');
}

function optionalAddress(object: Dictionary, key: string, path: string): void {
  const text = optionalString(object, key, path) ?? '';
  if (text !== '' && parseAddress(text) === undefined) throw invalid(`${path}.${key}`, text, 'an IP address');
}

function requirePrefix(object: Dictionary, key: string, path: string): void {
  const text = optionalString(object, key, path);
  if (text === undefined || parsePrefix(text) === undefined) {
    throw invalid(`${path}.${key}`, text, 'an IP address with prefix length');
  }
}

function list(object: Dictionary, key: string, path: string): readonly unknown[] {
  const value = object[key] ?? [];
  if (!Array.isArray(value)) throw wrongType(`${path}.${key}`, value, 'a list');
  return value;
}

function entries(object: Dictionary, key: string, path: string): [Dictionary, string][] {
  return list(object, key, path).map((entry, i) => {
    const entryPath = `${path}.${key}[${i}]`;
    return [dictionary(entry, entryPath), entryPath];
  });
}

function dictionary(value: unknown, path: string): Dictionary {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrongType(path, value, 'an object');
  return value as Dictionary;
}

function wrongType(path: string, value: unknown, expected: string): CniError {
  return new CniError(
    Code.DECODING_FAILURE,
    `cannot decode ${path}`,
    `${path} = ${quote(value)}: expected ${expected}`,
  );
}

function invalid(path: string, value: unknown, expected: string): CniError {
  return new CniError(
    Code.INVALID_NETWORK_CONFIG,
    `invalid ${path}`,
    `${path} = ${quote(value)}: expected ${expected}`,
  );
}
