// SPDX-License-Identifier: Apache-2.0
// The pinned maps of one state directory. The pin of `settings` is made last and is what makes a state directory
// complete; before it nobody uses the other maps.
#ifndef AMBIENT_NATIVE_STATE_H
#define AMBIENT_NATIVE_STATE_H

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bpf.h"
#include "fd.h"
#include "redirect.h"

namespace ambient {

// Indexes of State's maps, in the order of creation.
enum Map {
  INTERFACES,
  ENDPOINTS,
  PROXIES,
  FLOWS,
  DIRECT,
  EXCLUSIONS,
  FRAGMENTS,
  RESOLVERS,
  LISTENERS,
  STEERED,
  PROXY_CGROUPS,
  PROXY_SOCKETS,
  IDENTITY,
  JUMP,
  JUMP_LOOKUP,
  TRACE,
  EVENTS,
  COUNTERS,
  ATTACHMENTS,
  SETTINGS,
  MAP_COUNT
};
const char *map_name(Map map);

class State {
 public:
  // Maps that are pinned in `over` come from there, unless it is empty. Throws ENOENT where there is no complete state,
  // EPROTO where it is of another layout.
  explicit State(const std::string &dir, const std::string &over = {});

  // Throws EBADF after close().
  int fd(Map map) const;
  void close();
  const struct settings &settings() const { return settings_; }

 private:
  std::array<Fd, MAP_COUNT> maps_;
  struct settings settings_ = {};
};

struct WantedState {
  uint32_t max_pods;
  uint32_t max_flows;
  uint32_t direct_flows;
  uint32_t mark_bypass;
  uint32_t mark_to_proxy;
  uint32_t mark_tproxy;
  uint32_t variant;
};
void create_state(const std::string &dir, const WantedState &wanted);

// What there is room for.
struct Capacity {
  uint32_t max_pods;
  uint32_t max_flows;
  uint32_t direct_flows;
};
// Pins in `dir` new maps for those of `state` that are too small, or whose entries would be elsewhere, and gives their
// names. All are empty but the settings, which come last and say the new sizes.
std::vector<std::string> grow_state(const State &state, const std::string &dir, const Capacity &wanted);
// What only the control plane writes, in those maps that are not the same in both: `to` gets what `from` has.
void copy_records(const State &from, const State &to);
// The flows through a proxy, as far as `to` has no such entry. The programs may go on meanwhile.
void copy_flows(const State &from, const State &to);
// What the programs write about one interface, in the same way; not its direct flows where `to` has other sets for them.
void copy_traffic(const State &from, const State &to, uint32_t ifindex);
// settings.max_pods becomes what the maps have room for.
void write_capacity(const State &state);
// When it returns, no program runs any more that was replaced before.
void wait_for_programs();

// Every key once. Entries that come and go during the walk may or may not be among them; all others are.
std::vector<std::string> keys(const State &state, Map map);

// Sets of ways that each pod has in DIRECT.
uint32_t direct_sets(const struct settings &settings);
// The flows of one interface. A flow that is put in or taken out meanwhile may be missing.
std::vector<struct tuple> direct_flows(const State &state, uint32_t ifindex);
// Every interface that has a set, once.
std::vector<uint32_t> interfaces_with_direct_flows(const State &state);
enum class Import { redirected, done, no_memory };
// Puts a flow into DIRECT by a test run of `program` (direct_import), so that no writer loses what another one puts in.
Import import_direct_flow(int program, uint32_t ifindex, const struct tuple &flow);
// How many sets were there.
uint32_t delete_direct_flows(const State &state, uint32_t ifindex);
// Those through a proxy that are of this interface; how many. One that is put in meanwhile may stay.
uint32_t delete_flows(const State &state, uint32_t ifindex);
bool delete_exclusions(const State &state, uint32_t ifindex);

// One rule: `key` with its reason; 0 where a longer prefix takes an address out of a shorter one.
struct ExclusionRule {
  struct exclusion key;
  uint32_t reason;
};
// More than this is E2BIG.
constexpr uint32_t MAX_EXCLUSIONS = 4096;
// The interface's rules are replaced whole: a program sees the old ones or these.
void put_exclusions(const State &state, uint32_t ifindex, const std::vector<ExclusionRule> &rules);
std::vector<ExclusionRule> exclusions(const State &state, uint32_t ifindex);

struct CounterSum {
  struct counter_key key;
  uint64_t packets;
  uint64_t bytes;
};
std::vector<CounterSum> counters(const State &state);
uint32_t delete_counters(const State &state, uint32_t ifindex);

// Whether the proxy's mark counts only on sockets of the cgroups in PROXY_CGROUPS; read anew at each call.
bool checks_cgroups(const State &state);
void set_check_cgroups(const State &state, bool on);

struct MapUsage {
  const char *map;
  uint64_t entries;
  uint64_t capacity;
  uint64_t bytes;
};
std::vector<MapUsage> map_usage(const State &state);

// 16 bytes of /proc/sys/kernel/random/boot_id, and its text form
void read_boot_id(uint8_t out[16]);
std::string boot_id_text(const uint8_t boot_id[16]);
// false if `text` is not of that form
bool parse_boot_id(const std::string &text, uint8_t out[16]);

}  // namespace ambient

#endif
