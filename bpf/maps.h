/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Maps and load-time constants of the programs. native/ creates the maps with their real sizes, pins them and
 * hands them over at load (bpf_map__reuse_fd); the sizes here only make the object loadable on its own.
 */
#ifndef AMBIENT_MAPS_H
#define AMBIENT_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "redirect.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct interface);
} interfaces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__uint(key_size, 16);
	__uint(value_size, sizeof(struct endpoint));
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct proxies);
} proxies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tuple);
	__type(value, struct flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096 * 128);
	__type(key, struct direct_key);
	__type(value, struct direct_set);
} direct SEC(".maps");

struct exclusion_rules {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__uint(key_size, sizeof(struct exclusion));
	__type(value, __u32);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__array(values, struct exclusion_rules);
} exclusions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct query);
	__uint(value_size, 16);
} resolvers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 64);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct steered_key);
	__type(value, struct steered);
} steered SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 64);
	__type(key, __u64);
	__type(value, __u32);
} proxy_cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} proxy_sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} identity SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct trace);
} trace SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct counter_key);
	__type(value, struct counter);
} counters SEC(".maps");

/*
 * Constants of one state directory, written before the load: the verifier then removes the branches that this
 * kernel or the forced variant cannot use, together with helper calls the kernel does not know.
 */
const volatile __u32 mark_bypass = 0xa3b10001;
const volatile __u32 mark_to_proxy = 0xa3b10002;
const volatile __u32 mark_tproxy = 0xa3b10400;
const volatile __u8 sign[8] __attribute__((aligned(8))) = { 2, 0, 0, 0, 0 };
const volatile __u32 direct_seed[2] = { 0, 0 };
const volatile __u32 direct_sets = 128; /* of each pod */
const volatile __u8 use_redirect_peer = 1;
const volatile __u8 use_check_mtu = 1;
const volatile __u8 use_check_syncookie = 1;
const volatile __u8 use_sk_assign = 1;
const volatile __u8 use_sk_lookup = 1;
const volatile __u8 use_ringbuf = 1;
const volatile __u8 use_spin_lock = 1;
const volatile __u8 full_sockets_only = 0;

#endif
