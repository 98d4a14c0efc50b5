// SPDX-License-Identifier: Apache-2.0
#include "state.h"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <errno.h>
#include <sys/random.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_set>

#include "background.h"
#include "error.h"
#include "features.h"
#include "faults.h"
#include "files.h"
#include "names.h"

namespace ambient {

namespace {

struct Shape {
  const char *name;
  uint32_t type;
  uint32_t key_size;
  uint32_t value_size;
  uint32_t flags;
};

// Hashes without preallocation: memory follows the number of pods, and a replaced value is a new element, so that a
// program never reads a half-written one (a preallocated element is re-used at once).
const Shape SHAPES[MAP_COUNT] = {
    {"interfaces", BPF_MAP_TYPE_HASH, sizeof(uint32_t), sizeof(struct interface), BPF_F_NO_PREALLOC},
    {"endpoints", BPF_MAP_TYPE_HASH, 16, sizeof(struct endpoint), BPF_F_NO_PREALLOC},
    {"proxies", BPF_MAP_TYPE_HASH, sizeof(uint32_t), sizeof(struct proxies), BPF_F_NO_PREALLOC},
    {"flows", BPF_MAP_TYPE_LRU_HASH, sizeof(struct tuple), sizeof(struct flow), 0},
    {"direct", BPF_MAP_TYPE_HASH, sizeof(struct direct_key), sizeof(struct direct_set), BPF_F_NO_PREALLOC},
    {"exclusions", BPF_MAP_TYPE_HASH_OF_MAPS, sizeof(uint32_t), sizeof(uint32_t), BPF_F_NO_PREALLOC},
    {"fragments", BPF_MAP_TYPE_LRU_HASH, sizeof(struct fragment_key), sizeof(struct fragment), 0},
    {"resolvers", BPF_MAP_TYPE_LRU_HASH, sizeof(struct query), 16, 0},
    {"listeners", BPF_MAP_TYPE_SOCKHASH, sizeof(struct listener_key), sizeof(uint64_t), 0},
    {"steered", BPF_MAP_TYPE_LRU_HASH, sizeof(struct steered_key), sizeof(struct steered), 0},
    {"proxy_cgroups", BPF_MAP_TYPE_HASH, sizeof(uint64_t), sizeof(uint32_t), BPF_F_NO_PREALLOC},
    {"proxy_sockets", BPF_MAP_TYPE_SK_STORAGE, sizeof(uint32_t), sizeof(uint32_t), BPF_F_NO_PREALLOC},
    {"identity", BPF_MAP_TYPE_PERCPU_ARRAY, sizeof(uint32_t), sizeof(uint32_t), 0},
    {"jump", BPF_MAP_TYPE_PROG_ARRAY, sizeof(uint32_t), sizeof(uint32_t), 0},
    {"jump_lookup", BPF_MAP_TYPE_PROG_ARRAY, sizeof(uint32_t), sizeof(uint32_t), 0},
    {"trace", BPF_MAP_TYPE_ARRAY, sizeof(uint32_t), sizeof(struct trace), 0},
    {"events", BPF_MAP_TYPE_RINGBUF, 0, 0, 0},
    {"counters", BPF_MAP_TYPE_PERCPU_HASH, sizeof(struct counter_key), sizeof(struct counter), BPF_F_NO_PREALLOC},
    {"attachments", BPF_MAP_TYPE_HASH, 32, sizeof(struct attachment), BPF_F_NO_PREALLOC},
    {"settings", BPF_MAP_TYPE_ARRAY, sizeof(uint32_t), sizeof(struct settings), 0},
};

uint32_t capacity(Map map, const struct settings &settings) {
  switch (map) {
    case INTERFACES:
    case EXCLUSIONS:
      return settings.max_pods;
    case DIRECT:
      // A bound only, but the kernel makes as many buckets at once.
      return static_cast<uint32_t>(
          std::min<uint64_t>(uint64_t{settings.max_pods} * direct_sets(settings), uint64_t{1} << 22));
    case ENDPOINTS:
      return settings.max_pods * 4;
    case FLOWS:
      return settings.max_flows;
    case FRAGMENTS:
      return 4096;
    case RESOLVERS:
    case STEERED:
      return 16384;
    case LISTENERS:
      // For each pod with a proxy of its own outbound and inbound, in both families.
      return PROXY_SLOTS * 16 + settings.max_pods * 4;
    case PROXY_CGROUPS:
      return 64;
    case PROXY_SOCKETS:
      return 0;  // grows with the sockets
    case JUMP:
      return SLOT_COUNT;
    case EVENTS:
      return 1 << 20;  // bytes
    case COUNTERS:
      return settings.max_pods * 32;
    case ATTACHMENTS:
      return settings.max_pods * 2;
    default:
      return 1;
  }
}

Fd make_map(const Shape &shape, uint32_t entries, const bpf_map_create_opts *options, const std::string &object) {
  Fd fd(kernel_call("bpf(BPF_MAP_CREATE)", [&] {
    return bpf_map_create(static_cast<bpf_map_type>(shape.type), shape.name, shape.key_size, shape.value_size, entries,
                          options);
  }));
  if (!fd) throw KernelError(errno, "bpf(BPF_MAP_CREATE)", object);
  return fd;
}

struct FreeTypes {
  void operator()(btf *types) const { btf__free(types); }
};

// The types of DIRECT, as far as the kernel has to know them: where in the value the lock is.
struct DirectTypes {
  Fd fd;
  uint32_t key;
  uint32_t value;
};
DirectTypes direct_types() {
  std::unique_ptr<btf, FreeTypes> types(btf__new_empty());
  if (!types) throw KernelError(errno, "btf__new_empty", "types of map direct");
  auto add = [](int id) {
    if (id < 0) throw KernelError(-id, "btf__add", "types of map direct");
    return id;
  };
  const int word = add(btf__add_int(types.get(), "unsigned int", sizeof(uint32_t), 0));
  auto words = [&](size_t size) {
    return add(btf__add_array(types.get(), word, word, static_cast<uint32_t>(size / sizeof(uint32_t))));
  };
  const int key = words(sizeof(struct direct_key));
  const int lock = add(btf__add_struct(types.get(), "bpf_spin_lock", sizeof(struct bpf_spin_lock)));
  add(btf__add_field(types.get(), "val", word, 0, 0));
  const int rest = words(sizeof(struct direct_set) - sizeof(struct bpf_spin_lock));
  const int value = add(btf__add_struct(types.get(), "direct_set", sizeof(struct direct_set)));
  add(btf__add_field(types.get(), "lock", lock, 0, 0));
  add(btf__add_field(types.get(), "rest", rest, sizeof(struct bpf_spin_lock) * 8, 0));
  uint32_t size;
  const void *raw = btf__raw_data(types.get(), &size);
  if (!raw) throw KernelError(ENOMEM, "btf__raw_data", "types of map direct");
  Fd fd(kernel_call("bpf(BPF_BTF_LOAD)", [&] { return bpf_btf_load(raw, size, nullptr); }));
  if (!fd) throw KernelError(errno, "bpf(BPF_BTF_LOAD)", "types of map direct");
  return {std::move(fd), static_cast<uint32_t>(key), static_cast<uint32_t>(value)};
}

// Of one size for all: kernels below 5.10 compare it with the outer map's template. Without preallocation it is a limit
// only.
Fd make_exclusion_trie() {
  Shape shape = {"exclusion_rules", BPF_MAP_TYPE_LPM_TRIE, sizeof(struct exclusion), sizeof(uint32_t), 0};
  LIBBPF_OPTS(bpf_map_create_opts, options);
  options.map_flags = BPF_F_NO_PREALLOC;
  return make_map(shape, MAX_EXCLUSIONS, &options, "exclusions of one pod");
}

unsigned possible_cpus();

Fd make_events(const std::string &path) {
  const Shape &shape = SHAPES[EVENTS];
  try {
    return make_map(shape, 1 << 20, nullptr, path);
  } catch (const KernelError &error) {
    // No ring buffers below 5.8.
    if (error.number != EINVAL) throw;
  }
  Shape perf = {shape.name, BPF_MAP_TYPE_PERF_EVENT_ARRAY, sizeof(uint32_t), sizeof(uint32_t), 0};
  return make_map(perf, possible_cpus(), nullptr, path);
}

// Socket storage is the one type that the kernel makes only with a description of key and value.
Fd make_proxy_sockets(const std::string &path) {
  const Shape &shape = SHAPES[PROXY_SOCKETS];
  LIBBPF_OPTS(bpf_map_create_opts, options);
  options.map_flags = shape.flags;
  Fd btf = load_int_btf();
  if (!btf && errno != EINVAL) throw KernelError(errno, "bpf(BPF_BTF_LOAD)", path);
  if (btf) {
    options.btf_fd = static_cast<uint32_t>(btf.get());
    options.btf_key_type_id = options.btf_value_type_id = 1;
    try {
      return make_map(shape, 0, &options, path);
    } catch (const KernelError &error) {
      if (error.number != EINVAL) throw;
    }
  }
  // None below 5.2, where no program that uses it is loaded.
  Shape unused = {shape.name, BPF_MAP_TYPE_HASH, shape.key_size, shape.value_size, 0};
  return make_map(unused, 1, nullptr, path);
}

Fd make_state_map(Map map, const struct settings &settings, const std::string &path) {
  const Shape &shape = SHAPES[map];
  if (map == EVENTS) return make_events(path);
  if (map == PROXY_SOCKETS) return make_proxy_sockets(path);
  LIBBPF_OPTS(bpf_map_create_opts, options);
  options.map_flags = shape.flags;
  Fd inner;
  DirectTypes types;
  if (map == DIRECT) {
    types = direct_types();
    options.btf_fd = static_cast<uint32_t>(types.fd.get());
    options.btf_key_type_id = types.key;
    options.btf_value_type_id = types.value;
  } else if (map == EXCLUSIONS) {
    // The outer map keeps the shape of this inner map and not the map.
    inner = make_exclusion_trie();
    options.inner_map_fd = static_cast<uint32_t>(inner.get());
  }
  return make_map(shape, capacity(map, settings), &options, path);
}

std::string shape_text(uint32_t type, uint32_t key_size, uint32_t value_size) {
  return "type " + std::to_string(type) + ", key " + std::to_string(key_size) + ", value " + std::to_string(value_size);
}

bool fits(const MapInfo &info, const Shape &shape) {
  if (shape.type == BPF_MAP_TYPE_RINGBUF && info.type == BPF_MAP_TYPE_PERF_EVENT_ARRAY) return true;
  if (shape.type == BPF_MAP_TYPE_SK_STORAGE && info.type == BPF_MAP_TYPE_HASH) return true;
  return info.type == shape.type && info.key_size == shape.key_size && info.value_size == shape.value_size;
}

// The first word of `settings` is its layout's number, whatever else a later layout changes.
void check_layout(const MapInfo &info, int fd, const std::string &path) {
  if (info.type != BPF_MAP_TYPE_ARRAY || info.key_size != sizeof(uint32_t) || info.value_size < sizeof(uint32_t)) {
    throw KernelError(EPROTO, "bpf(BPF_OBJ_GET_INFO_BY_FD)", path + " is no map of settings");
  }
  std::vector<uint8_t> value((info.value_size + 7) / 8 * 8);
  uint32_t key = 0, layout;
  if (!lookup(fd, &key, value.data(), "settings")) throw KernelError(EPROTO, "bpf(BPF_MAP_LOOKUP_ELEM)", path);
  memcpy(&layout, value.data(), sizeof(layout));
  if (layout != LAYOUT_VERSION) {
    throw KernelError(EPROTO, "bpf(BPF_OBJ_GET)",
                      path + " has layout " + std::to_string(layout) + ", this program wants layout " +
                          std::to_string(LAYOUT_VERSION) +
                          (layout > LAYOUT_VERSION ? ": a newer version made it" : ": none of its versions is as old"));
  }
}

void check_shape(const MapInfo &info, const Shape &shape, const std::string &path) {
  if (fits(info, shape)) return;
  throw KernelError(EPROTO, "bpf(BPF_OBJ_GET)",
                    path + " is a map of " + shape_text(info.type, info.key_size, info.value_size) + "; wanted is " +
                        shape_text(shape.type, shape.key_size, shape.value_size));
}

// nullopt: no settings pin
std::optional<struct settings> read_settings(const std::string &dir, Fd &fd) {
  std::string path = dir + "/settings";
  fd = get_object(path, true);
  if (!fd) return std::nullopt;
  MapInfo info = map_info(fd.get(), path);
  check_layout(info, fd.get(), path);
  check_shape(info, SHAPES[SETTINGS], path);
  struct settings settings = {};
  uint32_t key = 0;
  if (!lookup(fd.get(), &key, &settings, "settings")) throw KernelError(EPROTO, "bpf(BPF_MAP_LOOKUP_ELEM)", path);
  return settings;
}

void fill_random(void *out, size_t size) {
  ssize_t count = kernel_call("getrandom", [&] { return getrandom(out, size, 0); });
  if (count != static_cast<ssize_t>(size)) {
    throw KernelError(count < 0 ? errno : EIO, "getrandom", std::to_string(size) + " bytes");
  }
}

struct settings new_settings(const WantedState &wanted) {
  struct settings settings = {};
  settings.layout = LAYOUT_VERSION;
  settings.max_pods = wanted.max_pods;
  settings.max_flows = wanted.max_flows;
  settings.direct_flows = wanted.direct_flows;
  settings.mark_bypass = wanted.mark_bypass;
  settings.mark_to_proxy = wanted.mark_to_proxy;
  settings.mark_tproxy = wanted.mark_tproxy;
  settings.variant = wanted.variant;
  settings.sign[0] = 0x02;  // a locally administered unicast address
  fill_random(&settings.sign[1], 4);
  fill_random(settings.direct_seed, sizeof(settings.direct_seed));
  read_boot_id(settings.boot_id);
  return settings;
}

}  // namespace

const char *map_name(Map map) { return SHAPES[map].name; }

State::State(const std::string &dir, const std::string &over) {
  std::optional<struct settings> settings;
  if (!over.empty()) settings = read_settings(over, maps_[SETTINGS]);
  if (!settings) settings = read_settings(dir, maps_[SETTINGS]);
  if (!settings) throw KernelError(ENOENT, "bpf(BPF_OBJ_GET)", dir + "/settings");
  settings_ = *settings;
  for (int i = 0; i < SETTINGS; i++) {
    std::string path = over + "/" + SHAPES[i].name;
    if (!over.empty()) maps_[i] = get_object(path, true);
    if (!maps_[i]) {
      path = dir + "/" + SHAPES[i].name;
      maps_[i] = get_object(path, false);
    }
    check_shape(map_info(maps_[i].get(), path), SHAPES[i], path);
  }
}

int State::fd(Map map) const {
  if (!maps_[map]) throw KernelError(EBADF, "bpf", "the state was closed");
  return maps_[map].get();
}

void State::close() {
  for (Fd &map : maps_) map.reset();
}

void create_state(const std::string &dir, const WantedState &wanted) {
  Fd settings_fd;
  auto present = read_settings(dir, settings_fd);
  // A map that is missing beside finished settings gets the size which those say, so that they stay true.
  const struct settings settings = present ? *present : new_settings(wanted);
  for (int i = 0; i < SETTINGS; i++) {
    Map map = static_cast<Map>(i);
    std::string path = dir + "/" + SHAPES[i].name;
    Fd fd = get_object(path, true);
    if (fd) {
      MapInfo info = map_info(fd.get(), path);
      if (present) {
        check_shape(info, SHAPES[i], path);
        continue;
      }
      if (fits(info, SHAPES[i]) && (map == EVENTS || map == PROXY_SOCKETS || info.max_entries == capacity(map, settings))) continue;
      // Left by a creation that was interrupted and wanted another size: nobody has opened it.
      remove_file(path);
    }
    pin_object(make_state_map(map, settings, path).get(), path);
  }
  if (present) return;
  std::string path = dir + "/settings";
  Fd fd = make_state_map(SETTINGS, settings, path);
  uint32_t key = 0;
  update(fd.get(), &key, &settings, Update::any, "settings");
  pin_object(fd.get(), path);
}

namespace {

// Calls `visit` with each key once. GET_NEXT_KEY begins anew when the key that it is given has been deleted, so
// repeated keys are skipped and the number of steps is limited: a walk through a map that others keep changing ends.
void walk(const State &state, Map map, const std::function<void(const std::string &)> &visit) {
  const Shape &shape = SHAPES[map];
  const uint64_t limit = 2ull * capacity(map, state.settings()) + 64;
  std::unordered_set<std::string> seen;
  std::string key(shape.key_size, '\0'), next(shape.key_size, '\0');
  bool more = next_key(state.fd(map), nullptr, next.data(), shape.name);
  for (uint64_t step = 0; more && step < limit; step++) {
    if (seen.insert(next).second) visit(next);
    key.swap(next);
    more = next_key(state.fd(map), key.data(), next.data(), shape.name);
  }
}

unsigned possible_cpus() {
  static unsigned cpus = 0;
  if (cpus) return cpus;
  // "0", "0-7", "0-3,8-11": values are per possible CPU, so the last number counts.
  const char *path = "/sys/devices/system/cpu/possible";
  std::string text = read_file(path);
  size_t start = text.find_last_of(",-");
  char *end = nullptr;
  const char *number = text.c_str() + (start == std::string::npos ? 0 : start + 1);
  unsigned long last = strtoul(number, &end, 10);
  if (end == number) throw KernelError(EPROTO, "read", std::string(path) + ": \"" + text + "\"");
  return cpus = static_cast<unsigned>(last) + 1;
}

uint64_t memlock(int map) {
  std::string path = "/proc/self/fdinfo/" + std::to_string(map);
  std::string text = read_file(path);
  size_t at = text.find("memlock:");
  if (at == std::string::npos) throw KernelError(EPROTO, "read", path + " has no memlock");
  return strtoull(text.c_str() + at + strlen("memlock:"), nullptr, 10);
}

// `visit` gets keys and values of so many entries. false where the kernel cannot do it for this type of map (HASH_OF_MAPS
// below 5.13, all below 5.6).
bool read_in_batches(int fd, const Shape &shape,
                     const std::function<void(const uint8_t *, const uint8_t *, uint32_t)> &visit) {
  constexpr uint32_t BATCH = 4096;
  const size_t value_size = shape.type == BPF_MAP_TYPE_PERCPU_HASH
                                ? static_cast<size_t>((shape.value_size + 7) / 8 * 8) * possible_cpus()
                                : shape.value_size;
  const uint32_t batch = value_size > 1024 ? BATCH / 16 : BATCH;
  std::vector<uint8_t> key_buffer(static_cast<size_t>(batch) * shape.key_size);
  std::vector<uint8_t> values(batch * value_size);
  // A hash's position is the number of a bucket; the kernel asks for the size of a key at least.
  std::vector<uint8_t> position(std::max<size_t>(shape.key_size, 8));
  for (bool first = true;; first = false) {
    uint32_t count = batch;
    int result = kernel_call("bpf(BPF_MAP_LOOKUP_BATCH)", [&] {
      return bpf_map_lookup_batch(fd, first ? nullptr : position.data(), position.data(), key_buffer.data(),
                                  values.data(), &count, nullptr);
    });
    int error = errno;
    if (result < 0 && first && (error == EINVAL || error == EOPNOTSUPP || error == 524 /* ENOTSUPP */)) {
      return false;
    }
    // ENOENT: that was the end; ENOSPC: one bucket holds more than a batch, which hashing makes impossible here.
    if (result < 0 && error != ENOENT) throw KernelError(error, "bpf(BPF_MAP_LOOKUP_BATCH)", shape.name);
    visit(key_buffer.data(), values.data(), count);
    if (result < 0) return true;
  }
}

uint64_t count_entries(const State &state, Map map) {
  if (map == SETTINGS || map == TRACE || map == IDENTITY || map == JUMP_LOOKUP) return 1;
  if (map == JUMP) return SLOT_COUNT;
  if (map == EVENTS || map == PROXY_SOCKETS) return 0;
  uint64_t count = 0;
  auto add = [&](const uint8_t *, const uint8_t *, uint32_t entries) { count += entries; };
  if (read_in_batches(state.fd(map), SHAPES[map], add)) return count;
  walk(state, map, [&](const std::string &) { count++; });
  return count;
}

}  // namespace

std::vector<std::string> keys(const State &state, Map map) {
  std::vector<std::string> found;
  walk(state, map, [&](const std::string &key) { found.push_back(key); });
  return found;
}

std::vector<std::string> grow_state(const State &state, const std::string &dir, const Capacity &larger) {
  struct settings wanted = state.settings();
  wanted.max_pods = larger.max_pods;
  wanted.max_flows = larger.max_flows;
  wanted.direct_flows = larger.direct_flows;
  wanted.check_cgroups = checks_cgroups(state) ? 1 : 0;
  std::vector<std::string> grown;
  for (Map map : {INTERFACES, ENDPOINTS, FLOWS, DIRECT, EXCLUSIONS, LISTENERS, COUNTERS, ATTACHMENTS}) {
    const std::string path = dir + "/" + SHAPES[map].name;
    // The number of sets decides in which one a flow is.
    const bool moves = map == DIRECT && direct_sets(wanted) != direct_sets(state.settings());
    if (!moves && map_info(state.fd(map), path).max_entries >= capacity(map, wanted)) continue;
    pin_object(make_state_map(map, wanted, path).get(), path);
    grown.push_back(SHAPES[map].name);
  }
  const std::string path = dir + "/" + SHAPES[SETTINGS].name;
  Fd settings = make_state_map(SETTINGS, wanted, path);
  uint32_t key = 0;
  update(settings.get(), &key, &wanted, Update::any, "settings");
  pin_object(settings.get(), path);
  grown.push_back(SHAPES[SETTINGS].name);
  return grown;
}

namespace {

bool is_same(const State &a, const State &b, Map map) {
  return map_info(a.fd(map), SHAPES[map].name).id == map_info(b.fd(map), SHAPES[map].name).id;
}

}  // namespace

void copy_records(const State &from, const State &to) {
  if (!is_same(from, to, SETTINGS)) set_check_cgroups(to, checks_cgroups(from));
  for (Map map : {INTERFACES, ENDPOINTS, EXCLUSIONS, ATTACHMENTS}) {
    if (is_same(from, to, map)) continue;
    const char *name = SHAPES[map].name;
    std::unordered_set<std::string> present;
    std::vector<uint8_t> value(SHAPES[map].value_size);
    for (const std::string &key : keys(from, map)) {
      if (map == EXCLUSIONS) {
        uint32_t ifindex;
        memcpy(&ifindex, key.data(), sizeof(ifindex));
        put_exclusions(to, ifindex, exclusions(from, ifindex));
      } else if (lookup(from.fd(map), key.data(), value.data(), name)) {
        update(to.fd(map), key.data(), value.data(), Update::any, name);
      } else {
        continue;
      }
      present.insert(key);
    }
    for (const std::string &key : keys(to, map)) {
      if (present.count(key)) continue;
      if (map == EXCLUSIONS) {
        uint32_t ifindex;
        memcpy(&ifindex, key.data(), sizeof(ifindex));
        delete_exclusions(to, ifindex);
      } else {
        erase(to.fd(map), key.data(), name);
      }
    }
  }
}

// The attempts count as one kernel call.
void copy_flows(const State &from, const State &to) {
  if (is_same(from, to, FLOWS)) return;
  struct flow value;
  const std::vector<std::string> all = keys(from, FLOWS);
  int result = kernel_call("bpf(BPF_MAP_UPDATE_ELEM)", [&] {
    for (const std::string &key : all) {
      if (bpf_map_lookup_elem(from.fd(FLOWS), key.data(), &value) < 0) {
        if (errno != ENOENT) return -1;
      } else if (bpf_map_update_elem(to.fd(FLOWS), key.data(), &value, BPF_NOEXIST) < 0 && errno != EEXIST) {
        return -1;
      }
    }
    return 0;
  });
  if (result < 0) throw KernelError(errno, "bpf(BPF_MAP_UPDATE_ELEM)", "map flows");
}

// The attempts of each map count as one kernel call.
void copy_traffic(const State &from, const State &to, uint32_t ifindex) {
  auto copy = [&](Map map, const void *key, void *value) {
    if (bpf_map_lookup_elem(from.fd(map), key, value) < 0) return errno == ENOENT;
    return bpf_map_update_elem(to.fd(map), key, value, BPF_NOEXIST) == 0 || errno == EEXIST;
  };
  auto check = [](int result, Map map) {
    if (result < 0) throw KernelError(errno, "bpf(BPF_MAP_UPDATE_ELEM)", std::string("map ") + SHAPES[map].name);
  };
  if (!is_same(from, to, COUNTERS)) {
    std::vector<struct counter> values(possible_cpus());
    check(kernel_call("bpf(BPF_MAP_UPDATE_ELEM)", [&] {
      for (const Name *program = PROGRAMS; program->word; program++) {
        for (uint16_t reason = 1; reason < REASON_MAX; reason++) {
          struct counter_key key = {ifindex, static_cast<uint16_t>(program->number), reason};
          if (!copy(COUNTERS, &key, values.data())) return -1;
        }
      }
      return 0;
    }), COUNTERS);
  }
  if (!is_same(from, to, DIRECT) && direct_sets(from.settings()) == direct_sets(to.settings())) {
    struct direct_set set;
    check(kernel_call("bpf(BPF_MAP_UPDATE_ELEM)", [&] {
      for (struct direct_key key = {ifindex, 0}; key.set < direct_sets(from.settings()); key.set++) {
        if (!copy(DIRECT, &key, &set)) return -1;
      }
      return 0;
    }), DIRECT);
  }
}

void write_capacity(const State &state) {
  struct settings settings = {};
  uint32_t key = 0;
  if (!lookup(state.fd(SETTINGS), &key, &settings, "settings")) {
    throw KernelError(EPROTO, "bpf(BPF_MAP_LOOKUP_ELEM)", "map settings");
  }
  settings.max_pods = map_info(state.fd(INTERFACES), "interfaces").max_entries;
  update(state.fd(SETTINGS), &key, &settings, Update::any, "settings");
}

// The kernel waits so for whoever changes a map of maps; membarrier(2) does too, but not where CPUs are nohz_full.
void wait_for_programs() {
  struct settings one = {};
  one.max_pods = 1;
  Fd outer = make_state_map(EXCLUSIONS, one, "a map of maps to wait by"), inner = make_exclusion_trie();
  const uint32_t key = 0, value = static_cast<uint32_t>(inner.get());
  update(outer.get(), &key, &value, Update::any, "a map of maps to wait by");
}

uint32_t direct_sets(const struct settings &settings) {
  return std::max<uint32_t>(1, (settings.direct_flows + DIRECT_WAYS - 1) / DIRECT_WAYS);
}

std::vector<struct tuple> direct_flows(const State &state, uint32_t ifindex) {
  std::vector<struct tuple> flows;
  struct direct_set set;
  for (struct direct_key key = {ifindex, 0}; key.set < direct_sets(state.settings()); key.set++) {
    if (!lookup(state.fd(DIRECT), &key, &set, "direct")) continue;
    for (int way = 0; way < DIRECT_WAYS; way++) {
      if (set.check[way]) flows.push_back(set.tuple[way]);
    }
  }
  return flows;
}

Import import_direct_flow(int program, uint32_t ifindex, const struct tuple &flow) {
  struct direct_import wanted = {};
  wanted.ifindex = ifindex;
  wanted.tuple = flow;
  uint8_t packet[sizeof(wanted)], out[sizeof(wanted) + 256];
  memcpy(packet, &wanted, sizeof(wanted));
  TestRun run = test_run(program, packet, sizeof(packet), out, sizeof(out), {0, 0, 0, 1, 0});
  return run.verdict == 1 ? Import::done : run.verdict == 0 ? Import::redirected : Import::no_memory;
}

std::vector<uint32_t> interfaces_with_direct_flows(const State &state) {
  std::vector<uint32_t> found;
  std::unordered_set<uint32_t> seen;
  walk(state, DIRECT, [&](const std::string &bytes) {
    struct direct_key key;
    memcpy(&key, bytes.data(), sizeof(key));
    if (seen.insert(key.ifindex).second) found.push_back(key.ifindex);
  });
  return found;
}

// By trying every key, because a walk would meet the sets of all pods. The attempts count as one kernel call.
uint32_t delete_direct_flows(const State &state, uint32_t ifindex) {
  uint32_t deleted = 0;
  const int map = state.fd(DIRECT);
  const uint32_t sets = direct_sets(state.settings());
  int result = kernel_call("bpf(BPF_MAP_DELETE_ELEM)", [&] {
    for (struct direct_key key = {ifindex, 0}; key.set < sets; key.set++) {
      if (bpf_map_delete_elem(map, &key) == 0) deleted++;
      else if (errno != ENOENT) return -1;
    }
    return 0;
  });
  if (result < 0) throw KernelError(errno, "bpf(BPF_MAP_DELETE_ELEM)", "map direct");
  return deleted;
}

// The attempts count as one kernel call.
uint32_t delete_flows(const State &state, uint32_t ifindex) {
  const int map = state.fd(FLOWS);
  std::vector<struct tuple> found;
  auto choose = [&](const uint8_t *keys, const uint8_t *values, uint32_t entries) {
    for (uint32_t i = 0; i < entries; i++) {
      struct flow flow;
      memcpy(&flow, values + i * sizeof(flow), sizeof(flow));
      if (flow.ifindex == ifindex) memcpy(&found.emplace_back(), keys + i * sizeof(struct tuple), sizeof(struct tuple));
    }
  };
  if (!read_in_batches(map, SHAPES[FLOWS], choose)) {
    walk(state, FLOWS, [&](const std::string &key) {
      struct flow flow;
      const auto *bytes = reinterpret_cast<const uint8_t *>(key.data());
      if (lookup(map, key.data(), &flow, "flows")) choose(bytes, reinterpret_cast<const uint8_t *>(&flow), 1);
    });
  }
  uint32_t deleted = 0;
  int result = kernel_call("bpf(BPF_MAP_DELETE_ELEM)", [&] {
    for (const struct tuple &key : found) {
      if (bpf_map_delete_elem(map, &key) == 0) deleted++;
      else if (errno != ENOENT) return -1;
    }
    return 0;
  });
  if (result < 0) throw KernelError(errno, "bpf(BPF_MAP_DELETE_ELEM)", "map flows");
  return deleted;
}

bool delete_exclusions(const State &state, uint32_t ifindex) {
  const int outer = state.fd(EXCLUSIONS);
  uint32_t id;
  if (!lookup(outer, &ifindex, &id, "exclusions")) return false;
  int result = call_until(
      [=] { return kernel_call("bpf(BPF_MAP_DELETE_ELEM)", [&] { return bpf_map_delete_elem(outer, &ifindex); }); },
      [&] { return bpf_map_lookup_elem(outer, &ifindex, &id) < 0 && errno == ENOENT; });
  if (result == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "bpf(BPF_MAP_DELETE_ELEM)", "map exclusions");
}

void put_exclusions(const State &state, uint32_t ifindex, const std::vector<ExclusionRule> &rules) {
  Fd inner = make_exclusion_trie();
  for (const ExclusionRule &rule : rules) {
    try {
      update(inner.get(), &rule.key, &rule.reason, Update::any, "exclusion_rules");
    } catch (KernelError &error) {
      // What a full trie says.
      if (error.number == ENOSPC) error.number = E2BIG;
      throw;
    }
  }
  const int outer = state.fd(EXCLUSIONS);
  const uint32_t value = static_cast<uint32_t>(inner.get());
  const uint32_t inner_id = map_info(inner.get(), "exclusion_rules").id;
  uint32_t id;
  int result = call_until(
      [=] {
        return kernel_call("bpf(BPF_MAP_UPDATE_ELEM)",
                           [&] { return bpf_map_update_elem(outer, &ifindex, &value, BPF_ANY); });
      },
      [&] { return bpf_map_lookup_elem(outer, &ifindex, &id) == 0 && id == inner_id; });
  if (result == 0) return;
  KernelError error(errno, "bpf(BPF_MAP_UPDATE_ELEM)", "map exclusions");
  if (error.number == E2BIG) error.object += ", which is full";
  throw error;
}

std::vector<ExclusionRule> exclusions(const State &state, uint32_t ifindex) {
  std::vector<ExclusionRule> rules;
  uint32_t id;
  if (!lookup(state.fd(EXCLUSIONS), &ifindex, &id, "exclusions")) return rules;
  Fd inner = map_by_id(id);
  if (!inner) return rules;
  // Nobody changes a trie once it is in place.
  ExclusionRule rule = {};
  bool more = next_key(inner.get(), nullptr, &rule.key, "exclusion_rules");
  while (more) {
    if (lookup(inner.get(), &rule.key, &rule.reason, "exclusion_rules")) rules.push_back(rule);
    struct exclusion next;
    more = next_key(inner.get(), &rule.key, &next, "exclusion_rules");
    rule.key = next;
  }
  return rules;
}

std::vector<CounterSum> counters(const State &state) {
  // Each CPU's value begins at a multiple of 8 bytes, which struct counter is.
  std::vector<struct counter> values(possible_cpus());
  std::vector<CounterSum> sums;
  for (const std::string &key : keys(state, COUNTERS)) {
    if (!lookup(state.fd(COUNTERS), key.data(), values.data(), "counters")) continue;
    CounterSum sum = {};
    memcpy(&sum.key, key.data(), sizeof(sum.key));
    for (const struct counter &value : values) {
      sum.packets += value.packets;
      sum.bytes += value.bytes;
    }
    sums.push_back(sum);
  }
  return sums;
}

// By trying every key that the programs can have written: their number is fixed, that of all counters is not. The
// attempts count as one kernel call.
uint32_t delete_counters(const State &state, uint32_t ifindex) {
  uint32_t deleted = 0;
  int map = state.fd(COUNTERS);
  int result = kernel_call("bpf(BPF_MAP_DELETE_ELEM)", [&] {
    for (const Name *program = PROGRAMS; program->word; program++) {
      for (uint16_t reason = 1; reason < REASON_MAX; reason++) {
        struct counter_key key = {ifindex, static_cast<uint16_t>(program->number), reason};
        if (bpf_map_delete_elem(map, &key) == 0) deleted++;
        else if (errno != ENOENT) return -1;
      }
    }
    return 0;
  });
  if (result < 0) throw KernelError(errno, "bpf(BPF_MAP_DELETE_ELEM)", "map counters");
  return deleted;
}

bool checks_cgroups(const State &state) {
  struct settings settings = {};
  uint32_t key = 0;
  return lookup(state.fd(SETTINGS), &key, &settings, "settings") && settings.check_cgroups != 0;
}

void set_check_cgroups(const State &state, bool on) {
  struct settings settings = state.settings();
  uint32_t key = 0;
  settings.check_cgroups = on ? 1 : 0;
  update(state.fd(SETTINGS), &key, &settings, Update::any, "settings");
}

std::vector<MapUsage> map_usage(const State &state) {
  std::vector<MapUsage> usage;
  for (int i = 0; i < MAP_COUNT; i++) {
    Map map = static_cast<Map>(i);
    MapInfo info = map_info(state.fd(map), SHAPES[i].name);
    MapUsage entry = {SHAPES[i].name, count_entries(state, map), info.max_entries, memlock(state.fd(map))};
    if (map == EXCLUSIONS) {
      for (const std::string &key : keys(state, map)) {
        uint32_t id;
        if (!lookup(state.fd(map), key.data(), &id, SHAPES[i].name)) continue;
        if (Fd inner = map_by_id(id)) entry.bytes += memlock(inner.get());
      }
    }
    usage.push_back(entry);
  }
  return usage;
}

bool parse_boot_id(const std::string &text, uint8_t out[16]) {
  if (text.size() != 36) return false;
  int bytes = 0;
  for (size_t i = 0; i < 36;) {
    if (i == 8 || i == 13 || i == 18 || i == 23) {
      if (text[i++] != '-') return false;
      continue;
    }
    int value = 0;
    for (int digit = 0; digit < 2; digit++, i++) {
      char c = text[i];
      if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
      else if (c >= 'a' && c <= 'f') value = value * 16 + (c - 'a' + 10);
      else return false;
    }
    out[bytes++] = static_cast<uint8_t>(value);
  }
  return bytes == 16;
}

std::string boot_id_text(const uint8_t boot_id[16]) {
  std::string text;
  for (int i = 0; i < 16; i++) {
    char digits[3];
    snprintf(digits, sizeof(digits), "%02x", boot_id[i]);
    text += digits;
    if (i == 3 || i == 5 || i == 7 || i == 9) text += '-';
  }
  return text;
}

void read_boot_id(uint8_t out[16]) {
  const char *path = "/proc/sys/kernel/random/boot_id";
  std::string text = read_file(path);
  if (!text.empty() && text.back() == '\n') text.pop_back();
  if (!parse_boot_id(text, out)) throw KernelError(EPROTO, "read", std::string(path) + ": \"" + text + "\"");
}

}  // namespace ambient
