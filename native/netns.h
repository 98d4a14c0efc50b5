// SPDX-License-Identifier: Apache-2.0
// Network namespaces. A namespace belongs to a thread; a switch lasts for one C++ scope, in which no JavaScript runs.
#ifndef AMBIENT_NATIVE_NETNS_H
#define AMBIENT_NATIVE_NETNS_H

#include <cstdint>
#include <optional>
#include <string>

#include "fd.h"

namespace ambient {

// Instead of a descriptor: the namespace that the thread is in, which is the process's.
constexpr int HOST = -1;

class NetnsScope {
 public:
  // Throws (EBADF, EINVAL, EPERM) and leaves the thread where it was.
  explicit NetnsScope(int netns);
  // Aborts the process if the thread cannot be brought back: all that follows would act on the wrong namespace.
  ~NetnsScope();
  NetnsScope(const NetnsScope &) = delete;
  NetnsScope &operator=(const NetnsScope &) = delete;

 private:
  // the namespace to return to; closed where there was no switch
  Fd before_;
};

struct NetnsIdentity {
  uint64_t dev;
  uint64_t ino;
  uint64_t cookie;
};

int open_netns(const std::string &path);
NetnsIdentity netns_identity(int netns);
// -1 if `netns` has no id and none is to be made
int32_t netns_id(int netns, bool allocate);
// for messages: "the process's netns", "netns fd 7"
std::string netns_text(int netns);
// net.ipv4.tcp_migrate_req, both families'; nothing where the kernel has none (it came with 5.14).
std::optional<bool> migrate_requests(int netns);
void set_migrate_requests(int netns, bool on);
// SO_NETNS_COOKIE; 0 where the kernel does not know it
uint64_t socket_netns_cookie(int socket);

}  // namespace ambient

#endif
