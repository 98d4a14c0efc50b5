// SPDX-License-Identifier: Apache-2.0
// What the tests of the addon share: the loaded addon, samples of every record, and throw-away state directories.

import { readdirSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import type { Namespace, Testbed } from '../conformance/netns.ts';
import { loadNative } from '../plugin/addon.ts';
import type { DemoNative } from '../plugin/demo/native-topology.ts';
import type { AttachmentRecord, EndpointRecord, InterfaceRecord, NativeError, ProxyRecord } from '../plugin/native.ts';

/** AMBIENT_REDIRECT_ADDON selects the build: ordinary, fault-injecting, AddressSanitizer. */
export const native = loadNative() as DemoNative;

/** Assignments for `env`, for a process of a test's that loads the addon too. */
export const ADDON_ENVIRONMENT = ['LD_PRELOAD', 'ASAN_OPTIONS', 'AMBIENT_REDIRECT_ADDON'].flatMap((name) => {
  const value = process.env[name];
  return value === undefined ? [] : [`${name}=${value}`];
});

// Where the sanitizer's run time is preloaded it is in this process by now; what tests start needs none.
delete process.env.LD_PRELOAD;

/** The full counts of the issues instead of a few of everything. */
export const LONG = process.env.AMBIENT_REDIRECT_LONG === '1';

export const WANTED = {
  maxPods: 16,
  maxFlows: 1024,
  directFlowsPerPod: 64,
  marks: { bypass: 0xa3b10001, toProxy: 0xa3b10002, tproxy: 0xa3b10400 },
  variant: 0,
};

export const BOOT_ID = '00112233-4455-6677-8899-aabbccddeeff';

/** Bytes with a pattern that shows a shift or a swap. */
export function bytes(length: number, first = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, index) => (first + index) & 0xff);
}

/** 192.0.2.N in the addon's form. */
export function address(last: number): Uint8Array {
  return Uint8Array.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, last]);
}

export function attachmentRecord(): AttachmentRecord {
  return {
    layout: native.layoutVersion,
    state: 'attached',
    role: 'pod',
    contract: 'shared',
    flags: 0x80000003,
    hostIfindex: 7,
    podIfindex: 2,
    nsid: -1,
    interfaceId: 0x80000007,
    netns: { dev: 4n, ino: 4026532281n, cookie: 0xffff_ffff_ffff_fffen },
    enrolledAt: 1_700_000_000,
    podMac: '02:00:5e:10:00:01',
    hostMac: '02:00:5e:10:00:ff',
    bootId: BOOT_ID,
    addresses: [address(1), bytes(16)],
    hooks: [
      {
        program: 'pod_egress',
        kind: 'tcx',
        ifindex: 7,
        direction: 'ingress',
        inNetns: false,
        programId: 41,
        handle: 0,
        priority: 0,
      },
      {
        program: 'proxy_ingress',
        kind: 'clsact',
        ifindex: 2,
        direction: 'egress',
        inNetns: true,
        programId: 42,
        handle: 0xa3b1,
        priority: 1,
      },
    ],
    programTag: '0123456789abcdef',
    hostIfname: 'veth0123456789a',
    ifname: 'eth0',
    network: 'net',
    containerId: 'c1',
    podName: 'pod',
    podNamespace: 'default',
    podUid: '2c9d8f62-0000-4000-8000-000000000000',
    serviceAccount: 'größe',
    netnsPath: '/run/netns/cni-1',
  };
}

export function interfaceRecord(): InterfaceRecord {
  return {
    podMac: '02:00:5e:10:00:01',
    gatewayMac: '02:00:5e:10:00:02',
    flags: 5,
    podIfindex: 2,
    nsid: 3,
    master: 9,
    ports: { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008, dns: 15053 },
    address4: address(1),
    address6: bytes(16),
  };
}

export function endpointRecord(): EndpointRecord {
  return { ifindex: 7, flags: 3, podMac: '02:00:5e:10:00:01' };
}

export function proxyRecord(first = 1): ProxyRecord {
  return {
    key: bytes(32, first),
    netnsCookie: 12n,
    netnsIno: 4026532281n,
    hostIfindex: 8,
    podIfindex: 2,
    nsid: 0,
    master: 0,
    mac: '02:00:5e:10:00:03',
    ports: { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008, dns: 65535 },
  };
}

/** Opens a namespace until the testbed is closed. */
export function opened(bed: Testbed, namespace: Namespace): number {
  const netns = native.openNetns(namespace.path);
  bed.defer(() => native.close(netns));
  return netns;
}

/** The error that `call` throws; fails the test if it throws none. */
export function failure(call: () => unknown): NativeError {
  try {
    call();
  } catch (error) {
    return error as NativeError;
  }
  throw new Error('it did not fail');
}

/** What is left of an error without the words, for comparison. */
export function cause(call: () => unknown): { code: string; errno: number; syscall: string } {
  const { code, errno, syscall } = failure(call);
  return { code, errno, syscall };
}

export function currentNetns(): string {
  return readlinkSync('/proc/thread-self/ns/net');
}

/** Descriptors of this process and what they are; the directory being listed is not among them. */
export function descriptors(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      return [readlinkSync(join('/proc/self/fd', fd))];
    } catch {
      return [];
    }
  });
}

export interface StateFixture {
  dir: string;
  /** directory for link pins */
  links: string;
  program(name: string): number;
}

/** A complete state directory with programs, on a bpffs of its own. */
export function stateDirectory(bed: Testbed, wanted: typeof WANTED = WANTED): StateFixture {
  const dir = join(bed.bpffs('bpf'), 'state');
  native.makeDirectory(dir, 0o700);
  native.createState(dir, wanted);
  const state = native.openState(dir);
  try {
    native.loadPrograms(state, dir, 'test');
  } finally {
    native.closeState(state);
  }
  const links = join(dir, 'links');
  native.makeDirectory(links, 0o700);
  return {
    dir,
    links,
    program(name) {
      const fd = native.openProgram(join(dir, 'programs/test', name));
      bed.defer(() => native.close(fd));
      return fd;
    },
  };
}
