// SPDX-License-Identifier: Apache-2.0
//
// The socket lookup programs: which listener they name for a tuple that a tc program has left word for. The addon has no
// test runs of such programs, bpftool has.

import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { must, type Namespace, type Testbed } from '../../conformance/netns.ts';
import { address, type End, SYN, tcpFrame } from './frames.ts';
import type { InPodDatapath } from './in-pod-node.ts';
import { ID, APP as IN_POD_APP, its as inPodAddresses, own, PORTS, within } from './in-pod-node.ts';
import { type Datapath, type Family, families, type Loaded, MARKS, OLD_MAC, OUTBOUND, pass, SIGN } from './node.ts';

const TCP = 6;
const UDP = 17;
const NOBODY = '0';

/** struct bpf_sk_lookup of the kernel's linux/bpf.h. */
const CONTEXT = 72;
const at = {
  cookie: 0,
  family: 8,
  protocol: 12,
  remote4: 16,
  remote6: 20,
  remotePort: 36,
  local4: 40,
  local6: 44,
  localPort: 60,
};

/** Cookie of the socket that `program` names for a packet of this tuple, as ss(8) writes it; "0": none. */
function named(
  testbed: Testbed,
  namespace: Namespace,
  program: string,
  family: Family,
  from: End,
  to: End,
  protocol = TCP,
): string {
  const context = Buffer.alloc(CONTEXT);
  context.writeUInt32LE(family === 4 ? 2 : 10, at.family);
  context.writeUInt32LE(protocol, at.protocol);
  address(from.address).copy(context, family === 4 ? at.remote4 : at.remote6);
  context.writeUInt16BE(from.port, at.remotePort);
  address(to.address).copy(context, family === 4 ? at.local4 : at.local6);
  context.writeUInt32LE(to.port, at.localPort);
  const directory = scratch(testbed);
  const [before, after] = [join(directory, 'in'), join(directory, 'out')];
  writeFileSync(before, context);
  namespace.run(['bpftool', '-j', 'prog', 'run', 'pinned', program, 'ctx_in', before, 'ctx_out', after]);
  return readFileSync(after).readBigUInt64LE(at.cookie).toString(16);
}

const directories = new WeakMap<Testbed, string>();
function scratch(testbed: Testbed): string {
  const known = directories.get(testbed) ?? testbed.directory('lookup');
  directories.set(testbed, known);
  return known;
}

/** The same of the one that listens on `port`. */
function listening(namespace: Namespace, family: Family, port: number): string {
  const line = namespace.run(['ss', '-Hltne', `-${family}`, `sport = :${port}`]);
  const cookie = / sk:([0-9a-f]+)/.exec(line)?.[1];
  if (cookie === undefined) throw new Error(`${namespace.name}: no cookie in ${line}`);
  return cookie;
}

/** Word is good for a second, and a busy machine may take longer from leaving it to asking. */
async function namedSoon(leave: () => Promise<void>, ask: () => string): Promise<string> {
  let answer = NOBODY;
  for (let attempt = 0; attempt < 5 && answer === NOBODY; attempt++) {
    await leave();
    answer = ask();
  }
  return answer;
}

const hex = (bytes: Uint8Array) => ['hex', ...[...bytes].map((byte) => byte.toString(16).padStart(2, '0'))];

/** Key and value of every element. */
function elements(loaded: Loaded, map: string): { key: Buffer; value: Buffer }[] {
  const dumped: unknown = JSON.parse(must(['bpftool', '-j', 'map', 'dump', 'pinned', join(loaded.directory, map)]));
  const bytes = (all: string[]) => Buffer.from(all.map((byte) => Number.parseInt(byte, 16)));
  return (dumped as { key: string[]; value: string[] }[]).map(({ key, value }) => ({
    key: bytes(key),
    value: bytes(value),
  }));
}

/** How many words are left. */
export function words(loaded: Loaded): number {
  return elements(loaded, 'steered').length;
}

/** Gives every word that was left the age of the machine. */
function age(loaded: Loaded): void {
  for (const { key, value } of elements(loaded, 'steered')) {
    value.fill(0, value.length - 8);
    const pinned = join(loaded.directory, 'steered');
    must(['bpftool', 'map', 'update', 'pinned', pinned, 'key', ...hex(key), 'value', ...hex(value)]);
  }
}

/** Takes away the listeners that were put there. */
export function forgetListeners(loaded: Loaded): void {
  for (const { key } of elements(loaded, 'listeners')) {
    must(['bpftool', 'map', 'delete', 'pinned', join(loaded.directory, 'listeners'), 'key', ...hex(key)]);
  }
}

/** Tuples that differ from this one in one word or port. */
function others(family: Family, from: End, to: End): [End, End][] {
  const changed = (end: End): End[] =>
    Array.from({ length: family === 4 ? 1 : 4 }, (_, word) => {
      const bytes = address(end.address);
      bytes.writeUInt8((bytes[word * 4 + 3] ?? 0) ^ 1, word * 4 + 3);
      const groups = Array.from({ length: 8 }, (_, group) => bytes.subarray(group * 2, group * 2 + 2).toString('hex'));
      return { ...end, address: family === 4 ? [...bytes].join('.') : groups.join(':') };
    });
  return [
    [{ ...from, port: from.port + 1 }, to],
    [from, { ...to, port: to.port + 1 }],
    ...changed(from).map((other): [End, End] => [other, to]),
    ...changed(to).map((other): [End, End] => [from, other]),
  ];
}

export function proxyLookup(datapath: () => Datapath): void {
  describe.each(families)('proxy_lookup, IPv%i', (family) => {
    test('names the listener for a SYN whose tuple is in TIME_WAIT, once', async () => {
      const d = datapath();
      const { testbed, namespaces } = d.node;
      const { client, server } = await d.node.timeWait(family);
      const ask = (from: End = client, to: End = server) =>
        named(testbed, namespaces.old, d.pathOf('proxy_lookup'), family, from, to);
      expect(ask()).toBe(NOBODY);
      const frame = tcpFrame({ source: d.signed(SIGN.OUTBOUND), destination: OLD_MAC }, client, server, { flags: SYN });
      const leave = () => d.check('proxy_ingress', frame, pass('proxy_time_wait', MARKS.tproxy));
      for (const [from, to] of others(family, client, server)) {
        await leave();
        expect(ask(from, to)).toBe(NOBODY);
      }
      expect(await namedSoon(leave, ask)).toBe(listening(namespaces.old, family, OUTBOUND));
      expect(ask()).toBe(NOBODY);
    });
  });
}

export function inPodLookup(datapath: () => InPodDatapath): void {
  describe.each(families)('inpod_lookup, IPv%i', (family) => {
    const its = inPodAddresses[family];
    const flow = (): [End, End] => [
      { address: its.outside, port: datapath().node.port() },
      { address: its.pod, port: IN_POD_APP },
    ];
    const ask = (from: End, to: End, protocol = TCP) => {
      const d = datapath();
      return named(d.node.testbed, d.node.pod, d.pathOf('inpod_lookup'), family, from, to, protocol);
    };
    /** Whose stub it would be. */
    const identify = (id: number) => {
      const bytes = Buffer.alloc(4);
      bytes.writeUInt32LE(id);
      const pinned = join(datapath().directory, 'identity');
      must(['bpftool', 'map', 'update', 'pinned', pinned, 'key', ...hex(Buffer.alloc(4)), 'value', ...hex(bytes)]);
    };
    const steer = (from: End, to: End) =>
      datapath().check('inpod_ingress', tcpFrame(within, from, to), pass('redirected_inbound', 0));

    test('names the listener, to the packet that it was picked for', async () => {
      const [from, to] = flow();
      identify(ID);
      for (const [other, another] of others(family, from, to)) {
        await steer(from, to);
        expect(ask(other, another)).toBe(NOBODY);
      }
      await steer(from, to);
      expect(ask(from, to, UDP)).toBe(NOBODY);
      identify(ID + 1);
      expect(ask(from, to)).toBe(NOBODY);
      identify(ID);
      const answer = await namedSoon(
        () => steer(from, to),
        () => ask(from, to),
      );
      expect(answer).toBe(listening(datapath().node.pod, family, PORTS.inboundPlaintext));
      expect(ask(from, to)).toBe(NOBODY);
    });

    test('each packet gets its own listener', async () => {
      const [[from, to], [client, web]] = [flow(), flow()];
      identify(ID);
      const frame = tcpFrame(own, web, client);
      const loop = () => datapath().check('inpod_ingress', frame, pass('proxy_assigned'), { mark: MARKS.tproxy });
      const { pod } = datapath().node;
      await steer(from, to);
      expect(await namedSoon(loop, () => ask(web, client))).toBe(listening(pod, family, PORTS.outbound));
      const answer = await namedSoon(
        () => steer(from, to),
        () => ask(from, to),
      );
      expect(answer).toBe(listening(pod, family, PORTS.inboundPlaintext));
    });

    test('not for a packet that comes long after, and not when the listener is gone', async () => {
      const d = datapath();
      const [from, to] = flow();
      identify(ID);
      await steer(from, to);
      age(d);
      expect(ask(from, to)).toBe(NOBODY);
      expect(ask(from, to)).toBe(NOBODY);
      await steer(from, to);
      forgetListeners(d);
      expect(ask(from, to)).toBe(NOBODY);
    });
  });
}
