// SPDX-License-Identifier: Apache-2.0
// DEL: SPEC section "DEL". The runtime repeats a failing DEL until it succeeds and keeps the pod until then, so what is
// missing is no error: no namespace, no prevResult, no state, an entry that somebody broke since ADD.

import type { AttachmentName } from '../agent-client.ts';
import { attachmentKey } from '../attachments.ts';
import type { Request } from '../cni/dispatch.ts';
import { CniError } from '../cni/errors.ts';
import type { NetConf } from '../cni/netconf.ts';
import { detach } from '../datapath.ts';
import { tryEndDrains } from '../drain.ts';
import { createLog, type Log } from '../log.ts';
import type { Native } from '../native.ts';
import { removePending } from '../pending.ts';
import { locateState } from '../redirect/config.ts';
import type { Directories } from '../state.ts';

export async function del(native: Native, request: Request): Promise<void> {
  const { conf, containerId, ifname } = request;
  const location = locateState(conf.raw);
  const log = createLog(location.logLevel);
  for (const error of location.ignored) log.warn(`DEL goes on with a default: ${error.message}`);
  const key = attachmentKey(native, conf.name, containerId, ifname);
  const found = detach(native, location, key);
  const undrained = tryEndDrains(native, location);
  if (undrained !== null) log.warn(`a drained pod keeps its programs: ${undrained}`);
  log.debug(`${containerId} ${ifname}: ${found ? 'detached' : 'nothing was attached'}`);
  removePending(location.runDir, key);
  if (isInPod(conf.raw)) await tellAgent(location, { network: conf.name, containerId, ifname }, log);
}

/** Said after the fact: an agent that does not hear it finds out by itself, as the record is gone. */
async function tellAgent(dirs: Directories, name: AttachmentName, log: Log): Promise<void> {
  try {
    const { withdrawAttachment } = await import('../agent-client.ts');
    await withdrawAttachment(dirs, name);
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    log.info(`${name.containerId} ${name.ifname}: ztunnel hears later that it is gone: ${error.message}`);
  }
}

/** Whatever else the entry says: DEL tolerates a broken one. */
function isInPod(raw: NetConf['raw']): boolean {
  const { proxy } = raw;
  return typeof proxy === 'object' && proxy !== null && Reflect.get(proxy, 'contract') === 'in-pod';
}
