// SPDX-License-Identifier: Apache-2.0
//
// A2: the configuration on stdin.

import { encode, type JsonObject } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, result } from './subject.ts';

export const stdinRules: Rule[] = [
  {
    id: 'A2.1',
    level: 'MUST',
    spec: 'Section 5: Error (6)',
    title: 'a configuration that is not one JSON object of the right types is error 6',
    async run(subject) {
      const pod = subject.idle();
      const version = subject.newest;
      const good = subject.config(version, { prevResult: pod.result(version) });
      const text = encode(good);
      const bad: Record<string, string> = {
        empty: '',
        truncated: text.slice(0, -5),
        'a list': '[]',
        'something after the document': `${text}x`,
        'two documents': `${text}${text}`,
        'a byte order mark': `\ufeff${text}`,
        'a name that is a number': encode({ ...good, name: 5 }),
        'a cniVersion that is a number': encode({ ...good, cniVersion: 1 }),
      };
      for (const [what, stdin] of Object.entries(bad)) {
        failed(await subject.call('ADD', pod, version, { stdin }), `ADD: ${what}`, [6]);
      }
      failed(await subject.call('DEL', pod, version, { stdin: '{' }), 'DEL: truncated', [6]);
    },
  },
  {
    id: 'A2.2',
    level: 'MUST',
    spec: 'Section 1: name; Section 5: Error (7)',
    title: 'no name, an empty one, or null for a configuration is error 7',
    async run(subject) {
      const pod = subject.idle();
      const { name: _, ...rest } = subject.config(subject.newest, { prevResult: pod.result(subject.newest) });
      for (const stdin of ['null', encode(rest), encode({ ...rest, name: '' })]) {
        failed(await subject.call('ADD', pod, subject.newest, { stdin }), `ADD of ${stdin.slice(0, 60)}`, [7]);
      }
    },
  },
  {
    id: 'A2.3',
    level: 'MUST',
    spec: 'Section 1: name (its characters); Section 5: Error (7)',
    title: 'a name with characters that are not allowed is error 7',
    async run(subject) {
      const pod = subject.idle();
      for (const name of ['a b', '-a', 'a/b', '../a']) {
        const stdin = subject.config(subject.newest, { name, prevResult: pod.result(subject.newest) });
        failed(await subject.call('ADD', pod, subject.newest, { stdin }), `name ${JSON.stringify(name)}`, [7]);
      }
    },
  },
  {
    id: 'A2.4',
    level: 'MUST',
    spec: 'Section 5: Error (1); Section 1: cniVersion',
    title: 'a cniVersion that is not one of those advertised, to the letter, is error 1 (absent means 0.1.0)',
    async run(subject) {
      const pod = subject.idle();
      const prevResult = pod.result(subject.newest);
      for (const cniVersion of ['9.0.0', `v${subject.newest}`, subject.newest.replace(/\.\d+$/, ''), '99']) {
        const stdin = subject.config(cniVersion, { prevResult });
        for (const verb of ['ADD', 'DEL']) {
          failed(await subject.call(verb, pod, cniVersion, { stdin }), `${verb} at ${cniVersion}`, [1]);
        }
      }
      const versions = await subject.call('VERSION', undefined, subject.newest, { stdin: '{}' });
      if (versions.stdout.includes('"0.1.0"')) return;
      const { cniVersion: _, ...stdin } = subject.config(subject.newest, { prevResult });
      failed(await subject.call('ADD', pod, subject.newest, { stdin }), 'ADD without cniVersion', [1]);
    },
  },
  {
    id: 'A2.5',
    level: 'MUST',
    spec: 'Section 2: ADD; spec-v0.4.0: "unaware of prevResult"',
    title: 'ADD of a chained plugin without a prevResult (absent, null) fails with one error document',
    async run(subject) {
      for (const more of [{}, { prevResult: null }]) {
        const pod = subject.pod();
        const stdin = subject.config(subject.newest, more);
        failed(await subject.call('ADD', pod, subject.newest, { stdin }), `ADD with ${JSON.stringify(more)}`);
      }
    },
  },
  {
    id: 'A2.6',
    level: 'MUST',
    spec: 'Section 5: Error (7)',
    title: 'that error has code 7',
    async run(subject) {
      const stdin = subject.config(subject.newest);
      failed(await subject.call('ADD', subject.pod(), subject.newest, { stdin }), 'ADD', [7]);
    },
  },
  {
    id: 'A2.7',
    level: 'MUST',
    spec: 'Section 2: ADD; Section 5: Result',
    title: 'a prevResult of the wrong shape or with addresses that are not CIDR is an error that changes nothing',
    async run(subject) {
      const version = subject.newest;
      const pod = subject.pod();
      const good = pod.result(version);
      const bad: Record<string, JsonObject[string]> = {
        'a string': 'x',
        'a list': [],
        'ips that are no list': { ...good, ips: 'x' },
        'an address that is no CIDR': { ...good, ips: [{ interface: 1, address: '10.88.0.300/24' }] },
        'interfaces that are no objects': { ...good, interfaces: ['eth0'] },
      };
      const before = await subject.state(pod);
      for (const [what, prevResult] of Object.entries(bad)) {
        const stdin = subject.config(version, { prevResult });
        failed(await subject.call('ADD', pod, version, { stdin }), `prevResult: ${what}`);
      }
      subject.same(before, await subject.state(pod), 'changed by ADDs that failed');
    },
  },
  {
    id: 'A2.8',
    level: 'MUST',
    spec: 'Section 5: Error (6, 7)',
    title: 'those errors have code 6 or 7',
    async run(subject) {
      const version = subject.newest;
      const good = subject.idle().result(version);
      for (const prevResult of ['x', { ...good, ips: 'x' }, { ...good, ips: [{ address: '10.88.0.300/24' }] }]) {
        const stdin = subject.config(version, { prevResult });
        failed(await subject.call('ADD', subject.idle(), version, { stdin }), JSON.stringify(prevResult), [6, 7]);
      }
    },
  },
  {
    id: 'A2.9',
    level: 'MUST',
    spec: 'Section 5: Error (5)',
    title: 'stdin that cannot be read (a directory) is error 5',
    async run(subject) {
      const outcome = await subject.call('ADD', subject.idle(), subject.newest, { shell: 'exec "$0" </' });
      failed(outcome, 'ADD', [5]);
    },
  },
  {
    id: 'A2.10',
    level: 'skel',
    spec: 'Section 5: Error (1, 6)',
    title: 'a cniVersion that is no version is error 1 or 6, for CHECK too',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.idle();
      const stdin = subject.config('1.bad', { prevResult: pod.result(version) });
      failed(await subject.call('ADD', pod, version, { stdin }), 'ADD', [1, 6]);
      failed(await subject.call('CHECK', pod, version, { stdin }), 'CHECK', [1, 6]);
    },
  },
  {
    id: 'A2.11',
    level: 'runtimes',
    spec: 'annotations are text that users choose',
    title: 'keys such as __proto__ and constructor, and text of any kind, do no harm',
    async run(subject) {
      const pod = subject.pod();
      const version = subject.newest;
      const config = encode(subject.config(version, { prevResult: pod.result(version) }));
      const proto = '"__proto__":{"prevResult":null,"cniVersion":"9","name":"a/b"}';
      const args = `"args":{${proto},"constructor":{"prototype":1},"t":"\\u0000\\"\\n\\ud83d\\ude00"}`;
      const stdin = `{${args},"cni.dev/x":{${proto}},${config.slice(1)}`;
      result(await subject.call('ADD', pod, version, { stdin }), 'ADD');
    },
  },
  {
    id: 'A2.12',
    level: 'MUST',
    spec: 'Section 5: Error (2, 7)',
    title: "a wrong value of the plugin's own key is error 2 or 7",
    async run(subject) {
      const pod = subject.idle();
      const version = subject.newest;
      const stdin = subject.config(version, { ...subject.badKeys(), prevResult: pod.result(version) });
      failed(await subject.call('ADD', pod, version, { stdin }), 'ADD', [2, 7]);
    },
  },
];
