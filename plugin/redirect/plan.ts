// SPDX-License-Identifier: Apache-2.0
// From a decision and the kernel's facts to what has to be attached and recorded. Pure: no kernel call, no clock.

import { CniError, Code } from '../cni/errors.ts';
import type {
  Address,
  Direction,
  ExclusionRule,
  InterfaceRecord,
  Link,
  Native,
  NetnsIdentity,
  ProgramName,
} from '../native.ts';
import type { RedirectConfig } from './config.ts';
import { exclusionRules } from './exclusions.ts';
import { uniqueAddresses } from './sandbox.ts';

/** cls_bpf handle of every filter of ours; the place among other filters is the priority. */
export const FILTER_HANDLE = 0xa3b1;
export const FILTER_PRIORITY = 1;
/** FRA_PROTOCOL and rtm_protocol of our rules and routes: nobody else's, so that only ours are ever removed. */
export const ROUTE_PROTOCOL = 163;
/** Routing table in the proxy's netns; its one route makes every destination local. */
export const ROUTE_TABLE = 41905;
/** Before the main table (32766), behind rules that a proxy's image may bring itself. */
export const RULE_PRIORITY = 20000;
/** linux/rtnetlink.h */
const RT_SCOPE_LINK = 253;

export interface HostFacts {
  /** CNI_IFNAME inside CNI_NETNS */
  pod: Link;
  /** its peer in the namespace the plugin runs in; null: none, which only the in-pod contract can do with */
  host: Link | null;
  /** the bridge that `host` is a port of, or whatever other master it has; null if none */
  master: Link | null;
  netns: NetnsIdentity;
  /** id of the pod's netns as seen from the host's */
  nsid: number;
  /** as the kernel has them on `pod` */
  addresses: { address: Address; scope: number }[];
  /** somebody's queue on `host` (bandwidth), or the runtime announced one */
  shaped: boolean;
}

/** In the shared contract. */
export type PeerFacts = HostFacts & { host: Link };

export interface PlannedHook {
  program: ProgramName;
  /** the host-side veth, the interface inside the pod's netns, or that namespace itself (socket lookup) */
  device: 'host' | 'pod' | 'netns';
  ifindex: number;
  direction: Direction;
}

export interface AttachPlan {
  hooks: PlannedHook[];
  /** map "interfaces" under the interface id; null for the proxy, whose interface is not a pod's */
  interface: InterfaceRecord | null;
  /** map "endpoints" */
  addresses: Address[];
  /** map "exclusions" */
  exclusions: ExclusionRule[];
  flags: number;
}

type Flags = Native['flags'];

/** Of what podFlags() gives, the bits that a pod's own annotations change. */
export function wishedFlags(flags: Flags): number {
  return (flags.INTERFACE_DNS ?? 0) | (flags.INTERFACE_NO_PLAINTEXT ?? 0) | (flags.INTERFACE_NO_HBONE ?? 0);
}

/** Throws CniError 999. */
export function podFlags(
  config: RedirectConfig,
  shaped: boolean,
  strict: boolean,
  bypassInbound: boolean,
  flags: Flags,
): number {
  const { outbound, inboundPlaintext, inboundHBONE } = config.proxy.ports;
  const wanted: [boolean, string][] = [
    [true, 'ENROLLED'],
    [strict, 'STRICT'],
    [config.failurePolicy === 'open', 'POLICY_OPEN'],
    [config.closedAction === 'reset', 'CLOSED_RESET'],
    [config.dnsCapture, 'DNS'],
    [shaped, 'NO_PEER'],
    [outbound === 0, 'NO_OUTBOUND'],
    [inboundPlaintext === 0 || bypassInbound, 'NO_PLAINTEXT'],
    [inboundHBONE === 0 || bypassInbound, 'NO_HBONE'],
    [config.proxy.contract === 'in-pod', 'IN_POD'],
  ];
  let bits = 0;
  for (const [is, name] of wanted) {
    const bit = flags[`INTERFACE_${name}`];
    if (bit === undefined) throw new CniError(Code.INTERNAL, `the addon knows no interface flag ${name}`);
    if (is) bits |= bit;
  }
  return bits;
}

export function planPod(
  config: RedirectConfig,
  facts: PeerFacts,
  resultAddresses: readonly Address[],
  strict: boolean,
  bypassInbound: boolean,
  flags: Flags,
): AttachPlan {
  const bits = podFlags(config, facts.shaped, strict, bypassInbound, flags);
  return {
    hooks: [
      { program: 'pod_egress', device: 'host', ifindex: facts.host.ifindex, direction: 'ingress' },
      { program: 'pod_ingress', device: 'host', ifindex: facts.host.ifindex, direction: 'egress' },
    ],
    interface: {
      podMac: facts.pod.mac,
      // On a bridge the pod's frames for the node are addressed to the bridge, else to the veth itself.
      gatewayMac: facts.master?.kind === 'bridge' ? facts.master.mac : facts.host.mac,
      flags: bits,
      podIfindex: facts.pod.ifindex,
      nsid: facts.nsid,
      master: facts.host.master,
      ports: { outbound: 0, inboundPlaintext: 0, inboundHBONE: 0, dns: 0 },
      address4: NO_ADDRESS,
      address6: NO_ADDRESS,
    },
    addresses: podAddresses(facts, resultAddresses),
    exclusions: exclusionRules(config.exclude),
    flags: bits,
  };
}

const NO_ADDRESS = new Uint8Array(16);

/** The proxy listens inside the pod's own namespace. Without a host-side peer nothing is attached outside it. */
export function planInPod(
  config: RedirectConfig,
  facts: HostFacts,
  resultAddresses: readonly Address[],
  strict: boolean,
  bypassInbound: boolean,
  flags: Flags,
): AttachPlan {
  const { pod, host } = facts;
  // Nothing is redirected around the host-side veth's queue.
  const bits = podFlags(config, false, strict, bypassInbound, flags);
  const addresses = podAddresses(facts, resultAddresses);
  return {
    hooks: [
      // What names the listener comes before what needs it, and the guard after what it checks.
      { program: 'inpod_lookup', device: 'netns', ifindex: 0, direction: 'ingress' },
      { program: 'inpod_ingress', device: 'pod', ifindex: pod.ifindex, direction: 'ingress' },
      { program: 'inpod_egress', device: 'pod', ifindex: pod.ifindex, direction: 'egress' },
      ...(host === null ? [] : hostSide(host)),
    ],
    interface: {
      podMac: pod.mac,
      gatewayMac: facts.master?.kind === 'bridge' ? facts.master.mac : (host?.mac ?? '00:00:00:00:00:00'),
      flags: bits,
      podIfindex: pod.ifindex,
      nsid: facts.nsid,
      master: host?.master ?? 0,
      ports: config.proxy.ports,
      address4: addresses.find(isMapped) ?? NO_ADDRESS,
      address6: addresses.find((address) => !isMapped(address)) ?? NO_ADDRESS,
    },
    addresses,
    exclusions: exclusionRules(config.exclude),
    flags: bits,
  };
}

function hostSide({ ifindex }: Link): PlannedHook[] {
  return [
    { program: 'inpod_sign', device: 'host', ifindex, direction: 'egress' },
    { program: 'inpod_guard', device: 'host', ifindex, direction: 'ingress' },
  ];
}

export function planProxy(facts: PeerFacts): AttachPlan {
  return {
    hooks: [
      // Inside first: as soon as the proxy is listed, pods send it frames that only this program understands.
      { program: 'proxy_ingress', device: 'pod', ifindex: facts.pod.ifindex, direction: 'ingress' },
      { program: 'proxy_lookup', device: 'netns', ifindex: 0, direction: 'ingress' },
      { program: 'proxy_guard', device: 'host', ifindex: facts.host.ifindex, direction: 'egress' },
      { program: 'proxy_egress', device: 'host', ifindex: facts.host.ifindex, direction: 'ingress' },
    ],
    interface: null,
    addresses: [],
    exclusions: [],
    flags: 0,
  };
}

/** What the runtime was told and what the kernel has. Link-local addresses may repeat from pod to pod and are no keys. */
function podAddresses(facts: HostFacts, resultAddresses: readonly Address[]): Address[] {
  const kernel = facts.addresses.filter(({ scope }) => scope < RT_SCOPE_LINK).map(({ address }) => address);
  return uniqueAddresses([...resultAddresses, ...kernel]).filter((address) => !isLinkLocal(address));
}

function isMapped(address: Address): boolean {
  return address.subarray(0, 10).every((byte) => byte === 0) && address[10] === 0xff && address[11] === 0xff;
}

function isLinkLocal(address: Address): boolean {
  return address[0] === 0xfe && ((address[1] ?? 0) & 0xc0) === 0x80;
}
