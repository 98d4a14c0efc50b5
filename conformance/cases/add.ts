// SPDX-License-Identifier: Apache-2.0
//
// A3: ADD, and the Result it prints.

import { existsSync, rmSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import { removeNetns } from '../netns.ts';
import { decodeResult, isObject, type Json, type JsonObject } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, NotApplicable, result, type Subject, Violation } from './subject.ts';

function list(value: Json | undefined): Json[] {
  return Array.isArray(value) ? value : [];
}

/**
 * What a runtime sees of `got` is what it saw of `given`; a plugin that does not promise to pass the Result through
 * may add to it and change an interface's MAC or MTU, but takes nothing away and keeps the order.
 */
export function keeps(given: JsonObject, got: JsonObject, passThrough: boolean): void {
  let decoded: JsonObject;
  try {
    decoded = decodeResult(got);
  } catch (error) {
    throw new Violation(`libcni cannot read the Result: ${error}: ${JSON.stringify(got)}`);
  }
  const wanted = decodeResult({ ...given, cniVersion: got.cniVersion ?? null });
  const differ = (key: string) =>
    new Violation(`${key}: given ${JSON.stringify(wanted[key])}, printed ${JSON.stringify(decoded[key])}`);
  for (const key of passThrough ? ['interfaces', 'ips', 'routes', 'dns'] : ['dns']) {
    if (!isDeepStrictEqual(wanted[key], decoded[key])) throw differ(key);
  }
  for (const key of ['ips', 'routes']) {
    const kept = list(wanted[key]).every((one) => list(decoded[key]).some((other) => isDeepStrictEqual(one, other)));
    if (!kept) throw differ(key);
  }
  const names = (one: Json) => (isObject(one) ? `${one.name} ${one.sandbox ?? ''}` : '');
  const printed = list(decoded.interfaces).map(names);
  if (!list(wanted.interfaces).every((one, index) => printed[index] === names(one))) throw differ('interfaces');
}

async function add(subject: Subject, version: string, prevResult: (given: JsonObject) => JsonObject) {
  const pod = subject.pod();
  const given = prevResult(pod.result(version));
  const stdin = subject.config(version, { prevResult: given });
  return { pod, given, outcome: await subject.call('ADD', pod, version, { stdin }) };
}

export const addRules: Rule[] = [
  {
    id: 'A3.1',
    level: 'MUST',
    spec: 'Section 2: ADD; Section 5: ADD Success',
    title: "ADD prints one Result whose cniVersion is the configuration's",
    versions: 'all',
    async run(subject, version) {
      const printed = await subject.add(subject.pod(), version);
      if (printed.cniVersion !== version) throw new Violation(`cniVersion is ${JSON.stringify(printed.cniVersion)}`);
    },
  },
  {
    id: 'A3.2',
    level: 'MUST',
    spec: 'Section 2: ADD ("must output an equivalent result")',
    title: 'the Result keeps what prevResult holds (interfaces, IPv4 and IPv6 addresses, routes, DNS)',
    versions: 'all',
    async run(subject, version) {
      const pod = subject.pod();
      keeps(pod.result(version), await subject.add(pod, version), subject.options.passThrough ?? false);
    },
  },
  {
    id: 'A3.3',
    level: 'skel',
    spec: 'pkg/types/create; libcni fills in an absent cniVersion of a Result',
    title: 'a prevResult without cniVersion is read as one of the configuration',
    versions: 'all',
    async run(subject, version) {
      const { given, outcome } = await add(subject, version, ({ cniVersion: _, ...rest }) => rest);
      keeps(given, result(outcome, 'ADD'), subject.options.passThrough ?? false);
    },
  },
  {
    id: 'A3.4',
    level: 'skel',
    spec: 'pkg/types: Result.GetAsVersion; Section 5: ADD Success',
    title: 'a prevResult of an older version of the same form is accepted, the Result has the version of the config',
    versions: ['0.4.0', '1.1.0'],
    async run(subject, version) {
      const from = version === '0.4.0' ? '0.3.1' : '1.0.0';
      const { outcome } = await add(subject, version, (given) => ({ ...given, cniVersion: from }));
      const { cniVersion } = result(outcome, 'ADD');
      if (cniVersion !== version) throw new Violation(`prevResult ${from}, config ${version}, Result ${cniVersion}`);
    },
  },
  {
    id: 'A3.5',
    level: 'skel',
    spec: 'pkg/types/100: NewResult',
    title: 'a prevResult of the other form (0.4.0 in a 1.x configuration) is an error',
    versions: { since: '1.0.0' },
    async run(subject, version) {
      const pod = subject.pod();
      const stdin = subject.config(version, { prevResult: pod.result('0.4.0') });
      failed(await subject.call('ADD', pod, version, { stdin }), 'ADD');
    },
  },
  {
    id: 'A3.6',
    level: 'MUST',
    spec: 'Section 5: ADD Success (1.1.0)',
    title: 'what 1.1.0 added to Results is kept: mtu, socketPath, pciID; route mtu, advmss, priority, table, scope',
    versions: ['1.1.0'],
    async run(subject, version) {
      const { given, outcome } = await add(subject, version, (plain) => ({
        ...plain,
        interfaces: [
          { ...(list(plain.interfaces)[0] as JsonObject), mtu: 1500 },
          { ...(list(plain.interfaces)[1] as JsonObject), mtu: 1500, socketPath: '/run/s', pciID: '0000:00:1f.6' },
        ],
        routes: [
          { dst: '0.0.0.0/0', gw: '10.88.255.254', mtu: 1400, advmss: 1360, priority: 100, table: 50, scope: 253 },
          { dst: '10.9.0.0/16', table: 0, scope: 0 },
        ],
      }));
      keeps(given, result(outcome, 'ADD'), subject.options.passThrough ?? false);
    },
  },
  {
    id: 'A3.7',
    level: 'MUST',
    spec: 'Section 2: ADD (the interface named by CNI_IFNAME; a chained plugin adjusts it)',
    title: 'ADD where the interface is not in the namespace is an error that changes nothing',
    async run(subject) {
      const pod = subject.pod();
      const before = await subject.stateWithSysctls(pod);
      const outcome = await subject.call('ADD', pod, subject.newest, { env: { CNI_IFNAME: 'absent0' } });
      failed(outcome, 'ADD');
      subject.same(before, await subject.stateWithSysctls(pod), 'changed by an ADD that failed');
    },
  },
  {
    id: 'A3.8',
    level: 'MUST',
    spec: 'Section 2: ADD (CNI_NETNS)',
    title: 'ADD where CNI_NETNS does not exist, or is a plain file, is an error',
    async run(subject) {
      const pod = subject.pod();
      await pod.vanish(subject.node);
      failed(await subject.call('ADD', pod, subject.newest), 'ADD, no such path');
      rmSync(pod.namespace.path, { force: true });
      await pod.becomeFile(subject.node).catch((error: unknown) => {
        if (!String(error).includes('ENOENT')) throw error;
      });
      failed(await subject.call('ADD', pod, subject.newest), 'ADD, a plain file');
    },
  },
  {
    id: 'A3.9',
    level: 'runtimes',
    spec: 'the netns path belongs to the runtime',
    title: 'no verb makes a file at a netns path that does not exist',
    async run(subject) {
      for (const verb of ['ADD', 'CHECK', 'DEL'].slice(0, subject.newest === '0.3.1' ? 1 : 3)) {
        const pod = subject.pod();
        await pod.vanish(subject.node);
        await subject.call(verb, pod, subject.newest);
        if (existsSync(pod.namespace.path)) throw new Violation(`${verb} made ${pod.namespace.path}`);
      }
    },
  },
  {
    id: 'A3.10',
    level: 'skel',
    spec: 'pkg/skel/skel.go (code 8); plugins#714',
    title: "CNI_NETNS that is the plugin's own namespace: one error document, nothing changed",
    async run(subject) {
      const pod = subject.pod();
      const before = await subject.state(pod);
      const env = { CNI_NETNS: subject.node.path, CNI_IFNAME: pod.hostIfname };
      failed(await subject.call('ADD', pod, subject.newest, { env }), 'ADD');
      subject.same(before, await subject.state(pod), 'changed by an ADD that failed');
    },
  },
  {
    id: 'A3.11',
    level: 'runtimes',
    spec: 'runtimes retry ADD',
    title: 'a second ADD of the same attachment succeeds and changes nothing more',
    async run(subject) {
      await subject.stateful();
      const pod = subject.pod();
      await subject.add(pod);
      // Entries of maps may hold the time; that they are the same entries is enough.
      const state = async () =>
        new Map([...(await subject.state(pod))].map(([key, value]) => [key, /^pins .*\[/.test(key) ? 'entry' : value]));
      const once = await state();
      await subject.add(pod);
      subject.sameLive(once, await state(), 'changed by the second ADD');
    },
  },
  {
    id: 'A3.12',
    level: 'runtimes',
    spec: 'runtimes retry ADD',
    title: 'after ADD, ADD one DEL brings back the state before',
    async run(subject) {
      await subject.needState();
      const pod = subject.pod();
      const before = await subject.state(pod);
      await subject.add(pod);
      await subject.call('ADD', pod, subject.newest);
      await subject.del(pod);
      subject.same(before, await subject.state(pod), 'left behind by DEL');
    },
  },
  {
    id: 'A3.13',
    level: 'runtimes',
    spec: 'docker and podman pass /proc/PID/ns/net; /var/run is a link to /run',
    title: 'CNI_NETNS may be another path of the same namespace than the sandbox in prevResult',
    async run(subject) {
      const paths = [(pod: string) => `/var${pod}`];
      const procPod = subject.pod();
      const process = subject.testbed.start(procPod.namespace.argv(['sleep', '600']));
      const started = subject.pod();
      for (const [pod, path] of [
        [started, paths[0]?.(started.namespace.path) ?? ''],
        [procPod, `/proc/${process.pid}/ns/net`],
      ] as const) {
        if (!existsSync(path)) throw new NotApplicable(`${path} does not exist here`);
        result(await subject.call('ADD', pod, subject.newest, { env: { CNI_NETNS: path } }), `ADD with ${path}`);
        await subject.del(pod, subject.newest, { env: { CNI_NETNS: path } });
      }
      await process.stop();
    },
  },
  {
    id: 'A3.14',
    level: 'runtimes',
    spec: 'a runtime that has no Result yet calls DEL after a failing ADD',
    title: 'after an ADD in a namespace that had just gone, DEL without prevResult succeeds',
    async run(subject) {
      const pod = subject.pod();
      removeNetns(pod.namespace);
      await subject.call('ADD', pod, subject.newest);
      await subject.del(pod, subject.newest, { stdin: subject.config(subject.newest) });
    },
  },
  {
    id: 'A3.15',
    level: 'MUST',
    spec: 'Section 5: ADD Success (interfaces and the index of an address are optional)',
    title: 'a prevResult whose addresses name no interface is accepted',
    async run(subject) {
      const { outcome } = await add(subject, subject.newest, (given) => ({
        ...given,
        ips: list(given.ips).map((ip) => {
          const { interface: _, ...rest } = ip as JsonObject;
          return rest;
        }),
      }));
      result(outcome, 'ADD');
    },
  },
];
