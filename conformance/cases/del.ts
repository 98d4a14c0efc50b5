// SPDX-License-Identifier: Apache-2.0
//
// A4: DEL. It is best effort, may come at any time, as often as the runtime likes, and must not be able to block a
// pod's deletion.

import { execFileSync } from 'node:child_process';
import { mkdirSync, rmdirSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { must, type Namespace, removeNetns, until } from '../netns.ts';
import { older } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, type Subject, Violation } from './subject.ts';

const bare = (subject: Subject, version: string) => ({ stdin: subject.config(version) });

export const delRules: Rule[] = [
  {
    id: 'A4.1',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL after ADD succeeds with nothing on stdout, and so does another',
    versions: 'all',
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      await subject.del(pod, version);
      await subject.del(pod, version);
    },
  },
  {
    id: 'A4.2',
    level: 'MUST',
    spec: 'Section 2: DEL ("without error even if some resources are missing")',
    title: 'DEL of what was never added succeeds',
    versions: 'all',
    async run(subject, version) {
      await subject.del(subject.pod(), version);
    },
  },
  {
    id: 'A4.3',
    level: 'MUST',
    spec: 'Section 2: DEL (CNI_NETNS is not required)',
    title: 'DEL without CNI_NETNS, and with an empty one, succeeds',
    versions: 'all',
    async run(subject, version) {
      for (const netns of [undefined, '']) {
        const pod = subject.pod();
        await subject.add(pod, version);
        await subject.del(pod, version, { env: { CNI_NETNS: netns } });
      }
    },
  },
  {
    id: 'A4.4',
    level: 'MUST',
    spec: 'Section 2: DEL; kubelet and containerd after a node reboot',
    title: 'DEL with an empty CNI_NETNS and no prevResult, twice, succeeds',
    versions: 'all',
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      for (let time = 0; time < 2; time++) {
        await subject.del(pod, version, { ...bare(subject, version), env: { CNI_NETNS: '' } });
      }
    },
  },
  {
    id: 'A4.5',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL where the netns path is gone succeeds',
    versions: 'all',
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      await pod.vanish(subject.node);
      await subject.del(pod, version);
      rmSync(pod.namespace.path, { force: true });
    },
  },
  {
    id: 'A4.6',
    level: 'MUST',
    spec: 'Section 2: DEL; cri-o test/network.bats',
    title: 'DEL where the netns path is a plain file succeeds and leaves the file alone',
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      await pod.becomeFile(subject.node);
      await subject.del(pod);
      if (!statSync(pod.namespace.path, { throwIfNoEntry: false })?.isFile()) throw new Violation('the file is gone');
    },
  },
  {
    id: 'A4.7',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL where the netns path is a directory, or a FIFO without a writer, succeeds',
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      await pod.vanish(subject.node);
      mkdirSync(pod.namespace.path);
      await subject.del(pod);
      rmdirSync(pod.namespace.path);
      // Not below /run/netns: every ip(8) of the machine opens what is there to name namespaces, and would wait for ever.
      const fifo = join(subject.testbed.directory(`fifo.${pod.id}`), 'netns');
      execFileSync('mkfifo', [fifo]);
      await subject.del(pod, subject.newest, { env: { CNI_NETNS: fifo } });
    },
  },
  {
    id: 'A4.8',
    level: 'MUST',
    spec: 'Section 2: DEL ("should still succeed if empty"); libcni sends none below 0.4.0',
    title: 'DEL without prevResult, and with null, succeeds',
    versions: 'all',
    async run(subject, version) {
      for (const more of [{}, { prevResult: null }]) {
        const pod = subject.pod();
        await subject.add(pod, version);
        await subject.del(pod, version, { stdin: subject.config(version, more) });
      }
    },
  },
  {
    id: 'A4.9',
    level: 'SHOULD',
    spec: 'Section 2: DEL (best effort)',
    title: 'DEL with a prevResult that makes no sense succeeds',
    async run(subject) {
      const version = subject.newest;
      const pod = subject.pod();
      await subject.add(pod);
      for (const prevResult of ['x', { cniVersion: version, ips: [{ address: 'x' }] }, { cniVersion: '9.9.9' }]) {
        await subject.del(pod, version, { stdin: subject.config(version, { prevResult }) });
      }
    },
  },
  {
    id: 'A4.10',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL where the interface is gone from a namespace that lives succeeds',
    versions: 'all',
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      pod.namespace.ip('link', 'del', pod.ifname);
      await subject.del(pod, version);
    },
  },
  {
    id: 'A4.11',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL where the interface was renamed succeeds',
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      pod.namespace.ip('link', 'set', pod.ifname, 'down');
      pod.namespace.ip('link', 'set', pod.ifname, 'name', 'renamed0');
      await subject.del(pod);
    },
  },
  {
    id: 'A4.12',
    level: 'MUST',
    spec: 'Section 2: DEL; skel answers 8, and the pod can never be deleted',
    title: "DEL where CNI_NETNS is the plugin's own namespace succeeds",
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      await pod.vanish(subject.node);
      await subject.del(pod, subject.newest, { env: { CNI_NETNS: subject.node.path } });
    },
  },
  {
    id: 'A4.13',
    level: 'MUST',
    spec: 'Section 2: DEL ("release all resources", "undo all modifications made by this plugin")',
    title: 'ADD then DEL leaves links, addresses, rules, routes, qdiscs, filters, nftables, sysctls and pins as before',
    versions: 'all',
    async run(subject, version) {
      await subject.needState();
      const pod = subject.pod();
      const before = await subject.stateWithSysctls(pod);
      await subject.add(pod, version);
      await subject.del(pod, version);
      subject.same(before, await subject.stateWithSysctls(pod), 'left behind by DEL');
    },
  },
  {
    id: 'A4.14',
    level: 'MUST',
    spec: 'Section 2: DEL',
    title: 'DEL after the namespace went leaves nothing on the node',
    async run(subject) {
      await subject.needState();
      const before = await subject.stateWithSysctls();
      const pod = subject.pod();
      await subject.add(pod);
      await pod.vanish(subject.node);
      await subject.del(pod);
      subject.same(before, await subject.stateWithSysctls(), 'left behind by DEL');
    },
  },
  {
    id: 'A4.15',
    level: 'SHOULD',
    spec: 'Section 2: DEL; spec-v0.4.0 ("clean up as many resources as possible")',
    title: 'DEL after the namespace went, without CNI_NETNS and prevResult, leaves nothing on the node',
    async run(subject) {
      await subject.needState();
      const before = await subject.state();
      const pod = subject.pod();
      await subject.add(pod);
      await pod.vanish(subject.node);
      await subject.del(pod, subject.newest, { ...bare(subject, subject.newest), env: { CNI_NETNS: '' } });
      subject.same(before, await subject.state(), 'left behind by DEL');
    },
  },
  {
    id: 'A4.16',
    level: 'MUST',
    spec: 'Section 2: an attachment is a container id and an interface name',
    title: "DEL of one container leaves another's attachment as it is",
    async run(subject) {
      await subject.needState();
      const [mine, other] = [subject.pod(), subject.pod()];
      await subject.add(other);
      const before = await subject.state(other);
      await subject.add(mine);
      await subject.del(mine);
      await subject.del(mine, subject.newest, bare(subject, subject.newest));
      // What DEL leaves on the first one's own interface is A4.13's affair.
      subject.sameLive(before, await subject.state(other), "changed in the other's attachment", mine.hostIfname);
      if (!older(subject.newest, '0.4.0')) await subject.check(other);
    },
  },
  {
    id: 'A4.17',
    level: 'MUST',
    spec: 'Section 2: an attachment is a container id and an interface name',
    title: 'DEL leaves alone a later container whose namespace has the same path and interface name',
    async run(subject) {
      await subject.needState();
      const [gone, later] = [subject.pod(), subject.pod()];
      await subject.add(gone);
      await gone.vanish(subject.node);
      // The later container's namespace now has the path that the first one had.
      must(['ip', 'netns', 'attach', gone.namespace.name, String(await holder(subject, later.namespace))]);
      await subject.add(later);
      const before = await subject.state(later);
      await subject.del(gone);
      const after = await subject.state(later);
      removeNetns(gone.namespace);
      for (const key of [...before.keys()]) {
        if (key.startsWith('pod') && before.get(key) !== after.get(key)) {
          throw new Violation(`changed in the later container: ${key}: ${before.get(key)} to ${after.get(key)}`);
        }
      }
      if (!older(subject.newest, '0.4.0')) await subject.check(later);
    },
  },
  {
    id: 'A4.18',
    level: 'MUST',
    spec: 'Section 5: Error (1, 4, 6)',
    title: 'DEL still refuses what it cannot understand: a bad container id 4, a bad version 1, a bad configuration 6',
    async run(subject) {
      const pod = subject.idle();
      failed(await subject.call('DEL', pod, subject.newest, { env: { CNI_CONTAINERID: 'a/b' } }), 'id a/b', [4]);
      failed(await subject.call('DEL', pod, '9.0.0'), 'version 9.0.0', [1]);
      failed(await subject.call('DEL', pod, subject.newest, { stdin: '' }), 'empty stdin', [6]);
    },
  },
  {
    id: 'A4.19',
    level: 'runtimes',
    spec: 'administrators edit conflists while pods run',
    title: "DEL with a wrong value of the plugin's own key succeeds",
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      await subject.del(pod, subject.newest, { stdin: subject.config(subject.newest, subject.badKeys()) });
    },
  },
  {
    id: 'A4.20',
    level: 'runtimes',
    spec: 'containerd repeats DEL until it succeeds; ADD follows with a new id',
    title: 'ADD works again after DEL: same container id, then another one in the same namespace',
    async run(subject) {
      const pod = subject.pod();
      await subject.add(pod);
      await subject.del(pod);
      await subject.add(pod);
      await subject.del(pod);
      const env = { CNI_CONTAINERID: `${pod.id}-2` };
      const { status, stdout } = await subject.call('ADD', pod, subject.newest, { env });
      if (status !== 0) throw new Violation(`ADD of another container: exit ${status}, ${stdout}`);
      await subject.del(pod, subject.newest, { env });
    },
  },
];

/** The pid of a process that lives in the namespace until the testbed ends. */
async function holder(subject: Subject, namespace: Namespace): Promise<number> {
  const process = subject.testbed.start(namespace.argv(['sleep', '600']));
  const inside = () => statSync(`/proc/${process.pid}/ns/net`).ino === statSync(namespace.path).ino;
  await until('the process is in the namespace', inside);
  return process.pid;
}
