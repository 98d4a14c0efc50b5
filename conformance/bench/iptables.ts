// SPDX-License-Identifier: Apache-2.0
//
// What the bench compares with: Istio's iptables rules, written from their documented behaviour, for both families.
//
// Shared proxy: marks, chains and tables as Istio 1.18 to 1.20 made them on the node and in the proxy's namespace. Two
// differences: pods are matched by their veth and not by an ipset (one comparison, cheaper), and where Istio has GENEVE
// tunnels there are VXLAN ones. In Istio's rules a connection's answers set a connection mark, by which its further
// packets take the proxy's veth directly: only the opening ones go through the tunnel. `tunnel: 'all'` leaves that rule
// out for what the pods send.
// In-pod: the rules of Istio 1.21 and later in the pod's own namespace.

import type { Addresses, Family, Pod, Topology } from '../e2e/topology.ts';
import { families } from '../e2e/topology.ts';
import type { Namespace } from '../netns.ts';
import { IN_POD_MARK } from './proxies.ts';

export type Tunnel = 'none' | 'openings' | 'all';

/** On the node's side, and in the proxy's namespace: Istio's names. */
export const TUNNEL = 'istioout';
export const PROXY_TUNNEL = 'pistioout';
const VXLAN_PORT = 4789;
const VXLAN_ID = 1001;
const tunnelAddress: Record<'node' | 'proxy', Addresses> = {
  node: { 4: '192.168.127.1', 6: 'fdbe::1' },
  proxy: { 4: '192.168.127.2', 6: 'fdbe::2' },
};
const anywhere: Addresses = { 4: '0.0.0.0/0', 6: '::/0' };
const loopback: Addresses = { 4: '127.0.0.1', 6: '::1' };

function restore(namespace: Namespace, family: Family, tables: Record<string, string[]>): void {
  const text = Object.entries(tables).map(([table, lines]) => `*${table}\n${lines.join('\n')}\nCOMMIT\n`);
  namespace.run([family === 4 ? 'iptables-restore' : 'ip6tables-restore'], text.join(''));
}

function rule(namespace: Namespace, family: Family, priority: number, mark: string, table: number): void {
  namespace.ip(`-${family}`, 'rule', 'add', 'pref', `${priority}`, 'fwmark', mark, 'lookup', `${table}`);
}

/** A VXLAN tunnel over IPv4 that carries both families, between the node and the proxy's pod. */
function tunnel(topology: Topology, proxy: Pod): void {
  const end = (namespace: Namespace, name: string, side: 'node' | 'proxy', local: string, remote: string) => {
    const id = ['type', 'vxlan', 'id', `${VXLAN_ID}`, 'dstport', `${VXLAN_PORT}`];
    // The pods' 1500 without the outer headers, as Istio's tunnels have it.
    namespace.ip('link', 'add', name, 'mtu', '1450', ...id, 'local', local, 'remote', remote);
    for (const family of families) {
      const prefix = family === 4 ? '/30' : '/126';
      namespace.ip('address', 'add', tunnelAddress[side][family] + prefix, 'dev', name);
    }
    namespace.ip('link', 'set', name, 'up');
  };
  // The pods' gateway is the node's address on every veth of the ptp plugin.
  end(topology.node, TUNNEL, 'node', '10.88.0.1', proxy.addresses[4]);
  end(proxy.netns, PROXY_TUNNEL, 'proxy', proxy.addresses[4], '10.88.0.1');
  topology.node.run(['sysctl', '-qw', `net.ipv4.conf.${TUNNEL}.rp_filter=0`]);
  proxy.netns.run(['sysctl', '-qw', `net.ipv4.conf.${PROXY_TUNNEL}.rp_filter=0`]);
}

/** Sends what `pods` send to `proxy`, and what answers the proxy's connections with others' addresses back to it. */
export function sharedRules(topology: Topology, proxy: Pod, pods: readonly Pod[], kind: Tunnel): void {
  const { node } = topology;
  const veth = proxy.hostIfname;
  if (kind !== 'none') tunnel(topology, proxy);
  for (const family of families) {
    const own = proxy.addresses[family];
    const pre = (text: string) => `-A ztunnel-PREROUTING ${text}`;
    const outbound = pods.map((pod) => pre(`-i ${pod.hostIfname} -p tcp -j MARK --set-xmark 0x100/0x100`));
    const answered = [
      pre(`! -i ${veth} -m connmark --mark 0x210/0x210 -j MARK --set-xmark 0x040/0x040`),
      pre('-m mark --mark 0x040/0x040 -j RETURN'),
    ];
    const fromTunnel = [
      pre(`-i ${TUNNEL} -j MARK --set-xmark 0x200/0x200`),
      pre(`-i ${TUNNEL} -j RETURN`),
      pre(`-p udp -m udp --dport ${VXLAN_PORT} -j RETURN`),
    ];
    const save = (chain: string, mark: string) =>
      `-A ${chain} -m mark --mark ${mark}/${mark} -j CONNMARK --save-mark --nfmask ${mark} --ctmask ${mark}`;
    restore(node, family, {
      mangle: [
        ...['PREROUTING', 'FORWARD', 'INPUT', 'OUTPUT', 'POSTROUTING'].flatMap((hook) => [
          `:ztunnel-${hook} - [0:0]`,
          `-A ${hook} -j ztunnel-${hook}`,
        ]),
        ...(kind === 'none' ? [] : fromTunnel),
        pre('-m connmark --mark 0x220/0x220 -j MARK --set-xmark 0x200/0x200'),
        pre('-m mark --mark 0x200/0x200 -j RETURN'),
        ...(kind === 'all' ? [] : answered),
        pre(`! -s ${own} -i ${veth} -j MARK --set-xmark 0x210/0x210`),
        pre('-m mark --mark 0x200/0x200 -j RETURN'),
        pre(`-i ${veth} -j MARK --set-xmark 0x220/0x220`),
        pre('-p udp -j MARK --set-xmark 0x220/0x220'),
        pre('-m mark --mark 0x200/0x200 -j RETURN'),
        ...outbound,
        ...['ztunnel-FORWARD', 'ztunnel-INPUT'].flatMap((chain) => [save(chain, '0x220'), save(chain, '0x210')]),
      ],
      nat: [
        ':ztunnel-PREROUTING - [0:0]',
        ':ztunnel-POSTROUTING - [0:0]',
        '-A PREROUTING -j ztunnel-PREROUTING',
        '-A POSTROUTING -j ztunnel-POSTROUTING',
        '-A ztunnel-PREROUTING -m mark --mark 0x100/0x100 -j ACCEPT',
        '-A ztunnel-POSTROUTING -m mark --mark 0x100/0x100 -j ACCEPT',
      ],
    });
    rule(node, family, 20_001, '0x100/0x100', 101);
    rule(node, family, 20_002, '0x40/0x40', 102);
    const route = (table: number, via: string, device: string) =>
      node.ip(`-${family}`, 'route', 'add', 'default', 'via', via, 'dev', device, 'onlink', 'table', `${table}`);
    route(102, own, veth);
    if (kind === 'none') route(101, own, veth);
    else {
      route(101, tunnelAddress.proxy[family], TUNNEL);
      // The tunnel's own packets carry the mark of what is in them.
      if (family === 4) node.ip('route', 'add', own, 'dev', veth, 'table', '101');
    }

    const tproxy = (device: string) =>
      `-A PREROUTING -i ${device} ! -d ${own} -p tcp -j TPROXY --on-port 15001 --on-ip ${loopback[family]} --tproxy-mark 0x400/0xfff`;
    restore(proxy.netns, family, {
      mangle:
        kind === 'none'
          ? [
              // Without a tunnel to tell by, what is new on eth0 is a pod's, and the rest is looked up by its own socket.
              `-A PREROUTING ! -d ${own} -i eth0 -p tcp -m tcp ! --syn -j MARK --set-xmark 0x4d3/0xfff`,
              `-A PREROUTING ! -d ${own} -i eth0 -p tcp -m mark --mark 0x4d3/0xfff -j ACCEPT`,
              tproxy('eth0'),
            ]
          : [tproxy(PROXY_TUNNEL), `-A PREROUTING ! -d ${own} -i eth0 -p tcp -j MARK --set-xmark 0x4d3/0xfff`],
    });
    rule(proxy.netns, family, 20_000, '0x400/0xfff', 100);
    rule(proxy.netns, family, 20_003, '0x4d3/0xfff', 100);
    proxy.netns.ip(`-${family}`, 'route', 'add', 'local', anywhere[family], 'dev', 'lo', 'table', '100');
  }
}

/** The same rules in the form that iptables-restore takes, as Istio's agent applies them to a pod. */
export function inPodTables(family: Family): Record<string, string[]> {
  const probe: Addresses = { 4: '169.254.7.127', 6: 'fd16:9254:7127:1337:ffff:ffff:ffff:ffff' };
  const mark = `0x${IN_POD_MARK.toString(16)}/0xfff`;
  const own = loopback[family];
  const chains = [
    ':ISTIO_PRERT - [0:0]',
    ':ISTIO_OUTPUT - [0:0]',
    '-A PREROUTING -j ISTIO_PRERT',
    '-A OUTPUT -j ISTIO_OUTPUT',
  ];
  return {
    mangle: [
      ...chains,
      `-A ISTIO_PRERT -m mark --mark ${mark} -j CONNMARK --set-xmark 0x111/0xfff`,
      '-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff',
    ],
    nat: [
      ...chains,
      `-A ISTIO_PRERT -s ${probe[family]} -p tcp -m tcp -j ACCEPT`,
      `-A ISTIO_PRERT ! -d ${own} -p tcp -m tcp ! --dport 15008 -m mark ! --mark ${mark} -j REDIRECT --to-ports 15006`,
      `-A ISTIO_OUTPUT -d ${probe[family]} -p tcp -m tcp -j ACCEPT`,
      '-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT',
      `-A ISTIO_OUTPUT ! -d ${own} -o lo -j ACCEPT`,
      `-A ISTIO_OUTPUT ! -d ${own} -p tcp -m mark ! --mark ${mark} -j REDIRECT --to-ports 15001`,
    ],
  };
}

export function inPodRules(pod: Pod): void {
  for (const family of families) {
    restore(pod.netns, family, inPodTables(family));
    rule(pod.netns, family, 32_764, '0x111/0xfff', 100);
    pod.netns.ip(`-${family}`, 'route', 'add', 'local', anywhere[family], 'dev', 'lo', 'table', '100');
  }
}
