// SPDX-License-Identifier: Apache-2.0
// BPF links, owned by a file descriptor or a pin: TCX links hold a program on a device's ingress or egress (Linux 6.6),
// namespace links one that takes part in the socket lookup of a network namespace (5.9).
#ifndef AMBIENT_NATIVE_TCX_H
#define AMBIENT_NATIVE_TCX_H

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tc.h"

namespace ambient {

struct TcxEntry {
  uint32_t program_id;
  uint32_t link_id;
};

struct BpfLinkInfo {
  uint32_t link_id;
  uint32_t program_id;
  bool in_netns;  // a namespace link
  uint32_t ifindex;
  Direction direction;
  uint64_t netns_ino;  // 0 when the namespace is gone
};

// The link's id.
uint32_t attach_tcx(int netns, uint32_t ifindex, Direction direction, int program, bool first,
                    const std::string &pin_path);
uint32_t attach_lookup(int netns, int program, const std::string &pin_path);
std::vector<TcxEntry> query_tcx(int netns, uint32_t ifindex, Direction direction);
std::optional<BpfLinkInfo> link_info(const std::string &pin_path);
void update_link(const std::string &pin_path, int program);
bool detach_link(const std::string &pin_path);
// Whether BPF_LINK_CREATE knows the attach type: an otherwise correct call for a device that cannot exist.
bool have_tcx(int program);

}  // namespace ambient

#endif
