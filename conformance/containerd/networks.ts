// SPDX-License-Identifier: Apache-2.0
import type { Conflist } from './throwaway-node.ts';

type Entry = Conflist['plugins'][number];

const ipam = {
  type: 'host-local',
  ranges: [[{ subnet: '10.88.0.0/24' }], [{ subnet: 'fd00:88::/64' }]],
  routes: [{ dst: '0.0.0.0/0' }, { dst: '::/0' }],
};

/** The primary plugins of the tests; both give each pod an IPv4 and an IPv6 address. */
const primaries: Record<'bridge' | 'ptp', Entry> = {
  bridge: { type: 'bridge', bridge: 'cni0', isGateway: true, ipam },
  ptp: { type: 'ptp', ipam },
};

/** The addresses that both primary plugins give the node towards its pods, IPv4 and IPv6. */
export const gateways = ['10.88.0.1', 'fd00:88::1'] as const;

/** `primary`, then portmap, then `chained`. Version 1.0.0: containerd 1.6 fails every ADD of a 1.1.0 list. */
export function network(primary: keyof typeof primaries, ...chained: Entry[]): Conflist {
  const portmap: Entry = { type: 'portmap', capabilities: { portMappings: true } };
  return { cniVersion: '1.0.0', name: 'pods', plugins: [primaries[primary], portmap, ...chained] };
}
