// SPDX-License-Identifier: Apache-2.0
// CNI_* variables -> Invocation (SPEC section "Parameters"). Touches neither stdin nor the kernel.

import { CniError, Code, quote } from './errors.ts';
import type { Verb } from './version.ts';

export interface Invocation {
  command: Verb | 'VERSION';
  /** '' for verbs that have none */
  containerId: string;
  /** '' if unset */
  netns: string;
  ifname: string;
  args: ReadonlyMap<string, string>;
  /** CNI_NETNS_OVERRIDE: CNI_NETNS may be the plugin's own namespace */
  netnsOverride: boolean;
}

type Variable = 'CNI_CONTAINERID' | 'CNI_NETNS' | 'CNI_IFNAME' | 'CNI_PATH';

/**
 * The reference library wants CNI_PATH for every verb but VERSION. SPEC needs it where a plugin must find others to
 * delegate to, and requires it for GC alone.
 */
const REQUIRED: Readonly<Record<Invocation['command'], readonly Variable[]>> = {
  ADD: ['CNI_CONTAINERID', 'CNI_NETNS', 'CNI_IFNAME'],
  CHECK: ['CNI_CONTAINERID', 'CNI_NETNS', 'CNI_IFNAME'],
  DEL: ['CNI_CONTAINERID', 'CNI_IFNAME'],
  GC: ['CNI_PATH'],
  STATUS: [],
  VERSION: [],
};

/** SPEC: container ids and network names start with an alphanumeric character. */
export const IDENTIFIER = /^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/;

/** IFNAMSIZ - 1 */
const IFNAME_BYTES = 15;

export function parseEnvironment(env: NodeJS.ProcessEnv): Invocation {
  const command = env.CNI_COMMAND ?? '';
  if (command === '') throw missing(['CNI_COMMAND']);
  if (!isCommand(command)) {
    throw new CniError(Code.INVALID_ENVIRONMENT, `unknown CNI_COMMAND: ${quote(command).slice(1, -1)}`);
  }
  const required = REQUIRED[command];
  const absent: string[] = [];
  for (const variable of required) {
    const value = env[variable] ?? '';
    if (value === '') absent.push(variable);
    else if (variable === 'CNI_CONTAINERID') assertContainerId(value);
    else if (variable === 'CNI_IFNAME') assertIfname(value);
  }
  if (absent.length > 0) throw missing(absent);

  const override = env.CNI_NETNS_OVERRIDE ?? '';
  return {
    command,
    // Under GC and STATUS these are not validated, so they are not handed on either.
    containerId: required.includes('CNI_CONTAINERID') ? (env.CNI_CONTAINERID ?? '') : '',
    ifname: required.includes('CNI_IFNAME') ? (env.CNI_IFNAME ?? '') : '',
    netns: env.CNI_NETNS ?? '',
    args: parseArgs(env.CNI_ARGS ?? ''),
    netnsOverride: override === '1' || override.toLowerCase() === 'true',
  };
}

function isCommand(command: string): command is Invocation['command'] {
  return Object.hasOwn(REQUIRED, command);
}

function missing(variables: readonly string[]): CniError {
  return new CniError(Code.INVALID_ENVIRONMENT, `required env variables [${variables.join(',')}] missing`);
}

function assertContainerId(value: string): void {
  if (!IDENTIFIER.test(value)) {
    throw new CniError(Code.INVALID_ENVIRONMENT, 'CNI_CONTAINERID: invalid characters in containerID', value);
  }
}

function assertIfname(value: string): void {
  const invalid = (reason: string, details: string) =>
    new CniError(Code.INVALID_ENVIRONMENT, `CNI_IFNAME: interface name ${reason}`, details);
  const bytes = Buffer.byteLength(value);
  if (bytes > IFNAME_BYTES) throw invalid('is too long', `${quote(value)} has ${bytes} bytes, the kernel takes 15`);
  if (value === '.' || value === '..') throw invalid('is . or ..', value);
  if (/[/:\p{White_Space}]/u.test(value)) throw invalid('contains / or : or whitespace characters', quote(value));
}

/**
 * `K=V;K2=V2`. Never fails: runtimes send pairs that are none of our business, and in no fixed order. A pair without
 * '=' is left out; of a repeated key the last counts.
 */
function parseArgs(text: string): ReadonlyMap<string, string> {
  const args = new Map<string, string>();
  for (const pair of text.split(';')) {
    const equals = pair.indexOf('=');
    if (equals > 0) args.set(pair.slice(0, equals), pair.slice(equals + 1));
  }
  return args;
}
