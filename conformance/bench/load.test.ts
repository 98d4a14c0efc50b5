// SPDX-License-Identifier: Apache-2.0
// What the load generators print, as fortio 1.63.0, wrk 4.1.0, iperf 3.12 and HAProxy 2.6 print it.

import { expect, test } from 'vitest';
import { parseFortio, parseIperf, parsePeer, parseWrk } from './load.ts';
import { processorTime } from './machine.ts';
import { haproxyConfiguration, parseShowStat } from './proxies.ts';

const fortio = {
  ActualQPS: 38142.04,
  ActualDuration: 1000025204,
  DurationHistogram: {
    Count: 38143,
    Percentiles: [
      { Percentile: 50, Value: 0.000508 },
      { Percentile: 90, Value: 0.000905 },
      { Percentile: 99, Value: 0.000994 },
      { Percentile: 99.9, Value: 0.004193 },
    ],
  },
  RetCodes: { '200': 38143 } as Record<string, number>,
  Sizes: { Sum: 2860725 },
  SocketCount: 4,
};

test('fortio', () => {
  const { metrics, traffic, units, failure } = parseFortio(JSON.stringify(fortio));
  expect(metrics.qps).toBe(38142.04);
  expect(metrics.p50).toBeCloseTo(508);
  expect(metrics.p999).toBeCloseTo(4193);
  expect(traffic).toEqual({ connections: 4, bytes: 2860725, sent: 38143 * 40, packets: 38143 });
  expect(units).toBe(38143);
  expect(failure).toBeUndefined();
});

test('fortio: a request that failed spoils the run', () => {
  const failed = { ...fortio, RetCodes: { '200': 38140, '-1': 3 } };
  expect(parseFortio(JSON.stringify(failed)).failure).toBe('fortio: 3 of 38143 requests failed');
});

const wrk = `Running 1s test @ http://127.0.0.1:8080/
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.70ms    7.01ms  44.58ms   91.53%
    Req/Sec    28.46k    15.60k   47.38k    60.00%
  Latency Distribution
     50%   77.00us
     75%    1.36ms
     90%    7.61ms
     99%    1.02s
  28776 requests in 1.01s, 1.10MB read
Requests/sec:  28485.48
Transfer/sec:      1.09MB
`;

test('wrk', () => {
  const { metrics, traffic, units, failure } = parseWrk(wrk, 8);
  expect(metrics).toEqual({ qps: 28485.48, p50: 77, p90: 7610, p99: 1_020_000 });
  expect(traffic.connections).toBe(8);
  expect(traffic.bytes).toBe(Math.floor(1.1 * 2 ** 20 * 0.99));
  expect(units).toBe(28776);
  expect(failure).toBeUndefined();
});

test('wrk: errors spoil the run', () => {
  const errors = '  Socket errors: connect 0, read 12, write 0, timeout 3\nRequests/sec: ';
  expect(parseWrk(wrk.replace('Requests/sec: ', errors), 8).failure).toMatch(/^wrk: connect 0, read 12/);
});

test('iperf3', () => {
  const end = { sum_received: { bytes: 1_000_000_000, bits_per_second: 8e9, seconds: 1 } };
  const forward = parseIperf(JSON.stringify({ end }), 8, false);
  expect(forward.metrics).toEqual({ gbps: 8 });
  expect(forward.traffic).toEqual({
    connections: 9,
    bytes: 990_000_000,
    sent: 990_000_000,
    packets: 15_106,
  });
  expect(parseIperf(JSON.stringify({ end }), 8, true).traffic.sent).toBe(0);
  expect(() => parseIperf('{"error":"unable to connect"}', 1, false)).toThrow('iperf3: unable to connect');
});

test('the native generator', () => {
  const line =
    '{"what":"crr","connections":10,"failed":2,"transactions":8,"bytes":8,"seconds":1,"perSecond":8,"meanUs":1,"p50Us":2,"p90Us":3,"p99Us":4,"p999Us":5}';
  const { metrics, traffic, failure } = parsePeer(line, true);
  expect(metrics).toEqual({ qps: 8, p50: 2, p90: 3, p99: 4, p999: 5 });
  expect(traffic).toEqual({ connections: 10, bytes: 16, sent: 8, packets: 8, opensConnections: true });
  expect(failure).toBe('2 of 10 connections failed');
});

test('HAProxy’s show stat', () => {
  const csv = `# pxname,svname,scur,stot,bin,bout,econ,
outbound,FRONTEND,0,12,100,2000,,
outbound,one,0,11,100,2000,1,
outbound,BACKEND,0,12,100,2000,1,
`;
  expect(parseShowStat(csv)).toEqual({ outbound: { accepted: 12, connected: 11, failed: 1, bytes: 2100 } });
});

test('HAProxy’s configuration: transparent or to a fixed place', () => {
  const transparent = haproxyConfiguration(
    { listeners: [{ name: 'outbound', port: 15_001, keepSource: true }] },
    '/run/x.sock',
  );
  expect(transparent).toContain('bind :15001 transparent');
  expect(transparent).toContain('usesrc clientip');
  expect(transparent).toContain('server one 0.0.0.0:0');
  const fixed = haproxyConfiguration(
    { listeners: [{ name: 'fixed', port: 18_080, to: { address: 'fd88::3', port: 8080 } }] },
    '/run/x.sock',
  );
  expect(fixed).not.toContain('transparent');
  expect(fixed).toContain('server one [fd88::3]:8080');
});

test('processor time leaves out idling and what was stolen', () => {
  const stat = 'cpu  100 10 50 9000 200 5 35 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n';
  expect(processorTime(stat)).toEqual({ busy: 2, interrupts: 0.4, stolen: 0.07 });
});
