/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From an Ethernet frame to a TCP tuple. parse() decides nothing: it says what a frame is, and the programs say what
 * that means. Headers are read with bpf_skb_load_bytes, which reaches non-linear data too; its failure is a result,
 * never ignored, because a frame that we cannot read may well be one that a receiver can.
 */
#ifndef AMBIENT_PARSE_H
#define AMBIENT_PARSE_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "redirect.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* Extension headers that one packet may have in front of TCP; Linux itself accepts any number. */
#define MAX_EXTENSIONS 6

enum kind {
	KIND_OTHER,          /* not TCP: ARP, ND, UDP, ICMP, ... */
	KIND_TCP,
	KIND_ICMP_ERROR,     /* about a TCP packet; the tuple is that packet's, reversed */
	KIND_UDP,            /* whole, or the first fragment; for DNS */
	KIND_UDP_FRAGMENT,   /* later fragment of a UDP datagram */
	KIND_LATER_FRAGMENT, /* of a TCP segment, or of what may be one */
	KIND_SHORT_FRAGMENT, /* first fragment that ends before TCP's flags */
	KIND_MALFORMED,      /* claims to be TCP and is not readable as TCP */
};

struct packet {
	union {
		struct bpf_sock_tuple socket; /* what a socket lookup wants: the sender's end is saddr/sport */
		__u8 bytes[36];
	};
	struct tuple tuple;
	__u16 l3_off;
	__u16 l4_off;
	__u8 family;
	__u8 flags;          /* TCP's 14th byte */
	__u8 more_fragments;
	__u8 protocol;       /* of the packet itself, not of one that it quotes */
	__u32 fragment_id;   /* with more_fragments and in later fragments, where the tuple has addresses only */
	__u32 payload;       /* TCP: bytes behind its header */
};

static __always_inline int is_syn(const struct packet *p)
{
	/* Without ACK and without RST: the only segment that opens a connection (tcp_rcv_state_process, LISTEN). */
	return (p->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* Not kept: the verifier wants to see that it is one of two constants. */
static __always_inline __u32 socket_length(const struct packet *p)
{
	return p->family == 4 ? sizeof(p->socket.ipv4) : sizeof(p->socket.ipv6);
}

static __always_inline void map_v4(__u8 *to, __be32 from)
{
	__u32 *word = (__u32 *)to;

	word[0] = 0;
	word[1] = 0;
	word[2] = bpf_htonl(0xffff);
	word[3] = from;
}

static __always_inline void copy16(__u8 *to, const __u8 *from)
{
	__builtin_memcpy(to, from, 16);
}

static __always_inline struct tuple reversed(const struct tuple *t)
{
	struct tuple r;

	copy16(r.source, t->destination);
	copy16(r.destination, t->source);
	r.source_port = t->destination_port;
	r.destination_port = t->source_port;
	return r;
}

static __always_inline void set_v4(struct packet *p, __be32 saddr, __be32 daddr, __be16 sport, __be16 dport)
{
	p->family = 4;
	p->socket.ipv4.saddr = saddr;
	p->socket.ipv4.daddr = daddr;
	p->socket.ipv4.sport = sport;
	p->socket.ipv4.dport = dport;
	map_v4(p->tuple.source, saddr);
	map_v4(p->tuple.destination, daddr);
	p->tuple.source_port = bpf_ntohs(sport);
	p->tuple.destination_port = bpf_ntohs(dport);
}

static __always_inline void set_v6(struct packet *p, const void *saddr, const void *daddr, __be16 sport, __be16 dport)
{
	p->family = 6;
	__builtin_memcpy(p->socket.ipv6.saddr, saddr, 16);
	__builtin_memcpy(p->socket.ipv6.daddr, daddr, 16);
	p->socket.ipv6.sport = sport;
	p->socket.ipv6.dport = dport;
	copy16(p->tuple.source, saddr);
	copy16(p->tuple.destination, daddr);
	p->tuple.source_port = bpf_ntohs(sport);
	p->tuple.destination_port = bpf_ntohs(dport);
}

/* ---- direct access ----------------------------------------------------------------------------------------------- */

/*
 * Headers are nearly always in the linear part of a packet, where a program reads them without a call. A load of a
 * wider type than the address is aligned to is refused on machines that cannot do it: two bytes are right everywhere in
 * a frame, four from the IP header on.
 */
static __always_inline int copy_words2(struct __sk_buff *skb, __u32 offset, __u16 *to, __u32 count)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const __u16 *from = data + offset;
	__u32 i;

	if (data + offset + count * sizeof(*to) > end)
		return bpf_skb_load_bytes(skb, offset, to, count * sizeof(*to));
#pragma unroll
	for (i = 0; i < count; i++)
		to[i] = from[i];
	return 0;
}

/* A TCP header as far as the flags; 16 bytes of it have to be there, by alignment. */
struct tcp_start {
	__be16 source;
	__be16 dest;
	__be32 seq;
	__be32 ack_seq;
	__u8 offset;
	__u8 flags;
};

struct ports {
	__be16 source;
	__be16 dest;
};

/* `room`: bytes that the IP header says follow it; less than the frame may hold, because of padding. */
static __always_inline enum kind parse_tcp(struct __sk_buff *skb, struct packet *p, __u32 room,
					   const struct iphdr *ip4, const struct ipv6hdr *ip6)
{
	struct tcp_start tcp;

	if (room < sizeof(tcp) || bpf_skb_load_bytes(skb, p->l4_off, &tcp, sizeof(tcp)))
		return p->more_fragments ? KIND_SHORT_FRAGMENT : KIND_MALFORMED;
	p->flags = tcp.flags;
	p->payload = room > (tcp.offset >> 4) * 4u ? room - (tcp.offset >> 4) * 4u : 0;
	if (ip4)
		set_v4(p, ip4->saddr, ip4->daddr, tcp.source, tcp.dest);
	else
		set_v6(p, &ip6->saddr, &ip6->daddr, tcp.source, tcp.dest);
	return KIND_TCP;
}

static __always_inline enum kind parse_udp(struct __sk_buff *skb, struct packet *p,
					   const struct iphdr *ip4, const struct ipv6hdr *ip6)
{
	struct ports udp;

	if (bpf_skb_load_bytes(skb, p->l4_off, &udp, sizeof(udp)))
		return KIND_OTHER;
	if (ip4)
		set_v4(p, ip4->saddr, ip4->daddr, udp.source, udp.dest);
	else
		set_v6(p, &ip6->saddr, &ip6->daddr, udp.source, udp.dest);
	return KIND_UDP;
}

/* ICMP quotes at least 8 bytes of the packet it is about: TCP's ports and sequence number. */
static __always_inline enum kind parse_icmp4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr quoted;
	struct ports ports;
	__u8 type;

	if (bpf_skb_load_bytes(skb, p->l4_off, &type, 1))
		return KIND_OTHER;
	if (type != 3 && type != 11 && type != 12) /* unreachable (fragmentation needed too), time exceeded, parameter */
		return KIND_OTHER;
	if (bpf_skb_load_bytes(skb, p->l4_off + 8, &quoted, sizeof(quoted)))
		return KIND_OTHER;
	if (quoted.version != 4 || quoted.ihl < 5 || quoted.protocol != IPPROTO_TCP || quoted.frag_off & bpf_htons(0x1fff))
		return KIND_OTHER;
	if (bpf_skb_load_bytes(skb, p->l4_off + 8 + quoted.ihl * 4, &ports, sizeof(ports)))
		return KIND_OTHER;
	set_v4(p, quoted.daddr, quoted.saddr, ports.dest, ports.source);
	return KIND_ICMP_ERROR;
}

static __always_inline enum kind parse_icmp6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr quoted;
	struct ports ports;
	__u8 type;

	if (bpf_skb_load_bytes(skb, p->l4_off, &type, 1))
		return KIND_OTHER;
	if (type < 1 || type > 4) /* unreachable, too big, time exceeded, parameter */
		return KIND_OTHER;
	if (bpf_skb_load_bytes(skb, p->l4_off + 8, &quoted, sizeof(quoted)))
		return KIND_OTHER;
	if (quoted.nexthdr != IPPROTO_TCP)
		return KIND_OTHER;
	if (bpf_skb_load_bytes(skb, p->l4_off + 8 + sizeof(quoted), &ports, sizeof(ports)))
		return KIND_OTHER;
	set_v6(p, &quoted.daddr, &quoted.saddr, ports.dest, ports.source);
	return KIND_ICMP_ERROR;
}

static __always_inline enum kind parse_v4(struct __sk_buff *skb, struct packet *p)
{
	struct iphdr ip;
	__u32 room;
	__u16 fragment;

	if (bpf_skb_load_bytes(skb, p->l3_off, &ip, sizeof(ip)))
		return KIND_MALFORMED;
	if (ip.protocol != IPPROTO_TCP && ip.protocol != IPPROTO_ICMP && ip.protocol != IPPROTO_UDP)
		return KIND_OTHER;
	fragment = bpf_ntohs(ip.frag_off);
	p->protocol = ip.protocol;
	p->fragment_id = bpf_ntohs(ip.id);
	p->more_fragments = !!(fragment & 0x2000);
	p->l4_off = p->l3_off + ip.ihl * 4;
	if (ip.protocol == IPPROTO_ICMP)
		return fragment & 0x1fff || ip.ihl < 5 ? KIND_OTHER : parse_icmp4(skb, p);
	if (ip.version != 4 || ip.ihl < 5)
		return ip.protocol == IPPROTO_UDP ? KIND_OTHER : KIND_MALFORMED;
	if (fragment & 0x1fff) {
		set_v4(p, ip.saddr, ip.daddr, 0, 0);
		return ip.protocol == IPPROTO_UDP ? KIND_UDP_FRAGMENT : KIND_LATER_FRAGMENT;
	}
	if (ip.protocol == IPPROTO_UDP)
		return parse_udp(skb, p, &ip, 0);
	room = bpf_ntohs(ip.tot_len);
	/* BIG TCP: the kernel's own super-packets have no length that fits. */
	room = room == 0 ? skb->len : room;
	room = room < ip.ihl * 4u ? 0 : room - ip.ihl * 4u;
	return parse_tcp(skb, p, room, &ip, 0);
}

struct extension {
	__u8 next;
	__u8 length;
	__be16 fragment; /* meaningful in a fragment header only */
};

static __always_inline enum kind parse_v6(struct __sk_buff *skb, struct packet *p)
{
	struct ipv6hdr ip;
	struct extension ext;
	__u32 off, end;
	__u8 next;
	int i;

	if (bpf_skb_load_bytes(skb, p->l3_off, &ip, sizeof(ip)))
		return KIND_MALFORMED;
	next = ip.nexthdr;
	off = p->l3_off + sizeof(ip);
	end = bpf_ntohs(ip.payload_len);
	end = end == 0 ? skb->len : off + end; /* 0: jumbogram, or BIG TCP */
#pragma unroll
	for (i = 0; i <= MAX_EXTENSIONS; i++) {
		p->l4_off = off;
		p->protocol = next;
		if (next == IPPROTO_TCP)
			return parse_tcp(skb, p, end > off ? end - off : 0, 0, &ip);
		if (next == IPPROTO_UDP)
			return parse_udp(skb, p, 0, &ip);
		if (next == IPPROTO_ICMPV6)
			return parse_icmp6(skb, p);
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			return KIND_OTHER;
		/* Behind `end` is padding, which the receiver does not read: what follows is in another fragment. */
		if (end < off + sizeof(ext) || bpf_skb_load_bytes(skb, off, &ext, sizeof(ext)))
			return p->more_fragments ? KIND_SHORT_FRAGMENT : KIND_MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			__be32 id;

			if (bpf_skb_load_bytes(skb, off + 4, &id, sizeof(id)))
				return KIND_MALFORMED;
			p->fragment_id = bpf_ntohl(id);
			if (ext.fragment & bpf_htons(0xfff8)) {
				if (ext.next == IPPROTO_ICMPV6)
					return KIND_OTHER;
				set_v6(p, &ip.saddr, &ip.daddr, 0, 0);
				/* What follows is in the first fragment; behind another extension it may still be TCP. */
				return ext.next == IPPROTO_UDP ? KIND_UDP_FRAGMENT : KIND_LATER_FRAGMENT;
			}
			p->more_fragments |= ext.fragment & bpf_htons(1) ? 1 : 0;
			off += 8;
		} else if (next == IPPROTO_AH) {
			off += (ext.length + 2) * 4;
		} else {
			off += (ext.length + 1) * 8;
		}
		next = ext.next;
	}
	return KIND_MALFORMED;
}

/*
 * Nearly every packet: TCP, whole, right behind an IP header without options, all of it in reach. The rest, and whatever
 * of this is not as it should be, is left to the functions above. 1: p, which was zero, is filled as they would have.
 */
static __always_inline int plain_tcp(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const struct ethhdr *eth = data;
	const struct iphdr *ip4 = data + sizeof(*eth);
	const struct ipv6hdr *ip6 = data + sizeof(*eth);
	const struct tcp_start *tcp;
	__u32 room;

	if (data + sizeof(*eth) + sizeof(*ip4) + sizeof(*tcp) > end)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		tcp = (void *)(ip4 + 1);
		/* Version 4, five words; no fragment. */
		if (*(const __u8 *)ip4 != 0x45 || ip4->protocol != IPPROTO_TCP || ip4->frag_off & bpf_htons(0x3fff))
			return 0;
		room = bpf_ntohs(ip4->tot_len);
		if (room < sizeof(*ip4) + sizeof(*tcp))
			return 0;
		room -= sizeof(*ip4);
		p->fragment_id = bpf_ntohs(ip4->id);
		p->l4_off = sizeof(*eth) + sizeof(*ip4);
		set_v4(p, ip4->saddr, ip4->daddr, tcp->source, tcp->dest);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		tcp = (void *)(ip6 + 1);
		if ((void *)(tcp + 1) > end || ip6->nexthdr != IPPROTO_TCP)
			return 0;
		room = bpf_ntohs(ip6->payload_len);
		if (room < sizeof(*tcp))
			return 0;
		p->l4_off = sizeof(*eth) + sizeof(*ip6);
		set_v6(p, &ip6->saddr, &ip6->daddr, tcp->source, tcp->dest);
	} else {
		return 0;
	}
	p->l3_off = sizeof(*eth);
	p->protocol = IPPROTO_TCP;
	p->flags = tcp->flags;
	p->payload = room > (tcp->offset >> 4) * 4u ? room - (tcp->offset >> 4) * 4u : 0;
	return 1;
}

/* Fills p as far as the returned kind says: the tuple for KIND_TCP and KIND_ICMP_ERROR only. */
static __always_inline enum kind parse(struct __sk_buff *skb, struct packet *p)
{
	struct ethhdr eth;

	/* All of it in either case: the verifier wants every byte that is read written, and the ways here to be alike. */
	__builtin_memset(p, 0, sizeof(*p));
	if (plain_tcp(skb, p))
		return KIND_TCP;
	if (bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)))
		return KIND_OTHER;
	p->l3_off = sizeof(eth);
	if (eth.h_proto == bpf_htons(ETH_P_IP))
		return parse_v4(skb, p);
	if (eth.h_proto == bpf_htons(ETH_P_IPV6))
		return parse_v6(skb, p);
	return KIND_OTHER;
}

/*
 * The receiving stack takes VLAN 0 tags off, any number of them, so a tagged frame is as good as an untagged one to it
 * while its payload sits elsewhere. One tag may be in the skb already (vlan_present), the next ones are in the frame.
 */
static __always_inline int vlan_tagged(struct __sk_buff *skb)
{
	__be16 protocol;

	if (skb->vlan_present)
		return 1;
	if (copy_words2(skb, offsetof(struct ethhdr, h_proto), &protocol, 1))
		return 0;
	return protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD);
}

static __always_inline int link_local(const struct packet *p)
{
	return p->family == 6 &&
	       ((p->tuple.source[0] == 0xfe && (p->tuple.source[1] & 0xc0) == 0x80) ||
		(p->tuple.destination[0] == 0xfe && (p->tuple.destination[1] & 0xc0) == 0x80));
}

#endif
