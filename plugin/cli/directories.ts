// SPDX-License-Identifier: Apache-2.0
// Where the command line looks for state, and which configuration it acts with.

import { readFileSync } from 'node:fs';
import { CniError, Code } from '../cni/errors.ts';
import { decodeDocument } from '../cni/netconf.ts';
import { DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, parseConfig, type RedirectConfig } from '../redirect/config.ts';
import type { Directories } from '../state.ts';

export interface DirectoryOptions {
  stateDir?: string;
  runDir?: string;
}

/** Network name of attachments that no runtime made. */
export const COMMAND_LINE_NETWORK = 'ambient-redirect';

const PLUGIN_TYPE = 'ambient-redirect';

/** The option, else the environment, else the default. */
export function directoriesOf(options: DirectoryOptions): Directories {
  return {
    stateDir: options.stateDir ?? fromEnvironment() ?? DEFAULT_STATE_DIR,
    runDir: options.runDir ?? DEFAULT_RUN_DIR,
  };
}

export interface Settings {
  config: RedirectConfig;
  network: string;
}

/**
 * The settings of a conflist entry, or of the whole conflist it is in, with the directories of the options before the
 * file's. Without a file the defaults. Throws CniError 2, 6 or 7, or what reading the file throws.
 */
export function settingsOf(options: DirectoryOptions & { conf?: string }): Settings {
  const file = options.conf === undefined ? undefined : findEntry(readFileSync(options.conf), options.conf);
  const entry: Record<string, unknown> = { ...file?.entry };
  const stateDir = options.stateDir ?? (entry.stateDir === undefined ? fromEnvironment() : undefined);
  if (stateDir !== undefined) entry.stateDir = stateDir;
  if (options.runDir !== undefined) entry.runDir = options.runDir;
  const config = parseConfig(entry);
  if (file === undefined) return { config: { ...config, variant: null }, network: COMMAND_LINE_NETWORK };
  return { config, network: file.network };
}

interface FoundEntry {
  entry: Readonly<Record<string, unknown>>;
  network: string;
}

/** Our entry in a conflist, or the document itself where it is one. Throws CniError 6 or 7. */
export function findEntry(contents: Buffer, path: string): FoundEntry {
  const document = decodeDocument(contents);
  const network = typeof document.name === 'string' && document.name !== '' ? document.name : COMMAND_LINE_NETWORK;
  if (document.type === PLUGIN_TYPE) return { entry: document, network };
  const plugins: unknown = document.plugins;
  const entry = Array.isArray(plugins) ? plugins.find((plugin) => isEntry(plugin)) : undefined;
  if (entry === undefined) {
    throw new CniError(Code.INVALID_NETWORK_CONFIG, `no entry of type "${PLUGIN_TYPE}"`, path);
  }
  return { entry: entry as Record<string, unknown>, network };
}

export function isEntry(plugin: unknown): boolean {
  return typeof plugin === 'object' && plugin !== null && Reflect.get(plugin, 'type') === PLUGIN_TYPE;
}

function fromEnvironment(): string | undefined {
  const value = process.env.AMBIENT_REDIRECT_STATE_DIR ?? '';
  return value === '' ? undefined : value;
}
