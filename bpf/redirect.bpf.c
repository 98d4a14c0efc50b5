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
 *
 * A frame says to proxy_ingress what to do with it by its source MAC: marks are scrubbed when a packet changes
 * namespaces, the control block is clobbered by GRO, a MAC survives every way a veth can be crossed. The sign has 32
 * random bits and proxy_guard drops frames that carry it without having been sent by us.
 *
 * "Not ours" is TC_ACT_UNSPEC: the next program and the next filter get their turn. TC_ACT_OK would end the chain.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"
#include "parse.h"

#define PASS TC_ACT_UNSPEC
#define DROP TC_ACT_SHOT

/* Where a packet came from, for the choice of the listener and of the sign. */
enum side { OUTBOUND, INBOUND };

/*
 * One run of one program. The index is read once: clang otherwise keeps a pointer into the middle of __sk_buff across
 * branches, which the verifier refuses ("dereference of modified ctx ptr").
 */
struct run {
	struct __sk_buff *skb;
	__u32 ifindex;
	enum program program;
};

static __always_inline void count(const struct run *r, enum reason reason)
{
	struct counter_key key = { .ifindex = r->ifindex, .program = r->program, .reason = reason };
	struct counter *c = bpf_map_lookup_elem(&counters, &key);

	if (c) {
		c->packets++;
		c->bytes += r->skb->len;
	} else {
		struct counter first = { .packets = 1, .bytes = r->skb->len };

		bpf_map_update_elem(&counters, &key, &first, BPF_NOEXIST);
	}
}

static __always_inline int pass(const struct run *r, enum reason reason)
{
	count(r, reason);
	return PASS;
}

static __always_inline int drop(const struct run *r, enum reason reason)
{
	count(r, reason);
	return DROP;
}

/* ---- sockets --------------------------------------------------------------------------------------------------- */

/* BPF_TCP_* state of the socket that would receive this tuple in namespace nsid; 0 if there is none. */
static __always_inline int socket_state(struct __sk_buff *skb, struct packet *p, __s32 nsid)
{
	struct bpf_sock *sk;
	int state = 0;

	sk = bpf_skc_lookup_tcp(skb, &p->socket, p->socket_len, (__u64)(__s64)nsid, 0);
	if (sk) {
		state = sk->state;
		bpf_sk_release(sk);
	}
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
		sk = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), (__u64)(__s64)nsid, 0);
	} else {
		t.ipv6.daddr[3] = bpf_htonl(1);
		t.ipv6.dport = bpf_htons(port);
		sk = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv6), (__u64)(__s64)nsid, 0);
	}
	if (!sk)
		return 0;
	if (sk->state != BPF_TCP_LISTEN) {
		bpf_sk_release(sk);
		return 0;
	}
	return sk;
}

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
	return z->inbound_hbone && p->tuple.destination_port == z->inbound_hbone ? z->inbound_hbone : z->inbound_plaintext;
}

/* The proxy that has a connection for this packet. */
static __always_inline struct proxy *proxy_of_flow(struct __sk_buff *skb, struct packet *p, struct proxies *all)
{
	int i;

#pragma unroll
	for (i = 0; i < PROXY_SLOTS; i++) {
		if (i >= all->count)
			break;
		if (has_connection(skb, p, all->slot[i].nsid) && alive(skb, &all->slot[i]))
			return &all->slot[i];
	}
	return 0;
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

/* Was this packet sent by a proxy? Its socket would receive the answer. */
static __always_inline int sent_by_proxy(struct __sk_buff *skb, struct packet *p, struct proxies *all)
{
	int sent;

	swap_ends(p);
	sent = proxy_of_flow(skb, p, all) != 0;
	swap_ends(p);
	return sent;
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

/*
 * A listener in SYN cookie mode keeps nothing between SYN and ACK, so the ACK that opens the connection has no socket
 * yet. The kernel can tell a valid cookie from any other ACK.
 */
static __always_inline struct proxy *proxy_of_cookie(struct __sk_buff *skb, struct packet *p, struct proxies *all,
						     enum side side)
{
	struct { struct iphdr ip; } v4;
	struct { struct ipv6hdr ip; } v6;
	struct { __u8 bytes[20]; } tcp;
	struct bpf_sock *sk;
	int i, valid;

	if (!use_check_syncookie || (p->flags & (TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK)
		return 0;
	if (bpf_skb_load_bytes(skb, p->l4_off, &tcp, sizeof(tcp)))
		return 0;
	if (p->family == 4 ? bpf_skb_load_bytes(skb, p->l3_off, &v4, sizeof(v4)) :
			     bpf_skb_load_bytes(skb, p->l3_off, &v6, sizeof(v6)))
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
		if (p->family == 4)
			valid = bpf_tcp_check_syncookie(sk, &v4, sizeof(v4), (struct tcphdr *)&tcp, sizeof(tcp));
		else
			valid = bpf_tcp_check_syncookie(sk, &v6, sizeof(v6), (struct tcphdr *)&tcp, sizeof(tcp));
		bpf_sk_release(sk);
		if (valid == 0 && alive(skb, &all->slot[i]))
			return &all->slot[i];
	}
	return 0;
}

/* ---- flows ----------------------------------------------------------------------------------------------------- */

static __always_inline void *direct_table(__u32 ifindex)
{
	return bpf_map_lookup_elem(&direct, &ifindex);
}

static __always_inline int is_direct(__u32 ifindex, const struct tuple *from_pod)
{
	void *table = direct_table(ifindex);

	return table && bpf_map_lookup_elem(table, from_pod);
}

/* What was let go direct on purpose must stay so: later packets of it have nothing else to show. */
static __always_inline void remember_direct(__u32 ifindex, const struct tuple *from_pod)
{
	void *table = direct_table(ifindex);
	__u64 now = bpf_ktime_get_ns();

	if (table)
		bpf_map_update_elem(table, from_pod, &now, BPF_ANY);
}

static __always_inline void remember_flow(const struct tuple *from_proxy, __u32 ifindex, __u32 kind)
{
	struct flow f = { .ifindex = ifindex, .kind = kind };

	bpf_map_update_elem(&flows, from_proxy, &f, BPF_ANY);
}

static __always_inline void forget_direct(__u32 ifindex, const struct tuple *from_pod)
{
	void *table = direct_table(ifindex);

	if (table)
		bpf_map_delete_elem(table, from_pod);
}

/* ---- moving packets -------------------------------------------------------------------------------------------- */

/*
 * One store sets both MACs: the proxy's as destination (else its stack would see a packet for another host), the
 * signed one as source. From an ingress hook redirect_peer goes straight to the proxy's eth0; it is refused in egress
 * hooks, where the frame takes the host-side veth and passes proxy_guard, which knows it by its mark.
 */
static __always_inline int to_proxy(const struct run *r, const struct proxy *z, enum reason reason, __u8 meaning)
{
	struct __sk_buff *skb = r->skb;
	__u8 macs[12];
	int i, verdict;

	__builtin_memcpy(macs, z->mac, 6);
#pragma unroll
	for (i = 0; i < 5; i++)
		macs[6 + i] = sign[i];
	macs[11] = meaning;
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	count(r, reason);
	if (r->program != POD_INGRESS && use_redirect_peer) {
		/* The sender's frame may have been for another host (a bridge): the type was set on arrival. */
		bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
		skb->mark = 0;
		verdict = bpf_redirect_peer(z->host_ifindex, 0);
	} else {
		skb->mark = mark_to_proxy;
		verdict = bpf_redirect(z->host_ifindex, 0);
	}
	return verdict;
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

/* A SYN for which no proxy listens, and a segment of a dead proxy's flow. `from_pod`: the pod's end is the source. */
static __always_inline int by_policy(const struct run *r, const struct interface *self, const struct tuple *from_pod)
{
	if (!(self->flags & INTERFACE_POLICY_OPEN))
		return drop(r, REASON_DROP_NO_LISTENER);
	remember_direct(r->ifindex, from_pod);
	return pass(r, REASON_PASS_FAILURE_POLICY_OPEN);
}

/*
 * A segment with no socket in any proxy. `from_pod` is its tuple with the pod's end as source, `from_proxy` the tuple
 * under which "flows" would know it.
 */
static __always_inline int without_socket(const struct run *r, struct packet *p, const struct interface *self,
					  struct proxies *all, const struct tuple *from_pod,
					  const struct tuple *from_proxy, enum side side)
{
	struct __sk_buff *skb = r->skb;
	struct proxy *z;
	struct flow *f;

	if (is_direct(r->ifindex, from_pod))
		return pass(r, REASON_PASS_DIRECT);
	if (all) {
		z = proxy_of_cookie(skb, p, all, side);
		if (z)
			return to_proxy(r, z, REASON_TO_PROXY_COOKIE,
					side == OUTBOUND ? SIGN_COOKIE_OUTBOUND : SIGN_COOKIE_INBOUND);
	}
	f = bpf_map_lookup_elem(&flows, from_proxy);
	if (f) {
		z = all ? listening_proxy(skb, p, all, side) : 0;
		if (z)
			/* Only a transparent listener's stack answers from an address that is not its own (IPv4). */
			return to_proxy(r, z, REASON_TO_PROXY_ORPHANED,
					side == OUTBOUND ? SIGN_COOKIE_OUTBOUND : SIGN_COOKIE_INBOUND);
		return by_policy(r, self, from_pod);
	}
	if (self->flags & INTERFACE_STRICT)
		return drop(r, REASON_DROP_ORPHANED_FLOW);
	return pass(r, REASON_PASS_NO_PROXY_SOCKET);
}

static __always_inline int not_wanted(const struct packet *p, const struct interface *self, enum side side)
{
	if (side == OUTBOUND)
		return self->flags & INTERFACE_NO_OUTBOUND;
	/* 15008 is HBONE's registered port whatever the proxy was told to listen on. */
	return self->flags & (p->tuple.destination_port == 15008 ? INTERFACE_NO_HBONE : INTERFACE_NO_PLAINTEXT);
}

static __always_inline int new_connection(const struct run *r, struct packet *p, const struct interface *self,
					  struct proxies *all, const struct tuple *from_pod,
					  const struct tuple *from_proxy, enum side side)
{
	struct __sk_buff *skb = r->skb;
	struct proxy *z;

	if (self->flags & INTERFACE_DRAINING) {
		remember_direct(r->ifindex, from_pod);
		return pass(r, REASON_PASS_DRAINING);
	}
	if (not_wanted(p, self, side)) {
		remember_direct(r->ifindex, from_pod);
		return pass(r, REASON_PASS_NOT_WANTED);
	}
	z = all ? listening_proxy(skb, p, all, side) : 0;
	if (!z)
		return by_policy(r, self, from_pod);
	forget_direct(r->ifindex, from_pod);
	remember_flow(from_proxy, r->ifindex, side == OUTBOUND ? FLOW_OUTBOUND : FLOW_INBOUND);
	return to_proxy(r, z,
			side == OUTBOUND ? REASON_REDIRECTED_OUTBOUND : REASON_REDIRECTED_INBOUND,
			side == OUTBOUND ? SIGN_OUTBOUND : SIGN_INBOUND);
}

/* Whatever is not TCP, and what claims to be TCP but cannot be judged as TCP. 1: judge on. */
static __always_inline int unjudgeable(const struct run *r, const struct packet *p, enum kind kind)
{
	switch (kind) {
	case KIND_OTHER:
		return pass(r, REASON_PASS_NOT_TCP);
	case KIND_MALFORMED:
		return drop(r, REASON_DROP_MALFORMED);
	case KIND_SHORT_FRAGMENT:
		return drop(r, REASON_DROP_SHORT_FIRST_FRAGMENT);
	case KIND_LATER_FRAGMENT:
		return drop(r, REASON_DROP_FRAGMENT);
	default:
		break;
	}
	/* sk_assign would be lost when the receiver puts the fragments together. */
	if (kind == KIND_TCP && p->flags & TCP_SYN && p->more_fragments)
		return drop(r, REASON_DROP_SYN_FRAGMENT);
	return 1;
}

static __always_inline int is_own(const struct run *r, const __u8 *address)
{
	struct endpoint *e = bpf_map_lookup_elem(&endpoints, address);

	return e && e->ifindex == r->ifindex;
}

SEC("tc")
int pod_egress(struct __sk_buff *skb)
{
	const struct run r = { skb, skb->ifindex, POD_EGRESS };
	struct interface *self;
	struct proxies *all;
	struct packet p;
	struct proxy *z;
	struct tuple from_proxy;
	struct flow *f;
	enum kind kind;
	int verdict, own;

	if (skb->mark == mark_bypass) {
		/* reinject() sent it; the frame may have been for the proxy's gateway. */
		skb->mark = 0;
		bpf_skb_change_type(skb, 0);
		return pass(&r, REASON_PASS_BYPASS);
	}
	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (vlan_tagged(skb))
		return drop(&r, REASON_DROP_VLAN_TAGGED);
	kind = parse(skb, &p);
	verdict = unjudgeable(&r, &p, kind);
	if (verdict != 1)
		return verdict;
	if (link_local(&p))
		return pass(&r, REASON_PASS_LINK_LOCAL);
	all = all_proxies();
	own = is_own(&r, p.tuple.source);
	from_proxy = reversed(&p.tuple);
	if (kind == KIND_ICMP_ERROR) {
		z = all && own ? proxy_of_flow(skb, &p, all) : 0;
		if (!z)
			return pass(&r, REASON_PASS_NOT_TCP);
		return to_proxy(&r, z, REASON_TO_PROXY_ICMP_ERROR, SIGN_ICMP);
	}
	if (is_syn(&p)) {
		if (!own)
			return drop(&r, REASON_DROP_SPOOFED_SOURCE);
		return new_connection(&r, &p, self, all, &p.tuple, &from_proxy, OUTBOUND);
	}
	if (!own) {
		/* An address that only the pod knows of (a VIP, SLAAC) may answer, on a flow that began towards it here. */
		f = bpf_map_lookup_elem(&flows, &from_proxy);
		if (!(f && f->ifindex == r.ifindex) && !is_direct(r.ifindex, &p.tuple))
			return drop(&r, REASON_DROP_SPOOFED_SOURCE);
	}
	z = all ? proxy_of_flow(skb, &p, all) : 0;
	if (z)
		return to_proxy(&r, z, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
	if (has_connection(skb, &p, BPF_F_CURRENT_NETNS))
		return pass(&r, REASON_PASS_HOST_SOCKET);
	return without_socket(&r, &p, self, all, &p.tuple, &from_proxy, OUTBOUND);
}

SEC("tc")
int pod_ingress(struct __sk_buff *skb)
{
	const struct run r = { skb, skb->ifindex, POD_INGRESS };
	struct interface *self;
	struct proxies *all;
	struct packet p;
	struct proxy *z;
	struct tuple from_pod;
	enum kind kind;
	__u8 destination[6];
	int verdict, i, other = 0;

	if (skb->mark == mark_bypass) {
		skb->mark = 0;
		return pass(&r, REASON_PASS_BYPASS);
	}
	self = bpf_map_lookup_elem(&interfaces, &r.ifindex);
	if (!self)
		return PASS;
	if (bpf_skb_load_bytes(skb, 0, destination, sizeof(destination)))
		return PASS;
#pragma unroll
	for (i = 0; i < 6; i++)
		other |= destination[i] ^ self->pod_mac[i];
	if (other)
		return pass(&r, REASON_PASS_OTHER_HOST);
	if (vlan_tagged(skb))
		return drop(&r, REASON_DROP_VLAN_TAGGED);
	kind = parse(skb, &p);
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
	z = all ? proxy_of_flow(skb, &p, all) : 0;
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
	const struct run r = { skb, skb->ifindex, PROXY_EGRESS };
	struct proxies *all = all_proxies();
	struct proxy *self = 0;
	struct endpoint *to, *from;
	struct bpf_sock *sk;
	struct packet p;
	struct flow *f;
	enum kind kind;
	int i;

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
	if (kind != KIND_TCP)
		return pass(&r, REASON_PASS_NOT_TCP);
	f = bpf_map_lookup_elem(&flows, &p.tuple);
	to = bpf_map_lookup_elem(&endpoints, p.tuple.destination);
	if (to && is_syn(&p)) {
		if (self->inbound_hbone && p.tuple.destination_port == self->inbound_hbone &&
		    !(to->flags & INTERFACE_NO_HBONE)) {
			/* ztunnel 1.21 and 1.22 reach a local pod through its HBONE port, which is theirs as well. */
			sk = find_listener(skb, p.family, self->nsid, self->inbound_hbone);
			if (sk) {
				bpf_sk_release(sk);
				return to_proxy(&r, self, REASON_FROM_PROXY_SECOND_LEG, SIGN_INBOUND);
			}
			if (!(to->flags & INTERFACE_POLICY_OPEN))
				return drop(&r, REASON_DROP_NO_LISTENER);
		}
		remember_flow(&p.tuple, to->ifindex, FLOW_UPSTREAM);
		return deliver(&r, to, REASON_FROM_PROXY_LOCAL);
	}
	if (to) {
		if (f && f->kind != FLOW_INBOUND && f->ifindex == to->ifindex)
			return deliver(&r, to, REASON_FROM_PROXY_LOCAL);
		if (has_connection(skb, &p, self->nsid))
			return to_proxy(&r, self, REASON_TO_PROXY_ESTABLISHED, SIGN_ESTABLISHED);
		if (!f && pod_has_connection(skb, &p, to->ifindex))
			return deliver(&r, to, REASON_FROM_PROXY_LOCAL);
	}
	from = bpf_map_lookup_elem(&endpoints, p.tuple.source);
	if (from)
		return reinject(&r, from->ifindex);
	/* An inbound flow to an address that only the pod knows of. */
	if (f && f->kind == FLOW_INBOUND)
		return reinject(&r, f->ifindex);
	return pass(&r, REASON_PASS_PROXY_OWN);
}

static __always_inline int signed_source(struct __sk_buff *skb, __u8 *meaning)
{
	__u8 source[6];
	int i, other = 0;

	if (bpf_skb_load_bytes(skb, 6, source, sizeof(source)))
		return 0;
#pragma unroll
	for (i = 0; i < 5; i++)
		other |= source[i] ^ sign[i];
	*meaning = source[5];
	return !other;
}

SEC("tc")
int proxy_guard(struct __sk_buff *skb)
{
	const struct run r = { skb, skb->ifindex, PROXY_GUARD };
	__u8 meaning;

	if (skb->mark == mark_to_proxy || !signed_source(skb, &meaning))
		return PASS;
	return drop(&r, REASON_DROP_FORGED_SIGN);
}

SEC("tc")
int proxy_ingress(struct __sk_buff *skb)
{
	const struct run r = { skb, 0, PROXY_INGRESS };
	struct proxies *all;
	struct bpf_sock *sk;
	struct packet p;
	__u8 meaning;
	enum side side;
	__u16 port = 0;
	__u8 mac[6];
	int i, j;

	if (!signed_source(skb, &meaning))
		return PASS;
	/* Makes the route of a foreign destination local (rule and table of this namespace). */
	skb->mark = mark_tproxy;
	if (meaning == SIGN_ESTABLISHED || meaning == SIGN_ICMP)
		return pass(&r, REASON_PROXY_DELIVERED);
	if (parse(skb, &p) != KIND_TCP)
		return drop(&r, REASON_DROP_MALFORMED);
	side = meaning == SIGN_OUTBOUND || meaning == SIGN_COOKIE_OUTBOUND ? OUTBOUND : INBOUND;
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
			break;
		}
	}
	if (!port)
		return drop(&r, REASON_DROP_NO_LISTENER);
	/*
	 * A listener assigned to a SYN whose tuple is in TIME_WAIT makes the request socket collide with it, and the SYN
	 * vanishes for a minute. Unassigned, TCP's own lookup finds the TIME_WAIT socket and recycles it.
	 */
	if (is_syn(&p) && socket_state(skb, &p, BPF_F_CURRENT_NETNS) == BPF_TCP_TIME_WAIT)
		return pass(&r, REASON_PROXY_TIME_WAIT);
	sk = find_listener(skb, p.family, BPF_F_CURRENT_NETNS, port);
	if (!sk)
		return drop(&r, REASON_DROP_NO_LISTENER);
	if (use_sk_assign) {
		i = bpf_sk_assign(skb, sk, 0);
		bpf_sk_release(sk);
		if (i)
			return drop(&r, REASON_DROP_REDIRECT_FAILED);
	} else {
		bpf_sk_release(sk);
	}
	return pass(&r, REASON_PROXY_ASSIGNED);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
