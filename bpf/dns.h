/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Changes to a datagram or segment on its way to or from the proxy's DNS listener. Checksums are updated, not computed. */
#ifndef AMBIENT_DNS_H
#define AMBIENT_DNS_H

#include <linux/bpf.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "parse.h"

/* offsetof(struct udphdr, ...); the DNS transaction id is the first thing behind it. TCP's ports are at the same place. */
#define UDP_SOURCE 0
#define UDP_DESTINATION 2
#define UDP_CHECKSUM 6
#define UDP_LENGTH 8
#define TCP_CHECKSUM 16

/* Where the checksum of the layer above IP is; IPv4 may have none in UDP (0), which must stay 0. */
static __always_inline __u32 checksum_offset(const struct packet *p)
{
	return p->l4_off + (p->protocol == IPPROTO_UDP ? UDP_CHECKSUM : TCP_CHECKSUM);
}

static __always_inline __u64 checksum_flags(const struct packet *p)
{
	return p->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
}

/* `at`: UDP_SOURCE or UDP_DESTINATION; `old` and `port` in host order. */
static __always_inline int set_port(struct __sk_buff *skb, const struct packet *p, __u32 at, __u16 old, __u16 port)
{
	__be16 from = bpf_htons(old), to = bpf_htons(port);

	if (bpf_l4_csum_replace(skb, checksum_offset(p), from, to, checksum_flags(p) | sizeof(to)))
		return -1;
	return bpf_skb_store_bytes(skb, p->l4_off + at, &to, sizeof(to), 0);
}

/* Both addresses, in the IP header and, `with_l4` (not in a later fragment), in the checksum above it. */
static __always_inline int set_addresses(struct __sk_buff *skb, const struct packet *p, const __u8 *source,
					 const __u8 *destination, int with_l4)
{
	__be32 old[8], new[8];
	__s64 difference;

	__builtin_memcpy(old, p->tuple.source, 16);
	__builtin_memcpy(old + 4, p->tuple.destination, 16);
	__builtin_memcpy(new, source, 16);
	__builtin_memcpy(new + 4, destination, 16);
	/* Of IPv4 too: what is before a mapped address is the same in both and adds nothing to the difference. */
	difference = bpf_csum_diff(old, sizeof(old), new, sizeof(new), 0);
	if (with_l4 && bpf_l4_csum_replace(skb, checksum_offset(p), 0, difference,
					   checksum_flags(p) | BPF_F_PSEUDO_HDR))
		return -1;
	if (p->family == 4) {
		if (bpf_l3_csum_replace(skb, p->l3_off + offsetof(struct iphdr, check), 0, difference, 0))
			return -1;
		if (bpf_skb_store_bytes(skb, p->l3_off + offsetof(struct iphdr, saddr), &new[3], 4, 0))
			return -1;
		return bpf_skb_store_bytes(skb, p->l3_off + offsetof(struct iphdr, daddr), &new[7], 4, 0);
	}
	return bpf_skb_store_bytes(skb, p->l3_off + offsetof(struct ipv6hdr, saddr), new, 32, 0);
}

#endif
