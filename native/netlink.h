// SPDX-License-Identifier: Apache-2.0
// As much of netlink as link.cc, routing.cc, tc.cc, netns.cc and sockets.cc need: one socket, one request at a time,
// strict checking, and the kernel's extended ack in every error.
#ifndef AMBIENT_NATIVE_NETLINK_H
#define AMBIENT_NATIVE_NETLINK_H

#include <linux/netlink.h>
#include <linux/rtnetlink.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "fd.h"

namespace ambient {

class Request {
 public:
  // NLM_F_REQUEST and, unless it is a dump, NLM_F_ACK are added.
  Request(uint16_t type, uint16_t flags);

  template <typename Header>
  void append(const Header &header) {
    add(&header, sizeof(header));
  }
  void put(uint16_t type, const void *data, size_t size);
  void put_u8(uint16_t type, uint8_t value) { put(type, &value, sizeof(value)); }
  void put_u32(uint16_t type, uint32_t value) { put(type, &value, sizeof(value)); }
  // with its terminating NUL
  void put_string(uint16_t type, const std::string &value) { put(type, value.c_str(), value.size() + 1); }
  // All that is put between begin and end becomes the payload of one nested attribute.
  size_t begin(uint16_t type);
  void end(size_t nested);

  nlmsghdr *message() { return reinterpret_cast<nlmsghdr *>(buffer_); }

 private:
  void add(const void *data, size_t size);

  alignas(nlmsghdr) char buffer_[2048];
};

// The attributes of a message, or those inside a nested attribute.
class Attributes {
 public:
  Attributes(const nlmsghdr *message, size_t header_size);
  explicit Attributes(const rtattr *nested);
  Attributes(const void *data, size_t size);

  // nullptr if absent
  const rtattr *find(uint16_t type) const;
  uint8_t u8(uint16_t type, uint8_t otherwise) const;
  uint32_t u32(uint16_t type, uint32_t otherwise) const;
  std::string string(uint16_t type) const;

 private:
  const char *data_;
  size_t size_;
};

class NetlinkSocket {
 public:
  // The socket stays in `netns` wherever the thread is later.
  explicit NetlinkSocket(int netns, int protocol = NETLINK_ROUTE);

  using Visit = std::function<void(const nlmsghdr *)>;
  // Sends and waits for the ack; `visit` sees the messages before it. `name` is the request's, a literal; `object`
  // is what an error's message names.
  void transact(Request &request, const char *name, const std::string &object, const Visit &visit = nullptr);
  // `visit` sees the messages of one consistent dump. `restart` is called when the kernel reports that the objects
  // changed meanwhile (NLM_F_DUMP_INTR): forget what was seen, it comes again.
  void dump(Request &request, const char *name, const std::string &object, const Visit &visit,
            const std::function<void()> &restart);

 private:
  // true when a dump was interrupted
  bool exchange(Request &request, const char *name, const std::string &object, const Visit &visit);

  Fd fd_;
  uint32_t sequence_ = 0;
};

}  // namespace ambient

#endif
