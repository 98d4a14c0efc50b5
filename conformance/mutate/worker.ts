// SPDX-License-Identifier: Apache-2.0
//
// Runs the BPF-level suite again and again on the same nodes, each time with some programs taken from the object that it
// is told. The other programs, and a state directory with its maps, stay. A wrong program may have left anything in those:
// the test that found it is run once more with the right ones, and where that fails everything is made anew.

import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { inPod } from '../../bpf/test/in-pod.ts';
import { InPodDatapath, InPodNode } from '../../bpf/test/in-pod-node.ts';
import { Datapath, type Loaded, Node } from '../../bpf/test/node.ts';
import { DATAPATHS, type DatapathName, suite } from '../../bpf/test/suite.ts';
import type { ProgramName } from '../../plugin/native.ts';
import {
  collected,
  type Failure,
  type Learned,
  learn,
  learned,
  runAgain,
  runCollected,
  usesProgram,
} from './vitest.ts';

/** `changed`: names of the programs that are to be taken from `object`. `place`: the function that was changed. */
export type Order = { object: string; changed: string[]; place: string };
/**
 * disturbed: what failed was not what is asserted, and not every time.
 * `killer`: fingerprint of the test.
 */
export type Verdict = {
  fate: 'killed' | 'refused' | 'survived' | 'disturbed';
  failure: string;
  test?: string;
  killer?: string;
  /** Not enough ports are left for another run, or so much memory is in use that each fork takes long. */
  spent: boolean;
};
/** The first message: fingerprints of all tests. */
export type Ready = { tests: string[] };

const node = await Node.open();
const inPodNode = await InPodNode.open();
const seen = new Set<string>();
let runs = 0;
/** Ports that a run took at most. */
let most = 5_000;
const LAST_PORT = 60_000;
/** bytes */
const MOST_MEMORY = 700 * 2 ** 20;
let order: Order = { object: '', changed: [], place: '' };

class Refused extends Error {}

class Watched extends Datapath {
  override pathOf(program: ProgramName): string {
    usesProgram(program);
    return super.pathOf(program);
  }
}

class WatchedInPod extends InPodDatapath {
  override pathOf(program: ProgramName): string {
    usesProgram(program);
    return super.pathOf(program);
  }
}

type Known = (Watched | WatchedInPod) & Loaded;
const known = new Map<string, Known>();
/** Those whose changed programs are loaded in this run. */
const current = new Set<string>();

/** Loaded when its first test asks for it. */
function ready<T extends Known>(name: string, make: () => T): T {
  let one = known.get(name) as T | undefined;
  if (one === undefined) {
    delete process.env.AMBIENT_REDIRECT_OBJECT;
    one = make();
    known.set(name, one);
  }
  if (!current.has(name)) {
    current.add(name);
    if (order.changed.length > 0) {
      process.env.AMBIENT_REDIRECT_OBJECT = order.object;
      try {
        one.replace(`changed${runs}`, order.changed);
      } catch (error) {
        throw new Refused(error instanceof Error ? error.message : String(error));
      }
    }
    one.reset();
  }
  return one;
}

suite((name: DatapathName) => ready(name, () => new Watched(node, seen, DATAPATHS[name], `run${runs}`)));
inPod(() => ready('inPod', () => new WatchedInPod(inPodNode, seen, `run${runs}`)));

/** All tests that are concerned, or this one. */
async function runWith(given: Order, fingerprint?: string): Promise<Failure | undefined> {
  order = given;
  runs += 1;
  current.clear();
  const prepare = () => {
    for (const name of current) known.get(name)?.reset();
  };
  const failure = await (fingerprint === undefined ? runCollected(order, prepare) : runAgain(fingerprint, prepare));
  for (const one of known.values()) one.restore();
  return failure;
}

function forget(): void {
  for (const { state, directory } of known.values()) {
    node.native.closeState(state);
    rmSync(directory, { recursive: true });
  }
  known.clear();
}

async function judge(given: Order): Promise<Verdict> {
  const before = Math.max(node.lastPort, inPodNode.lastPort);
  let failure = await runWith(given);
  if (failure?.mismatch && (await runWith({ ...given, changed: [] }, failure.fingerprint)) !== undefined) {
    forget();
    failure = await runWith(given);
  }
  let sure = failure === undefined || failure.mismatch || failure.error instanceof Refused;
  if (failure !== undefined && !sure) {
    // Not an assertion: it has to fail again, and not with the right programs.
    const { fingerprint } = failure;
    sure =
      (await runWith(given, fingerprint)) !== undefined &&
      (await runWith({ ...given, changed: [] }, fingerprint)) === undefined;
    if (!sure) forget();
  }
  const last = Math.max(node.lastPort, inPodNode.lastPort);
  most = Math.max(most, last - before);
  return { ...verdictOf(failure, sure), spent: last + most > LAST_PORT || process.memoryUsage.rss() > MOST_MEMORY };
}

function verdictOf(failure: Failure | undefined, sure: boolean): Omit<Verdict, 'spent'> {
  if (failure === undefined) return { fate: 'survived', failure: '' };
  const { error, test, fingerprint } = failure;
  const message = `${test}: ${error instanceof Error ? error.message : String(error)}`;
  if (error instanceof Refused) return { fate: 'refused', failure: message };
  return { fate: sure ? 'killed' : 'disturbed', failure: message, test, killer: fingerprint };
}

// What the tests run, and how often they found something, outlives the process: for the order, and for leaving out tests that run none of the changed programs.
const [, , memory = ''] = process.argv;
if (existsSync(memory)) learn(JSON.parse(readFileSync(memory, 'utf8')) as Learned);
const keep = () => writeFileSync(memory, JSON.stringify(learned()));

process.on('message', (given: Order) => {
  judge(given).then(
    (verdict) => {
      if (verdict.spent || verdict.fate === 'disturbed' || runs % 10 < 2) keep();
      process.send?.(verdict);
    },
    (error: unknown) => {
      console.error(error);
      process.exit(1);
    },
  );
});
process.on('disconnect', () => {
  node.close();
  inPodNode.close();
  process.exit(0);
});
process.send?.({ tests: collected() } satisfies Ready);
