// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The shared contract: the proxy runs in a pod of its own, and these programs carry packets between it and the
 * enrolled pods. There is no connection tracking: the proxy netns's own socket table says which packets are the
 * proxy's. Only a SYN is a decision; whatever else has a socket in the proxy goes to it.
 *
 *   pod_egress     ingress of a pod's host-side veth    what the pod sends
 *   pod_ingress    egress of a pod's host-side veth     what the pod receives
 *   proxy_egress   ingress of the proxy's host-side veth
 *   proxy_guard    egress of the proxy's host-side veth
 *   proxy_ingress  ingress of the proxy's eth0, inside its netns
 *   proxy_lookup   socket lookup inside the proxy's netns
 *
 * A frame says to proxy_ingress what to do with it by its source MAC: marks are scrubbed when a packet changes
 * namespaces, the control block is clobbered by GRO, a MAC survives every way a veth can be crossed. The sign has 32
 * random bits and proxy_guard drops frames that carry it without having been sent by us.
 *
 * "Not ours" is TC_ACT_UNSPEC: the next program and the next filter get their turn. TC_ACT_OK would end the chain.
 */
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/pkt_cls.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "decide.h"
#include "dns.h"
#include "flows.h"
#include "maps.h"
#include "parse.h"
#include "reset.h"
#include "sockets.h"
#include "verdict.h"

/* ---- proxies ------------------------------------------------------------------------------------------------------ */

/*
 * Namespace ids are re-used as soon as they are free, so a proxy that is gone could be mistaken for whoever has its
 * id now. Its device index is not re-used: no device, no proxy.
 */
static __always_inline int alive(struct __sk_buff *skb, const struct proxy *z)
{
	__u32 mtu = 0;

	if (!use_check_mtu)
		return 1;
	return bpf_check_mtu(skb, z->host_ifindex, &mtu, 0, 0) >= 0;
}

static __always_inline struct proxies *all_proxies(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&proxies, &key);
}

static __always_inline __u16 wanted_port(const struct packet *p, const struct proxy *z, enum side side)
{
	if (side == OUTBOUND)
		return z->outbound;
	if (side == DNS)
		return z->dns;
	return z->inbound_hbone && p->tuple.destination_port == z->inbound_hbone ? z->inbound_hbone : z->inbound_plaintext;
}

/* `closed`: one that is in TIME_WAIT counts too. */
static __always_inline struct proxy *find_flow(struct __sk_buff *skb, struct packet *p, struct proxies *all, int closed)
{
	int i, state;

#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		if (i >= all->count)
			break;
		state = socket_state(skb, p, all->slot[i].nsid);
		if (state && state != BPF_TCP_LISTEN && (closed || state != BPF_TCP_TIME_WAIT) && alive(skb, &all->slot[i]))
			return &all->slot[i];
	}
	return 0;
}

/* The proxy that has a connection for this packet. */
static __always_inline struct proxy *proxy_of_flow(struct __sk_buff *skb, struct packet *p, struct proxies *all)
{
	return find_flow(skb, p, all, 1);
}

/*
 * The same for a later segment. What is in TIME_WAIT is left to without_socket(): the proxy chooses the ports that it
 * goes on from without knowing the pod's, and a flow that was let go direct may have the four numbers of one that the
 * proxy has closed within the last minute.
 */
static __always_inline struct proxy *proxy_of_segment(struct __sk_buff *skb, struct packet *p, struct proxies *all)
{
	return find_flow(skb, p, all, 0);
}

/* Was this packet sent by a proxy? Its socket would receive the answer. */
static __always_inline int sent_by_proxy(struct __sk_buff *skb, struct packet *p, struct proxies *all)
{
	int sent;

	swap_ends(p);
	sent = proxy_of_flow(skb, p, all) != 0;
	swap_ends(p);
	return sent;
}

/*
 * Of a SYN that is to go direct: the proxy that is connected from this very address and port to where it is going. The
 * other end has that connection, and would not take the SYN.
 */
static __always_inline struct proxy *connected_proxy(struct __sk_buff *skb, struct packet *p, struct proxies *all)
{
	struct proxy *z;

	swap_ends(p);
	z = find_flow(skb, p, all, 0);
	swap_ends(p);
	return z;
}

/* The newest proxy that listens now: a runtime runs ADD long before the container listens. */
static __always_inline struct proxy *listening_proxy(struct __sk_buff *skb, const struct packet *p,
						     struct proxies *all, enum side side)
{
	struct bpf_sock *sk;
	int i;

#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		__u16 port;

		if (i >= all->count)
			break;
		port = wanted_port(p, &all->slot[i], side);
		if (!port)
			continue;
		sk = find_listener(skb, p->family, all->slot[i].nsid, port);
		if (!sk)
			continue;
		bpf_sk_release(sk);
		if (alive(skb, &all->slot[i]))
			return &all->slot[i];
	}
	return 0;
}

/* The proxy whose listener made the SYN cookie that this ACK carries. */
static __always_inline struct proxy *proxy_of_cookie(struct __sk_buff *skb, struct packet *p, struct proxies *all,
						     enum side side)
{
	struct cookie c;
	struct bpf_sock *sk;
	int i, valid;

	if (!may_be_cookie(skb, p, &c))
		return 0;
#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		__u16 port;

		if (i >= all->count)
			break;
		port = wanted_port(p, &all->slot[i], side);
		if (!port)
			continue;
		sk = find_listener(skb, p->family, all->slot[i].nsid, port);
		if (!sk)
			continue;
		valid = cookie_valid(sk, p, &c);
		bpf_sk_release(sk);
		if (valid && alive(skb, &all->slot[i]))
			return &all->slot[i];
	}
	return 0;
}

/* ---- moving packets -------------------------------------------------------------------------------------------- */

/*
 * One store sets both MACs: the proxy's as destination (else its stack would see a packet for another host), the
 * signed one as source. From an ingress hook redirect_peer goes straight to the proxy's eth0; it is refused in egress
 * hooks, where the frame takes the host-side veth and passes proxy_guard, which knows it by its mark.
 */
static __always_inline int send_signed(const struct run *r, __u32 host_ifindex, const __u8 *macs, enum reason reason)
{
	struct __sk_buff *skb = r->skb;

	if (bpf_skb_store_bytes(skb, 0, macs, 12, 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, reason);
	if (r->program != POD_INGRESS && use_redirect_peer) {
		/* The sender's frame may have been for another host (a bridge): the type was set on arrival. */
		bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
		skb->mark = 0;
		return bpf_redirect_peer(host_ifindex, 0);
	}
	skb->mark = mark_to_proxy;
	return bpf_redirect(host_ifindex, 0);
}

static __always_inline int to_proxy(const struct run *r, const struct proxy *z, enum reason reason, __u8 meaning)
{
	struct fragment f = { .action = FRAGMENT_REDIRECT, .ifindex = z->host_ifindex };
	int i;

	__builtin_memcpy(f.macs, z->mac, 6);
#pragma unroll
	for (i = 0; i < 5; i++)
		f.macs[6 + i] = sign[i];
	/* The listener, if one is to be assigned, is found for the first fragment and so for the whole datagram. */
	f.macs[11] = SIGN_ESTABLISHED;
	remember_fragment(r, &f);
	f.macs[11] = meaning;
	return send_signed(r, z->host_ifindex, f.macs, reason);
}

/* Into a local pod, past its pod_ingress. */
static __always_inline int deliver(const struct run *r, const struct endpoint *pod, enum reason reason)
{
	struct __sk_buff *skb = r->skb;

	if (bpf_skb_store_bytes(skb, 0, pod->pod_mac, 6, 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, reason);
	if (use_redirect_peer && !(pod->flags & INTERFACE_NO_PEER)) {
		bpf_skb_change_type(skb, 0);
		skb->mark = 0;
		return bpf_redirect_peer(pod->ifindex, 0);
	}
	skb->mark = mark_bypass;
	return bpf_redirect(pod->ifindex, 0);
}

/*
 * Out of the proxy into the node's stack, on the interface of the pod whose address it uses: reverse path filters,
 * conntrack, service NAT and policy then see the packet where they expect that pod's packets.
 */
static __always_inline int reinject(const struct run *r, __u32 ifindex)
{
	struct __sk_buff *skb = r->skb;
	struct interface *pod = bpf_map_lookup_elem(&interfaces, &ifindex);
	__u8 macs[12];

	if (!pod)
		return pass(r, REASON_PASS_PROXY_OWN);
	__builtin_memcpy(macs + 6, pod->pod_mac, 6);
	__builtin_memcpy(macs, pod->gateway_mac, 6);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, REASON_FROM_PROXY_REINJECTED);
	skb->mark = mark_bypass;
	return bpf_redirect(ifindex, BPF_F_INGRESS);
}

/* ---- decisions --------------------------------------------------------------------------------------------------- */

/*
 * A segment with no socket in any proxy, or one in TIME_WAIT. `from_pod` is its tuple with the pod's end as source,
 * `from_proxy` the tuple under which "flows" would know it.
 */
static __always_inline int without_socket(const struct run *r, struct packet *p, const struct interface *self,
					  struct proxies *all, const struct tuple *from_pod,
					  const struct tuple *from_proxy, enum side side)
{
	struct __sk_buff *skb = r->skb;
	__u8 cookie = side == OUTBOUND ? SIGN_COOKIE_OUTBOUND : side == DNS ? SIGN_COOKIE_DNS : SIGN_COOKIE_INBOUND;
	struct proxy *z;
	struct flow *f;

	if (is_direct(r->ifindex, from_pod))
		return pass(r, REASON_PASS_DIRECT);
	if (all) {
		z = proxy_of_flow(skb, p, all);
		if (z)
			return to_proxy(r, z, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
		z = proxy_of_cookie(skb, p, all, side);
		if (z)
			return to_proxy(r, z, REASON_TO_PROXY_COOKIE, cookie);
	}
	f = bpf_map_lookup_elem(&flows, from_proxy);
	if (f) {
		z = all ? listening_proxy(skb, p, all, side) : 0;
		if (z)
			/* Only a transparent listener's stack answers from an address that is not its own (IPv4). */
			return to_proxy(r, z, REASON_TO_PROXY_ORPHANED, cookie);
		return by_policy(r, self, from_pod);
	}
	return unknown_segment(r, self, from_pod);
}

static __always_inline int new_connection(const struct run *r, struct packet *p, const struct interface *self,
					  struct proxies *all, const struct tuple *from_pod,
					  const struct tuple *from_proxy, enum side side)
{
	struct __sk_buff *skb = r->skb;
	struct proxy *z;
	__u32 reason;

	z = all && self->flags & INTERFACE_DRAINING ? connected_proxy(skb, p, all) : 0;
	if (!z) {
		reason = goes_direct(r, p, self, from_pod, side);
		if (reason)
			return pass_direct(r, from_pod, reason);
		/* Whatever flow had this tuple is over. */
		forget_direct(r->ifindex, from_pod);
		z = all ? listening_proxy(skb, p, all, side) : 0;
		if (!z)
			return by_policy(r, self, from_pod);
	}
	remember_flow(from_proxy, r->ifindex, side == INBOUND ? FLOW_INBOUND : FLOW_OUTBOUND);
	if (side == INBOUND)
		return to_proxy(r, z, REASON_REDIRECTED_INBOUND, SIGN_INBOUND);
	if (side == DNS)
		return to_proxy(r, z, REASON_DNS_CAPTURED, SIGN_DNS_TCP);
	return to_proxy(r, z, REASON_REDIRECTED_OUTBOUND, SIGN_OUTBOUND);
}

static __always_inline int later_fragment(const struct run *r, const struct packet *p)
{
	struct fragment *f = first_fragment(r, p);
	__u8 macs[12];

	if (!f)
		return drop(r, REASON_DROP_FRAGMENT);
	if (f->action != FRAGMENT_REDIRECT) {
		count(r, REASON_PASS_FRAGMENT);
		return PASS;
	}
	__builtin_memcpy(macs, f->macs, sizeof(macs));
	return send_signed(r, f->ifindex, macs, REASON_TO_PROXY_ESTABLISHED);
}

/* ---- DNS over UDP ------------------------------------------------------------------------------------------------ */

/* The newest proxy whose DNS listener exists now. */
static __always_inline struct proxy *resolving_proxy(struct __sk_buff *skb, const struct packet *p, struct proxies *all)
{
	struct bpf_sock *sk;
	int i;

#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		struct bpf_sock_tuple t = {};

		if (i >= all->count)
			break;
		if (!all->slot[i].dns)
			continue;
		if (p->family == 4) {
			t.ipv4.daddr = bpf_htonl(0x7f000001);
			t.ipv4.dport = bpf_htons(all->slot[i].dns);
			sk = bpf_sk_lookup_udp(skb, &t, sizeof(t.ipv4), (__u64)(__s64)all->slot[i].nsid, 0);
		} else {
			t.ipv6.daddr[3] = bpf_htonl(1);
			t.ipv6.dport = bpf_htons(all->slot[i].dns);
			sk = bpf_sk_lookup_udp(skb, &t, sizeof(t.ipv6), (__u64)(__s64)all->slot[i].nsid, 0);
		}
		if (!sk)
			continue;
		bpf_sk_release(sk);
		if (alive(skb, &all->slot[i]))
			return &all->slot[i];
	}
	return 0;
}

/*
 * A query keeps its destination address, which the proxy's routing makes local, and gets the port of the proxy's
 * listener. The proxy answers from an address of its own, so the resolver's is kept for the answer: by transaction id,
 * because one client port may ask two resolvers.
 */
static __always_inline int capture_query(const struct run *r, const struct packet *p, const struct interface *self)
{
	struct __sk_buff *skb = r->skb;
	struct proxies *all = all_proxies();
	struct query q = {};
	struct proxy *z;
	__u32 reason;

	if (self->flags & INTERFACE_DRAINING)
		return pass(r, REASON_PASS_DRAINING);
	reason = excluded(r, &p->tuple, OUTBOUND);
	if (reason)
		return pass(r, reason);
	if (!is_own(r, p->tuple.source))
		return drop(r, REASON_DROP_SPOOFED_SOURCE);
	z = all ? resolving_proxy(skb, p, all) : 0;
	if (!z) {
		if (self->flags & INTERFACE_POLICY_OPEN)
			return pass(r, REASON_PASS_FAILURE_POLICY_OPEN);
		return drop(r, REASON_DROP_NO_LISTENER);
	}
	copy16(q.client, p->tuple.source);
	q.port = p->tuple.source_port;
	if (bpf_skb_load_bytes(skb, p->l4_off + UDP_LENGTH, &q.id, sizeof(q.id)))
		return drop(r, REASON_DROP_MALFORMED);
	if (bpf_map_update_elem(&resolvers, &q, p->tuple.destination, BPF_ANY))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	if (set_port(skb, p, UDP_DESTINATION, 53, z->dns))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	return to_proxy(r, z, REASON_DNS_CAPTURED, SIGN_DNS);
}

/* An answer of the proxy's DNS listener gets back the address and port that the pod asked. 1: it is none. */
static __always_inline int answer_query(const struct run *r, const struct packet *p, const struct proxy *self,
					const struct endpoint *to)
{
	struct __sk_buff *skb = r->skb;
	struct fragment f = { .action = FRAGMENT_DNS_ANSWER };
	struct query q = {};
	__u8 *resolver;

	copy16(q.client, p->tuple.destination);
	q.port = p->tuple.destination_port;
	if (bpf_skb_load_bytes(skb, p->l4_off + UDP_LENGTH, &q.id, sizeof(q.id)))
		return 1;
	resolver = bpf_map_lookup_elem(&resolvers, &q);
	if (!resolver)
		return 1;
	copy16(f.resolver, resolver);
	remember_fragment(r, &f);
	if (set_port(skb, p, UDP_SOURCE, self->dns, 53) ||
	    set_addresses(skb, p, f.resolver, p->tuple.destination, 1))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	return deliver(r, to, REASON_DNS_ANSWERED);
}

static __always_inline int answer_fragment(const struct run *r, const struct packet *p, const struct endpoint *to)
{
	struct fragment *f = first_fragment(r, p);
	__u8 resolver[16];

	if (!f || f->action != FRAGMENT_DNS_ANSWER)
		return 1;
	copy16(resolver, f->resolver);
	if (set_addresses(r->skb, p, resolver, p->tuple.destination, 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	return deliver(r, to, REASON_DNS_ANSWERED);
}

/* ---- programs ---------------------------------------------------------------------------------------------------- */

SEC("tc")
int pod_egress(struct __sk_buff *skb)
{
	struct run r = { skb, skb->ifindex, POD_EGRESS, 0 };
	struct interface *self;
	struct proxies *all = 0;
	struct packet p;
	struct proxy *z;
	struct tuple from_proxy;
	struct flow *f;
	enum kind kind = KIND_OTHER;
	int verdict, tagged, own = 0, later = 0;

	if (skb->mark == mark_bypass) {
		/* reinject() sent it; the frame may have been for the proxy's gateway. */
		skb->mark = 0;
		bpf_skb_change_type(skb, 0);
		return pass(&r, REASON_PASS_BYPASS);
	}
	tagged = vlan_tagged(skb);
	if (!tagged) {
		kind = parse(skb, &p);
		r.p = &p;
		later = later_segment(&p, kind);
		if (later) {
			/* Nearly every packet. That the pod is enrolled its own address tells: nothing else is asked for. */
			all = all_proxies();
			own = is_own(&r, p.tuple.source);
			z = all && own ? proxy_of_segment(skb, &p, all) : 0;
			if (z)
				return to_proxy(&r, z, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
		}
	}
	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (tagged)
		return drop(&r, REASON_DROP_VLAN_TAGGED);
	if (later) {
		from_proxy = reversed(&p.tuple);
		if (!own) {
			/* An address that only the pod knows of (a VIP, SLAAC) may answer, on a flow that began towards it here. */
			f = bpf_map_lookup_elem(&flows, &from_proxy);
			if (!(f && f->ifindex == r.ifindex) && !is_direct(r.ifindex, &p.tuple))
				return drop(&r, REASON_DROP_SPOOFED_SOURCE);
			z = all ? proxy_of_flow(skb, &p, all) : 0;
			if (z)
				return to_proxy(&r, z, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
		}
		if (has_connection(skb, &p, BPF_F_CURRENT_NETNS))
			return pass(&r, REASON_PASS_HOST_SOCKET);
		return without_socket(&r, &p, self, all, &p.tuple, &from_proxy, outbound_side(&p, self));
	}
	if (kind == KIND_UDP && self->flags & INTERFACE_DNS && p.tuple.destination_port == 53 && !p.more_fragments)
		return capture_query(&r, &p, self);
	if (kind == KIND_LATER_FRAGMENT)
		return later_fragment(&r, &p);
	verdict = unjudgeable(&r, &p, kind);
	if (verdict != 1)
		return verdict;
	if (link_local(&p))
		return pass(&r, REASON_PASS_LINK_LOCAL);
	all = all_proxies();
	own = is_own(&r, p.tuple.source);
	if (kind == KIND_ICMP_ERROR) {
		z = all && own ? proxy_of_flow(skb, &p, all) : 0;
		if (!z)
			return pass(&r, REASON_PASS_NOT_TCP);
		return to_proxy(&r, z, REASON_TO_PROXY_ICMP_ERROR, SIGN_ICMP);
	}
	/* A SYN: every other segment is a later one. */
	if (!own)
		return drop(&r, REASON_DROP_SPOOFED_SOURCE);
	from_proxy = reversed(&p.tuple);
	return new_connection(&r, &p, self, all, &p.tuple, &from_proxy, outbound_side(&p, self));
}

SEC("tc")
int pod_ingress(struct __sk_buff *skb)
{
	struct run r = { skb, skb->ifindex, POD_INGRESS, 0 };
	struct interface *self;
	struct proxies *all;
	struct packet p;
	struct proxy *z;
	struct tuple from_pod;
	enum kind kind;
	int verdict;

	if (skb->mark == mark_bypass) {
		skb->mark = 0;
		return pass(&r, REASON_PASS_BYPASS);
	}
	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (!for_pod(skb, self))
		return pass(&r, REASON_PASS_OTHER_HOST);
	if (vlan_tagged(skb))
		return drop(&r, REASON_DROP_VLAN_TAGGED);
	kind = parse(skb, &p);
	r.p = &p;
	if (kind == KIND_LATER_FRAGMENT)
		return later_fragment(&r, &p);
	verdict = unjudgeable(&r, &p, kind);
	if (verdict != 1)
		return verdict;
	if (link_local(&p))
		return pass(&r, REASON_PASS_LINK_LOCAL);
	all = all_proxies();
	from_pod = reversed(&p.tuple);
	if (kind == KIND_ICMP_ERROR) {
		z = all ? proxy_of_flow(skb, &p, all) : 0;
		if (!z)
			return pass(&r, REASON_PASS_NOT_TCP);
		return to_proxy(&r, z, REASON_TO_PROXY_ICMP_ERROR, SIGN_ICMP);
	}
	if (is_syn(&p)) {
		if (skb->ingress_ifindex == 0) {
			/* The reply may come back under another tuple than the host's socket has: service NAT. */
			remember_direct(r.ifindex, &from_pod);
			return pass(&r, REASON_PASS_HOST_SOCKET);
		}
		if (all && !is_own(&r, p.tuple.destination) && sent_by_proxy(skb, &p, all)) {
			/* An address that only the pod knows of: proxy_egress could not deliver it, the node's routing did. */
			remember_flow(&p.tuple, r.ifindex, FLOW_UPSTREAM);
			return pass(&r, REASON_FROM_PROXY_LOCAL);
		}
		return new_connection(&r, &p, self, all, &from_pod, &from_pod, INBOUND);
	}
	z = all ? proxy_of_segment(skb, &p, all) : 0;
	if (z)
		return to_proxy(&r, z, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
	if (skb->ingress_ifindex == 0) {
		if (!is_direct(r.ifindex, &from_pod))
			remember_direct(r.ifindex, &from_pod);
		return pass(&r, REASON_PASS_HOST_SOCKET);
	}
	if (all && !is_own(&r, p.tuple.destination) && sent_by_proxy(skb, &p, all))
		return pass(&r, REASON_FROM_PROXY_LOCAL);
	return without_socket(&r, &p, self, all, &from_pod, &from_pod, INBOUND);
}

/* The pod's own socket table, for a flow whose entry was evicted. */
static __always_inline int pod_has_connection(struct __sk_buff *skb, struct packet *p, __u32 ifindex)
{
	struct interface *pod = bpf_map_lookup_elem(&interfaces, &ifindex);

	return pod && pod->nsid >= 0 && has_connection(skb, p, pod->nsid);
}

SEC("tc")
int proxy_egress(struct __sk_buff *skb)
{
	struct run r = { skb, skb->ifindex, PROXY_EGRESS, 0 };
	struct proxies *all = all_proxies();
	struct proxy *self = 0;
	struct endpoint *to, *from;
	struct bpf_sock *sk;
	struct packet p;
	struct flow *f;
	enum kind kind;
	int i, verdict, state;

	if (!all)
		return PASS;
#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		if (i >= all->count)
			break;
		if (all->slot[i].host_ifindex == r.ifindex) {
			self = &all->slot[i];
			break;
		}
	}
	if (!self)
		return PASS;
	kind = parse(skb, &p);
	r.p = &p;
	to = bpf_map_lookup_elem(&endpoints, p.tuple.destination);
	/* A pod with a proxy of its own is reached as those of other nodes are. */
	if (to && to->flags & INTERFACE_IN_POD)
		to = 0;
	if (to && (kind == KIND_UDP || kind == KIND_UDP_FRAGMENT)) {
		verdict = 1;
		if (kind == KIND_UDP_FRAGMENT)
			verdict = answer_fragment(&r, &p, to);
		else if (self->dns && p.tuple.source_port == self->dns)
			verdict = answer_query(&r, &p, self, to);
		if (verdict != 1)
			return verdict;
	}
	if (kind != KIND_TCP) {
		count(&r, REASON_PASS_NOT_TCP);
		return PASS;
	}
	f = bpf_map_lookup_elem(&flows, &p.tuple);
	if (to && is_syn(&p)) {
		if (self->inbound_hbone && p.tuple.destination_port == self->inbound_hbone &&
		    !(to->flags & (INTERFACE_NO_HBONE | INTERFACE_DRAINING))) {
			/* ztunnel 1.21 and 1.22 reach a local pod through its HBONE port, which is theirs as well. */
			sk = find_listener(skb, p.family, self->nsid, self->inbound_hbone);
			if (sk) {
				bpf_sk_release(sk);
				return to_proxy(&r, self, REASON_FROM_PROXY_SECOND_LEG, SIGN_INBOUND);
			}
			if (!(to->flags & INTERFACE_POLICY_OPEN)) {
				if (!(to->flags & INTERFACE_CLOSED_RESET))
					return drop(&r, REASON_DROP_NO_LISTENER);
				/* Signed: the address that it is for need not be one of the proxy's namespace. */
				verdict = make_reset(skb, &p);
				if (verdict)
					return drop(&r, verdict == UNANSWERABLE ? REASON_DROP_MALFORMED :
										  REASON_DROP_REDIRECT_FAILED);
				return to_proxy(&r, self, REASON_RESET_NO_LISTENER, SIGN_ESTABLISHED);
			}
		}
		remember_flow(&p.tuple, to->ifindex, FLOW_UPSTREAM);
		return deliver(&r, to, REASON_FROM_PROXY_LOCAL);
	}
	if (to) {
		if (f && f->kind != FLOW_INBOUND && f->ifindex == to->ifindex)
			return deliver(&r, to, REASON_FROM_PROXY_LOCAL);
		state = socket_state(skb, &p, self->nsid);
		/* With an entry it is an answer to the pod, whose flow is not the one that was closed (see proxy_of_segment). */
		if (state && state != BPF_TCP_LISTEN && !(f && state == BPF_TCP_TIME_WAIT))
			return to_proxy(&r, self, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
		/* Half open towards the listener's own port looks like the listener: let TPROXY find out. */
		if (full_sockets_only && !f && self->inbound_hbone && p.tuple.destination_port == self->inbound_hbone &&
		    state == BPF_TCP_LISTEN)
			return to_proxy(&r, self, REASON_TO_PROXY_ESTABLISHED, SIGN_COOKIE_INBOUND);
		if (!f && pod_has_connection(skb, &p, to->ifindex))
			return deliver(&r, to, REASON_FROM_PROXY_LOCAL);
	}
	from = bpf_map_lookup_elem(&endpoints, p.tuple.source);
	if (from) {
		/* Should the proxy die silently, whoever answers gets a RST of the one that listens then. */
		if (is_syn(&p))
			remember_flow(&p.tuple, from->ifindex, FLOW_UPSTREAM);
		return reinject(&r, from->ifindex);
	}
	/* An inbound flow to an address that only the pod knows of. */
	if (f && f->kind == FLOW_INBOUND)
		return reinject(&r, f->ifindex);
	return pass(&r, REASON_PASS_PROXY_OWN);
}

SEC("tc")
int proxy_guard(struct __sk_buff *skb)
{
	struct run r = { skb, skb->ifindex, PROXY_GUARD, 0 };
	__u8 meaning;

	if (skb->mark == mark_to_proxy || !signed_source(skb, &meaning))
		return PASS;
	return drop(&r, REASON_DROP_FORGED_SIGN);
}

SEC("tc")
int proxy_ingress(struct __sk_buff *skb)
{
	struct run r = { skb, 0, PROXY_INGRESS, 0 };
	struct proxies *all;
	struct bpf_sock *sk;
	struct packet p;
	__u8 meaning;
	struct listener_key key = {};
	enum side side;
	__u16 port = 0;
	__u8 mac[6];
	int i, j;
	long failed;

	if (!signed_source(skb, &meaning))
		return PASS;
	/* Makes the route of a foreign destination local (rule and table of this namespace). */
	skb->mark = mark_tproxy;
	if (meaning == SIGN_ESTABLISHED || meaning == SIGN_ICMP || meaning == SIGN_DNS)
		return pass(&r, REASON_PROXY_DELIVERED);
	if (parse(skb, &p) != KIND_TCP)
		return drop(&r, REASON_DROP_MALFORMED);
	r.p = &p;
	side = meaning == SIGN_OUTBOUND || meaning == SIGN_COOKIE_OUTBOUND ? OUTBOUND :
	       meaning == SIGN_DNS_TCP || meaning == SIGN_COOKIE_DNS	   ? DNS :
									     INBOUND;
	all = all_proxies();
	if (!all || bpf_skb_load_bytes(skb, 0, mac, sizeof(mac)))
		return drop(&r, REASON_DROP_NO_LISTENER);
	/* This device's index means nothing outside; the frame's destination is the proxy's MAC as it is recorded. */
#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		int other = 0;

		if (i >= all->count)
			break;
#pragma unroll
		for (j = 0; j < 6; j++)
			other |= mac[j] ^ all->slot[i].mac[j];
		if (!other) {
			port = wanted_port(&p, &all->slot[i], side);
			key.ifindex = all->slot[i].host_ifindex;
			break;
		}
	}
	if (!port)
		return drop(&r, REASON_DROP_NO_LISTENER);
	sk = find_listener(skb, p.family, BPF_F_CURRENT_NETNS, port);
	if (!sk)
		return drop(&r, REASON_DROP_NO_LISTENER);
	key.port = port;
	key.family = p.family;
	/*
	 * A listener assigned to a SYN whose tuple is in TIME_WAIT makes the request socket collide with it, and the SYN
	 * vanishes for a minute. Unassigned, TCP's own lookup finds the TIME_WAIT socket, takes the SYN for its reuse and
	 * asks for a listener of that port, which proxy_lookup then names.
	 */
	if (use_sk_assign && is_syn(&p) && socket_state(skb, &p, BPF_F_CURRENT_NETNS) == BPF_TCP_TIME_WAIT) {
		if (use_sk_lookup)
			steer(&p, sk, &key, 0);
		bpf_sk_release(sk);
		return pass(&r, REASON_PROXY_TIME_WAIT);
	}
	failed = use_sk_assign ? bpf_sk_assign(skb, sk, 0) : -ESOCKTNOSUPPORT;
	/* Before 6.6 a listener with SO_REUSEPORT is refused. */
	if (failed == -ESOCKTNOSUPPORT) {
		if (use_sk_lookup) {
			failed = steer(&p, sk, &key, 0);
		} else {
			/* TPROXY rules of this namespace give it to the listener with this port, and recycle TIME_WAIT. */
			skb->priority = port;
			failed = 0;
		}
	}
	bpf_sk_release(sk);
	if (failed)
		return drop(&r, REASON_DROP_REDIRECT_FAILED);
	return pass(&r, REASON_PROXY_ASSIGNED);
}

/*
 * Not attached anywhere: a test run of it puts a connection that is older than its pod's enrolment into "direct", the way
 * every other writer does. 1: it is there now; 0: it has been redirected since; 2: no memory.
 */
SEC("classifier")
int direct_import(struct __sk_buff *skb)
{
	struct direct_import wanted;
	struct tuple from_proxy;

	if (bpf_skb_load_bytes(skb, 0, &wanted, sizeof(wanted)))
		return 2;
	from_proxy = reversed(&wanted.tuple);
	if (bpf_map_lookup_elem(&flows, &wanted.tuple) || bpf_map_lookup_elem(&flows, &from_proxy))
		return 0;
	return remember_direct(wanted.ifindex, &wanted.tuple) ? 1 : 2;
}

/* Names the listener for a packet that proxy_ingress could not assign it to. */
SEC("sk_lookup")
int proxy_lookup(struct bpf_sk_lookup *context)
{
	return steered_listener(context, 0);
}

#include "in_pod.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";
