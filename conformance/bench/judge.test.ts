// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { type Evidence, type Expectation, judge, type Traffic } from './judge.ts';

const count = (accepted: number, bytes: number, failed = 0) => ({ accepted, connected: accepted, failed, bytes });
const nothing: Evidence = {
  proxies: { shared: { outbound: count(5, 100), inbound: count(0, 0) } },
  ours: { 'pod_egress redirected_outbound': 5 },
  hooks: ['tcx'],
  rules: null,
  tunnel: null,
  timeWait: 0,
};
const after: Evidence = {
  ...nothing,
  proxies: { shared: { outbound: count(9, 1100), inbound: count(0, 0) } },
  ours: { 'pod_egress redirected_outbound': 9 },
};
const ours: Expectation = { chain: ['shared outbound'], hook: 'tcx', rules: false, tunnel: 'none' };
const traffic: Traffic = { connections: 4, bytes: 1000, sent: 400, packets: 8 };

const of = (wanted: Partial<Expectation>, last: Partial<Evidence>, load: Partial<Traffic> = {}, first = nothing) =>
  judge({ ...ours, ...wanted }, first, { ...after, ...last }, { ...traffic, ...load });

test('a run that went as it should', () => {
  expect(of({}, {})).toBeNull();
});

test.each([
  ['the proxy saw nothing', {}, { proxies: nothing.proxies }, /opened 4 connections, .* "shared outbound" accepted 0/],
  ['the proxy saw twice as much', {}, { proxies: { shared: { outbound: count(40, 9000) } } }, /accepted 35/],
  ['half of the bytes went elsewhere', {}, { proxies: { shared: { outbound: count(9, 600) } } }, /moved 1000 bytes/],
  ['the proxy could not connect', {}, { proxies: { shared: { outbound: count(9, 1100, 1) } } }, /failed to pass on 1/],
  [
    'another listener took connections',
    {},
    { proxies: { shared: { outbound: count(9, 1100), inbound: count(4, 1) } } },
    /"shared inbound" accepted 4 connections; the mode has no such way/,
  ],
  ['programs on other hooks', {}, { hooks: ['clsact'] }, /attached to clsact, the mode wants tcx/],
  ['no programs', {}, { hooks: [] }, /attached to nowhere/],
  ['programs that redirected nothing', {}, { ours: nothing.ours }, /our programs redirected 0/],
  ['programs where there are to be none', { hook: null }, {}, /programs are attached \(tcx\); the mode has none/],
  ['rules where there are to be none', {}, { rules: 0 }, /there are netfilter rules/],
  ['no rules', { rules: true }, {}, /there are no netfilter rules/],
  ['rules that matched too little', { rules: true }, { rules: 3 }, /matched 3 packets/],
  ['a tunnel where there is to be none', {}, { tunnel: { packets: 0, bytes: 0 } }, /there is a tunnel/],
  ['no tunnel', { tunnel: 'openings' as const }, {}, /there is no tunnel/],
  ['a tunnel beside the way', { tunnel: 'openings' as const }, { tunnel: { packets: 1, bytes: 60 } }, /1 packets came/],
  [
    'a tunnel for openings only',
    { tunnel: 'all' as const },
    { tunnel: { packets: 8, bytes: 300 } },
    /sent 8 packets and 400 bytes, 8 and 300 came through the tunnel/,
  ],
  [
    'a tunnel for some packets only',
    { tunnel: 'all' as const },
    { tunnel: { packets: 7, bytes: 500 } },
    /sent 8 packets and 400 bytes, 7 and 500 came/,
  ],
])('%s', (_, wanted, last, reason) => {
  expect(of(wanted, last)).toMatch(reason);
});

test('a load that did nothing is no proof of anything', () => {
  expect(of({}, {}, { connections: 0 })).toBe('the load opened no connection');
  expect(of({}, {}, { bytes: 0 })).toBe('the load moved no byte');
});

test('TIME_WAIT counts against loads that open connections, and only those', () => {
  expect(of({}, { timeWait: 1000 })).toBeNull();
  expect(of({}, { timeWait: 1000 }, { opensConnections: true })).toMatch(/1000 more sockets in TIME_WAIT/);
});

test('every connection passes both listeners of a chain', () => {
  const chain = ['client outbound', 'server inbound'];
  const proxies = { client: { outbound: count(4, 1000) }, server: { inbound: count(0, 0) } };
  const first = { ...nothing, proxies: { client: { outbound: count(0, 0) }, server: { inbound: count(0, 0) } } };
  expect(of({ chain }, { proxies }, {}, first)).toMatch(/"server inbound" accepted 0/);
  expect(of({ chain }, { proxies: { ...proxies, server: { inbound: count(4, 1000) } } }, {}, first)).toBeNull();
});

test('listeners with fixed destinations count together', () => {
  const proxies = { shared: { 'fixed-8080-4': count(3, 900), 'fixed-8081-4': count(1, 100) } };
  const first = { ...nothing, proxies: { shared: {} }, ours: {}, hooks: [] };
  expect(of({ chain: ['shared fixed'], hook: null }, { proxies, ours: {}, hooks: [] }, {}, first)).toBeNull();
});
