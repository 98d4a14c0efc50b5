// SPDX-License-Identifier: Apache-2.0
// Work with kernel calls in it that wait for an RCU grace period: creating and detaching a TCX link. A plugin that is
// run for one pod waits where it stands; the agent has the call made on another thread meanwhile it does other things.
// The steps are the same ones for both, and so is what undoes them.

/** One such call, made here or on another thread. */
export interface KernelWait {
  here: () => unknown;
  aside: () => Promise<unknown>;
}

export type Steps<T> = Generator<KernelWait, T, unknown>;

export function* wait<T>(here: () => T, aside: () => Promise<T>): Steps<T> {
  return (yield { here, aside }) as T;
}

/** Throws what the steps throw. */
export function runHere<T>(steps: Steps<T>): T {
  let step = steps.next();
  while (step.done !== true) {
    let result: unknown;
    try {
      result = step.value.here();
    } catch (error) {
      step = steps.throw(error);
      continue;
    }
    step = steps.next(result);
  }
  return step.value;
}

/** Rejects with what the steps throw. */
export async function runAside<T>(steps: Steps<T>): Promise<T> {
  let step = steps.next();
  while (step.done !== true) {
    let result: unknown;
    try {
      result = await step.value.aside();
    } catch (error) {
      step = steps.throw(error);
      continue;
    }
    step = steps.next(result);
  }
  return step.value;
}

/**
 * Steps one after the other, each to its end, as they are asked for: the kernel holds the lock of rtnetlink over such a
 * wait, so that side by side nothing is faster, and what else needs that lock waits longer.
 */
export class StepQueue {
  #last: Promise<unknown> = Promise.resolve();

  /** Rejects with what the steps throw. */
  run<T>(steps: Steps<T>): Promise<T> {
    return this.#append(() => runAside(steps));
  }

  /** Calls `body` when no steps are under way. */
  between<T>(body: () => T): Promise<T> {
    return this.#append(async () => body());
  }

  #append<T>(body: () => Promise<T>): Promise<T> {
    const run = this.#last.then(body);
    this.#last = run.catch(() => {});
    return run;
  }
}
