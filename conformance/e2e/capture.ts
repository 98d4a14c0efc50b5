// SPDX-License-Identifier: Apache-2.0
//
// tcpdump on one interface: what really reached it.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { must, type Namespace, type Running, type Testbed, until } from '../netns.ts';

export interface Packet {
  /** Milliseconds since 1970. */
  time: number;
  source: string;
  sourcePort: number;
  destination: string;
  destinationPort: number;
  /** As tcpdump writes them: "S", "S.", "P.", "R", "." ... */
  flags: string;
  /** Bytes of payload. */
  length: number;
  text: string;
}

const tcpLine = /^(\S+) IP6? (\S+)\.(\d+) > (\S+)\.(\d+): Flags \[([^\]]*)\].*length (\d+)/;

export class Capture {
  readonly #file: string;
  readonly #process: Running;

  private constructor(file: string, process: Running) {
    this.#file = file;
    this.#process = process;
  }

  /** Captures what comes in; returns when that has begun. `label` must be new in this testbed. */
  static async start(testbed: Testbed, namespace: Namespace, ifname: string, label: string): Promise<Capture> {
    const file = join(testbed.directory(`capture.${label}`), 'packets');
    const process = testbed.start(
      namespace.argv([
        'tcpdump',
        '-nn',
        '-U',
        '--immediate-mode',
        '-s',
        '160',
        '-Z',
        'root',
        '-Q',
        'in',
        '-i',
        ifname,
        '-w',
        file,
      ]),
    );
    await until(`tcpdump on ${ifname}`, () => {
      if (!process.alive) throw new Error(`tcpdump on ${ifname} ended: ${process.output}`);
      return process.output.includes('listening on');
    });
    return new Capture(file, process);
  }

  /** The TCP packets so far that match tcpdump's `filter`. */
  packets(filter = 'tcp'): Packet[] {
    return this.lines(filter).flatMap((text) => {
      const [, time, source = '', sourcePort, destination = '', destinationPort, flags = '', length] =
        tcpLine.exec(text) ?? [];
      if (sourcePort === undefined) return [];
      return [
        {
          time: Number(time) * 1000,
          source,
          sourcePort: Number(sourcePort),
          destination,
          destinationPort: Number(destinationPort),
          flags,
          length: Number(length),
          text,
        },
      ];
    });
  }

  /** tcpdump's lines for the packets so far that match `filter`. */
  lines(filter: string): string[] {
    return this.#read('-tt', filter)
      .split('\n')
      .filter((line) => line !== '');
  }

  /** The same with checksums checked, one line for each packet. Those of packets longer than what is kept cannot be. */
  verbose(filter: string): string[] {
    // A packet's further lines are indented.
    return this.#read('-ttvv', filter)
      .replaceAll(/\n\s+/g, ' ')
      .split('\n')
      .filter((line) => line !== '');
  }

  #read(option: string, filter: string): string {
    // A packet that is being written may be cut off: tcpdump then reports the whole ones and an error.
    const script = 'tcpdump -nn "$1" -r "$2" "$3" 2>/dev/null || true';
    return must(['sh', '-c', script, 'sh', option, this.#file, filter]);
  }

  /** Did any packet so far carry `text`? Only the first 160 bytes of each are kept. */
  contains(text: string): boolean {
    return readFileSync(this.#file).includes(text);
  }

  /** Waits for packets, as they reach the file a little later than their receiver. */
  async until(
    what: string,
    filter: string,
    condition: (packets: Packet[]) => boolean,
    limit = 5_000,
  ): Promise<Packet[]> {
    let packets: Packet[] = [];
    try {
      await until(
        what,
        () => {
          packets = this.packets(filter);
          return condition(packets);
        },
        limit,
      );
    } catch (error) {
      throw new Error(`${what}: not in the capture:\n${packets.map((one) => one.text).join('\n')}`, { cause: error });
    }
    return packets;
  }

  async stop(): Promise<void> {
    await this.#process.stop('SIGINT');
  }
}
