// SPDX-License-Identifier: Apache-2.0
// A row that is wrong in one way is called wrong, for that reason.

import { describe, expect, test } from 'vitest';
import type { Counter } from '../native.ts';
import { direct, IN_POD, judge, type Observation, REDIRECTED, REQUESTS, type Scenario } from './scenarios.ts';

const FROM = '192.0.2.2';
const TO = '192.0.2.3';

function scenario(list: readonly Scenario[], direction: string): Scenario {
  const found = list.find((each) => each.direction === direction);
  if (found === undefined) throw new Error(`no scenario ${direction}`);
  return found;
}

function counter(program: Counter['program'], reason: string, packets: number): Counter {
  return { ifindex: 2, program, reason, packets: BigInt(packets), bytes: 0n };
}

/** What is observed when all is well. */
function right(of: Scenario): Observation {
  const connection = (listener: Scenario['listeners'][number]) => ({
    listener,
    source: FROM,
    destination: TO,
    port: listener === 'inboundHBONE' ? 15008 : 8080,
  });
  return {
    from: FROM,
    to: TO,
    failures: [],
    sources: Array<string>(REQUESTS).fill(FROM),
    seen: of.listeners.flatMap((listener) => Array.from({ length: REQUESTS }, () => connection(listener))),
    counted: of.counted.map(({ program, reason }) => counter(program, reason, REQUESTS)),
  };
}

test.each(
  [...REDIRECTED, ...direct(REDIRECTED), ...IN_POD, ...direct(IN_POD)].map((each) => [each.direction, each] as const),
)('%s: as it should be', (_, each) => {
  expect(judge(each, right(each))).toEqual([]);
});

describe('pod to pod', () => {
  const of = scenario(REDIRECTED, 'pod to pod');
  const good = right(of);

  test('a request failed', () => {
    expect(judge(of, { ...good, failures: ['request 1: timed out'] })).toEqual(['request 1: timed out']);
  });

  test('the server saw the proxy’s address', () => {
    const sources = ['192.0.2.4', ...good.sources.slice(1)];
    expect(judge(of, { ...good, sources })).toEqual(['the server saw source 192.0.2.4, not 192.0.2.2']);
  });

  test('the server saw a request too few', () => {
    expect(judge(of, { ...good, sources: good.sources.slice(1) })).toEqual(['the server saw 4 requests, not 5']);
  });

  test('one connection went past the proxy', () => {
    expect(judge(of, { ...good, seen: good.seen.slice(1) })).toEqual([
      "the proxy's port 15001 saw 4 connections, not 5",
    ]);
  });

  test('another listener was given one', () => {
    const [first] = good.seen;
    if (first === undefined) throw new Error('no connection');
    const seen = [...good.seen, { ...first, listener: 'inboundPlaintext' as const }];
    expect(judge(of, { ...good, seen })).toEqual(["the proxy's port 15006 saw 1 connections, not 0"]);
  });

  test('the original destination was lost', () => {
    const seen = good.seen.map((each, i) => (i === 0 ? { ...each, destination: '192.0.2.4', port: 15001 } : each));
    expect(judge(of, { ...good, seen })).toEqual([
      'the proxy saw 192.0.2.2 -> 192.0.2.4 port 15001, not 192.0.2.2 -> 192.0.2.3 port 8080',
    ]);
  });

  test('the kernel counted too few', () => {
    const counted = good.counted.map((each) => ({ ...each, packets: 4n }));
    expect(judge(of, { ...good, counted })).toEqual([
      'the kernel counted 4 packets as pod_egress redirected_outbound, not 5',
      'the kernel counted 4 packets as proxy_egress from_proxy_local, not 5',
    ]);
  });

  test('something was dropped', () => {
    const counted = [...good.counted, counter('pod_egress', 'drop_orphaned_flow', 1)];
    expect(judge(of, { ...good, counted })).toEqual([
      'the kernel counted 1 packets as pod_egress drop_orphaned_flow, not 0',
    ]);
  });

  test('a second leg that nobody asked for', () => {
    const counted = [...good.counted, counter('proxy_egress', 'from_proxy_second_leg', 5)];
    expect(judge(of, { ...good, counted })).toEqual([
      'the kernel counted 5 packets as proxy_egress from_proxy_second_leg, not 0',
    ]);
  });
});

test('a probe that was redirected', () => {
  const of = scenario(REDIRECTED, 'host probe to pod');
  const good = right(of);
  expect(judge(of, { ...good, counted: [...good.counted, counter('pod_ingress', 'redirected_inbound', 5)] })).toEqual([
    'the kernel counted 5 packets as pod_ingress redirected_inbound, not 0',
  ]);
});

test('after DEL any packet that a program still counts is wrong', () => {
  const of = scenario(direct(REDIRECTED), 'pod to pod');
  expect(judge(of, { ...right(of), counted: [counter('pod_egress', 'pass_not_tcp', 1)] })).toEqual([
    'the kernel counted 1 packets as pod_egress pass_not_tcp, not 0',
  ]);
});
