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
  /** its peer in the namespace the plugin runs in */
  host: Link;
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

export interface PlannedHook {
  program: ProgramName;
  /** the host-side veth, the interface inside the pod's netns, or that namespace itself (socket lookup) */
  device: 'host' | 'pod' | 'netns';
  ifindex: number;
  direction: Direction;
}

export interface AttachPlan {
  hooks: PlannedHook[];
  /** map "interfaces" under the host-side index; null for the proxy, whose interface is not a pod's */
  interface: InterfaceRecord | null;
  /** map "endpoints" */
  addresses: Address[];
  /** map "exclusions" */
  exclusions: ExclusionRule[];
  flags: number;
}

type Flags = Native['flags'];

export function planPod(
  config: RedirectConfig,
  facts: HostFacts,
  resultAddresses: readonly Address[],
  strict: boolean,
  bypassInbound: boolean,
  flags: Flags,
): AttachPlan {
  const { outbound, inboundPlaintext, inboundHBONE } = config.proxy.ports;
  const wanted: [boolean, string][] = [
    [true, 'ENROLLED'],
    [strict, 'STRICT'],
    [config.failurePolicy === 'open', 'POLICY_OPEN'],
    [config.closedAction === 'reset', 'CLOSED_RESET'],
    [config.dnsCapture, 'DNS'],
    [facts.shaped, 'NO_PEER'],
    [outbound === 0, 'NO_OUTBOUND'],
    [inboundPlaintext === 0 || bypassInbound, 'NO_PLAINTEXT'],
    [inboundHBONE === 0 || bypassInbound, 'NO_HBONE'],
  ];
  let bits = 0;
  for (const [is, name] of wanted) {
    const bit = flags[`INTERFACE_${name}`];
    if (bit === undefined) throw new CniError(Code.INTERNAL, `the addon knows no interface flag ${name}`);
    if (is) bits |= bit;
  }
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
    },
    addresses: podAddresses(facts, resultAddresses),
    exclusions: exclusionRules(config.exclude),
    flags: bits,
  };
}

export function planProxy(facts: HostFacts): AttachPlan {
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

function isLinkLocal(address: Address): boolean {
  return address[0] === 0xfe && ((address[1] ?? 0) & 0xc0) === 0x80;
}
