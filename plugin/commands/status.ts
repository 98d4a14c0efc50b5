// SPDX-License-Identifier: Apache-2.0
// STATUS: SPEC 1.1.0 section "STATUS". A failure stops every ADD on the node, that of the proxy and of the agent too,
// so neither of them is asked. Runtimes call it every few seconds: nothing is probed that cannot have changed.

import { dirname } from 'node:path';
import type { Request } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';
import type { Native } from '../native.ts';
import { parseConfig } from '../redirect/config.ts';
import { kernelReason, knownStateDirs, openState } from '../state.ts';

/** linux/capability.h */
const CAP_NET_ADMIN = 12n;
const CAP_SYS_ADMIN = 21n;
const CAP_BPF = 39n;

export function status(native: Native, request: Request): void {
  const { stateDir, runDir } = parseConfig(request.conf.raw);
  try {
    const capabilities = native.capabilities();
    const has = (capability: bigint) => ((capabilities >> capability) & 1n) === 1n;
    const missing = [
      ...(has(CAP_NET_ADMIN) ? [] : ['CAP_NET_ADMIN']),
      // setns(2) into a pod's namespace needs CAP_SYS_ADMIN; it includes what CAP_BPF allows.
      ...(has(CAP_SYS_ADMIN) ? [] : ['CAP_SYS_ADMIN']),
      ...(has(CAP_BPF) || has(CAP_SYS_ADMIN) ? [] : ['CAP_BPF']),
    ];
    if (missing.length > 0) {
      throw new CniError(Code.NOT_AVAILABLE, 'the plugin lacks capabilities', `missing: ${missing.join(', ')}`);
    }
    const state = openState(native, stateDir);
    if (state !== null) {
      native.closeState(state);
      return;
    }
    if (knownStateDirs(runDir).includes(stateDir)) {
      throw new CniError(
        Code.NOT_AVAILABLE_LIMITED,
        `the state in ${stateDir} is gone`,
        `it was there since boot and has been removed by hand: running pods are not redirected; remove ${runDir} too to begin anew`,
      );
    }
    const parent = dirname(stateDir);
    if (parent !== '/sys/fs/bpf' && !native.isBpffs(parent)) {
      throw new CniError(
        Code.NOT_AVAILABLE,
        `no state can be made in ${stateDir}`,
        `${parent} is not on a bpf file system`,
      );
    }
  } catch (error) {
    if (error instanceof CniError) {
      if (error.code === Code.NOT_AVAILABLE || error.code === Code.NOT_AVAILABLE_LIMITED) throw error;
      throw new CniError(Code.NOT_AVAILABLE, error.msg, error.details, { cause: error });
    }
    throw new CniError(Code.NOT_AVAILABLE, 'the kernel refuses', kernelReason(error), { cause: error });
  }
}
