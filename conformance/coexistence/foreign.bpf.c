/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs of somebody else on the pod's interface: one lets the next have its turn, one ends the chain. */

#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#define SEC(name) __attribute__((section(name), used))

SEC("classifier/pass")
int foreign_pass(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

SEC("classifier/ok")
int foreign_ok(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

char foreign_license[] SEC("license") = "Dual BSD/GPL";
