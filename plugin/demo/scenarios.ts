// SPDX-License-Identifier: Apache-2.0
// The rows of the demo's table, and when one is right. Pure: what was observed is passed in.

import type { Counter } from '../native.ts';
import type { ListenerName, SeenConnection } from './proxy.ts';
import type { PlaceName } from './topology.ts';

export const HTTP_PORT = 8080;
export const PORTS = { outbound: 15001, inboundPlaintext: 15006, inboundHBONE: 15008 };
/** per row, each on a connection of its own */
export const REQUESTS = 5;

/** One line of the table: what is sent, and what has to be seen of it at both ends, in the proxy and in the kernel. */
export interface Scenario {
  direction: string;
  from: PlaceName;
  to: PlaceName;
  twoLegs: boolean;
  /** connections accepted by the proxy per request */
  listeners: readonly ListenerName[];
  /** at least one packet per request is counted so; the first one is printed */
  counted: readonly { program: Counter['program']; reason: string }[];
}

export const REDIRECTED: readonly Scenario[] = [
  {
    direction: 'pod to pod',
    from: 'client',
    to: 'server',
    twoLegs: false,
    listeners: ['outbound'],
    counted: [
      { program: 'pod_egress', reason: 'redirected_outbound' },
      { program: 'proxy_egress', reason: 'from_proxy_local' },
    ],
  },
  {
    direction: 'pod to pod, two legs',
    from: 'client',
    to: 'server',
    twoLegs: true,
    listeners: ['outbound', 'inboundHBONE'],
    counted: [
      { program: 'proxy_egress', reason: 'from_proxy_second_leg' },
      { program: 'pod_egress', reason: 'redirected_outbound' },
    ],
  },
  {
    direction: 'pod to outside',
    from: 'client',
    to: 'outside',
    twoLegs: false,
    listeners: ['outbound'],
    counted: [
      { program: 'pod_egress', reason: 'redirected_outbound' },
      { program: 'proxy_egress', reason: 'from_proxy_reinjected' },
    ],
  },
  {
    direction: 'outside to pod',
    from: 'outside',
    to: 'server',
    twoLegs: false,
    listeners: ['inboundPlaintext'],
    counted: [{ program: 'pod_ingress', reason: 'redirected_inbound' }],
  },
  {
    direction: 'host probe to pod',
    from: 'node',
    to: 'server',
    twoLegs: false,
    listeners: [],
    counted: [{ program: 'pod_ingress', reason: 'pass_host_socket' }],
  },
];

/** With a ztunnel in every pod: between pods of the mesh two of them, over HBONE. */
export const IN_POD: readonly Scenario[] = [
  {
    direction: 'pod to pod, HBONE',
    from: 'client',
    to: 'server',
    twoLegs: false,
    listeners: ['outbound', 'inboundHBONE'],
    counted: [{ program: 'inpod_egress', reason: 'redirected_outbound' }],
  },
  {
    direction: 'pod to outside',
    from: 'client',
    to: 'outside',
    twoLegs: false,
    listeners: ['outbound'],
    counted: [{ program: 'inpod_egress', reason: 'redirected_outbound' }],
  },
  {
    direction: 'outside to pod',
    from: 'outside',
    to: 'server',
    twoLegs: false,
    listeners: ['inboundPlaintext'],
    counted: [{ program: 'inpod_ingress', reason: 'redirected_inbound' }],
  },
  {
    direction: 'host probe to pod',
    from: 'node',
    to: 'server',
    twoLegs: false,
    listeners: [],
    counted: [{ program: 'inpod_ingress', reason: 'pass_host_socket' }],
  },
];

/** The same once DEL has run: no proxy, no program, no count. */
export function direct(scenarios: readonly Scenario[]): Scenario[] {
  return scenarios
    .filter(({ twoLegs }) => !twoLegs)
    .map((scenario) => ({
      ...scenario,
      direction: scenario.direction.replace(', HBONE', ''),
      listeners: [],
      counted: [],
    }));
}

/** What was observed of one row. Addresses are text; a place's own address is what others reach it at. */
export interface Observation {
  from: string;
  to: string;
  /** of requests that were not answered as they should have been */
  failures: readonly string[];
  /** source addresses that the server saw, one per request */
  sources: readonly string[];
  /** connections that the proxy accepted */
  seen: readonly SeenConnection[];
  /** packets counted while the requests ran */
  counted: readonly Counter[];
}

/** What is not as the scenario says; [] if the row is right. */
export function judge(scenario: Scenario, observed: Observation): string[] {
  return [
    ...observed.failures,
    ...sourceErrors(observed.sources, observed.from),
    ...connectionErrors(observed.seen, scenario, observed.from, observed.to),
    ...countErrors(observed.counted, scenario),
  ];
}

function sourceErrors(sources: readonly string[], expected: string): string[] {
  const others = [...new Set(sources.filter((source) => source !== expected))];
  if (others.length > 0) return [`the server saw source ${others.join(', ')}, not ${expected}`];
  return sources.length === REQUESTS ? [] : [`the server saw ${sources.length} requests, not ${REQUESTS}`];
}

function connectionErrors(seen: readonly SeenConnection[], scenario: Scenario, from: string, to: string): string[] {
  const wrong: string[] = [];
  for (const listener of ['outbound', 'inboundPlaintext', 'inboundHBONE'] as const) {
    const here = seen.filter((connection) => connection.listener === listener);
    const expected = scenario.listeners.includes(listener) ? REQUESTS : 0;
    if (here.length !== expected) {
      wrong.push(`the proxy's port ${PORTS[listener]} saw ${here.length} connections, not ${expected}`);
    }
    const port = listener === 'inboundHBONE' ? PORTS.inboundHBONE : HTTP_PORT;
    for (const { source, destination, port: found } of here) {
      if (source === from && destination === to && found === port) continue;
      wrong.push(`the proxy saw ${source} -> ${destination} port ${found}, not ${from} -> ${to} port ${port}`);
    }
  }
  return wrong;
}

function countErrors(counted: readonly Counter[], scenario: Scenario): string[] {
  const wrong: string[] = [];
  for (const { program, reason } of scenario.counted) {
    const packets = sum(counted, program, reason);
    if (packets < REQUESTS)
      wrong.push(`the kernel counted ${packets} packets as ${program} ${reason}, not ${REQUESTS}`);
  }
  const expected = new Set(scenario.counted.map(({ reason }) => reason));
  for (const { program, reason, packets } of counted) {
    const decision =
      reason.startsWith('redirected_') || reason === 'from_proxy_second_leg' || reason.startsWith('drop_');
    if ((decision && !expected.has(reason)) || scenario.counted.length === 0) {
      wrong.push(`the kernel counted ${packets} packets as ${program} ${reason}, not 0`);
    }
  }
  return wrong;
}

/** The count that says most about a scenario, for the table. */
export function tellingCount(counted: readonly Counter[], scenario: Scenario): string {
  const first = scenario.counted[0];
  return first === undefined ? '' : `${first.reason} ${sum(counted, first.program, first.reason)}`;
}

function sum(counted: readonly Counter[], program: Counter['program'], reason: string): bigint {
  return counted
    .filter((counter) => counter.program === program && counter.reason === reason)
    .reduce((packets, counter) => packets + counter.packets, 0n);
}
