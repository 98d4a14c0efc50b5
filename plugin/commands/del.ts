// SPDX-License-Identifier: Apache-2.0
// DEL: SPEC section "DEL". The runtime repeats a failing DEL until it succeeds and keeps the pod until then, so what is
// missing is no error: no namespace, no prevResult, no state, an entry that somebody broke since ADD.

import { attachmentKey } from '../attachments.ts';
import type { Request } from '../cni/dispatch.ts';
import { detach } from '../datapath.ts';
import { tryEndDrains } from '../drain.ts';
import { createLog } from '../log.ts';
import type { Native } from '../native.ts';
import { locateState } from '../redirect/config.ts';

export function del(native: Native, request: Request): void {
  const { conf, containerId, ifname } = request;
  const location = locateState(conf.raw);
  const log = createLog(location.logLevel);
  for (const error of location.ignored) log.warn(`DEL goes on with a default: ${error.message}`);
  const found = detach(native, location, attachmentKey(native, conf.name, containerId, ifname));
  const undrained = tryEndDrains(native, location);
  if (undrained !== null) log.warn(`a drained pod keeps its programs: ${undrained}`);
  log.debug(`${containerId} ${ifname}: ${found ? 'detached' : 'nothing was attached'}`);
}
