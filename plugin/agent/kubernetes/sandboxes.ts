// SPDX-License-Identifier: Apache-2.0
// Where a running pod's network namespace is, for pods that started before the plugin was in the chain or whose record
// is lost: asked of the container runtime, else looked up among the processes by the pod's UID in their cgroup. Either
// answer counts only if the namespace holds one of the pod's addresses and is not the host's: a process id that was
// re-used must not make us attach to a stranger.

import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { hex } from '../../attachments.ts';
import { parseAddress } from '../../cni/address.ts';
import { HOST, type Native } from '../../native.ts';
import { hasCode } from '../../state.ts';
import type { KubernetesPod } from './pods.ts';

/** A pod's sandbox as the runtime has it. */
export interface Sandbox {
  /** CNI_CONTAINERID of its ADD and DEL */
  containerId: string;
  netnsPath: string;
}

/** A container runtime that can be asked. */
export interface SandboxSource {
  /** Newest first. Throws if it does not answer. */
  sandboxesOf(uids: readonly string[]): Promise<Sandbox[]>;
}

/** Processes come and go; a thousand pods are not a thousand walks through /proc. */
const WALK_MS = 1_000;

interface Found {
  pid: number;
  started: bigint;
  containerId: string;
}

export class ProcessSandboxes implements SandboxSource {
  readonly #proc: string;
  #walkedAt = Number.NEGATIVE_INFINITY;
  #byUid = new Map<string, Found>();

  constructor(proc = '/proc') {
    this.#proc = proc;
  }

  async sandboxesOf(uids: readonly string[]): Promise<Sandbox[]> {
    if (performance.now() - this.#walkedAt > WALK_MS) this.#walk();
    return uids.flatMap((uid) => {
      const found = this.#byUid.get(uid);
      if (found === undefined) return [];
      return [{ containerId: found.containerId, netnsPath: join(this.#proc, String(found.pid), 'ns/net') }];
    });
  }

  #walk(): void {
    this.#byUid = new Map();
    for (const name of readdirSync(this.#proc)) {
      if (!/^[0-9]+$/.test(name)) continue;
      try {
        const place = podOfCgroup(readFileSync(join(this.#proc, name, 'cgroup'), 'latin1'));
        if (place === null) continue;
        const started = startTime(readFileSync(join(this.#proc, name, 'stat'), 'latin1'));
        const before = this.#byUid.get(place.uid);
        // The sandbox is the pod's first container; containers of its own may share other pods' namespaces.
        if (before !== undefined && before.started <= started) continue;
        this.#byUid.set(place.uid, { pid: Number(name), started, containerId: place.containerId });
      } catch {
        // It has ended meanwhile.
      }
    }
    this.#walkedAt = performance.now();
  }
}

/**
 * The pod's UID and the container's id in a path such as "/kubepods/burstable/pod<UID>/<ID>" or
 * "/kubepods.slice/kubepods-pod<UID with _>.slice/cri-containerd-<ID>.scope". null: no pod's process.
 */
export function podOfCgroup(text: string): { uid: string; containerId: string } | null {
  const match =
    /pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?\/(?:[a-z-]+[-:])?([0-9a-f]{64})/.exec(
      text,
    );
  const [, uid, containerId] = match ?? [];
  return uid === undefined || containerId === undefined ? null : { uid: uid.replaceAll('_', '-'), containerId };
}

/** Field 22 of /proc/PID/stat; the name in field 2 may hold anything. */
function startTime(stat: string): bigint {
  return BigInt(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? 0);
}

/** Why this is not the pod's namespace, or null if it is. */
export function mismatch(native: Native, path: string, pod: KubernetesPod, ifname: string): string | null {
  let netns: number;
  try {
    netns = native.openNetns(path);
  } catch (error) {
    return (error as Error).message;
  }
  try {
    const own = native.netnsIdentity(HOST);
    const { dev, ino } = native.netnsIdentity(netns);
    if (own.dev === dev && own.ino === ino) return `${path} is the host's network namespace`;
    const link = native.linkByName(netns, ifname);
    if (link === null) return `${path} has no ${ifname}`;
    const held = new Set(native.linkAddresses(netns, link.ifindex).map(({ address }) => hex(address)));
    if (pod.ips.some((ip) => held.has(hex(parseAddress(ip)?.bytes ?? new Uint8Array())))) return null;
    return `${path} has none of the pod's addresses (${pod.ips.join(', ') || 'none are known'})`;
  } catch (error) {
    if (hasCode(error, 'ENODEV')) return `${ifname} of ${path} is gone`;
    throw error;
  } finally {
    native.close(netns);
  }
}
