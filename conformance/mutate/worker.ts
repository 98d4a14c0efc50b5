// SPDX-License-Identifier: Apache-2.0
// Runs the BPF-level suite again and again on one node, each time on the programs in the object that it is told.

import { rmSync } from 'node:fs';
import { Datapath, Node } from '../../bpf/test/node.ts';
import { DATAPATHS, type DatapathName, suite } from '../../bpf/test/suite.ts';
import type { ProgramName } from '../../plugin/native.ts';
import { runCollected, usesProgram } from './vitest.ts';

/** `changed`: names of the programs that differ from the original's. */
export type Order = { object: string; changed: string[] };
export type Verdict = { fate: 'killed' | 'refused' | 'survived'; failure: string };

const node = await Node.open();
const datapaths = new Map<DatapathName, Datapath>();
const seen = new Set<string>();
let runs = 0;

/** Loaded when its first test asks for it. */
function datapath(name: DatapathName): Datapath {
  const known = datapaths.get(name);
  if (known !== undefined) return known;
  const made = load(name);
  made.reset();
  return made;
}

class Refused extends Error {}

class Watched extends Datapath {
  override run(program: ProgramName, ...rest: Parameters<Datapath['run']> extends [unknown, ...infer R] ? R : never) {
    usesProgram(program);
    return super.run(program, ...rest);
  }
}

function load(name: DatapathName): Datapath {
  try {
    const made = new Watched(node, seen, DATAPATHS[name], `run${runs}`);
    datapaths.set(name, made);
    return made;
  } catch (error) {
    throw new Refused(`REFUSED ${error instanceof Error ? error.message : String(error)}`);
  }
}

suite(datapath);

async function judge({ object, changed }: Order): Promise<Verdict> {
  process.env.AMBIENT_REDIRECT_OBJECT = object;
  runs += 1;
  const failure = await runCollected(
    changed,
    () => {
      for (const one of datapaths.values()) one.reset();
    },
    (error) => error instanceof Refused,
  );
  for (const { state, directory } of datapaths.values()) {
    node.native.closeState(state);
    rmSync(directory, { recursive: true });
  }
  datapaths.clear();
  if (failure === undefined) return { fate: 'survived', failure: '' };
  return { fate: failure.includes('REFUSED ') ? 'refused' : 'killed', failure };
}

process.on('message', (order: Order) => {
  judge(order).then(
    (verdict) => process.send?.(verdict),
    (error: unknown) => {
      console.error(error);
      process.exit(1);
    },
  );
});
process.on('disconnect', () => {
  node.close();
  process.exit(0);
});
process.send?.('ready');
