// SPDX-License-Identifier: Apache-2.0
// Which interface of prevResult is the attachment's, and which addresses are its. No kernel here: whether two
// namespaces are one is asked through a predicate, and what the kernel says is passed in.

import { formatAddress, parsePrefix } from '../cni/address.ts';
import { CniError, Code, quote } from '../cni/errors.ts';
import type { Result } from '../cni/result.ts';

/** 16 bytes, IPv4 as ::ffff:a.b.c.d */
type Address = Uint8Array;

export interface PodInterface {
  /** index into prevResult.interfaces; undefined: prevResult does not list the interface, which SPEC-conforming older plugins may do */
  index: number | undefined;
  /** as prevResult says it, lower case with colons; later plugins may have changed it */
  mac: string | undefined;
  /** addresses that prevResult gives to this interface, or to none in particular; both families, each once */
  addresses: readonly Address[];
}

/**
 * @param ifname CNI_IFNAME
 * @param isOwnNetns whether a sandbox path names the namespace of CNI_NETNS (device and inode compared); undefined if
 *   it cannot be opened, which counts as yes unless another entry is certain
 * Throws CniError 7 if several entries are the interface, or if its MAC is none.
 */
export function selectPodInterface(
  result: Result,
  ifname: string,
  isOwnNetns: (sandbox: string) => boolean | undefined,
): PodInterface {
  const interfaces = result.interfaces ?? [];
  const candidates = interfaces.flatMap((link, index) => {
    if (link.name !== ifname || (link.sandbox ?? '') === '') return [];
    const certain = isOwnNetns(link.sandbox ?? '');
    return certain === false ? [] : [{ index, certain: certain === true }];
  });
  const certain = candidates.filter((candidate) => candidate.certain);
  const matches = certain.length > 0 ? certain : candidates;
  if (matches.length > 1) {
    const paths = matches.map(({ index }) => `prevResult.interfaces[${index}]`).join(' and ');
    throw new CniError(
      Code.INVALID_NETWORK_CONFIG,
      `prevResult has interface ${quote(ifname)} ${matches.length} times`,
      `${paths} are both of that name and in the pod's network namespace`,
    );
  }
  const index = matches[0]?.index;
  return {
    index,
    mac: index === undefined ? undefined : parseMac(interfaces[index]?.mac ?? '', index),
    addresses: uniqueAddresses(
      (result.ips ?? []).flatMap((ip) => {
        const owner = ip.interface ?? -1;
        // An index that points nowhere says nothing about another interface.
        const applies = owner < 0 || owner >= interfaces.length || owner === index;
        const prefix = parsePrefix(ip.address);
        return applies && prefix !== undefined ? [prefix.bytes] : [];
      }),
    ),
  };
}

/** Each address once, in the order given. */
export function uniqueAddresses(addresses: Iterable<Address>): Address[] {
  const unique = new Map<string, Address>();
  for (const address of addresses) {
    const text = formatAddress(address);
    if (!unique.has(text)) unique.set(text, address);
  }
  return [...unique.values()];
}

/** 6 bytes in hexadecimal with colons or dashes. Other interfaces of prevResult may have anything here. */
function parseMac(text: string, index: number): string | undefined {
  if (text === '') return undefined;
  const mac = text.toLowerCase().replaceAll('-', ':');
  if (/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/.test(mac)) return mac;
  const path = `prevResult.interfaces[${index}].mac`;
  throw new CniError(
    Code.INVALID_NETWORK_CONFIG,
    `invalid ${path}`,
    `${path} = ${quote(text)}: expected a MAC address`,
  );
}
