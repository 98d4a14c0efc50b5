// SPDX-License-Identifier: Apache-2.0
#include "seqpacket.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

#include "error.h"
#include "faults.h"

namespace ambient {

namespace {

constexpr size_t BUFFER_SIZE = 64 * 1024;
// SCM_MAX_FD of net/scm.h: no sender can attach more.
constexpr size_t MAX_DESCRIPTORS = 253;

Fd unix_socket(const std::string &object) {
  Fd fd(kernel_call("socket", [] { return ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); }));
  if (!fd) throw KernelError(errno, "socket", object);
  return fd;
}

sockaddr_un socket_address(const std::string &path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path, path.data(), path.size());
  return address;
}

}  // namespace

Fd listen_seqpacket(const std::string &path, mode_t mode, int backlog) {
  Fd fd = unix_socket(path);
  // bind() gives the file the mode of the socket's own inode: so nobody can connect before a later chmod.
  if (kernel_call("fchmod", [&] { return ::fchmod(fd.get(), mode); }) < 0) throw KernelError(errno, "fchmod", path);
  sockaddr_un address = socket_address(path);
  int result = kernel_call(
      "bind", [&] { return ::bind(fd.get(), reinterpret_cast<const sockaddr *>(&address), sizeof(address)); });
  if (result < 0) throw KernelError(errno, "bind", path);
  if (kernel_call("listen", [&] { return ::listen(fd.get(), backlog); }) < 0) {
    int error = errno;
    ::unlink(path.c_str());
    throw KernelError(error, "listen", path);
  }
  return fd;
}

std::optional<Fd> accept_seqpacket(int listener) {
  for (;;) {
    Fd fd(kernel_call("accept4", [&] { return ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC); }));
    if (fd) return fd;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return std::nullopt;
    // The peer went away while it waited.
    if (errno != EINTR && errno != ECONNABORTED) throw KernelError(errno, "accept4", "fd " + std::to_string(listener));
  }
}

Fd connect_seqpacket(const std::string &path) {
  Fd fd = unix_socket(path);
  sockaddr_un address = socket_address(path);
  int result = kernel_call(
      "connect", [&] { return ::connect(fd.get(), reinterpret_cast<const sockaddr *>(&address), sizeof(address)); });
  if (result < 0) throw KernelError(errno, "connect", path);
  return fd;
}

PeerCredentials peer_credentials(int socket) {
  ucred found = {};
  socklen_t size = sizeof(found);
  int result = kernel_call("getsockopt(SO_PEERCRED)",
                           [&] { return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &found, &size); });
  if (result < 0) throw KernelError(errno, "getsockopt(SO_PEERCRED)", "fd " + std::to_string(socket));
  return {found.pid, found.uid, found.gid};
}

bool send_datagram(int socket, const uint8_t *bytes, size_t size, const std::vector<int> &descriptors) {
  iovec part = {const_cast<uint8_t *>(bytes), size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * MAX_DESCRIPTORS)] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!descriptors.empty()) {
    const size_t length = sizeof(int) * descriptors.size();
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(length);
    cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(length);
    memcpy(CMSG_DATA(header), descriptors.data(), length);
  }
  for (;;) {
    ssize_t sent = kernel_call("sendmsg", [&] { return ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT); });
    if (sent >= 0) return true;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
    if (errno != EINTR) throw KernelError(errno, "sendmsg", "fd " + std::to_string(socket));
  }
}

Datagram receive_datagram(int socket) {
  Datagram datagram = {Datagram::message, std::vector<uint8_t>(BUFFER_SIZE), {}, false};
  iovec part = {datagram.bytes.data(), datagram.bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * MAX_DESCRIPTORS)];
  msghdr message = {};
  ssize_t received;
  do {
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    received = kernel_call("recvmsg", [&] { return ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT); });
  } while (received < 0 && errno == EINTR);
  if (received < 0) {
    datagram.bytes.clear();
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
      datagram.kind = Datagram::nothing;
      return datagram;
    }
    throw KernelError(errno, "recvmsg", "fd " + std::to_string(socket));
  }
  datagram.bytes.resize(static_cast<size_t>(received));
  for (cmsghdr *header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int fd;
      memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(fd));
      datagram.descriptors.emplace_back(fd);
    }
  }
  datagram.truncated = message.msg_flags & (MSG_TRUNC | MSG_CTRUNC);
  // An empty datagram and the end look alike; no message of a protocol worth speaking is empty.
  if (received == 0 && datagram.descriptors.empty() && !datagram.truncated) datagram.kind = Datagram::closed;
  return datagram;
}

}  // namespace ambient
