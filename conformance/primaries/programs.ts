// SPDX-License-Identifier: Apache-2.0
//
// Programs with the names of a primary plugin's, on devices of a namespace.

import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import type { Direction } from '../../plugin/native.ts';
import { must, type Namespace, type Testbed } from '../netns.ts';

export class Programs {
  readonly #namespace: Namespace;
  readonly #directory: string;
  #links = 0;

  /** Compiles `source` with `definitions` and loads what is in it; `bpffs` gets the directory `label` with the pins. */
  constructor(
    testbed: Testbed,
    namespace: Namespace,
    bpffs: string,
    label: string,
    source: string,
    definitions: Readonly<Record<string, string | number>> = {},
  ) {
    this.#namespace = namespace;
    this.#directory = join(bpffs, label);
    const object = join(testbed.directory(label), 'object.bpf.o');
    const include = ['-I', `/usr/include/${must(['gcc', '-print-multiarch']).trim()}`];
    const defined = Object.entries(definitions).map(([name, value]) => `-D${name}=${value}`);
    must(['clang-14', '-O2', '-Wall', '-target', 'bpf', ...include, ...defined, '-c', source, '-o', object]);
    mkdirSync(this.#directory);
    must(['bpftool', 'prog', 'loadall', object, this.#directory, 'type', 'classifier']);
  }

  /** A TCX link behind those that are there, as Cilium, Calico and bpftool make them. */
  tcx(ifname: string, direction: Direction, program: string): void {
    const native = loadNative();
    const netns = native.openNetns(this.#namespace.path);
    const fd = native.openProgram(join(this.#directory, program));
    try {
      const ifindex = native.linkByName(netns, ifname)?.ifindex ?? 0;
      this.#links += 1;
      native.attachTcx(netns, ifindex, direction, fd, 'last', join(this.#directory, `link${this.#links}`));
    } finally {
      native.close(fd);
      native.close(netns);
    }
  }

  /** A direct-action filter of priority 1. */
  filter(ifname: string, direction: Direction, program: string): void {
    const qdiscs = this.#namespace.run(['tc', 'qdisc', 'show', 'dev', ifname]);
    if (!qdiscs.includes('clsact')) this.#namespace.run(['tc', 'qdisc', 'add', 'dev', ifname, 'clsact']);
    const what = ['bpf', 'direct-action', 'object-pinned', join(this.#directory, program)];
    this.#namespace.run(['tc', 'filter', 'add', 'dev', ifname, direction, 'prio', '1', ...what]);
  }
}
