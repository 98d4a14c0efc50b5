// SPDX-License-Identifier: Apache-2.0
#include "names.h"

#include <cstring>

#include "redirect.h"

namespace ambient {

// proxy_ingress last: its pin tells that all are there, also where the kernel has no socket lookup programs.
const Name PROGRAMS[] = {{"pod_egress", POD_EGRESS},       {"pod_ingress", POD_INGRESS},   {"proxy_egress", PROXY_EGRESS},
                         {"proxy_guard", PROXY_GUARD},     {"proxy_lookup", PROXY_LOOKUP}, {"inpod_egress", INPOD_EGRESS},
                         {"inpod_ingress", INPOD_INGRESS}, {"inpod_lookup", INPOD_LOOKUP}, {"inpod_sign", INPOD_SIGN},
                         {"inpod_guard", INPOD_GUARD},     {"proxy_ingress", PROXY_INGRESS}, {nullptr, 0}};

const Name REASONS[] = {
    {"redirected_outbound", REASON_REDIRECTED_OUTBOUND},
    {"redirected_inbound", REASON_REDIRECTED_INBOUND},
    {"to_proxy_established", REASON_TO_PROXY_ESTABLISHED},
    {"from_proxy_local", REASON_FROM_PROXY_LOCAL},
    {"from_proxy_reinjected", REASON_FROM_PROXY_REINJECTED},
    {"from_proxy_second_leg", REASON_FROM_PROXY_SECOND_LEG},
    {"to_proxy_cookie", REASON_TO_PROXY_COOKIE},
    {"to_proxy_orphaned", REASON_TO_PROXY_ORPHANED},
    {"to_proxy_icmp_error", REASON_TO_PROXY_ICMP_ERROR},
    {"proxy_assigned", REASON_PROXY_ASSIGNED},
    {"proxy_delivered", REASON_PROXY_DELIVERED},
    {"proxy_time_wait", REASON_PROXY_TIME_WAIT},
    {"dns_captured", REASON_DNS_CAPTURED},
    {"dns_answered", REASON_DNS_ANSWERED},
    {"pass_not_tcp", REASON_PASS_NOT_TCP},
    {"pass_host_socket", REASON_PASS_HOST_SOCKET},
    {"pass_excluded_port", REASON_PASS_EXCLUDED_PORT},
    {"pass_excluded_cidr", REASON_PASS_EXCLUDED_CIDR},
    {"pass_no_proxy_socket", REASON_PASS_NO_PROXY_SOCKET},
    {"pass_failure_policy_open", REASON_PASS_FAILURE_POLICY_OPEN},
    {"pass_draining", REASON_PASS_DRAINING},
    {"pass_direct", REASON_PASS_DIRECT},
    {"pass_link_local", REASON_PASS_LINK_LOCAL},
    {"pass_other_host", REASON_PASS_OTHER_HOST},
    {"pass_bypass", REASON_PASS_BYPASS},
    {"pass_proxy_own", REASON_PASS_PROXY_OWN},
    {"pass_not_wanted", REASON_PASS_NOT_WANTED},
    {"pass_fragment", REASON_PASS_FRAGMENT},
    {"drop_no_listener", REASON_DROP_NO_LISTENER},
    {"drop_spoofed_source", REASON_DROP_SPOOFED_SOURCE},
    {"drop_not_our_address", REASON_DROP_NOT_OUR_ADDRESS},
    {"drop_short_first_fragment", REASON_DROP_SHORT_FIRST_FRAGMENT},
    {"drop_syn_fragment", REASON_DROP_SYN_FRAGMENT},
    {"drop_malformed", REASON_DROP_MALFORMED},
    {"drop_redirect_failed", REASON_DROP_REDIRECT_FAILED},
    {"drop_orphaned_flow", REASON_DROP_ORPHANED_FLOW},
    {"drop_vlan_tagged", REASON_DROP_VLAN_TAGGED},
    {"drop_forged_sign", REASON_DROP_FORGED_SIGN},
    {"drop_fragment", REASON_DROP_FRAGMENT},
    {"reset_no_listener", REASON_RESET_NO_LISTENER},
    {"drop_unjudged", REASON_DROP_UNJUDGED},
    {nullptr, 0},
};

#define FLAG(name) \
  { #name, name }
const Name FLAGS[] = {
    FLAG(INTERFACE_ENROLLED),
    FLAG(INTERFACE_STRICT),
    FLAG(INTERFACE_POLICY_OPEN),
    FLAG(INTERFACE_CLOSED_RESET),
    FLAG(INTERFACE_DNS),
    FLAG(INTERFACE_DRAINING),
    FLAG(INTERFACE_NO_PEER),
    FLAG(INTERFACE_NO_OUTBOUND),
    FLAG(INTERFACE_NO_PLAINTEXT),
    FLAG(INTERFACE_NO_HBONE),
    FLAG(INTERFACE_ACCEPT_LOCAL),
    FLAG(INTERFACE_TPROXY),
    FLAG(INTERFACE_IN_POD),
    FLAG(INTERFACE_ROUTE_LOCALNET),
    FLAG(INTERFACE_MIGRATE_REQUESTS),
    FLAG(VARIANT_NO_REDIRECT_PEER),
    FLAG(VARIANT_NO_SK_LOOKUP),
    FLAG(VARIANT_NO_SK_ASSIGN),
    FLAG(VARIANT_FULL_SOCKETS_ONLY),
    {nullptr, 0},
};
#undef FLAG

#define SIZE(name) \
  { #name, sizeof(struct name) }
const Name SIZES[] = {
    SIZE(interface), SIZE(endpoint),    SIZE(proxy),   SIZE(proxies),     SIZE(settings),   SIZE(tuple),
    SIZE(flow),      SIZE(direct_set), SIZE(counter_key), SIZE(counter), SIZE(hook_record), SIZE(attachment), SIZE(exclusion), SIZE(event), {nullptr, 0},
};
#undef SIZE

const Name HOOK_KINDS[] = {{"tcx", HOOK_TCX}, {"clsact", HOOK_CLSACT}, {"netns", HOOK_NETNS}, {nullptr, 0}};
const Name EXCLUSION_KINDS[] = {{"inbound_port", EXCLUDE_INBOUND_PORT},
                           {"outbound_port", EXCLUDE_OUTBOUND_PORT},
                           {"outbound_address", EXCLUDE_OUTBOUND_ADDRESS},
                           {nullptr, 0}};
const Name ATTACHMENT_STATES[] = {{"attaching", ATTACHMENT_ATTACHING},
                                  {"attached", ATTACHMENT_ATTACHED},
                                  {"recorded", ATTACHMENT_RECORDED},
                                  {nullptr, 0}};
const Name ROLES[] = {{"none", ROLE_NONE}, {"pod", ROLE_POD}, {"proxy", ROLE_PROXY}, {nullptr, 0}};
const Name CONTRACTS[] = {{"shared", CONTRACT_SHARED}, {"in-pod", CONTRACT_IN_POD}, {nullptr, 0}};

const char *word_of(const Name *names, uint32_t number) {
  for (; names->word; names++) {
    if (names->number == number) return names->word;
  }
  return nullptr;
}

const Name *name_of(const Name *names, const char *word) {
  for (; names->word; names++) {
    if (!strcmp(names->word, word)) return names;
  }
  return nullptr;
}

}  // namespace ambient
