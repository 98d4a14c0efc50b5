// SPDX-License-Identifier: Apache-2.0
// The list of proxies that the programs see: newest first, only those whose device still exists.

import { sameKey } from './attachments.ts';
import type { AttachmentKey, Native, ProxyRecord, State } from './native.ts';
import { HOST } from './native.ts';
import { locked } from './state.ts';

/** PROXY_SLOTS of bpf/redirect.h. */
const SLOTS = 4;

/**
 * The device is still there and leads where it did. Whoever makes a device may choose its index, and namespace ids come
 * again at once; the device's MAC is in the attachment's record.
 */
export function isAlive(native: Native, state: State, proxy: ProxyRecord): boolean {
  const host = native.linkByIndex(HOST, proxy.hostIfindex);
  if (host === null || host.peerIfindex !== proxy.podIfindex || host.peerNetnsId !== proxy.nsid) return false;
  const record = native.getAttachment(state, proxy.key);
  return record === null || record.hostMac === host.mac;
}

/** Puts `proxy` first; the same attachment's older entry and the dead are left out. */
export function addProxy(native: Native, state: State, runDir: string, proxy: ProxyRecord): void {
  change(native, state, runDir, (proxies) =>
    [proxy, ...proxies.filter((other) => !sameKey(other.key, proxy.key) && isAlive(native, state, other))].slice(
      0,
      SLOTS,
    ),
  );
}

export function removeProxy(native: Native, state: State, runDir: string, key: AttachmentKey): void {
  if (!native.getProxies(state).proxies.some((proxy) => sameKey(proxy.key, key))) return;
  change(native, state, runDir, (proxies) => proxies.filter((proxy) => !sameKey(proxy.key, key)));
}

/**
 * Takes out proxies whose device is gone. Every run of the plugin does it: namespace ids are re-used at once, and the
 * programs can tell a dead proxy by its device only.
 */
export function removeDeadProxies(native: Native, state: State, runDir: string): void {
  if (native.getProxies(state).proxies.every((proxy) => isAlive(native, state, proxy))) return;
  change(native, state, runDir, (proxies) => proxies.filter((proxy) => isAlive(native, state, proxy)));
}

function change(native: Native, state: State, runDir: string, edit: (proxies: ProxyRecord[]) => ProxyRecord[]): void {
  locked(native, runDir, () => {
    const { generation, proxies } = native.getProxies(state);
    native.putProxies(state, generation + 1, edit(proxies));
  });
}
