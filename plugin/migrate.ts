// SPDX-License-Identifier: Apache-2.0
// An upgrade: the pinned programs of another build are replaced by this one's where they are attached, and maps that are
// too small for "maxPods", "maxFlows" or "directFlowsPerPod" by larger ones, while pods run. Alone on the node (state.ts, "alone"): ADD, DEL and GC wait.
//
// Programs know their maps for ever, so larger maps need programs of their own. What becomes larger is made beside the
// old, in stateDir/next: maps, then programs; then next/complete says that all of it is there. From there on it is only
// carried further, by this run or the next one: records are copied, link after link gets the new program, then the pins
// take the old ones' places, then next/complete goes. Before it, next is thrown away. Maps that do not grow are the same
// ones before and after, those of the stubs' jumps among them. Flows through the proxy are in both maps while programs
// are replaced, so that it does not matter in which order those of one flow are; one that begins between the two copies
// is known by its sockets until then.
//
// Another layout needs a converter (from LAYOUT_VERSION 3 on; none before was released). There is none yet, because no
// layout came after it: openState() refuses any other with code 104.

import { existsSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';
import { hex, linkPin } from './attachments.ts';
import { CniError, Code } from './cni/errors.ts';
import { filterName, inOwnNetns, isSameHostLink } from './datapath.ts';
import { isStubbed } from './in-pod.ts';
import type { AttachmentKey, AttachmentRecord, Capacity, HookRecord, Native, State } from './native.ts';
import { HOST } from './native.ts';
import {
  alone,
  type Directories,
  hasCode,
  knownStateDirs,
  nextDirectory,
  openState,
  programTag,
  stepError,
} from './state.ts';

/** Room for fewer than there is now, or 0, means what there is. */
export interface WantedCapacity extends Directories, Capacity {}

export interface Migrated {
  /** attachments whose programs were replaced */
  attachments: number;
  /** what there is room for now, if any of it is more than before */
  capacity?: Capacity;
}

/** The pinned program that tells by being there that all are (native.loadPrograms). */
const LAST_PROGRAM = 'proxy_ingress';

/**
 * Brings a state directory to this build's programs, and to the room wanted if it has less. Does nothing where there
 * is none, or nothing to do. Each `step` is done when it is told. Throws CniError 103, 104 or 110.
 */
export function migrateState(
  native: Native,
  wanted: WantedCapacity,
  step: (name: string) => void = () => {},
): Migrated {
  const { stateDir, runDir } = wanted;
  const migrated: Migrated = { attachments: 0 };
  if (!existsSync(stateDir)) return migrated;
  return alone(native, runDir, () => {
    try {
      const migration = new Migration(native, stateDir, step, migrated);
      migration.resume();
      migration.run(wanted);
      return migrated;
    } catch (error) {
      throw stepError(Code.STATE_FAILED, `migrate the state in ${stateDir}`, error);
    }
  });
}

export const NO_CAPACITY: Capacity = { maxPods: 0, maxFlows: 0, directFlowsPerPod: 0 };

/** The same for every state directory that is in use; larger becomes the one that is wanted. By directory. */
export function migrateAll(native: Native, wanted: WantedCapacity): Map<string, Migrated> {
  const { stateDir, runDir } = wanted;
  const others = knownStateDirs(runDir).filter((dir) => dir !== stateDir);
  return new Map([
    [stateDir, migrateState(native, wanted)],
    ...others.map((dir) => [dir, migrateState(native, { ...NO_CAPACITY, stateDir: dir, runDir })] as const),
  ]);
}

const SIZES = ['maxPods', 'maxFlows', 'directFlowsPerPod'] as const;

class Migration {
  readonly #native: Native;
  readonly #stateDir: string;
  readonly #next: string;
  readonly #complete: string;
  readonly #step: (name: string) => void;
  readonly #migrated: Migrated;

  constructor(native: Native, stateDir: string, step: (name: string) => void, migrated: Migrated) {
    this.#native = native;
    this.#stateDir = stateDir;
    this.#next = nextDirectory(stateDir);
    this.#complete = join(this.#next, 'complete');
    this.#step = step;
    this.#migrated = migrated;
  }

  /** Finishes or undoes what an earlier run left. */
  resume(): void {
    if (existsSync(this.#complete)) this.#carryOver();
    else this.#remove(this.#next);
  }

  run(wanted: Capacity): void {
    const native = this.#native;
    const state = openState(native, this.#stateDir);
    if (state === null) return;
    try {
      const settings = native.settings(state);
      const tag = programTag(native, settings);
      const larger = {
        maxPods: Math.max(wanted.maxPods, settings.maxPods),
        maxFlows: Math.max(wanted.maxFlows, settings.maxFlows),
        directFlowsPerPod: Math.max(wanted.directFlowsPerPod, settings.directFlowsPerPod),
      };
      if (SIZES.some((size) => larger[size] > settings[size])) {
        this.#prepare(state, tag, larger);
        this.#carryOver();
      } else {
        this.#replacePrograms(state, tag);
      }
    } finally {
      native.closeState(state);
    }
  }

  // ---- the same maps -----------------------------------------------------------------------------------------------

  #replacePrograms(state: State, tag: string): void {
    const native = this.#native;
    const programs = join(this.#stateDir, 'programs');
    const directory = join(programs, tag);
    const present = list(programs);
    // The first ADD loads them.
    if (present.length === 0) return;
    if (!existsSync(join(directory, LAST_PROGRAM))) {
      native.loadIdlePrograms(state, this.#stateDir, tag);
      this.#step('programs loaded');
    }
    this.#jump(state, directory);
    for (const { key, record } of native.listAttachments(state)) this.#switch(state, key, record, directory, tag);
    this.#removeOtherPrograms(tag);
  }

  /** Stubs inside pods stay; where they go on to is the same for all. */
  #jump(state: State, directory: string): void {
    const native = this.#native;
    const places = ['inpod_egress', 'inpod_ingress', 'inpod_lookup'] as const;
    if (places.every((name) => native.jumpTarget(state, name) === this.#programId(join(directory, name)))) return;
    native.jumpToPrograms(state, directory);
    this.#step('stubs switched');
  }

  /** Replaces the programs of one attachment, then writes down which they are. */
  #switch(state: State, key: AttachmentKey, record: AttachmentRecord, directory: string, tag: string): void {
    if (record.hooks.length === 0) return;
    const hooks = record.hooks.map((hook) => {
      if (isStubbed(hook)) return hook;
      const programId = this.#replace(key, record, hook, join(directory, hook.program));
      return programId === null ? hook : { ...hook, programId };
    });
    const same = hooks.every((hook, index) => hook.programId === record.hooks[index]?.programId);
    if (same && record.programTag === tag) return;
    this.#step(`switched ${hex(key)}`);
    this.#native.putAttachment(state, key, { ...record, hooks, programTag: tag });
    this.#migrated.attachments += 1;
    this.#step(`recorded ${hex(key)}`);
  }

  /** The id of what is there now; null: nothing of ours, which a repair will find. */
  #replace(key: AttachmentKey, record: AttachmentRecord, hook: HookRecord, pin: string): number | null {
    const native = this.#native;
    let program: number;
    try {
      program = native.openProgram(pin);
    } catch (error) {
      if (hasCode(error, 'ENOENT')) return null;
      throw error;
    }
    try {
      const { id } = native.programInfo(program);
      if (hook.kind === 'clsact') return this.#replaceFilter(record, hook, program, id);
      const link = linkPin(this.#stateDir, key, hook.program);
      const present = native.linkInfo(link);
      if (present === null) return null;
      if (present.programId !== id) native.updateLink(link, program);
      return id;
    } catch (error) {
      // Its device is gone.
      if (hasCode(error, 'ENOLINK', 'ENODEV')) return null;
      throw error;
    } finally {
      native.close(program);
    }
  }

  #replaceFilter(record: AttachmentRecord, hook: HookRecord, program: number, id: number): number | null {
    const native = this.#native;
    let found: number | null = null;
    const replace = (netns: number) => {
      const { ifindex, direction, priority, handle } = hook;
      const name = filterName(hook);
      const own = native
        .filters(netns, ifindex, direction)
        .find((filter) => filter.priority === priority && filter.handle === handle && filter.name === name);
      if (own === undefined) return;
      if (own.programId !== id) {
        // cls_bpf swaps the program of a filter in place.
        native.attachFilter(netns, ifindex, direction, program, { priority, handle, name, replace: true });
      }
      found = id;
    };
    if (hook.inNetns) inOwnNetns(native, record, replace);
    else if (isSameHostLink(native, record)) replace(HOST);
    return found;
  }

  // ---- larger maps -------------------------------------------------------------------------------------------------

  /** Makes stateDir/next, to its last pin. */
  #prepare(state: State, tag: string, larger: Capacity): void {
    const native = this.#native;
    native.makeDirectory(this.#next, 0o700);
    native.growState(state, this.#next, larger);
    this.#step('maps made');
    const grown = native.openStateOver(this.#stateDir, this.#next);
    try {
      native.loadIdlePrograms(grown, this.#next, tag);
    } finally {
      native.closeState(grown);
    }
    this.#step('programs loaded');
    native.makeDirectory(this.#complete, 0o700);
    this.#step('complete');
  }

  /** From a complete stateDir/next to its end, wherever an earlier run came to. */
  #carryOver(): void {
    const native = this.#native;
    const from = openState(native, this.#stateDir);
    if (from === null)
      throw new CniError(Code.STATE_FAILED, `${this.#next} is there, and ${this.#stateDir} has no maps`);
    try {
      const to = native.openStateOver(this.#stateDir, this.#next);
      try {
        const [tag] = list(join(this.#next, 'programs'));
        // Its programs are gone from there when they are all in their places.
        if (tag !== undefined) this.#switchAll(from, to, tag);
        this.#swap();
        native.writeCapacity(to);
        this.#step('capacity written');
      } finally {
        native.closeState(to);
      }
    } finally {
      native.closeState(from);
    }
    native.removeDirectory(this.#complete);
    this.#step('not complete any more');
    this.#remove(this.#next);
    const now = native.openState(this.#stateDir);
    const { maxPods, maxFlows, directFlowsPerPod } = native.settings(now);
    this.#migrated.capacity = { maxPods, maxFlows, directFlowsPerPod };
    native.closeState(now);
  }

  #switchAll(from: State, to: State, tag: string): void {
    const native = this.#native;
    const directory = join(this.#next, 'programs', tag);
    native.copyRecords(from, to);
    native.copyFlows(from, to);
    this.#step('records copied');
    const attachments = native.listAttachments(to).filter(({ record }) => record.hooks.length > 0);
    const pods = attachments.filter(({ record }) => record.role === 'pod');
    // All at once by one jump: what they have counted, and whom they let go direct, is there before it.
    for (const { record } of pods.filter(({ record }) => record.contract === 'in-pod')) {
      native.copyTraffic(from, to, record.interfaceId);
      this.#bringDirectFlows(from, to, record.interfaceId, directory);
    }
    this.#jump(to, directory);
    // What programs inside a proxy's namespace count has no interface of the node's.
    native.copyTraffic(from, to, 0);
    for (const { key, record } of attachments) {
      // As late as can be: what the old programs write after it is not there for the new ones until it is brought.
      native.copyTraffic(from, to, record.interfaceId);
      if (record.role === 'pod') this.#bringDirectFlows(from, to, record.interfaceId, directory);
      this.#switch(to, key, record, directory, tag);
      if (record.role === 'pod') this.#bringDirectFlows(from, to, record.interfaceId, directory);
    }
    // What was running when it was replaced may still have put one in.
    native.waitForPrograms();
    native.copyFlows(from, to);
    for (const { record } of pods) this.#bringDirectFlows(from, to, record.interfaceId, directory);
    this.#forgetOthers(to, new Set(attachments.map(({ record }) => record.interfaceId)));
    this.#step('programs switched');
  }

  /** Flows that the old programs let go direct after they were copied, or that are in other sets now. */
  #bringDirectFlows(from: State, to: State, id: number, directory: string): void {
    const native = this.#native;
    const text = (flow: ReturnType<Native['directFlows']>[number]) =>
      `${hex(flow.source)} ${flow.sourcePort} ${hex(flow.destination)} ${flow.destinationPort}`;
    const known = new Set(native.directFlows(to, id).map(text));
    const late = native.directFlows(from, id).filter((flow) => !known.has(text(flow)));
    if (late.length === 0) return;
    const pin = join(directory, 'direct_import');
    // An earlier run may have come as far as to rename it.
    const renamed = join(this.#stateDir, 'programs', basename(directory), 'direct_import');
    const program = native.openProgram(existsSync(pin) ? pin : renamed);
    try {
      for (const flow of late) native.importDirectFlow(program, id, flow);
    } finally {
      native.close(program);
    }
  }

  /** Of pods that were deleted after an earlier run had copied theirs. */
  #forgetOthers(to: State, ids: ReadonlySet<number>): void {
    const native = this.#native;
    for (const id of native.listDirectFlows(to)) if (!ids.has(id)) native.deleteDirectFlows(to, id);
    const counted = new Set(native.counters(to).map(({ ifindex }) => ifindex));
    for (const id of counted) if (id !== 0 && !ids.has(id)) native.deleteCounters(to, id);
  }

  /** Renames pin after pin; each one that is still in next has not been. */
  #swap(): void {
    const native = this.#native;
    for (const tag of list(join(this.#next, 'programs'))) {
      const target = join(this.#stateDir, 'programs', tag);
      native.makeDirectory(join(this.#stateDir, 'programs'), 0o700);
      native.makeDirectory(target, 0o700);
      for (const name of list(join(this.#next, 'programs', tag))) {
        native.renameFile(join(this.#next, 'programs', tag, name), join(target, name));
        this.#step(`renamed ${name}`);
      }
      this.#removeOtherPrograms(tag);
      native.removeDirectory(join(this.#next, 'programs', tag));
    }
    for (const name of list(this.#next)) {
      if (name === 'complete' || name === 'programs') continue;
      native.renameFile(join(this.#next, name), join(this.#stateDir, name));
      this.#step(`renamed ${name}`);
    }
  }

  // ---- pins --------------------------------------------------------------------------------------------------------

  /** What is attached holds its program by itself. */
  #removeOtherPrograms(tag: string): void {
    const programs = join(this.#stateDir, 'programs');
    for (const other of list(programs)) {
      if (other === tag) continue;
      this.#remove(join(programs, other));
      this.#step(`removed ${other}`);
    }
  }

  /** The last ones first: whoever looks for the program that tells that all are there does not find it. */
  #remove(directory: string): void {
    if (!existsSync(directory)) return;
    for (const entry of readdirSync(directory, { withFileTypes: true })) {
      const path = join(directory, entry.name);
      if (entry.isDirectory()) this.#remove(path);
      else this.#native.removeFile(path);
    }
    this.#native.removeDirectory(directory);
  }

  #programId(pin: string): number {
    const native = this.#native;
    if (!existsSync(pin)) return 0;
    const program = native.openProgram(pin);
    try {
      return native.programInfo(program).id;
    } finally {
      native.close(program);
    }
  }
}

function list(directory: string): string[] {
  return existsSync(directory) ? readdirSync(directory) : [];
}
