// SPDX-License-Identifier: Apache-2.0
// What only the in-pod contract has: hooks inside a pod's namespace, whose programs cannot tell by the device whose they
// are.

import { hex } from './attachments.ts';
import { CniError, Code } from './cni/errors.ts';
import type { AttachmentKey, JumpedTo, Native, ProgramName, State } from './native.ts';

const STUBBED: readonly ProgramName[] = ['inpod_egress', 'inpod_ingress', 'inpod_lookup'] satisfies JumpedTo[];

export function isStubbed<Hook extends { program: ProgramName }>(hook: Hook): hook is Hook & { program: JumpedTo } {
  return STUBBED.includes(hook.program);
}

/** INTERFACE_ID_NO_HOST of bpf/redirect.h: no device has such an index. */
const NO_HOST = 0x80000000;

/**
 * The interface id of an attachment without a host-side peer: the same for the same key, unless another one has it.
 * Throws CniError 103.
 */
export function interfaceIdOfKey(native: Native, state: State, key: AttachmentKey): number {
  const view = new DataView(key.buffer, key.byteOffset, key.byteLength);
  const holders = new Map(
    native.listAttachments(state).map((entry) => [entry.record.interfaceId, hex(entry.key)] as const),
  );
  for (let at = 0; at + 4 <= key.byteLength; at += 4) {
    const id = (NO_HOST | view.getUint32(at)) >>> 0;
    const holder = holders.get(id);
    if (holder === undefined || holder === hex(key)) return id;
  }
  throw new CniError(Code.STATE_FAILED, 'no interface id is free', `every one made of the key ${hex(key)} is in use`);
}

/** Throws CniError 102 where no program can give a packet to a listener that has SO_REUSEPORT. */
export function assertSteering(native: Native, state: State): void {
  if (native.jumpTarget(state, 'inpod_lookup') !== 0) return;
  const { skLookup } = native.features();
  throw new CniError(
    Code.ATTACH_FAILED,
    'the contract "in-pod" needs socket lookup programs',
    skLookup === true
      ? 'the variant that this state was made with goes without them'
      : "this kernel has none (5.9): ztunnel's listeners have SO_REUSEPORT, and nothing else can choose them",
  );
}
