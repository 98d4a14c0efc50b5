/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What Cilium's programs do that concerns others, with the names of Cilium's own: packets from the wire go straight into
 * a pod (host routing), past the host side's egress; and the programs on a pod's host-side veth end the chain.
 */

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#define SEC(name) __attribute__((section(name), used))

static long (*const load_bytes)(const void *skb, __u32 offset, void *to, __u32 length) =
	(void *)BPF_FUNC_skb_load_bytes;
static long (*const store_bytes)(void *skb, __u32 offset, const void *from, __u32 length,
				 __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const redirect_peer)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect_peer;

/* POD_IFINDEX, POD_MAC, and the last byte of both of the pod's addresses: POD_NUMBER. */
SEC("classifier/from_netdev")
int cil_from_netdev(struct __sk_buff *skb)
{
	const __u8 mac[ETH_ALEN] = { POD_MAC };
	__u16 protocol = __builtin_bswap16((__u16)skb->protocol);
	__u8 number = 0;

	if (protocol != ETH_P_IP && protocol != ETH_P_IPV6)
		return TC_ACT_OK;
	load_bytes(skb, ETH_HLEN + (protocol == ETH_P_IP ? 19 : 39), &number, 1);
	if (number != POD_NUMBER)
		return TC_ACT_OK;
	store_bytes(skb, 0, mac, ETH_ALEN, 0);
	return (int)redirect_peer(POD_IFINDEX, 0);
}

SEC("classifier/from_container")
int cil_from_container(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

SEC("classifier/to_container")
int cil_to_container(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

char cilium_license[] SEC("license") = "Dual BSD/GPL";
