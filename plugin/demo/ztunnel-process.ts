// SPDX-License-Identifier: Apache-2.0
// The stand-in as a process of its own, which tests can kill: a line of JSON on stdout for each thing that happens.

import { readFileSync, statSync } from 'node:fs';
import { parse } from 'yaml';
import type { Terminal } from '../cli/terminal.ts';
import type { Native } from '../native.ts';
import { type KnownWorkload, type Misbehaviour, StandInZtunnel } from './ztunnel.ts';

export interface ZtunnelProcessOptions {
  socket: string;
  /** as LOCAL_XDS_PATH: a YAML list of {name, namespace, serviceAccount, addresses}; read again when it has changed */
  xds: string;
  /** JSON of Misbehaviour */
  misbehaviour?: string;
  drainMs?: string;
  /** uid of the pod whose listeners it loses at SIGUSR2 */
  deafTo?: string;
}

/** @returns the exit code that ztunnel ends with: 0 after SIGTERM, 1 after a message that it does not survive */
export async function runZtunnel(native: Native, terminal: Terminal, options: ZtunnelProcessOptions): Promise<number> {
  const say = (event: object) => terminal.out(`${JSON.stringify(event)}\n`);
  const misbehaviour =
    options.misbehaviour === undefined ? undefined : (JSON.parse(options.misbehaviour) as Misbehaviour);
  const ztunnel = StandInZtunnel.start(native, {
    socket: options.socket,
    xds: xdsFile(options.xds),
    onSeen: (uid, connection) => say({ event: 'seen', uid, ...connection }),
    ...(options.drainMs !== undefined && { drainMs: Number(options.drainMs) }),
    ...(misbehaviour !== undefined && { misbehaviour }),
  });
  process.once('SIGTERM', () => {
    ztunnel.terminate().catch((error: unknown) => say({ event: 'failed', error: String(error) }));
  });
  const { deafTo } = options;
  if (deafTo !== undefined) process.on('SIGUSR2', () => ztunnel.goDeaf(deafTo));
  let last = '';
  let ended = false;
  const exited = ztunnel.exited.then((code) => {
    ended = true;
    return code;
  });
  while (!ended) {
    const state = { event: 'state', ready: ztunnel.ready, served: ztunnel.served, pending: ztunnel.pending };
    const text = JSON.stringify(state);
    if (text !== last) say(state);
    last = text;
    await Promise.race([ztunnel.change(), exited]);
  }
  return exited;
}

function xdsFile(path: string): () => readonly KnownWorkload[] {
  let version = '';
  let known: readonly KnownWorkload[] = [];
  return () => {
    const { ino, mtimeNs, size } = statSync(path, { bigint: true });
    if (`${ino} ${mtimeNs} ${size}` !== version) {
      version = `${ino} ${mtimeNs} ${size}`;
      known = (parse(readFileSync(path, 'utf8')) ?? []) as KnownWorkload[];
    }
    return known;
  };
}
