// SPDX-License-Identifier: Apache-2.0
// What native/topology.cc exports: throw-away network namespaces for `demo`. No CNI verb uses it.
//
// As in plugin/native.ts: `netns` is a descriptor of openNetns() or HOST, failing kernel calls throw NativeError, wrong
// arguments TypeError, and the calling thread is back in its own namespace afterwards. Addresses are text; prefix
// lengths are of the address's own family.

import type { Native } from '../native.ts';

export interface NativeTopology {
  /** unshare(CLONE_NEWNET), kept alive by a bind mount on `path`, which must not exist (EEXIST). */
  createNetns(path: string): void;
  /** Unmounts and unlinks; the namespace goes with its last process, socket or descriptor. False if it was not there. */
  deleteNetns(path: string): boolean;
  /** umount2(2), not lazily: EBUSY if something is open there. */
  unmount(path: string): void;
  /**
   * Runs `callback` with the calling thread in `netns`. Synchronous calls act there: child_process.spawn() forks into
   * it, node:fs sees its /proc/sys/net. What libuv does on its worker threads does not.
   */
  inNetns<T>(netns: number, callback: () => T): T;
  /** A veth pair, both ends up. */
  createVeth(netns: number, name: string, peerNetns: number, peerName: string): void;
  setLinkUp(netns: number, name: string): void;
  /** False if there is no such link. */
  deleteLink(netns: number, name: string): boolean;
  /** IPv6 without duplicate address detection, so that the address is usable at once. */
  addAddress(netns: number, ifname: string, address: string, prefix: number): void;
  /** Through `gateway`, which need not be on a subnet of the interface, or directly with null. */
  addRoute(netns: number, ifname: string, destination: string, prefix: number, gateway: string | null): void;
}

/** The addon with the functions that only the demo needs. */
export type DemoNative = Native & NativeTopology;
