// SPDX-License-Identifier: Apache-2.0

/** Doubles from `first` to `most` milliseconds, each with up to a fifth of chance added. */
export class Backoff {
  readonly #first: number;
  readonly #most: number;
  #next: number;

  constructor(first: number, most: number) {
    this.#first = first;
    this.#most = most;
    this.#next = first;
  }

  next(): number {
    const wait = this.#next * (1 + Math.random() / 5);
    this.#next = Math.min(this.#most, this.#next * 2);
    return Math.min(this.#most, wait);
  }

  reset(): void {
    this.#next = this.#first;
  }
}
