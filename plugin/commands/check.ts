// SPDX-License-Identifier: Apache-2.0
// CHECK: SPEC section "CHECK". Compares what ADD made with what is there and repairs nothing. A later plugin in the chain may
// have given the pod another MAC address, which SPEC allows: what our programs know of it follows.

import { attachmentKey, hex } from '../attachments.ts';
import { formatAddress } from '../cni/address.ts';
import type { Request } from '../cni/dispatch.ts';
import { CniError, Code } from '../cni/errors.ts';
import { describePod, type Finding, followMac, verify } from '../datapath.ts';
import { othersAt } from '../foreign.ts';
import { createLog } from '../log.ts';
import type { AttachmentRecord, ExclusionRule, Native, State } from '../native.ts';
import { parseConfig, type RedirectConfig } from '../redirect/config.ts';
import { exclusionRules } from '../redirect/exclusions.ts';
import { assertOtherNetns, openSandbox, requireLink } from '../sandbox.ts';
import { beside, knownStateDirs, openState, stepError } from '../state.ts';
import { type Decision, decide } from './target.ts';

export function check(native: Native, request: Request): void {
  const config = parseConfig(request.conf.raw);
  const netns = openSandbox(native, request.netns);
  try {
    if (!request.netnsOverride) assertOtherNetns(native, netns, request.netns);
    // Never depends on the agent: what it answered at ADD is what is recorded.
    const answer = config.enrollment === 'agent' ? isRecordedInMesh(native, request, config) : undefined;
    const decision = decide(native, request, netns, config, answer);
    requireLink(native, netns, request.netns, request.ifname);
    beside(native, config.runDir, () => checkBeside(native, config, netns, decision));
  } catch (error) {
    throw stepError(Code.STATE_FAILED, `check ${request.ifname} in ${request.netns}`, error);
  } finally {
    native.close(netns);
  }
}

function checkBeside(native: Native, config: RedirectConfig, netns: number, decision: Decision): void {
  const state = openState(native, config.stateDir);
  if (state === null) {
    if (decision.target.role !== 'none') throw withoutState(config);
    return;
  }
  try {
    checkState(native, config, state, netns, decision);
  } finally {
    native.closeState(state);
  }
}

function isRecordedInMesh(native: Native, { conf, containerId, ifname }: Request, config: RedirectConfig): boolean {
  const state = openState(native, config.stateDir);
  if (state === null) return false;
  try {
    return native.getAttachment(state, attachmentKey(native, conf.name, containerId, ifname))?.role === 'pod';
  } finally {
    native.closeState(state);
  }
}

function checkState(native: Native, config: RedirectConfig, state: State, netns: number, decision: Decision): void {
  const { target, reason } = decision;
  const recorded = native.getAttachment(state, target.key);
  const record = recorded && followMac(native, state, target.key, recorded);
  if (record !== recorded) {
    createLog(config.logLevel).warn(
      `${target.containerId} ${target.ifname}: the MAC address is ${record?.podMac} now and was ${recorded?.podMac} at ADD; taken over`,
    );
  }
  if (record === null || record.state === 'recorded') {
    if (target.role === 'none') return;
    const details = `${reason}, but ${record === null ? 'no attachment is recorded' : 'it is recorded as not enrolled'}`;
    throw new CniError(Code.ENTRY_MISMATCH, `${target.ifname} of ${target.containerId} is not attached`, details);
  }
  const findings: Finding[] = [];
  if (record.state === 'attaching') {
    const object = `record of ${describePod(record)}`;
    const found = 'attaching: an ADD was killed';
    findings.push({ code: Code.ENTRY_MISMATCH, kind: 'map', object, expected: 'attached', found });
  }
  const identity = native.netnsIdentity(netns);
  if (identity.dev !== record.netns.dev || identity.ino !== record.netns.ino) {
    findings.push({
      code: Code.SANDBOX_NOT_FOUND,
      kind: 'interface',
      object: `network namespace ${target.netnsPath}`,
      expected: `net:[${record.netns.ino}]`,
      found: `net:[${identity.ino}]`,
    });
  }
  findings.push(...missingAddresses(record, decision));
  if (record.role === 'pod') findings.push(...missingExclusions(native, state, record, decision.config));
  findings.push(...verify(native, state, config, target.key, record));
  const [first] = findings;
  if (first === undefined) {
    warnOfOthers(native, config, record);
    return;
  }
  const details = findings.map(({ object, expected, found }) => `${object}: expected ${expected}, found ${found}`);
  throw new CniError(first.code, `${first.object} is not as ADD left it`, details.join('; '));
}

/** Nobody can tell what a program returns, and most let packets on: that one runs before ours is no failure, but it is said. */
function warnOfOthers(native: Native, config: RedirectConfig, record: AttachmentRecord): void {
  if (record.role === 'none' || record.hooks.length === 0) return;
  const log = createLog(config.logLevel);
  for (const { direction, where, what, ahead } of othersAt(native, record)) {
    if (!ahead) continue;
    log.warn(
      `${direction} of ${where}: ${what} runs before ours; what it ends the chain for (TC_ACT_OK) is not redirected`,
    );
  }
}

/** SPEC: CHECK must consult prevResult. Later plugins may have added addresses, so only those known at ADD count. */
function missingAddresses(record: AttachmentRecord, { target }: Decision): Finding[] {
  if (record.role !== 'pod') return [];
  const recorded = new Set(record.addresses.map(formatAddress));
  return target.resultAddresses.map(formatAddress).flatMap((address) =>
    recorded.has(address) || address.startsWith('fe80:')
      ? []
      : [
          {
            code: Code.ENTRY_MISMATCH,
            kind: 'map' as const,
            object: `address ${address} of prevResult`,
            expected: 'recorded for this attachment',
            found: `${[...recorded].join(', ') || 'none'}`,
          },
        ],
  );
}

/** `enroll` may have added some since ADD, so only those that the configuration and the annotations name count. */
function missingExclusions(
  native: Native,
  state: State,
  record: AttachmentRecord,
  { exclude }: RedirectConfig,
): Finding[] {
  const id = ({ kind, value, length, excluded }: ExclusionRule) => `${kind} ${hex(value)}/${length} ${excluded}`;
  const wanted = exclusionRules(exclude).map(id);
  const present = new Set(native.getExclusions(state, record.interfaceId).map(id));
  const missing = wanted.filter((rule) => !present.has(rule));
  if (missing.length === 0) return [];
  const object = `exclusions of ${record.hostIfname}`;
  const found = `without ${missing.length} of them`;
  return [{ code: Code.ENTRY_MISMATCH, kind: 'map', object, expected: `${wanted.length} rules`, found }];
}

function withoutState(config: RedirectConfig): CniError {
  const removed = knownStateDirs(config.runDir).includes(config.stateDir);
  return new CniError(
    Code.ENTRY_MISMATCH,
    `there is no state in ${config.stateDir}`,
    removed ? 'it was there since boot and has been removed by hand: pods are not redirected' : 'no ADD has made it',
  );
}
