/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What cannot be read off a socket table: flows that were let go direct on purpose, flows that were taken, and the rules
 * for new ones.
 */
#ifndef AMBIENT_FLOWS_H
#define AMBIENT_FLOWS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "direct.h"
#include "maps.h"
#include "verdict.h"

/* Where a packet came from, for the choice of the listener and of the sign. */
enum side { OUTBOUND, INBOUND, DNS };

static __always_inline int remember_direct(__u32 ifindex, const struct tuple *from_pod)
{
	return direct_flow(ifindex, from_pod, DIRECT_REMEMBER);
}

/*
 * What is let go direct on purpose must stay so, and later packets of it have nothing else to show. Where it cannot be
 * remembered it is dropped: a SYN comes again.
 */
static __always_inline int pass_direct(const struct run *r, const struct tuple *from_pod, enum reason reason)
{
	if (!remember_direct(r->ifindex, from_pod))
		return drop(r, REASON_DROP_REDIRECT_FAILED);
	return pass(r, reason);
}

static __always_inline int is_direct(__u32 ifindex, const struct tuple *from_pod)
{
	return direct_flow(ifindex, from_pod, DIRECT_FIND);
}

static __always_inline void forget_direct(__u32 ifindex, const struct tuple *from_pod)
{
	direct_flow(ifindex, from_pod, DIRECT_FORGET);
}

static __always_inline void remember_flow(const struct tuple *from_proxy, __u32 ifindex, __u32 kind)
{
	struct flow f = { .ifindex = ifindex, .kind = kind };

	bpf_map_update_elem(&flows, from_proxy, &f, BPF_ANY);
}

/* ---- exclusions -------------------------------------------------------------------------------------------------- */

static __always_inline __u32 rule_for_port(void *rules, __u8 kind, __u16 port)
{
	struct exclusion key = { .prefix_length = 32 + 16, .kind = kind };
	__u32 *reason;

	key.value[0] = port >> 8;
	key.value[1] = port & 0xff;
	reason = bpf_map_lookup_elem(rules, &key);
	return reason ? *reason : 0;
}

/* Reason under which a new connection is excluded, or 0. `from_pod`: the pod's end is the source. */
static __always_inline __u32 excluded(const struct run *r, const struct tuple *from_pod, enum side side)
{
	struct exclusion key = { .prefix_length = 32 + 128, .kind = EXCLUDE_OUTBOUND_ADDRESS };
	__u32 ifindex = r->ifindex;
	void *rules = bpf_map_lookup_elem(&exclusions, &ifindex);
	__u32 reason, *found;

	if (!rules)
		return 0;
	if (side == INBOUND)
		return rule_for_port(rules, EXCLUDE_INBOUND_PORT, from_pod->source_port);
	reason = rule_for_port(rules, EXCLUDE_OUTBOUND_PORT, from_pod->destination_port);
	if (reason)
		return reason;
	copy16(key.value, from_pod->destination);
	found = bpf_map_lookup_elem(rules, &key);
	return found ? *found : 0;
}

#endif
