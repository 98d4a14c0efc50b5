// SPDX-License-Identifier: Apache-2.0
// `trace`: what the programs decide, packet by packet, as they decide it. The filter works in the kernel, and what
// nobody asks for is not reported at all.

import { join } from 'node:path';
import { formatAddress } from '../cni/address.ts';
import { CniError, Code } from '../cni/errors.ts';
import { describePod } from '../datapath.ts';
import type { AttachmentRecord, Native, State, TraceEvent } from '../native.ts';
import { type Directories, hasCode, openState } from '../state.ts';
import { count } from './survey.ts';
import { printable, type Terminal } from './terminal.ts';

export interface TraceOptions {
  /** "NAMESPACE/NAME": only this pod's packets; what happens inside the proxy belongs to no pod */
  pod?: string;
  reason?: string;
  /** ends after that many */
  count?: number;
  output: 'text' | 'json';
}

/** Ends by `count`, SIGINT or SIGTERM. Throws CniError 7, 103 or 104. */
export async function trace(
  native: Native,
  terminal: Terminal,
  directories: Directories,
  options: TraceOptions,
): Promise<0> {
  const { reason = null } = options;
  if (reason !== null && native.reasons[reason] === undefined) {
    const known = Object.keys(native.reasons).join(', ');
    throw new CniError(Code.INVALID_NETWORK_CONFIG, `no such reason "${reason}"`, `there are ${known}`);
  }
  const state = openState(native, directories.stateDir);
  if (state === null) {
    throw new CniError(Code.STATE_FAILED, 'nothing to trace', `there is no state in ${directories.stateDir}`);
  }
  let lock: number | undefined;
  try {
    lock = onlyReader(native, directories);
    await follow(native, state, terminal, options, interfacesOf(native, state, options.pod));
    return 0;
  } finally {
    if (lock !== undefined) native.close(lock);
    native.closeState(state);
  }
}

/** Two readers of one ring buffer would take events from each other. */
function onlyReader(native: Native, { runDir }: Directories): number {
  const path = join(runDir, 'trace.lock');
  try {
    return native.lockFile(path, 0);
  } catch (error) {
    if (!hasCode(error, 'ETIMEDOUT')) throw error;
    throw new CniError(Code.TRY_AGAIN_LATER, 'another trace is running', `it holds ${path}`, { cause: error });
  }
}

/** Owners by host-side index; with a pod its own only. Throws CniError 7 if it has none. */
function interfacesOf(native: Native, state: State, pod: string | undefined): Map<number, AttachmentRecord> {
  const attached = native.listAttachments(state).filter(({ record }) => record.state !== 'recorded');
  const owners = new Map(attached.map(({ record }) => [record.interfaceId, record]));
  if (pod === undefined) return owners;
  const own = new Map([...owners].filter(([, record]) => describePod(record) === pod));
  if (own.size === 0) {
    throw new CniError(Code.INVALID_NETWORK_CONFIG, `${pod} is not enrolled`, 'its packets meet no program');
  }
  return own;
}

async function follow(
  native: Native,
  state: State,
  terminal: Terminal,
  { pod, reason, count: limit = Number.POSITIVE_INFINITY, output }: TraceOptions,
  owners: ReadonlyMap<number, AttachmentRecord>,
): Promise<void> {
  const [only] = pod !== undefined && owners.size === 1 ? owners.keys() : [];
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  let shown = 0;
  let lost = 0;
  const tellLost = () => {
    const now = native.getTrace(state).lost;
    if (now > lost) terminal.err(`${count(now - lost, 'event')} lost: they came faster than they could be written\n`);
    lost = now;
  };
  const show = (event: TraceEvent) => {
    // Of several interfaces of one pod the kernel can tell one.
    if (pod !== undefined && !owners.has(event.ifindex)) return;
    if (shown >= limit) return;
    shown++;
    const owner = owners.get(event.ifindex);
    terminal.out(output === 'json' ? `${JSON.stringify(document(event, owner))}\n` : sentence(event, owner));
  };
  const stop = native.followEvents(state, (events) => {
    try {
      for (const event of events) show(event);
      tellLost();
      if (shown >= limit) resolve();
    } catch (error) {
      reject(error);
    }
  });
  const end = () => resolve();
  // Also when the reader of stdout has had enough, which ends the process.
  const off = () => native.setTrace(state, null);
  process.on('SIGINT', end).on('SIGTERM', end).on('exit', off);
  try {
    native.setTrace(state, { ifindex: only ?? 0, reason: reason ?? null });
    await promise;
    tellLost();
  } finally {
    off();
    stop();
    process.off('SIGINT', end).off('SIGTERM', end).off('exit', off);
  }
}

/** Nanoseconds since 1970 of an event's monotonic time. */
function wallClock(time: bigint): bigint {
  return BigInt(Date.now()) * 1_000_000n - (process.hrtime.bigint() - time);
}

function document(event: TraceEvent, owner: AttachmentRecord | undefined): unknown {
  const parsed = event.family !== 0;
  return {
    time: timestamp(event.time),
    namespace: owner?.podNamespace ?? '',
    pod: owner === undefined ? '' : owner.podName || owner.containerId,
    ifindex: event.ifindex,
    program: event.program,
    reason: event.reason,
    bytes: event.length,
    ...(parsed && {
      protocol: PROTOCOLS[event.protocol] ?? String(event.protocol),
      source: formatAddress(event.source),
      sourcePort: event.sourcePort,
      destination: formatAddress(event.destination),
      destinationPort: event.destinationPort,
      flags: flagWords(event.flags),
    }),
  };
}

/** RFC 3339 with microseconds. */
function timestamp(time: bigint): string {
  const nanoseconds = wallClock(time);
  const seconds = new Date(Number(nanoseconds / 1_000_000n)).toISOString().slice(0, 19);
  return `${seconds}.${String((nanoseconds / 1000n) % 1_000_000n).padStart(6, '0')}Z`;
}

/** linux/in.h */
const PROTOCOLS: Record<number, string> = { 1: 'ICMP', 6: 'TCP', 17: 'UDP', 58: 'ICMPv6' };

const FLAGS = ['FIN', 'SYN', 'RST', 'PSH', 'ACK', 'URG', 'ECE', 'CWR'];

function flagWords(flags: number): string[] {
  return FLAGS.filter((_, bit) => (flags & (1 << bit)) !== 0);
}

/** Which way the packet goes, as seen from whose it is. */
const DIRECTIONS: Record<TraceEvent['program'], string> = {
  pod_egress: 'from',
  pod_ingress: 'to',
  proxy_egress: 'from proxy',
  proxy_guard: 'to proxy',
  proxy_ingress: 'inside the proxy',
  proxy_lookup: 'inside the proxy',
  inpod_egress: 'from',
  inpod_ingress: 'to',
  inpod_lookup: 'to',
  inpod_sign: 'from the host to',
  inpod_guard: 'past the programs of',
};

/** "12:34:56.789012 from default/web: TCP 10.0.0.2:40000 > 10.0.0.3:80 SYN, 74 bytes: redirected_outbound by pod_egress" */
export function sentence(event: TraceEvent, owner: AttachmentRecord | undefined): string {
  const whose =
    owner === undefined ? (event.ifindex === 0 ? '' : ` ifindex ${event.ifindex}`) : ` ${describePod(owner)}`;
  const time = timestamp(event.time).slice(11, -1);
  return `${time} ${DIRECTIONS[event.program]}${printable(whose)}: ${packet(event)}, ${event.length} bytes: ${event.reason} by ${event.program}\n`;
}

function packet(event: TraceEvent): string {
  if (event.family === 0)
    return event.reason === 'pass_not_tcp' ? 'a packet that is not TCP' : 'a frame that was not parsed';
  const end = (address: Uint8Array, port: number) => {
    const text = formatAddress(address);
    return port === 0 ? text : text.includes(':') ? `[${text}]:${port}` : `${text}:${port}`;
  };
  const flags = event.protocol === 6 ? [...flagWords(event.flags)].join(' ') : '';
  const ends = `${end(event.source, event.sourcePort)} > ${end(event.destination, event.destinationPort)}`;
  return [PROTOCOLS[event.protocol] ?? `protocol ${event.protocol}`, ends, flags]
    .filter((part) => part !== '')
    .join(' ');
}
