// SPDX-License-Identifier: Apache-2.0
// ADD: SPEC section "ADD: Add container to network, or apply modifications". The Result is prevResult, unchanged.
//
// In the in-pod contract the pod's programs are attached first, closed, and then the node agent has ztunnel open its
// listeners in the pod. Where agent or ztunnel is not there the failure policy decides: the ADD fails and leaves
// nothing, or the pod starts outside the mesh, and the agent enrols it later.

import type { Request } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';
import type { Result } from '../cni/result.ts';
import { attach, detach, type Target } from '../datapath.ts';
import { tryEndDrains } from '../drain.ts';
import { createLog, type Log } from '../log.ts';
import type { AttachmentRecord, Native } from '../native.ts';
import { parseConfig, type RedirectConfig } from '../redirect/config.ts';
import { podIdentity } from '../redirect/enrolment.ts';
import { assertOtherNetns, openSandbox, requireLink } from '../sandbox.ts';
import { stepError } from '../state.ts';
import { type Decision, decide, enrolmentOf } from './target.ts';

export async function add(native: Native, request: Request): Promise<Result> {
  const { conf } = request;
  const config = parseConfig(conf.raw);
  const log = createLog(config.logLevel);
  if (conf.prevResult === undefined) {
    throw new CniError(Code.INVALID_NETWORK_CONFIG, 'must be called as a chained plugin', 'prevResult is missing');
  }
  const answer = enrolmentOf(request, config).role === 'undecided' ? await agentAnswer(request, config) : undefined;
  const { decision, record } = attachPod(native, request, config, answer, log);
  const { target } = decision;
  if (answer?.later !== undefined && target.role === 'none') {
    await enrolLater(request, config, target, answer.later, log);
  }
  if (target.role === 'pod' && record?.contract === 'in-pod') {
    await announce(native, request, decision, record, log);
  }
  return conf.prevResult;
}

/** What the agent said; `later`: it is not there, and the pod starts all the same. */
interface Answer {
  enrol: boolean;
  serviceAccount: string;
  later?: string;
}

/** Throws CniError 11 where the pod must not start without the agent, 108. */
async function agentAnswer(request: Request, config: RedirectConfig): Promise<Answer> {
  const pod = podIdentity(request.args);
  const { askAgent } = await import('../agent-client.ts');
  try {
    return await askAgent(config, pod ?? { namespace: '', name: '', uid: '' });
  } catch (error) {
    if (!(error instanceof CniError) || config.failurePolicy === 'closed') throw error;
    return { enrol: false, serviceAccount: '', later: error.message };
  }
}

/** Everything that is synchronous: nothing of another event comes between these steps. */
function attachPod(
  native: Native,
  request: Request,
  config: RedirectConfig,
  answer: Answer | undefined,
  log: Log,
): { decision: Decision; record: AttachmentRecord | null } {
  const { netns: path, containerId, ifname } = request;
  const undrained = tryEndDrains(native, config);
  if (undrained !== null) log.warn(`a drained pod keeps its programs: ${undrained}`);
  const netns = openSandbox(native, path);
  try {
    if (!request.netnsOverride) assertOtherNetns(native, netns, path);
    const decision = decide(native, request, netns, config, answer?.enrol);
    const { target, reason } = decision;
    if (answer !== undefined) target.pod.serviceAccount = answer.serviceAccount;
    const pod = requireLink(native, netns, path, ifname);
    log.debug(`${containerId} ${ifname}: ${target.role}, ${answer?.later ?? reason}`);
    try {
      return { decision, record: attach(native, decision.config, target, { netns, pod }) };
    } catch (error) {
      // The record of a pod that is not in the mesh is a convenience for the agent. A node whose state is broken
      // must still start such pods, the one that repairs it among them.
      if (target.role !== 'none' || !(error instanceof CniError)) throw error;
      log.warn(`${containerId} ${ifname}: not enrolled, and not recorded either: ${error.message}`);
      return { decision, record: null };
    }
  } catch (error) {
    throw stepError(Code.SANDBOX_NOT_FOUND, `read interface ${ifname} in ${path}`, error);
  } finally {
    native.close(netns);
  }
}

/** Throws CniError 11, 107 or 108 after undoing the attach, unless the policy lets the pod start without ztunnel. */
async function announce(
  native: Native,
  request: Request,
  { config, target }: Decision,
  record: AttachmentRecord,
  log: Log,
): Promise<void> {
  const { announceAttachment } = await import('../agent-client.ts');
  try {
    await announceAttachment(config, record);
    return;
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    try {
      detach(native, config, target.key);
    } catch (leftover) {
      const details = `${error.details}; not undone: ${leftover instanceof Error ? leftover.message : String(leftover)}`;
      throw new CniError(error.code, error.msg, details, { cause: error });
    }
    if (config.failurePolicy === 'closed') throw error;
    attach(native, config, { ...target, role: 'none' });
    await enrolLater(request, config, target, error.message, log);
  }
}

async function enrolLater(
  request: Request,
  config: RedirectConfig,
  target: Target,
  reason: string,
  log: Log,
): Promise<void> {
  const { writePending } = await import('../pending.ts');
  try {
    writePending(config.runDir, { key: target.key, request, reason });
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error);
    log.error(`${target.containerId} ${target.ifname}: the agent will not know that it is to be enrolled: ${text}`);
  }
  log.warn(`${target.containerId} ${target.ifname}: starts outside the mesh, as failurePolicy is "open": ${reason}`);
}
