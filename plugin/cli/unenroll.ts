// SPDX-License-Identifier: Apache-2.0
// `unenroll`: takes a running pod's programs away, at once or when the proxy has no connection of it any more. The pod stays recorded as one that is not enrolled, so that the
// runtime's CHECK and DEL, and a later `enroll`, still know it.

import { withdrawAttachment } from '../agent-client.ts';
import { CniError, Code } from '../cni/errors.ts';
import { describePod, isSameNetns } from '../datapath.ts';
import { endDrains, isDraining, startDrain, takeOut } from '../drain.ts';
import type { AttachmentRecord, Native } from '../native.ts';
import type { Directories } from '../state.ts';
import type { Settings } from './directories.ts';
import { recordsOf } from './enroll.ts';
import { count } from './survey.ts';
import type { Terminal } from './terminal.ts';

/** Exactly one of the three. */
export interface UnenrollOptions {
  netns?: string;
  /** "NAMESPACE/NAME" */
  pod?: string;
  containerId?: string;
  /** default true; false cuts */
  drain?: boolean;
}

export async function unenroll(
  native: Native,
  terminal: Terminal,
  settings: Settings,
  options: UnenrollOptions,
): Promise<0> {
  const matches = selector(native, options);
  const found = recordsOf(native, settings).filter(({ record }) => record.role === 'pod' && matches(record));
  if (found.length === 0) {
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'no such enrolled pod', `${settings.config.stateDir} has none`);
  }
  const { stateDir, runDir } = settings.config;
  const dirs = { stateDir, runDir };
  for (const { key, record } of found) {
    const left = options.drain === false ? 0 : startDrain(native, dirs, key, record);
    if (left > 0) {
      terminal.out(
        `draining ${describePod(record)}: new connections go direct, ${count(left, 'socket')} of the proxy's for it left\n`,
      );
      continue;
    }
    takeOut(native, dirs, key);
    if (record.contract === 'in-pod') await tellAgent(terminal, dirs, record);
    terminal.out(
      `unenrolled ${describePod(record)}: ${record.ifname}${record.hostIfname === '' ? '' : ` through ${record.hostIfname}`}\n`,
    );
  }
  if (options.drain === false) terminal.err('connections of these pods that went through the proxy are cut\n');
  else {
    endDrains(native, dirs);
    if (recordsOf(native, settings).some(({ record }) => isDraining(native, record))) {
      terminal.err(
        'draining pods keep their programs until the next ADD, DEL, GC, status or unenroll after the last one\n',
      );
    }
  }
  return 0;
}

/** The programs are gone either way; an agent that is not there finds out when it is back. */
export async function tellAgent(terminal: Terminal, dirs: Directories, record: AttachmentRecord): Promise<void> {
  try {
    await withdrawAttachment(dirs, record);
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    terminal.err(`ztunnel hears later that ${describePod(record)} has left: ${error.message}\n`);
  }
}

/** Throws CniError 7 for a path that is not there. */
function selector(native: Native, { netns, pod, containerId }: UnenrollOptions): (record: AttachmentRecord) => boolean {
  if (pod !== undefined) return (record) => `${record.podNamespace}/${record.podName}` === pod;
  if (containerId !== undefined) return (record) => record.containerId === containerId;
  const path = netns ?? '';
  try {
    const fd = native.openNetns(path);
    try {
      const identity = native.netnsIdentity(fd);
      return (record) => isSameNetns(identity, record.netns);
    } finally {
      native.close(fd);
    }
  } catch {
    // A namespace without a path any more is found by the path that it had.
    return (record) => record.netnsPath === path;
  }
}
