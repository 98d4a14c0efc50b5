// SPDX-License-Identifier: Apache-2.0
// The facts of one attachment as the kernel has them: the pod's interface, its peer on the node, their namespaces.

import { CniError, Code } from './cni/errors.ts';
import { HOST, type Link, type Native } from './native.ts';
import type { HostFacts, PeerFacts } from './redirect/plan.ts';
import { hasCode, kernelReason, stepError } from './state.ts';

/** Opens CNI_NETNS. Throws CniError 100 if it is gone or is no network namespace, 110 without the right to. */
export function openSandbox(native: Native, path: string): number {
  try {
    return native.openNetns(path);
  } catch (error) {
    throw stepError(Code.SANDBOX_NOT_FOUND, `open network namespace ${path}`, error);
  }
}

/**
 * A process id that was re-used makes CNI_NETNS name the plugin's own namespace (containernetworking/plugins issue
 * 714): the node's uplink would be taken for a pod's interface. Throws CniError 8.
 */
export function assertOtherNetns(native: Native, netns: number, path: string): void {
  const own = native.netnsIdentity(HOST);
  const { dev, ino } = native.netnsIdentity(netns);
  if (own.dev === dev && own.ino === ino) {
    throw new CniError(
      Code.OWN_NETNS,
      "CNI_NETNS is the plugin's own network namespace",
      `${path} is net:[${ino}], which the plugin runs in; nothing was changed`,
    );
  }
}

/** A pod's namespace that its caller keeps open, and the pod's interface in it. */
export interface Sandbox {
  netns: number;
  pod: Link;
}

/** Throws CniError 100 if the interface is not there. */
export function requireLink(native: Native, netns: number, path: string, ifname: string): Link {
  const link = native.linkByName(netns, ifname);
  if (link !== null) return link;
  throw new CniError(Code.SANDBOX_NOT_FOUND, `interface ${ifname} not found`, `there is none in ${path}`);
}

/** Throws CniError 100 if the interface has vanished. `host` is null where it has no veth peer in the plugin's namespace. */
export function readFacts(
  native: Native,
  { netns, pod }: Sandbox,
  path: string,
  ifname: string,
  shaped: boolean,
): HostFacts {
  try {
    const nsid = native.netnsId(netns, true);
    const host = peerOnNode(native, pod, nsid);
    return {
      pod,
      host,
      master: host === null || host.master === 0 ? null : native.linkByIndex(HOST, host.master),
      netns: native.netnsIdentity(netns),
      nsid,
      addresses: native.linkAddresses(netns, pod.ifindex),
      shaped:
        shaped || (host !== null && native.qdiscs(HOST, host.ifindex).some(({ kind }) => !UNSHAPED.includes(kind))),
    };
  } catch (error) {
    if (hasCode(error, 'ENODEV')) {
      throw new CniError(Code.SANDBOX_NOT_FOUND, `interface ${ifname} vanished`, kernelReason(error), { cause: error });
    }
    throw stepError(Code.SANDBOX_NOT_FOUND, `read interface ${ifname} in ${path}`, error);
  }
}

function peerOnNode(native: Native, pod: Link, nsid: number): Link | null {
  if (pod.kind !== 'veth' || pod.peerIfindex === 0) return null;
  const host = native.linkByIndex(HOST, pod.peerIfindex);
  // An index is only a number: the link of that index here must name the pod's interface as its peer in turn.
  const is = host !== null && host.kind === 'veth' && host.peerIfindex === pod.ifindex && host.peerNetnsId === nsid;
  return is ? host : null;
}

/** What the shared contract cannot do without. Throws CniError 101. */
export function requirePeer(native: Native, facts: HostFacts, path: string): PeerFacts {
  const { pod, host } = facts;
  if (host !== null) return { ...facts, host };
  const { name, kind } = pod;
  if (kind !== 'veth') {
    const device = kind === '' ? 'a device without a kind (host-device, tap)' : `a ${kind}`;
    throw noPeer(name, path, `${name} is ${device}, not a veth`);
  }
  const other = pod.peerIfindex === 0 ? null : native.linkByIndex(HOST, pod.peerIfindex);
  const found = other === null ? 'there is no such link' : `${other.name} there is a ${other.kind} with another peer`;
  throw noPeer(name, path, `the peer of ${name} has index ${pod.peerIfindex}; on the node ${found}`);
}

/** What a veth has without anybody's doing, and what classifies only. */
const UNSHAPED = ['noqueue', 'clsact', 'ingress', 'pfifo_fast', 'fq_codel', 'mq'];

function noPeer(ifname: string, path: string, reason: string): CniError {
  return new CniError(
    Code.NO_HOST_PEER,
    `interface ${ifname} in ${path} has no veth peer on the node`,
    `${reason}; the shared contract needs a primary plugin that makes a veth pair (ptp, bridge), the contract "in-pod" does not; a pod that must keep this interface can be left out of the mesh with the annotation ambient-redirect/enroll: "false"`,
  );
}
