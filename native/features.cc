// SPDX-License-Identifier: Apache-2.0
#include "features.h"

#include <bpf/bpf.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <vector>

#include "error.h"
#include "faults.h"
#include "fd.h"
#include "netns.h"
#include "tcx.h"

namespace ambient {

namespace {

bpf_insn move_immediate(uint8_t destination, int32_t value) {
  return {BPF_ALU64 | BPF_MOV | BPF_K, destination, 0, 0, value};
}
bpf_insn move_register(uint8_t destination, uint8_t source) {
  return {BPF_ALU64 | BPF_MOV | BPF_X, destination, source, 0, 0};
}
bpf_insn add_immediate(uint8_t destination, int32_t value) {
  return {BPF_ALU64 | BPF_ADD | BPF_K, destination, 0, 0, value};
}
// *(u64 *)(r10 + offset) = value
bpf_insn store_on_stack(int16_t offset, int32_t value) {
  return {BPF_ST | BPF_MEM | BPF_DW, BPF_REG_10, 0, offset, value};
}
bpf_insn call(int32_t function) { return {BPF_JMP | BPF_CALL, 0, 0, 0, function}; }
bpf_insn leave() { return {BPF_JMP | BPF_EXIT, 0, 0, 0, 0}; }

// The program, or a closed Fd with errno left as the kernel set it.
Fd load(bpf_prog_type type, const std::vector<bpf_insn> &instructions, bpf_attach_type expected = BPF_CGROUP_INET_INGRESS) {
  LIBBPF_OPTS(bpf_prog_load_opts, options);
  options.expected_attach_type = expected;  // 0 says nothing
  return Fd(kernel_call("bpf(BPF_PROG_LOAD)", [&] {
    return bpf_prog_load(type, "probe", "Dual BSD/GPL", instructions.data(), instructions.size(), &options);
  }));
}

// A call of an unknown helper is EINVAL; of a known one with arguments of the wrong kind, EACCES.
bool known(const Fd &program, const char *what) {
  if (program || errno == EACCES) return true;
  if (errno == EINVAL) return false;
  throw KernelError(errno, "bpf(BPF_PROG_LOAD)", std::string("probe for ") + what);
}

bool have_skc_lookup() {
  return known(load(BPF_PROG_TYPE_SCHED_CLS,
                    {store_on_stack(-8, 0), store_on_stack(-16, 0), move_register(BPF_REG_2, BPF_REG_10),
                     add_immediate(BPF_REG_2, -16), move_immediate(BPF_REG_3, 12), move_immediate(BPF_REG_4, -1),
                     move_immediate(BPF_REG_5, 0), call(BPF_FUNC_skc_lookup_tcp),
                     {BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_0, 0, 2, 0}, move_register(BPF_REG_1, BPF_REG_0),
                     call(BPF_FUNC_sk_release), move_immediate(BPF_REG_0, 0), leave()}),
               "bpf_skc_lookup_tcp");
}

bool have_check_mtu() {
  return known(load(BPF_PROG_TYPE_SCHED_CLS,
                    {store_on_stack(-8, 0), move_immediate(BPF_REG_2, 1), move_register(BPF_REG_3, BPF_REG_10),
                     add_immediate(BPF_REG_3, -8), move_immediate(BPF_REG_4, 0), move_immediate(BPF_REG_5, 0),
                     call(BPF_FUNC_check_mtu), move_immediate(BPF_REG_0, 0), leave()}),
               "bpf_check_mtu");
}

bool have_redirect_peer() {
  return known(load(BPF_PROG_TYPE_SCHED_CLS, {move_immediate(BPF_REG_1, 1), move_immediate(BPF_REG_2, 0),
                                              call(BPF_FUNC_redirect_peer), leave()}),
               "bpf_redirect_peer");
}

// Their socket argument cannot be had in a few instructions: the context stands in its place.
bool have_sk_assign() {
  return known(load(BPF_PROG_TYPE_SCHED_CLS,
                    {move_register(BPF_REG_2, BPF_REG_1), move_immediate(BPF_REG_3, 0), call(BPF_FUNC_sk_assign),
                     move_immediate(BPF_REG_0, 0), leave()}),
               "bpf_sk_assign");
}

bool have_tcp_check_syncookie() {
  return known(load(BPF_PROG_TYPE_SCHED_CLS,
                    {store_on_stack(-8, 0), move_register(BPF_REG_2, BPF_REG_10), add_immediate(BPF_REG_2, -8),
                     move_immediate(BPF_REG_3, 8), move_register(BPF_REG_4, BPF_REG_2), move_immediate(BPF_REG_5, 8),
                     call(BPF_FUNC_tcp_check_syncookie), move_immediate(BPF_REG_0, 0), leave()}),
               "bpf_tcp_check_syncookie");
}

// Programs of that type, and from where they get their sockets: a tc program could not write a map of sockets in 5.9.
bool have_sk_lookup() {
  if (!known(load(BPF_PROG_TYPE_SK_LOOKUP, {move_immediate(BPF_REG_0, 1), leave()}, BPF_SK_LOOKUP),
             "programs of type sk_lookup")) {
    return false;
  }
  Fd sockets(kernel_call("bpf(BPF_MAP_CREATE)", [] {
    return bpf_map_create(BPF_MAP_TYPE_SOCKHASH, "probe", sizeof(uint32_t), sizeof(uint64_t), 1, nullptr);
  }));
  if (!sockets) {
    if (errno == EINVAL) return false;
    throw KernelError(errno, "bpf(BPF_MAP_CREATE)", "probe for a map of sockets");
  }
  // Where it is allowed, the value must be a socket: EACCES.
  return known(load(BPF_PROG_TYPE_SCHED_CLS,
                    {store_on_stack(-8, 0), store_on_stack(-16, 0),
                     {BPF_LD | BPF_IMM | BPF_DW, BPF_REG_1, BPF_PSEUDO_MAP_FD, 0, sockets.get()}, {0, 0, 0, 0, 0},
                     move_register(BPF_REG_2, BPF_REG_10), add_immediate(BPF_REG_2, -8),
                     move_register(BPF_REG_3, BPF_REG_10), add_immediate(BPF_REG_3, -16), move_immediate(BPF_REG_4, 0),
                     call(BPF_FUNC_map_update_elem), move_immediate(BPF_REG_0, 0), leave()}),
               "bpf_map_update_elem of a socket");
}

bool have_netns_cookie() {
  Fd socket(kernel_call("socket", [] { return ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0); }));
  if (!socket) throw KernelError(errno, "socket", "AF_UNIX");
  return socket_netns_cookie(socket.get()) != 0;
}

}  // namespace

Fd load_int_btf() {
  // One type, int, named "int".
  struct {
    btf_header header;
    btf_type type;
    uint32_t encoding;
    char names[5];
  } __attribute__((packed)) object = {};
  object.header.magic = BTF_MAGIC;
  object.header.version = BTF_VERSION;
  object.header.hdr_len = sizeof(btf_header);
  object.header.type_len = sizeof(btf_type) + sizeof(uint32_t);
  object.header.str_off = object.header.type_len;
  object.header.str_len = sizeof(object.names);
  object.type.name_off = 1;
  object.type.info = BTF_KIND_INT << 24;
  object.type.size = 4;
  object.encoding = BTF_INT_SIGNED << 24 | 32;
  memcpy(object.names, "\0int", 5);
  return Fd(kernel_call("bpf(BPF_BTF_LOAD)", [&] { return bpf_btf_load(&object, sizeof(object), nullptr); }));
}

namespace {

bool have_btf() {
  Fd btf = load_int_btf();
  if (btf) return true;
  if (errno == EINVAL) return false;
  throw KernelError(errno, "bpf(BPF_BTF_LOAD)", "probe for BTF");
}

bool have_tcx_links() {
  Fd program = load(BPF_PROG_TYPE_SCHED_CLS, {move_immediate(BPF_REG_0, 0), leave()});
  if (!program) throw KernelError(errno, "bpf(BPF_PROG_LOAD)", "a program that returns 0");
  return have_tcx(program.get());
}

}  // namespace

const Features &features() {
  static std::optional<Features> found;
  if (!found) {
    found = Features{have_tcx_links(), have_redirect_peer(),       have_sk_assign(),    have_sk_lookup(), have_skc_lookup(),
                     have_check_mtu(), have_tcp_check_syncookie(), have_netns_cookie(), have_btf()};
  }
  return *found;
}

}  // namespace ambient
