// SPDX-License-Identifier: Apache-2.0
//
// The network that Calico and the AWS VPC CNI make for a pod, without either of them: a host-side veth without an
// address that answers for a gateway nobody has, a route to each single pod address, and the Result that they print.

import { createHash } from 'node:crypto';
import { families, type Pod, sysctl, type Topology } from '../e2e/topology.ts';

/** Of every host-side veth of Calico's. */
const CALICO_MAC = 'ee:ee:ee:ee:ee:ee';
const GATEWAY = '169.254.1.1';

export type RoutedPrimary = 'calico' | 'aws-cni';

/** Wires `pod`, the node's `number`th (2 to 250); its ADD of our plugin can follow. */
export function wireRouted(topology: Topology, pod: Pod, number: number, primary: RoutedPrimary): void {
  const { node, testbed } = topology;
  const prefix = primary === 'calico' ? 'cali' : 'eni';
  const host = `${prefix}${createHash('sha1').update(pod.containerId).digest('hex').slice(0, 11)}`;
  testbed.veth(
    { namespace: node, ifname: host, ...(primary === 'calico' && { mac: CALICO_MAC }) },
    { namespace: pod.netns, ifname: 'eth0' },
  );
  sysctl(node, { [`net.ipv4.conf.${host}.proxy_arp`]: 1, [`net.ipv6.conf.${host}.forwarding`]: 1 });
  const addresses = { 4: `10.88.0.${number}`, 6: `fd88::${number.toString(16)}` };
  pod.netns.ip('address', 'add', `${addresses[4]}/32`, 'dev', 'eth0');
  pod.netns.ip('address', 'add', `${addresses[6]}/128`, 'dev', 'eth0', 'nodad');
  pod.netns.ip('route', 'add', GATEWAY, 'dev', 'eth0', 'scope', 'link');
  pod.netns.ip('route', 'add', 'default', 'via', GATEWAY, 'dev', 'eth0');
  pod.netns.ip('-6', 'route', 'add', 'default', 'via', linkLocal(node.mac(host)), 'dev', 'eth0');
  for (const family of families) node.ip(`-${family}`, 'route', 'add', addresses[family], 'dev', host);

  const [link] = JSON.parse(node.ip('-j', 'link', 'show', 'dev', host)) as { ifindex: number }[];
  pod.hostIfname = host;
  pod.hostIfindex = link?.ifindex ?? 0;
  pod.addresses = addresses;
  pod.mac = pod.netns.mac('eth0');
  pod.gatewayMac = node.mac(host);
  const ips = [{ address: `${addresses[4]}/32` }, { address: `${addresses[6]}/128` }];
  if (primary === 'calico') {
    // One interface, the host's, and addresses of none.
    pod.prevResult = { interfaces: [{ name: host, mac: pod.gatewayMac }], ips };
  } else {
    // The last one is a note to its own DEL, not an interface: MAC address "0" is the VLAN, sandbox "0" the ENI's number.
    const note = { name: `dummy${host.slice(prefix.length)}`, mac: '0', sandbox: '0' };
    const interfaces = [
      { name: host, mac: pod.gatewayMac },
      { name: 'eth0', mac: pod.mac, sandbox: pod.netns.path },
      note,
    ];
    pod.prevResult = { interfaces, ips: ips.map((ip) => ({ ...ip, interface: 1 })) };
  }
}

/** EUI-64 of a MAC address in fe80::/64. */
function linkLocal(mac: string): string {
  const bytes = mac.split(':').map((byte) => Number.parseInt(byte, 16));
  const [first = 0, ...rest] = bytes;
  const eui = [first ^ 2, ...rest.slice(0, 2), 0xff, 0xfe, ...rest.slice(2)];
  const hex = eui.map((byte) => byte.toString(16).padStart(2, '0')).join('');
  return `fe80::${hex.match(/.{4}/g)?.join(':')}`;
}
