// SPDX-License-Identifier: Apache-2.0
//
// A7: STATUS, from 1.1.0 on. containerd 2 calls it every five seconds, with the other CNI variables empty.

import type { Rule } from './rule.ts';
import { failed, silent } from './subject.ts';

export const statusRules: Rule[] = [
  {
    id: 'A7.1',
    level: 'MUST',
    spec: 'Section 2: STATUS',
    title: 'STATUS succeeds with nothing on stdout where ADD would work',
    versions: ['1.1.0'],
    async run(subject, version) {
      silent(await subject.call('STATUS', undefined, version), 'STATUS');
      subject.renew();
      silent(await subject.call('STATUS', undefined, version), 'STATUS where nothing was ever added');
    },
  },
  {
    id: 'A7.2',
    level: 'MUST',
    spec: 'Section 2: STATUS',
    title: 'STATUS changes nothing',
    versions: ['1.1.0'],
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod);
      const before = await subject.state(pod);
      silent(await subject.call('STATUS', undefined, version), 'STATUS');
      subject.sameLive(before, await subject.state(pod), 'changed by STATUS');
    },
  },
  {
    id: 'A7.3',
    level: 'MUST',
    spec: 'Section 5: Error (1); STATUS came with 1.1.0',
    title: 'STATUS with a configuration of an older version is error 1',
    async run(subject) {
      const version = subject.newest === '1.1.0' ? '1.0.0' : subject.newest;
      const codes = subject.newest === '1.1.0' ? [1] : [1, 4];
      failed(await subject.call('STATUS', undefined, version), `STATUS at ${version}`, codes);
    },
  },
  {
    id: 'A7.4',
    level: 'MUST',
    spec: 'Section 2: STATUS ("must return an error if it cannot serve ADD")',
    title: "STATUS with a wrong value of the plugin's own key is an error",
    versions: ['1.1.0'],
    async run(subject, version) {
      const stdin = subject.config(version, subject.badKeys());
      failed(await subject.call('STATUS', undefined, version, { stdin }), 'STATUS', [2, 7, 50, 51]);
    },
  },
];
