// SPDX-License-Identifier: Apache-2.0
//
// A8: VERSION. A9: what differs between versions. A10: CNI_ARGS.

import { isObject, type Json, older } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, result, type Subject, VERSIONS, type Version, Violation } from './subject.ts';

/** As libcni calls it: dummies for what old plugins wanted. */
const DUMMIES = { CNI_NETNS: 'dummy', CNI_IFNAME: 'dummy', CNI_PATH: 'dummy' };

export async function advertised(subject: Subject): Promise<{ cniVersion: Json | undefined; versions: string[] }> {
  const outcome = await subject.call('VERSION', undefined, '1.1.0', { env: DUMMIES, stdin: { cniVersion: '1.1.0' } });
  const { cniVersion, supportedVersions } = result(outcome, 'VERSION');
  if (!Array.isArray(supportedVersions)) throw new Violation(`supportedVersions: ${JSON.stringify(supportedVersions)}`);
  return { cniVersion, versions: supportedVersions.map(String) };
}

/** Versions of ours that the plugin advertises, oldest first. */
export async function supportedVersions(subject: Subject): Promise<Version[]> {
  const { versions } = await advertised(subject);
  return VERSIONS.filter((version) => versions.includes(version));
}

const ARGS = {
  IgnoreUnknown: '1',
  K8S_POD_NAMESPACE: 'conformance',
  K8S_POD_NAME: 'a',
  K8S_POD_INFRA_CONTAINER_ID: 'b',
  K8S_POD_UID: '0f8fad5b-d9cb-469f-a165-70867728950e',
};

export const versionRules: Rule[] = [
  {
    id: 'A8.1',
    level: 'MUST',
    spec: 'Section 2: VERSION; Section 5: VERSION Success',
    title: 'VERSION prints cniVersion and supportedVersions, a list of strings that is not empty',
    async run(subject) {
      const { cniVersion, versions } = await advertised(subject);
      if (typeof cniVersion !== 'string' || cniVersion === '') throw new Violation(`cniVersion: ${cniVersion}`);
      if (versions.length === 0) throw new Violation('supportedVersions is empty');
      if (!versions.every((one) => /^\d+\.\d+\.\d+$/.test(one))) throw new Violation(`versions: ${versions}`);
    },
  },
  {
    id: 'A8.2',
    level: 'MUST',
    spec: 'Section 5: VERSION Success ("cniVersion: the version specified on input")',
    title: 'its cniVersion is the one of the input, where that is supported',
    versions: 'all',
    async run(subject, version) {
      const stdin = { cniVersion: version };
      const printed = result(await subject.call('VERSION', undefined, version, { env: DUMMIES, stdin }), 'VERSION');
      if (printed.cniVersion !== version) throw new Violation(`input ${version}, printed ${printed.cniVersion}`);
    },
  },
  {
    id: 'A8.3',
    level: 'skel',
    spec: 'pkg/skel/skel_test.go ("does not read from stdin")',
    title: 'VERSION works with an empty stdin, with one that is no JSON, with an unknown cniVersion',
    async run(subject) {
      for (const stdin of ['', 'x', '{"cniVersion":"9.9.9"}', '{}', 'null']) {
        result(await subject.call('VERSION', undefined, '', { env: DUMMIES, stdin }), `VERSION of ${stdin}`);
      }
    },
  },
  {
    id: 'A8.4',
    level: 'MUST',
    spec: 'Section 2: VERSION',
    title: 'each advertised version from 0.3.1 on works, each other one is error 1',
    async run(subject) {
      for (const version of VERSIONS) {
        const pod = subject.pod();
        const outcome = await subject.call('ADD', pod, version);
        if (subject.supported.includes(version)) result(outcome, `ADD at ${version}`);
        else failed(outcome, `ADD at ${version}`, [1]);
      }
    },
  },
  {
    id: 'A8.5',
    level: 'MUST',
    spec: 'Section 2: VERSION (no other parameter)',
    title: 'VERSION works with CNI_COMMAND alone',
    async run(subject) {
      const env = Object.fromEntries(
        ['CNI_CONTAINERID', 'CNI_NETNS', 'CNI_IFNAME', 'CNI_ARGS', 'CNI_PATH'].map((name) => [name, undefined]),
      );
      result(await subject.call('VERSION', undefined, '', { env, stdin: { cniVersion: '1.0.0' } }), 'VERSION');
    },
  },
  {
    id: 'A9.1',
    level: 'MUST',
    spec: 'spec-v0.3.1, 0.4.0: Result (ips[].version); 1.0.0: removed',
    title: 'addresses carry a version up to 0.4.0 and none from 1.0.0 on',
    versions: 'all',
    async run(subject, version) {
      const { ips } = await subject.add(subject.pod(), version);
      if (!Array.isArray(ips) || ips.length < 2) throw new Violation(`ips: ${JSON.stringify(ips)}`);
      const versions = ips.map((ip) => (isObject(ip) ? ip.version : undefined));
      const wanted = older(version, '1.0.0') ? ['4', '6'] : [undefined, undefined];
      if (versions[0] !== wanted[0] || versions[1] !== wanted[1]) {
        throw new Violation(`ips[].version at ${version}: ${JSON.stringify(versions)}`);
      }
    },
  },
  {
    id: 'A10.1',
    level: 'runtimes',
    spec: 'CONVENTIONS.md: CNI_ARGS; containerd sends the pairs in random order',
    title: "the runtimes' CNI_ARGS are accepted in any order",
    async run(subject) {
      const pairs = Object.entries(ARGS).map(([key, value]) => `${key}=${value}`);
      for (const order of [pairs, pairs.toReversed(), [...pairs.slice(2), ...pairs.slice(0, 2)]]) {
        const pod = subject.pod();
        const env = { CNI_ARGS: order.join(';') };
        result(await subject.call('ADD', pod, subject.newest, { env }), `ADD with ${env.CNI_ARGS}`);
      }
    },
  },
  {
    id: 'A10.2',
    level: 'runtimes',
    spec: 'CONVENTIONS.md: CNI_ARGS',
    title: 'arguments it does not use never fail it: unknown ones, no IgnoreUnknown, no "=", two "=", empty',
    async run(subject) {
      for (const args of ['UNKNOWN=1', 'IgnoreUnknown=0;X=Y', 'X', 'X=a=b', ';;', 'K8S_POD_NAME=']) {
        const pod = subject.pod();
        result(await subject.call('ADD', pod, subject.newest, { env: { CNI_ARGS: args } }), `ADD with ${args}`);
      }
    },
  },
];
