/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is decided alike in both contracts with the proxy: which packets are judged, which new connections go direct,
 * what becomes of those that find no listener, and of segments that nobody has a socket for. Where the proxy is and how
 * a packet gets there is the contract's own.
 */
#ifndef AMBIENT_DECIDE_H
#define AMBIENT_DECIDE_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "flows.h"
#include "maps.h"
#include "parse.h"
#include "reset.h"
#include "sockets.h"
#include "verdict.h"

/* The entry of an address that the pod of this hook has, else 0. */
static __always_inline struct endpoint *own_endpoint(const struct run *r, const __u8 *address)
{
	struct endpoint *e = bpf_map_lookup_elem(&endpoints, address);

	return e && e->ifindex == r->ifindex ? e : 0;
}

static __always_inline int is_own(const struct run *r, const __u8 *address)
{
	return own_endpoint(r, address) != 0;
}

/* A segment that opens nothing and that unjudgeable() and link_local() have nothing to say about. */
static __always_inline int later_segment(const struct packet *p, enum kind kind)
{
	return kind == KIND_TCP && !is_syn(p) && !(p->flags & TCP_SYN && p->more_fragments) && !link_local(p);
}

/* Whatever is not TCP, and what claims to be TCP but cannot be judged as TCP. 1: judge on. Later fragments come before. */
static __always_inline int unjudgeable(const struct run *r, const struct packet *p, enum kind kind)
{
	switch (kind) {
	case KIND_OTHER:
	case KIND_UDP:
	case KIND_UDP_FRAGMENT:
		count(r, REASON_PASS_NOT_TCP);
		return PASS;
	case KIND_MALFORMED:
		return drop(r, REASON_DROP_MALFORMED);
	case KIND_SHORT_FRAGMENT:
		return drop(r, REASON_DROP_SHORT_FIRST_FRAGMENT);
	default:
		break;
	}
	/* A listener that was picked would be lost when the receiver puts the fragments together. */
	if (kind == KIND_TCP && p->flags & TCP_SYN && p->more_fragments)
		return drop(r, REASON_DROP_SYN_FRAGMENT);
	return 1;
}

/* ---- new connections --------------------------------------------------------------------------------------------- */

static __always_inline int not_wanted(const struct packet *p, const struct interface *self, enum side side)
{
	if (side == OUTBOUND)
		return self->flags & INTERFACE_NO_OUTBOUND;
	if (side == DNS)
		return 0;
	/* 15008 is HBONE's registered port whatever the proxy was told to listen on. */
	return self->flags & (p->tuple.destination_port == 15008 ? INTERFACE_NO_HBONE : INTERFACE_NO_PLAINTEXT);
}

/* Of what the pod sends. */
static __always_inline enum side outbound_side(const struct packet *p, const struct interface *self)
{
	return self->flags & INTERFACE_DNS && p->tuple.destination_port == 53 ? DNS : OUTBOUND;
}

/* Reason for which a new connection goes direct, for pass_direct(); 0: it is for the proxy. */
static __always_inline __u32 goes_direct(const struct run *r, const struct packet *p, const struct interface *self,
					 const struct tuple *from_pod, enum side side)
{
	if (self->flags & INTERFACE_DRAINING)
		return REASON_PASS_DRAINING;
	if (not_wanted(p, self, side))
		return REASON_PASS_NOT_WANTED;
	return excluded(r, from_pod, side);
}

/* The frame is a RST now: counted, and on its way back to where the refused segment came from. */
static __always_inline int send_reset(const struct run *r, const struct interface *self)
{
	struct __sk_buff *skb = r->skb;
	__u8 macs[12];

	skb->mark = mark_bypass;
	if (r->program == POD_INGRESS || r->program == INPOD_EGRESS) {
		/*
		 * As the pod's own answer would come: conntrack undoes what NAT did to the SYN, the node routes it. Inside the
		 * pod: as what is looped.
		 */
		__builtin_memcpy(macs, r->program == INPOD_EGRESS ? self->pod_mac : self->gateway_mac, 6);
		__builtin_memcpy(macs + 6, self->pod_mac, 6);
		if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
			return drop(r, REASON_DROP_REDIRECT_FAILED);
		if (r->program == INPOD_EGRESS)
			skb->mark = mark_tproxy;
		count(r, REASON_RESET_NO_LISTENER);
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	count(r, REASON_RESET_NO_LISTENER);
	if (r->program == INPOD_INGRESS && skb->sk) {
		/* The node's own SYN is its socket's until it is received, and inpod_egress lets no socket's RST by: a clone has none. */
		bpf_clone_redirect(skb, skb->ifindex, 0);
		return DROP;
	}
	return bpf_redirect(skb->ifindex, 0);
}

/* A SYN for which no proxy listens, and a segment of a dead proxy's flow. `from_pod`: the pod's end is the source. */
static __always_inline int by_policy(const struct run *r, const struct interface *self, const struct tuple *from_pod)
{
	int refused;

	if (self->flags & INTERFACE_POLICY_OPEN) {
		return pass_direct(r, from_pod, REASON_PASS_FAILURE_POLICY_OPEN);
	}
	/* A RST is never answered. */
	if (!(self->flags & INTERFACE_CLOSED_RESET) || r->p->flags & TCP_RST)
		return drop(r, REASON_DROP_NO_LISTENER);
	refused = make_reset(r->skb, r->p);
	if (refused)
		return drop(r, refused == UNANSWERABLE ? REASON_DROP_MALFORMED : REASON_DROP_REDIRECT_FAILED);
	return send_reset(r, self);
}

/* ---- segments without a socket ----------------------------------------------------------------------------------- */

/* What a listener needs to tell whether an ACK carries a valid SYN cookie of its own. */
struct cookie {
	struct { struct iphdr ip; } v4;
	struct { struct ipv6hdr ip; } v6;
	struct { __u8 bytes[20]; } tcp;
};

static __always_inline int may_be_cookie(struct __sk_buff *skb, const struct packet *p, struct cookie *c)
{
	if (!use_check_syncookie || (p->flags & (TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK)
		return 0;
	if (bpf_skb_load_bytes(skb, p->l4_off, &c->tcp, sizeof(c->tcp)))
		return 0;
	if (p->family == 4)
		return !bpf_skb_load_bytes(skb, p->l3_off, &c->v4, sizeof(c->v4));
	return !bpf_skb_load_bytes(skb, p->l3_off, &c->v6, sizeof(c->v6));
}

/*
 * A listener in SYN cookie mode keeps nothing between SYN and ACK, so the ACK that opens the connection has no socket
 * yet. The kernel can tell a valid cookie from any other ACK.
 */
static __always_inline int cookie_valid(struct bpf_sock *listener, const struct packet *p, struct cookie *c)
{
	struct tcphdr *tcp = (struct tcphdr *)&c->tcp;

	if (p->family == 4)
		return bpf_tcp_check_syncookie(listener, &c->v4, sizeof(c->v4), tcp, sizeof(c->tcp)) == 0;
	return bpf_tcp_check_syncookie(listener, &c->v6, sizeof(c->v6), tcp, sizeof(c->tcp)) == 0;
}

/* A segment of which neither a socket nor an entry tells anything. */
static __always_inline int unknown_segment(const struct run *r, const struct interface *self,
					   const struct tuple *from_pod)
{
	__u32 reason;

	/* Its entry was evicted, or the rule is newer than the flow. Which side opened it cannot be seen any more. */
	reason = excluded(r, from_pod, OUTBOUND);
	if (!reason)
		reason = excluded(r, from_pod, INBOUND);
	if (reason)
		return pass(r, reason);
	if (self->flags & INTERFACE_STRICT)
		return drop(r, REASON_DROP_ORPHANED_FLOW);
	return pass(r, REASON_PASS_NO_PROXY_SOCKET);
}

/* ---- the sign ---------------------------------------------------------------------------------------------------- */

/* A source MAC of ours: it says what a frame is for, and is not to be carried by anybody else's. */
static __always_inline int signed_source(struct __sk_buff *skb, __u8 *meaning)
{
	const volatile __u16 *ours = (const volatile __u16 *)sign;
	__u16 source[3];

	if (copy_words2(skb, ETH_ALEN, source, 3) || source[0] != ours[0] || source[1] != ours[1])
		return 0;
	*meaning = ((__u8 *)source)[5];
	return ((__u8 *)source)[4] == sign[4];
}

static __always_inline int same_mac(const __u16 *a, const __u8 *mac)
{
	const __u16 *b = (const __u16 *)mac;

	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]));
}

/* Is this frame addressed to the pod? A bridge floods those whose receiver it does not know. */
static __always_inline int for_pod(struct __sk_buff *skb, const struct interface *self)
{
	__u16 destination[3];

	return !copy_words2(skb, 0, destination, 3) && same_mac(destination, self->pod_mac);
}

/* ---- socket lookup ----------------------------------------------------------------------------------------------- */

/*
 * Leaves word for the socket lookup program of this namespace, which runs when TCP has found no connection for this very
 * packet: `listener` gets it. Unlike bpf_sk_assign this lets TCP find a socket in TIME_WAIT first, and takes listeners
 * with SO_REUSEPORT on every kernel that has such programs.
 */
static __always_inline int steer(const struct packet *p, struct bpf_sock *listener, const struct listener_key *key,
				 __u32 ifindex)
{
	struct steered_key at = { .tuple = p->tuple, .ifindex = ifindex };
	struct steered s = { .listener = *key, .time = bpf_ktime_get_ns() };

	if (bpf_map_update_elem(&listeners, (void *)key, listener, BPF_ANY))
		return -1;
	return bpf_map_update_elem(&steered, &at, &s, BPF_ANY);
}

#define STEERED_LIFETIME 1000000000ull

/* `context` is a struct bpf_sk_lookup. */
static __always_inline int steered_listener(struct bpf_sk_lookup *context, __u32 ifindex)
{
	/* clang merges loads of a context across branches into a computed pointer, which the verifier refuses. */
	volatile struct bpf_sk_lookup *ctx = context;
	struct steered_key at = { .ifindex = ifindex };
	struct listener_key key;
	struct steered *s;
	struct bpf_sock *sk;
	__u32 address[4];
	__u64 time;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == 2 /* AF_INET */) {
		map_v4(at.tuple.source, ctx->remote_ip4);
		map_v4(at.tuple.destination, ctx->local_ip4);
	} else {
		address[0] = ctx->remote_ip6[0];
		address[1] = ctx->remote_ip6[1];
		address[2] = ctx->remote_ip6[2];
		address[3] = ctx->remote_ip6[3];
		__builtin_memcpy(at.tuple.source, address, 16);
		address[0] = ctx->local_ip6[0];
		address[1] = ctx->local_ip6[1];
		address[2] = ctx->local_ip6[2];
		address[3] = ctx->local_ip6[3];
		__builtin_memcpy(at.tuple.destination, address, 16);
	}
	at.tuple.source_port = bpf_ntohs((__u16)ctx->remote_port);
	at.tuple.destination_port = ctx->local_port;
	s = bpf_map_lookup_elem(&steered, &at);
	if (!s)
		return SK_PASS;
	key = s->listener;
	time = s->time;
	/* For one packet: what was dropped on the way must not catch the proxy's own connection of the same tuple later. */
	bpf_map_delete_elem(&steered, &at);
	if (bpf_ktime_get_ns() - time > STEERED_LIFETIME)
		return SK_PASS;
	sk = bpf_map_lookup_elem(&listeners, &key);
	if (!sk)
		return SK_PASS;
	/* This one and not another of its SO_REUSEPORT group, which anybody with its user id can join. */
	bpf_sk_assign(context, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	return SK_PASS;
}

#endif
