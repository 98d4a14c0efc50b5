// SPDX-License-Identifier: Apache-2.0
// Excluded ports and addresses as the programs look them up: prefixes, of which the longest that matches decides.

import type { IpPrefix } from '../cni/address.ts';
import { CniError, Code } from '../cni/errors.ts';
import type { ExclusionRule } from '../native.ts';
import type { Exclusions, PortRange } from './config.ts';

/** MAX_EXCLUSIONS of native/state.h, for one pod. */
const MAX_RULES = 4096;
/** Prefix length of ::ffff:0:0, behind which IPv4 addresses are. */
const MAPPED_V4_LENGTH = 96;
const MAPPED_V4 = Uint8Array.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0]);

/** The node's and the pod's own together. */
export function mergeExclusions(a: Exclusions, b: Exclusions): Exclusions {
  return {
    inboundPorts: [...a.inboundPorts, ...b.inboundPorts],
    outboundPorts: [...a.outboundPorts, ...b.outboundPorts],
    outboundCIDRs: [...a.outboundCIDRs, ...b.outboundCIDRs],
  };
}

/** [] for no exclusion. Throws CniError 7 if they come to more rules than a pod can have. */
export function exclusionRules(exclude: Exclusions): ExclusionRule[] {
  const rules = [
    ...exclude.inboundPorts.flatMap((range) => portRules('inbound_port', range)),
    ...exclude.outboundPorts.flatMap((range) => portRules('outbound_port', range)),
    ...addressRules(exclude.outboundCIDRs),
  ];
  if (rules.length > MAX_RULES) {
    throw new CniError(
      Code.INVALID_NETWORK_CONFIG,
      'too many exclusions',
      `they come to ${rules.length} prefixes, at most ${MAX_RULES} are possible for a pod`,
    );
  }
  return rules;
}

/** The fewest prefixes that make up a range: at each step the largest block that begins at `from` and fits. */
function portRules(kind: 'inbound_port' | 'outbound_port', { from, to }: PortRange): ExclusionRule[] {
  const rules: ExclusionRule[] = [];
  for (let port = from; port <= to; ) {
    let bits = 0;
    while (bits < 16 && (port & ((2 << bits) - 1)) === 0 && port + (2 << bits) - 1 <= to) bits++;
    const value = new Uint8Array(16);
    value[0] = port >> 8;
    value[1] = port & 0xff;
    rules.push({ kind, value, length: 16 - bits, excluded: true });
    port += 1 << bits;
  }
  return rules;
}

function addressRules(prefixes: readonly IpPrefix[]): ExclusionRule[] {
  const kind = 'outbound_address';
  const rules: ExclusionRule[] = prefixes.map(({ bytes, length }) => ({ kind, value: bytes, length, excluded: true }));
  const coversV4 = prefixes.some(
    ({ family, bytes, length }) => family === 6 && length < MAPPED_V4_LENGTH && startsWith(MAPPED_V4, bytes, length),
  );
  const wholeV4 = rules.some(({ value, length }) => length === MAPPED_V4_LENGTH && startsWith(value, MAPPED_V4, 96));
  // "::/0" speaks of IPv6.
  if (coversV4 && !wholeV4) rules.push({ kind, value: MAPPED_V4, length: MAPPED_V4_LENGTH, excluded: false });
  return rules;
}

function startsWith(address: Uint8Array, prefix: Uint8Array, length: number): boolean {
  return address.every((byte, i) => {
    const mask = 0xff00 >> Math.min(8, Math.max(0, length - 8 * i));
    return (byte & mask & 0xff) === ((prefix[i] ?? 0) & mask & 0xff);
  });
}
