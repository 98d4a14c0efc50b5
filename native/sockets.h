// SPDX-License-Identifier: Apache-2.0
// Sockets in other network namespaces: who listens there, and what a proxy needs, transparent ones among them.
#ifndef AMBIENT_NATIVE_SOCKETS_H
#define AMBIENT_NATIVE_SOCKETS_H

#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fd.h"

namespace ambient {

struct Listener {
  int family;  // 4, 6
  std::string address;
  uint16_t port;
  bool v6only;
  std::optional<bool> transparent;
  uint32_t uid;
  uint32_t inode;
  std::optional<uint32_t> mark;
};
std::vector<Listener> listeners(int netns);

struct TcpConnection {
  uint8_t local[16];   // IPv4 as ::ffff:a.b.c.d
  uint8_t remote[16];
  uint16_t local_port;
  uint16_t remote_port;
  uint8_t state;  // TCP_* of linux/tcp_states.h
};
// TCP sockets that are neither listening nor closed nor in TIME_WAIT.
std::vector<TcpConnection> connections(int netns);

struct SocketAddress {
  sockaddr_storage storage;
  socklen_t size;
  int family() const { return storage.ss_family; }
};
// nullopt if `address` is no IP address in text
std::optional<SocketAddress> socket_address(const std::string &address, uint16_t port);

struct ListenOptions {
  SocketAddress address;
  int backlog;
  bool transparent;
  bool reuse_port;
  bool v6only;
  uint32_t mark;
};
int listen_in(int netns, const ListenOptions &options, const std::string &object);
// A bound UDP socket; of the options `backlog`, `transparent` and `v6only` mean nothing here.
int listen_datagram_in(int netns, const ListenOptions &options, const std::string &object);

struct ConnectOptions {
  std::optional<SocketAddress> source;
  SocketAddress destination;
  uint32_t mark;
};
// A non-blocking socket whose connect() is under way or done: writable when that is decided, by SO_ERROR.
Fd begin_connect(int netns, const ConnectOptions &options, const std::string &object);
// 0 or the errno of the connect() that begin_connect() began
int connect_result(int socket);

}  // namespace ambient

#endif
