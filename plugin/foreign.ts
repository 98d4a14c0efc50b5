// SPDX-License-Identifier: Apache-2.0
// Others' programs and filters on a pod's host-side interface, as far as they can come between ours and the packets.

import { type AttachmentRecord, HOST, type Native } from './native.ts';

export interface Other {
  direction: 'ingress' | 'egress';
  /** "TCX program 12 (name)", "a bpf filter of priority 2 (name)" */
  what: string;
  /** It runs before ours, and keeps from it whatever it ends the chain for. */
  ahead: boolean;
}

/** In the order in which they run: a TCX program before every filter. */
export function othersAt(native: Native, record: AttachmentRecord): Other[] {
  const found: Other[] = [];
  if (record.hostIfindex === 0) return found;
  const hasTcx = native.features().tcx === true;
  for (const direction of ['ingress', 'egress'] as const) {
    const own = record.hooks.find((hook) => hook.direction === direction && !hook.inNetns);
    let reached = false;
    const look = (programId: number, what: string) => {
      if (programId === own?.programId) reached = true;
      else found.push({ direction, what, ahead: own !== undefined && !reached });
    };
    if (hasTcx) {
      for (const { programId } of native.queryTcx(HOST, record.hostIfindex, direction)) {
        look(programId, `TCX program ${programId} (${native.programById(programId)?.name ?? 'gone'})`);
      }
    }
    for (const { programId, kind, priority, name } of native.filters(HOST, record.hostIfindex, direction)) {
      look(programId, `a ${kind} filter of priority ${priority}${name === '' ? '' : ` (${name})`}`);
    }
  }
  return found;
}
