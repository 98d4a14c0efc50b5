// SPDX-License-Identifier: Apache-2.0
// `demo`: options and preconditions; the demonstration itself is plugin/demo/.

import { CniError, Code } from '../cni/errors.ts';
import { removeDemo, demo as runDemo, serveDemo } from '../demo/demo.ts';
import type { DemoNative } from '../demo/native-topology.ts';
import type { Family } from '../demo/topology.ts';
import type { Native } from '../native.ts';
import type { Terminal } from './terminal.ts';

export interface DemoOptions {
  contract: 'shared' | 'in-pod';
  family: '4' | '6' | 'both';
  keep?: true;
  /** name of a kept demo */
  remove?: string;
  /** the same, for the process that goes on serving it */
  serve?: string;
}

export async function demo(loadNative: () => Native, terminal: Terminal, options: DemoOptions): Promise<number> {
  if (process.getuid?.() !== 0) {
    throw new CniError(Code.NOT_PERMITTED, 'demo needs root', 'it makes network namespaces and loads BPF programs');
  }
  // The addon has them; the CNI path just does not know of them.
  const native = loadNative() as DemoNative;
  const families: readonly Family[] = options.family === 'both' ? [4, 6] : options.family === '4' ? [4] : [6];
  if (options.remove !== undefined) {
    await removeDemo(native, options.remove);
    terminal.out(`removed ${options.remove}\n`);
    return 0;
  }
  if (options.serve !== undefined) {
    await serveDemo(native, options.serve, { contract: options.contract, families });
    return 0;
  }
  return runDemo(native, terminal, { contract: options.contract, families, keep: options.keep === true });
}
