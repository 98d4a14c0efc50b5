/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The map "direct": a set-associative table inside one hash, because a table of its own for each pod would cost every
 * ADD an RCU grace period (a change to a map of maps ends with one).
 *
 * A set is changed where it is, under its lock: two CPUs that replaced the whole element would each lose what the other
 * put in. It is read without the lock. `check` is cleared before a way is overwritten and written after it, so that the
 * check of a tuple says that the tuple was whole when it was read; and as the tuple is compared too, what a CPU that
 * orders stores otherwise may see half-written is taken for somebody else's. A flow never moves to another way: a
 * reader cannot miss it.
 */
#ifndef AMBIENT_DIRECT_H
#define AMBIENT_DIRECT_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"

enum direct_operation { DIRECT_FIND, DIRECT_REMEMBER, DIRECT_FORGET };

#define TUPLE_WORDS (sizeof(struct tuple) / sizeof(__u32))

/* What a new element begins as. Of the stack it would take most. */
static const struct direct_set no_flows = {};

/*
 * 64 bits, of which one half picks the set and the other is the check. The seed is the state's secret: a pod cannot
 * choose which of its flows share a set. It need not withstand more than that, as the tuple is compared whole.
 */
static __always_inline __u64 hash_tuple(const __u32 *word)
{
	__u64 hash = (__u64)direct_seed[0] << 32 | direct_seed[1];
	int i;

#pragma unroll
	for (i = 0; i < TUPLE_WORDS; i++) {
		hash = (hash ^ word[i]) * 0x9e3779b97f4a7c15ull;
		hash ^= hash >> 32;
	}
	hash *= 0xd6e8feb86659fd93ull;
	return hash ^ hash >> 32;
}

static __always_inline int same_tuple(const struct tuple *t, const __u32 *word)
{
	__u32 other[TUPLE_WORDS], differ = 0;
	int i;

	__builtin_memcpy(other, t, sizeof(other));
#pragma unroll
	for (i = 0; i < TUPLE_WORDS; i++)
		differ |= other[i] ^ word[i];
	return !differ;
}

/* 1 where x is 0. Of a comparison clang makes a branch, and of a branch in each of eight ways the verifier 256 paths. */
static __always_inline __u64 is_zero(__u32 x)
{
	__u64 wide = x;

	barrier_var(wide);
	return (wide - 1) >> 63;
}

/* The way with this check; DIRECT_WAYS: none. No two ways of a set have the same. */
static __always_inline __u64 find_way(const struct direct_set *set, __u32 check)
{
	__u64 way = DIRECT_WAYS;
	int i;

#pragma unroll
	for (i = 0; i < DIRECT_WAYS; i++)
		way -= is_zero(set->check[i] ^ check) * (DIRECT_WAYS - i);
	return way;
}

/* A free way, else the one whose flow was not used for longest. The clock goes round: how long ago can be compared. */
static __always_inline __u64 spare_way(const struct direct_set *set, __u32 clock)
{
	__u64 most = 0;
	int i;

#pragma unroll
	for (i = 0; i < DIRECT_WAYS; i++) {
		__u64 age = clock - set->used[i], smaller;

		age = ((is_zero(set->check[i]) << 32 | age) << 3) + i;
		smaller = (most - age) >> 63;
		barrier_var(smaller);
		most += (age - most) * smaller;
	}
	return most & (DIRECT_WAYS - 1);
}

static __always_inline void put_way(struct direct_set *set, const __u32 *word, __u32 check)
{
	__u32 clock = set->clock + 1;
	__u64 way = find_way(set, check);

	set->clock = clock;
	if (way >= DIRECT_WAYS)
		way = spare_way(set, clock);
	way &= DIRECT_WAYS - 1;
	set->used[way] = clock;
	if (set->check[way] == check && same_tuple(&set->tuple[way], word))
		return;
	set->check[way] = 0;
	barrier();
	__builtin_memcpy(&set->tuple[way], word, sizeof(struct tuple));
	barrier();
	set->check[way] = check;
}

/*
 * DIRECT_FIND, DIRECT_FORGET: 1 if the flow is, or was, there. DIRECT_REMEMBER: 0 where the kernel has no memory for it.
 * `from_pod` has the pod's end as source. A function of its own, as its many callers would else be twice as long.
 */
static __noinline int direct_flow(__u32 ifindex, const struct tuple *from_pod, enum direct_operation operation)
{
	struct direct_key key = { .ifindex = ifindex };
	__u32 word[TUPLE_WORDS], check;
	struct direct_set *set;
	__u64 hash, way;

	__builtin_memcpy(word, from_pod, sizeof(word));
	hash = hash_tuple(word);
	check = (__u32)hash | 1; /* 0 is a free way */
	key.set = ((hash >> 32) * direct_sets) >> 32;
	set = bpf_map_lookup_elem(&direct, &key);
	if (!set) {
		if (operation != DIRECT_REMEMBER)
			return 0;
		/* EEXIST: another CPU was faster. */
		bpf_map_update_elem(&direct, &key, &no_flows, BPF_NOEXIST);
		set = bpf_map_lookup_elem(&direct, &key);
		if (!set)
			return 0;
	}
	if (operation != DIRECT_REMEMBER) {
		way = find_way(set, check);
		if (way >= DIRECT_WAYS || !same_tuple(&set->tuple[way], word))
			return 0;
		if (operation == DIRECT_FIND) {
			/* Only what changes is written: the line is shared by all CPUs that see flows of this set. */
			if (set->used[way] != set->clock)
				set->used[way] = set->clock;
			return 1;
		}
	}
	if (use_spin_lock)
		bpf_spin_lock(&set->lock);
	if (operation == DIRECT_REMEMBER) {
		put_way(set, word, check);
	} else {
		way = find_way(set, check);
		if (way < DIRECT_WAYS && same_tuple(&set->tuple[way], word))
			set->check[way] = 0;
	}
	if (use_spin_lock)
		bpf_spin_unlock(&set->lock);
	return 1;
}

#endif
