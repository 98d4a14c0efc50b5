// SPDX-License-Identifier: Apache-2.0
// A line on stderr that says what runs and how long the rest will take; without a terminal, a line every ten seconds.

const EVERY = 10_000;

export function duration(seconds: number): string {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return `${Math.round(seconds / 60)} min`;
}

export class Progress {
  readonly #terminal = process.stderr.isTTY === true;
  #begun: number | undefined;
  /** Seconds of load that the plan has, and that are behind it. */
  readonly #planned: number;
  readonly #count: number;
  #measured = 0;
  #finished = 0;
  #skipped = 0;
  #printed = 0;

  /** What follows the steps, in seconds. */
  readonly #after: number;

  /** Of each step, in their order: how long its load lasts. `after`: seconds that the rest is thought to take. */
  constructor(seconds: readonly number[], after: number) {
    this.#count = seconds.length;
    this.#planned = seconds.reduce((a, b) => a + b, 0);
    this.#after = after;
  }

  skip(steps: number): void {
    this.#skipped = steps;
    if (steps > 0) this.note(`${steps} of ${this.#count} runs are there already`);
  }

  /** Seconds until the end: what each second of load has really taken so far, or 1.4 at the beginning. */
  get left(): number {
    const share = (this.#count - this.#skipped) / Math.max(1, this.#count);
    const spent = (performance.now() - (this.#begun ?? 0)) / 1000;
    const factor = this.#measured > 0 ? spent / this.#measured : 1.4;
    return Math.max(0, this.#planned * share - this.#measured) * factor + this.#after;
  }

  begin(text: string): void {
    this.#begun ??= performance.now();
    const line = `[${this.#skipped + this.#finished + 1}/${this.#count}] about ${duration(this.left)} left: ${text}`;
    if (this.#terminal) {
      process.stderr.write(`\r\x1b[K${line.slice(0, (process.stderr.columns ?? 80) - 1)}`);
    } else if (performance.now() - this.#printed > EVERY || this.#printed === 0) {
      this.#printed = performance.now();
      process.stderr.write(`${line}\n`);
    }
  }

  end(seconds: number): void {
    this.#finished += 1;
    this.#measured += seconds;
  }

  note(text: string): void {
    process.stderr.write(this.#terminal ? `\r\x1b[K${text}` : `${text}\n`);
  }

  warn(text: string): void {
    process.stderr.write(`${this.#terminal ? '\r\x1b[K' : ''}${text}\n`);
  }

  close(): void {
    if (this.#terminal) process.stderr.write('\r\x1b[K');
  }
}
