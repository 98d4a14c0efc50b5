// SPDX-License-Identifier: Apache-2.0
// AF_UNIX sockets of type SOCK_SEQPACKET, which Node does not have: whole datagrams, descriptors with them (SCM_RIGHTS),
// and who is at the other end. Every socket is non-blocking; waiting is the event loop's (watch.h).
#ifndef AMBIENT_NATIVE_SEQPACKET_H
#define AMBIENT_NATIVE_SEQPACKET_H

#include <sys/stat.h>
#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fd.h"

namespace ambient {

// sun_path with its NUL
constexpr size_t SOCKET_PATH_LIMIT = 107;

// A listening socket at `path`, which must not exist (EADDRINUSE).
Fd listen_seqpacket(const std::string &path, mode_t mode, int backlog);
// nullopt: nobody waits
std::optional<Fd> accept_seqpacket(int listener);
// EAGAIN: the backlog is full; ECONNREFUSED: nobody listens; EPROTOTYPE: a socket of another type
Fd connect_seqpacket(const std::string &path);

struct PeerCredentials {
  pid_t pid;
  uid_t uid;
  gid_t gid;
};
// Of the process that connected, or listened, at that moment (SO_PEERCRED).
PeerCredentials peer_credentials(int socket);

// false: the other end has not read enough of what it was sent before
bool send_datagram(int socket, const uint8_t *bytes, size_t size, const std::vector<int> &descriptors);

struct Datagram {
  enum { message, nothing, closed } kind;
  std::vector<uint8_t> bytes;
  std::vector<Fd> descriptors;
  // Longer than 64 KiB, or with more descriptors than the kernel handed over: what is here is not all of it.
  bool truncated;
};
Datagram receive_datagram(int socket);

}  // namespace ambient

#endif
