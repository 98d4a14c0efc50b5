// SPDX-License-Identifier: Apache-2.0
// What the maps say, held against what the kernel has: the one source of `status`, `pods`, `counters` and `proxy show`.
// Reads only; whatever cannot be read is a problem in the answer, not an end of it.

import { release } from 'node:os';
import { hex } from '../attachments.ts';
import { formatAddress } from '../cni/address.ts';
import { Code } from '../cni/errors.ts';
import { describePod, type Finding, verify } from '../datapath.ts';
import { isDraining } from '../drain.ts';
import { isProxyMark } from '../in-pod.ts';
import type {
  AttachmentKey,
  AttachmentRecord,
  Counter,
  Listener,
  Native,
  ProxyRecord,
  State,
  StateSettings,
} from '../native.ts';
import { type Directories, openState } from '../state.ts';

/** One attachment, as recorded and as found. */
export interface Attachment {
  /** 64 hex digits */
  key: string;
  record: AttachmentRecord;
  /** the host-side interface exists */
  present: boolean;
  /** hooks that run the recorded program */
  alive: number;
  /** what differs from the record */
  findings: readonly Finding[];
  /** packets that programs dropped at this interface, since it was attached */
  drops: bigint;
  /** in-pod contract: those of the proxy inside the pod; else [] */
  listeners: WantedListener[];
}

export type ListenerKind = 'outbound' | 'inboundPlaintext' | 'inboundHBONE';

/** A port that redirection wants, and what listens there. */
export interface WantedListener {
  kind: ListenerKind;
  port: number;
  ipv4: ListenerState;
  ipv6: ListenerState;
}

/** unknown: the proxy's namespace cannot be entered, or the kernel does not tell whether a listener is transparent. */
export type ListenerState = 'listening' | 'not transparent' | 'missing' | 'unknown';

export interface SurveyedProxy {
  record: ProxyRecord;
  /** null: the proxy's attachment is not recorded */
  attachment: Attachment | null;
  /** '' if not known */
  netnsPath: string;
  /** its namespace is the one that was recorded */
  present: boolean;
  listeners: WantedListener[];
}

export interface Problem {
  /** impaired: packets of an enrolled pod are lost, or leave it unproxied although they should not */
  severity: 'impaired' | 'warning';
  object: string;
  text: string;
}

export interface Survey {
  directories: Directories;
  kernel: string;
  settings: StateSettings;
  /** hook kind of what is attached, or of what would be */
  hook: 'tcx' | 'clsact' | 'mixed';
  attachments: Attachment[];
  proxies: SurveyedProxy[];
  maps: { map: string; entries: number; capacity: number; bytes: number }[];
  counters: Counter[];
  problems: Problem[];
}

/** null: there is no state. Throws CniError 103 or 104. */
export function survey(native: Native, directories: Directories): Survey | null {
  const state = openState(native, directories.stateDir);
  if (state === null) return null;
  try {
    const counters = native.counters(state);
    const attachments = native
      .listAttachments(state)
      .map((entry) => examine(native, state, directories, entry, counters))
      .sort((a, b) => (describePod(a.record) < describePod(b.record) ? -1 : 1));
    const proxies = native.getProxies(state).proxies.map((record) => examineProxy(native, record, attachments));
    return {
      directories,
      kernel: release(),
      settings: native.settings(state),
      hook: hookKind(native, attachments),
      attachments,
      proxies,
      maps: native.mapUsage(state),
      counters,
      problems: [
        ...attachments.flatMap((attachment) => attachmentProblems(attachment)),
        ...proxyProblems(native, attachments, proxies),
        ...inPodProblems(native, attachments, native.settings(state)),
        ...mapProblems(native, state),
      ],
    };
  } finally {
    native.closeState(state);
  }
}

/** Is it the reason of packets that did not go on: dropped, or answered with a RST? */
export function isRefusal(reason: string): boolean {
  return reason.startsWith('drop_') || reason.startsWith('reset_');
}

/** Counters of drops at an attachment's interface. */
function dropsAt(counters: readonly Counter[], ifindex: number): bigint {
  return counters
    .filter((counter) => counter.ifindex === ifindex && isRefusal(counter.reason))
    .reduce((sum, { packets }) => sum + packets, 0n);
}

function examine(
  native: Native,
  state: State,
  directories: Directories,
  { key, record }: { key: AttachmentKey; record: AttachmentRecord },
  counters: readonly Counter[],
): Attachment {
  const findings = verify(native, state, directories, key, record);
  const present = !findings.some(({ code }) => code === Code.SANDBOX_NOT_FOUND);
  const missing = findings.filter(({ code }) => code === Code.PROGRAM_MISSING).length;
  return {
    key: hex(key),
    record,
    present,
    alive: present ? record.hooks.length - missing : 0,
    findings,
    drops: dropsAt(counters, record.interfaceId),
    listeners: present && isInPod(record) ? listenersWithin(native, state, record) : [],
  };
}

/** Runs `body` with the attachment's namespace; undefined if it is gone or another one is at its path. */
function inRecordedNetns<T>(native: Native, record: AttachmentRecord, body: (netns: number) => T): T | undefined {
  let netns: number;
  try {
    netns = native.openNetns(record.netnsPath);
  } catch {
    return undefined;
  }
  try {
    const { ino, cookie } = native.netnsIdentity(netns);
    return ino === record.netns.ino && cookie === record.netns.cookie ? body(netns) : undefined;
  } finally {
    native.close(netns);
  }
}

function isInPod({ role, contract }: AttachmentRecord): boolean {
  return role === 'pod' && contract === 'in-pod';
}

/**
 * What the programs in the pod would find: listeners without the proxy's mark are nothing to them. [] for a pod whose
 * interface they do not know.
 */
export function listenersWithin(native: Native, state: State, record: AttachmentRecord): WantedListener[] {
  const ports = native.getInterface(state, record.interfaceId)?.ports;
  if (ports === undefined) return [];
  const listeners = inRecordedNetns(native, record, (netns) =>
    native.listeners(netns).filter(({ mark }) => mark === undefined || isProxyMark(mark)),
  );
  return wantedListeners(ports, listeners);
}

function wantedListeners(ports: ProxyRecord['ports'], listeners: readonly Listener[] | undefined): WantedListener[] {
  const wanted = (['outbound', 'inboundPlaintext', 'inboundHBONE'] as const).filter((kind) => ports[kind] !== 0);
  return wanted.map((kind) => ({
    kind,
    port: ports[kind],
    ipv4: listenerState(listeners, 4, ports[kind]),
    ipv6: listenerState(listeners, 6, ports[kind]),
  }));
}

function examineProxy(native: Native, record: ProxyRecord, attachments: readonly Attachment[]): SurveyedProxy {
  const attachment = attachments.find(({ key }) => key === hex(record.key)) ?? null;
  const listeners =
    attachment === null ? undefined : inRecordedNetns(native, attachment.record, (netns) => native.listeners(netns));
  return {
    record,
    attachment,
    netnsPath: attachment?.record.netnsPath ?? '',
    present: listeners !== undefined && attachment?.present === true,
    listeners: wantedListeners(record.ports, listeners),
  };
}

/** The programs ask for a listener at loopback: one that is bound to another address is not found. */
const REACHABLE: readonly string[] = ['0.0.0.0', '::', '127.0.0.1', '::1'];

export function listenerState(listeners: readonly Listener[] | undefined, family: 4 | 6, port: number): ListenerState {
  if (listeners === undefined) return 'unknown';
  const here = listeners.filter(
    (listener) =>
      listener.port === port &&
      REACHABLE.includes(listener.address) &&
      (listener.family === family || (family === 4 && !listener.v6only && listener.address === '::')),
  );
  if (here.length === 0) return 'missing';
  if (here.some(({ transparent }) => transparent === true)) return 'listening';
  return here.some(({ transparent }) => transparent === undefined) ? 'unknown' : 'not transparent';
}

function hookKind(native: Native, attachments: readonly Attachment[]): Survey['hook'] {
  const kinds = new Set(
    attachments.flatMap(({ record }) => record.hooks.map(({ kind }) => kind).filter((kind) => kind !== 'netns')),
  );
  const [only] = kinds;
  if (kinds.size > 1) return 'mixed';
  return only ?? (native.features().tcx ? 'tcx' : 'clsact');
}

function attachmentProblems({ record, present, findings }: Attachment): Problem[] {
  const object = describePod(record);
  if (record.role === 'none') return [];
  if (record.state === 'attaching') {
    return [
      {
        severity: 'warning',
        object,
        text: 'its ADD has not ended: it is running now, or was killed; DEL or GC removes what it left',
      },
    ];
  }
  if (!present) {
    const text = `interface ${record.hostIfname} (ifindex ${record.hostIfindex}) is not in this network namespace; the pod is gone and was never deleted, or this is not the node's namespace`;
    return [{ severity: 'warning', object, text }];
  }
  return findings.map(({ object: what, expected, found }) => ({
    severity: 'impaired',
    object,
    text: `${what}: expected ${expected}, found ${found}`,
  }));
}

/** SYNs of enrolled pods that find no listener, by kind and family. */
function proxyProblems(
  native: Native,
  attachments: readonly Attachment[],
  proxies: readonly SurveyedProxy[],
): Problem[] {
  const open = native.flags.INTERFACE_POLICY_OPEN ?? 0;
  const enrolled = attachments.filter(
    ({ record, present }) =>
      record.role === 'pod' &&
      record.contract === 'shared' &&
      record.state === 'attached' &&
      present &&
      !isDraining(native, record),
  );
  if (enrolled.length === 0) return [];
  const closed = enrolled.filter(({ record }) => (record.flags & open) === 0);
  const reset = native.flags.INTERFACE_CLOSED_RESET ?? 0;
  const action = closed.every(({ record }) => (record.flags & reset) !== 0) ? 'refused' : 'dropped';
  const consequence =
    closed.length > 0
      ? `new connections of ${count(closed.length, 'pod')} are ${action}`
      : 'new connections go direct (failurePolicy open)';
  const severity = closed.length > 0 ? 'impaired' : 'warning';

  const present = proxies.filter((proxy) => proxy.present);
  if (present.length === 0) {
    return [
      { severity, object: 'proxy', text: `${proxies.length === 0 ? 'there is none' : 'it is gone'}: ${consequence}` },
    ];
  }
  const problems: Problem[] = [];
  for (const family of [4, 6] as const) {
    if (!enrolled.some(({ record }) => record.addresses.some((address) => familyOf(address) === family))) continue;
    const key = family === 4 ? 'ipv4' : 'ipv6';
    for (const kind of ['outbound', 'inboundPlaintext', 'inboundHBONE'] as const) {
      const listeners = present.flatMap((proxy) => proxy.listeners.filter((listener) => listener.kind === kind));
      // A later proxy that does not listen yet leaves new connections to the one before it.
      const worst = listeners.some((listener) => listener[key] === 'listening' || listener[key] === 'unknown');
      const [newest] = listeners;
      if (worst || newest === undefined) continue;
      const found =
        newest[key] === 'missing'
          ? `no IPv${family} listener on port ${newest.port}`
          : `the IPv${family} listener on port ${newest.port} is not transparent`;
      problems.push({ severity, object: 'proxy', text: `${found} (${kind}): ${consequence}` });
    }
  }
  return problems;
}

/** Listeners that the programs would not find, or that cannot answer, in each pod that has its own proxy. */
function inPodProblems(native: Native, attachments: readonly Attachment[], settings: StateSettings): Problem[] {
  const open = native.flags.INTERFACE_POLICY_OPEN ?? 0;
  const pods = attachments.filter(
    ({ record, present }) => isInPod(record) && record.state === 'attached' && present && !isDraining(native, record),
  );
  const problems = pods.flatMap(({ record, listeners }): Problem[] => {
    const isOpen = (record.flags & open) !== 0;
    return ([4, 6] as const)
      .filter((family) => record.addresses.some((address) => familyOf(address) === family))
      .flatMap((family) => {
        const key = family === 4 ? 'ipv4' : 'ipv6';
        return listeners
          .filter((listener) => listener[key] === 'missing' || listener[key] === 'not transparent')
          .map(({ kind, port, [key]: state }): Problem => {
            const missing = state === 'missing';
            const found = missing
              ? `its proxy has no IPv${family} listener on port ${port}`
              : `its proxy's IPv${family} listener on port ${port} is not transparent`;
            // Without the option its answers have no way to whom the connection seemed to be to.
            const consequence = !missing
              ? 'connections that it takes are not answered'
              : isOpen
                ? 'new connections go direct (failurePolicy open)'
                : 'new connections are dropped';
            const severity = missing && isOpen ? 'warning' : 'impaired';
            return { severity, object: describePod(record), text: `${found} (${kind}): ${consequence}` };
          });
      });
  });
  if (pods.length === 0 || settings.checkCgroups) return problems;
  const text =
    "forgeable: who has CAP_NET_RAW in a pod can set the proxy's mark (0x539) and go past the proxy, as the mark's cgroup is not checked";
  return [...problems, { severity: 'warning', object: 'in-pod contract', text }];
}

function mapProblems(native: Native, state: State): Problem[] {
  return native
    .mapUsage(state)
    .filter(({ map, entries, capacity }) => PER_POD.includes(map) && entries / capacity > 0.8)
    .map(({ map, entries, capacity }) => ({
      severity: 'warning',
      object: `map ${map}`,
      text: `${entries} of ${capacity} entries in use; when it is full ADD fails with code 103 (key maxPods)`,
    }));
}

/** A full one makes ADD fail. The others are of one entry, or evict the oldest by design. */
const PER_POD: readonly string[] = ['attachments', 'interfaces', 'endpoints', 'direct'];

export function familyOf(address: Uint8Array): 4 | 6 {
  return formatAddress(address).includes(':') ? 6 : 4;
}

export function count(number: number, noun: string): string {
  return `${number} ${noun}${number === 1 ? '' : 's'}`;
}
