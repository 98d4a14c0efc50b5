// SPDX-License-Identifier: Apache-2.0
#include "tc.h"

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <linux/pkt_sched.h>

#include <algorithm>
#include <optional>

#include "error.h"
#include "netlink.h"
#include "netns.h"

namespace ambient {

namespace {

std::string text(int netns, uint32_t ifindex) { return "ifindex " + std::to_string(ifindex) + " in " + netns_text(netns); }

tcmsg tc_header(uint32_t ifindex, uint32_t parent) {
  tcmsg header = {};
  header.tcm_family = AF_UNSPEC;
  header.tcm_ifindex = static_cast<int>(ifindex);
  header.tcm_parent = parent;
  return header;
}

// An `ingress` qdisc ignores the minor number, so the parent of a clsact's ingress filters names its block too.
uint32_t filter_parent(Direction direction) {
  return TC_H_MAKE(TC_H_CLSACT, direction == Direction::ingress ? TC_H_MIN_INGRESS : TC_H_MIN_EGRESS);
}

// By RTM_GETQDISC of one place: a dump would list the qdiscs of every device of the node. The kernel answers it by a
// notification, which the asking socket gets only with NLM_F_ECHO.
std::optional<Qdisc> qdisc_at(NetlinkSocket &socket, int netns, uint32_t ifindex, uint32_t parent) {
  Request request(RTM_GETQDISC, NLM_F_ECHO);
  request.append(tc_header(ifindex, parent));
  std::optional<Qdisc> found;
  try {
    socket.transact(request, "RTM_GETQDISC", text(netns, ifindex), [&](const nlmsghdr *message) {
      if (message->nlmsg_type != RTM_NEWQDISC) return;
      auto *header = static_cast<const tcmsg *>(NLMSG_DATA(message));
      found = Qdisc{Attributes(message, sizeof(tcmsg)).string(TCA_KIND), header->tcm_handle, header->tcm_parent};
    });
  } catch (const KernelError &error) {
    // ENOENT: the place is empty. EINVAL: it has a built-in qdisc (noop of a device that is down), which is not shown.
    if (error.number != ENOENT && error.number != EINVAL) throw;
  }
  return found;
}

}  // namespace

std::vector<Qdisc> qdiscs(int netns, uint32_t ifindex) {
  NetlinkSocket socket(netns);
  std::vector<Qdisc> found;
  for (uint32_t parent : {TC_H_ROOT, TC_H_INGRESS}) {
    if (auto qdisc = qdisc_at(socket, netns, ifindex, parent)) found.push_back(*qdisc);
  }
  return found;
}

bool add_clsact(int netns, uint32_t ifindex) {
  NetlinkSocket socket(netns);
  Request request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL);
  tcmsg header = tc_header(ifindex, TC_H_CLSACT);
  header.tcm_handle = TC_H_MAKE(TC_H_CLSACT, 0);
  request.append(header);
  request.put_string(TCA_KIND, "clsact");
  try {
    socket.transact(request, "RTM_NEWQDISC", "clsact on " + text(netns, ifindex));
    return true;
  } catch (const KernelError &error) {
    if (error.number != EEXIST) throw;
    auto present = qdisc_at(socket, netns, ifindex, TC_H_INGRESS);
    if (present && present->kind == "clsact") return false;
    KernelError busy(EBUSY, "RTM_NEWQDISC", "clsact on " + text(netns, ifindex), error.kernel_message);
    if (present) busy.object += ", where a qdisc of kind " + present->kind + " has its place";
    throw busy;
  }
}

std::vector<TcFilter> filters(int netns, uint32_t ifindex, Direction direction) {
  Request request(RTM_GETTFILTER, NLM_F_DUMP);
  request.append(tc_header(ifindex, filter_parent(direction)));
  std::vector<TcFilter> found;
  NetlinkSocket socket(netns);
  socket.dump(
      request, "RTM_GETTFILTER", std::string(direction_text(direction)) + " of " + text(netns, ifindex),
      [&](const nlmsghdr *message) {
        if (message->nlmsg_type != RTM_NEWTFILTER) return;
        auto *header = static_cast<const tcmsg *>(NLMSG_DATA(message));
        // The first message of each priority has no handle and stands for the classifier, not for a filter of it.
        if (header->tcm_handle == 0) return;
        Attributes attributes(message, sizeof(tcmsg));
        TcFilter filter = {};
        filter.kind = attributes.string(TCA_KIND);
        filter.priority = static_cast<uint16_t>(TC_H_MAJ(header->tcm_info) >> 16);
        filter.protocol = ntohs(static_cast<uint16_t>(TC_H_MIN(header->tcm_info)));
        filter.handle = header->tcm_handle;
        if (filter.kind == "bpf") {
          Attributes options(attributes.find(TCA_OPTIONS));
          filter.program_id = options.u32(TCA_BPF_ID, 0);
          filter.name = options.string(TCA_BPF_NAME);
          filter.direct_action = options.u32(TCA_BPF_FLAGS, 0) & TCA_BPF_FLAG_ACT_DIRECT;
        }
        found.push_back(std::move(filter));
      },
      [&] { found.clear(); });
  return found;
}

namespace {

std::string text(int netns, uint32_t ifindex, Direction direction, uint16_t priority, uint32_t handle) {
  char numbers[48];
  snprintf(numbers, sizeof(numbers), " filter pref %u handle 0x%x of ", priority, handle);
  return direction_text(direction) + (numbers + text(netns, ifindex));
}

tcmsg filter_header(uint32_t ifindex, Direction direction, uint16_t priority, uint32_t handle) {
  tcmsg header = tc_header(ifindex, filter_parent(direction));
  header.tcm_handle = handle;
  header.tcm_info = TC_H_MAKE(static_cast<uint32_t>(priority) << 16, htons(ETH_P_ALL));
  return header;
}

}  // namespace

void attach_filter(int netns, uint32_t ifindex, Direction direction, int program, uint16_t priority, uint32_t handle,
                   const std::string &name, bool replace) {
  Request request(RTM_NEWTFILTER, static_cast<uint16_t>(NLM_F_CREATE | (replace ? NLM_F_REPLACE : NLM_F_EXCL)));
  request.append(filter_header(ifindex, direction, priority, handle));
  request.put_string(TCA_KIND, "bpf");
  size_t options = request.begin(TCA_OPTIONS);
  request.put_u32(TCA_BPF_FD, static_cast<uint32_t>(program));
  request.put_string(TCA_BPF_NAME, name);
  request.put_u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
  request.end(options);
  NetlinkSocket socket(netns);
  socket.transact(request, "RTM_NEWTFILTER", text(netns, ifindex, direction, priority, handle));
}

bool delete_filter(int netns, uint32_t ifindex, Direction direction, uint16_t priority, uint32_t handle) {
  Request request(RTM_DELTFILTER, 0);
  request.append(filter_header(ifindex, direction, priority, handle));
  request.put_string(TCA_KIND, "bpf");
  NetlinkSocket socket(netns);
  try {
    socket.transact(request, "RTM_DELTFILTER", text(netns, ifindex, direction, priority, handle));
    return true;
  } catch (const KernelError &error) {
    if (error.number == ENOENT || error.number == ENODEV) return false;
    // EINVAL where the device has no clsact, but also for a filter of another kind in this place.
    if (error.number != EINVAL) throw;
    std::vector<TcFilter> present = filters(netns, ifindex, direction);
    bool taken = std::any_of(present.begin(), present.end(),
                             [&](const TcFilter &filter) { return filter.priority == priority; });
    if (taken) throw;
    return false;
  }
}

}  // namespace ambient
