// SPDX-License-Identifier: Apache-2.0
// `agent --workloads FILE`: which pods are in the mesh and whose they are, for nodes without Kubernetes. A YAML list of
// {namespace, name, serviceAccount, uid}; uid may be left out. Read again when it has changed.

import { readFileSync, statSync } from 'node:fs';
import { parse } from 'yaml';
import type { PodIdentity } from '../redirect/enrolment.ts';
import type { PodDirectory, PodEntry } from './agent.ts';

interface Row {
  namespace: string;
  name: string;
  serviceAccount: string;
  uid: string;
}

const KEYS = ['namespace', 'name', 'serviceAccount', 'uid'] as const;

export class WorkloadsFile implements PodDirectory {
  readonly #path: string;
  readonly #onError: (error: Error) => void;
  #rows: readonly Row[];
  #version: string;

  /** Throws Error with the file's name and the place in it. `onError` hears of a later version that cannot be used. */
  constructor(path: string, onError: (error: Error) => void) {
    this.#path = path;
    this.#onError = onError;
    this.#version = versionOf(path);
    this.#rows = read(path);
  }

  find({ namespace, name, uid }: PodIdentity): PodEntry | undefined {
    this.#refresh();
    const row = this.#rows.find((row) => row.namespace === namespace && row.name === name);
    // The same name with another uid is another pod.
    if (row === undefined || (row.uid !== '' && uid !== '' && row.uid !== uid)) return undefined;
    return {
      uid: row.uid,
      serviceAccount: row.serviceAccount,
      enrol: true,
      reason: `${namespace}/${name} is in ${this.#path}`,
    };
  }

  #refresh(): void {
    try {
      const version = versionOf(this.#path);
      if (version === this.#version) return;
      // Said once, not at each look.
      this.#version = version;
      this.#rows = read(this.#path);
    } catch (error) {
      this.#onError(error as Error);
    }
  }
}

function versionOf(path: string): string {
  const { ino, mtimeNs, size } = statSync(path, { bigint: true });
  return `${ino} ${mtimeNs} ${size}`;
}

function read(path: string): Row[] {
  let document: unknown;
  try {
    document = parse(readFileSync(path, 'utf8'));
  } catch (cause) {
    throw new Error(`${path}: ${cause instanceof Error ? cause.message : String(cause)}`, { cause });
  }
  if (document === null) return [];
  if (!Array.isArray(document)) throw new Error(`${path}: not a list`);
  return document.map((entry: unknown, index) => row(entry, `${path}: [${index}]`));
}

function row(entry: unknown, place: string): Row {
  if (typeof entry !== 'object' || entry === null || Array.isArray(entry)) throw new Error(`${place}: not a mapping`);
  const found: Partial<Row> = {};
  for (const [key, value] of Object.entries(entry)) {
    const known = KEYS.find((one) => one === key);
    if (known === undefined) throw new Error(`${place}.${key}: no such key; there is ${KEYS.join(', ')}`);
    if (typeof value !== 'string' || value === '') throw new Error(`${place}.${key}: not a text`);
    found[known] = value;
  }
  const { namespace, name, serviceAccount, uid = '' } = found;
  if (namespace === undefined || name === undefined || serviceAccount === undefined) {
    throw new Error(`${place}: namespace, name and serviceAccount are needed`);
  }
  return { namespace, name, serviceAccount, uid };
}
