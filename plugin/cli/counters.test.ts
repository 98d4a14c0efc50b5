// SPDX-License-Identifier: Apache-2.0

import { expect, test } from 'vitest';
import { exposition } from './counters.ts';

const line = { program: 'pod_egress', ifindex: 4, namespace: 'shop', name: 'cart', subject: 'shop/cart' } as const;

test('one series per program, pod and reason; several interfaces of a pod are added up', () => {
  const text = exposition([
    { ...line, reason: 'redirected_outbound', packets: 3n, bytes: 200n },
    { ...line, ifindex: 9, reason: 'redirected_outbound', packets: 2n, bytes: 100n },
    { ...line, reason: 'drop_no_listener', packets: 9_007_199_254_740_993n, bytes: 1n },
  ]);
  expect(text).toBe(`# HELP ambient_redirect_packets_total Packets by program, pod and reason.
# TYPE ambient_redirect_packets_total counter
ambient_redirect_packets_total{program="pod_egress",namespace="shop",pod="cart",reason="redirected_outbound"} 5
ambient_redirect_packets_total{program="pod_egress",namespace="shop",pod="cart",reason="drop_no_listener"} 9007199254740993
# HELP ambient_redirect_bytes_total Bytes by program, pod and reason.
# TYPE ambient_redirect_bytes_total counter
ambient_redirect_bytes_total{program="pod_egress",namespace="shop",pod="cart",reason="redirected_outbound"} 300
ambient_redirect_bytes_total{program="pod_egress",namespace="shop",pod="cart",reason="drop_no_listener"} 1
`);
});

test('label values are escaped', () => {
  const text = exposition([{ ...line, name: 'a"b\\c\nd', reason: 'pass_not_tcp', packets: 1n, bytes: 1n }]);
  expect(text).toContain(String.raw`pod="a\"b\\c\nd"`);
});
