// SPDX-License-Identifier: Apache-2.0
//
// Requests at a fixed rate from a namespace, in the background.

import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { type Namespace, type Testbed, until } from '../netns.ts';

export class Steady {
  /** Of each request that has ended: "ok" or an errno's name. */
  readonly outcomes: string[] = [];
  readonly #child: ChildProcess;
  readonly #ended: Promise<unknown>;

  constructor(testbed: Testbed, from: Namespace, address: string, port: number, perSecond: number) {
    const program = join(import.meta.dirname, 'steady.py');
    const python = ['setpriv', '--pdeathsig', 'KILL', '--', '/usr/bin/python3', program];
    const [file = '', ...rest] = from.argv([...python, address, `${port}`, `${perSecond}`]);
    const child = spawn(file, rest, { stdio: ['pipe', 'pipe', 'inherit'] });
    this.#child = child;
    testbed.defer(() => child.kill('SIGKILL'));
    createInterface({ input: child.stdout }).on('line', (line) => this.outcomes.push(line));
    this.#ended = new Promise((resolve) => child.once('close', resolve));
  }

  /** Until that many more have ended. */
  more(requests: number): Promise<void> {
    const wanted = this.outcomes.length + requests;
    return until(`${requests} more requests`, () => this.outcomes.length >= wanted, 30_000);
  }

  /** Ends it; resolves when the last request has ended. Returns those that failed. */
  async stop(): Promise<string[]> {
    this.#child.stdin?.end();
    await this.#ended;
    return this.outcomes.filter((outcome) => outcome !== 'ok');
  }
}
