/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The socket table of a network namespace, asked about the tuple of a packet. It is the only flow table that there is. */
#ifndef AMBIENT_SOCKETS_H
#define AMBIENT_SOCKETS_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"
#include "parse.h"

static __always_inline struct bpf_sock *find_socket(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 size,
						    __s32 nsid)
{
	if (full_sockets_only)
		return bpf_sk_lookup_tcp(skb, tuple, size, (__u64)(__s64)nsid, 0);
	return bpf_skc_lookup_tcp(skb, tuple, size, (__u64)(__s64)nsid, 0);
}

/* BPF_TCP_* state of the socket that would receive this tuple in namespace nsid; 0 if there is none. */
static __always_inline int socket_state(struct __sk_buff *skb, struct packet *p, __s32 nsid)
{
	struct bpf_sock *sk;
	int state = 0;

	sk = find_socket(skb, &p->socket, socket_length(p), nsid);
	if (!sk)
		return 0;
	state = sk->state;
	/* A half-open connection comes back as its listener, whose port is another one. */
	if (full_sockets_only && state == BPF_TCP_LISTEN && sk->src_port != p->tuple.destination_port)
		state = BPF_TCP_SYN_RECV;
	bpf_sk_release(sk);
	return state;
}

/* A connection, whatever its state; TIME_WAIT and half-open ones too. */
static __always_inline int has_connection(struct __sk_buff *skb, struct packet *p, __s32 nsid)
{
	int state = socket_state(skb, p, nsid);

	return state && state != BPF_TCP_LISTEN;
}

/*
 * An IP_TRANSPARENT listener takes any destination, so it is asked for at loopback, where no other address of the
 * namespace can be in the way. The caller releases it.
 */
static __always_inline struct bpf_sock *find_listener(struct __sk_buff *skb, __u8 family, __s32 nsid, __u16 port)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;

	if (family == 4) {
		t.ipv4.daddr = bpf_htonl(0x7f000001);
		t.ipv4.dport = bpf_htons(port);
		sk = find_socket(skb, &t, sizeof(t.ipv4), nsid);
	} else {
		t.ipv6.daddr[3] = bpf_htonl(1);
		t.ipv6.dport = bpf_htons(port);
		sk = find_socket(skb, &t, sizeof(t.ipv6), nsid);
	}
	if (!sk)
		return 0;
	if (sk->state != BPF_TCP_LISTEN) {
		bpf_sk_release(sk);
		return 0;
	}
	return sk;
}

static __always_inline void swap_ends(struct packet *p)
{
	struct bpf_sock_tuple t = p->socket;

	if (p->family == 4) {
		p->socket.ipv4.saddr = t.ipv4.daddr;
		p->socket.ipv4.daddr = t.ipv4.saddr;
		p->socket.ipv4.sport = t.ipv4.dport;
		p->socket.ipv4.dport = t.ipv4.sport;
	} else {
		__builtin_memcpy(p->socket.ipv6.saddr, t.ipv6.daddr, 16);
		__builtin_memcpy(p->socket.ipv6.daddr, t.ipv6.saddr, 16);
		p->socket.ipv6.sport = t.ipv6.dport;
		p->socket.ipv6.dport = t.ipv6.sport;
	}
}

#endif
