// SPDX-License-Identifier: Apache-2.0
// Others' programs and filters on the interfaces that have ours, as far as they can come between ours and the packets.

import { inOwnNetns } from './datapath.ts';
import { type AttachmentRecord, HOST, type Native } from './native.ts';

export interface Other {
  direction: 'ingress' | 'egress';
  /** "vethAB", "eth0 in /run/netns/NAME" */
  where: string;
  /** "TCX program 12 (name)", "a bpf filter of priority 2 (name)" */
  what: string;
  /** It runs before ours, and keeps from it whatever it ends the chain for. */
  ahead: boolean;
}

/**
 * On the host-side interface, and inside the namespace where the attachment has programs there too. In the order in which
 * they run: a TCX program before every filter.
 */
export function othersAt(native: Native, record: AttachmentRecord): Other[] {
  const found: Other[] = [];
  if (record.hostIfindex !== 0) {
    found.push(...othersOn(native, record, HOST, record.hostIfindex, record.hostIfname));
  }
  if (record.hooks.some(({ inNetns, kind }) => inNetns && kind !== 'netns')) {
    inOwnNetns(native, record, (netns) => {
      if (native.linkByIndex(netns, record.podIfindex) === null) return;
      found.push(...othersOn(native, record, netns, record.podIfindex, `${record.ifname} in ${record.netnsPath}`));
    });
  }
  return found;
}

function othersOn(native: Native, record: AttachmentRecord, netns: number, ifindex: number, where: string): Other[] {
  const found: Other[] = [];
  const hasTcx = native.features().tcx === true;
  for (const direction of ['ingress', 'egress'] as const) {
    const own = record.hooks.find(
      (hook) => hook.direction === direction && hook.kind !== 'netns' && hook.inNetns === (netns !== HOST),
    );
    let reached = false;
    const look = (programId: number, what: string) => {
      if (programId === own?.programId) reached = true;
      else found.push({ direction, where, what, ahead: own !== undefined && !reached });
    };
    if (hasTcx) {
      for (const { programId } of native.queryTcx(netns, ifindex, direction)) {
        look(programId, `TCX program ${programId} (${native.programById(programId)?.name ?? 'gone'})`);
      }
    }
    for (const { programId, kind, priority, name } of native.filters(netns, ifindex, direction)) {
      look(programId, `a ${kind} filter of priority ${priority}${name === '' ? '' : ` (${name})`}`);
    }
  }
  return found;
}
