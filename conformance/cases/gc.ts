// SPDX-License-Identifier: Apache-2.0
//
// A6: GC, from 1.1.0 on. libcni sends the valid attachments under two names and in four forms: a list, [], null, and
// neither key; all other CNI variables but CNI_PATH are empty.

import { gcConfig, type Json, type JsonObject, type PluginConf } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, type Pod, type Subject, silent } from './subject.ts';

const KEYS = ['cni.dev/valid-attachments', 'cni.dev/attachments'] as const;

function attachment(pod: Pod): { containerID: string; ifname: string } {
  return { containerID: pod.id, ifname: pod.ifname };
}

async function gc(subject: Subject, keys: JsonObject, what: string): Promise<void> {
  const stdin = subject.config('1.1.0', keys);
  silent(await subject.call('GC', undefined, '1.1.0', { stdin }), what);
}

/** An attachment that the runtime forgot: its pod is gone, DEL never came. Returns the state from before it. */
async function orphan(subject: Subject) {
  const before = await subject.state();
  const pod = subject.pod();
  await subject.add(pod);
  await pod.vanish(subject.node);
  return before;
}

export const gcRules: Rule[] = [
  {
    id: 'A6.1',
    level: 'MUST',
    spec: 'Section 2: GC',
    title: 'GC succeeds with nothing on stdout in each of the four forms, with nothing to collect',
    versions: ['1.1.0'],
    async run(subject, version) {
      for (const valid of [[], null, undefined, [{ containerID: 'never-added', ifname: 'eth0' }]]) {
        const entry: PluginConf = { ...subject.entry, type: subject.name };
        const stdin = gcConfig({ name: subject.network, cniVersion: version }, entry, valid);
        silent(await subject.call('GC', undefined, version, { stdin }), `GC of ${JSON.stringify(valid) ?? 'no key'}`);
      }
    },
  },
  {
    id: 'A6.2',
    level: 'MUST',
    spec: 'Section 2: GC (cni.dev/valid-attachments)',
    title: 'a valid attachment is left as it is, whichever of the two keys names it',
    versions: ['1.1.0'],
    async run(subject) {
      const pod = subject.pod();
      await subject.stateful();
      await subject.add(pod);
      const before = await subject.state(pod);
      const valid: Json = [attachment(pod)];
      for (const keys of [{ [KEYS[0]]: valid }, { [KEYS[1]]: valid }, { [KEYS[0]]: valid, [KEYS[1]]: valid }]) {
        await gc(subject, keys, `GC with ${Object.keys(keys).join(' and ')}`);
        subject.sameLive(before, await subject.state(pod), 'changed in a valid attachment');
        await subject.check(pod);
      }
    },
  },
  ...(
    [
      ['A6.3', 'a list without it', [{ containerID: 'someone-else', ifname: 'eth0' }]],
      ['A6.4', '[]', []],
      ['A6.5', 'null', null],
    ] as const
  ).map(
    ([id, form, valid]): Rule => ({
      id,
      level: 'SHOULD',
      spec: 'Section 2: GC ("should remove as many stale resources as possible")',
      title: `an attachment whose namespace is gone is removed: ${form}`,
      versions: ['1.1.0'],
      async run(subject) {
        await subject.needState();
        const before = await orphan(subject);
        await gc(subject, { [KEYS[0]]: valid as Json, [KEYS[1]]: valid as Json }, 'GC');
        subject.same(before, await subject.state(), 'left behind by GC');
      },
    }),
  ),
  {
    id: 'A6.6',
    level: 'runtimes',
    spec: 'libcni GCNetworkList without GCArgs (cnitool gc)',
    title: 'neither key: an attachment that lives stays, one whose namespace is gone is removed',
    versions: ['1.1.0'],
    async run(subject) {
      const pod = subject.pod();
      await subject.stateful();
      await subject.add(pod);
      const before = await subject.state(pod);
      if (await subject.stateful()) await orphan(subject);
      await gc(subject, {}, 'GC');
      subject.sameLive(before, await subject.state(pod), 'after GC without keys');
      await subject.check(pod);
    },
  },
  {
    id: 'A6.7',
    level: 'MUST',
    spec: 'Section 2: GC (attachments of this network)',
    title: "another network's attachment is left as it is",
    versions: ['1.1.0'],
    async run(subject, version) {
      const pod = subject.pod();
      await subject.stateful();
      await subject.add(pod);
      const before = await subject.state(pod);
      const stdin = subject.config(version, { name: 'other-network', [KEYS[0]]: [], [KEYS[1]]: [] });
      silent(await subject.call('GC', undefined, version, { stdin }), 'GC of another network');
      subject.sameLive(before, await subject.state(pod), "changed by another network's GC");
      await subject.check(pod);
    },
  },
  {
    id: 'A6.8',
    level: 'MUST',
    spec: 'Section 2: GC; Section 5: Error (6, 7)',
    title: 'a list of attachments that makes no sense is error 6 or 7 and removes nothing',
    versions: ['1.1.0'],
    async run(subject, version) {
      const pod = subject.pod();
      await subject.stateful();
      await subject.add(pod);
      const before = await subject.state(pod);
      for (const bad of ['x', [5], [{ containerID: 5, ifname: 'eth0' }], [{ ifname: 'eth0' }], { containerID: 'x' }]) {
        const stdin = subject.config(version, { [KEYS[0]]: bad, [KEYS[1]]: bad });
        failed(await subject.call('GC', undefined, version, { stdin }), `GC of ${JSON.stringify(bad)}`, [6, 7]);
        subject.sameLive(before, await subject.state(pod), `changed by GC of ${JSON.stringify(bad)}`);
      }
    },
  },
  {
    id: 'A6.9',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL of what GC removed succeeds',
    versions: ['1.1.0'],
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      await gc(subject, { [KEYS[0]]: [], [KEYS[1]]: [] }, 'GC');
      await subject.del(pod);
    },
  },
  {
    id: 'A6.10',
    level: 'MUST',
    spec: 'Section 5: Error (1); GC came with 1.1.0',
    title: 'GC with a configuration of an older version is error 1',
    async run(subject) {
      const version = subject.newest === '1.1.0' ? '1.0.0' : subject.newest;
      const stdin = subject.config(version, { [KEYS[0]]: [], [KEYS[1]]: [] });
      // A plugin from before 1.1.0 does not know the verb at all.
      const codes = subject.newest === '1.1.0' ? [1] : [1, 4];
      failed(await subject.call('GC', undefined, version, { stdin }), `GC at ${version}`, codes);
    },
  },
];
