/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What becomes of a packet, and the record of it: one reason counted for each, reported to whoever traces, and kept for
 * the fragments that follow.
 */
#ifndef AMBIENT_VERDICT_H
#define AMBIENT_VERDICT_H

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"
#include "parse.h"

#define PASS TC_ACT_UNSPEC
#define DROP TC_ACT_SHOT

/*
 * One run of one program. The index is read once: clang otherwise keeps a pointer into the middle of __sk_buff across
 * branches, which the verifier refuses ("dereference of modified ctx ptr").
 */
struct run {
	struct __sk_buff *skb;
	__u32 ifindex;
	enum program program;
	struct packet *p; /* 0 until it is parsed */
};

/* ---- fragments and trace ----------------------------------------------------------------------------------------- */

static __always_inline struct fragment_key fragment_key(const struct run *r, const struct packet *p)
{
	struct fragment_key key = { .ifindex = r->ifindex, .id = p->fragment_id };

	copy16(key.source, p->tuple.source);
	copy16(key.destination, p->tuple.destination);
	return key;
}

/* Only a first fragment has the ports: what becomes of it becomes of those that follow. */
static __always_inline void remember_fragment(const struct run *r, struct fragment *f)
{
	struct fragment_key key;

	if (!r->p || !r->p->more_fragments)
		return;
	key = fragment_key(r, r->p);
	f->time = bpf_ktime_get_ns();
	bpf_map_update_elem(&fragments, &key, f, BPF_ANY);
}

/* As long as a receiver waits for the rest (net.ipv4.ipfrag_time). */
#define FRAGMENT_LIFETIME 30000000000ull

static __always_inline struct fragment *first_fragment(const struct run *r, const struct packet *p)
{
	struct fragment_key key = fragment_key(r, p);
	struct fragment *f = bpf_map_lookup_elem(&fragments, &key);

	return f && bpf_ktime_get_ns() - f->time < FRAGMENT_LIFETIME ? f : 0;
}

static __always_inline void send_event(struct __sk_buff *skb, const struct counter_key *key, const struct packet *p,
				       struct trace *t)
{
	struct event e = {};
	long failed;

	e.time = bpf_ktime_get_ns();
	e.ifindex = key->ifindex;
	e.program = key->program;
	e.reason = key->reason;
	e.length = skb->len;
	if (p) {
		e.family = p->family;
		e.flags = p->flags;
		e.protocol = p->protocol;
		e.tuple = p->tuple;
	}
	if (use_ringbuf)
		failed = bpf_ringbuf_output(&events, &e, sizeof(e), 0);
	else
		failed = bpf_perf_event_output(skb, &events, BPF_F_CURRENT_CPU, &e, sizeof(e));
	if (failed)
		__sync_fetch_and_add(&t->lost, 1);
}

/* Costs a load from an array's only element while nobody listens: the verifier makes its lookup an address. */
static __always_inline void report(struct __sk_buff *skb, const struct counter_key *key, const struct packet *p)
{
	__u32 zero = 0;
	struct trace *t = bpf_map_lookup_elem(&trace, &zero);

	if (!t || !t->on || (t->ifindex && t->ifindex != key->ifindex) || (t->reason && t->reason != key->reason))
		return;
	send_event(skb, key, p, t);
}

/* ---- counters ---------------------------------------------------------------------------------------------------- */

/* A function of its own: inlined at each of its many calls it would be most of every program. */
static __noinline int count_packet(struct __sk_buff *skb, __u32 ifindex, __u32 program, __u32 reason,
				   const struct packet *p)
{
	struct counter_key key = { .ifindex = ifindex, .program = program, .reason = reason };
	struct counter *c = bpf_map_lookup_elem(&counters, &key);

	if (!c) {
		struct counter none = {};

		/* Another CPU may be making it at this moment: then this one's fails, and there is one all the same. */
		bpf_map_update_elem(&counters, &key, &none, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&counters, &key);
	}
	if (c) {
		c->packets++;
		c->bytes += skb->len;
	}
	report(skb, &key, p);
	return 0;
}

static __always_inline void count(const struct run *r, enum reason reason)
{
	count_packet(r->skb, r->ifindex, r->program, reason, r->p);
}

static __always_inline int pass(const struct run *r, enum reason reason)
{
	struct fragment f = { .action = FRAGMENT_PASS };

	remember_fragment(r, &f);
	count(r, reason);
	return PASS;
}

static __always_inline int drop(const struct run *r, enum reason reason)
{
	count(r, reason);
	return DROP;
}

#endif
