// SPDX-License-Identifier: Apache-2.0
#include "link.h"

#include <linux/if.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/ip.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "error.h"
#include "faults.h"
#include "netlink.h"
#include "netns.h"

#ifndef RTEXT_FILTER_SKIP_STATS
#define RTEXT_FILTER_SKIP_STATS (1 << 3)
#endif

namespace ambient {

std::string mac_text(const uint8_t mac[6]) {
  char text[18];
  snprintf(text, sizeof(text), "%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
  return text;
}

namespace {

Link parse_link(const nlmsghdr *message) {
  auto *header = static_cast<const ifinfomsg *>(NLMSG_DATA(message));
  Attributes attributes(message, sizeof(ifinfomsg));
  Link link;
  link.ifindex = static_cast<uint32_t>(header->ifi_index);
  link.name = attributes.string(IFLA_IFNAME);
  link.kind = Attributes(attributes.find(IFLA_LINKINFO)).string(IFLA_INFO_KIND);
  const rtattr *address = attributes.find(IFLA_ADDRESS);
  if (address && RTA_PAYLOAD(address) == 6) link.mac = mac_text(static_cast<const uint8_t *>(RTA_DATA(address)));
  link.mtu = attributes.u32(IFLA_MTU, 0);
  link.up = header->ifi_flags & IFF_UP;
  link.peer_ifindex = attributes.u32(IFLA_LINK, 0);
  link.peer_netns_id = static_cast<int32_t>(attributes.u32(IFLA_LINK_NETNSID, static_cast<uint32_t>(-1)));
  link.master = attributes.u32(IFLA_MASTER, 0);
  return link;
}

std::optional<Link> get_link(int netns, Request &request, const std::string &object) {
  request.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
  std::optional<Link> link;
  NetlinkSocket socket(netns);
  try {
    socket.transact(request, "RTM_GETLINK", object + " in " + netns_text(netns), [&](const nlmsghdr *message) {
      if (message->nlmsg_type == RTM_NEWLINK) link = parse_link(message);
    });
  } catch (const KernelError &error) {
    if (error.number != ENODEV) throw;
  }
  return link;
}

}  // namespace

std::optional<Link> link_by_name(int netns, const std::string &name) {
  Request request(RTM_GETLINK, 0);
  request.append<ifinfomsg>({});
  request.put_string(IFLA_IFNAME, name);
  return get_link(netns, request, name);
}

std::optional<Link> link_by_index(int netns, uint32_t ifindex) {
  Request request(RTM_GETLINK, 0);
  ifinfomsg header = {};
  header.ifi_index = static_cast<int>(ifindex);
  request.append(header);
  return get_link(netns, request, "ifindex " + std::to_string(ifindex));
}

std::vector<LinkAddress> link_addresses(int netns, uint32_t ifindex) {
  Request request(RTM_GETADDR, NLM_F_DUMP);
  ifaddrmsg header = {};
  header.ifa_index = ifindex;
  request.append(header);
  std::vector<LinkAddress> found;
  NetlinkSocket socket(netns);
  socket.dump(
      request, "RTM_GETADDR", "ifindex " + std::to_string(ifindex) + " in " + netns_text(netns),
      [&](const nlmsghdr *message) {
        if (message->nlmsg_type != RTM_NEWADDR) return;
        auto *entry = static_cast<const ifaddrmsg *>(NLMSG_DATA(message));
        if (entry->ifa_index != ifindex) return;
        Attributes attributes(message, sizeof(ifaddrmsg));
        // On a point-to-point device IFA_ADDRESS is the other end's; without a peer IPv6 has IFA_ADDRESS alone.
        const rtattr *value = attributes.find(IFA_LOCAL);
        if (!value) value = attributes.find(IFA_ADDRESS);
        if (!value) return;
        LinkAddress address = {};
        address.scope = entry->ifa_scope;
        if (entry->ifa_family == AF_INET && RTA_PAYLOAD(value) == 4) {
          address.address[10] = address.address[11] = 0xff;
          memcpy(&address.address[12], RTA_DATA(value), 4);
          address.prefix = static_cast<uint8_t>(96 + entry->ifa_prefixlen);
        } else if (entry->ifa_family == AF_INET6 && RTA_PAYLOAD(value) == 16) {
          memcpy(&address.address[0], RTA_DATA(value), 16);
          address.prefix = entry->ifa_prefixlen;
        } else {
          return;
        }
        found.push_back(address);
      },
      [&] { found.clear(); });
  return found;
}

const Ipv4Setting ACCEPT_LOCAL = {"accept_local", IPV4_DEVCONF_ACCEPT_LOCAL};
const Ipv4Setting ROUTE_LOCALNET = {"route_localnet", IPV4_DEVCONF_ROUTE_LOCALNET};

bool ipv4_setting(int netns, uint32_t ifindex, const Ipv4Setting &setting) {
  Request request(RTM_GETLINK, 0);
  ifinfomsg header = {};
  header.ifi_index = static_cast<int>(ifindex);
  request.append(header);
  request.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
  bool on = false;
  NetlinkSocket socket(netns);
  socket.transact(request, "RTM_GETLINK", "ifindex " + std::to_string(ifindex) + " in " + netns_text(netns),
                  [&](const nlmsghdr *message) {
                    if (message->nlmsg_type != RTM_NEWLINK) return;
                    const rtattr *families = Attributes(message, sizeof(ifinfomsg)).find(IFLA_AF_SPEC);
                    const rtattr *inet = families ? Attributes(families).find(AF_INET) : nullptr;
                    const rtattr *values = inet ? Attributes(inet).find(IFLA_INET_CONF) : nullptr;
                    // An array of 32-bit values; IPV4_DEVCONF_* count from 1.
                    const size_t at = (setting.number - size_t{1}) * sizeof(uint32_t);
                    if (!values || RTA_PAYLOAD(values) < at + sizeof(uint32_t)) return;
                    uint32_t value;
                    memcpy(&value, static_cast<const char *>(RTA_DATA(values)) + at, sizeof(value));
                    on = value != 0;
                  });
  return on;
}

void set_ipv4_setting(int netns, uint32_t ifindex, const Ipv4Setting &setting, bool on) {
  Request request(RTM_SETLINK, 0);
  ifinfomsg header = {};
  header.ifi_index = static_cast<int>(ifindex);
  request.append(header);
  size_t families = request.begin(IFLA_AF_SPEC);
  size_t inet = request.begin(AF_INET);
  size_t values = request.begin(IFLA_INET_CONF);
  request.put_u32(setting.number, on ? 1 : 0);
  request.end(values);
  request.end(inet);
  request.end(families);
  NetlinkSocket(netns).transact(request, "RTM_SETLINK",
                                std::string(setting.name) + " of ifindex " + std::to_string(ifindex) + " in " + netns_text(netns));
}

Fd open_link_events() {
  Fd socket(kernel_call("socket", [] {
    return ::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE);
  }));
  if (!socket) throw KernelError(errno, "socket", "netlink");
  sockaddr_nl address{};
  address.nl_family = AF_NETLINK;
  address.nl_groups = RTMGRP_LINK | RTMGRP_TC;
  int result = kernel_call("bind", [&] {
    return ::bind(socket.get(), reinterpret_cast<const sockaddr *>(&address), sizeof(address));
  });
  if (result < 0) throw KernelError(errno, "bind", "netlink events of links");
  return socket;
}

std::optional<std::vector<uint32_t>> read_link_events(int socket) {
  std::vector<uint32_t> found;
  bool lost = false;
  // The largest message that the kernel makes for a listener (netlink_alloc_large_skb aside) fits into 32 KiB.
  std::vector<char> buffer(32 << 10);
  for (;;) {
    ssize_t size = ::recv(socket, buffer.data(), buffer.size(), 0);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (size < 0 && errno == ENOBUFS) {
      lost = true;
      continue;
    }
    if (size < 0) throw KernelError(errno, "recv", "netlink events of links");
    int left = static_cast<int>(size);
    for (auto *message = reinterpret_cast<nlmsghdr *>(buffer.data()); NLMSG_OK(message, left);
         message = NLMSG_NEXT(message, left)) {
      int32_t index = 0;
      if (message->nlmsg_type == RTM_NEWLINK || message->nlmsg_type == RTM_DELLINK) {
        index = static_cast<const ifinfomsg *>(NLMSG_DATA(message))->ifi_index;
      } else if (message->nlmsg_type >= RTM_NEWQDISC && message->nlmsg_type <= RTM_DELTFILTER) {
        index = static_cast<const tcmsg *>(NLMSG_DATA(message))->tcm_ifindex;
      }
      if (index > 0) found.push_back(static_cast<uint32_t>(index));
    }
  }
  if (lost) return std::nullopt;
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

}  // namespace ambient
