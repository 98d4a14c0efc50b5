// SPDX-License-Identifier: Apache-2.0
#include "netlink.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "faults.h"
#include "netns.h"

namespace ambient {

Request::Request(uint16_t type, uint16_t flags) {
  memset(buffer_, 0, sizeof(nlmsghdr));
  message()->nlmsg_len = NLMSG_LENGTH(0);
  message()->nlmsg_type = type;
  // NLM_F_DUMP is two bits, of which NLM_F_EXCL and NLM_F_REPLACE are one each.
  bool is_dump = (flags & NLM_F_DUMP) == NLM_F_DUMP;
  message()->nlmsg_flags = static_cast<uint16_t>(flags | NLM_F_REQUEST | (is_dump ? 0 : NLM_F_ACK));
}

void Request::add(const void *data, size_t size) {
  size_t offset = NLMSG_ALIGN(message()->nlmsg_len);
  size_t padded = NLMSG_ALIGN(size);
  // Callers bound every string they put in; more than fits is a bug of ours.
  if (offset + padded > sizeof(buffer_)) abort();
  memset(buffer_ + offset, 0, padded);
  memcpy(buffer_ + offset, data, size);
  message()->nlmsg_len = static_cast<uint32_t>(offset + size);
}

void Request::put(uint16_t type, const void *data, size_t size) {
  rtattr header = {static_cast<uint16_t>(RTA_LENGTH(size)), type};
  add(&header, sizeof(header));
  if (size) add(data, size);
}

size_t Request::begin(uint16_t type) {
  size_t offset = NLMSG_ALIGN(message()->nlmsg_len);
  rtattr header = {RTA_LENGTH(0), static_cast<uint16_t>(type | NLA_F_NESTED)};
  add(&header, sizeof(header));
  return offset;
}

void Request::end(size_t nested) {
  reinterpret_cast<rtattr *>(buffer_ + nested)->rta_len = static_cast<uint16_t>(message()->nlmsg_len - nested);
}

Attributes::Attributes(const void *data, size_t size) : data_(static_cast<const char *>(data)), size_(size) {}

Attributes::Attributes(const rtattr *nested)
    : data_(nested ? static_cast<const char *>(RTA_DATA(nested)) : nullptr), size_(nested ? RTA_PAYLOAD(nested) : 0) {}

Attributes::Attributes(const nlmsghdr *message, size_t header_size) : data_(nullptr), size_(0) {
  size_t start = NLMSG_SPACE(header_size);
  if (message->nlmsg_len <= start) return;
  data_ = reinterpret_cast<const char *>(message) + start;
  size_ = message->nlmsg_len - start;
}

const rtattr *Attributes::find(uint16_t type) const {
  size_t size = size_;
  for (const char *at = data_; size >= sizeof(rtattr);) {
    auto *attribute = reinterpret_cast<const rtattr *>(at);
    if (attribute->rta_len < sizeof(rtattr) || attribute->rta_len > size) return nullptr;
    if ((attribute->rta_type & NLA_TYPE_MASK) == type) return attribute;
    size_t step = RTA_ALIGN(attribute->rta_len);
    if (step >= size) return nullptr;
    at += step;
    size -= step;
  }
  return nullptr;
}

uint8_t Attributes::u8(uint16_t type, uint8_t otherwise) const {
  const rtattr *attribute = find(type);
  return attribute && RTA_PAYLOAD(attribute) >= 1 ? *static_cast<const uint8_t *>(RTA_DATA(attribute)) : otherwise;
}

uint32_t Attributes::u32(uint16_t type, uint32_t otherwise) const {
  const rtattr *attribute = find(type);
  if (!attribute || RTA_PAYLOAD(attribute) < sizeof(uint32_t)) return otherwise;
  uint32_t value;
  memcpy(&value, RTA_DATA(attribute), sizeof(value));
  return value;
}

std::string Attributes::string(uint16_t type) const {
  const rtattr *attribute = find(type);
  if (!attribute) return {};
  auto *text = static_cast<const char *>(RTA_DATA(attribute));
  return {text, strnlen(text, RTA_PAYLOAD(attribute))};
}

NetlinkSocket::NetlinkSocket(int netns, int protocol) {
  {
    NetnsScope scope(netns);
    fd_ = Fd(kernel_call("socket", [&] { return ::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol); }));
    if (!fd_) throw KernelError(errno, "socket", "AF_NETLINK in " + netns_text(netns));
  }
  // Options that a kernel lacks (NETLINK_GET_STRICT_CHK is of 4.20) change no answer that is read here: filters that
  // it would not apply are applied again by the callers.
  int on = 1;
  for (int option : {NETLINK_EXT_ACK, NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK}) {
    int result = kernel_call("setsockopt",
                             [&] { return ::setsockopt(fd_.get(), SOL_NETLINK, option, &on, sizeof(on)); });
    if (result < 0 && errno != ENOPROTOOPT) throw KernelError(errno, "setsockopt", "AF_NETLINK socket");
  }
}

namespace {

std::string extended_ack(const nlmsghdr *message, size_t header_size) {
  if (!(message->nlmsg_flags & NLM_F_ACK_TLVS)) return {};
  return Attributes(message, header_size).string(NLMSGERR_ATTR_MSG);
}

}  // namespace

bool NetlinkSocket::exchange(Request &request, const char *name, const std::string &object, const Visit &visit) {
  nlmsghdr *sent = request.message();
  sent->nlmsg_seq = ++sequence_;
  sockaddr_nl kernel = {};
  kernel.nl_family = AF_NETLINK;
  ssize_t result = kernel_call(name, [&] {
    return ::sendto(fd_.get(), sent, sent->nlmsg_len, 0, reinterpret_cast<sockaddr *>(&kernel), sizeof(kernel));
  });
  if (result < 0) throw KernelError(errno, name, object);

  alignas(nlmsghdr) char buffer[32768];
  bool interrupted = false;
  for (;;) {
    ssize_t received = kernel_call("recv", [&] { return ::recv(fd_.get(), buffer, sizeof(buffer), MSG_TRUNC); });
    if (received < 0 && errno == EINTR) continue;
    if (received < 0) throw KernelError(errno, name, object);
    // The kernel sizes dump messages to the largest buffer it saw, single answers are far smaller than this.
    if (static_cast<size_t>(received) > sizeof(buffer)) throw KernelError(EMSGSIZE, name, object);

    int left = static_cast<int>(received);  // NLMSG_NEXT may take it below 0
    for (auto *message = reinterpret_cast<nlmsghdr *>(buffer); NLMSG_OK(message, left);
         message = NLMSG_NEXT(message, left)) {
      if (message->nlmsg_seq != sequence_) continue;
      if (message->nlmsg_flags & NLM_F_DUMP_INTR) interrupted = true;
      if (message->nlmsg_type == NLMSG_ERROR) {
        auto *error = static_cast<const nlmsgerr *>(NLMSG_DATA(message));
        size_t header = sizeof(nlmsgerr);
        if (!(message->nlmsg_flags & NLM_F_CAPPED)) header += NLMSG_ALIGN(error->msg.nlmsg_len) - NLMSG_HDRLEN;
        if (error->error) throw KernelError(-error->error, name, object, extended_ack(message, header));
        return interrupted;
      }
      if (message->nlmsg_type == NLMSG_DONE) {
        int error = 0;
        if (message->nlmsg_len >= NLMSG_LENGTH(sizeof(int))) memcpy(&error, NLMSG_DATA(message), sizeof(error));
        if (error < 0) throw KernelError(-error, name, object, extended_ack(message, sizeof(int)));
        return interrupted;
      }
      if (visit) visit(message);
    }
  }
}

void NetlinkSocket::transact(Request &request, const char *name, const std::string &object, const Visit &visit) {
  exchange(request, name, object, visit);
}

void NetlinkSocket::dump(Request &request, const char *name, const std::string &object, const Visit &visit,
                         const std::function<void()> &restart) {
  constexpr int ATTEMPTS = 8;
  for (int attempt = 1; exchange(request, name, object, visit); attempt++) {
    if (attempt == ATTEMPTS) throw KernelError(EINTR, name, object + " changed during each of 8 dumps");
    restart();
  }
}

}  // namespace ambient
