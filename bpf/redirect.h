/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The contract between the programs (bpf/) and the loader (native/): map names, keys, values, and the enums
 * whose words appear in counters, trace and metrics. Fixed-width types only. Every struct is laid out without
 * implicit padding, because padding bytes would take part in hash keys.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are host order. MACs are 6 bytes.
 * A change of any layout here raises LAYOUT_VERSION.
 */
#ifndef AMBIENT_REDIRECT_H
#define AMBIENT_REDIRECT_H

#include <linux/bpf.h>
#include <linux/types.h>

#define LAYOUT_VERSION 3

#define NETWORK_LEN 256
#define CONTAINER_ID_LEN 256
#define INTERFACE_LEN 16
#define POD_NAME_LEN 256
#define POD_NAMESPACE_LEN 64
#define POD_UID_LEN 64
#define SERVICE_ACCOUNT_LEN 256
#define NETNS_PATH_LEN 512
#define MAX_ADDRESSES 16
#define MAX_HOOKS 6
#define PROXY_SLOTS 4

/* Which program counted a packet; also the program's name in the kernel (lower case, at most 15 bytes). */
enum program {
	POD_EGRESS = 1,    /* what the pod sends: ingress of the pod's host-side veth */
	POD_INGRESS = 2,   /* what the pod receives: egress of the pod's host-side veth */
	PROXY_EGRESS = 3,  /* what the proxy sends: ingress of the proxy's host-side veth */
	PROXY_GUARD = 4,   /* egress of the proxy's host-side veth: nobody else carries our sign */
	PROXY_INGRESS = 5, /* what the proxy receives: ingress of its own eth0, inside its netns */
	PROXY_LOOKUP = 6,  /* socket lookup in the proxy's netns: listeners for tuples in TIME_WAIT */
	INPOD_EGRESS = 7,  /* what the pod sends: egress of its own eth0, inside its netns */
	INPOD_INGRESS = 8, /* what the pod receives, and what was looped: ingress of its own eth0 */
	INPOD_LOOKUP = 9,  /* socket lookup in the pod's netns: the proxy's listener for steered packets */
	INPOD_SIGN = 10,   /* egress of the pod's host-side veth: the sign of what was born on the host */
	INPOD_GUARD = 11,  /* ingress of the pod's host-side veth: TCP that INPOD_EGRESS did not see */
};

/*
 * Inside a pod's netns an ifindex says nothing about the pod. There each hook has a stub, made by native/: it writes the
 * id of the interface where the program looks for it and tail-calls into "jump" (or "jump_lookup", whose programs are of
 * another type). An upgrade replaces the programs of all pods at once, by these maps.
 */
#define SLOT_EGRESS 0u /* of "jump"; the id is in skb->cb[0] */
#define SLOT_INGRESS 1u
#define SLOT_COUNT 2u
#define SLOT_LOOKUP 0u /* of "jump_lookup"; the id is in map "identity", a per-CPU array[1] */

/* Interface ids: the host-side ifindex where there is one, else this bit and some of the attachment's key. */
#define INTERFACE_ID_NO_HOST 0x80000000u

/*
 * One reason per packet. The word is the enumerator in lower case without REASON_; native/ and plugin/ print
 * these words, a test ties the three lists together.
 */
enum reason {
	REASON_REDIRECTED_OUTBOUND = 1,
	REASON_REDIRECTED_INBOUND = 2,
	REASON_TO_PROXY_ESTABLISHED = 3,
	REASON_FROM_PROXY_LOCAL = 4,
	REASON_FROM_PROXY_REINJECTED = 5,
	REASON_FROM_PROXY_SECOND_LEG = 6,  /* SYN of the proxy to port 15008 of a local enrolled pod, sent back as inbound */
	REASON_TO_PROXY_COOKIE = 7,        /* ACK of a valid SYN cookie: no socket yet, the listener makes it */
	REASON_TO_PROXY_ORPHANED = 8,      /* flow was the proxy's, its socket is gone: the proxy answers with RST */
	REASON_TO_PROXY_ICMP_ERROR = 9,    /* ICMP error about a flow of the proxy */
	REASON_PROXY_ASSIGNED = 10,        /* inside the proxy's netns: listener picked */
	REASON_PROXY_DELIVERED = 11,       /* inside the proxy's netns: left to TCP's own lookup */
	REASON_PROXY_TIME_WAIT = 12,       /* inside the proxy's netns: SYN for a TIME_WAIT tuple, not assigned */
	REASON_DNS_CAPTURED = 13,
	REASON_DNS_ANSWERED = 14,

	REASON_PASS_NOT_TCP = 32,
	REASON_PASS_HOST_SOCKET = 33,
	REASON_PASS_EXCLUDED_PORT = 34,
	REASON_PASS_EXCLUDED_CIDR = 35,
	REASON_PASS_NO_PROXY_SOCKET = 36,  /* flow older than its pod's enrolment */
	REASON_PASS_FAILURE_POLICY_OPEN = 37,
	REASON_PASS_DRAINING = 38,
	REASON_PASS_DIRECT = 39,           /* flow that was let go direct on purpose when it began */
	REASON_PASS_LINK_LOCAL = 40,
	REASON_PASS_OTHER_HOST = 41,       /* destination MAC is not the pod's: a frame that a bridge flooded */
	REASON_PASS_BYPASS = 42,           /* our own mark: decided by another program of ours */
	REASON_PASS_PROXY_OWN = 43,        /* the proxy speaks for itself, or about a pod that is not enrolled */
	REASON_PASS_NOT_WANTED = 44,       /* proxy.ports has 0 for this kind */
	REASON_PASS_FRAGMENT = 45,         /* later fragment of a segment that was let pass */

	REASON_DROP_NO_LISTENER = 64,
	REASON_DROP_SPOOFED_SOURCE = 65,
	REASON_DROP_NOT_OUR_ADDRESS = 66,  /* from the wire to a loopback address */
	REASON_DROP_SHORT_FIRST_FRAGMENT = 67,
	REASON_DROP_SYN_FRAGMENT = 68,
	REASON_DROP_MALFORMED = 69,
	REASON_DROP_REDIRECT_FAILED = 70,
	REASON_DROP_ORPHANED_FLOW = 71,
	REASON_DROP_VLAN_TAGGED = 72,
	REASON_DROP_FORGED_SIGN = 73,
	REASON_DROP_FRAGMENT = 74,         /* later fragment of a TCP segment whose first one was not seen or not let pass */
	REASON_RESET_NO_LISTENER = 75,     /* as DROP_NO_LISTENER, and the sender was told by a RST */
	REASON_DROP_UNJUDGED = 76,         /* TCP from an in-pod contract's pod that its own program did not let go */
	REASON_MAX = 96,
};

/* struct interface.flags */
#define INTERFACE_ENROLLED (1u << 0)
#define INTERFACE_STRICT (1u << 1)        /* enrolled by its own ADD: no flow can be older */
#define INTERFACE_POLICY_OPEN (1u << 2)
#define INTERFACE_CLOSED_RESET (1u << 3)
#define INTERFACE_DNS (1u << 4)
#define INTERFACE_DRAINING (1u << 5)
#define INTERFACE_NO_PEER (1u << 6)       /* its host veth has somebody's queue: never skip it with redirect_peer */
#define INTERFACE_NO_OUTBOUND (1u << 7)   /* proxy.ports.outbound is 0 */
#define INTERFACE_NO_PLAINTEXT (1u << 8)  /* proxy.ports.inboundPlaintext is 0 */
#define INTERFACE_NO_HBONE (1u << 9)      /* proxy.ports.inboundHBONE is 0 */
#define INTERFACE_ACCEPT_LOCAL (1u << 10) /* a proxy's attachment, or one in the in-pod contract: accept_local was off before */
#define INTERFACE_TPROXY (1u << 11)       /* a proxy's attachment: TPROXY rules were made for it */
#define INTERFACE_IN_POD (1u << 12)       /* the proxy is inside the pod's netns */
#define INTERFACE_ROUTE_LOCALNET (1u << 13) /* an attachment in the in-pod contract: route_localnet was off before */
#define INTERFACE_MIGRATE_REQUESTS (1u << 14) /* an attachment in the in-pod contract: tcp_migrate_req was off before */

/* map "interfaces", hash: interface id -> */
struct interface {
	__u8 pod_mac[6];
	__u8 gateway_mac[6]; /* whom the pod's frames are addressed to: the host veth (routed) or its bridge */
	__u32 flags;
	__u32 pod_ifindex;   /* inside the pod's netns */
	__s32 nsid;          /* the pod's netns as seen from the host's; -1: not known */
	__u32 master;        /* ifindex of the bridge the host veth is a port of; 0: none */
	/* What follows is set with INTERFACE_IN_POD only: the listeners that the pod's proxy is to have. */
	__u16 outbound;
	__u16 inbound_plaintext;
	__u16 inbound_hbone;
	__u16 dns;
	__u8 address4[16];   /* the pod's first one of each family, mapped; all zero: none */
	__u8 address6[16];
};

/* map "endpoints", hash: 16-byte address -> */
struct endpoint {
	__u32 ifindex;       /* interface id */
	__u32 flags;         /* INTERFACE_*, a copy of its interface's */
	__u8 pod_mac[6];
	__u16 pad;
};

/* One proxy. Listener ports of 0 are not wanted. */
struct proxy {
	__u8 key[32];        /* its attachment */
	__u64 netns_cookie;  /* 0: kernel older than 5.14 */
	__u64 netns_ino;
	__u32 host_ifindex;
	__u32 pod_ifindex;
	__s32 nsid;
	__u32 master;
	__u8 mac[6];         /* of its eth0 */
	__u16 outbound;
	__u16 inbound_plaintext;
	__u16 inbound_hbone;
	__u16 dns;
	__u16 pad0;
	__u32 flags;
	__u32 pad1;
};

/* map "proxies", hash with the single key 0, replaced whole so that programs never see a half-written one. */
struct proxies {
	__u32 count;
	__u32 generation;
	struct proxy slot[PROXY_SLOTS]; /* newest first */
};

/* map "settings", array[1]: what the state directory was created with. */
struct settings {
	__u32 layout;
	__u32 max_pods;
	__u32 max_flows;
	__u32 direct_flows; /* per pod */
	__u32 mark_bypass;
	__u32 mark_to_proxy;
	__u32 mark_tproxy;
	__u32 variant;      /* VARIANT_* */
	__u8 sign[5];       /* first five bytes of the source MAC that carries our signal over a veth: 02 and 32 random bits */
	__u8 pad[3];
	__u8 boot_id[16];
	__u32 direct_seed[2]; /* random: which set of "direct" a tuple falls into is nobody else's choice */
	__u32 check_cgroups; /* not 0: PROXY_MARK counts only on sockets of the cgroups in "proxy_cgroups" */
	__u32 pad0;
};

/* ztunnel's SO_MARK in the in-pod contract. Whoever has CAP_NET_RAW can set it too. */
#define PROXY_MARK 0x539
#define PROXY_MARK_MASK 0xfff

/* map "proxy_cgroups", hash: __u64 id of a v2 cgroup -> __u32 1. Its sockets are the proxy's where they have the mark. */

/* map "proxy_sockets", socket storage: __u32 1 where a packet showed that the socket is of such a cgroup */

/* struct settings.variant: what must not be used although the kernel may have it */
#define VARIANT_NO_REDIRECT_PEER (1u << 0)
#define VARIANT_NO_SK_LOOKUP (1u << 1)
#define VARIANT_NO_SK_ASSIGN (1u << 2)
#define VARIANT_FULL_SOCKETS_ONLY (1u << 3)

/* Last byte of the signed source MAC. */
#define SIGN_OUTBOUND 1
#define SIGN_INBOUND 2
#define SIGN_ESTABLISHED 3
#define SIGN_COOKIE_OUTBOUND 4 /* no socket: the listener must get this ACK */
#define SIGN_COOKIE_INBOUND 5
#define SIGN_ICMP 6
#define SIGN_DNS 7             /* UDP, port already rewritten */
#define SIGN_DNS_TCP 8
#define SIGN_COOKIE_DNS 9
#define SIGN_PROBE 10          /* in-pod contract: born on the host */

/* A TCP tuple. In "flows" it is written as the proxy sends it. In "direct" source is the pod's end. */
struct tuple {
	__u8 source[16];
	__u8 destination[16];
	__u16 source_port;
	__u16 destination_port;
} __attribute__((aligned(4)));

/* map "flows", LRU hash: tuple as the proxy sends it -> */
struct flow {
	__u32 ifindex; /* interface of the pod whose SYN made the entry */
	__u32 kind;
};
#define FLOW_OUTBOUND 1 /* a pod's SYN was taken: replies go straight into that pod */
#define FLOW_INBOUND 2  /* a SYN towards a pod was taken: replies go back through the node's stack */
#define FLOW_UPSTREAM 3 /* the proxy's own SYN: to a local pod, into which the flow goes straight; or in a pod's name to outside */

/*
 * map "direct", hash without preallocation: flows that were let go direct on purpose. A pod has settings.direct_flows /
 * DIRECT_WAYS sets of its own, so that no other pod's flows can take the place of its flows; an element is made when the
 * first flow falls into its set, and within a set the flow that was not used for longest gives way.
 */
struct direct_key {
	__u32 ifindex; /* the interface id */
	__u32 set;
};
#define DIRECT_WAYS 8
/* What a test run of the program direct_import is given, as if it were a packet; source is the pod's end. */
struct direct_import {
	__u8 ethernet[14];
	__u8 pad[2];
	__u32 ifindex;
	struct tuple tuple;
};
struct direct_set {
	struct bpf_spin_lock lock;  /* of those who write; whoever reads goes by check, see bpf/direct.h */
	__u32 clock;                /* flows that were put into the set so far */
	__u32 check[DIRECT_WAYS];   /* another hash of the tuple; 0: the way is free */
	__u32 used[DIRECT_WAYS];    /* clock when the flow was last seen */
	struct tuple tuple[DIRECT_WAYS];
};

/*
 * map "exclusions", hash of maps: interface id -> LPM trie of this key -> __u32 reason. One trie for each pod, made
 * anew when the pod's rules change: a program sees the old rules or the new ones. Ports in network order; a range is
 * the prefixes that make it up.
 */
struct exclusion {
	__u32 prefix_length; /* 32 (kind and pad) + significant bits of value */
	__u8 kind;           /* EXCLUDE_* */
	__u8 pad[3];
	__u8 value[16];
};
#define EXCLUDE_INBOUND_PORT 1
#define EXCLUDE_OUTBOUND_PORT 2
#define EXCLUDE_OUTBOUND_ADDRESS 3

/* map "fragments", LRU hash: what became of a datagram's first fragment */
struct fragment_key {
	__u32 ifindex;
	__u32 id;
	__u8 source[16];
	__u8 destination[16];
};
struct fragment {
	__u64 time;           /* bpf_ktime_get_ns; identifications come again */
	__u32 action;         /* FRAGMENT_* */
	__u32 ifindex;        /* FRAGMENT_REDIRECT: proxy's host-side interface */
	__u8 macs[12];        /* FRAGMENT_REDIRECT: as the first one got them */
	__u8 resolver[16];    /* FRAGMENT_DNS_ANSWER: source that the first one got */
	__u32 pad;
};
#define FRAGMENT_PASS 1
#define FRAGMENT_REDIRECT 2
#define FRAGMENT_DNS_ANSWER 3

/*
 * map "resolvers", LRU hash: a captured DNS query -> 16-byte address of the resolver it was for; in the in-pod contract,
 * where the query shows the resolver as its client, the address of the pod that it came from, if that is not the first.
 */
struct query {
	__u8 client[16];
	__u32 ifindex; /* in-pod contract: interface id; else 0 */
	__u16 port;
	__u16 id;      /* DNS transaction id, as in the message; in-pod contract: IPPROTO_* */
};

/* map "listeners", hash of sockets: put there by the programs that steer, for the socket lookup programs */
struct listener_key {
	__u32 ifindex; /* interface id; the host-side one of a proxy */
	__u16 port;
	__u16 family;
};

/* map "steered", LRU hash: tuple of a packet that a listener is to get -> */
struct steered_key {
	struct tuple tuple;
	__u32 ifindex;   /* in-pod contract: interface id; else 0 */
};
struct steered {
	struct listener_key listener;
	__u64 time;      /* bpf_ktime_get_ns: it is looked up at once or never */
};

/* map "trace", array[1] */
struct trace {
	__u32 on;
	__u32 ifindex; /* 0: every interface */
	__u32 reason;  /* 0: every reason */
	__u32 lost;    /* events that found the buffer full, counted by the programs */
};

/* map "events", ring buffer (perf event array below 5.8) */
struct event {
	__u64 time; /* bpf_ktime_get_ns */
	__u32 ifindex;
	__u16 program;
	__u16 reason;
	__u32 length;
	__u8 family; /* 0: the packet was not parsed, and the tuple is empty */
	__u8 flags;  /* TCP's */
	__u8 protocol; /* IPPROTO_* */
	__u8 pad;
	struct tuple tuple;
	__u32 pad2;
};

/* map "counters", per-CPU hash without preallocation */
struct counter_key {
	__u32 ifindex; /* interface id; 0 for PROXY_INGRESS, whose ifindex belongs to another namespace */
	__u16 program;
	__u16 reason;
};
struct counter {
	__u64 packets;
	__u64 bytes;
};

/* Where a program is attached, as far as that is needed to find and prove it again. */
struct hook_record {
	__u32 program;  /* enum program; 0: slot unused */
	__u32 kind;     /* HOOK_* */
	__u32 ifindex;  /* in the host's netns, or the pod's where in_netns is set */
	__u32 egress;   /* 0 ingress, 1 egress, as seen from that device */
	__u32 in_netns;
	__u32 program_id;
	__u32 handle;   /* clsact only */
	__u32 priority; /* clsact only */
};
#define HOOK_TCX 1
#define HOOK_CLSACT 2
#define HOOK_NETNS 3 /* a link to a network namespace; ifindex and egress are 0 */

#define ATTACHMENT_ATTACHING 1
#define ATTACHMENT_ATTACHED 2
#define ATTACHMENT_RECORDED 3 /* seen, not enrolled: nothing attached */

#define ROLE_NONE 0
#define ROLE_POD 1
#define ROLE_PROXY 2

#define CONTRACT_SHARED 1
#define CONTRACT_IN_POD 2

/* map "attachments", hash without preallocation: 32-byte key (SHA-256 of network, container id, ifname) -> */
struct attachment {
	__u32 layout;
	__u32 state;
	__u32 role;
	__u32 contract;
	__u32 flags; /* INTERFACE_* */
	__u32 host_ifindex; /* 0: there is no host-side interface */
	__u32 pod_ifindex;
	__s32 nsid;
	__u32 interface_id; /* key of "interfaces" and of all that follows from it; of a proxy its host_ifindex */
	__u32 pad;
	__u64 netns_dev;
	__u64 netns_ino;
	__u64 netns_cookie;
	__u64 enrolled_at; /* seconds since 1970 */
	__u8 pod_mac[6];
	__u8 host_mac[6];
	__u32 address_count;
	__u8 boot_id[16];
	__u8 addresses[MAX_ADDRESSES][16];
	struct hook_record hooks[MAX_HOOKS];
	char program_tag[64];
	char host_ifname[INTERFACE_LEN];
	char ifname[INTERFACE_LEN];
	char network[NETWORK_LEN];
	char container_id[CONTAINER_ID_LEN];
	char pod_name[POD_NAME_LEN];
	char pod_namespace[POD_NAMESPACE_LEN];
	char pod_uid[POD_UID_LEN];
	char service_account[SERVICE_ACCOUNT_LEN];
	char netns_path[NETNS_PATH_LEN];
};

#endif
