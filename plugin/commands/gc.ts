// SPDX-License-Identifier: Apache-2.0
// GC: SPEC 1.1.0 section "GC". Removes what no attachment of this network needs any more, goes on after an error and
// reports all of them.

import { attachmentKey, hex } from '../attachments.ts';
import type { Request } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';
import { describePod, detachRecord, isDead } from '../datapath.ts';
import { tryEndDrains } from '../drain.ts';
import { createLog } from '../log.ts';
import type { Native } from '../native.ts';
import { removeDeadProxies } from '../proxies.ts';
import { parseConfig, type RedirectConfig } from '../redirect/config.ts';
import { beside, kernelReason, openState, stepError } from '../state.ts';

export function gc(native: Native, request: Request): void {
  const config = parseConfig(request.conf.raw);
  const { name, validAttachments } = request.conf;
  const log = createLog(config.logLevel);
  // A runtime that does not say which attachments are valid has not said that none is.
  const valid =
    validAttachments && new Set(validAttachments.map((a) => hex(attachmentKey(native, name, a.containerID, a.ifname))));
  if (valid === null) log.info('GC without a list of valid attachments: only what is proved dead is removed');

  const undrained = tryEndDrains(native, config);
  if (undrained !== null) log.warn(`a drained pod keeps its programs: ${undrained}`);
  const failures: string[] = [];
  beside(native, config.runDir, () => collect(native, config, request, valid, failures));
  if (failures.length > 0) {
    const msg = `${failures.length} stale attachments of network ${name} could not be removed`;
    throw new CniError(Code.STATE_FAILED, msg, failures.join('; '));
  }
}

function collect(
  native: Native,
  config: RedirectConfig,
  { conf: { name } }: Request,
  valid: ReadonlySet<string> | null,
  failures: string[],
): void {
  const state = openState(native, config.stateDir);
  if (state === null) return;
  try {
    removeDeadProxies(native, state, config.runDir);
    for (const { key, record } of native.listAttachments(state)) {
      if (record.network !== name) continue;
      try {
        if (valid === null ? !isDead(native, record) : valid.has(hex(key))) continue;
        detachRecord(native, config, state, key, record);
      } catch (error) {
        failures.push(`${describePod(record)} ${record.ifname}: ${kernelReason(error)}`);
      }
    }
  } catch (error) {
    throw stepError(Code.STATE_FAILED, `read the state in ${config.stateDir}`, error);
  } finally {
    native.closeState(state);
  }
}
