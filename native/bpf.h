// SPDX-License-Identifier: Apache-2.0
// bpf(2) as the other files use it: one gated function a command, errors thrown. libbpf's own wrappers are used where
// they know the command; TCX (6.6) is younger than the headers of the libbpf that is linked in, so its attributes are
// declared in tcx.cc.
#ifndef AMBIENT_NATIVE_BPF_H
#define AMBIENT_NATIVE_BPF_H

#include <linux/bpf.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "fd.h"

namespace ambient {

// nullptr where the pin is absent and `absent_ok`
Fd get_object(const std::string &path, bool absent_ok);
void pin_object(int fd, const std::string &path);

// false: no such key
bool lookup(int map, const void *key, void *value, const char *map_name);
enum class Update : uint64_t { any = BPF_ANY, no_exist = BPF_NOEXIST, exist = BPF_EXIST };
void update(int map, const void *key, const void *value, Update mode, const char *map_name);
// false: no such key, and none is made
bool replace(int map, const void *key, const void *value, const char *map_name);
bool erase(int map, const void *key, const char *map_name);
// false: `key` was the last. With a null key: the first.
bool next_key(int map, const void *key, void *next, const char *map_name);

struct MapInfo {
  uint32_t id;
  uint32_t type;
  uint32_t key_size;
  uint32_t value_size;
  uint32_t max_entries;
  uint32_t flags;
};
// EINVAL if `fd` is not a map
MapInfo map_info(int fd, const std::string &object);

struct ProgramInfo {
  uint32_t id;
  std::string name;
  std::string tag;
  // instructions that the verifier went through; 0 where the kernel does not say (before 5.16)
  uint32_t verified;
};
ProgramInfo program_info(int fd);
// a closed Fd if there is none
Fd program_by_id(uint32_t id);
Fd map_by_id(uint32_t id);

struct TestRun {
  int32_t verdict;
  size_t packet_size;
  uint32_t mark;
  uint32_t interface_id;  // what is left in cb[0]
  uint32_t nanoseconds;
};
struct TestRunInput {
  uint32_t mark;
  uint32_t ingress_ifindex;
  uint32_t ifindex;
  uint32_t repeat;
  uint32_t interface_id;  // in cb[0], where a stub puts it
};
TestRun test_run(int program, const uint8_t *packet, size_t size, uint8_t *out, size_t out_size,
                 const TestRunInput &input);

}  // namespace ambient

#endif
