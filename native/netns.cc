// SPDX-License-Identifier: Apache-2.0
#include "netns.h"

#include <fcntl.h>
#include <linux/net_namespace.h>
#include <linux/nsfs.h>
#include <linux/rtnetlink.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "error.h"
#include "faults.h"
#include "netlink.h"

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

namespace ambient {

namespace {

Fd current_netns() {
  const char *path = "/proc/thread-self/ns/net";
  Fd fd(kernel_call("open", [&] { return ::open(path, O_RDONLY | O_CLOEXEC); }));
  if (!fd) throw KernelError(errno, "open", path);
  return fd;
}

const char *const MIGRATE_REQUESTS = "net/ipv4/tcp_migrate_req";

// Below /proc/sys/net a thread finds its own namespace's settings. Nothing if there is no such file.
Fd open_sysctl(int netns, const std::string &name, int flags, const std::string &object) {
  NetnsScope scope(netns);
  const std::string path = "/proc/sys/" + name;
  Fd fd(kernel_call("open", [&] { return ::open(path.c_str(), flags | O_CLOEXEC); }));
  if (fd || errno == ENOENT) return fd;
  if (errno != EROFS) throw KernelError(errno, "open", object);
  // Container runtimes mount /proc/sys read-only over itself; a proc of our own that is mounted nowhere is as the
  // kernel made it. By number: the functions are of glibc 2.36, and nodes may have an older one.
  Fd type(kernel_call("fsopen", [&] { return static_cast<int>(syscall(SYS_fsopen, "proc", FSOPEN_CLOEXEC)); }));
  if (!type) throw KernelError(errno, "fsopen", "proc, for " + object);
  int created = kernel_call("fsconfig", [&] {
    return static_cast<int>(syscall(SYS_fsconfig, type.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0));
  });
  if (created < 0) throw KernelError(errno, "fsconfig", "proc, for " + object);
  Fd proc(kernel_call("fsmount", [&] {
    return static_cast<int>(syscall(SYS_fsmount, type.get(), FSMOUNT_CLOEXEC, 0));
  }));
  if (!proc) throw KernelError(errno, "fsmount", "proc, for " + object);
  const std::string below = "sys/" + name;
  fd = Fd(kernel_call("openat", [&] { return ::openat(proc.get(), below.c_str(), flags | O_CLOEXEC); }));
  if (!fd) throw KernelError(errno, "openat", object);
  return fd;
}

std::string migrate_requests_text(int netns) { return "net.ipv4.tcp_migrate_req of " + netns_text(netns); }

}  // namespace

std::string netns_text(int netns) {
  return netns == HOST ? "the process's netns" : "netns fd " + std::to_string(netns);
}

NetnsScope::NetnsScope(int netns) {
  if (netns == HOST) return;
  // The number of a closed descriptor is the next one given out: to the one for the way back, which would then be what
  // is entered.
  if (::fcntl(netns, F_GETFD) < 0) throw KernelError(errno, "setns", netns_text(netns));
  Fd before = current_netns();
  if (kernel_call("setns", [&] { return ::setns(netns, CLONE_NEWNET); }) < 0) {
    throw KernelError(errno, "setns", netns_text(netns));
  }
  before_ = std::move(before);
}

NetnsScope::~NetnsScope() {
  if (!before_) return;
  // Not through kernel_call: no caller could go on after its failure.
  if (::setns(before_.get(), CLONE_NEWNET) < 0) {
    perror("ambient-redirect: cannot return to the process's network namespace");
    abort();
  }
}

int open_netns(const std::string &path) {
  // O_NONBLOCK: a FIFO in this place must not stop the process; namespace files ignore it.
  Fd fd(kernel_call("open", [&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); }));
  if (!fd) throw KernelError(errno, "open", path);
  int type = kernel_call("ioctl(NS_GET_NSTYPE)", [&] { return ::ioctl(fd.get(), NS_GET_NSTYPE); });
  if (type < 0 && errno != ENOTTY) throw KernelError(errno, "ioctl(NS_GET_NSTYPE)", path);
  if (type != CLONE_NEWNET) throw KernelError(EINVAL, "ioctl(NS_GET_NSTYPE)", path + " is not a network namespace");
  return fd.release();
}

std::optional<bool> migrate_requests(int netns) {
  const std::string object = migrate_requests_text(netns);
  Fd fd = open_sysctl(netns, MIGRATE_REQUESTS, O_RDONLY, object);
  if (!fd) return std::nullopt;
  char value = 0;
  ssize_t size = kernel_call("read", [&] { return ::read(fd.get(), &value, 1); });
  if (size != 1) throw KernelError(size < 0 ? errno : EIO, "read", object);
  return value != '0';
}

void set_migrate_requests(int netns, bool on) {
  const std::string object = migrate_requests_text(netns);
  Fd fd = open_sysctl(netns, MIGRATE_REQUESTS, O_WRONLY, object);
  if (!fd) throw KernelError(ENOENT, "open", object);
  if (kernel_call("write", [&] { return ::write(fd.get(), on ? "1" : "0", 1); }) < 0) {
    throw KernelError(errno, "write", object);
  }
}

uint64_t socket_netns_cookie(int socket) {
  uint64_t cookie = 0;
  socklen_t size = sizeof(cookie);
  int result = kernel_call("getsockopt(SO_NETNS_COOKIE)",
                           [&] { return ::getsockopt(socket, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size); });
  if (result == 0) return cookie;
  if (errno == ENOPROTOOPT) return 0;
  throw KernelError(errno, "getsockopt(SO_NETNS_COOKIE)", "socket");
}

NetnsIdentity netns_identity(int netns) {
  Fd own;
  if (netns == HOST) own = current_netns();
  int fd = netns == HOST ? own.get() : netns;
  struct statx status;
  if (kernel_call("statx", [&] { return ::statx(fd, "", AT_EMPTY_PATH, STATX_INO, &status); }) < 0) {
    throw KernelError(errno, "statx", netns_text(netns));
  }
  Fd socket;
  {
    NetnsScope scope(netns);
    socket = Fd(kernel_call("socket", [] { return ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0); }));
    if (!socket) throw KernelError(errno, "socket", netns_text(netns));
  }
  return {makedev(status.stx_dev_major, status.stx_dev_minor), status.stx_ino, socket_netns_cookie(socket.get())};
}

namespace {

int32_t get_netns_id(NetlinkSocket &socket, int fd) {
  Request request(RTM_GETNSID, 0);
  request.append<rtgenmsg>({AF_UNSPEC});
  request.put_u32(NETNSA_FD, static_cast<uint32_t>(fd));
  int32_t id = NETNSA_NSID_NOT_ASSIGNED;
  socket.transact(request, "RTM_GETNSID", "netns fd " + std::to_string(fd), [&](const nlmsghdr *message) {
    if (message->nlmsg_type != RTM_NEWNSID) return;
    Attributes attributes(message, sizeof(rtgenmsg));
    id = static_cast<int32_t>(attributes.u32(NETNSA_NSID, static_cast<uint32_t>(NETNSA_NSID_NOT_ASSIGNED)));
  });
  return id;
}

}  // namespace

int32_t netns_id(int netns, bool allocate) {
  Fd own;
  if (netns == HOST) own = current_netns();
  int fd = netns == HOST ? own.get() : netns;
  NetlinkSocket socket(HOST);
  int32_t id = get_netns_id(socket, fd);
  if (id >= 0 || !allocate) return id;

  Request request(RTM_NEWNSID, 0);
  request.append<rtgenmsg>({AF_UNSPEC});
  request.put_u32(NETNSA_NSID, static_cast<uint32_t>(NETNSA_NSID_NOT_ASSIGNED));
  request.put_u32(NETNSA_FD, static_cast<uint32_t>(fd));
  try {
    socket.transact(request, "RTM_NEWNSID", netns_text(netns));
  } catch (const KernelError &error) {
    // Somebody else's request, or a veth that was looked at, gave it one meanwhile.
    if (error.number != EEXIST) throw;
  }
  return get_netns_id(socket, fd);
}

}  // namespace ambient
