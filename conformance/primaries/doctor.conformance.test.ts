// SPDX-License-Identifier: Apache-2.0
//
// `doctor` on nodes that look like those of primary plugins: the conflists that they write, devices with their names,
// programs with the names of theirs.

import { copyFileSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { PRIMARIES } from '../../plugin/cli/primaries.ts';
import { executable, requireExecutable } from '../e2e/topology.ts';
import { type Namespace, Testbed } from '../netns.ts';
import { Programs } from './programs.ts';

const CONFLISTS = join(import.meta.dirname, 'conflists');
const NAMED = join(import.meta.dirname, 'named.bpf.c');
const ENTRY = {
  type: 'ambient-redirect',
  enrollment: 'all',
  proxy: { match: { namespace: 'istio-system', name: 'ztunnel-*' } },
};

interface Finding {
  level: string;
  subject: string;
  text: string;
}

const testbed = Testbed.open();
beforeAll(() => requireExecutable());
afterAll(() => testbed.close());
let count = 0;

class Node {
  readonly namespace: Namespace;
  readonly netDir: string;
  readonly #runDir: string;
  readonly #bpffs: string;

  constructor() {
    count += 1;
    this.namespace = testbed.namespace(`node${count}`);
    this.netDir = testbed.directory(`net.d-${count}`);
    this.#runDir = testbed.directory(`run-${count}`);
    this.#bpffs = testbed.bpffs(`bpffs-${count}`);
  }

  conflist(name: string): this {
    copyFileSync(join(CONFLISTS, name), join(this.netDir, name));
    return this;
  }

  /** A conflist as it is, with our entry behind what is in it. */
  chained(name: string, contract: 'shared' | 'in-pod'): this {
    const list = JSON.parse(readFileSync(join(CONFLISTS, name), 'utf8')) as { plugins: object[] };
    list.plugins.push({ ...ENTRY, proxy: { ...ENTRY.proxy, contract } });
    writeFileSync(join(this.netDir, name), JSON.stringify(list));
    return this;
  }

  veth(...names: string[]): this {
    for (const [i, name] of names.entries()) {
      this.namespace.ip('link', 'add', name, 'type', 'veth', 'peer', 'name', `peer${i}`);
    }
    return this;
  }

  link(name: string, ...type: string[]): this {
    this.namespace.ip('link', 'add', name, 'type', ...type);
    return this;
  }

  programs(): Programs {
    return new Programs(testbed, this.namespace, this.#bpffs, `named-${count}`, NAMED);
  }

  async findings(): Promise<{ status: number | null; findings: Finding[] }> {
    const outcome = await this.namespace.exec([
      ...[executable, 'doctor', '-o', 'json', '--conf-dir', this.netDir],
      ...['--state-dir', join(this.#bpffs, 'ambient-redirect'), '--run-dir', this.#runDir],
    ]);
    expect(outcome.stderr).toBe('');
    return { status: outcome.status, findings: (JSON.parse(outcome.stdout) as { findings: Finding[] }).findings };
  }

  /** "level: subject" of what is said of primary plugins. */
  async primaries(): Promise<string[]> {
    const { findings } = await this.findings();
    return findings
      .filter(({ text }) => text.startsWith('contract '))
      .map(({ level, subject }) => `${level}: ${subject}`);
  }
}

const both = (finding: string) => [finding, finding];

describe('by its conflist alone, before we are in it', () => {
  test.each([
    ['10-calico.conflist', ['note: Calico (10-calico.conflist)', 'note: Calico (10-calico.conflist)']],
    ['05-cilium.conflist', ['warning: Cilium (05-cilium.conflist)', 'note: Cilium (05-cilium.conflist)']],
    ['10-ovn-kubernetes.conf', both('warning: OVN-Kubernetes (10-ovn-kubernetes.conf)')],
    ['10-aws.conflist', both('note: AWS VPC CNI (10-aws.conflist)')],
    ['10-kindnet.conflist', both('note: kindnet (10-kindnet.conflist)')],
    ['10-flannel.conflist', both('note: flannel (10-flannel.conflist)')],
  ])('%s', async (name, expected) => {
    expect(await new Node().conflist(name).primaries()).toEqual(expected);
  });

  test('each conflist here was looked at', () => {
    expect(readdirSync(CONFLISTS)).toHaveLength(6);
  });
});

describe('by its devices alone, whoever wrote the conflist', () => {
  test.each<[string, (node: Node) => Node, string[]]>([
    ['Calico', (node) => node.veth('cali0123456789a'), both('note: Calico (cali0123456789a)')],
    [
      'Calico’s VXLAN',
      (node) => node.link('vxlan.calico', 'vxlan', 'id', '4096', 'dstport', '4789'),
      both('note: Calico (vxlan.calico)'),
    ],
    [
      'Cilium',
      (node) =>
        node
          .veth('cilium_host', 'lxc0123456789ab', 'lxc_health')
          .link('cilium_vxlan', 'vxlan', 'external', 'dstport', '8472'),
      ['warning', 'note'].map((level) => `${level}: Cilium (4 devices cilium_*, lxc*)`),
    ],
    [
      'OVN-Kubernetes',
      (node) => node.link('ovn-k8s-mp0', 'bridge').link('br-int', 'bridge').link('ovs-system', 'bridge'),
      both('warning: OVN-Kubernetes (ovn-k8s-mp0, br-int, ovs-system)'),
    ],
    [
      'AWS',
      (node) => node.veth('eni0123456789a', 'eth0').link('vlan.eth.1', 'bridge'),
      both('note: AWS VPC CNI (eni0123456789a, vlan.eth.1)'),
    ],
    [
      'flannel',
      (node) => node.link('flannel.1', 'vxlan', 'id', '1', 'dstport', '8472').link('cni0', 'bridge'),
      both('note: flannel (flannel.1)'),
    ],
    ['devices of nobody', (node) => node.veth('calico', 'lxcfs', 'eni0', 'veth0').link('cni0', 'bridge'), []],
  ])('%s', async (_, make, expected) => {
    const found = await make(new Node()).primaries();
    expect(found.sort()).toEqual(expected.sort());
  });
});

describe('by programs', () => {
  test('Cilium’s as TCX links, whose names the kernel cuts', async () => {
    const node = new Node().chained('05-cilium.conflist', 'in-pod').veth('lxc0123456789ab', 'eth0');
    const programs = node.programs();
    programs.tcx('lxc0123456789ab', 'ingress', 'cil_from_container');
    programs.tcx('lxc0123456789ab', 'egress', 'cil_to_container');
    programs.tcx('eth0', 'ingress', 'cil_from_netdev');
    expect(await node.primaries()).toEqual([
      'note: Cilium (05-cilium.conflist; lxc0123456789ab; cil_from_contai on lxc0123456789ab and 2 more)',
    ]);
  });

  test('Calico’s eBPF data plane says so beside what is known of Calico', async () => {
    const node = new Node().chained('10-calico.conflist', 'shared').veth('cali0123456789a');
    expect(await node.primaries()).toEqual(['note: Calico (10-calico.conflist; cali0123456789a)']);
    node.programs().tcx('cali0123456789a', 'ingress', 'cali_tc_preamble');
    const evidence = 'Calico (10-calico.conflist; cali0123456789a; cali_tc_preambl on cali0123456789a)';
    expect(await node.primaries()).toEqual([`note: ${evidence}`, `warning: ${evidence}`]);
  });

  test('the AWS network policy agent’s as filters', async () => {
    const node = new Node().chained('10-aws.conflist', 'in-pod').veth('eni0123456789a');
    const programs = node.programs();
    programs.filter('eni0123456789a', 'ingress', 'handle_ingress');
    programs.filter('eni0123456789a', 'egress', 'handle_egress');
    const found = await node.primaries();
    expect(found.map((one) => one.replace(/\(.*/, ''))).toEqual(['note: AWS VPC CNI ', 'warning: AWS VPC CNI ']);
    expect(found[1]).toMatch(/; handle_ingress\S* on eni0123456789a and 1 more\)$/);
  });

  test('somebody else’s are nobody’s', async () => {
    const node = new Node().veth('veth0');
    node.programs().tcx('veth0', 'ingress', 'of_nobody');
    expect(await node.primaries()).toEqual([]);
  });
});

describe('with our entry', () => {
  test('only its contract is told, and what cannot work fails', async () => {
    const node = new Node();
    const plugins = (type: string, contract: string) =>
      writeFileSync(
        join(node.netDir, '10.conflist'),
        JSON.stringify({
          ...{ cniVersion: '1.0.0', name: 'pods' },
          plugins: [{ type }, { ...ENTRY, proxy: { ...ENTRY.proxy, contract } }],
        }),
      );
    plugins('macvlan', 'shared');
    const failing = await node.findings();
    expect(failing.status).toBe(1);
    expect(failing.findings).toContainEqual({
      level: 'fails',
      subject: 'macvlan, ipvlan, host-device (10.conflist)',
      text: 'contract shared: pods have no host side: ADD fails with 101',
    });
    plugins('macvlan', 'in-pod');
    expect(await node.primaries()).toEqual(['note: macvlan, ipvlan, host-device (10.conflist)']);
    plugins('bridge', 'shared');
    expect(await node.primaries()).toEqual(['note: bridge (10.conflist)']);
    plugins('antrea', 'shared');
    expect((await node.findings()).findings).toContainEqual({
      level: 'note',
      subject: 'primary plugin antrea (10.conflist)',
      text: 'not tested; the contract shared needs a veth pair for each pod, in-pod only an interface',
    });
  });

  test('ptp in kindnet’s list is kindnet’s, in another file it is nobody’s', async () => {
    const node = new Node().chained('10-kindnet.conflist', 'shared');
    expect(await node.primaries()).toEqual(['note: kindnet (10-kindnet.conflist)']);
    writeFileSync(join(node.netDir, '20.conflist'), '{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}');
    expect(await node.primaries()).toEqual([
      'note: kindnet (10-kindnet.conflist)',
      'note: ptp (10-kindnet.conflist, 20.conflist)',
    ]);
  });
});

test('what was never run says so', () => {
  const run = ['ptp', 'bridge', 'macvlan, ipvlan, host-device'];
  for (const { name, verdict } of PRIMARIES.filter((primary) => !run.includes(primary.name))) {
    for (const { text } of Object.values(verdict))
      expect({ name, text }).toEqual({ name, text: expect.stringMatching(/never run|not tested/) });
  }
});

test('README’s table is what doctor says', () => {
  const readme = readFileSync(join(import.meta.dirname, '../../README.md'), 'utf8');
  const missing = PRIMARIES.filter(
    ({ name, verdict }) => !readme.includes(`| ${name} | ${verdict.shared.text} | ${verdict['in-pod'].text} |\n`),
  );
  expect(missing.map(({ name }) => name)).toEqual([]);
});
