// SPDX-License-Identifier: Apache-2.0
//
// Every kind of state that kernel-state.ts looks at is seen when it changes, and a testbed leaves nothing behind.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { differences, kernelState } from './kernel-state.ts';
import { must, type Namespace, Testbed, until } from './netns.ts';

describe('a change is seen', () => {
  let testbed: Testbed;
  let node: Namespace;
  let pins: string;
  beforeEach(async () => {
    testbed = Testbed.open();
    node = testbed.namespace('node');
    testbed.veth({ namespace: node, ifname: 'v0' }, { namespace: node, ifname: 'v1', addresses: ['10.1.0.1/24'] });
    pins = testbed.bpffs('pins');
    // The kernel tells of a carrier some time after it is there.
    await until('the veth is up', () => / state UP /.test(node.run(['ip', 'link', 'show', 'v0'])));
  });
  afterEach(() => testbed.close());

  const state = () => kernelState([node], { pins: [pins] });
  const pinMap = () =>
    must([
      'bpftool',
      'map',
      'create',
      join(pins, 'm'),
      'type',
      'hash',
      'key',
      '4',
      'value',
      '4',
      'entries',
      '8',
      'name',
      'm',
    ]);

  test.each<[string, () => unknown, RegExp]>([
    ['a link', () => node.ip('link', 'add', 'b0', 'type', 'bridge'), /^\+ node link b0:/],
    ['an MTU', () => node.ip('link', 'set', 'v0', 'mtu', '1400'), /^\+ node link v0: .*"mtu":1400/],
    ['an address', () => node.ip('address', 'add', 'fd00::1/64', 'dev', 'v1', 'nodad'), /^\+ node address v1 fd00::1/],
    [
      'a neighbour',
      () => node.ip('neigh', 'add', '10.1.0.9', 'lladdr', '02:00:00:00:00:01', 'dev', 'v1'),
      /^\+ node neighbour v1 10.1.0.9/,
    ],
    ['a rule', () => node.ip('rule', 'add', 'fwmark', '1', 'table', '100'), /^\+ node rule4 \d+: .*"table":"100"/],
    ['an IPv6 rule', () => node.ip('-6', 'rule', 'add', 'fwmark', '1', 'table', '100'), /^\+ node rule6 /],
    [
      'a route in any table',
      () => node.ip('route', 'add', '192.0.2.0/24', 'dev', 'v1', 'table', '100'),
      /^\+ node route 192.0.2.0\/24 table 100/,
    ],
    [
      'a qdisc',
      () => node.run(['tc', 'qdisc', 'add', 'dev', 'v0', 'root', 'pfifo', 'limit', '9']),
      /^\+ node qdisc v0 root/,
    ],
    [
      'a filter',
      () => {
        node.run(['tc', 'qdisc', 'add', 'dev', 'v0', 'clsact']);
        node.run([
          'tc',
          'filter',
          'add',
          'dev',
          'v0',
          'egress',
          'protocol',
          'ip',
          'u32',
          'match',
          'u8',
          '0',
          '0',
          'flowid',
          '1:1',
        ]);
      },
      /^\+ node filter v0 egress pref \d+ u32/,
    ],
    ['nftables', () => node.run(['nft', 'add', 'table', 'inet', 't']), /^\+ node nft table inet t/],
    ['iptables', () => node.run(['iptables', '-A', 'FORWARD', '-j', 'DROP']), /^\+ node nft chain FORWARD \{ .*drop/],
    ['a sysctl', () => node.run(['sysctl', '-qw', 'net.ipv4.ip_forward=1']), /^\+ node sysctl ipv4\/ip_forward: 1/],
    ['a pinned map', pinMap, /^\+ pins .*\/m: map m type 1 key 4/],
    [
      'an entry of a map',
      () => {
        pinMap();
        must([
          'bpftool',
          'map',
          'update',
          'pinned',
          join(pins, 'm'),
          'key',
          '1',
          '0',
          '0',
          '0',
          'value',
          '2',
          '0',
          '0',
          '0',
        ]);
      },
      /^\+ pins .*\/m\[01000000\]: 02000000/,
    ],
  ])('%s', async (_what, change, line) => {
    const before = await state();
    expect(differences(before, await state())).toEqual([]);
    change();
    expect(differences(before, await state()).join('\n')).toMatch(new RegExp(line.source, 'm'));
  });

  test('an empty clsact qdisc and link-local addresses are none', async () => {
    const before = await state();
    node.run(['tc', 'qdisc', 'add', 'dev', 'v0', 'clsact']);
    node.ip('address', 'add', 'fe80::99/64', 'dev', 'v0', 'nodad');
    expect(differences(before, await state())).toEqual([]);
  });
});

describe('a testbed leaves nothing', () => {
  const leavings = (pid: number) => {
    const prefix = `ar${pid.toString(36)}.`;
    return ['/run/netns', '/tmp']
      .flatMap((one) => (existsSync(one) ? readdirSync(one) : []))
      .filter((name) => name.startsWith(prefix));
  };
  const program = `
    import { Testbed } from ${JSON.stringify(join(import.meta.dirname, 'netns.ts'))};
    const testbed = Testbed.open();
    testbed.namespace('n');
    testbed.bpffs('b');
    testbed.start(['sleep', '600']);
    console.log('up');
    if (process.argv[1] === 'end') process.exit(0);
    if (process.argv[1] === 'throw') throw new Error('on purpose');
    if (process.argv[1] === 'wait') setInterval(() => undefined, 1000);`;

  test.each([
    ['at its end', 'end', undefined],
    ['after an exception', 'throw', undefined],
    ['after SIGINT', 'wait', 'SIGINT'],
    ['after SIGTERM', 'wait', 'SIGTERM'],
    ['after SIGKILL and the next testbed', 'wait', 'SIGKILL'],
  ] as const)('%s', async (_when, how, signal) => {
    const child = spawn(process.execPath, ['--input-type=module', '-e', program, how], {
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    const ended = once(child, 'exit');
    await once(child.stdout, 'data');
    if (how === 'wait') expect(leavings(child.pid ?? 0)).toHaveLength(2);
    if (signal) child.kill(signal);
    await ended;
    if (signal === 'SIGKILL') {
      // The open testbed of another file may have swept by now; ours does for certain.
      Testbed.open().close();
    }
    expect(leavings(child.pid ?? 0)).toEqual([]);
  });
});
