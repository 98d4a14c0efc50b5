// SPDX-License-Identifier: Apache-2.0
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Namespace, Testbed } from '../conformance/netns.ts';
import { cause, native, opened } from './native.testing.ts';

let bed: Testbed;
let proxy: Namespace;
let netns: number;
beforeEach(() => {
  bed = Testbed.open();
  proxy = bed.namespace('proxy');
  netns = opened(bed, proxy);
});
afterEach(() => bed.close());

const FAMILIES = [4, 6] as const;
const shown = (family: 4 | 6) => proxy.ip(`-${family}`, 'rule', 'show');

describe.each(FAMILIES)('IPv%d rule', (family) => {
  const rule = { family, priority: 100, mark: 0xa3b10400, table: 33, protocol: 163 };

  test('is added once, listed, and deleted once', () => {
    const before = shown(family);
    expect(native.addRule(netns, rule)).toBe(true);
    expect(native.addRule(netns, rule)).toBe(false);
    expect(shown(family)).toMatch(/100:\s+from all fwmark 0xa3b10400 lookup 33 proto 163/);
    expect(native.rules(netns, family)).toEqual([rule]);
    expect(native.deleteRule(netns, rule)).toBe(true);
    expect(native.deleteRule(netns, rule)).toBe(false);
    expect(shown(family)).toBe(before);
  });

  test('a table above 255', () => {
    const large = { ...rule, table: 0x89abcdef };
    expect(native.addRule(netns, large)).toBe(true);
    expect(native.rules(netns, family)).toEqual([large]);
    expect(native.deleteRule(netns, large)).toBe(true);
  });

  test('equal to a rule of somebody else is another rule, and theirs stays', () => {
    const theirs = { ...rule, protocol: 4 };
    proxy.ip(`-${family}`, 'rule', 'add', 'pref', '100', 'fwmark', '0xa3b10400', 'lookup', '33', 'proto', '4');
    expect(native.deleteRule(netns, rule)).toBe(false);
    expect(native.addRule(netns, rule)).toBe(true);
    expect(native.rules(netns, family)).toEqual(expect.arrayContaining([rule, theirs]));
    expect(native.deleteRule(netns, rule)).toBe(true);
    expect(native.rules(netns, family)).toEqual([theirs]);
  });

  test('that compares anything else is neither listed nor deleted', () => {
    const foreign = ['fwmark 0xa3b10400/0xfff', 'fwmark 0xa3b10400 iif lo', 'fwmark 0xa3b10400 ipproto tcp'];
    for (const selector of foreign) {
      proxy.ip(`-${family}`, 'rule', 'add', 'pref', '100', ...selector.split(' '), 'lookup', '33', 'proto', '163');
    }
    const before = shown(family);
    expect(native.rules(netns, family)).toEqual([]);
    expect(native.deleteRule(netns, rule)).toBe(false);
    expect(shown(family)).toBe(before);
  });

  test.each(['priority', 'mark', 'table', 'protocol'] as const)('another %s is another rule', (field) => {
    native.addRule(netns, rule);
    expect(native.deleteRule(netns, { ...rule, [field]: rule[field] + 1 })).toBe(false);
    expect(native.rules(netns, family)).toEqual([rule]);
  });
});

describe.each(FAMILIES)('IPv%d local route', (family) => {
  const route = { family, table: 33, protocol: 163 };
  const table = () => proxy.ip(`-${family}`, 'route', 'show', 'table', '33');

  test('is added once, listed, and deleted once', () => {
    expect(native.localRoutes(netns, family, 33)).toEqual([]);
    expect(native.addLocalRoute(netns, route)).toBe(true);
    expect(native.addLocalRoute(netns, route)).toBe(false);
    expect(table()).toMatch(/^local default dev lo proto 163/);
    expect(native.localRoutes(netns, family, 33)).toEqual([route]);
    expect(native.localRoutes(netns, family, 34)).toEqual([]);
    expect(native.deleteLocalRoute(netns, route)).toBe(true);
    expect(native.deleteLocalRoute(netns, route)).toBe(false);
    expect(table()).toBe('');
  });

  test('of somebody else in the same place is not ours', () => {
    proxy.ip(`-${family}`, 'route', 'add', 'local', 'default', 'dev', 'lo', 'table', '33', 'proto', '4');
    expect(native.localRoutes(netns, family, 33)).toEqual([{ ...route, protocol: 4 }]);
    expect(cause(() => native.addLocalRoute(netns, route)).code).toBe('EEXIST');
    expect(native.deleteLocalRoute(netns, route)).toBe(false);
    expect(table()).toMatch(/^local default dev lo proto (4|static)/);
  });

  test('other routes of the table are not listed', () => {
    bed.bridge(proxy, 'd0');
    proxy.ip(`-${family}`, 'route', 'add', 'default', 'dev', 'd0', 'table', '33');
    proxy.ip(
      `-${family}`,
      'route',
      'add',
      'local',
      family === 4 ? '192.0.2.0/24' : '2001:db8::/64',
      'dev',
      'lo',
      'table',
      '33',
    );
    expect(native.localRoutes(netns, family, 33)).toEqual([]);
  });
});
