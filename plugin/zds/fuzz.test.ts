// SPDX-License-Identifier: Apache-2.0
// Mutated datagrams, with and without descriptors, on the server's socket, while a ztunnel that does as it should is
// connected. Whatever comes in: no crash, no descriptor stays, and that ztunnel goes on being served.

import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Testbed } from '../../conformance/netns.ts';
import { LONG, native } from '../../native/native.testing.ts';
import { seededRandom } from '../cni/random.testing.ts';
import { SeqpacketConnection } from './connection.ts';
import {
  decodeAck,
  decodeHello,
  decodeRequest,
  encodeAck,
  encodeHello,
  encodeRequest,
  ZdsMessageError,
} from './messages.ts';
import { ZdsServer, type ZdsWorkload } from './server.ts';

const RUNS = LONG ? 100_000 : 2_000;
const SEED = Number(process.env.AMBIENT_REDIRECT_SEED ?? 20_261_125);
const random = seededRandom(SEED);
const pick = <T>(list: readonly T[]): T => list[random(list.length)] as T;

const SAMPLES = [
  encodeHello(),
  encodeHello(2),
  encodeAck(null),
  encodeAck('AddrInUse'),
  encodeAck('x'.repeat(1_416)),
  encodeRequest({ kind: 'add', uid: 'u', workload: { name: 'n', namespace: 'ns', serviceAccount: 'sa' } }),
  encodeRequest({ kind: 'snapshotSent' }),
  new Uint8Array([0x0b, 0x0b, 0x0b, 0x0b]),
  new Uint8Array([0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]),
];

function mutated(sample: Uint8Array): Uint8Array {
  let bytes = [...sample];
  for (let count = random(4); count > 0; count--) {
    const at = random(bytes.length + 1);
    switch (random(6)) {
      case 0:
        bytes[at] = random(256);
        break;
      case 1:
        bytes = [...bytes.slice(0, at), random(256), ...bytes.slice(at)];
        break;
      case 2:
        bytes.splice(at, random(4));
        break;
      case 3:
        bytes = [...bytes, ...pick(SAMPLES)];
        break;
      case 4:
        bytes[at] = (bytes[at] ?? 0) ^ (1 << random(8));
        break;
      default:
        if (random(50) === 0) bytes = [...bytes, ...new Array<number>(random(70_000)).fill(random(256))];
    }
  }
  return Uint8Array.from(bytes.map((byte) => byte ?? 0));
}

const openDescriptors = () => readdirSync('/proc/self/fd').length;
const turn = () => new Promise((resolve) => setImmediate(resolve));

test(`${RUNS} decodings: a message, or ZdsMessageError`, () => {
  for (let run = 0; run < RUNS; run++) {
    const bytes = mutated(pick(SAMPLES));
    for (const decode of [decodeHello, decodeAck, decodeRequest]) {
      try {
        decode(bytes);
      } catch (error) {
        if (error instanceof ZdsMessageError) continue;
        throw new Error(`seed ${SEED}, run ${run}: ${Buffer.from(bytes).toString('hex')}`, { cause: error });
      }
    }
  }
});

test(
  `${RUNS} connections that say anything`,
  async () => {
    const bed = Testbed.open();
    const path = join(bed.directory('zds'), 's');
    const namespace = bed.namespace('pod');
    const pods = new Map<string, ZdsWorkload>();
    const server = ZdsServer.start(native, {
      path,
      workloads: () => [...pods.values()],
      workload: (uid) => pods.get(uid),
      known: Promise.resolve(),
      events: { log: () => {}, message: () => {}, connected: () => {}, changed: () => {} },
      deadlineMs: 2_000,
      acceptsPerSecond: 1_000_000,
    });
    const served = new Set<string>();
    let valid: SeqpacketConnection | undefined;
    const connectValid = () => {
      valid = new SeqpacketConnection(native, native.connectSeqpacket(path), {
        onDatagram: ({ bytes }) => {
          const request = decodeRequest(bytes);
          if (request.kind === 'add') served.add(request.uid);
          if (request.kind === 'del') served.delete(request.uid);
          valid?.send(encodeAck(null));
        },
        onEnd: (reason) => {
          throw new Error(`seed ${SEED}: the ztunnel that does as it should was dropped: ${reason}`);
        },
      });
      valid.send(encodeHello());
    };
    const spare = native.openNetns('/proc/self/ns/net');
    try {
      connectValid();
      while (!server.isLive) await turn();
      const before = openDescriptors();
      const open: SeqpacketConnection[] = [];
      for (let run = 0; run < RUNS; run++) {
        const connection = new SeqpacketConnection(native, native.connectSeqpacket(path), {
          onDatagram: () => {
            if (random(2) === 0) connection.send(mutated(encodeAck(null)));
          },
          onEnd: () => {},
        });
        open.push(connection);
        for (let count = 1 + random(4); count > 0; count--) {
          connection.send(mutated(pick(SAMPLES)), random(4) === 0 ? spare : undefined);
          if (random(3) === 0) await turn();
        }
        if (open.length >= 8) open.splice(random(open.length), 1)[0]?.close();
        if (run % 100 === 99) {
          for (const one of open.splice(0)) one.close();
          while (server.connections.length > 1) await turn();
          const uid = `pod-${run}`;
          pods.set(uid, {
            uid,
            names: { name: uid, namespace: 'default', serviceAccount: 'sa' },
            netns: { dev: 0n, ino: 1n },
            openNetns: () => native.openNetns(namespace.path),
          });
          await server.add(uid, { waitMs: 5_000, deadlineMs: 5_000 });
          expect([...served], `seed ${SEED}, run ${run}`).toEqual([uid]);
          pods.delete(uid);
          await server.del(uid);
          expect([...served], `seed ${SEED}, run ${run}`).toEqual([]);
          expect(openDescriptors(), `seed ${SEED}, run ${run}`).toBe(before);
        }
      }
    } finally {
      valid?.close();
      server.close();
      native.close(spare);
      bed.close();
    }
  },
  LONG ? 1_800_000 : 60_000,
);
