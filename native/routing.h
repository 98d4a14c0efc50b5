// SPDX-License-Identifier: Apache-2.0
// The policy rule and the local route that make a proxy's netns take foreign addresses for its own.
#ifndef AMBIENT_NATIVE_ROUTING_H
#define AMBIENT_NATIVE_ROUTING_H

#include <cstdint>
#include <vector>

namespace ambient {

struct Rule {
  uint8_t family;  // AF_INET, AF_INET6
  uint32_t priority;
  uint32_t mark;
  uint32_t table;
  uint8_t protocol;

  bool operator==(const Rule &other) const {
    return family == other.family && priority == other.priority && mark == other.mark && table == other.table &&
           protocol == other.protocol;
  }
};

struct LocalRoute {
  uint8_t family;
  uint32_t table;
  uint8_t protocol;

  bool operator==(const LocalRoute &other) const {
    return family == other.family && table == other.table && protocol == other.protocol;
  }
};

bool add_rule(int netns, const Rule &rule);
bool delete_rule(int netns, const Rule &rule);
// Only rules of this shape: a whole mark selects, a table is looked up, nothing else is compared.
std::vector<Rule> rules(int netns, uint8_t family);

bool add_local_route(int netns, const LocalRoute &route);
bool delete_local_route(int netns, const LocalRoute &route);
// Only local default routes over lo.
std::vector<LocalRoute> local_routes(int netns, uint8_t family, uint32_t table);

}  // namespace ambient

#endif
