// SPDX-License-Identifier: Apache-2.0
// Settings of pods that the agent attaches by itself. They must be those of ADD: who is in the mesh, which contract, and
// the network's name, which is part of the key by which DEL finds what the agent attached.

import { existsSync } from 'node:fs';
import { COMMAND_LINE_NETWORK, type Settings, settingsOf } from '../cli/directories.ts';
import { rememberedInstall } from '../install/entry.ts';
import { findPrimary, readNetworkDirectory } from '../install/network-directory.ts';
import { parseConfig } from '../redirect/config.ts';
import type { AgentSettings } from './settings.ts';

/**
 * Of --conf; without it what `install` with this runDir was told; where it was not run, the defaults. The network is
 * that of the list that --conf is, else of the list that install put the entry into. Throws CniError 2, 6 or 7, or what
 * reading the files throws.
 */
export function entrySettings({
  stateDir,
  runDir,
  conf,
}: Pick<AgentSettings, 'stateDir' | 'runDir' | 'conf'>): Settings {
  const installed = rememberedInstall(runDir);
  const settings =
    conf === undefined && installed !== undefined
      ? { config: parseConfig({ ...installed.wanted.entry, stateDir, runDir }), network: COMMAND_LINE_NETWORK }
      : settingsOf({ stateDir, runDir, ...(conf !== undefined && { conf }) });
  if (installed === undefined || settings.network !== COMMAND_LINE_NETWORK) return settings;
  const { netDir, confName } = installed;
  const primary = existsSync(netDir) ? findPrimary(readNetworkDirectory(netDir), confName) : undefined;
  return primary === undefined ? settings : { ...settings, network: primary.file.network };
}
