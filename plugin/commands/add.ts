// SPDX-License-Identifier: Apache-2.0
// ADD: SPEC section "ADD: Add container to network, or apply modifications". The Result is prevResult, unchanged.

import type { Request } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';
import type { Result } from '../cni/result.ts';
import { attach } from '../datapath.ts';
import { tryEndDrains } from '../drain.ts';
import { createLog } from '../log.ts';
import type { Native } from '../native.ts';
import { parseConfig } from '../redirect/config.ts';
import { assertOtherNetns, openSandbox } from '../sandbox.ts';
import { stepError } from '../state.ts';
import { decide } from './target.ts';

export function add(native: Native, request: Request): Result {
  const { conf, netns: path } = request;
  const config = parseConfig(conf.raw);
  const log = createLog(config.logLevel);
  if (conf.prevResult === undefined) {
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'must be called as a chained plugin', 'prevResult is missing');
  }
  const undrained = tryEndDrains(native, config);
  if (undrained !== null) log.warn(`a drained pod keeps its programs: ${undrained}`);
  const netns = openSandbox(native, path);
  try {
    if (!request.netnsOverride) assertOtherNetns(native, netns, path);
    const decision = decide(native, request, netns, config);
    const { target, reason } = decision;
    if (native.linkByName(netns, request.ifname) === null) {
      throw new CniError(Code.SANDBOX_NOT_FOUND, `interface ${request.ifname} not found`, `there is none in ${path}`);
    }
    log.debug(`${request.containerId} ${request.ifname}: ${target.role}, ${reason}`);
    try {
      attach(native, decision.config, target);
    } catch (error) {
      // The record of a pod that is not in the mesh is a convenience for the agent. A node whose state is broken
      // must still start such pods, the one that repairs it among them.
      if (target.role !== 'none' || !(error instanceof CniError)) throw error;
      log.warn(`${request.containerId} ${request.ifname}: not enrolled, and not recorded either: ${error.message}`);
    }
  } catch (error) {
    throw stepError(Code.SANDBOX_NOT_FOUND, `read interface ${request.ifname} in ${path}`, error);
  } finally {
    native.close(netns);
  }
  return conf.prevResult;
}
