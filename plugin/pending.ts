// SPDX-License-Identifier: Apache-2.0
// Pods whose ADD could not enrol them (failurePolicy "open", and no agent or no ztunnel): the request as it came, in a
// file of its own under runDir, so that the agent can do later what ADD would have done. A reboot forgets them, with
// the pods.

import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { hex } from './attachments.ts';
import type { Request } from './cni/dispatch.ts';
import { decodeDocument, decodeNetConf } from './cni/netconf.ts';
import type { AttachmentKey } from './native.ts';

export interface PendingPod {
  key: AttachmentKey;
  request: Request;
  /** why ADD did not enrol it */
  reason: string;
}

function directory(runDir: string): string {
  return join(runDir, 'pending');
}

export function writePending(runDir: string, { key, request, reason }: PendingPod): void {
  const { containerId, netns, ifname, netnsOverride, args, conf } = request;
  const document = { reason, containerId, netns, ifname, netnsOverride, args: [...args], conf: conf.raw };
  mkdirSync(directory(runDir), { recursive: true, mode: 0o700 });
  const path = join(directory(runDir), hex(key));
  // Nobody reads half a file: the name comes when it is whole.
  writeFileSync(`${path}.new`, JSON.stringify(document), { mode: 0o600 });
  renameSync(`${path}.new`, path);
}

/** It is enrolled by now, or gone. */
export function removePending(runDir: string, key: AttachmentKey): void {
  rmSync(join(directory(runDir), hex(key)), { force: true });
}

/** Files that cannot be read as a request are removed, and handed to `broken`. */
export function listPending(runDir: string, broken: (path: string, error: Error) => void): PendingPod[] {
  const found: PendingPod[] = [];
  for (const name of names(runDir)) {
    const path = join(directory(runDir), name);
    if (!/^[0-9a-f]{64}$/.test(name)) continue;
    try {
      found.push(parse(new Uint8Array(Buffer.from(name, 'hex')), readFileSync(path)));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') continue;
      rmSync(path, { force: true });
      broken(path, error as Error);
    }
  }
  return found;
}

export function countPending(runDir: string): number {
  return names(runDir).filter((name) => /^[0-9a-f]{64}$/.test(name)).length;
}

function names(runDir: string): string[] {
  try {
    return readdirSync(directory(runDir));
  } catch {
    return [];
  }
}

function parse(key: AttachmentKey, contents: Buffer): PendingPod {
  // Made by this executable, in a directory that only root can write to: shapes are not looked at again.
  const document = decodeDocument(contents) as unknown as PendingDocument;
  const { reason, containerId, netns, ifname, netnsOverride, args, conf } = document;
  const request: Request = {
    command: 'ADD',
    containerId,
    netns,
    ifname,
    netnsOverride,
    args: new Map(args),
    conf: decodeNetConf(conf, 'ADD'),
  };
  return { key, request, reason };
}

interface PendingDocument {
  reason: string;
  containerId: string;
  netns: string;
  ifname: string;
  netnsOverride: boolean;
  args: [string, string][];
  conf: Readonly<Record<string, unknown>>;
}
