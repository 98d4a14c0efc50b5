// SPDX-License-Identifier: Apache-2.0
//
// What does keep traffic from the proxy: our ADD says so, or `doctor` does where it came after ADD.

import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { EXECUTABLE } from '../chain.ts';
import { families } from '../e2e/topology.ts';
import { until } from '../netns.ts';
import type { JsonObject, PluginConf } from '../runtime.ts';
import { Site, type Subject } from './site.ts';

const PORT = 80;

/** Has the kernel look for the address's neighbour. */
const ASK = `
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
socket.socket(family, socket.SOCK_DGRAM).sendto(b"", (sys.argv[1], 9))`;

describe.each([
  ['bridge', 'tcx'],
  ['ptp', 'clsact'],
] as const)('%s, %s', (primary, hook) => {
  let site: Site;
  beforeAll(async () => {
    site = new Site(primary, hook);
    await site.start();
  });
  afterAll(() => site?.close());

  /** A pod after the primary plugin. */
  const prepared = async (): Promise<{ subject: Subject; result: JsonObject }> => {
    const subject = site.subject();
    const result = await site.add(subject, [site.primaryConf]);
    await site.look(subject, result);
    await subject.pod.endpoint.listen(PORT);
    return { subject, result };
  };
  const refusal = async (subject: Subject, result: JsonObject, more: JsonObject = {}) =>
    site.add(subject, [{ ...site.ours, ...more }], result).then(
      () => 'ADD did well',
      (error: Error) => error.message,
    );
  const named = async (subject: Subject) => {
    const findings = await site.doctor(subject);
    return findings.map(({ level, subject: where, text }) => `${level}: ${where}: ${text}`);
  };
  /** How many connections the proxy saw of one out and one in, each family. */
  const proxied = async (subject: Subject): Promise<number> => {
    let count = 0;
    for (const family of families) {
      count += (await site.outbound(subject, family)).proxied.length;
      count += (await site.inbound(subject.pod.addresses[family], PORT)).proxied.length;
    }
    return count;
  };

  /** A test of one hook alone; a skipped one would count as one that could not run. */
  const on = (wanted: typeof hook): ((name: string, body: () => Promise<void>) => void) =>
    hook === wanted ? test : () => {};

  test('a TCX program that ends the chain, put ahead of ours: nothing is redirected, and doctor names it', async () => {
    const { subject, result } = await prepared();
    await site.add(subject, [site.ours], result);
    expect(await proxied(subject)).toBe(4);
    site.foreign.tcx(subject.hostIfindex, 'foreign_ok', 'first');
    expect(await proxied(subject)).toBe(0);
    const what = /^warning: (ingress|egress) of \S+: TCX program \d+ \(foreign_ok\) runs before ours; what it ends/;
    expect(await named(subject)).toEqual([expect.stringMatching(what), expect.stringMatching(what)]);
    expect(await site.check(subject)).toMatch(
      /^ambient-redirect: warn: ingress of \S+: TCX program \d+ \(foreign_ok\)/,
    );
  });

  on('clsact')('a filter that ends the chain, put ahead of ours: doctor names it', async () => {
    const { subject, result } = await prepared();
    await site.add(subject, [site.ours], result);
    // The newest of a priority runs first.
    site.foreign.filter(subject.hostIfname, 'foreign_ok', 2);
    expect(await proxied(subject)).toBe(0);
    const what =
      /^warning: (ingress|egress) of \S+: a bpf filter of priority 1 \(foreign_ok\S*\) runs before ours; what it/;
    expect(await named(subject)).toEqual([expect.stringMatching(what), expect.stringMatching(what)]);
    expect(await site.check(subject)).toMatch(/^ambient-redirect: warn: ingress of \S+: a bpf filter of priority 1 /);
  });

  on('tcx')('a TCX program that ends the chain, there at ADD: ours goes ahead of it', async () => {
    const { subject, result } = await prepared();
    site.foreign.tcx(subject.hostIfindex, 'foreign_ok', 'last');
    await site.add(subject, [site.ours], result);
    expect(await proxied(subject)).toBe(4);
  });

  on('clsact')('a TCX program, there at ADD: refused if closed, named by doctor if open', async () => {
    const { subject, result } = await prepared();
    site.foreign.tcx(subject.hostIfindex, 'foreign_ok', 'last');
    expect(await refusal(subject, result)).toMatch(/TCX program \d+ \("?foreign_ok"?\) is there.*\(code 102\)/);
    expect(await refusal(subject, result, { failurePolicy: 'open' })).toBe('ADD did well');
    expect((await named(subject)).join()).toMatch(/warning.*TCX program \d+ \(foreign_ok\) runs before ours/);
  });

  on('clsact')("somebody's filter of another kind holds priority 1: refused if closed", async () => {
    const { subject, result } = await prepared();
    const dev = ['dev', subject.hostIfname];
    site.topology.node.run(['tc', 'qdisc', 'add', ...dev, 'clsact']);
    site.topology.node.run([
      'tc',
      'filter',
      'add',
      ...dev,
      'ingress',
      'prio',
      '1',
      'u32',
      'match',
      'u32',
      '0',
      '0',
      'flowid',
      '1:1',
    ]);
    expect(await refusal(subject, result)).toMatch(/priority 1 is held by a u32 filter.*\(code 102\)/);
  });

  // Such a pod has no TCP until somebody looks: the kernel tells nobody of the change.
  test.each(['enroll', 'CHECK'])(
    'tuning changes the MAC address after us: nothing leaks, doctor names it, and %s mends it',
    async (how) => {
      const { subject, result } = await prepared();
      // One each: a bridge takes two ports with the same address for one that moves to and fro.
      const mac = how === 'CHECK' ? '02:00:5e:00:53:aa' : '02:00:5e:00:53:bb';
      const tuning: PluginConf = { type: 'tuning', mac, dataDir: site.topology.testbed.directory(`tuning.mac.${how}`) };
      await site.add(subject, [site.ours, tuning], result);
      // The address may be one that a pod before it had, and announcements may still be on their way: what the node has
      // learned by asking is what counts.
      for (const family of families) {
        const address = subject.pod.addresses[family];
        await until(`the node has ${mac} for ${address}`, () => {
          const { node } = site.topology;
          const [entry] = JSON.parse(node.ip('-j', 'neigh', 'show', 'to', address)) as { lladdr?: string }[];
          if (entry?.lladdr === mac) return true;
          if (entry?.lladdr !== undefined) node.run(['ip', 'neigh', 'flush', 'to', address]);
          node.run(['python3', '-c', ASK, address]);
          return false;
        });
      }
      await expect(proxied(subject)).rejects.toThrow('ETIMEDOUT');
      const what = new RegExp(`^fails: eth0 of default/\\S+: its MAC address is ${mac} and was \\S+ at ADD`);
      expect(await named(subject)).toEqual([expect.stringMatching(what)]);
      const checked = () => site.runtime.check(subject.list([site.ours]), subject.rt);
      if (how === 'CHECK') {
        await checked();
      } else {
        const { stateDir, runDir } = site.topology;
        const options = ['--netns', subject.pod.netns.path, '--state-dir', stateDir, '--run-dir', runDir];
        const { status, stdout, stderr } = await site.topology.node.exec([EXECUTABLE, 'enroll', ...options]);
        expect(`${status} ${stdout}${stderr}`).toMatch(/^0 /);
      }
      expect(await named(subject)).toEqual([]);
      await checked();
      expect(await proxied(subject)).toBe(4);
    },
  );
});
