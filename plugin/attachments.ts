// SPDX-License-Identifier: Apache-2.0
// The identity of an attachment and where its pins are. Both follow from what every verb is given, so that DEL finds
// them without anything that ADD would have had to write down elsewhere.

import { join } from 'node:path';
import type { AttachmentKey, Native, ProgramName } from './native.ts';

/** SPEC 0.4.0: state is keyed by network name, CNI_CONTAINERID and CNI_IFNAME. None of them can contain NUL. */
export function attachmentKey(native: Native, network: string, containerId: string, ifname: string): AttachmentKey {
  return new Uint8Array(Buffer.from(native.sha256(Buffer.from(`${network}\0${containerId}\0${ifname}`)), 'hex'));
}

export function hex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('hex');
}

export function sameKey(a: AttachmentKey, b: AttachmentKey): boolean {
  return hex(a) === hex(b);
}

/** Directory with the pinned TCX links of one attachment. */
export function linkDirectory(stateDir: string, key: AttachmentKey): string {
  return join(stateDir, 'links', hex(key));
}

export function linkPin(stateDir: string, key: AttachmentKey, program: ProgramName | 'direct_import'): string {
  return join(linkDirectory(stateDir, key), program);
}

export function programPin(stateDir: string, tag: string, program: ProgramName | 'direct_import'): string {
  return join(stateDir, 'programs', tag, program);
}
