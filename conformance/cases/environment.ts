// SPDX-License-Identifier: Apache-2.0
//
// A1: the parameters in the environment.

import type { Rule } from './rule.ts';
import { failed, failedNaming, result, silent, Violation } from './subject.ts';

const BAD_IDS = ['a/b', '-a', '.a', 'a b', 'a:b', ''];
const BAD_IFNAMES = ['sixteen-bytes-xx', '.', '..', 'a/b', 'a:b', 'a b', 'a\u00a0b', '\u00e9'.repeat(8)];

export const environmentRules: Rule[] = [
  {
    id: 'A1.1',
    level: 'skel',
    spec: 'Section 2: Parameters; pkg/skel/skel.go',
    title: 'without CNI_COMMAND: an empty stdout and exit 0, or error 4',
    async run(subject) {
      const outcome = await subject.call('ADD', subject.idle(), subject.newest, { env: { CNI_COMMAND: undefined } });
      if (outcome.status === 0) silent(outcome, 'no CNI_COMMAND');
      else failed(outcome, 'no CNI_COMMAND', [4]);
    },
  },
  {
    id: 'A1.2',
    level: 'MUST',
    spec: 'Section 2: Parameters; Section 5: Error',
    title: 'an unknown verb is error 4; verbs are case-sensitive',
    async run(subject) {
      for (const verb of ['FOO', 'add', 'Add', '']) {
        const pod = subject.idle();
        const stdin = subject.config(subject.newest, { prevResult: pod.result(subject.newest) });
        const outcome = await subject.call(verb, pod, subject.newest, { stdin });
        // An empty CNI_COMMAND is as good as none (A1.1).
        if (verb === '' && outcome.status === 0) silent(outcome, 'empty CNI_COMMAND');
        else failed(outcome, `CNI_COMMAND=${verb}`, [4]);
      }
    },
  },
  {
    id: 'A1.3',
    level: 'MUST',
    spec: 'Section 2: ADD, DEL, CHECK; Section 5: Error',
    title: 'a required variable that is absent is error 4, and msg names it',
    async run(subject) {
      const pod = subject.idle();
      const required = {
        ADD: ['CNI_CONTAINERID', 'CNI_NETNS', 'CNI_IFNAME'],
        DEL: ['CNI_CONTAINERID', 'CNI_IFNAME'],
        ...(subject.newest !== '0.3.1' && { CHECK: ['CNI_CONTAINERID', 'CNI_NETNS', 'CNI_IFNAME'] }),
      };
      for (const [verb, names] of Object.entries(required)) {
        for (const name of names) {
          const outcome = await subject.call(verb, pod, subject.newest, { env: { [name]: undefined } });
          failedNaming(outcome, `${verb} without ${name}`, [4], [name]);
        }
      }
    },
  },
  {
    id: 'A1.4',
    level: 'MUST',
    spec: 'Section 5: Error ("the error message must contain the names of invalid variables")',
    title: 'all absent variables are named at once',
    async run(subject) {
      const names = ['CNI_CONTAINERID', 'CNI_NETNS', 'CNI_IFNAME'];
      const env = Object.fromEntries(names.map((name) => [name, undefined]));
      const outcome = await subject.call('ADD', subject.idle(), subject.newest, { env });
      failedNaming(outcome, 'ADD with nothing', [4], names);
    },
  },
  {
    id: 'A1.5',
    level: 'MUST',
    spec: 'Section 2: Parameters (CNI_CONTAINERID); pkg/utils',
    title: 'a container id with other characters, or that starts with none of a-z, A-Z, 0-9, is error 4',
    async run(subject) {
      for (const verb of ['ADD', 'DEL']) {
        for (const id of BAD_IDS) {
          const outcome = await subject.call(verb, subject.idle(), subject.newest, { env: { CNI_CONTAINERID: id } });
          failed(outcome, `${verb} of ${JSON.stringify(id)}`, [4]);
        }
      }
    },
  },
  {
    id: 'A1.6',
    level: 'skel',
    spec: 'Section 2: Parameters (CNI_IFNAME); pkg/utils',
    title: 'an interface name that the kernel cannot have (over 15 bytes, ., .., / or : or space in it) is error 4',
    async run(subject) {
      for (const verb of ['ADD', 'DEL']) {
        for (const ifname of BAD_IFNAMES) {
          const outcome = await subject.call(verb, subject.idle(), subject.newest, { env: { CNI_IFNAME: ifname } });
          failed(outcome, `${verb} of ${JSON.stringify(ifname)}`, [4]);
        }
      }
    },
  },
  {
    id: 'A1.7',
    level: 'MUST',
    spec: 'Section 5: Error ("the error message must contain the names of invalid variables")',
    title: 'msg names the variable whose value is invalid',
    async run(subject) {
      for (const [name, value] of [
        ['CNI_CONTAINERID', 'a/b'],
        ['CNI_IFNAME', 'a:b'],
      ] as const) {
        const outcome = await subject.call('ADD', subject.idle(), subject.newest, { env: { [name]: value } });
        failedNaming(outcome, `${name}=${value}`, [4], [name]);
      }
    },
  },
  {
    id: 'A1.8',
    level: 'skel',
    spec: 'Section 2: Parameters; pkg/skel/skel.go',
    title: 'variables that a verb does not need are not judged (VERSION; GC, STATUS from 1.1.0 on)',
    async run(subject) {
      const env = { CNI_CONTAINERID: 'a/b', CNI_IFNAME: '..', CNI_NETNS: '/nonexistent' };
      const version = subject.newest;
      const stdin = { cniVersion: version };
      result(await subject.call('VERSION', undefined, version, { env, stdin }), 'VERSION');
      if (version !== '1.1.0') return;
      silent(await subject.call('STATUS', undefined, version, { env }), 'STATUS');
      silent(
        await subject.call('GC', undefined, version, {
          env,
          stdin: subject.config(version, { 'cni.dev/valid-attachments': [] }),
        }),
        'GC',
      );
    },
  },
  {
    id: 'A1.9',
    level: 'MUST',
    spec: 'Section 2: ADD, DEL (CNI_PATH is optional)',
    title: 'ADD and DEL work without CNI_PATH and CNI_ARGS',
    async run(subject) {
      const pod = subject.pod();
      const env = { CNI_PATH: undefined, CNI_ARGS: undefined };
      result(await subject.call('ADD', pod, subject.newest, { env }), 'ADD');
      await subject.del(pod, subject.newest, { env });
    },
  },
  {
    id: 'A1.10',
    level: 'MUST',
    spec: 'Section 2: GC (CNI_PATH is required)',
    title: 'GC without CNI_PATH is error 4, and msg names it',
    versions: ['1.1.0'],
    async run(subject, version) {
      const stdin = subject.config(version, { 'cni.dev/valid-attachments': [] });
      const outcome = await subject.call('GC', undefined, version, { env: { CNI_PATH: undefined }, stdin });
      failedNaming(outcome, 'GC', [4], ['CNI_PATH']);
    },
  },
  {
    id: 'A1.11',
    level: 'skel',
    spec: 'Section 2: Parameters; pkg/utils (no length limit)',
    title: 'a container id of 64 hex digits, and one with every allowed character, are accepted',
    async run(subject) {
      const pod = subject.pod();
      for (const id of ['0123456789abcdef'.repeat(4), `A_z.0-${pod.id}`]) {
        const env = { CNI_CONTAINERID: id };
        result(await subject.call('ADD', pod, subject.newest, { env }), `ADD of ${id}`);
        const { status } = await subject.call('DEL', pod, subject.newest, { env });
        if (status !== 0) throw new Violation(`DEL of ${id}: exit ${status}`);
      }
    },
  },
];
