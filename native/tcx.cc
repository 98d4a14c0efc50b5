// SPDX-License-Identifier: Apache-2.0
#include "tcx.h"

#include <linux/bpf.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstring>

#include "bpf.h"
#include "error.h"
#include "faults.h"
#include "files.h"
#include "netns.h"

namespace ambient {

namespace {

// From include/uapi/linux/bpf.h of Linux 6.6, which the distribution's headers may predate.
constexpr uint32_t TCX_INGRESS = 46;
constexpr uint32_t TCX_EGRESS = 47;
constexpr uint32_t LINK_TYPE_TCX = 11;
constexpr uint32_t LINK_TYPE_NETNS = 5;
constexpr uint32_t BEFORE = 1u << 3;
constexpr uint32_t AFTER = 1u << 4;

// union bpf_attr.link_create
struct LinkCreate {
  uint32_t prog_fd;
  uint32_t target_ifindex;
  uint32_t attach_type;
  uint32_t flags;
  uint32_t relative_fd;  // 0 with BEFORE or AFTER: the head or the tail
  uint32_t pad;
  uint64_t expected_revision;  // 0: whatever it is
};

// union bpf_attr.query
struct Query {
  uint32_t target_ifindex;
  uint32_t attach_type;
  uint32_t query_flags;
  uint32_t attach_flags;
  uint64_t prog_ids;
  uint32_t count;
  uint32_t pad;
  uint64_t prog_attach_flags;
  uint64_t link_ids;
  uint64_t link_attach_flags;
  uint64_t revision;
};

// struct bpf_link_info with its members tcx {ifindex, attach_type} and netns {netns_ino, attach_type}
struct LinkInfo {
  uint32_t type;
  uint32_t id;
  uint32_t prog_id;
  uint32_t pad;
  uint32_t first;
  uint32_t attach_type;
};

// union bpf_attr.link_update
struct LinkUpdate {
  uint32_t link_fd;
  uint32_t new_prog_fd;
  uint32_t flags;
  uint32_t old_prog_fd;
};

struct LinkDetach {
  uint32_t link_fd;
};

// union bpf_attr.info
struct ObjectInfo {
  uint32_t fd;
  uint32_t size;
  uint64_t info;
};

template <typename Attributes>
int bpf_call(const char *name, int command, Attributes &attributes) {
  return kernel_call(name, [&] { return static_cast<int>(syscall(__NR_bpf, command, &attributes, sizeof(attributes))); });
}

uint32_t attach_type(Direction direction) { return direction == Direction::ingress ? TCX_INGRESS : TCX_EGRESS; }

std::string text(int netns, uint32_t ifindex, Direction direction) {
  return std::string(direction_text(direction)) + " of ifindex " + std::to_string(ifindex) + " in " + netns_text(netns);
}

LinkInfo any_link_info(int fd, const std::string &pin_path) {
  // The kernel fills as much of its own, larger struct as fits here.
  LinkInfo info = {};
  ObjectInfo attributes = {static_cast<uint32_t>(fd), sizeof(info), reinterpret_cast<uint64_t>(&info)};
  if (bpf_call("bpf(BPF_OBJ_GET_INFO_BY_FD)", BPF_OBJ_GET_INFO_BY_FD, attributes) < 0) {
    throw KernelError(errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", pin_path);
  }
  if (info.type != LINK_TYPE_TCX && info.type != LINK_TYPE_NETNS) {
    throw KernelError(EINVAL, "bpf(BPF_OBJ_GET_INFO_BY_FD)", pin_path + " is a link of another kind");
  }
  return info;
}

}  // namespace

uint32_t attach_tcx(int netns, uint32_t ifindex, Direction direction, int program, bool first,
                    const std::string &pin_path) {
  LinkCreate attributes = {};
  attributes.prog_fd = static_cast<uint32_t>(program);
  attributes.target_ifindex = ifindex;
  attributes.attach_type = attach_type(direction);
  attributes.flags = first ? BEFORE : AFTER;
  Fd link;
  {
    NetnsScope scope(netns);
    link = Fd(bpf_call("bpf(BPF_LINK_CREATE)", BPF_LINK_CREATE, attributes));
    if (!link) throw KernelError(errno, "bpf(BPF_LINK_CREATE)", text(netns, ifindex, direction));
  }
  // Until it is pinned the link lives by its descriptor: an exception from here on takes it away again.
  uint32_t id = any_link_info(link.get(), pin_path).id;
  pin_object(link.get(), pin_path);
  return id;
}

uint32_t attach_lookup(int netns, int program, const std::string &pin_path) {
  LinkCreate attributes = {};
  attributes.prog_fd = static_cast<uint32_t>(program);
  attributes.target_ifindex = static_cast<uint32_t>(netns);  // target_fd of the same union
  attributes.attach_type = BPF_SK_LOOKUP;
  Fd link(bpf_call("bpf(BPF_LINK_CREATE)", BPF_LINK_CREATE, attributes));
  if (!link) throw KernelError(errno, "bpf(BPF_LINK_CREATE)", "socket lookup of " + netns_text(netns));
  uint32_t id = any_link_info(link.get(), pin_path).id;
  pin_object(link.get(), pin_path);
  return id;
}

std::vector<TcxEntry> query_tcx(int netns, uint32_t ifindex, Direction direction) {
  for (uint32_t capacity = 64;; capacity *= 2) {
    std::vector<uint32_t> programs(capacity), links(capacity);
    Query query = {};
    query.target_ifindex = ifindex;
    query.attach_type = attach_type(direction);
    query.prog_ids = reinterpret_cast<uint64_t>(programs.data());
    query.link_ids = reinterpret_cast<uint64_t>(links.data());
    query.count = capacity;
    int result, error;
    {
      NetnsScope scope(netns);
      result = bpf_call("bpf(BPF_PROG_QUERY)", BPF_PROG_QUERY, query);
      error = errno;
    }
    if (result < 0 && error == ENOSPC && capacity < 4096) continue;
    // ENOENT: nothing was ever attached there.
    if (result < 0 && error == ENOENT) return {};
    if (result < 0) throw KernelError(error, "bpf(BPF_PROG_QUERY)", text(netns, ifindex, direction));
    std::vector<TcxEntry> entries;
    for (uint32_t i = 0; i < query.count; i++) entries.push_back({programs[i], links[i]});
    return entries;
  }
}

std::optional<BpfLinkInfo> link_info(const std::string &pin_path) {
  Fd link = get_object(pin_path, true);
  if (!link) return std::nullopt;
  LinkInfo info = any_link_info(link.get(), pin_path);
  if (info.type == LINK_TYPE_NETNS) {
    return BpfLinkInfo{info.id, info.prog_id, true, 0, Direction::ingress, info.first};
  }
  Direction direction = info.attach_type == TCX_INGRESS ? Direction::ingress : Direction::egress;
  return BpfLinkInfo{info.id, info.prog_id, false, info.first, direction, 0};
}

void update_link(const std::string &pin_path, int program) {
  Fd link = get_object(pin_path, false);
  LinkUpdate attributes = {static_cast<uint32_t>(link.get()), static_cast<uint32_t>(program), 0, 0};
  if (bpf_call("bpf(BPF_LINK_UPDATE)", BPF_LINK_UPDATE, attributes) < 0) {
    throw KernelError(errno, "bpf(BPF_LINK_UPDATE)", pin_path);
  }
}

bool detach_link(const std::string &pin_path) {
  Fd link = get_object(pin_path, true);
  if (!link) return false;
  // By command, because closing and unlinking would leave the program in place while anybody else (an agent) holds a
  // descriptor. A link whose device is gone has nothing to detach: ENOLINK, or EOPNOTSUPP from other kinds of link.
  LinkDetach attributes = {static_cast<uint32_t>(link.get())};
  int result = bpf_call("bpf(BPF_LINK_DETACH)", BPF_LINK_DETACH, attributes);
  if (result < 0 && errno != ENOLINK && errno != EOPNOTSUPP) {
    throw KernelError(errno, "bpf(BPF_LINK_DETACH)", pin_path);
  }
  remove_file(pin_path);
  return true;
}

bool have_tcx(int program) {
  LinkCreate attributes = {};
  attributes.prog_fd = static_cast<uint32_t>(program);
  attributes.target_ifindex = INT_MAX;
  attributes.attach_type = TCX_INGRESS;
  Fd link(bpf_call("bpf(BPF_LINK_CREATE)", BPF_LINK_CREATE, attributes));
  if (link) throw KernelError(EEXIST, "bpf(BPF_LINK_CREATE)", "ifindex 2147483647, which should not exist");
  if (errno == ENODEV) return true;
  if (errno == EINVAL) return false;
  throw KernelError(errno, "bpf(BPF_LINK_CREATE)", "probe for TCX");
}

}  // namespace ambient
