/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Programs that do nothing, with names of others' (of which the kernel keeps 15 characters). */

#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#define NAMED(name)                                                        \
	__attribute__((section("classifier/" #name), used)) int name(struct __sk_buff *skb) \
	{                                                                  \
		return TC_ACT_UNSPEC;                                      \
	}

NAMED(cil_from_container)
NAMED(cil_to_container)
NAMED(cil_from_netdev)
NAMED(cali_tc_preamble)
NAMED(handle_ingress)
NAMED(handle_egress)
NAMED(of_nobody)

char named_license[] __attribute__((section("license"), used)) = "Dual BSD/GPL";
