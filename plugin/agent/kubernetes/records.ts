// SPDX-License-Identifier: Apache-2.0
// Attachments by the pod's UID. The plugin writes them too, from processes of its own, so an entry is only a hint where
// to look: what is returned was read from the map at that moment.

import { statSync } from 'node:fs';
import { join } from 'node:path';
import { hex } from '../../attachments.ts';
import { isUninstalled } from '../../install/entry.ts';
import type { AttachmentKey, AttachmentRecord, Native, State } from '../../native.ts';
import type { RedirectConfig } from '../../redirect/config.ts';
import { ensurePrograms, ensureState, supersededBy } from '../../state.ts';

export interface Attachment {
  key: AttachmentKey;
  record: AttachmentRecord;
}

/**
 * The pinned state, opened anew when it is not the one that it was: uninstall and install may run beside the agent, and
 * install puts larger maps in the place of these.
 */
export class PinnedState {
  readonly #native: Native;
  readonly #config: RedirectConfig;
  #opened: { state: State; ino: bigint; records: Records } | undefined;

  constructor(native: Native, config: RedirectConfig) {
    this.#native = native;
    this.#config = config;
  }

  /** Made if it is missing; null after uninstall. Throws CniError 7, 102, 103, 104, 110. */
  current(): { state: State; records: Records } | null {
    const native = this.#native;
    const { stateDir, runDir } = this.#config;
    // Larger maps come with settings of their own.
    const pin = join(stateDir, 'settings');
    const ino = statSync(pin, { bigint: true, throwIfNoEntry: false })?.ino;
    if (this.#opened !== undefined && this.#opened.ino === ino) return this.#opened;
    this.close();
    if (ino === undefined && isUninstalled(runDir)) return null;
    const state = ensureState(native, this.#config);
    // Here, so that the first pod need not wait for the verifier.
    if (supersededBy(native, state, stateDir) === null) ensurePrograms(native, state, this.#config);
    this.#opened = { state, ino: statSync(pin, { bigint: true }).ino, records: new Records(native, state) };
    return this.#opened;
  }

  close(): void {
    if (this.#opened !== undefined) this.#native.closeState(this.#opened.state);
    this.#opened = undefined;
  }
}

/** Reading all records again and again for pods that have none would cost the square of their number. */
const REREAD_MS = 100;

export class Records {
  readonly #native: Native;
  readonly #state: State;
  readonly #keys = new Map<string, Map<string, AttachmentKey>>();
  #readAt = Number.NEGATIVE_INFINITY;

  constructor(native: Native, state: State) {
    this.#native = native;
    this.#state = state;
  }

  /** Every attachment of the pod that the runtime knows by one of these UIDs. */
  of(uids: readonly string[]): Attachment[] {
    const known = this.#lookUp(uids);
    if (known.length > 0 || performance.now() - this.#readAt < REREAD_MS) return known;
    this.all();
    return this.#lookUp(uids);
  }

  all(): Attachment[] {
    const all = this.#native.listAttachments(this.#state);
    this.#keys.clear();
    for (const { key, record } of all) this.note(key, record);
    this.#readAt = performance.now();
    return all;
  }

  note(key: AttachmentKey, { podUid }: AttachmentRecord): void {
    if (podUid === '') return;
    const keys = this.#keys.get(podUid) ?? new Map<string, AttachmentKey>();
    keys.set(hex(key), key);
    this.#keys.set(podUid, keys);
  }

  #lookUp(uids: readonly string[]): Attachment[] {
    return uids.flatMap((uid) =>
      [...(this.#keys.get(uid)?.values() ?? [])].flatMap((key) => {
        const record = this.#native.getAttachment(this.#state, key);
        return record?.podUid === uid ? [{ key, record }] : [];
      }),
    );
  }
}
