// SPDX-License-Identifier: Apache-2.0
// Whose network the node's pods are on, by what can be seen: plugins in the conflists, names of devices, programs on
// them. And what is known of each together with us, which is no more than what was tried.

import { readFileSync } from 'node:fs';
import type { FoundFile } from '../install/network-directory.ts';
import { HOST, type Native } from '../native.ts';
import type { RedirectConfig } from '../redirect/config.ts';
import type { Finding } from './doctor.ts';

type Contract = RedirectConfig['proxy']['contract'];

interface Verdict {
  level: Exclude<Finding['level'], 'ok'>;
  text: string;
}

export interface Primary {
  name: string;
  /** of conflist entries */
  types: readonly string[];
  /** of the whole list, where the plugins in it are everybody's */
  network?: string;
  /** `names` says them for people */
  devices?: { pattern: RegExp; names: string };
  /** names of BPF programs, of which the kernel keeps 15 characters */
  programs?: RegExp;
  /** said only where such a program is found */
  withPrograms?: Readonly<Record<Contract, Verdict>>;
  verdict: Readonly<Record<Contract, Verdict>>;
}

const NOT_RUN = 'itself it was never run with this plugin';

/** The first that fits is the one: kindnet's plugin is ptp. */
export const PRIMARIES: readonly Primary[] = [
  {
    name: 'Calico',
    types: ['calico'],
    devices: { pattern: /^(cali[0-9a-f]{11}|vxlan\.calico)$/, names: 'cali*' },
    programs: /^cali_/,
    withPrograms: {
      shared: {
        level: 'warning',
        text: 'its eBPF data plane is on, whose connection tracking sees only a part of what goes by the proxy: not tested',
      },
      'in-pod': {
        level: 'warning',
        text: 'its eBPF data plane is on: what leaves and enters pods is as without a mesh, but not tested',
      },
    },
    verdict: {
      shared: {
        level: 'note',
        text: `pods that are routed as by it work, in both directions and IP versions; ${NOT_RUN}. Its policy is on the host-side veth: it does not see what goes straight into a pod`,
      },
      'in-pod': {
        level: 'note',
        text: `its policy sees every connection, those between pods of the mesh at port 15008; ${NOT_RUN}`,
      },
    },
  },
  {
    name: 'Cilium',
    types: ['cilium-cni'],
    devices: { pattern: /^(cilium_(host|net|vxlan|geneve)|lxc[0-9a-f]{12}|lxc_health)$/, names: 'cilium_*, lxc*' },
    programs: /^cil_/,
    verdict: {
      shared: {
        level: 'warning',
        text: `with its host routing (bpf_redirect_peer) connections from and to other nodes fail, as packets from the wire go straight into pods (tried with programs that do the same): use the contract in-pod; ${NOT_RUN}`,
      },
      'in-pod': {
        level: 'note',
        text: `host routing works (tried with programs that do the same); ${NOT_RUN}. It needs cni.exclusive=false, or Cilium takes our conflist away, and socketLB.hostNamespaceOnly=true, or the proxy sees no Service addresses. Pods with netkit devices: not tested`,
      },
    },
  },
  {
    name: 'OVN-Kubernetes',
    types: ['ovn-k8s-cni-overlay'],
    devices: {
      pattern: /^(ovn-k8s-mp\d+|ovs-system|br-int|genev_sys_6081)$/,
      names: 'ovn-k8s-mp0, ovs-system, br-int',
    },
    verdict: {
      shared: {
        level: 'warning',
        text: `not tested. Pods' host-side veths are ports of Open vSwitch, which sees what the proxy sends on under the pod's addresses, but not what goes straight into a pod, nor its connection tracking the answers`,
      },
      'in-pod': {
        level: 'warning',
        text: 'not tested. Nothing is redirected outside of pods, so Open vSwitch sees what it would without a mesh. Its conflist is a lone .conf that it writes again: take an owned conflist',
      },
    },
  },
  {
    name: 'AWS VPC CNI',
    types: ['aws-cni'],
    devices: { pattern: /^(eni[0-9a-f]{11}|vlan\.eth\.\d+)$/, names: 'eni*, vlan.eth.*' },
    programs: /^handle_(in|e)gress/,
    withPrograms: {
      shared: {
        level: 'warning',
        text: 'its network policy agent has programs on the hooks of ours: they do not see what goes straight into a pod; not tested',
      },
      'in-pod': {
        level: 'warning',
        text: 'its network policy agent has programs on the hooks of ours, and sees every connection; not tested',
      },
    },
    verdict: {
      shared: {
        level: 'note',
        text: `pods that are routed as by it work, in both directions and IP versions; ${NOT_RUN}. Security groups for pods (branch ENIs, vlan.eth.*): not tested`,
      },
      'in-pod': {
        level: 'note',
        text: `${NOT_RUN}. Probes keep the node's own address, so security groups for pods need no exception for Istio's link-local one (not tested)`,
      },
    },
  },
  {
    name: 'kindnet',
    types: ['cni-kindnet', 'kindnet'],
    network: 'kindnet',
    verdict: {
      shared: {
        level: 'note',
        text: `its chain is ptp and portmap, with which everything here is tested; ${NOT_RUN}, nor its newer plugin cni-kindnet`,
      },
      'in-pod': {
        level: 'note',
        text: `its chain is ptp and portmap, with which everything here is tested; ${NOT_RUN}, nor its newer plugin cni-kindnet`,
      },
    },
  },
  {
    name: 'flannel',
    types: ['flannel'],
    devices: { pattern: /^flannel(-v6)?\.\d+$/, names: 'flannel.*' },
    verdict: {
      shared: {
        level: 'note',
        text: `it has bridge do the work, with which everything here is tested, also over a VXLAN device like its own; ${NOT_RUN}`,
      },
      'in-pod': {
        level: 'note',
        text: `it has bridge do the work, with which everything here is tested; ${NOT_RUN}`,
      },
    },
  },
  {
    name: 'ptp',
    types: ['ptp'],
    verdict: {
      shared: { level: 'note', text: 'tested' },
      'in-pod': { level: 'note', text: 'tested' },
    },
  },
  {
    name: 'bridge',
    types: ['bridge'],
    verdict: {
      shared: { level: 'note', text: 'tested' },
      'in-pod': { level: 'note', text: 'tested' },
    },
  },
  {
    name: 'macvlan, ipvlan, host-device',
    types: ['macvlan', 'ipvlan', 'host-device'],
    verdict: {
      shared: { level: 'fails', text: 'pods have no host side: ADD fails with 101' },
      'in-pod': { level: 'note', text: "tested; probes from the node are proxied like everybody's connections" },
    },
  },
];

/** A device or program by which a primary plugin is known. */
interface Traces {
  devices: readonly string[];
  /** "cil_from_contai on lxc0123456789ab" */
  programs: readonly string[];
}

/**
 * Each primary plugin that has left traces, with what is known of it. `contract`: the entry's; undefined: there is none
 * yet, and both are told.
 */
export function primaries(native: Native, files: readonly FoundFile[], contract: Contract | undefined): Finding[] {
  const devices = deviceNames();
  const programs = programsOn(native, devices);
  const found = PRIMARIES.flatMap((primary): { primary: Primary; traces: Traces; where: string[] }[] => {
    const { devices: known, programs: named } = primary;
    const traces = {
      devices: known === undefined ? [] : devices.filter((device) => known.pattern.test(device)),
      programs: named === undefined ? [] : programs.filter(({ name }) => named.test(name)).map(said),
    };
    const where = filesWith(primary, files);
    return where.length + traces.devices.length + traces.programs.length === 0 ? [] : [{ primary, traces, where }];
  });
  // Plugins that others are made of count only where nobody else is in the file.
  const claimed = new Set(found.filter(({ primary }) => !isReference(primary)).flatMap(({ where }) => where));
  const findings = found
    .filter(({ primary, where }) => !isReference(primary) || where.some((file) => !claimed.has(file)))
    .flatMap(({ primary, traces, where }) => findingsOf(primary, traces, where, contract));
  return [...findings, ...unknown(files)];
}

const said = ({ name, device }: { name: string; device: string }): string => `${name} on ${device}`;

const isReference = ({ name }: Primary): boolean => name === 'ptp' || name === 'bridge';

function filesWith({ types, network }: Primary, files: readonly FoundFile[]): string[] {
  return files
    .filter(({ file }) => file?.plugins.some(({ type }) => types.includes(type)) || (file && file.network === network))
    .map(({ name }) => name);
}

function findingsOf(primary: Primary, traces: Traces, where: string[], contract: Contract | undefined): Finding[] {
  const { name, devices, verdict, withPrograms } = primary;
  const evidence = [
    ...(where.length > 0 ? [where.join(', ')] : []),
    ...(traces.devices.length > 0 ? [counted(traces.devices, devices?.names ?? '')] : []),
    ...(traces.programs.length > 0 ? [first(traces.programs)] : []),
  ].join('; ');
  const contracts: readonly Contract[] = contract === undefined ? ['shared', 'in-pod'] : [contract];
  return contracts.flatMap((one) => {
    const verdicts = [
      verdict[one],
      ...(withPrograms !== undefined && traces.programs.length > 0 ? [withPrograms[one]] : []),
    ];
    // Without an entry nothing is in force that could fail.
    return verdicts.map(
      ({ level, text }): Finding => ({
        level: contract === undefined && level === 'fails' ? 'warning' : level,
        subject: `${name} (${evidence})`,
        text: `contract ${one}: ${text}`,
      }),
    );
  });
}

function counted(devices: readonly string[], names: string): string {
  return devices.length > 3 ? `${devices.length} devices ${names}` : devices.join(', ');
}

function first(programs: readonly string[]): string {
  const more = programs.length - 1;
  return `${programs[0]}${more > 0 ? ` and ${more} more` : ''}`;
}

/** Whoever gives pods their interface and is not among those above. */
function unknown(files: readonly FoundFile[]): Finding[] {
  const known = new Set(PRIMARIES.flatMap(({ types }) => types));
  const networks = new Set(PRIMARIES.map(({ network }) => network));
  const [read] = files;
  const type = read?.file?.plugins[0]?.type;
  if (read?.file === undefined || type === undefined || known.has(type) || NEVER_PRIMARY.includes(type)) return [];
  if (networks.has(read.file.network)) return [];
  const text = 'not tested; the contract shared needs a veth pair for each pod, in-pod only an interface';
  return [{ level: 'note', subject: `primary plugin ${type} (${read.name})`, text }];
}

const NEVER_PRIMARY = ['loopback', 'istio-cni', 'ambient-redirect'];

/** Of this process's network namespace: /sys shows that of its mount, os.networkInterfaces() only those with addresses. */
function deviceNames(): string[] {
  const [, , ...lines] = readFileSync('/proc/self/net/dev', 'utf8').trimEnd().split('\n');
  return lines.map((line) => line.slice(0, line.indexOf(':')).trim());
}

/** Programs on the tc and TCX hooks of these devices. [] where the kernel does not let us look. */
function programsOn(native: Native, devices: readonly string[]): { name: string; device: string }[] {
  try {
    const hasTcx = native.features().tcx === true;
    return devices.flatMap((device) => {
      const ifindex = native.linkByName(HOST, device)?.ifindex;
      if (ifindex === undefined) return [];
      return (['ingress', 'egress'] as const).flatMap((direction) => [
        ...(hasTcx ? native.queryTcx(HOST, ifindex, direction) : []).flatMap(({ programId }) => {
          const name = native.programById(programId)?.name;
          return name === undefined ? [] : [{ name, device }];
        }),
        ...native.filters(HOST, ifindex, direction).map(({ name }) => ({ name, device })),
      ]);
    });
  } catch {
    // A missing capability is a finding of its own.
    return [];
  }
}
