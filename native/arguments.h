// SPDX-License-Identifier: Apache-2.0
// Checks of what JavaScript gives, before any kernel call. TypeScript validates what users wrote; a wrong type here is
// a programmer's error and becomes a TypeError that names the argument or the field.
#ifndef AMBIENT_NATIVE_ARGUMENTS_H
#define AMBIENT_NATIVE_ARGUMENTS_H

#include <napi.h>

#include <cstdint>
#include <string>
#include <vector>

#include "names.h"

namespace ambient {

[[noreturn]] void wrong_argument(const std::string &path, const std::string &expected);

bool to_boolean(Napi::Value value, const std::string &path);
// an integer in [minimum, maximum]
int64_t to_integer(Napi::Value value, const std::string &path, int64_t minimum, int64_t maximum);
uint32_t to_u32(Napi::Value value, const std::string &path);
uint64_t to_u64(Napi::Value value, const std::string &path);
// without NUL, at most `limit` bytes of UTF-8
std::string to_text(Napi::Value value, const std::string &path, size_t limit);
std::string to_path(Napi::Value value, const std::string &path);
void to_bytes(Napi::Value value, const std::string &path, void *out, size_t size);
void to_mac(Napi::Value value, const std::string &path, uint8_t out[6]);
// one of the words of `names`, as its number
uint32_t to_word(Napi::Value value, const std::string &path, const Name *names);
int to_fd(Napi::Value value, const std::string &path);
// a descriptor or HOST
int to_netns(Napi::Value value, const std::string &path);
uint32_t to_ifindex(Napi::Value value, const std::string &path);
uint16_t to_port(Napi::Value value, const std::string &path);

// The fields of one object; `path` says in messages which.
class Fields {
 public:
  Fields(Napi::Value value, std::string path);

  Napi::Value at(const char *name) const { return object_.Get(name); }
  std::string path(const char *name) const { return path_ + "." + name; }

  bool boolean(const char *name) const { return to_boolean(at(name), path(name)); }
  // false, or 0, where it is undefined
  bool optional_boolean(const char *name) const { return !at(name).IsUndefined() && boolean(name); }
  uint32_t optional_u32(const char *name) const { return at(name).IsUndefined() ? 0 : u32(name); }
  uint32_t u32(const char *name) const { return to_u32(at(name), path(name)); }
  uint64_t u64(const char *name) const { return to_u64(at(name), path(name)); }
  int64_t integer(const char *name, int64_t minimum, int64_t maximum) const {
    return to_integer(at(name), path(name), minimum, maximum);
  }
  // an nsid: -1 or more
  int32_t nsid(const char *name) const { return static_cast<int32_t>(integer(name, -1, INT32_MAX)); }
  uint16_t port(const char *name) const { return to_port(at(name), path(name)); }
  std::string text(const char *name, size_t limit) const { return to_text(at(name), path(name), limit); }
  // into a NUL-terminated array
  void text(const char *name, char *out, size_t size) const;
  void mac(const char *name, uint8_t out[6]) const { to_mac(at(name), path(name), out); }
  void bytes(const char *name, void *out, size_t size) const { to_bytes(at(name), path(name), out, size); }
  uint32_t word(const char *name, const Name *names) const { return to_word(at(name), path(name), names); }
  Fields object(const char *name) const { return Fields(at(name), path(name)); }
  // an array of at most `limit`
  std::vector<Napi::Value> array(const char *name, size_t limit) const;

 private:
  Napi::Object object_;
  std::string path_;
};

std::vector<Napi::Value> to_array(Napi::Value value, const std::string &path, size_t limit);

}  // namespace ambient

#endif
