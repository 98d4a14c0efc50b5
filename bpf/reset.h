/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Refusing a connection as a host without a listener does: the segment is made into the RST that answers it (RFC 9293,
 * 3.10.7.1). Both contracts use it; where the frame then goes is the caller's business.
 */
#ifndef AMBIENT_RESET_H
#define AMBIENT_RESET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "parse.h"

/* A TCP header without options. */
struct tcp_header {
	__be16 source;
	__be16 dest;
	__be32 seq;
	__be32 ack_seq;
	__u8 offset; /* of the payload, in 32-bit words, in the upper half */
	__u8 flags;
	__be16 window;
	__be16 check;
	__be16 urgent;
};

/* What Linux gives packets that belong to no socket of its own. */
#define RESET_TTL 64

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/*
 * A checksum that hardware, or nobody, is still to complete (CHECKSUM_PARTIAL) covers the pseudo header alone, and the
 * kernel completes it from where TCP began. No helper tells; but bpf_l4_csum_replace leaves such a field alone for
 * whatever is not in the pseudo header. The field must be 0.
 */
static __always_inline int checksum_is_partial(struct __sk_buff *skb, __u32 field)
{
	__be16 check = 0;

	if (bpf_l4_csum_replace(skb, field, 0, bpf_htons(1), sizeof(check)) ||
	    bpf_skb_load_bytes(skb, field, &check, sizeof(check)))
		return -1;
	return check == 0;
}

#define UNANSWERABLE 1 /* its lengths contradict each other: no TCP would take it */

/*
 * Makes the TCP segment that p describes into its RST: ends swapped, IP options, extension headers, TCP options and
 * payload gone, Ethernet addresses swapped. 0, or why it cannot be answered: UNANSWERABLE, or negative where the kernel
 * refused, with the frame half changed. The caller sees to it that the segment is no RST itself.
 */
static __noinline int make_reset(struct __sk_buff *skb, const struct packet *p)
{
	struct tcp_header tcp;
	__u8 macs[12];
	__u32 l3 = p->l3_off, l4 = p->l4_off, base, end, payload, header, sum, field;
	__be16 length;
	int partial;

	if (bpf_skb_load_bytes(skb, l4, &tcp, sizeof(tcp)))
		return UNANSWERABLE;
	if (bpf_skb_load_bytes(skb, 6, macs, 6) || bpf_skb_load_bytes(skb, 0, macs + 6, 6))
		return -1;
	base = p->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	if (bpf_skb_load_bytes(skb, l3 + (p->family == 4 ? offsetof(struct iphdr, tot_len) :
							  offsetof(struct ipv6hdr, payload_len)),
			       &length, sizeof(length)))
		return -1;
	/* By the IP header: behind it the frame may be padded. */
	end = l3 + bpf_ntohs(length) + (p->family == 4 ? 0 : base);
	header = (tcp.offset >> 4) * 4;
	if (header < sizeof(tcp))
		return UNANSWERABLE;
	if (tcp.flags & TCP_ACK) {
		tcp.seq = tcp.ack_seq;
		tcp.ack_seq = 0;
		tcp.flags = TCP_RST;
	} else {
		if (end < l4 + header)
			return UNANSWERABLE;
		payload = end - l4 - header;
		tcp.ack_seq = bpf_htonl(bpf_ntohl(tcp.seq) + payload + !!(tcp.flags & TCP_SYN) + !!(tcp.flags & TCP_FIN));
		tcp.seq = 0;
		tcp.flags = TCP_RST | TCP_ACK;
	}

	/* TCP itself is not moved, so that csum_start stays right. */
	if (l4 > l3 + base && bpf_skb_adjust_room(skb, (__s32)(l3 + base - l4), BPF_ADJ_ROOM_NET, 0))
		return -1;
	l4 = l3 + base;
	if (bpf_skb_change_tail(skb, l4 + sizeof(tcp), 0))
		return -1;

	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return -1;

	/* Length and protocol of the pseudo header. */
	sum = bpf_htonl(sizeof(tcp) + IPPROTO_TCP);
	if (p->family == 4) {
		struct iphdr ip = {
			.version = 4,
			.ihl = sizeof(ip) / 4,
			.tot_len = bpf_htons(sizeof(ip) + sizeof(tcp)),
			.frag_off = bpf_htons(0x4000),
			.ttl = RESET_TTL,
			.protocol = IPPROTO_TCP,
			.saddr = p->socket.ipv4.daddr,
			.daddr = p->socket.ipv4.saddr,
		};

		ip.check = ~fold(bpf_csum_diff(0, 0, (__be32 *)&ip, sizeof(ip), 0));
		sum = bpf_csum_diff(0, 0, &ip.saddr, 2 * sizeof(ip.saddr), sum);
		if (bpf_skb_store_bytes(skb, l3, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM))
			return -1;
	} else {
		struct ipv6hdr ip = {
			.version = 6,
			.payload_len = bpf_htons(sizeof(tcp)),
			.nexthdr = IPPROTO_TCP,
			.hop_limit = RESET_TTL,
		};

		__builtin_memcpy(&ip.saddr, p->socket.ipv6.daddr, 16);
		__builtin_memcpy(&ip.daddr, p->socket.ipv6.saddr, 16);
		sum = bpf_csum_diff(0, 0, (__be32 *)&ip.saddr, 2 * sizeof(ip.saddr), sum);
		if (bpf_skb_store_bytes(skb, l3, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM))
			return -1;
	}

	length = tcp.source;
	tcp.source = tcp.dest;
	tcp.dest = length;
	tcp.offset = sizeof(tcp) / 4 << 4;
	tcp.window = 0;
	tcp.check = 0;
	tcp.urgent = 0;
	if (bpf_skb_store_bytes(skb, l4, &tcp, sizeof(tcp), BPF_F_RECOMPUTE_CSUM))
		return -1;
	field = l4 + offsetof(struct tcp_header, check);
	partial = checksum_is_partial(skb, field);
	if (partial < 0)
		return -1;
	if (partial)
		tcp.check = fold(sum);
	else
		tcp.check = ~fold(bpf_csum_diff(0, 0, (__be32 *)&tcp, sizeof(tcp), sum));
	return bpf_skb_store_bytes(skb, field, &tcp.check, sizeof(tcp.check), 0);
}

#endif
