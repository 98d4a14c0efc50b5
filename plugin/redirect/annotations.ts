// SPDX-License-Identifier: Apache-2.0
// What a pod asks for itself, in annotations that the runtime hands on. Only those that the configuration's
// podOverrides lets count are read at all, so that the others cannot make ADD fail either.

import { CniError, Code, quote } from '../cni/errors.ts';
import type { NetConf } from '../cni/netconf.ts';
import { type Exclusions, type PodOverrides, parseCidr, parsePortRange } from './config.ts';

/** Capability of containerd and CRI-O: the pod's annotations, all of them, as a JSON object of strings. */
export const ANNOTATIONS_CAPABILITY = 'io.kubernetes.cri.pod-annotations';

export const ANNOTATION = {
  enroll: 'ambient-redirect/enroll',
  interfaces: 'ambient-redirect/interfaces',
  dnsCapture: 'ambient.istio.io/dns-capture',
  bypassInbound: 'ambient.istio.io/bypass-inbound-capture',
  virtualInterfaces: 'istio.io/reroute-virtual-interfaces',
  /** there on a pod with an injected sidecar; its value is the injection's own record */
  sidecar: 'sidecar.istio.io/status',
  excludeInboundPorts: 'traffic.sidecar.istio.io/excludeInboundPorts',
  excludeOutboundPorts: 'traffic.sidecar.istio.io/excludeOutboundPorts',
  excludeOutboundCIDRs: 'traffic.sidecar.istio.io/excludeOutboundIPRanges',
} as const;

export type Annotations = ReadonlyMap<string, string>;

/** null: the runtime sent none. Throws CniError 7 if what it sent is no object of strings. */
export function podAnnotations(runtimeConfig: NetConf['runtimeConfig']): Annotations | null {
  const value = runtimeConfig[ANNOTATIONS_CAPABILITY] ?? null;
  if (value === null) return null;
  const path = `runtimeConfig["${ANNOTATIONS_CAPABILITY}"]`;
  const invalid = (where: string, found: unknown, expected: string) =>
    new CniError(Code.INVALID_NETWORK_CONFIG, `invalid ${where}`, `${where} = ${quote(found)}: expected ${expected}`);
  if (typeof value !== 'object' || Array.isArray(value)) throw invalid(path, value, 'an object of strings');
  return new Map(
    Object.entries(value).map(([key, text]: [string, unknown]) => {
      if (typeof text !== 'string') throw invalid(`${path}["${key}"]`, text, 'a string');
      return [key, text];
    }),
  );
}

export interface EnrolmentAnnotations {
  /** undefined: not said, or does not count */
  enroll: boolean | undefined;
  /** the pod's interfaces to enrol; undefined: not said, or does not count */
  interfaces: readonly string[] | undefined;
}

/** Throws CniError 7 with the annotation's key and value. */
export function enrolmentAnnotations(annotations: Annotations | null, overrides: PodOverrides): EnrolmentAnnotations {
  const counted = overrides === 'all' || overrides === 'enroll' ? annotations : null;
  return {
    enroll: read(counted, ANNOTATION.enroll, parseBoolean, 'true or false'),
    interfaces: readList(counted, ANNOTATION.interfaces, parseInterface, 'interface names separated by commas'),
  };
}

export interface TrafficAnnotations {
  /** undefined: as the node's configuration says */
  dnsCapture: boolean | undefined;
  /** inbound traffic is not redirected */
  bypassInbound: boolean;
  /** interfaces inside the pod whose ingress counts as outbound (virtual machines in pods) */
  virtualInterfaces: readonly string[];
  /** in addition to the node's */
  exclude: Exclusions;
}

/** For a pod that is to be enrolled. Throws CniError 7 with the annotation's key and value. */
export function trafficAnnotations(annotations: Annotations | null, overrides: PodOverrides): TrafficAnnotations {
  const counted = overrides === 'all' || overrides === 'exclusions' ? annotations : null;
  const ports = 'ports or ranges "from-to" separated by commas';
  return {
    dnsCapture: read(counted, ANNOTATION.dnsCapture, parseBoolean, 'true or false'),
    bypassInbound: read(counted, ANNOTATION.bypassInbound, parseBoolean, 'true or false') ?? false,
    virtualInterfaces:
      readList(counted, ANNOTATION.virtualInterfaces, parseInterface, 'interface names separated by commas') ?? [],
    exclude: {
      inboundPorts: readList(counted, ANNOTATION.excludeInboundPorts, parsePortRange, ports) ?? [],
      outboundPorts: readList(counted, ANNOTATION.excludeOutboundPorts, parsePortRange, ports) ?? [],
      outboundCIDRs:
        readList(counted, ANNOTATION.excludeOutboundCIDRs, parseCidr, 'IP prefixes separated by commas') ?? [],
    },
  };
}

function read<T>(
  annotations: Annotations | null,
  key: string,
  parse: (text: string) => T | undefined,
  expected: string,
): T | undefined {
  const text = annotations?.get(key);
  if (text === undefined) return undefined;
  const value = parse(text.trim());
  if (value === undefined) {
    const details = `${key} = ${quote(text)}: expected ${expected}`;
    throw new CniError(Code.INVALID_NETWORK_CONFIG, `invalid pod annotation ${key}`, details);
  }
  return value;
}

/** Comma-separated; an empty text is an empty list. One part that does not parse spoils the whole. */
function readList<T>(
  annotations: Annotations | null,
  key: string,
  parse: (text: string) => T | undefined,
  expected: string,
): readonly T[] | undefined {
  const parseAll = (text: string): readonly T[] | undefined => {
    if (text === '') return [];
    const values = text.split(',').map((part) => parse(part.trim()));
    return values.every((value) => value !== undefined) ? values : undefined;
  };
  return read(annotations, key, parseAll, expected);
}

/** The words that Go's strconv.ParseBool takes, as Istio uses it for these annotations. */
function parseBoolean(text: string): boolean | undefined {
  if (['1', 't', 'T', 'true', 'TRUE', 'True'].includes(text)) return true;
  if (['0', 'f', 'F', 'false', 'FALSE', 'False'].includes(text)) return false;
  return undefined;
}

/** A name that the kernel would take (dev_valid_name). */
function parseInterface(text: string): string | undefined {
  const valid = Buffer.byteLength(text) <= 15 && !/^\.{0,2}$|[/:\p{White_Space}]/u.test(text);
  return valid ? text : undefined;
}
