// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { parseMetrics } from './ztunnel.ts';

const line = (reporter: string, source: string, destination: string, value: number) =>
  `istio_tcp_connections_opened_total{reporter="${reporter}",source_workload="${source}",source_workload_namespace="default",destination_workload="${destination}",connection_security_policy="mutual_tls"} ${value}`;

test('connections of ztunnel’s metrics: by who reports, kinds of one pod added up, others left out', () => {
  const text = [
    '# TYPE istio_tcp_connections_opened counter',
    line('source', 'client', 'server', 3),
    line('source', 'client', 'unknown', 1),
    line('destination', 'client', 'server', 2),
    line('source', 'somebody', 'server', 9),
    'istio_tcp_connections_closed_total{reporter="source",source_workload="client"} 7',
  ].join('\n');
  const count = (accepted: number) => ({ accepted, connected: 0, failed: 0, bytes: null });
  expect(parseMetrics(text, ['client', 'server'])).toEqual({
    client: { outbound: count(4), inbound: count(0) },
    server: { outbound: count(0), inbound: count(2) },
  });
});
