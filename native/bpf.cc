// SPDX-License-Identifier: Apache-2.0
#include "bpf.h"

#include <bpf/bpf.h>

#include <cerrno>

#include "error.h"
#include "faults.h"

namespace ambient {

Fd get_object(const std::string &path, bool absent_ok) {
  Fd fd(kernel_call("bpf(BPF_OBJ_GET)", [&] { return bpf_obj_get(path.c_str()); }));
  if (!fd && !(absent_ok && errno == ENOENT)) throw KernelError(errno, "bpf(BPF_OBJ_GET)", path);
  return fd;
}

void pin_object(int fd, const std::string &path) {
  if (kernel_call("bpf(BPF_OBJ_PIN)", [&] { return bpf_obj_pin(fd, path.c_str()); }) < 0) {
    throw KernelError(errno, "bpf(BPF_OBJ_PIN)", path);
  }
}

bool lookup(int map, const void *key, void *value, const char *map_name) {
  if (kernel_call("bpf(BPF_MAP_LOOKUP_ELEM)", [&] { return bpf_map_lookup_elem(map, key, value); }) == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "bpf(BPF_MAP_LOOKUP_ELEM)", std::string("map ") + map_name);
}

static int try_update(int map, const void *key, const void *value, Update mode) {
  return kernel_call("bpf(BPF_MAP_UPDATE_ELEM)",
                     [&] { return bpf_map_update_elem(map, key, value, static_cast<uint64_t>(mode)); });
}

void update(int map, const void *key, const void *value, Update mode, const char *map_name) {
  if (try_update(map, key, value, mode) < 0) {
    KernelError error(errno, "bpf(BPF_MAP_UPDATE_ELEM)", std::string("map ") + map_name);
    if (error.number == E2BIG) error.object += ", which is full";
    throw error;
  }
}

bool replace(int map, const void *key, const void *value, const char *map_name) {
  if (try_update(map, key, value, Update::exist) == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "bpf(BPF_MAP_UPDATE_ELEM)", std::string("map ") + map_name);
}

bool erase(int map, const void *key, const char *map_name) {
  if (kernel_call("bpf(BPF_MAP_DELETE_ELEM)", [&] { return bpf_map_delete_elem(map, key); }) == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "bpf(BPF_MAP_DELETE_ELEM)", std::string("map ") + map_name);
}

bool next_key(int map, const void *key, void *next, const char *map_name) {
  if (kernel_call("bpf(BPF_MAP_GET_NEXT_KEY)", [&] { return bpf_map_get_next_key(map, key, next); }) == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "bpf(BPF_MAP_GET_NEXT_KEY)", std::string("map ") + map_name);
}

MapInfo map_info(int fd, const std::string &object) {
  bpf_map_info info = {};
  uint32_t size = sizeof(info);
  if (kernel_call("bpf(BPF_OBJ_GET_INFO_BY_FD)", [&] { return bpf_obj_get_info_by_fd(fd, &info, &size); }) < 0) {
    throw KernelError(errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", object);
  }
  return {info.id, info.type, info.key_size, info.value_size, info.max_entries, info.map_flags};
}

ProgramInfo program_info(int fd) {
  bpf_prog_info info = {};
  uint32_t size = sizeof(info);
  if (kernel_call("bpf(BPF_OBJ_GET_INFO_BY_FD)", [&] { return bpf_obj_get_info_by_fd(fd, &info, &size); }) < 0) {
    throw KernelError(errno, "bpf(BPF_OBJ_GET_INFO_BY_FD)", "program fd " + std::to_string(fd));
  }
  static const char digits[] = "0123456789abcdef";
  std::string tag;
  for (uint8_t byte : info.tag) {
    tag += digits[byte >> 4];
    tag += digits[byte & 15];
  }
  return {info.id, info.name, tag, info.verified_insns};
}

Fd program_by_id(uint32_t id) {
  Fd fd(kernel_call("bpf(BPF_PROG_GET_FD_BY_ID)", [&] { return bpf_prog_get_fd_by_id(id); }));
  if (!fd && errno != ENOENT) throw KernelError(errno, "bpf(BPF_PROG_GET_FD_BY_ID)", "program " + std::to_string(id));
  return fd;
}

Fd map_by_id(uint32_t id) {
  Fd fd(kernel_call("bpf(BPF_MAP_GET_FD_BY_ID)", [&] { return bpf_map_get_fd_by_id(id); }));
  if (!fd && errno != ENOENT) throw KernelError(errno, "bpf(BPF_MAP_GET_FD_BY_ID)", "map " + std::to_string(id));
  return fd;
}

TestRun test_run(int program, const uint8_t *packet, size_t size, uint8_t *out, size_t out_size,
                 const TestRunInput &input) {
  __sk_buff in = {};
  in.mark = input.mark;
  in.ingress_ifindex = input.ingress_ifindex;
  in.ifindex = input.ifindex;
  in.cb[0] = input.interface_id;
  __sk_buff after = {};
  LIBBPF_OPTS(bpf_test_run_opts, options);
  options.data_in = packet;
  options.data_size_in = static_cast<uint32_t>(size);
  options.data_out = out;
  options.data_size_out = static_cast<uint32_t>(out_size);
  options.ctx_in = &in;
  options.ctx_size_in = sizeof(in);
  options.ctx_out = &after;
  options.ctx_size_out = sizeof(after);
  options.repeat = static_cast<int>(input.repeat);
  int result = kernel_call("bpf(BPF_PROG_TEST_RUN)", [&] { return bpf_prog_test_run_opts(program, &options); });
  if (result < 0) throw KernelError(errno, "bpf(BPF_PROG_TEST_RUN)", "program fd " + std::to_string(program));
  return {static_cast<int32_t>(options.retval), options.data_size_out, after.mark, after.cb[0], options.duration};
}

}  // namespace ambient
