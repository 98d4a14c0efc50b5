// SPDX-License-Identifier: Apache-2.0
// Network devices and their addresses, read by rtnetlink. plugin/native.ts says what the fields mean.
#ifndef AMBIENT_NATIVE_LINK_H
#define AMBIENT_NATIVE_LINK_H

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fd.h"

namespace ambient {

struct Link {
  uint32_t ifindex;
  std::string name;
  std::string kind;
  std::string mac;
  uint32_t mtu;
  bool up;
  uint32_t peer_ifindex;
  int32_t peer_netns_id;
  uint32_t master;
};

struct LinkAddress {
  std::array<uint8_t, 16> address;
  uint8_t prefix;
  uint8_t scope;
};

std::optional<Link> link_by_name(int netns, const std::string &name);
std::optional<Link> link_by_index(int netns, uint32_t ifindex);
std::vector<LinkAddress> link_addresses(int netns, uint32_t ifindex);

// net.ipv4.conf.DEVICE.*, by rtnetlink: /proc/sys shows the namespace of whoever mounted it. `number` is an
// IPV4_DEVCONF_* of linux/ip.h.
struct Ipv4Setting {
  const char *name;
  uint16_t number;
};
extern const Ipv4Setting ACCEPT_LOCAL, ROUTE_LOCALNET;
bool ipv4_setting(int netns, uint32_t ifindex, const Ipv4Setting &setting);
void set_ipv4_setting(int netns, uint32_t ifindex, const Ipv4Setting &setting, bool on);

// A socket that becomes readable when a link of this namespace, or its qdiscs or filters, have come, gone or changed.
Fd open_link_events();
// Their indexes since the last call, each once; nullopt: some were lost, anything may have changed.
std::optional<std::vector<uint32_t>> read_link_events(int socket);

std::string mac_text(const uint8_t mac[6]);

}  // namespace ambient

#endif
