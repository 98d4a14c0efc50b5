// SPDX-License-Identifier: Apache-2.0
// Queueing disciplines and cls_bpf filters, by rtnetlink.
#ifndef AMBIENT_NATIVE_TC_H
#define AMBIENT_NATIVE_TC_H

#include <cstdint>
#include <string>
#include <vector>

namespace ambient {

enum class Direction { ingress, egress };
inline const char *direction_text(Direction direction) {
  return direction == Direction::ingress ? "ingress" : "egress";
}

struct Qdisc {
  std::string kind;
  uint32_t handle;
  uint32_t parent;
};

struct TcFilter {
  std::string kind;
  uint16_t priority;
  uint16_t protocol;
  uint32_t handle;
  uint32_t program_id;
  std::string name;
  bool direct_action;
};

// The root qdisc, then the one at the ingress place (clsact or ingress). Classes' own qdiscs are not looked at.
std::vector<Qdisc> qdiscs(int netns, uint32_t ifindex);
bool add_clsact(int netns, uint32_t ifindex);
std::vector<TcFilter> filters(int netns, uint32_t ifindex, Direction direction);
void attach_filter(int netns, uint32_t ifindex, Direction direction, int program, uint16_t priority, uint32_t handle,
                   const std::string &name, bool replace);
bool delete_filter(int netns, uint32_t ifindex, Direction direction, uint16_t priority, uint32_t handle);

}  // namespace ambient

#endif
