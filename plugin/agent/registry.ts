// SPDX-License-Identifier: Apache-2.0
// The pods that ztunnel is to serve, derived from the attachments in the pinned state. One pod may have several
// attachments (interfaces) in one namespace; the pod leaves when its last one does.

import type { NetnsIdentity } from '../native.ts';
import type { WorkloadNames } from '../zds/messages.ts';

/** Which namespace, and where it was last seen. */
export interface NetnsHandle extends NetnsIdentity {
  path: string;
}

/** One attachment as the registry needs it. */
export interface WorkloadAttachment {
  /** 64 hex digits */
  key: string;
  uid: string;
  names: WorkloadNames;
  netns: NetnsHandle;
}

export interface Workload {
  uid: string;
  names: WorkloadNames;
  netns: NetnsHandle;
  /** keys of its attachments in that namespace */
  attachments: ReadonlySet<string>;
}

/** What became of the pod: "new" also when its namespace or its names are other ones now. */
export type Change = 'new' | 'same';

export class WorkloadRegistry {
  readonly #workloads = new Map<string, Workload & { attachments: Set<string> }>();
  readonly #uids = new Map<string, string>();

  get size(): number {
    return this.#workloads.size;
  }

  get(uid: string): Workload | undefined {
    return this.#workloads.get(uid);
  }

  values(): Iterable<Workload> {
    return this.#workloads.values();
  }

  /** The uid under which an attachment is known. */
  uidOf(key: string): string | undefined {
    return this.#uids.get(key);
  }

  keys(): Iterable<string> {
    return this.#uids.keys();
  }

  /**
   * Adds an attachment or replaces what was known of it. Another namespace under the uid of a pod that is known means a
   * new sandbox: what belonged to the old one is forgotten.
   */
  put({ key, uid, names, netns }: WorkloadAttachment): Change {
    const before = this.#uids.get(key);
    if (before !== undefined && before !== uid) this.delete(key);
    const known = this.#workloads.get(uid);
    const sameNetns = known !== undefined && known.netns.dev === netns.dev && known.netns.ino === netns.ino;
    const same =
      sameNetns &&
      known.names.name === names.name &&
      known.names.namespace === names.namespace &&
      known.names.serviceAccount === names.serviceAccount;
    if (known !== undefined && !sameNetns) for (const old of known.attachments) this.#uids.delete(old);
    const attachments = sameNetns ? known.attachments : new Set<string>();
    attachments.add(key);
    this.#uids.set(key, uid);
    this.#workloads.set(uid, { uid, names, netns, attachments });
    return same ? 'same' : 'new';
  }

  /** The uid of the pod if it has left with this attachment. */
  delete(key: string): string | undefined {
    const uid = this.#uids.get(key);
    if (uid === undefined) return undefined;
    this.#uids.delete(key);
    const workload = this.#workloads.get(uid);
    if (workload === undefined) return undefined;
    workload.attachments.delete(key);
    if (workload.attachments.size > 0) return undefined;
    this.#workloads.delete(uid);
    return uid;
  }
}
