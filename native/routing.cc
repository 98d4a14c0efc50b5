// SPDX-License-Identifier: Apache-2.0
#include "routing.h"

#include <linux/fib_rules.h>
#include <sys/socket.h>

#include <algorithm>
#include <string>

#include "error.h"
#include "netlink.h"
#include "netns.h"

namespace ambient {

namespace {

// Every network namespace has lo as its first device, and no other device can get its index.
constexpr uint32_t LOOPBACK_IFINDEX = 1;

std::string family_text(uint8_t family) { return family == AF_INET ? "IPv4" : "IPv6"; }

std::string text(int netns, const Rule &rule) {
  char mark[16];
  snprintf(mark, sizeof(mark), "0x%x", rule.mark);
  return family_text(rule.family) + " rule " + std::to_string(rule.priority) + " fwmark " + mark + " lookup " +
         std::to_string(rule.table) + " in " + netns_text(netns);
}

std::string text(int netns, const LocalRoute &route) {
  return family_text(route.family) + " local default in table " + std::to_string(route.table) + " of " +
         netns_text(netns);
}

void append(Request &request, const Rule &rule) {
  fib_rule_hdr header = {};
  header.family = rule.family;
  header.action = FR_ACT_TO_TBL;
  header.table = rule.table < 256 ? static_cast<uint8_t>(rule.table) : static_cast<uint8_t>(RT_TABLE_UNSPEC);
  request.append(header);
  request.put_u32(FRA_PRIORITY, rule.priority);
  request.put_u32(FRA_FWMARK, rule.mark);
  request.put_u32(FRA_FWMASK, 0xffffffff);
  request.put_u32(FRA_TABLE, rule.table);
  request.put_u8(FRA_PROTOCOL, rule.protocol);
}

void append(Request &request, const LocalRoute &route) {
  rtmsg header = {};
  header.rtm_family = route.family;
  header.rtm_table = route.table < 256 ? static_cast<uint8_t>(route.table) : static_cast<uint8_t>(RT_TABLE_UNSPEC);
  header.rtm_protocol = route.protocol;
  header.rtm_scope = RT_SCOPE_HOST;
  header.rtm_type = RTN_LOCAL;
  request.append(header);
  request.put_u32(RTA_TABLE, route.table);
  request.put_u32(RTA_OIF, LOOPBACK_IFINDEX);
}

// Whether the kernel would do what `rule` does and only that. FRA_PROTOCOL and the default suppressor say nothing
// about which packets match.
bool plain_mark_rule(const fib_rule_hdr *header, const Attributes &attributes) {
  if (header->action != FR_ACT_TO_TBL || header->src_len || header->dst_len || header->tos) return false;
  if (header->flags & ~FIB_RULE_UNRESOLVED & (FIB_RULE_INVERT | FIB_RULE_FIND_SADDR)) return false;
  if (!attributes.find(FRA_FWMARK) || attributes.u32(FRA_FWMASK, 0xffffffff) != 0xffffffff) return false;
  for (uint16_t selector : {FRA_IIFNAME, FRA_OIFNAME, FRA_UID_RANGE, FRA_SPORT_RANGE, FRA_DPORT_RANGE, FRA_IP_PROTO}) {
    if (attributes.find(selector)) return false;
  }
  if (attributes.u8(FRA_L3MDEV, 0)) return false;
  return attributes.u32(FRA_SUPPRESS_PREFIXLEN, 0xffffffff) == 0xffffffff;
}

}  // namespace

std::vector<Rule> rules(int netns, uint8_t family) {
  Request request(RTM_GETRULE, NLM_F_DUMP);
  fib_rule_hdr filter = {};
  filter.family = family;
  request.append(filter);
  std::vector<Rule> found;
  NetlinkSocket socket(netns);
  socket.dump(
      request, "RTM_GETRULE", family_text(family) + " rules of " + netns_text(netns),
      [&](const nlmsghdr *message) {
        if (message->nlmsg_type != RTM_NEWRULE) return;
        auto *header = static_cast<const fib_rule_hdr *>(NLMSG_DATA(message));
        Attributes attributes(message, sizeof(fib_rule_hdr));
        if (header->family != family || !plain_mark_rule(header, attributes)) return;
        found.push_back({family, attributes.u32(FRA_PRIORITY, 0), attributes.u32(FRA_FWMARK, 0),
                         attributes.u32(FRA_TABLE, header->table), attributes.u8(FRA_PROTOCOL, 0)});
      },
      [&] { found.clear(); });
  return found;
}

bool add_rule(int netns, const Rule &rule) {
  Request request(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL);
  append(request, rule);
  NetlinkSocket socket(netns);
  try {
    socket.transact(request, "RTM_NEWRULE", text(netns, rule));
    return true;
  } catch (const KernelError &error) {
    if (error.number != EEXIST) throw;
    // Kernels that do not compare the protocol take an equal rule of somebody else for this one.
    std::vector<Rule> present = rules(netns, rule.family);
    if (std::find(present.begin(), present.end(), rule) != present.end()) return false;
    throw;
  }
}

bool delete_rule(int netns, const Rule &rule) {
  std::vector<Rule> present = rules(netns, rule.family);
  if (std::find(present.begin(), present.end(), rule) == present.end()) return false;
  Request request(RTM_DELRULE, 0);
  append(request, rule);
  NetlinkSocket socket(netns);
  try {
    socket.transact(request, "RTM_DELRULE", text(netns, rule));
    return true;
  } catch (const KernelError &error) {
    if (error.number == ENOENT) return false;
    throw;
  }
}

std::vector<LocalRoute> local_routes(int netns, uint8_t family, uint32_t table) {
  Request request(RTM_GETROUTE, NLM_F_DUMP);
  rtmsg filter = {};
  filter.rtm_family = family;
  request.append(filter);
  request.put_u32(RTA_TABLE, table);
  std::vector<LocalRoute> found;
  NetlinkSocket socket(netns);
  try {
    socket.dump(
        request, "RTM_GETROUTE", family_text(family) + " table " + std::to_string(table) + " of " + netns_text(netns),
        [&](const nlmsghdr *message) {
          if (message->nlmsg_type != RTM_NEWROUTE) return;
          auto *header = static_cast<const rtmsg *>(NLMSG_DATA(message));
          Attributes attributes(message, sizeof(rtmsg));
          if (header->rtm_family != family || header->rtm_type != RTN_LOCAL || header->rtm_dst_len != 0) return;
          if (attributes.u32(RTA_TABLE, header->rtm_table) != table) return;
          if (attributes.u32(RTA_OIF, 0) != LOOPBACK_IFINDEX) return;
          found.push_back({family, table, header->rtm_protocol});
        },
        [&] { found.clear(); });
  } catch (const KernelError &error) {
    // "FIB table does not exist": a table begins with its first route.
    if (error.number != ENOENT) throw;
  }
  return found;
}

bool add_local_route(int netns, const LocalRoute &route) {
  Request request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL);
  append(request, route);
  NetlinkSocket socket(netns);
  try {
    socket.transact(request, "RTM_NEWROUTE", text(netns, route));
    return true;
  } catch (const KernelError &error) {
    if (error.number != EEXIST) throw;
    std::vector<LocalRoute> present = local_routes(netns, route.family, route.table);
    if (std::find(present.begin(), present.end(), route) != present.end()) return false;
    throw;
  }
}

bool delete_local_route(int netns, const LocalRoute &route) {
  std::vector<LocalRoute> present = local_routes(netns, route.family, route.table);
  if (std::find(present.begin(), present.end(), route) == present.end()) return false;
  Request request(RTM_DELROUTE, 0);
  append(request, route);
  NetlinkSocket socket(netns);
  try {
    socket.transact(request, "RTM_DELROUTE", text(netns, route));
    return true;
  } catch (const KernelError &error) {
    if (error.number == ESRCH) return false;
    throw;
  }
}

}  // namespace ambient
