// SPDX-License-Identifier: Apache-2.0
#include "sockets.h"

#include <arpa/inet.h>
#include <linux/inet_diag.h>
#include <linux/sock_diag.h>
#include <netinet/tcp.h>

#include <cerrno>
#include <cstring>

#include "error.h"
#include "faults.h"
#include "netlink.h"
#include "netns.h"

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif
#ifndef IPV6_TRANSPARENT
#define IPV6_TRANSPARENT 75
#endif

namespace ambient {

namespace {

// Of linux/inet_diag.h; the last two came with 5.10.
constexpr uint16_t DIAG_SKV6ONLY = 11;
constexpr uint16_t DIAG_MARK = 15;
constexpr uint16_t DIAG_SOCKOPT = 22;

// struct inet_diag_sockopt begins with bit fields: recverr, is_icsk, freebind, hdrincl, mc_loop, transparent, ...
constexpr uint8_t SOCKOPT_TRANSPARENT = 1 << 5;

void list_listeners(NetlinkSocket &socket, uint8_t family, const std::string &object, std::vector<Listener> &found) {
  Request request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP);
  inet_diag_req_v2 wanted = {};
  wanted.sdiag_family = family;
  wanted.sdiag_protocol = IPPROTO_TCP;
  wanted.idiag_states = 1 << TCP_LISTEN;
  request.append(wanted);
  const size_t before = found.size();
  socket.dump(
      request, "SOCK_DIAG_BY_FAMILY", object,
      [&](const nlmsghdr *message) {
        if (message->nlmsg_type != SOCK_DIAG_BY_FAMILY) return;
        auto *entry = static_cast<const inet_diag_msg *>(NLMSG_DATA(message));
        Attributes attributes(message, sizeof(inet_diag_msg));
        char text[INET6_ADDRSTRLEN] = "";
        inet_ntop(entry->idiag_family, entry->id.idiag_src, text, sizeof(text));
        Listener listener = {};
        listener.family = entry->idiag_family == AF_INET ? 4 : 6;
        listener.address = text;
        listener.port = ntohs(entry->id.idiag_sport);
        listener.v6only = attributes.u8(DIAG_SKV6ONLY, 0) != 0;
        if (attributes.find(DIAG_SOCKOPT)) listener.transparent = attributes.u8(DIAG_SOCKOPT, 0) & SOCKOPT_TRANSPARENT;
        listener.uid = entry->idiag_uid;
        listener.inode = entry->idiag_inode;
        if (attributes.find(DIAG_MARK)) listener.mark = attributes.u32(DIAG_MARK, 0);
        found.push_back(std::move(listener));
      },
      [&] { found.resize(before); });
}

void set_option(int socket, int level, int option, int value, const char *name, const std::string &object) {
  if (kernel_call(name, [&] { return ::setsockopt(socket, level, option, &value, sizeof(value)); }) < 0) {
    throw KernelError(errno, name, object);
  }
}

Fd ip_socket(int netns, int family, int type, const std::string &object) {
  NetnsScope scope(netns);
  Fd fd(kernel_call("socket", [&] { return ::socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); }));
  if (!fd) throw KernelError(errno, "socket", object);
  return fd;
}

void set_transparent(int socket, int family, const std::string &object) {
  if (family == AF_INET) set_option(socket, SOL_IP, IP_TRANSPARENT, 1, "setsockopt(IP_TRANSPARENT)", object);
  else set_option(socket, SOL_IPV6, IPV6_TRANSPARENT, 1, "setsockopt(IPV6_TRANSPARENT)", object);
}

void bind_to(int socket, const SocketAddress &address, const std::string &object) {
  int result = kernel_call("bind", [&] {
    return ::bind(socket, reinterpret_cast<const sockaddr *>(&address.storage), address.size);
  });
  if (result < 0) throw KernelError(errno, "bind", object);
}

}  // namespace

std::vector<Listener> listeners(int netns) {
  NetlinkSocket socket(netns, NETLINK_SOCK_DIAG);
  std::vector<Listener> found;
  list_listeners(socket, AF_INET, "IPv4 listeners of " + netns_text(netns), found);
  list_listeners(socket, AF_INET6, "IPv6 listeners of " + netns_text(netns), found);
  return found;
}

std::vector<TcpConnection> connections(int netns) {
  NetlinkSocket socket(netns, NETLINK_SOCK_DIAG);
  std::vector<TcpConnection> found;
  auto to_16_bytes = [](uint8_t family, const uint32_t *address, uint8_t *out) {
    if (family == AF_INET6) {
      memcpy(out, address, 16);
      return;
    }
    memset(out, 0, 10);
    out[10] = out[11] = 0xff;
    memcpy(out + 12, address, 4);
  };
  for (uint8_t family : {AF_INET, AF_INET6}) {
    Request request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP);
    inet_diag_req_v2 wanted = {};
    wanted.sdiag_family = family;
    wanted.sdiag_protocol = IPPROTO_TCP;
    wanted.idiag_states = 0xfff & ~(1 << TCP_LISTEN | 1 << TCP_TIME_WAIT | 1 << TCP_CLOSE);
    request.append(wanted);
    const size_t before = found.size();
    socket.dump(
        request, "SOCK_DIAG_BY_FAMILY", "TCP connections of " + netns_text(netns),
        [&](const nlmsghdr *message) {
          if (message->nlmsg_type != SOCK_DIAG_BY_FAMILY) return;
          auto *entry = static_cast<const inet_diag_msg *>(NLMSG_DATA(message));
          TcpConnection connection = {};
          to_16_bytes(entry->idiag_family, entry->id.idiag_src, connection.local);
          to_16_bytes(entry->idiag_family, entry->id.idiag_dst, connection.remote);
          connection.local_port = ntohs(entry->id.idiag_sport);
          connection.remote_port = ntohs(entry->id.idiag_dport);
          connection.state = entry->idiag_state;
          found.push_back(connection);
        },
        [&] { found.resize(before); });
  }
  return found;
}

std::optional<SocketAddress> socket_address(const std::string &address, uint16_t port) {
  SocketAddress result = {};
  auto *v4 = reinterpret_cast<sockaddr_in *>(&result.storage);
  auto *v6 = reinterpret_cast<sockaddr_in6 *>(&result.storage);
  if (inet_pton(AF_INET, address.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    result.size = sizeof(*v4);
    return result;
  }
  if (inet_pton(AF_INET6, address.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    result.size = sizeof(*v6);
    return result;
  }
  return std::nullopt;
}

int listen_in(int netns, const ListenOptions &options, const std::string &object) {
  int family = options.address.family();
  Fd fd = ip_socket(netns, family, SOCK_STREAM, object);
  set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1, "setsockopt(SO_REUSEADDR)", object);
  if (options.reuse_port) set_option(fd.get(), SOL_SOCKET, SO_REUSEPORT, 1, "setsockopt(SO_REUSEPORT)", object);
  if (family == AF_INET6) {
    set_option(fd.get(), SOL_IPV6, IPV6_V6ONLY, options.v6only, "setsockopt(IPV6_V6ONLY)", object);
  }
  if (options.transparent) set_transparent(fd.get(), family, object);
  if (options.mark) {
    set_option(fd.get(), SOL_SOCKET, SO_MARK, static_cast<int>(options.mark), "setsockopt(SO_MARK)", object);
  }
  bind_to(fd.get(), options.address, object);
  if (kernel_call("listen", [&] { return ::listen(fd.get(), options.backlog); }) < 0) {
    throw KernelError(errno, "listen", object);
  }
  return fd.release();
}

int listen_datagram_in(int netns, const ListenOptions &options, const std::string &object) {
  int family = options.address.family();
  Fd fd = ip_socket(netns, family, SOCK_DGRAM, object);
  if (options.reuse_port) set_option(fd.get(), SOL_SOCKET, SO_REUSEPORT, 1, "setsockopt(SO_REUSEPORT)", object);
  if (options.mark) {
    set_option(fd.get(), SOL_SOCKET, SO_MARK, static_cast<int>(options.mark), "setsockopt(SO_MARK)", object);
  }
  bind_to(fd.get(), options.address, object);
  return fd.release();
}

Fd begin_connect(int netns, const ConnectOptions &options, const std::string &object) {
  int family = options.destination.family();
  Fd fd = ip_socket(netns, family, SOCK_STREAM, object);
  if (options.mark) {
    set_option(fd.get(), SOL_SOCKET, SO_MARK, static_cast<int>(options.mark), "setsockopt(SO_MARK)", object);
  }
  if (options.source) {
    set_transparent(fd.get(), family, object);
    auto *v4 = reinterpret_cast<const sockaddr_in *>(&options.source->storage);
    // sin_port and sin6_port are in the same place.
    if (v4->sin_port == 0) {
      // The port is chosen at connect(), where it has to be unique only for this destination.
      set_option(fd.get(), SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1, "setsockopt(IP_BIND_ADDRESS_NO_PORT)", object);
    } else {
      set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1, "setsockopt(SO_REUSEADDR)", object);
    }
    bind_to(fd.get(), *options.source, object);
  }
  int result = kernel_call("connect", [&] {
    return ::connect(fd.get(), reinterpret_cast<const sockaddr *>(&options.destination.storage),
                     options.destination.size);
  });
  if (result < 0 && errno != EINPROGRESS) throw KernelError(errno, "connect", object);
  return fd;
}

int connect_result(int socket) {
  int error = 0;
  socklen_t size = sizeof(error);
  int result =
      kernel_call("getsockopt(SO_ERROR)", [&] { return ::getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &size); });
  return result < 0 ? errno : error;
}

}  // namespace ambient
