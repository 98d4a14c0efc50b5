/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The in-pod contract: the proxy's listeners are in the pod's own netns, so the pod's own socket table says which
 * packets are the proxy's, and a packet gets to the proxy by being looped from the pod's eth0 to its own ingress, with a
 * mark that a rule of that namespace makes local.
 *
 *   inpod_egress   egress of the pod's eth0          what the pod sends
 *   inpod_ingress  ingress of the pod's eth0         what comes from the wire, and what was looped
 *   inpod_lookup   socket lookup in the pod's netns  the listener of the proxy for what the two steered
 *   inpod_sign     egress of the host-side veth      marks what was born on the host, which the pod's side cannot see
 *   inpod_guard    ingress of the host-side veth     TCP that got out past inpod_egress
 *
 * The first three are reached through stubs (redirect.h, "jump").
 *
 * A packet is the proxy's own if it has the proxy's mark and comes from a socket of the proxy's cgroup: the mark alone
 * is anybody's who has CAP_NET_RAW. Of a listener only the mark can be known here; who makes a false one gets packets of
 * its own pod and cannot send anything on. There are packets without a socket that could be asked: RSTs, ACKs of TIME_WAIT,
 * SYN-ACKs with a cookie. Those carry no data, so where they have the mark they are let go whoever made them.
 */
#ifndef AMBIENT_IN_POD_H
#define AMBIENT_IN_POD_H

#include "decide.h"
#include "dns.h"

#define SOCK_STREAM 1
#define SOCK_RAW 3
/* In every network namespace. */
#define LOOPBACK_IFINDEX 1

/* ---- trust ------------------------------------------------------------------------------------------------------- */

static __always_inline int proxy_mark(__u32 mark)
{
	return (mark & PROXY_MARK_MASK) == PROXY_MARK;
}

static __always_inline int check_cgroups(void)
{
	__u32 zero = 0;
	struct settings *s = bpf_map_lookup_elem(&settings, &zero);

	return s && s->check_cgroups;
}

static __always_inline int proxy_cgroup(__u64 id)
{
	return bpf_map_lookup_elem(&proxy_cgroups, &id) != 0;
}

/*
 * Has this socket, found by a lookup, the proxy's mark? Of sockets that show none (TIME_WAIT, half open) `unclear` is the
 * answer. The cgroup of a socket can be had from a packet of it only.
 */
static __always_inline int marked_socket(struct bpf_sock *sk, int unclear)
{
	struct bpf_sock *full = bpf_sk_fullsock(sk);

	return full ? proxy_mark(full->mark) : unclear;
}

static __always_inline int carries_nothing(const struct packet *p)
{
	return p->protocol == IPPROTO_TCP && !is_syn(p) && !p->payload && !p->more_fragments && !(p->flags & TCP_FIN);
}

/* The kernel answers for no socket by one of its own, which is a raw one (IPv4), or by none (IPv6). */
static __always_inline int without_tcp_socket(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	return !sk || sk->type == SOCK_RAW;
}

/* Did the proxy send this packet? */
static __always_inline int from_proxy(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock *sk;
	__u32 one = 1;

	if (!proxy_mark(skb->mark))
		return 0;
	if (!check_cgroups())
		return 1;
	sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && bpf_sk_storage_get(&proxy_sockets, sk, 0, 0))
		return 1;
	if (proxy_cgroup(bpf_skb_cgroup_id(skb))) {
		/* For inpod_guard, which sees packets that cannot show it. */
		if (sk)
			bpf_sk_storage_get(&proxy_sockets, sk, &one, BPF_SK_STORAGE_GET_F_CREATE);
		return 1;
	}
	return carries_nothing(p) && without_tcp_socket(skb);
}

/*
 * Is it a TCP socket of the proxy that this packet still belongs to? The reference survives the way over a veth (4.19),
 * though not every one beyond it, and nobody can give a packet a socket that did not send it.
 */
static __always_inline int sent_by_proxy_socket(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (!sk || sk->type != SOCK_STREAM || sk->protocol != IPPROTO_TCP || !proxy_mark(sk->mark))
		return 0;
	return !check_cgroups() || bpf_sk_storage_get(&proxy_sockets, sk, 0, 0);
}

/* The proxy's listener of this port, which the caller releases. Nobody else's takes its place. */
static __always_inline struct bpf_sock *proxy_listener(struct __sk_buff *skb, __u8 family, __s32 nsid, __u16 port)
{
	struct bpf_sock *sk = port ? find_listener(skb, family, nsid, port) : 0;

	if (!sk)
		return 0;
	if (!marked_socket(sk, 0)) {
		bpf_sk_release(sk);
		return 0;
	}
	return sk;
}

static __always_inline int proxy_listens(struct __sk_buff *skb, const struct packet *p, __u16 port)
{
	struct bpf_sock *sk = proxy_listener(skb, p->family, BPF_F_CURRENT_NETNS, port);

	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

/* ---- loop -------------------------------------------------------------------------------------------------------- */

/*
 * To the pod's own ingress. The destination MAC becomes its own, else its stack would see a packet for another host;
 * the source MAC stays its own, which is how inpod_ingress knows it from what has only the same mark.
 */
static __always_inline int loop_to(const struct run *r, const __u8 *pod_mac, enum reason reason)
{
	struct fragment f = { .action = FRAGMENT_REDIRECT };
	struct __sk_buff *skb = r->skb;
	__u8 macs[12];

	__builtin_memcpy(macs, pod_mac, 6);
	__builtin_memcpy(macs + 6, pod_mac, 6);
	remember_fragment(r, &f);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, reason);
	skb->mark = mark_tproxy;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

static __always_inline int loop(const struct run *r, const struct interface *self, enum reason reason)
{
	return loop_to(r, self->pod_mac, reason);
}

/* ::1 is taken on no other device than lo, whose MAC is zero. */
static __always_inline int loop_to_lo(const struct run *r, enum reason reason)
{
	struct __sk_buff *skb = r->skb;
	__u8 macs[12] = {};

	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, reason);
	skb->mark = mark_tproxy;
	return bpf_redirect(LOOPBACK_IFINDEX, BPF_F_INGRESS);
}

static __always_inline int was_looped(struct __sk_buff *skb)
{
	__u16 macs[6];

	return skb->mark == mark_tproxy && !copy_words2(skb, 0, macs, 6) && same_mac(macs, (__u8 *)(macs + 3));
}

/* ---- DNS --------------------------------------------------------------------------------------------------------- */

/*
 * The proxy's DNS listeners are at 127.0.0.1 and ::1. A query (pod:c to R:53) becomes (R:c to 127.0.0.1:15053), and the
 * answer, which is sent out to R, shows by itself what it has to become: (R:53 to pod:c). Only where the pod has several
 * addresses it has to be kept which of them asked.
 */
static __always_inline void loopback_address(__u8 family, __u8 *to)
{
	if (family == 4) {
		map_v4(to, bpf_htonl(0x7f000001));
		return;
	}
	__builtin_memset(to, 0, 16);
	to[15] = 1;
}

static __always_inline int is_loopback(const struct packet *p, const __u8 *address)
{
	int i, other = 0;

	if (p->family == 4)
		return address[12] == 127;
	for (i = 0; i < 15; i++)
		other |= address[i];
	return p->family == 6 && !other && address[15] == 1;
}

static __always_inline const __u8 *first_address(const struct packet *p, const struct interface *self)
{
	return p->family == 4 ? self->address4 : self->address6;
}

static __always_inline int same_address(const __u8 *a, const __u8 *b)
{
	int i, other = 0;

#pragma unroll
	for (i = 0; i < 16; i++)
		other |= a[i] ^ b[i];
	return !other;
}

static __always_inline struct query asked(const struct run *r, const struct packet *p, const __u8 *resolver, __u16 port)
{
	struct query q = { .ifindex = r->ifindex, .port = port, .id = p->protocol };

	copy16(q.client, resolver);
	return q;
}

/* As the DNS listener sees the packet; for socket lookups. The frame is not changed. */
static __always_inline void turn_to_listener(struct packet *p, const struct interface *self)
{
	struct bpf_sock_tuple t = p->socket;

	if (p->family == 4) {
		p->socket.ipv4.saddr = t.ipv4.daddr;
		p->socket.ipv4.daddr = bpf_htonl(0x7f000001);
		p->socket.ipv4.dport = bpf_htons(self->dns);
	} else {
		__builtin_memcpy(p->socket.ipv6.saddr, t.ipv6.daddr, 16);
		p->socket.ipv6.daddr[0] = 0;
		p->socket.ipv6.daddr[1] = 0;
		p->socket.ipv6.daddr[2] = 0;
		p->socket.ipv6.daddr[3] = bpf_htonl(1);
		p->socket.ipv6.dport = bpf_htons(self->dns);
	}
}

static __always_inline int to_resolver(const struct run *r, const struct packet *p, const struct interface *self,
				       enum reason reason)
{
	struct query q = asked(r, p, p->tuple.destination, p->tuple.source_port);
	__u8 loopback[16];

	if (reason == REASON_DNS_CAPTURED) {
		if (same_address(p->tuple.source, first_address(p, self)))
			bpf_map_delete_elem(&resolvers, &q);
		else if (bpf_map_update_elem(&resolvers, &q, p->tuple.source, BPF_ANY))
			return drop(r, REASON_DROP_REDIRECT_FAILED);
	}
	loopback_address(p->family, loopback);
	if (set_port(r->skb, p, UDP_DESTINATION, p->tuple.destination_port, self->dns) ||
	    set_addresses(r->skb, p, p->tuple.destination, loopback, 1))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	return p->family == 4 ? loop(r, self, reason) : loop_to_lo(r, reason);
}

/* What the DNS listener sends. Later fragments have no ports: `f` is what became of the first one. */
static __always_inline int from_resolver(const struct run *r, const struct packet *p, const struct interface *self,
					 const struct fragment *f)
{
	struct fragment first = { .action = FRAGMENT_DNS_ANSWER };
	__u8 pod[16];

	if (f) {
		copy16(pod, f->resolver);
	} else {
		struct query q = asked(r, p, p->tuple.destination, p->tuple.destination_port);
		__u8 *other = bpf_map_lookup_elem(&resolvers, &q);

		copy16(pod, other ? other : first_address(p, self));
		copy16(first.resolver, pod);
		remember_fragment(r, &first);
		if (set_port(r->skb, p, UDP_SOURCE, self->dns, 53))
			return drop(r, REASON_DROP_REDIRECT_FAILED);
	}
	if (set_addresses(r->skb, p, p->tuple.destination, pod, !f))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	/* Not by loop(): it would write another entry for the fragments. */
	__u8 macs[12];

	__builtin_memcpy(macs, self->pod_mac, 6);
	__builtin_memcpy(macs + 6, self->pod_mac, 6);
	if (bpf_skb_store_bytes(r->skb, 0, macs, sizeof(macs), 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, REASON_DNS_ANSWERED);
	r->skb->mark = mark_tproxy;
	return bpf_redirect(r->skb->ifindex, BPF_F_INGRESS);
}

static __always_inline int resolver_listens(struct __sk_buff *skb, const struct packet *p, const struct interface *self)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	int trusted;

	if (!self->dns)
		return 0;
	if (p->family == 4) {
		t.ipv4.daddr = bpf_htonl(0x7f000001);
		t.ipv4.dport = bpf_htons(self->dns);
		sk = bpf_sk_lookup_udp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		t.ipv6.daddr[3] = bpf_htonl(1);
		t.ipv6.dport = bpf_htons(self->dns);
		sk = bpf_sk_lookup_udp(skb, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	trusted = marked_socket(sk, 0);
	bpf_sk_release(sk);
	return trusted;
}

static __always_inline int inpod_query(const struct run *r, const struct packet *p, const struct interface *self)
{
	__u32 reason;

	if (self->flags & INTERFACE_DRAINING)
		return pass(r, REASON_PASS_DRAINING);
	reason = excluded(r, &p->tuple, OUTBOUND);
	if (reason)
		return pass(r, reason);
	if (!is_own(r, p->tuple.source))
		return drop(r, REASON_DROP_SPOOFED_SOURCE);
	if (!resolver_listens(r->skb, p, self)) {
		if (self->flags & INTERFACE_POLICY_OPEN)
			return pass(r, REASON_PASS_FAILURE_POLICY_OPEN);
		return drop(r, REASON_DROP_NO_LISTENER);
	}
	return to_resolver(r, p, self, REASON_DNS_CAPTURED);
}

/* ---- what the pod sends ------------------------------------------------------------------------------------------ */

static __always_inline int cookie_of(struct __sk_buff *skb, struct packet *p, __u16 port)
{
	struct bpf_sock *sk;
	struct cookie c;
	int valid;

	if (!port || !may_be_cookie(skb, p, &c))
		return 0;
	sk = proxy_listener(skb, p->family, BPF_F_CURRENT_NETNS, port);
	if (!sk)
		return 0;
	valid = cookie_valid(sk, p, &c);
	bpf_sk_release(sk);
	return valid;
}

static __always_inline struct flow *own_flow(const struct run *r, const struct tuple *from_proxy)
{
	struct flow *f = bpf_map_lookup_elem(&flows, from_proxy);

	return f && f->ifindex == r->ifindex ? f : 0;
}

static __always_inline int inpod_opening(const struct run *r, struct packet *p, const struct interface *self)
{
	enum side side = outbound_side(p, self);
	struct tuple from_proxy = reversed(&p->tuple);
	__u32 reason;

	if (!is_own(r, p->tuple.source))
		return drop(r, REASON_DROP_SPOOFED_SOURCE);
	reason = goes_direct(r, p, self, &p->tuple, side);
	if (reason)
		return pass_direct(r, &p->tuple, reason);
	if (!proxy_listens(r->skb, p, side == DNS ? self->dns : self->outbound))
		return by_policy(r, self, &p->tuple);
	forget_direct(r->ifindex, &p->tuple);
	remember_flow(&from_proxy, r->ifindex, FLOW_OUTBOUND);
	if (side == DNS)
		return to_resolver(r, p, self, REASON_DNS_CAPTURED);
	return loop(r, self, REASON_REDIRECTED_OUTBOUND);
}

/*
 * A later segment. `own`: its source is the pod's, and no socket of this namespace has the connection (the proxy's end
 * of it has the address that the pod's end is connected to).
 */
static __always_inline int inpod_unconnected(const struct run *r, struct packet *p, const struct interface *self, int own)
{
	struct __sk_buff *skb = r->skb;
	enum side side = outbound_side(p, self);
	__u16 port = side == DNS ? self->dns : self->outbound;
	struct tuple from_proxy = reversed(&p->tuple);
	struct bpf_sock_tuple socket;
	int connected;

	if (!own) {
		/*
		 * An address that only the pod knows of (a VIP, SLAAC) answers the proxy, whose end of the connection has the
		 * caller's address; or somebody else, on a flow that was let go direct.
		 */
		if (!is_own(r, p->tuple.destination) && has_connection(skb, p, BPF_F_CURRENT_NETNS))
			return loop(r, self, REASON_TO_PROXY_ESTABLISHED);
		if (!is_direct(r->ifindex, &p->tuple))
			return drop(r, REASON_DROP_SPOOFED_SOURCE);
	}
	if (side == DNS) {
		socket = p->socket;
		turn_to_listener(p, self);
		connected = has_connection(skb, p, BPF_F_CURRENT_NETNS);
		p->socket = socket;
		if (connected)
			return to_resolver(r, p, self, REASON_TO_PROXY_ESTABLISHED);
	}
	if (is_direct(r->ifindex, &p->tuple))
		return pass(r, REASON_PASS_DIRECT);
	if (side != DNS && cookie_of(skb, p, port))
		return loop(r, self, REASON_TO_PROXY_COOKIE);
	if (own_flow(r, &from_proxy)) {
		if (!proxy_listens(skb, p, port))
			return by_policy(r, self, &p->tuple);
		if (side == DNS)
			return to_resolver(r, p, self, REASON_TO_PROXY_ORPHANED);
		return loop(r, self, REASON_TO_PROXY_ORPHANED);
	}
	return unknown_segment(r, self, &p->tuple);
}

SEC("tc")
int inpod_egress(struct __sk_buff *skb)
{
	struct run r = { skb, skb->cb[0], INPOD_EGRESS, 0 };
	struct endpoint *own = 0;
	struct interface *self;
	struct fragment *f;
	struct packet p;
	enum kind kind = KIND_OTHER;
	int verdict, tagged, trusted = 0, refusal = 0, later = 0;

	skb->cb[0] = 0;
	tagged = vlan_tagged(skb);
	if (!tagged) {
		kind = parse(skb, &p);
		r.p = &p;
		trusted = (kind == KIND_TCP || kind == KIND_UDP) && from_proxy(skb, &p);
		/* inpod_ingress refuses by a RST that has our mark; nobody's socket sends it. */
		refusal = skb->mark == mark_bypass && kind == KIND_TCP && p.flags & TCP_RST && carries_nothing(&p) && !skb->sk;
		later = later_segment(&p, kind) && !is_loopback(&p, p.tuple.source) && !refusal;
	}
	if (later) {
		/* Nearly every packet. That the pod is enrolled its own address tells: nothing else is asked for. */
		if (trusted)
			return pass(&r, REASON_PASS_PROXY_OWN);
		own = own_endpoint(&r, p.tuple.source);
		if (own && has_connection(skb, &p, BPF_F_CURRENT_NETNS))
			return loop_to(&r, own->pod_mac, REASON_TO_PROXY_ESTABLISHED);
	}
	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (tagged)
		return drop(&r, REASON_DROP_VLAN_TAGGED);
	if (later)
		return inpod_unconnected(&r, &p, self, own != 0);
	if (kind == KIND_LATER_FRAGMENT || kind == KIND_UDP_FRAGMENT) {
		f = first_fragment(&r, &p);
		if (f && f->action == FRAGMENT_DNS_ANSWER)
			return from_resolver(&r, &p, self, f);
		if (is_loopback(&p, p.tuple.source))
			return drop(&r, REASON_DROP_SPOOFED_SOURCE);
		if (kind == KIND_LATER_FRAGMENT) {
			if (!f)
				return drop(&r, REASON_DROP_FRAGMENT);
			if (f->action == FRAGMENT_REDIRECT)
				return loop(&r, self, REASON_TO_PROXY_ESTABLISHED);
			count(&r, REASON_PASS_FRAGMENT);
			return PASS;
		}
	}
	/* route_localnet lets such packets out that are to stay inside. */
	if ((kind == KIND_TCP || kind == KIND_UDP) && is_loopback(&p, p.tuple.source)) {
		if (trusted && self->dns && p.tuple.source_port == self->dns)
			return from_resolver(&r, &p, self, 0);
		return drop(&r, REASON_DROP_SPOOFED_SOURCE);
	}
	if (kind == KIND_UDP && !trusted && self->flags & INTERFACE_DNS && p.tuple.destination_port == 53 &&
	    !p.more_fragments)
		return inpod_query(&r, &p, self);
	verdict = unjudgeable(&r, &p, kind);
	if (verdict != 1)
		return verdict;
	if (kind == KIND_ICMP_ERROR)
		return pass(&r, REASON_PASS_NOT_TCP);
	if (link_local(&p))
		return pass(&r, REASON_PASS_LINK_LOCAL);
	if (trusted)
		return pass(&r, REASON_PASS_PROXY_OWN);
	if (refusal) {
		skb->mark = 0;
		return pass(&r, REASON_PASS_BYPASS);
	}
	return inpod_opening(&r, &p, self);
}

/* ---- what the pod receives --------------------------------------------------------------------------------------- */

/* Gives a packet for which there is no connection to the proxy's listener of this port. */
static __always_inline int to_listener(const struct run *r, const struct packet *p, const struct interface *self,
				       __u16 port, enum reason reason)
{
	struct listener_key key = { .ifindex = r->ifindex, .port = port, .family = p->family };
	struct bpf_sock *sk = proxy_listener(r->skb, p->family, BPF_F_CURRENT_NETNS, port);
	int failed;

	if (!sk)
		return drop(r, REASON_DROP_NO_LISTENER);
	failed = steer(p, sk, &key, r->ifindex);
	bpf_sk_release(sk);
	return failed ? drop(r, REASON_DROP_REDIRECT_FAILED) : pass(r, reason);
}

/* What inpod_egress has looped: the decision is made, the listener is to be named. */
static __always_inline int inpod_looped(const struct run *r, struct packet *p, const struct interface *self,
					enum kind kind)
{
	__u16 port = self->outbound;
	int state;

	if (kind != KIND_TCP || is_loopback(p, p->tuple.destination))
		return pass(r, REASON_PROXY_DELIVERED);
	state = socket_state(r->skb, p, BPF_F_CURRENT_NETNS);
	if (state && state != BPF_TCP_LISTEN && !(is_syn(p) && state == BPF_TCP_TIME_WAIT))
		return pass(r, REASON_PROXY_DELIVERED);
	/* The answer of the DNS listener, or of the pod to a connection that the proxy took: its receiver is here. */
	if (is_own(r, p->tuple.destination))
		return pass(r, REASON_PROXY_DELIVERED);
	/* A reply of the pod on an inbound flow whose proxy died, and the cookie of none: that listener answers with RST. */
	if (is_syn(p) && state == BPF_TCP_TIME_WAIT)
		return to_listener(r, p, self, port, REASON_PROXY_TIME_WAIT);
	return to_listener(r, p, self, port, REASON_PROXY_ASSIGNED);
}

/* Istio's kubelet probes, which the node's iptables rules give these addresses. */
static __always_inline int istio_probe(const struct packet *p)
{
	const __u32 *address = (const __u32 *)p->tuple.source;

	if (p->family == 4)
		return address[3] == bpf_htonl(0xa9fe077f);
	return address[0] == bpf_htonl(0xfd169254) && address[1] == bpf_htonl(0x71270000 | 0x1337) &&
	       address[2] == 0xffffffff && address[3] == 0xffffffff;
}

/* To the pod from outside, its end of the tuple being the destination. */
static __always_inline int inpod_inbound(const struct run *r, struct packet *p, const struct interface *self)
{
	struct tuple from_pod = reversed(&p->tuple);
	int hbone = self->inbound_hbone && p->tuple.destination_port == self->inbound_hbone;
	struct __sk_buff *skb = r->skb;
	struct bpf_sock *sk;
	int state = 0, trusted = 0;
	__u32 reason;

	if (is_syn(p)) {
		reason = goes_direct(r, p, self, &from_pod, INBOUND);
		if (reason)
			return pass_direct(r, &from_pod, reason);
		if (!proxy_listens(skb, p, hbone ? self->inbound_hbone : self->inbound_plaintext))
			return by_policy(r, self, &from_pod);
		forget_direct(r->ifindex, &from_pod);
		/* The proxy is at this very address and port. */
		if (hbone)
			return pass(r, REASON_PROXY_DELIVERED);
		remember_flow(&from_pod, r->ifindex, FLOW_INBOUND);
		return to_listener(r, p, self, self->inbound_plaintext, REASON_REDIRECTED_INBOUND);
	}
	sk = bpf_skc_lookup_tcp(skb, &p->socket, socket_length(p), BPF_F_CURRENT_NETNS, 0);
	if (sk) {
		state = sk->state;
		trusted = marked_socket(sk, state != BPF_TCP_LISTEN);
		bpf_sk_release(sk);
	}
	if (trusted && state != BPF_TCP_LISTEN)
		return pass(r, REASON_TO_PROXY_ESTABLISHED);
	if (trusted && hbone)
		return pass(r, REASON_PROXY_DELIVERED);
	if (is_direct(r->ifindex, &from_pod))
		return pass(r, REASON_PASS_DIRECT);
	if (state && state != BPF_TCP_LISTEN) {
		/* A socket of the pod's own: is its peer the proxy, this can only be somebody who pretends to be its peer. */
		swap_ends(p);
		state = has_connection(skb, p, BPF_F_CURRENT_NETNS);
		swap_ends(p);
		if (state)
			return drop(r, REASON_DROP_ORPHANED_FLOW);
		return unknown_segment(r, self, &from_pod);
	}
	if (cookie_of(skb, p, self->inbound_plaintext))
		return to_listener(r, p, self, self->inbound_plaintext, REASON_TO_PROXY_COOKIE);
	if (own_flow(r, &from_pod)) {
		if (!proxy_listens(skb, p, self->inbound_plaintext))
			return by_policy(r, self, &from_pod);
		return to_listener(r, p, self, self->inbound_plaintext, REASON_TO_PROXY_ORPHANED);
	}
	return unknown_segment(r, self, &from_pod);
}

/*
 * accept_local and route_localnet, which the loop needs, also let in from the wire what claims to come from the pod
 * itself or is for its loopback. Every IPv4 packet is meant; of IPv6, where duplicate address detection may show the own
 * address, TCP and UDP.
 */
static __always_inline __u32 smuggled(const struct run *r, const struct packet *p, enum kind kind)
{
	struct iphdr ip;
	__be16 protocol;
	__u8 source[16];

	if (kind == KIND_TCP && p->family == 4) {
		if (is_loopback(p, p->tuple.destination) || is_loopback(p, p->tuple.source))
			return REASON_DROP_NOT_OUR_ADDRESS;
		return is_own(r, p->tuple.source) ? REASON_DROP_SPOOFED_SOURCE : 0;
	}
	if (copy_words2(r->skb, offsetof(struct ethhdr, h_proto), &protocol, 1))
		return 0;
	if (protocol == bpf_htons(ETH_P_IP) && !bpf_skb_load_bytes(r->skb, sizeof(struct ethhdr), &ip, sizeof(ip))) {
		if ((bpf_ntohl(ip.daddr) >> 24) == 127 || (bpf_ntohl(ip.saddr) >> 24) == 127)
			return REASON_DROP_NOT_OUR_ADDRESS;
		map_v4(source, ip.saddr);
		return is_own(r, source) ? REASON_DROP_SPOOFED_SOURCE : 0;
	}
	if (p->family != 6 || (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP))
		return 0;
	return is_own(r, p->tuple.source) ? REASON_DROP_SPOOFED_SOURCE : 0;
}

SEC("tc")
int inpod_ingress(struct __sk_buff *skb)
{
	struct run r = { skb, skb->cb[0], INPOD_INGRESS, 0 };
	struct interface *self;
	struct fragment *f;
	struct packet p;
	struct tuple from_pod;
	enum kind kind;
	__u8 meaning = 0;
	__u32 reason;
	int verdict, looped;

	skb->cb[0] = 0;
	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	looped = was_looped(skb);
	if (!looped) {
		/* Marks of another namespace survive where its programs skip the veth. They mean nothing here. */
		if (skb->mark)
			skb->mark = 0;
		if (!for_pod(skb, self))
			return pass(&r, REASON_PASS_OTHER_HOST);
		if (vlan_tagged(skb))
			return drop(&r, REASON_DROP_VLAN_TAGGED);
	}
	kind = parse(skb, &p);
	r.p = &p;
	if (looped)
		return inpod_looped(&r, &p, self, kind);
	reason = smuggled(&r, &p, kind);
	if (reason)
		return drop(&r, reason);
	if (kind == KIND_LATER_FRAGMENT) {
		f = first_fragment(&r, &p);
		if (!f)
			return drop(&r, REASON_DROP_FRAGMENT);
		count(&r, REASON_PASS_FRAGMENT);
		return PASS;
	}
	verdict = unjudgeable(&r, &p, kind);
	if (verdict != 1)
		return verdict;
	if (kind == KIND_ICMP_ERROR)
		return pass(&r, REASON_PASS_NOT_TCP);
	if (link_local(&p))
		return pass(&r, REASON_PASS_LINK_LOCAL);
	/* inpod_sign has written it, and lets nobody else's through; where that is not, there is no sign. */
	if ((!(r.ifindex & INTERFACE_ID_NO_HOST) && signed_source(skb, &meaning) && meaning == SIGN_PROBE) ||
	    istio_probe(&p)) {
		from_pod = reversed(&p.tuple);
		if (is_syn(&p) || !is_direct(r.ifindex, &from_pod))
			remember_direct(r.ifindex, &from_pod);
		return pass(&r, REASON_PASS_HOST_SOCKET);
	}
	return inpod_inbound(&r, &p, self);
}

SEC("sk_lookup")
int inpod_lookup(struct bpf_sk_lookup *context)
{
	__u32 zero = 0, *id = bpf_map_lookup_elem(&identity, &zero);

	return id ? steered_listener(context, *id) : SK_PASS;
}

/* ---- the host's side --------------------------------------------------------------------------------------------- */

SEC("tc")
int inpod_sign(struct __sk_buff *skb)
{
	struct run r = { skb, skb->ifindex, INPOD_SIGN, 0 };
	struct interface *self;
	struct packet p;
	enum kind kind;
	__u8 meaning, source[6];
	int i;

	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (signed_source(skb, &meaning))
		return drop(&r, REASON_DROP_FORGED_SIGN);
	kind = parse(skb, &p);
	r.p = &p;
	if (kind != KIND_TCP && kind != KIND_LATER_FRAGMENT)
		return PASS;
	if (skb->ingress_ifindex) {
		/* Only what the host itself sends gets these addresses. */
		return istio_probe(&p) ? drop(&r, REASON_DROP_FORGED_SIGN) : PASS;
	}
	if (!for_pod(skb, self))
		return PASS;
#pragma unroll
	for (i = 0; i < 5; i++)
		source[i] = sign[i];
	source[5] = SIGN_PROBE;
	if (bpf_skb_store_bytes(skb, 6, source, sizeof(source), 0))
		return drop(&r, REASON_DROP_REDIRECT_FAILED);
	return pass(&r, REASON_PASS_HOST_SOCKET);
}

/*
 * A packet socket can leave out the egress hook of the pod's own interface. Whatever it sends is judged once more, by
 * what the pod's namespace has: TCP is let by that a socket of the proxy sends, that belongs to a flow which was let go
 * direct, or that carries nothing. A stamp would not do: whoever can send so can also read what stamps look like.
 */
SEC("tc")
int inpod_guard(struct __sk_buff *skb)
{
	struct run r = { skb, skb->ifindex, INPOD_GUARD, 0 };
	struct interface *self;
	struct fragment *f;
	struct bpf_sock *sk, *full;
	struct packet p;
	enum kind kind;
	__u8 meaning;
	int trusted = 0, connected = 0;

	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (signed_source(skb, &meaning))
		return drop(&r, REASON_DROP_FORGED_SIGN);
	if (vlan_tagged(skb))
		return drop(&r, REASON_DROP_VLAN_TAGGED);
	if (sent_by_proxy_socket(skb))
		return PASS;
	kind = parse(skb, &p);
	r.p = &p;
	if (kind == KIND_LATER_FRAGMENT) {
		f = first_fragment(&r, &p);
		return f && f->action == FRAGMENT_PASS ? PASS : drop(&r, REASON_DROP_FRAGMENT);
	}
	if (kind == KIND_MALFORMED || kind == KIND_SHORT_FRAGMENT)
		return drop(&r, REASON_DROP_MALFORMED);
	if (kind != KIND_TCP || link_local(&p))
		return PASS;
	swap_ends(&p);
	sk = bpf_skc_lookup_tcp(skb, &p.socket, socket_length(&p), (__u64)(__s64)self->nsid, 0);
	swap_ends(&p);
	if (sk) {
		connected = sk->state != BPF_TCP_LISTEN;
		if (connected) {
			full = bpf_sk_fullsock(sk);
			if (!full)
				trusted = carries_nothing(&p);
			else if (proxy_mark(full->mark))
				trusted = !check_cgroups() || bpf_sk_storage_get(&proxy_sockets, full, 0, 0);
		}
		bpf_sk_release(sk);
	}
	if (trusted || is_direct(r.ifindex, &p.tuple))
		return PASS;
	if (!connected && carries_nothing(&p))
		return PASS;
	if (!(self->flags & INTERFACE_STRICT) && !is_syn(&p))
		return PASS;
	if (!is_syn(&p) && (excluded(&r, &p.tuple, OUTBOUND) || excluded(&r, &p.tuple, INBOUND)))
		return PASS;
	return drop(&r, REASON_DROP_UNJUDGED);
}

#endif
