// SPDX-License-Identifier: Apache-2.0
// Every port and address is matched, by longest prefix as the kernel does it, exactly if it was named.

import { expect, test } from 'vitest';
import { parseAddress } from '../cni/address.ts';
import type { ExclusionRule } from '../native.ts';
import { parseCidr, parsePortRange } from './config.ts';
import { exclusionRules, mergeExclusions } from './exclusions.ts';

const bit = (bytes: Uint8Array, i: number) => ((bytes[i >> 3] ?? 0) >> (7 - (i & 7))) & 1;
function lookup(rules: readonly ExclusionRule[], kind: ExclusionRule['kind'], value: Uint8Array): boolean {
  const matching = rules
    .filter((rule) => rule.kind === kind)
    .filter((rule) =>
      Array.from({ length: rule.length }, (_, i) => i).every((i) => bit(rule.value, i) === bit(value, i)),
    )
    .sort((a, b) => b.length - a.length);
  return matching[0]?.excluded ?? false;
}
const portKey = (port: number) => Uint8Array.from([port >> 8, port & 0xff, ...Array<number>(14).fill(0)]);
const cidrs = (...texts: string[]) =>
  exclusionRules({
    inboundPorts: [],
    outboundPorts: [],
    outboundCIDRs: texts.flatMap((text) => parseCidr(text) ?? []),
  });
const excluded = (rules: readonly ExclusionRule[], address: string) =>
  lookup(rules, 'outbound_address', parseAddress(address)?.bytes ?? new Uint8Array());

test.each([['80'], ['1-65535'], ['8000-8100'], ['1-2'], ['32767-32769'], ['65535'], ['1023-1024']])(
  'ports %s',
  (text) => {
    const range = parsePortRange(text) ?? { from: 0, to: 0 };
    const rules = exclusionRules({ inboundPorts: [range], outboundPorts: [], outboundCIDRs: [] });
    expect(rules.length).toBeLessThanOrEqual(30);
    for (let port = 1; port <= 65535; port++) {
      const near = Math.abs(port - range.from) < 3 || Math.abs(port - range.to) < 3 || port % 257 === 0;
      if (!near) continue;
      expect(lookup(rules, 'inbound_port', portKey(port)), `port ${port}`).toBe(port >= range.from && port <= range.to);
      expect(lookup(rules, 'outbound_port', portKey(port))).toBe(false);
    }
  },
);

test('prefixes of both families', () => {
  const rules = cidrs('10.0.0.0/8', 'fd00::/16', '192.0.2.7/32', '2001:db8::1/128');
  for (const inside of ['10.1.2.3', 'fd00::1', '192.0.2.7', '2001:db8::1']) expect(excluded(rules, inside)).toBe(true);
  for (const outside of ['11.0.0.1', 'fd01::1', '192.0.2.8', '2001:db8::2']) {
    expect(excluded(rules, outside)).toBe(false);
  }
});

test.each(['::/0', '::/64', '::/80'])('%s does not cover IPv4', (text) => {
  const rules = cidrs(text);
  expect(excluded(rules, '::1')).toBe(true);
  expect(excluded(rules, '192.0.2.1')).toBe(false);
});

test('::/0 beside prefixes of IPv4', () => {
  expect(excluded(cidrs('::/0', '192.0.2.0/24'), '192.0.2.1')).toBe(true);
  expect(excluded(cidrs('::/0', '192.0.2.0/24'), '198.51.100.1')).toBe(false);
  expect(excluded(cidrs('::/0', '0.0.0.0/0'), '198.51.100.1')).toBe(true);
  expect(excluded(cidrs('0.0.0.0/0'), 'fd00::1')).toBe(false);
});

test('merged, none, too many', () => {
  const none = { inboundPorts: [], outboundPorts: [], outboundCIDRs: [] };
  expect(exclusionRules(mergeExclusions(none, none))).toEqual([]);
  const one = { ...none, inboundPorts: [{ from: 80, to: 80 }] };
  const other = { ...none, inboundPorts: [{ from: 443, to: 443 }] };
  expect(exclusionRules(mergeExclusions(one, other))).toHaveLength(2);
  const many = { ...none, outboundPorts: Array<{ from: number; to: number }>(200).fill({ from: 1, to: 65534 }) };
  expect(() => exclusionRules(many)).toThrow(/too many exclusions/);
});
