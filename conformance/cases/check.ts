// SPDX-License-Identifier: Apache-2.0
//
// A5: CHECK, from 0.4.0 on.

import type { JsonObject } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, silent } from './subject.ts';

export const checkRules: Rule[] = [
  {
    id: 'A5.1',
    level: 'MUST',
    spec: 'Section 2: CHECK',
    title: 'CHECK right after ADD succeeds with nothing on stdout',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      await subject.check(pod, version);
    },
  },
  {
    id: 'A5.2',
    level: 'MUST',
    spec: 'Section 2: CHECK ("must consult the prevResult")',
    title: 'CHECK without prevResult is an error',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      failed(await subject.call('CHECK', pod, version, { stdin: subject.config(version) }), 'CHECK');
    },
  },
  {
    id: 'A5.3',
    level: 'MUST',
    spec: 'Section 5: Error (7)',
    title: 'that error has code 7',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      failed(await subject.call('CHECK', pod, version, { stdin: subject.config(version) }), 'CHECK', [7]);
    },
  },
  {
    id: 'A5.4',
    level: 'MUST',
    spec: 'Section 2: CHECK ("must allow for the subsequent plugins\' modifications")',
    title:
      'CHECK succeeds after later plugins added an interface and a route and changed the MAC, prevResult saying so',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      const mac = '02:00:5e:ff:ff:01';
      await subject.add(pod, version);
      pod.namespace.ip('link', 'add', 'later0', 'type', 'veth', 'peer', 'name', 'later1');
      pod.namespace.ip('link', 'set', pod.ifname, 'address', mac);
      pod.namespace.ip('route', 'add', '192.0.2.0/24', 'via', pod.gateways[0], 'dev', pod.ifname, 'onlink');
      const prevResult = pod.result(version);
      const [host, own] = prevResult.interfaces as JsonObject[];
      const sandbox = pod.namespace.path;
      prevResult.interfaces = [host ?? {}, { ...own, mac }, { name: 'later0', sandbox }, { name: 'ifb9' }];
      prevResult.routes = [...(prevResult.routes as JsonObject[]), { dst: '192.0.2.0/24', gw: pod.gateways[0] }];
      const stdin = subject.config(version, { prevResult });
      silent(await subject.call('CHECK', pod, version, { stdin }), 'CHECK');
    },
  },
  {
    id: 'A5.5',
    level: 'SHOULD',
    spec: 'Section 2: CHECK',
    title: 'CHECK is an error where the namespace is gone',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      await pod.vanish(subject.node);
      failed(await subject.call('CHECK', pod, version), 'CHECK');
    },
  },
  {
    id: 'A5.6',
    level: 'SHOULD',
    spec: 'Section 2: CHECK',
    title: 'CHECK is an error where the interface is gone',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      await subject.add(pod, version);
      pod.namespace.ip('link', 'del', pod.ifname);
      failed(await subject.call('CHECK', pod, version), 'CHECK');
    },
  },
  {
    id: 'A5.7',
    level: 'SHOULD',
    spec: 'Section 2: CHECK ("should return an error if a resource is missing or in an invalid state")',
    title: 'CHECK is an error once what ADD made is gone (here: after DEL)',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      await subject.needState();
      const pod = subject.pod();
      await subject.add(pod, version);
      await subject.del(pod, version);
      failed(await subject.call('CHECK', pod, version), 'CHECK');
    },
  },
  {
    id: 'A5.8',
    level: 'MUST',
    spec: 'Section 2: CHECK (it only probes)',
    title: 'CHECK changes nothing, whether it succeeds or fails',
    versions: { since: '0.4.0' },
    async run(subject, version) {
      const pod = subject.pod();
      await subject.stateful();
      await subject.add(pod, version);
      const before = await subject.state(pod);
      await subject.check(pod, version);
      subject.sameLive(before, await subject.state(pod), 'changed by a CHECK that succeeded');
      await subject.del(pod, version);
      const after = await subject.state(pod);
      await subject.call('CHECK', pod, version);
      subject.same(after, await subject.state(pod), 'changed by a CHECK after DEL');
    },
  },
  {
    id: 'A5.9',
    level: 'MUST',
    spec: 'Section 5: Error (1); spec-v0.3.1 has no CHECK',
    title: 'CHECK with a 0.3.1 configuration is error 1',
    versions: ['0.3.1'],
    async run(subject, version) {
      const pod = subject.pod();
      const stdin = subject.config(version, { prevResult: pod.result(version) });
      failed(await subject.call('CHECK', pod, version, { stdin }), 'CHECK', [1]);
    },
  },
];
