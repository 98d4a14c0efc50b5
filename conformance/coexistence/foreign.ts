// SPDX-License-Identifier: Apache-2.0
//
// Programs of somebody else on a pod's interface, host-side or inside, put there with tc(8) or as TCX links.

import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import type { Native } from '../../plugin/native.ts';
import { must, type Namespace, type Testbed } from '../netns.ts';

const directions = ['ingress', 'egress'] as const;
export type ForeignProgram = 'foreign_pass' | 'foreign_ok';

export class Foreign {
  readonly #native: Native = loadNative();
  readonly #namespace: Namespace;
  readonly #directory: string;
  #links = 0;

  /** Compiles and loads them; `bpffs` gets a directory "foreign" with their pins. */
  constructor(testbed: Testbed, namespace: Namespace, bpffs: string) {
    this.#namespace = namespace;
    this.#directory = join(bpffs, 'foreign');
    const object = join(testbed.directory('foreign'), 'foreign.bpf.o');
    const include = ['-I', `/usr/include/${must(['gcc', '-print-multiarch']).trim()}`];
    const source = join(import.meta.dirname, 'foreign.bpf.c');
    must(['clang-14', '-O2', '-Wall', '-target', 'bpf', ...include, '-c', source, '-o', object]);
    mkdirSync(this.#directory);
    must(['bpftool', 'prog', 'loadall', object, this.#directory, 'type', 'classifier']);
  }

  /**
   * Direct-action filters on both hooks at priority 1. Where bandwidth has its ingress qdisc already: on its one hook,
   * at priority 2, as bandwidth's own filter (u32) has the first, and a priority takes one kind.
   */
  filter(ifname: string, program: ForeignProgram, handle = 1): void {
    const qdiscs = JSON.parse(this.#namespace.run(['tc', '-j', 'qdisc', 'show', 'dev', ifname])) as { kind: string }[];
    const has = (kind: string) => qdiscs.some((one) => one.kind === kind);
    if (!has('ingress') && !has('clsact')) this.#namespace.run(['tc', 'qdisc', 'add', 'dev', ifname, 'clsact']);
    for (const direction of has('ingress') ? (['ingress'] as const) : directions) {
      const place = ['dev', ifname, direction, 'prio', has('ingress') ? '2' : '1', 'handle', String(handle)];
      const what = ['bpf', 'direct-action', 'object-pinned', join(this.#directory, program)];
      this.#namespace.run(['tc', 'filter', 'add', ...place, ...what]);
    }
  }

  /** TCX links on both hooks, ahead of everything there or behind it. */
  tcx(ifindex: number, program: ForeignProgram, order: 'first' | 'last'): void {
    const netns = this.#native.openNetns(this.#namespace.path);
    const fd = this.#native.openProgram(join(this.#directory, program));
    try {
      for (const direction of directions) {
        this.#links += 1;
        const pin = join(this.#directory, `link${this.#links}`);
        this.#native.attachTcx(netns, ifindex, direction, fd, order, pin);
      }
    } finally {
      this.#native.close(fd);
      this.#native.close(netns);
    }
  }
}
