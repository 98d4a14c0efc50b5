// SPDX-License-Identifier: Apache-2.0
// Named steps, each of which says how it ended, and a summary.

export class Steps {
  passed = 0;
  readonly failed: string[] = [];
  #section = '';
  readonly #begun = performance.now();

  section(title: string): void {
    this.#section = title;
    console.log(`\n${title}`);
  }

  /** A step that fails does not end the run: the ones after it say for themselves whether they still hold. */
  async step(name: string, run: () => Promise<unknown>): Promise<boolean> {
    const begun = performance.now();
    const seconds = () => ((performance.now() - begun) / 1000).toFixed(1);
    try {
      const note = await run();
      this.passed++;
      console.log(`  ok      ${name}${typeof note === 'string' ? `: ${note}` : ''} (${seconds()} s)`);
      return true;
    } catch (error) {
      this.failed.push(`${this.#section}: ${name}`);
      const { stack = '', message } = error as Error;
      const where = /conformance\/nodes\/[a-z-]+\.ts:\d+/.exec(stack.slice(message.length))?.[0] ?? '';
      console.log(`  FAILED  ${name} (${seconds()} s) ${where}\n          ${message.replaceAll('\n', '\n          ')}`);
      return false;
    }
  }

  summary(): void {
    const seconds = ((performance.now() - this.#begun) / 1000).toFixed(0);
    console.log('');
    for (const name of this.failed) console.log(`failed: ${name}`);
    console.log(`${this.passed} passed, ${this.failed.length} failed (${seconds} s)`);
  }
}
