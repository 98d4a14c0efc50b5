// SPDX-License-Identifier: Apache-2.0
// `install` and `uninstall`: settings in, what was done out.

import { loadNative } from '../addon.ts';
import { Api } from '../agent/kubernetes/api.ts';
import { clusterAccess } from '../agent/kubernetes/part.ts';
import { removeRedirections } from '../agent/kubernetes/unannotate.ts';
import type { EntryOptions } from '../install/entry.ts';
import { ownExecutable } from '../install/executable.ts';
import { install } from '../install/install.ts';
import { installedAgain, uninstall } from '../install/uninstall.ts';
import {
  type CONFLIST_SETTINGS,
  type DIRECTORY_SETTINGS,
  type ENTRY_SETTINGS,
  entryOf,
  type INSTALL_SETTINGS,
  type UNINSTALL_SETTINGS,
  type Values,
} from '../settings.ts';
import { count } from './survey.ts';
import type { Terminal } from './terminal.ts';

/** Throws CniError 2, 6 or 7 for an entry that the plugin would refuse, and for settings that cannot be. */
export function entryOptions(
  values: Values<typeof ENTRY_SETTINGS & typeof DIRECTORY_SETTINGS & typeof CONFLIST_SETTINGS>,
): EntryOptions {
  if (!values.chained) {
    throw new Error(
      'CHAINED_CNI_PLUGIN=false cannot be: the plugin works on an interface that another plugin of its list has made; ' +
        'where several configurations are used (multus), name that of the default network with CNI_CONF_NAME',
    );
  }
  return {
    netDir: values.cniNetDir,
    confName: values.cniConfName,
    ownedName: values.ownedConflist ? values.ownedConflistName : undefined,
    groupRead: values.confGroupRead,
    wanted: { entry: entryOf(values, values), cniVersion: values.cniVersion, replaceIstio: values.replaceIstioCni },
  };
}

export async function installCommand(terminal: Terminal, values: Values<typeof INSTALL_SETTINGS>): Promise<0> {
  const options = entryOptions(values);
  const { cniNetDir, cniBinDir, stateDir, runDir, wait } = values;
  const installed = await install(
    loadNative(),
    { ...options, binDir: cniBinDir, stateDir, runDir, wait, executable: ownExecutable() },
    () => terminal.err(`waiting for a network configuration in ${cniNetDir}\n`),
  );
  for (const [dir, { attachments, capacity }] of installed.migrated) {
    if (attachments > 0) terminal.out(`${dir}: ${count(attachments, 'attachment')} with the programs of this build\n`);
    if (capacity !== undefined) {
      const { maxPods, maxFlows, directFlowsPerPod } = capacity;
      const room = `${count(maxPods, 'pod')}, ${count(maxFlows, 'flow')}, ${count(directFlowsPerPod, 'direct flow')} of each pod`;
      terminal.out(`${dir}: room for ${room}\n`);
    }
  }
  terminal.out(`${cniBinDir}/ambient-redirect: ${installed.executableChanged ? 'installed' : 'unchanged'}\n`);
  terminal.out(`${cniNetDir}/${installed.name}: ${installed.notes.join(', ') || 'unchanged'}\n`);
  return 0;
}

/** With `stay` until a signal. */
export async function uninstallCommand(terminal: Terminal, values: Values<typeof UNINSTALL_SETTINGS>): Promise<0> {
  const ended = new AbortController();
  if (values.stay) for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => ended.abort());
  do {
    await uninstallOnce(terminal, values);
  } while (values.stay && (await installedAgain(values.runDir, ended.signal)));
  return 0;
}

async function uninstallOnce(terminal: Terminal, values: Values<typeof UNINSTALL_SETTINGS>): Promise<void> {
  const { cniNetDir, cniBinDir, nodeName } = values;
  const access = clusterAccess(values);
  if (access !== undefined && nodeName === '') {
    throw new Error('--node-name (NODE_NAME) is needed: annotations of the pods of one node are to go');
  }
  const unannotate = async () => {
    if (access === undefined) return;
    const api = new Api(access);
    try {
      for (const pod of await removeRedirections(api, nodeName)) terminal.out(`removed the annotation of ${pod}\n`);
    } finally {
      api.close();
    }
  };
  const { pods, cut, executable } = await uninstall(
    loadNative(),
    { ...values, netDir: cniNetDir, binDir: cniBinDir, unannotate },
    (line) => terminal.out(`${line}\n`),
  );
  if (cut > 0) terminal.err(`${count(cut, 'connection')} through the proxy cut\n`);
  terminal.out(`${count(pods.length, 'pod')} unenrolled\n`);
  const path = `${cniBinDir}/ambient-redirect`;
  if (typeof executable === 'object') terminal.err(`${path} stays: ${executable.kept}\n`);
  else if (executable === 'removed') terminal.out(`removed ${path}\n`);
  else if (executable === 'absent') terminal.out(`${path}: not there\n`);
  else terminal.err(`${cniBinDir} does not exist here: if the node has ${path}, it stays\n`);
}
