// SPDX-License-Identifier: Apache-2.0
//
// Connections that are opened one after the other, as fast as one a millisecond, and how many SYNs had to be sent again.

import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { type Namespace, type Testbed, until } from '../netns.ts';

const program = join(import.meta.dirname, 'openings.py');

export interface Opened {
  begun: number;
  greeted: number;
  /** how often, by errno's name */
  failed: Record<string, number>;
}

/** Greets on `port` of all addresses, and closes when the other end has closed. */
export async function greet(testbed: Testbed, at: Namespace, port: number): Promise<void> {
  const server = testbed.start(at.argv(['/usr/bin/python3', program, 'serve', `${port}`]));
  await until(`a server on port ${port} of ${at.name}`, () => {
    if (!server.alive) throw new Error(`it ended: ${server.output}`);
    return server.output.includes('ready');
  });
}

export class Openings {
  readonly #child: ChildProcess;
  readonly #ended: Promise<unknown>;
  readonly #reports: Opened[] = [];

  /** To the addresses in turn, one each `period` seconds, until stop(). */
  constructor(testbed: Testbed, from: Namespace, port: number, addresses: readonly string[], period: number) {
    const python = ['setpriv', '--pdeathsig', 'KILL', '--', '/usr/bin/python3', program];
    const [file = '', ...rest] = from.argv([...python, 'open', `${port}`, `${period}`, ...addresses]);
    const child = spawn(file, rest, { stdio: ['pipe', 'pipe', 'inherit'] });
    this.#child = child;
    testbed.defer(() => child.kill('SIGKILL'));
    createInterface({ input: child.stdout }).on('line', (line) => this.#reports.push(JSON.parse(line)));
    this.#ended = new Promise((resolve) => child.once('close', resolve));
  }

  async now(): Promise<Opened> {
    const had = this.#reports.length;
    this.#child.stdin?.write('\n');
    await until('a report', () => this.#reports.length > had, 20_000);
    return this.#reports.at(-1) as Opened;
  }

  /** Until that many more have been greeted. */
  async more(count: number): Promise<void> {
    const { greeted } = await this.now();
    await until(`${count} more`, async () => (await this.now()).greeted >= greeted + count, 30_000);
  }

  /** What became of all, when the last has ended. */
  async stop(): Promise<Opened> {
    this.#child.stdin?.end();
    await this.#ended;
    return this.#reports.at(-1) as Opened;
  }
}

/**
 * Since the namespace was made: SYNs and SYN-ACKs that it had to send again, and connections that a listener of it could
 * not take, since the process that it belongs to was late.
 */
export function resends(namespace: Namespace): { syns: number; listenerFull: number } {
  const lines = namespace.run(['cat', '/proc/net/netstat']).split('\n');
  const [names = [], values = []] = lines.filter((line) => line.startsWith('TcpExt:')).map((line) => line.split(' '));
  const value = (name: string) => Number(values[names.indexOf(name)]);
  return { syns: value('TCPSynRetrans'), listenerFull: value('ListenOverflows') };
}
