// SPDX-License-Identifier: Apache-2.0
// What has to hold before this agent is called ready. Whoever needs something adds a condition; `/readyz` names those
// that do not hold.

/** null: it holds; else why not, in a few words */
export type Condition = () => string | null;

export interface Unready {
  condition: string;
  reason: string;
}

export class Readiness {
  readonly #conditions = new Map<string, Condition>();

  /** A name that is there already gets the new condition. */
  add(name: string, condition: Condition): void {
    this.#conditions.set(name, condition);
  }

  remove(name: string): void {
    this.#conditions.delete(name);
  }

  /** Every condition, with why it does not hold. */
  all(): [condition: string, reason: string | null][] {
    return [...this.#conditions].map(([condition, check]) => [condition, check()]);
  }

  /** [] if ready */
  unready(): Unready[] {
    return this.all().flatMap(([condition, reason]) => (reason === null ? [] : [{ condition, reason }]));
  }
}
