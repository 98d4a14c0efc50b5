// SPDX-License-Identifier: Apache-2.0
// Throw-away network namespaces for `demo`: namespaces, veth pairs, addresses and routes without iproute2.
// Nothing here is used by a CNI verb. Signatures and errors: plugin/demo/native-topology.ts.
#include "topology.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <string>

#include "error.h"

namespace {

[[noreturn]] void Fail(Napi::Env env, int error, const char *syscall, const std::string &object,
                       const std::string &kernel_message = "") {
  std::string code = ambient::errno_name(error);
  std::string message = std::string(syscall) + " " + object + ": " + code + " (" + strerror(error) + ")";
  if (!kernel_message.empty()) message += ": " + kernel_message;
  Napi::Error failure = Napi::Error::New(env, message);
  failure.Set("code", Napi::String::New(env, code));
  failure.Set("errno", Napi::Number::New(env, error));
  failure.Set("syscall", Napi::String::New(env, syscall));
  if (!kernel_message.empty()) failure.Set("kernelMessage", Napi::String::New(env, kernel_message));
  throw failure;
}

class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  Fd(const Fd &) = delete;
  Fd &operator=(const Fd &) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

void AssertOpen(Napi::Env env, int netns) {
  if (netns >= 0 && fcntl(netns, F_GETFD) < 0) Fail(env, errno, "setns", "fd " + std::to_string(netns));
}

// The calling thread's network namespace as long as the object lives. A thread that cannot go back would run the rest
// of the process in the wrong namespace: nothing sensible is left to do then.
class ThreadNetns {
 public:
  // Enters `netns` unless it is HOST.
  ThreadNetns(Napi::Env env, int netns) : before_(OpenOwn(env, netns)) { Enter(env, netns); }
  ~ThreadNetns() {
    if (setns(before_.get(), CLONE_NEWNET) != 0) {
      perror("ambient-redirect: cannot return to the network namespace of the process");
      abort();
    }
  }
  void Enter(Napi::Env env, int netns) {
    if (netns >= 0 && setns(netns, CLONE_NEWNET) != 0) Fail(env, errno, "setns", "fd " + std::to_string(netns));
  }

 private:
  // The number of a closed descriptor is the next one given out: to the one for the way back, which would then be what
  // is entered. So `netns` is looked at first.
  static int OpenOwn(Napi::Env env, int netns) {
    AssertOpen(env, netns);
    int fd = ::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    if (fd < 0) Fail(env, errno, "open", "/proc/thread-self/ns/net");
    return fd;
  }

  Fd before_;
};

std::string TextArgument(const Napi::CallbackInfo &info, size_t index, const char *name) {
  if (!info[index].IsString()) throw Napi::TypeError::New(info.Env(), std::string(name) + " must be a string");
  return info[index].As<Napi::String>().Utf8Value();
}

int NetnsArgument(const Napi::CallbackInfo &info, size_t index) {
  double number = info[index].IsNumber() ? info[index].As<Napi::Number>().DoubleValue() : -2;
  if (number < -1 || number > INT32_MAX || number != static_cast<int>(number)) {
    throw Napi::TypeError::New(info.Env(), "netns must be a file descriptor or HOST");
  }
  return static_cast<int>(number);
}

std::string InterfaceArgument(const Napi::CallbackInfo &info, size_t index, const char *name) {
  std::string text = TextArgument(info, index, name);
  if (text.empty() || text.size() >= IFNAMSIZ) {
    throw Napi::TypeError::New(info.Env(), std::string(name) + " must be an interface name of 1 to 15 bytes");
  }
  return text;
}

struct IpAddress {
  int family;
  size_t length;
  std::array<uint8_t, 16> bytes;
};

IpAddress AddressArgument(const Napi::CallbackInfo &info, size_t index, const char *name) {
  std::string text = TextArgument(info, index, name);
  IpAddress address{};
  if (inet_pton(AF_INET, text.c_str(), address.bytes.data()) == 1) {
    address.family = AF_INET;
    address.length = 4;
  } else if (inet_pton(AF_INET6, text.c_str(), address.bytes.data()) == 1) {
    address.family = AF_INET6;
    address.length = 16;
  } else {
    throw Napi::TypeError::New(info.Env(), std::string(name) + " must be an IP address, not \"" + text + "\"");
  }
  return address;
}

uint8_t PrefixArgument(const Napi::CallbackInfo &info, size_t index, const IpAddress &address) {
  double number = info[index].IsNumber() ? info[index].As<Napi::Number>().DoubleValue() : -1;
  if (!(number >= 0 && number <= 8.0 * address.length) || number != static_cast<int>(number)) {
    throw Napi::TypeError::New(info.Env(), "prefix must be a prefix length of the address's family");
  }
  return static_cast<uint8_t>(number);
}

// One rtnetlink request: a header, its family struct and attributes, and the kernel's answer to it.
class Request {
 public:
  Request(uint16_t type, uint16_t flags) {
    header()->nlmsg_len = NLMSG_HDRLEN;
    header()->nlmsg_type = type;
    header()->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    header()->nlmsg_seq = 1;
  }

  template <typename T>
  void Append(const T &value) {
    Put(&value, sizeof value);
  }
  void Attribute(uint16_t type, const void *value, size_t length) {
    rtattr attribute{static_cast<uint16_t>(RTA_LENGTH(length)), type};
    Put(&attribute, sizeof attribute);
    Put(value, length);
  }
  void Attribute(uint16_t type, uint32_t value) { Attribute(type, &value, sizeof value); }
  void Attribute(uint16_t type, const std::string &value) { Attribute(type, value.c_str(), value.size() + 1); }
  // Opens a nested attribute and returns its place for Close().
  size_t Open(uint16_t type) {
    size_t place = header()->nlmsg_len;
    Attribute(type, nullptr, 0);
    return place;
  }
  void Close(size_t place) {
    reinterpret_cast<rtattr *>(buffer_.data() + place)->rta_len =
        static_cast<uint16_t>(header()->nlmsg_len - place);
  }

  // Sends to the kernel of the thread's current network namespace and waits for the acknowledgement.
  void Send(Napi::Env env, const char *call, const std::string &object) {
    Fd socket(::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE));
    if (socket.get() < 0) Fail(env, errno, "socket(NETLINK_ROUTE)", object);
    int on = 1;
    setsockopt(socket.get(), SOL_NETLINK, NETLINK_EXT_ACK, &on, sizeof on);
    if (::send(socket.get(), buffer_.data(), header()->nlmsg_len, 0) < 0) Fail(env, errno, call, object);
    alignas(nlmsghdr) std::array<char, 8192> answer;
    ssize_t length = ::recv(socket.get(), answer.data(), answer.size(), 0);
    if (length < 0) Fail(env, errno, call, object);
    auto *reply = reinterpret_cast<nlmsghdr *>(answer.data());
    if (!NLMSG_OK(reply, length) || reply->nlmsg_type != NLMSG_ERROR) Fail(env, EBADMSG, call, object);
    auto *error = static_cast<nlmsgerr *>(NLMSG_DATA(reply));
    if (error->error != 0) Fail(env, -error->error, call, object, ExtendedAck(reply, error));
  }

 private:
  nlmsghdr *header() { return reinterpret_cast<nlmsghdr *>(buffer_.data()); }

  void Put(const void *value, size_t length) {
    size_t end = header()->nlmsg_len + length;
    if (NLMSG_ALIGN(end) > buffer_.size()) abort();  // requests here have a known, small size
    if (length > 0) memcpy(buffer_.data() + header()->nlmsg_len, value, length);
    header()->nlmsg_len = NLMSG_ALIGN(end);
  }

  // NLM_F_CAPPED says that the request was not echoed, so attributes follow the header copy at once.
  static std::string ExtendedAck(nlmsghdr *reply, nlmsgerr *error) {
    if (!(reply->nlmsg_flags & NLM_F_ACK_TLVS)) return "";
    size_t offset = NLMSG_HDRLEN + sizeof *error;
    if (!(reply->nlmsg_flags & NLM_F_CAPPED)) offset += NLMSG_ALIGN(error->msg.nlmsg_len) - NLMSG_HDRLEN;
    if (offset >= reply->nlmsg_len) return "";
    auto *attribute = reinterpret_cast<rtattr *>(reinterpret_cast<char *>(reply) + offset);
    size_t left = reply->nlmsg_len - offset;
    for (; RTA_OK(attribute, left); attribute = RTA_NEXT(attribute, left)) {
      if ((attribute->rta_type & NLA_TYPE_MASK) != NLMSGERR_ATTR_MSG) continue;
      const char *text = static_cast<const char *>(RTA_DATA(attribute));
      return std::string(text, strnlen(text, RTA_PAYLOAD(attribute)));
    }
    return "";
  }

  alignas(nlmsghdr) std::array<char, 1024> buffer_{};
};

uint32_t InterfaceIndex(Napi::Env env, const std::string &name) {
  uint32_t index = if_nametoindex(name.c_str());
  if (index == 0) Fail(env, errno, "if_nametoindex", name);
  return index;
}

Napi::Value CreateNetns(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  std::string path = TextArgument(info, 0, "path");
  Fd file(::open(path.c_str(), O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (file.get() < 0) Fail(env, errno, "open", path);
  int error = 0;
  const char *call = "unshare(CLONE_NEWNET)";
  {
    ThreadNetns thread(env, -1);
    if (unshare(CLONE_NEWNET) != 0) {
      error = errno;
    } else if (mount("/proc/thread-self/ns/net", path.c_str(), nullptr, MS_BIND, nullptr) != 0) {
      error = errno;
      call = "mount(MS_BIND)";
    }
  }
  if (error != 0) {
    ::unlink(path.c_str());
    Fail(env, error, call, path);
  }
  return env.Undefined();
}

Napi::Value DeleteNetns(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  std::string path = TextArgument(info, 0, "path");
  // EINVAL: a plain file, left by a createNetns() that was killed between its two steps.
  if (umount2(path.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) != 0 && errno != EINVAL && errno != ENOENT) {
    Fail(env, errno, "umount2", path);
  }
  if (::unlink(path.c_str()) == 0) return Napi::Boolean::New(env, true);
  if (errno != ENOENT) Fail(env, errno, "unlink", path);
  return Napi::Boolean::New(env, false);
}

Napi::Value Unmount(const Napi::CallbackInfo &info) {
  std::string path = TextArgument(info, 0, "path");
  if (umount2(path.c_str(), UMOUNT_NOFOLLOW) != 0) Fail(info.Env(), errno, "umount2", path);
  return info.Env().Undefined();
}

Napi::Value InNetns(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  int netns = NetnsArgument(info, 0);
  if (!info[1].IsFunction()) throw Napi::TypeError::New(env, "callback must be a function");
  ThreadNetns thread(env, netns);
  return info[1].As<Napi::Function>().Call(std::initializer_list<napi_value>{});
}

void SetUp(Napi::Env env, const std::string &name) {
  Request request(RTM_NEWLINK, 0);
  ifinfomsg link{};
  link.ifi_index = static_cast<int>(InterfaceIndex(env, name));
  link.ifi_flags = link.ifi_change = IFF_UP;
  request.Append(link);
  request.Send(env, "RTM_NEWLINK", name);
}

Napi::Value CreateVeth(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  int netns = NetnsArgument(info, 0);
  std::string name = InterfaceArgument(info, 1, "name");
  int peer_netns = NetnsArgument(info, 2);
  std::string peer = InterfaceArgument(info, 3, "peerName");
  if (peer_netns < 0) throw Napi::TypeError::New(env, "peerNetns must be a file descriptor");
  AssertOpen(env, peer_netns);

  Request request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
  // Neither end can be up yet: veth_open() refuses (ENOTCONN) as long as it has no peer.
  request.Append(ifinfomsg{});
  request.Attribute(IFLA_IFNAME, name);
  size_t link_info = request.Open(IFLA_LINKINFO);
  request.Attribute(IFLA_INFO_KIND, std::string("veth"));
  size_t veth = request.Open(IFLA_INFO_DATA);
  size_t peer_info = request.Open(VETH_INFO_PEER);
  request.Append(ifinfomsg{});
  request.Attribute(IFLA_IFNAME, peer);
  request.Attribute(IFLA_NET_NS_FD, static_cast<uint32_t>(peer_netns));
  request.Close(peer_info);
  request.Close(veth);
  request.Close(link_info);

  ThreadNetns thread(env, netns);
  request.Send(env, "RTM_NEWLINK", name);
  SetUp(env, name);
  thread.Enter(env, peer_netns);
  SetUp(env, peer);
  return env.Undefined();
}

Napi::Value SetLinkUp(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  int netns = NetnsArgument(info, 0);
  std::string name = InterfaceArgument(info, 1, "name");
  ThreadNetns thread(env, netns);
  SetUp(env, name);
  return env.Undefined();
}

Napi::Value DeleteLink(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  int netns = NetnsArgument(info, 0);
  std::string name = InterfaceArgument(info, 1, "name");
  ThreadNetns thread(env, netns);
  uint32_t index = if_nametoindex(name.c_str());
  if (index == 0 && errno == ENODEV) return Napi::Boolean::New(env, false);
  if (index == 0) Fail(env, errno, "if_nametoindex", name);
  Request request(RTM_DELLINK, 0);
  ifinfomsg link{};
  link.ifi_index = static_cast<int>(index);
  request.Append(link);
  request.Send(env, "RTM_DELLINK", name);
  return Napi::Boolean::New(env, true);
}

Napi::Value AddAddress(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  int netns = NetnsArgument(info, 0);
  std::string name = InterfaceArgument(info, 1, "name");
  IpAddress address = AddressArgument(info, 2, "address");
  uint8_t prefix = PrefixArgument(info, 3, address);
  ThreadNetns thread(env, netns);
  Request request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL);
  ifaddrmsg message{};
  message.ifa_family = static_cast<uint8_t>(address.family);
  message.ifa_prefixlen = prefix;
  message.ifa_flags = IFA_F_PERMANENT | (address.family == AF_INET6 ? IFA_F_NODAD : 0);
  message.ifa_index = InterfaceIndex(env, name);
  request.Append(message);
  request.Attribute(IFA_LOCAL, address.bytes.data(), address.length);
  request.Attribute(IFA_ADDRESS, address.bytes.data(), address.length);
  request.Send(env, "RTM_NEWADDR", name);
  return env.Undefined();
}

Napi::Value AddRoute(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  int netns = NetnsArgument(info, 0);
  std::string name = InterfaceArgument(info, 1, "name");
  IpAddress destination = AddressArgument(info, 2, "destination");
  uint8_t prefix = PrefixArgument(info, 3, destination);
  bool through = !info[4].IsNull() && !info[4].IsUndefined();
  IpAddress gateway{};
  if (through) {
    gateway = AddressArgument(info, 4, "gateway");
    if (gateway.family != destination.family) {
      throw Napi::TypeError::New(env, "gateway must be of the destination's family");
    }
  }
  ThreadNetns thread(env, netns);
  Request request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL);
  rtmsg message{};
  message.rtm_family = static_cast<uint8_t>(destination.family);
  message.rtm_dst_len = prefix;
  message.rtm_table = RT_TABLE_MAIN;
  message.rtm_protocol = RTPROT_STATIC;
  message.rtm_type = RTN_UNICAST;
  message.rtm_scope = through ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK;
  // The gateway of a pod with a /32 or /128 is on no subnet of its own.
  message.rtm_flags = through ? RTNH_F_ONLINK : 0;
  request.Append(message);
  if (prefix > 0) request.Attribute(RTA_DST, destination.bytes.data(), destination.length);
  if (through) request.Attribute(RTA_GATEWAY, gateway.bytes.data(), gateway.length);
  request.Attribute(RTA_OIF, InterfaceIndex(env, name));
  request.Send(env, "RTM_NEWROUTE", name);
  return env.Undefined();
}

}  // namespace

void InitTopology(Napi::Env env, Napi::Object exports) {
  exports.Set("createNetns", Napi::Function::New(env, CreateNetns, "createNetns"));
  exports.Set("deleteNetns", Napi::Function::New(env, DeleteNetns, "deleteNetns"));
  exports.Set("unmount", Napi::Function::New(env, Unmount, "unmount"));
  exports.Set("inNetns", Napi::Function::New(env, InNetns, "inNetns"));
  exports.Set("createVeth", Napi::Function::New(env, CreateVeth, "createVeth"));
  exports.Set("setLinkUp", Napi::Function::New(env, SetLinkUp, "setLinkUp"));
  exports.Set("deleteLink", Napi::Function::New(env, DeleteLink, "deleteLink"));
  exports.Set("addAddress", Napi::Function::New(env, AddAddress, "addAddress"));
  exports.Set("addRoute", Napi::Function::New(env, AddRoute, "addRoute"));
}
