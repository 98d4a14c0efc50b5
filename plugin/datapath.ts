// SPDX-License-Identifier: Apache-2.0
// Attach, detach and verify one attachment. State is written ahead: the record says "attaching" before the first
// program is attached and "attached" after all were verified, so that whatever kill -9 leaves can be finished by DEL,
// GC or the next ADD. A failure undoes every step in reverse.

import { readFileSync } from 'node:fs';
import { hex, linkDirectory, linkPin, programPin, sameKey } from './attachments.ts';
import { formatAddress } from './cni/address.ts';
import { CniError, Code, type ErrorCode, quote } from './cni/errors.ts';
import { assertSteering, interfaceIdOfKey, isStubbed } from './in-pod.ts';
import type {
  Address,
  AttachmentKey,
  AttachmentRecord,
  EndpointRecord,
  HookRecord,
  Link,
  LocalRoute,
  Mac,
  Native,
  ProxyRecord,
  Rule,
  State,
  Tuple,
} from './native.ts';
import { HOST } from './native.ts';
import { addProxy, removeDeadProxies, removeProxy } from './proxies.ts';
import type { RedirectConfig } from './redirect/config.ts';
import {
  type AttachPlan,
  FILTER_HANDLE,
  FILTER_PRIORITY,
  type HostFacts,
  type PlannedHook,
  planInPod,
  planPod,
  planProxy,
  ROUTE_PROTOCOL,
  ROUTE_TABLE,
  RULE_PRIORITY,
} from './redirect/plan.ts';
import { openSandbox, readFacts, requireLink, requirePeer, type Sandbox } from './sandbox.ts';
import {
  type Directories,
  ensurePrograms,
  ensureState,
  enterBeside,
  enterToAttach,
  hasCode,
  kernelReason,
  knownStateDirs,
  openState,
  stepError,
  supersededBy,
} from './state.ts';
import { runHere, type Steps, wait } from './steps.ts';
import { addTproxy, deleteTproxy, needsTproxy } from './tproxy.ts';

/** What is to be attached, as the runtime or a person named it. */
export interface Target {
  key: AttachmentKey;
  network: string;
  containerId: string;
  ifname: string;
  netnsPath: string;
  /** what prevResult says; the kernel's are added */
  resultAddresses: readonly Address[];
  pod: { name: string; namespace: string; uid: string; serviceAccount: string };
  role: 'pod' | 'proxy' | 'none';
  /** true in ADD: no flow can be older. false when a running pod is enrolled. */
  strict: boolean;
  /** the runtime announced a rate limit (capability "bandwidth") */
  shaped: boolean;
  /** one for what the pod sends: the bandwidth plugin has made an ingress qdisc for it, or will */
  egressLimited: boolean;
  /** annotation: inbound traffic is not redirected */
  bypassInbound: boolean;
  /** the flags and exclusions of the record and the maps stay, whatever the configuration says */
  asRecorded?: boolean;
  /** by a process that may have outlived an upgrade: refused (11) where another build's programs are in place */
  resident?: boolean;
  /** as its record says: refused (100) where there is none any more, as its DEL has removed it */
  recorded?: boolean;
}

/** What kind of kernel object differs. */
export type FindingKind = 'interface' | 'program' | 'link' | 'map' | 'rule' | 'route' | 'sysctl';

/** Of a pod that runs already and is recorded; what only a runtime's call says is not in it. */
export function targetOf(key: AttachmentKey, record: AttachmentRecord, role: 'pod' | 'none'): Target {
  return {
    key,
    network: record.network,
    containerId: record.containerId,
    ifname: record.ifname,
    netnsPath: record.netnsPath,
    resultAddresses: record.addresses,
    pod: {
      name: record.podName,
      namespace: record.podNamespace,
      uid: record.podUid,
      serviceAccount: record.serviceAccount,
    },
    role,
    strict: false,
    shaped: false,
    egressLimited: false,
    bypassInbound: false,
    recorded: true,
  };
}

/** What of an attachment is not as it should be. */
export interface Finding {
  code: ErrorCode;
  kind: FindingKind;
  object: string;
  expected: string;
  found: string;
}

interface Attachment {
  native: Native;
  config: RedirectConfig;
  state: State;
  target: Target;
  netns: number;
  facts: HostFacts;
  /** key of the maps that programs look into */
  id: number;
  plan: AttachPlan;
  record: AttachmentRecord;
  /** the same kernel objects are recorded: they are changed where they are */
  previous: AttachmentRecord | null;
  /** recorded if it fails; null: nothing is */
  fallback: AttachmentRecord | null;
  undo: (() => void)[];
}

/**
 * Throws CniError; nothing is left then. Doing it again for the same key replaces what is there. `sandbox`: what the
 * caller has open and has just read is not opened and read again.
 */
export function attach(native: Native, config: RedirectConfig, target: Target, sandbox?: Sandbox): AttachmentRecord {
  return runHere(attachSteps(native, config, target, sandbox));
}

/** What attach() does. Others may change the state between two of the steps, as an ADD beside this process may. */
export function* attachSteps(
  native: Native,
  config: RedirectConfig,
  target: Target,
  sandbox?: Sandbox,
): Steps<AttachmentRecord> {
  const leave = enterToAttach(native, config.runDir);
  try {
    return yield* attachBeside(native, config, target, sandbox);
  } finally {
    leave();
  }
}

function* attachBeside(
  native: Native,
  config: RedirectConfig,
  target: Target,
  sandbox: Sandbox | undefined,
): Steps<AttachmentRecord> {
  const netns = sandbox?.netns ?? openSandbox(native, target.netnsPath);
  let state: State | undefined;
  try {
    // In the in-pod contract the proxy's own pod is one like those that are not enrolled.
    if (target.role === 'none' || (target.role === 'proxy' && config.proxy.contract === 'in-pod')) {
      state = ensureState(native, config);
      return yield* recordOnly(native, config, state, target, netns, sandbox?.pod);
    }
    const { netnsPath, ifname } = target;
    const pod = sandbox?.pod ?? requireLink(native, netns, netnsPath, ifname);
    const facts = readFacts(native, { netns, pod }, netnsPath, ifname, target.shaped);
    const plan = planFor(native, config, target, facts);
    state = ensureState(native, config, target.asRecorded === true);
    const superseded = target.resident === true ? supersededBy(native, state, config.stateDir) : null;
    if (superseded !== null) throw new CniError(Code.TRY_AGAIN_LATER, 'another build has taken over', superseded);
    const programTag = ensurePrograms(native, state, config);
    if (target.recorded === true && native.getAttachment(state, target.key) === null) throw deleted(target);
    if (plan.hooks.some(isStubbed)) assertSteering(native, state);
    removeDeadProxies(native, state, config.runDir);
    const id = facts.host?.ifindex ?? interfaceIdOfKey(native, state, target.key);
    const previous = sameAttachment(native, config, state, target, facts);
    let fallback = previous;
    if (previous === null) fallback = yield* removeOld(native, config, state, target, id);
    else keepNature(native, target, plan, previous);
    // What the record says is put back by DEL, so it is written before the change.
    const ownFlags = settingFlags(native, config, target, netns, facts, plan, previous);
    const tproxy = target.role === 'proxy' && needsTproxy(native, state);
    const tproxyFlag = tproxy ? (native.flags.INTERFACE_TPROXY ?? 0) : 0;
    const attachment: Attachment = {
      native,
      config,
      state,
      target,
      netns,
      facts,
      id,
      plan,
      record: {
        ...newRecord(native, config, target, facts, id, plan, programTag, ownFlags | tproxyFlag),
        ...(previous !== null && { hooks: previous.hooks, enrolledAt: previous.enrolledAt }),
      },
      previous,
      fallback,
      undo: [],
    };
    return yield* attachAll(attachment);
  } catch (error) {
    throw stepError(Code.ATTACH_FAILED, `attach to ${target.ifname} in ${target.netnsPath}`, error);
  } finally {
    if (state !== undefined) native.closeState(state);
    if (sandbox === undefined) native.close(netns);
  }
}

function planFor(native: Native, config: RedirectConfig, target: Target, facts: HostFacts): AttachPlan {
  const { resultAddresses, strict, bypassInbound } = target;
  if (config.proxy.contract === 'in-pod') {
    return planInPod(config, facts, resultAddresses, strict, bypassInbound, native.flags);
  }
  const peered = requirePeer(native, facts, target.netnsPath);
  if (target.role === 'proxy') return planProxy(peered);
  return planPod(config, peered, resultAddresses, strict, bypassInbound, native.flags);
}

/** INTERFACE_* bits of the IPv4 settings that are off now, or were before an earlier attach, and are needed on. */
function settingFlags(
  native: Native,
  config: RedirectConfig,
  target: Target,
  netns: number,
  { pod }: HostFacts,
  plan: AttachPlan,
  previous: AttachmentRecord | null,
): number {
  const dns = (plan.flags & (native.flags.INTERFACE_DNS ?? 0)) !== 0;
  let flags = 0;
  for (const { bit, read, needed } of interfaceSettings(native)) {
    if (needed(target.role, config.proxy.contract, dns)) {
      const before = (previous?.flags ?? 0) & bit;
      flags |= before !== 0 || !read(netns, pod.ifindex) ? bit : 0;
    }
  }
  return flags;
}

function* attachAll(attachment: Attachment): Steps<AttachmentRecord> {
  const { native, state, target, record, plan, undo } = attachment;
  try {
    const { previous, fallback } = attachment;
    if (fallback === null && target.recorded !== true) beginRecord(attachment);
    else writeRecord(attachment, 'attaching');
    if (fallback === null) undo.push(() => native.deleteAttachment(state, target.key));
    else undo.push(() => native.replaceAttachment(state, target.key, fallback));
    if (isLooping(record)) addRouting(attachment);
    if ((record.flags & (native.flags.INTERFACE_TPROXY ?? 0)) !== 0) {
      undo.push(() => deleteTproxy(attachment.netns));
      addTproxy(attachment.netns, attachment.config);
    }
    if (plan.interface !== null) withRoom(attachment, () => fillMaps(attachment));
    for (const hook of plan.hooks) yield* attachHook(attachment, hook);
    if (previous === null) withRoom(attachment, () => begin(attachment));
    // In the contract in-pod the proxy's own sockets are among the pod's.
    const older = target.role === 'pod' && !target.strict && previous === null;
    if (older && attachment.config.proxy.contract === 'shared') {
      yield* settle();
      rememberOlder(attachment);
    }
    if (target.role === 'proxy') announceProxy(attachment);
    const [finding] = verifyAttached(native, state, attachment.config, target.key, record);
    if (finding !== undefined) {
      throw new CniError(
        Code.ATTACH_FAILED,
        `${finding.object} is not as it was made`,
        `expected ${finding.expected}, found ${finding.found}`,
      );
    }
    writeRecord(attachment, 'attached');
    return record;
  } catch (error) {
    const leftovers = runUndo(undo);
    const failure = stepError(Code.ATTACH_FAILED, `attach to ${target.ifname} in ${target.netnsPath}`, error);
    if (leftovers === '') throw failure;
    // The record stays when its removal failed, so DEL, which the runtime sends next, tries again.
    throw new CniError(failure.code, failure.msg, `${failure.details}; not undone: ${leftovers}`, { cause: error });
  }
}

function runUndo(undo: readonly (() => void)[]): string {
  const failures: string[] = [];
  for (const step of undo.toReversed()) {
    try {
      step();
    } catch (error) {
      failures.push(kernelReason(error));
    }
  }
  return failures.join(', ');
}

/** A pod that is not enrolled is known all the same: the agent may enrol it later. */
function* recordOnly(
  native: Native,
  config: RedirectConfig,
  state: State,
  target: Target,
  netns: number,
  pod: Link | undefined,
): Steps<AttachmentRecord> {
  const old = native.getAttachment(state, target.key);
  if (old !== null && old.state !== 'recorded') {
    yield* detachRecordSteps(native, config, state, target.key, old, () => notEnrolled(old));
  }
  const link = pod ?? native.linkByName(netns, target.ifname);
  const hostIfindex = link?.kind === 'veth' ? link.peerIfindex : 0;
  removeDeadProxies(native, state, config.runDir);
  forgetPredecessors(native, config, state, target, hostIfindex);
  const record: AttachmentRecord = {
    ...emptyRecord(native, config, target),
    state: 'recorded',
    role: 'none',
    podIfindex: link?.ifindex ?? 0,
    podMac: link?.mac ?? NO_MAC,
    hostIfindex,
    interfaceId: hostIfindex,
    netns: native.netnsIdentity(netns),
    addresses: [...target.resultAddresses].slice(0, MAX_ADDRESSES),
  };
  putRecord(native, config, state, target.key, record);
  return record;
}

/**
 * What dead pods left that the programs would take for this one's: entries by its host-side index, and by its addresses.
 * A pod that is not in the mesh gets no entries of its own, so nothing else would replace them.
 */
function forgetPredecessors(
  native: Native,
  config: RedirectConfig,
  state: State,
  target: Target,
  hostIfindex: number,
): void {
  if (hostIfindex !== 0) detachHolders(native, config, state, hostIfindex);
  for (const address of target.resultAddresses) {
    if (native.getEndpoint(state, address) === null) continue;
    if (livingHolder(native, state, address, 0) === null) native.deleteEndpoint(state, address);
  }
}

/** Attachments and entries by an interface id that another pod has now. */
function detachHolders(native: Native, config: RedirectConfig, state: State, id: number): void {
  if (native.getInterface(state, id) === null) return;
  for (const { key, record } of native.listAttachments(state)) {
    if (record.interfaceId === id && record.state !== 'recorded') {
      detachRecord(native, config, state, key, record);
    }
  }
  native.deleteInterface(state, id);
}

/**
 * The record of this very attachment, made by an earlier ADD or `enroll`: a change of settings must not cut connections
 * or leave a moment without programs. null: there is none, or it is about other objects, and everything is made anew.
 */
function sameAttachment(
  native: Native,
  config: RedirectConfig,
  state: State,
  target: Target,
  facts: HostFacts,
): AttachmentRecord | null {
  const old = native.getAttachment(state, target.key);
  const same =
    old !== null &&
    old.role === target.role &&
    old.state !== 'recorded' &&
    old.contract === config.proxy.contract &&
    old.hostIfindex === (facts.host?.ifindex ?? 0) &&
    old.hostMac === (facts.host?.mac ?? NO_MAC) &&
    old.podIfindex === facts.pod.ifindex &&
    isSameNetns(old.netns, facts.netns) &&
    old.hooks.every(({ kind }) => config.hook === 'auto' || kind === config.hook);
  return same ? old : null;
}

/** Whether flows can be older than the enrolment is not changed by enrolling again; a repair changes nothing at all. */
function keepNature(native: Native, target: Target, plan: AttachPlan, previous: AttachmentRecord): void {
  if (target.role === 'proxy') return;
  const strict = native.flags.INTERFACE_STRICT ?? 0;
  const kept = target.asRecorded === true ? ~0 : strict;
  plan.flags = (plan.flags & ~kept) | (previous.flags & kept);
  if (plan.interface !== null) plan.interface.flags = plan.flags & ~recordedOnly(native);
}

/**
 * What an earlier ADD of this key, or of a pod whose host-side index this one has now, left. Returns what is to be
 * recorded if the pod cannot be attached to: an ADD that fails leaves nothing, a pod that runs already is as it was.
 */
function* removeOld(
  native: Native,
  config: RedirectConfig,
  state: State,
  target: Target,
  id: number,
): Steps<AttachmentRecord | null> {
  const old = native.getAttachment(state, target.key);
  if (old !== null) yield* detachRecordSteps(native, config, state, target.key, old, () => notEnrolled(old));
  else removePins(native, config.stateDir, target.key);
  detachHolders(native, config, state, id);
  return old !== null && !target.strict ? notEnrolled(old) : null;
}

// ---- steps of attach ---------------------------------------------------------------------------------------------

/** Of an attachment that is not recorded yet. */
function beginRecord({ native, config, state, target, record }: Attachment): void {
  record.state = 'attaching';
  putRecord(native, config, state, target.key, record);
}

/** Its DEL may run beside the agent that attaches: a record that DEL has removed does not come back. Throws CniError 100. */
function writeRecord({ native, state, target, record }: Attachment, to: AttachmentRecord['state']): void {
  record.state = to;
  if (!native.replaceAttachment(state, target.key, record)) throw deleted(target);
}

function deleted({ pod, containerId, ifname, netnsPath }: Target): CniError {
  const name = describePod({ podName: pod.name, podNamespace: pod.namespace, containerId });
  return new CniError(Code.SANDBOX_NOT_FOUND, `${name} is gone`, `DEL of ${ifname} in ${netnsPath} was run meanwhile`);
}

function putRecord(
  native: Native,
  config: RedirectConfig,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
): void {
  const put = () => native.putAttachment(state, key, record);
  try {
    put();
  } catch (error) {
    if (!hasCode(error, 'E2BIG', 'ENOSPC')) {
      throw stepError(Code.STATE_FAILED, `write the record of ${describePod(record)}`, error);
    }
    // TCX links detach with their device, but their pins and records stay until somebody sweeps.
    sweepDead(native, config, state);
    try {
      put();
    } catch (again) {
      const full = `attachments in ${config.stateDir} is full; "maxPods" sizes it`;
      throw new CniError(Code.STATE_FAILED, full, kernelReason(again), { cause: again });
    }
  }
}

/** Does `put` again without the entries of pods that are gone, where a map is full. Throws what it throws, or CniError 103. */
function withRoom({ native, config, state, plan }: Attachment, put: () => void): void {
  const isFull = (error: unknown) =>
    error instanceof CniError && hasCode(error.cause, 'E2BIG', 'ENOSPC') && plan.exclusions.length <= MAX_EXCLUSIONS;
  try {
    put();
  } catch (error) {
    if (!isFull(error)) throw error;
    sweepDead(native, config, state);
    try {
      put();
    } catch (again) {
      if (!isFull(again)) throw again;
      const full = `a map in ${config.stateDir} is full; "maxPods" sizes it`;
      throw new CniError(Code.STATE_FAILED, full, (again as CniError).message, { cause: again });
    }
  }
}

function fillMaps(attachment: Attachment): void {
  const { native, state, target, facts, id, plan, undo } = attachment;
  try {
    if (attachment.previous === null) {
      // The programs make the sets of flows; none is there before them, unless a state was damaged by hand.
      native.deleteDirectFlows(state, id);
      undo.push(() => native.deleteDirectFlows(state, id));
    } else {
      undo.push(keepEntries(attachment, attachment.previous));
    }
    if (target.asRecorded === true && attachment.previous !== null) {
      // Those that are in the map stay.
    } else if (plan.exclusions.length > 0) {
      undo.push(() => native.deleteExclusions(state, id));
      native.putExclusions(state, id, plan.exclusions);
    } else {
      native.deleteExclusions(state, id);
    }
    for (const address of plan.addresses) {
      putEndpoint(attachment, address, { ifindex: id, flags: plan.flags, podMac: facts.pod.mac });
    }
    if (attachment.previous === null) {
      undo.push(() => native.deleteCounters(state, id));
      return;
    }
    if (plan.interface !== null) native.putInterface(state, id, plan.interface);
    dropAddresses(attachment, attachment.previous);
  } catch (error) {
    throw mapError(attachment, error);
  }
}

/**
 * Programs that find no entry of their interface let everything by. It is written when all of them are attached: one
 * alone would send to the proxy what the other one's hook then takes for the pod's.
 */
function begin(attachment: Attachment): void {
  const { native, state, id, plan, undo } = attachment;
  if (plan.interface === null) return;
  try {
    undo.push(() => native.deleteInterface(state, id));
    native.putInterface(state, id, plan.interface);
  } catch (error) {
    throw mapError(attachment, error);
  }
}

function mapError({ config, facts, id }: Attachment, error: unknown): CniError {
  const name = facts.host?.name ?? facts.pod.name;
  return stepError(Code.STATE_FAILED, `record ${name} (interface ${id}) in ${config.stateDir}`, error);
}

/**
 * A SYN that no program had seen is on no socket while it waits for the pod's own softirq, which is late on a busy node.
 */
const SETTLE_MS = 30;

function settle(): Steps<unknown> {
  return wait<unknown>(
    () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, SETTLE_MS),
    () => new Promise((resolve) => setTimeout(resolve, SETTLE_MS)),
  );
}

/**
 * A running pod's open connections go on direct. They are read after the programs are attached, so that none is opened
 * unseen between the two, and what has been redirected since is left out. When all of them are remembered, nothing that
 * comes without an entry can be older than the enrolment.
 */
function rememberOlder(attachment: Attachment): void {
  const { native, config, state, netns, facts, plan, record, id } = attachment;
  const own = new Set(plan.addresses.map(hex));
  const text = ({ source, sourcePort, destination, destinationPort }: Tuple) =>
    `${hex(source)} ${sourcePort} ${hex(destination)} ${destinationPort}`;
  let program: number | undefined;
  try {
    program = native.openProgram(programPin(config.stateDir, record.programTag, 'direct_import'));
    const older: Tuple[] = [];
    for (const { local, localPort, remote, remotePort } of native.connections(netns)) {
      if (!own.has(hex(local)) || own.has(hex(remote))) continue;
      const flow = { source: local, sourcePort: localPort, destination: remote, destinationPort: remotePort };
      if (native.importDirectFlow(program, id, flow)) older.push(flow);
    }
    // More of them than the table holds: then one without an entry may be older after all.
    const kept = new Set(native.directFlows(state, id).map(text));
    if (!older.every((flow) => kept.has(text(flow)))) return;
  } catch (error) {
    throw stepError(Code.STATE_FAILED, `remember the open connections of ${record.netnsPath}`, error);
  } finally {
    if (program !== undefined) native.close(program);
  }
  plan.flags |= native.flags.INTERFACE_STRICT ?? 0;
  record.flags |= plan.flags;
  if (plan.interface !== null) native.putInterface(state, id, { ...plan.interface, flags: plan.flags });
  for (const address of plan.addresses) {
    native.putEndpoint(state, address, { ifindex: id, flags: plan.flags, podMac: facts.pod.mac }, false);
  }
}

/** Puts back what the maps have about an attachment now; done last, after what else is undone about it. */
function keepEntries({ native, state, id }: Attachment, previous: AttachmentRecord): () => void {
  const before = native.getInterface(state, id);
  const exclusions = native.getExclusions(state, id);
  const endpoints = previous.addresses.flatMap((address) => {
    const endpoint = native.getEndpoint(state, address);
    return endpoint?.ifindex === id ? [{ address, endpoint }] : [];
  });
  return () => {
    if (before !== null) native.putInterface(state, id, before);
    for (const { address, endpoint } of endpoints) native.putEndpoint(state, address, endpoint, false);
    if (exclusions.length > 0) native.putExclusions(state, id, exclusions);
  };
}

/** Those that the pod has no more. */
function dropAddresses({ native, state, id, plan }: Attachment, previous: AttachmentRecord): void {
  const kept = new Set(plan.addresses.map(hex));
  for (const address of previous.addresses) {
    if (kept.has(hex(address)) || native.getEndpoint(state, address)?.ifindex !== id) continue;
    native.deleteEndpoint(state, address);
  }
}

/** An address belongs to one pod. A holder that is gone, or that has lost it, is replaced; a living one is named. */
function putEndpoint(attachment: Attachment, address: Address, endpoint: EndpointRecord): void {
  const { native, state, undo } = attachment;
  try {
    native.putEndpoint(state, address, endpoint, true);
  } catch (error) {
    if (!hasCode(error, 'EEXIST')) throw error;
    const holder = livingHolder(native, state, address, attachment.id);
    if (holder !== null) {
      throw new CniError(
        Code.STATE_FAILED,
        `address ${formatAddress(address)} belongs to another pod`,
        `${holder} has it, on the same state directory`,
      );
    }
    native.putEndpoint(state, address, endpoint, false);
  }
  undo.push(() => native.deleteEndpoint(state, address));
}

/** Who else than the pod with interface id `own` has this address, and lives. */
function livingHolder(native: Native, state: State, address: Address, own: number): string | null {
  const endpoint = native.getEndpoint(state, address);
  if (endpoint === null || endpoint.ifindex === own) return null;
  const entry = native
    .listAttachments(state)
    .find(({ record }) => record.interfaceId === endpoint.ifindex && record.role === 'pod');
  if (entry === undefined) return null;
  const { record } = entry;
  const link = record.hostIfindex === 0 ? { name: record.ifname } : native.linkByIndex(HOST, record.hostIfindex);
  if (link === null) return null;
  let netns: number;
  try {
    netns = native.openNetns(record.netnsPath);
  } catch {
    // Its namespace has no name any more; the link may outlive that only while a process still holds it.
    if (record.hostIfindex === 0) return null;
    return `${describePod(record)} on ${link.name}`;
  }
  try {
    const has = native.linkAddresses(netns, record.podIfindex).some((own) => hex(own.address) === hex(address));
    return has && isSameNetns(native.netnsIdentity(netns), record.netns)
      ? `${describePod(record)} on ${link.name}`
      : null;
  } finally {
    native.close(netns);
  }
}

function* attachHook(attachment: Attachment, hook: PlannedHook): Steps<void> {
  const { native, config, record, facts } = attachment;
  if (hook.device === 'netns') {
    attachLookup(attachment, hook);
    return;
  }
  if (keepStub(attachment, hook)) return;
  const device = hook.device === 'host' ? facts.host?.name : `${facts.pod.name} of ${record.netnsPath}`;
  const step = `attach ${hook.program} to ${hook.direction} of ${device} (ifindex ${hook.ifindex})`;
  let program: number | undefined;
  try {
    program = openHookProgram(attachment, hook);
    const programId = native.programInfo(program).id;
    if (config.hook === 'clsact' || !(yield* attachTcx(attachment, hook, program, programId))) {
      attachFilter(attachment, hook, program, programId, step);
    }
  } catch (error) {
    throw stepError(Code.ATTACH_FAILED, step, error);
  } finally {
    if (program !== undefined) native.close(program);
  }
}

/** The pinned program, or inside a pod a new stub that goes on to it. */
function openHookProgram({ native, config, state, record, id }: Attachment, hook: PlannedHook): number {
  if (!isStubbed(hook)) return native.openProgram(programPin(config.stateDir, record.programTag, hook.program));
  return native.loadStub(state, hook.program, id, config.failurePolicy === 'closed' ? 'drop' : 'pass');
}

/** A stub says whose hook it is, and that has not changed: one that is in place stays. */
function keepStub(attachment: Attachment, hook: PlannedHook): boolean {
  const { native, config, target, previous } = attachment;
  const old = previous?.hooks.find(({ program }) => program === hook.program);
  if (previous === null || old === undefined || !isStubbed(hook)) return false;
  const findings: Finding[] = [];
  verifyHook(native, config, target.key, previous, old, findings);
  if (findings.length > 0) return false;
  noteHook(attachment, old);
  return true;
}

/** Not there where the kernel has no such programs (before 5.10) or a variant goes without: ensurePrograms loaded the rest. */
function attachLookup(attachment: Attachment, hook: PlannedHook): void {
  const { native, config, record, netns, target, facts, undo } = attachment;
  const step = `attach ${hook.program} to ${record.netnsPath}`;
  if (keepStub(attachment, hook)) return;
  let program: number | undefined;
  try {
    program = openHookProgram(attachment, hook);
    const pin = linkPin(config.stateDir, target.key, hook.program);
    const programId = native.programInfo(program).id;
    noteHook(attachment, { ...hookRecord(hook, programId), kind: 'netns' });
    makeLinkDirectory(attachment);
    const link = attachment.previous === null ? null : native.linkInfo(pin);
    if (link?.netnsIno === facts.netns.ino) {
      if (link.programId !== programId) native.updateLink(pin, program);
      return;
    }
    if (link !== null) native.detachLink(pin);
    native.attachLookup(netns, program, pin);
    undo.push(() => native.detachLink(pin));
  } catch (error) {
    if (program === undefined && hasCode(error, 'ENOENT')) return;
    throw stepError(Code.ATTACH_FAILED, step, error);
  } finally {
    if (program !== undefined) native.close(program);
  }
}

/** false: this kernel has no TCX (before 6.6), and the configuration leaves the choice. */
function* attachTcx(attachment: Attachment, hook: PlannedHook, program: number, programId: number): Steps<boolean> {
  const { native, config, target, netns, undo, previous } = attachment;
  const pin = linkPin(config.stateDir, target.key, hook.program);
  const old = previous?.hooks.find(({ program: name }) => name === hook.program);
  if (old !== undefined && old.kind !== 'tcx') return false;
  noteHook(attachment, { ...hookRecord(hook, programId), kind: 'tcx' });
  makeLinkDirectory(attachment);
  const link = previous === null ? null : native.linkInfo(pin);
  if (link?.ifindex === hook.ifindex) {
    if (link.programId !== programId) native.updateLink(pin, program);
    return true;
  }
  // Its pin may have been left by a link that is dead.
  if (link !== null) native.detachLink(pin);
  try {
    const call = [netnsOf(hook, netns), hook.ifindex, hook.direction, program, config.order, pin] as const;
    yield* wait(
      () => native.attachTcx(...call),
      () => native.attachTcxAside(...call),
    );
  } catch (error) {
    // EINVAL is what an older kernel says to an attach type that it does not know.
    if (config.hook === 'auto' && hasCode(error, 'EINVAL', 'EOPNOTSUPP') && !native.features().tcx) return false;
    throw error;
  }
  undo.push(() => native.detachLink(pin));
  return true;
}

function attachFilter(
  attachment: Attachment,
  hook: PlannedHook,
  program: number,
  programId: number,
  step: string,
): void {
  const { native, config, netns, target, undo } = attachment;
  const where = netnsOf(hook, netns);
  const [ahead] = tcxPrograms(native, where, hook.ifindex, hook.direction);
  if (ahead !== undefined && config.failurePolicy === 'closed') {
    const name = native.programById(ahead)?.name ?? 'gone';
    throw new CniError(
      Code.ATTACH_FAILED,
      step,
      `TCX program ${ahead} (${quote(name)}) is there; it runs before any filter and may end the chain; "hook": "tcx" goes ahead of it`,
    );
  }
  // The other order (the ingress qdisc is there) fails below. Here ADD would do well, and the pod fail to start by a
  // message of bandwidth's that names nobody ("create ingress qdisc: file exists").
  if (
    target.egressLimited &&
    hook.device === 'host' &&
    !native.qdiscs(where, hook.ifindex).some(({ kind }) => kind === 'ingress')
  ) {
    throw new CniError(
      Code.ATTACH_FAILED,
      step,
      'the pod has an egress rate limit, and beside our clsact qdisc the bandwidth plugin cannot make its ingress qdisc; "hook": "tcx" does not need the place; where no bandwidth plugin follows, take the capability "bandwidth" out of this entry',
    );
  }
  try {
    native.addClsact(where, hook.ifindex);
  } catch (error) {
    if (!hasCode(error, 'EBUSY', 'EEXIST', 'EINVAL', 'EOPNOTSUPP')) throw error;
    const other = native.qdiscs(where, hook.ifindex).find(({ kind }) => kind === 'ingress');
    if (other === undefined) throw error;
    throw new CniError(
      Code.ATTACH_FAILED,
      step,
      `an ingress qdisc (the bandwidth plugin's?) holds the place of clsact, and has no egress hook; "hook": "tcx" does not need the place (${kernelReason(error)})`,
    );
  }
  const present = native.filters(where, hook.ifindex, hook.direction);
  const old = attachment.previous?.hooks.find(({ program: name }) => name === hook.program);
  const own = present.find(
    ({ priority, handle, name }) => priority === old?.priority && handle === old.handle && name === filterName(hook),
  );
  if (own !== undefined) {
    const { priority, handle, name } = own;
    noteHook(attachment, { ...hookRecord(hook, programId), kind: 'clsact', priority, handle });
    // cls_bpf swaps the program of a filter in place.
    native.attachFilter(where, hook.ifindex, hook.direction, program, { priority, handle, name, replace: true });
    return;
  }
  const blocking = present.find(({ priority, kind }) => priority === FILTER_PRIORITY && kind !== 'bpf');
  let priority = FILTER_PRIORITY;
  if (blocking !== undefined) {
    if (config.failurePolicy === 'closed') {
      throw new CniError(
        Code.ATTACH_FAILED,
        step,
        `priority ${FILTER_PRIORITY} is held by a ${blocking.kind} filter, which may end the chain before this program`,
      );
    }
    while (present.some((filter) => filter.priority === priority)) priority++;
  }
  const filter = { priority, handle: FILTER_HANDLE };
  const noted: HookRecord = { ...hookRecord(hook, programId), kind: 'clsact', ...filter };
  noteHook(attachment, noted);
  // Pushed first: where the kernel's answer is lost, the request may have been carried out.
  undo.push(() => removeFilter(native, where, noted));
  native.attachFilter(where, hook.ifindex, hook.direction, program, {
    ...filter,
    name: filterName(hook),
    replace: true,
  });
}

/** Ids in the order they run; [] on a kernel without TCX. */
function tcxPrograms(native: Native, netns: number, ifindex: number, direction: HookRecord['direction']): number[] {
  try {
    return native.queryTcx(netns, ifindex, direction).map(({ programId }) => programId);
  } catch (error) {
    if (hasCode(error, 'EINVAL', 'EOPNOTSUPP') && !native.features().tcx) return [];
    throw error;
  }
}

/** Ahead of the attach: a record that names the place lets DEL find what is there. */
function noteHook(attachment: Attachment, hook: HookRecord): void {
  const { record } = attachment;
  record.hooks = [...record.hooks.filter(({ program }) => program !== hook.program), hook];
  writeRecord(attachment, 'attaching');
}

function makeLinkDirectory({ native, config, target, undo }: Attachment): void {
  const directory = linkDirectory(config.stateDir, target.key);
  native.makeDirectory(`${config.stateDir}/links`, 0o700);
  if (native.makeDirectory(directory, 0o700)) undo.push(() => native.removeDirectory(directory));
}

/** lo, in every namespace. */
const LOOPBACK_IFINDEX = 1;

/** What makes a foreign destination local for signed or looped frames, in the proxy's namespace only. */
function routing(config: RedirectConfig): { rules: Rule[]; routes: LocalRoute[] } {
  const families = [4, 6] as const;
  return {
    rules: families.map((family) => ({
      family,
      priority: RULE_PRIORITY,
      mark: config.marks.tproxy,
      table: ROUTE_TABLE,
      protocol: ROUTE_PROTOCOL,
    })),
    routes: families.map((family) => ({ family, table: ROUTE_TABLE, protocol: ROUTE_PROTOCOL })),
  };
}

function addRouting({ native, config, netns, undo, target, facts, record, previous }: Attachment): void {
  const { rules, routes } = routing(config);
  try {
    for (const { bit, read, set } of interfaceSettings(native)) {
      const wanted = (record.flags & bit) !== 0;
      if (!wanted && ((previous?.flags ?? 0) & bit) === 0) continue;
      if (read(netns, facts.pod.ifindex) === wanted) continue;
      undo.push(() => set(netns, facts.pod.ifindex, !wanted));
      set(netns, facts.pod.ifindex, wanted);
    }
    // Pushed first: where the kernel's answer is lost, the request may have been carried out.
    for (const route of routes) {
      undo.push(() => native.deleteLocalRoute(netns, route));
      if (!native.addLocalRoute(netns, route)) undo.pop();
    }
    for (const rule of rules) {
      undo.push(() => native.deleteRule(netns, rule));
      if (!native.addRule(netns, rule)) undo.pop();
    }
  } catch (error) {
    const step = `add rule and route, and set up ${facts.pod.name}, in ${target.netnsPath}`;
    const failure = stepError(Code.ATTACH_FAILED, step, error);
    if (!hasCode(error, 'ENETDOWN') || native.linkByIndex(netns, LOOPBACK_IFINDEX)?.up !== false) throw failure;
    const why =
      'lo is down there, by which the route takes packets to the proxy; whoever makes the pod has to bring it up';
    throw new CniError(failure.code, failure.msg, `${failure.details}; ${why}`, { cause: error });
  }
}

function announceProxy(attachment: Attachment): void {
  const { native, config, state, target, facts, id, undo } = attachment;
  const proxy: ProxyRecord = {
    key: target.key,
    netnsCookie: facts.netns.cookie,
    netnsIno: facts.netns.ino,
    hostIfindex: id,
    podIfindex: facts.pod.ifindex,
    nsid: facts.nsid,
    master: facts.host?.master ?? 0,
    mac: facts.pod.mac,
    ports: config.proxy.ports,
  };
  // A repair does not make it the newest.
  if (attachment.previous !== null && native.getProxies(state).proxies.some(({ key }) => sameKey(key, target.key)))
    return;
  // Pushed first: when the write itself fails half-way, the list is still put right.
  undo.push(() => forgetCounters(native, state, id));
  undo.push(() => removeProxy(native, state, config.runDir, target.key));
  addProxy(native, state, config.runDir, proxy);
}

// ---- detach --------------------------------------------------------------------------------------------------------

/**
 * Removes whatever is left of an attachment, in any state of it; true if there was something. Looks in the state
 * directories that runDir knows too, because "stateDir" may have been edited since ADD.
 */
export function detach(native: Native, dirs: Directories, key: AttachmentKey): boolean {
  return runHere(detachSteps(native, dirs, key));
}

/** What detach() does. */
export function* detachSteps(native: Native, dirs: Directories, key: AttachmentKey): Steps<boolean> {
  const leave = enterBeside(native, dirs.runDir);
  try {
    return yield* detachBeside(native, dirs, key);
  } finally {
    leave();
  }
}

function* detachBeside(native: Native, dirs: Directories, key: AttachmentKey): Steps<boolean> {
  let found = false;
  for (const stateDir of new Set([dirs.stateDir, ...knownStateDirs(dirs.runDir)])) {
    const state = openState(native, stateDir);
    if (state === null) continue;
    try {
      removeDeadProxies(native, state, dirs.runDir);
      const record = native.getAttachment(state, key);
      if (record !== null) yield* detachRecordSteps(native, { ...dirs, stateDir }, state, key, record);
      found = removePins(native, stateDir, key) || record !== null || found;
    } catch (error) {
      throw stepError(Code.STATE_FAILED, `remove the attachment from ${stateDir}`, error);
    } finally {
      native.closeState(state);
    }
  }
  return found;
}

/** Everything that `record` says, then the record. Objects that are gone or somebody else's by now are left alone. */
export function detachRecord(
  native: Native,
  dirs: Directories,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
): void {
  runHere(detachRecordSteps(native, dirs, state, key, record));
}

/** Of a pod that runs and has no programs. */
export function notEnrolled(record: AttachmentRecord): AttachmentRecord {
  return { ...record, state: 'recorded', role: 'none', flags: 0, hooks: [], programTag: '' };
}

/**
 * What detachRecord() does. `after`: what is to be recorded then, null for nothing. Where the pod goes on, a record is
 * there at each moment: only its ADD can tell who it is, and is not repeated.
 */
export function* detachRecordSteps(
  native: Native,
  dirs: Directories,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
  after: () => AttachmentRecord | null = () => null,
): Steps<void> {
  // Nothing is sent to a proxy that is about to lose its program.
  if (record.role === 'proxy') removeProxy(native, state, dirs.runDir, key);
  // All programs of a pod stop deciding at once. Each is detached in some ten milliseconds, and one that is left would
  // drop, as nobody's, the answer to a SYN that another one has not seen any more.
  if (record.role === 'pod' && native.getInterface(state, record.interfaceId)?.podMac === record.podMac) {
    native.deleteInterface(state, record.interfaceId);
  }
  for (const hook of record.hooks) {
    const pin = linkPin(dirs.stateDir, key, hook.program);
    if (hook.kind !== 'clsact') {
      yield* wait(
        () => native.detachLink(pin),
        () => native.detachLinkAside(pin),
      );
    } else if (!hook.inNetns && isSameHostLink(native, record)) removeFilter(native, HOST, hook);
  }
  if (isLooping(record)) inOwnNetns(native, record, (netns) => leaveNetns(native, state, netns, key, record));
  removePins(native, dirs.stateDir, key);
  const left = after();
  if (record.role === 'pod') removeEntries(native, state, record, left !== null);
  if (record.role === 'proxy') forgetCounters(native, state, record.hostIfindex);
  if (left === null) native.deleteAttachment(state, key);
  else native.replaceAttachment(state, key, left);
}

/** Does its namespace have our rule and route? */
function isLooping({ role, contract }: AttachmentRecord): boolean {
  return role === 'proxy' || (role === 'pod' && contract === 'in-pod');
}

interface InterfaceSetting {
  /** the sysctl, of a record's interface */
  name: (ifname: string) => string;
  /** INTERFACE_*: it was off, so it is set by ADD and reset by DEL */
  bit: number;
  /** of the whole namespace: other interfaces of the pod stand on it too */
  shared: boolean;
  read: (netns: number, ifindex: number) => boolean;
  set: (netns: number, ifindex: number, on: boolean) => void;
  needed: (role: Target['role'], contract: AttachmentRecord['contract'], dnsCapture: boolean) => boolean;
}

function interfaceSettings(native: Native): InterfaceSetting[] {
  return [
    {
      // A looped packet comes in with the pod's own source address, and the proxy may send to a flow of its own: a pod
      // that asks for the proxy's address, ztunnel's second leg. IPv4 refuses that; IPv6 does not.
      name: (ifname) => `conf.${ifname}.accept_local`,
      bit: native.flags.INTERFACE_ACCEPT_LOCAL ?? 0,
      shared: false,
      read: (netns, ifindex) => native.acceptLocal(netns, ifindex),
      set: (netns, ifindex, on) => native.setAcceptLocal(netns, ifindex, on),
      needed: (role, contract) => role === 'proxy' || contract === 'in-pod',
    },
    {
      // ztunnel's DNS listener is at 127.0.0.1: queries come in for it by the pod's interface, answers go out by it.
      name: (ifname) => `conf.${ifname}.route_localnet`,
      bit: native.flags.INTERFACE_ROUTE_LOCALNET ?? 0,
      shared: false,
      read: (netns, ifindex) => native.routeLocalnet(netns, ifindex),
      set: (netns, ifindex, on) => native.setRouteLocalnet(netns, ifindex, on),
      needed: (_role, contract, dnsCapture) => contract === 'in-pod' && dnsCapture,
    },
    {
      // Two ztunnels listen in the pod while one takes the other's place. A listener that goes resets what its process
      // has not accepted yet, unless the kernel may hand it to the other one.
      name: () => 'tcp_migrate_req',
      bit: native.flags.INTERFACE_MIGRATE_REQUESTS ?? 0,
      shared: true,
      // A kernel without it is as good as it can be.
      read: (netns) => native.migrateRequests(netns) ?? true,
      set: (netns, _ifindex, on) => native.setMigrateRequests(netns, on),
      needed: (_role, contract) => contract === 'in-pod',
    },
  ];
}

/** Flags of a record that its entries in the maps do not have. */
function recordedOnly(native: Native): number {
  return interfaceSettings(native).reduce((bits, { bit }) => bits | bit, native.flags.INTERFACE_TPROXY ?? 0);
}

function leaveNetns(native: Native, state: State, netns: number, key: AttachmentKey, record: AttachmentRecord): void {
  for (const hook of record.hooks) {
    if (hook.kind === 'clsact' && hook.inNetns) removeFilter(native, netns, hook);
  }
  if ((record.flags & (native.flags.INTERFACE_TPROXY ?? 0)) !== 0) deleteTproxy(netns);
  // Another interface of the same pod loops by the same rules and routes, and in the same namespace.
  const sharer = native
    .listAttachments(state)
    .find(
      (other) =>
        hex(other.key) !== hex(key) &&
        isLooping(other.record) &&
        other.record.netns.dev === record.netns.dev &&
        other.record.netns.ino === record.netns.ino,
    );
  const there = native.linkByIndex(netns, record.podIfindex) !== null;
  for (const { bit, shared, set } of interfaceSettings(native)) {
    if ((record.flags & bit) === 0) continue;
    if (shared && sharer !== undefined) {
      // From now on it is that one's to be reset.
      sharer.record.flags |= bit;
      native.replaceAttachment(state, sharer.key, sharer.record);
    } else if (shared || there) {
      set(netns, record.podIfindex, false);
    }
  }
  if (sharer !== undefined) return;
  const { tproxy } = native.settings(state).marks;
  for (const family of [4, 6] as const) {
    native.deleteRule(netns, {
      family,
      priority: RULE_PRIORITY,
      mark: tproxy,
      table: ROUTE_TABLE,
      protocol: ROUTE_PROTOCOL,
    });
    native.deleteLocalRoute(netns, { family, table: ROUTE_TABLE, protocol: ROUTE_PROTOCOL });
  }
}

/** Indexes come back when a namespace is made anew (tests, reboots): only entries that are this pod's go. */
function removeEntries(native: Native, state: State, record: AttachmentRecord, goesOn: boolean): void {
  for (const address of record.addresses) {
    const endpoint = native.getEndpoint(state, address);
    if (endpoint?.ifindex === record.interfaceId && endpoint.podMac === record.podMac) {
      native.deleteEndpoint(state, address);
    }
  }
  const entry = native.getInterface(state, record.interfaceId);
  if (entry !== null && entry.podMac !== record.podMac) return;
  native.deleteInterface(state, record.interfaceId);
  native.deleteDirectFlows(state, record.interfaceId);
  // Ports come again: what the pod opens from now on must not be taken for such a flow when it is enrolled another time.
  if (goesOn) native.deleteFlows(state, record.interfaceId);
  native.deleteExclusions(state, record.interfaceId);
  native.deleteCounters(state, record.interfaceId);
}

/** A proxy's. Those of a pod that has its index by now stay (see removeEntries); index 0 counts for all proxies together. */
function forgetCounters(native: Native, state: State, hostIfindex: number): void {
  if (hostIfindex !== 0 && native.getInterface(state, hostIfindex) === null) native.deleteCounters(state, hostIfindex);
}

function removeFilter(native: Native, netns: number, hook: HookRecord): void {
  const filter = { priority: hook.priority, handle: hook.handle };
  const ours = native
    .filters(netns, hook.ifindex, hook.direction)
    .some(
      (found) =>
        found.priority === filter.priority && found.handle === filter.handle && found.name === filterName(hook),
    );
  if (ours) native.deleteFilter(netns, hook.ifindex, hook.direction, filter);
}

/** A pod has few programs, each attached in some ten milliseconds. */
const PIN_TRIES = 20;
const PIN_WAIT_MS = 10;

function removePins(native: Native, stateDir: string, key: AttachmentKey): boolean {
  const programs = Object.keys(native.programs) as HookRecord['program'][];
  const directory = linkDirectory(stateDir, key);
  let found = false;
  for (let tries = 1; ; tries++) {
    for (const program of programs) found = native.detachLink(linkPin(stateDir, key, program)) || found;
    try {
      return native.removeDirectory(directory) || found;
    } catch (error) {
      // The agent may be attaching this very pod, which it has not been told is going: its pins go as they come.
      if (!hasCode(error, 'ENOTEMPTY') || tries === PIN_TRIES) throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, PIN_WAIT_MS);
    }
  }
}

export function isSameHostLink(native: Native, record: AttachmentRecord): boolean {
  const link = native.linkByIndex(HOST, record.hostIfindex);
  return link !== null && link.mac === record.hostMac && link.peerIfindex === record.podIfindex;
}

/** Inodes come again as soon as they are free, cookies never do; kernels before 5.14 have none (0). */
export function isSameNetns(now: AttachmentRecord['netns'], then: AttachmentRecord['netns']): boolean {
  const cookies = now.cookie !== 0n && then.cookie !== 0n;
  return now.dev === then.dev && now.ino === then.ino && (!cookies || now.cookie === then.cookie);
}

/** Runs `body` in the recorded namespace if it still is the one that was recorded. */
export function inOwnNetns(native: Native, record: AttachmentRecord, body: (netns: number) => void): void {
  let netns: number;
  try {
    netns = native.openNetns(record.netnsPath);
  } catch (error) {
    // Gone, or another kind of file in its place: what was inside is gone with it. Anything else is worth another DEL.
    if (hasCode(error, 'ENOENT', 'ENOTDIR', 'EINVAL', 'ENXIO', 'ELOOP')) return;
    throw error;
  }
  try {
    if (isSameNetns(native.netnsIdentity(netns), record.netns)) body(netns);
  } finally {
    native.close(netns);
  }
}

/**
 * Removes attachments that are proved dead: the host-side link is gone or another one, and so is the namespace.
 * Returns how many.
 */
export function sweepDead(native: Native, dirs: Directories, state: State): number {
  let swept = 0;
  for (const { key, record } of native.listAttachments(state)) {
    if (!isDead(native, record)) continue;
    detachRecord(native, dirs, state, key, record);
    swept++;
  }
  return swept;
}

export function isDead(native: Native, record: AttachmentRecord): boolean {
  const linked = record.hostIfindex !== 0;
  if (linked && native.linkByIndex(HOST, record.hostIfindex)?.peerIfindex === record.podIfindex) return false;
  let alive = false;
  inOwnNetns(native, record, () => {
    alive = true;
  });
  return !alive;
}

// ---- verify ----------------------------------------------------------------------------------------------------------

/** Compares the record with the kernel; [] if all is there. Changes nothing. */
export function verify(
  native: Native,
  state: State,
  dirs: Directories,
  key: AttachmentKey,
  record: AttachmentRecord,
): Finding[] {
  const findings = verifyAttached(native, state, dirs, key, record);
  if (record.role !== 'none') verifyMac(native, record, findings);
  return findings;
}

/** A plugin that follows in the chain may change it (tuning): then our programs take the pod's frames for another host's. */
function verifyMac(native: Native, record: AttachmentRecord, findings: Finding[]): void {
  const found = podMacNow(native, record);
  if (found === record.podMac) return;
  findings.push({
    code: Code.ENTRY_MISMATCH,
    kind: 'interface',
    object: `MAC address of ${record.ifname} in ${record.netnsPath}`,
    expected: record.podMac,
    found,
  });
}

/** The recorded one where the interface is gone. */
function podMacNow(native: Native, record: AttachmentRecord): Mac {
  let mac = record.podMac;
  inOwnNetns(native, record, (netns) => {
    mac = native.linkByIndex(netns, record.podIfindex)?.mac ?? mac;
  });
  return mac;
}

/**
 * Has the programs know a pod by the MAC address that it has now. Returns the record as it is then; the same one where
 * nothing was to be done.
 */
export function followMac(
  native: Native,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
): AttachmentRecord {
  if (record.role !== 'pod' || record.state !== 'attached') return record;
  const podMac = podMacNow(native, record);
  if (podMac === record.podMac) return record;
  for (const address of record.addresses) {
    const endpoint = native.getEndpoint(state, address);
    if (endpoint?.ifindex === record.interfaceId) native.putEndpoint(state, address, { ...endpoint, podMac }, false);
  }
  const entry = native.getInterface(state, record.interfaceId);
  if (entry !== null) native.putInterface(state, record.interfaceId, { ...entry, podMac });
  const now = { ...record, podMac };
  native.replaceAttachment(state, key, now);
  return now;
}

/** What attach() has made itself. */
function verifyAttached(
  native: Native,
  state: State,
  dirs: Directories,
  key: AttachmentKey,
  record: AttachmentRecord,
): Finding[] {
  const findings: Finding[] = [];
  if (record.role === 'none') return findings;
  const host = record.hostIfindex === 0 ? null : native.linkByIndex(HOST, record.hostIfindex);
  if (record.hostIfindex === 0) {
    if (!isThere(native, record)) {
      const object = `interface ${record.ifname} (ifindex ${record.podIfindex}) in ${record.netnsPath}`;
      findings.push({
        code: Code.SANDBOX_NOT_FOUND,
        kind: 'interface',
        object,
        expected: 'the recorded one',
        found: 'no such link',
      });
      return findings;
    }
  } else if (host === null || host.peerIfindex !== record.podIfindex) {
    const object = `host-side interface ${record.hostIfname} (ifindex ${record.hostIfindex})`;
    const found = host === null ? 'no such link' : `${host.name} with peer ${host.peerIfindex}`;
    findings.push({
      code: Code.SANDBOX_NOT_FOUND,
      kind: 'interface',
      object,
      expected: `peer ${record.podIfindex}`,
      found,
    });
    return findings;
  }
  for (const hook of record.hooks) verifyHook(native, dirs, key, record, hook, findings);
  if (record.role === 'pod') verifyEntries(native, state, record, findings);
  else verifyProxy(native, state, key, record, findings);
  if (isLooping(record)) verifyNetns(native, state, record, findings);
  return findings;
}

function isThere(native: Native, record: AttachmentRecord): boolean {
  let there = false;
  inOwnNetns(native, record, (netns) => {
    there = native.linkByIndex(netns, record.podIfindex)?.name === record.ifname;
  });
  return there;
}

function verifyHook(
  native: Native,
  dirs: Directories,
  key: AttachmentKey,
  record: AttachmentRecord,
  hook: HookRecord,
  findings: Finding[],
): void {
  const place =
    hook.kind === 'netns'
      ? `socket lookup in ${record.netnsPath}`
      : `${hook.direction} of ${hook.inNetns ? record.ifname : record.hostIfname} (ifindex ${hook.ifindex})`;
  const object = `${hook.program} on ${place}`;
  const expected = `program ${hook.programId} by ${hook.kind}`;
  const missing = (found: string, kind: FindingKind = 'program') =>
    findings.push({ code: Code.PROGRAM_MISSING, kind, object, expected, found });
  if (hook.kind === 'netns') {
    const link = native.linkInfo(linkPin(dirs.stateDir, key, hook.program));
    if (link === null) missing('no pinned link', 'link');
    else if (link.netnsIno !== record.netns.ino) missing('a link whose namespace is gone', 'link');
    else if (link.programId !== hook.programId) missing(`program ${link.programId}`);
    return;
  }
  if (hook.kind === 'tcx') {
    const link = native.linkInfo(linkPin(dirs.stateDir, key, hook.program));
    if (link === null) missing('no pinned link', 'link');
    else if (link.ifindex !== hook.ifindex) missing('a link whose device is gone', 'link');
    else if (link.programId !== hook.programId) missing(`program ${link.programId}`);
    return;
  }
  const check = (netns: number) => {
    const filters = native.filters(netns, hook.ifindex, hook.direction);
    const ours = filters.find(({ handle, priority }) => handle === hook.handle && priority === hook.priority);
    if (ours === undefined) missing(`no filter with priority ${hook.priority}, handle ${hook.handle}`);
    else if (ours.programId !== hook.programId) missing(`program ${ours.programId} (${quote(ours.name)})`);
  };
  if (!hook.inNetns) {
    check(HOST);
    return;
  }
  let entered = false;
  inOwnNetns(native, record, (netns) => {
    entered = true;
    check(netns);
  });
  if (!entered) missing(`the namespace ${record.netnsPath} is gone`);
}

function verifyEntries(native: Native, state: State, record: AttachmentRecord, findings: Finding[]): void {
  const entry = native.getInterface(state, record.interfaceId);
  const mismatch = (object: string, expected: string, found: string) =>
    findings.push({ code: Code.ENTRY_MISMATCH, kind: 'map', object, expected, found });
  const name = record.hostIfname || record.ifname;
  const flags = record.flags & ~recordedOnly(native);
  if (entry === null) mismatch(`entry of ${name} in interfaces`, `MAC ${record.podMac}`, 'none');
  else if (entry.podMac !== record.podMac) {
    mismatch(`entry of ${name} in interfaces`, `MAC ${record.podMac}`, `MAC ${entry.podMac}`);
  } else if (entry.flags !== flags) {
    mismatch(`entry of ${name} in interfaces`, `flags ${flags}`, `flags ${entry.flags}`);
  }
  for (const address of record.addresses) {
    const endpoint = native.getEndpoint(state, address);
    if (endpoint?.ifindex === record.interfaceId) continue;
    const found = endpoint === null ? 'none' : `interface ${endpoint.ifindex}`;
    mismatch(`entry of ${formatAddress(address)} in endpoints`, `interface ${record.interfaceId}`, found);
  }
}

function verifyProxy(
  native: Native,
  state: State,
  key: AttachmentKey,
  record: AttachmentRecord,
  findings: Finding[],
): void {
  const listed = native.getProxies(state).proxies.some((proxy) => hex(proxy.key) === hex(key));
  if (!listed) {
    findings.push({
      code: Code.ENTRY_MISMATCH,
      kind: 'map',
      object: `entry of ${describePod(record)} in proxies`,
      expected: `ifindex ${record.hostIfindex}`,
      found: 'none',
    });
  }
}

/** Rule, route and settings of a namespace whose proxy gets marked frames; where they go on to, of what is a stub. */
function verifyNetns(native: Native, state: State, record: AttachmentRecord, findings: Finding[]): void {
  const mismatch = (kind: FindingKind, object: string, expected: string, found: string) =>
    findings.push({ code: Code.ENTRY_MISMATCH, kind, object, expected, found });
  for (const hook of record.hooks) {
    if (!isStubbed(hook) || native.jumpTarget(state, hook.program) !== 0) continue;
    mismatch('map', `${hook.program} in map jump`, 'a program', 'none');
  }
  const { tproxy } = native.settings(state).marks;
  inOwnNetns(native, record, (netns) => {
    for (const family of [4, 6] as const) {
      const rule = native
        .rules(netns, family)
        .some(({ mark, table, protocol }) => mark === tproxy && table === ROUTE_TABLE && protocol === ROUTE_PROTOCOL);
      const route = native.localRoutes(netns, family, ROUTE_TABLE).length > 0;
      const object = `IPv${family} routing of ${record.role === 'proxy' ? 'signed' : 'looped'} frames in ${record.netnsPath}`;
      if (!rule) mismatch('rule', object, `rule to table ${ROUTE_TABLE}`, 'no rule');
      if (!route) mismatch('route', object, `local route in table ${ROUTE_TABLE}`, 'no route');
    }
    for (const { name, bit, read } of interfaceSettings(native)) {
      if ((record.flags & bit) === 0 || read(netns, record.podIfindex)) continue;
      mismatch('sysctl', `net.ipv4.${name(record.ifname)} in ${record.netnsPath}`, '1', '0');
    }
  });
}

// ---- records ---------------------------------------------------------------------------------------------------------

const NO_MAC = '00:00:00:00:00:00';
/** More of one pod's are E2BIG too, which has nothing to do with the number of pods. */
const MAX_EXCLUSIONS = 4096;

/** MAX_ADDRESSES of bpf/redirect.h. */
const MAX_ADDRESSES = 16;

function newRecord(
  native: Native,
  config: RedirectConfig,
  target: Target,
  facts: HostFacts,
  id: number,
  plan: AttachPlan,
  programTag: string,
  ownFlags: number,
): AttachmentRecord {
  if (plan.addresses.length > MAX_ADDRESSES) {
    throw new CniError(
      Code.INVALID_NETWORK_CONFIG,
      `interface ${target.ifname} has ${plan.addresses.length} addresses`,
      `at most ${MAX_ADDRESSES} can be recorded`,
    );
  }
  return {
    ...emptyRecord(native, config, target),
    flags: plan.flags | ownFlags,
    hostIfindex: facts.host?.ifindex ?? 0,
    podIfindex: facts.pod.ifindex,
    nsid: facts.nsid,
    interfaceId: id,
    netns: facts.netns,
    podMac: facts.pod.mac,
    hostMac: facts.host?.mac ?? NO_MAC,
    addresses: plan.addresses,
    programTag,
    hostIfname: facts.host?.name ?? '',
  };
}

function emptyRecord(native: Native, config: RedirectConfig, target: Target): AttachmentRecord {
  return {
    layout: native.layoutVersion,
    state: 'attaching',
    role: target.role,
    contract: config.proxy.contract,
    flags: 0,
    hostIfindex: 0,
    podIfindex: 0,
    nsid: -1,
    interfaceId: 0,
    netns: { dev: 0n, ino: 0n, cookie: 0n },
    enrolledAt: Math.floor(Date.now() / 1000),
    podMac: NO_MAC,
    hostMac: NO_MAC,
    bootId: readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim(),
    addresses: [],
    hooks: [],
    programTag: '',
    hostIfname: '',
    ifname: target.ifname,
    network: target.network,
    containerId: target.containerId,
    podName: target.pod.name,
    podNamespace: target.pod.namespace,
    podUid: target.pod.uid,
    serviceAccount: target.pod.serviceAccount,
    netnsPath: target.netnsPath,
  };
}

function hookRecord(hook: PlannedHook, programId: number): Omit<HookRecord, 'kind'> {
  return {
    program: hook.program,
    ifindex: hook.ifindex,
    direction: hook.direction,
    inNetns: hook.device !== 'host',
    programId,
    handle: 0,
    priority: 0,
  };
}

function netnsOf(hook: PlannedHook, netns: number): number {
  return hook.device === 'pod' ? netns : HOST;
}

export function filterName({ program }: { program: string }): string {
  return `ambient-redirect/${program}`;
}

/** "NAMESPACE/NAME" or, outside Kubernetes, "container ID". */
export function describePod(record: Pick<AttachmentRecord, 'podName' | 'podNamespace' | 'containerId'>): string {
  return record.podName === '' ? `container ${record.containerId}` : `${record.podNamespace}/${record.podName}`;
}
