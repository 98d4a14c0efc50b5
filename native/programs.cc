// SPDX-License-Identifier: Apache-2.0
#include "programs.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "error.h"
#include "faults.h"
#include "features.h"
#include "files.h"
#include "names.h"
#include "redirect.skel.h"

namespace ambient {

namespace {

// What libbpf says while it opens and loads; it reports some causes nowhere else.
std::string *libbpf_says = nullptr;

int collect(libbpf_print_level level, const char *format, va_list arguments) {
  if (level != LIBBPF_WARN || !libbpf_says) return 0;
  char text[512];
  vsnprintf(text, sizeof(text), format, arguments);
  std::string line = text;
  if (line.compare(0, 8, "libbpf: ") == 0) line.erase(0, 8);
  while (!line.empty() && line.back() == '\n') line.pop_back();
  if (!libbpf_says->empty()) *libbpf_says += "; ";
  *libbpf_says += line;
  return 0;
}

// The verifier's log of a failed load is long; the line before its statistics says what it refused.
std::string verdict_line(const std::string &log) {
  size_t end = log.rfind("\nprocessed ");
  if (end == std::string::npos) return {};
  size_t start = log.rfind('\n', end - 1);
  start = start == std::string::npos ? 0 : start + 1;
  return log.substr(start, end - start);
}

class Collecting {
 public:
  explicit Collecting(std::string &text) : before_(libbpf_set_print(collect)) { libbpf_says = &text; }
  ~Collecting() {
    libbpf_says = nullptr;
    libbpf_set_print(before_);
  }
  Collecting(const Collecting &) = delete;
  Collecting &operator=(const Collecting &) = delete;

 private:
  libbpf_print_fn_t before_;
};

struct Destroy {
  void operator()(redirect_bpf *skeleton) const { redirect_bpf__destroy(skeleton); }
};

struct Jump {
  Map map;
  uint32_t index;
};

Jump jump_of(enum program program) {
  if (program == INPOD_LOOKUP) return {JUMP_LOOKUP, SLOT_LOOKUP};
  return {JUMP, program == INPOD_EGRESS ? SLOT_EGRESS : SLOT_INGRESS};
}

constexpr enum program JUMPED_TO[] = {INPOD_EGRESS, INPOD_INGRESS, INPOD_LOOKUP};

#ifdef AMBIENT_FAULTS
// For tests: the object in $AMBIENT_REDIRECT_OBJECT in place of the one that is inside, so that a changed program needs
// no new addon. `bytes` must live as long as the skeleton.
redirect_bpf *open_other(const bpf_object_open_opts &options, std::string &bytes) {
  const char *path = getenv("AMBIENT_REDIRECT_OBJECT");
  if (!path) return redirect_bpf__open_opts(&options);
  std::ifstream file(path, std::ios::binary);
  bytes.assign(std::istreambuf_iterator<char>(file), {});
  auto *skeleton = static_cast<redirect_bpf *>(calloc(1, sizeof(redirect_bpf)));
  if (!skeleton) return nullptr;
  if (redirect_bpf__create_skeleton(skeleton) == 0) {
    skeleton->skeleton->data = bytes.data();
    skeleton->skeleton->data_sz = bytes.size();
    if (bpf_object__open_skeleton(skeleton->skeleton, &options) == 0) return skeleton;
  }
  int error = errno;
  redirect_bpf__destroy(skeleton);
  errno = error;
  return nullptr;
}
#endif

constexpr size_t LOG_SIZE = 1 << 20;
struct Free {
  void operator()(char *memory) const { free(memory); }
};

}  // namespace

const char *object_id() {
#ifdef AMBIENT_FAULTS
  // For tests: another build of the programs, as far as names tell.
  if (const char *other = getenv("AMBIENT_REDIRECT_OBJECT_ID")) return other;
#endif
  return redirect_OBJECT_ID;
}

void load_programs(const State &state, const std::string &dir, const std::string &tag, bool jump) {
  const struct settings &settings = state.settings();
  const Features kernel = features();
  std::unique_ptr<char, Free> log(static_cast<char *>(malloc(LOG_SIZE)));
  if (!log) throw KernelError(ENOMEM, "malloc", "verifier log");
  log.get()[0] = 0;
  std::string said;
  Collecting collecting(said);

  LIBBPF_OPTS(bpf_object_open_opts, options);
  options.kernel_log_buf = log.get();
  options.kernel_log_size = LOG_SIZE;
#ifdef AMBIENT_FAULTS
  std::string other;
  std::unique_ptr<redirect_bpf, Destroy> skeleton(open_other(options, other));
#else
  std::unique_ptr<redirect_bpf, Destroy> skeleton(redirect_bpf__open_opts(&options));
#endif
  if (!skeleton) throw KernelError(errno, "bpf_object__open", "programs " + tag, said);

  auto *constants = skeleton->rodata;
  constants->mark_bypass = settings.mark_bypass;
  constants->mark_to_proxy = settings.mark_to_proxy;
  constants->mark_tproxy = settings.mark_tproxy;
  for (int i = 0; i < 5; i++) constants->sign[i] = settings.sign[i];
  for (int i = 0; i < 2; i++) constants->direct_seed[i] = settings.direct_seed[i];
  constants->direct_sets = direct_sets(settings);
  // A kernel that knows full sockets only (4.20, 5.1) has none of what came later.
  const bool old = !kernel.skc_lookup || settings.variant & VARIANT_FULL_SOCKETS_ONLY;
  constants->full_sockets_only = old;
  constants->use_redirect_peer = !old && kernel.redirect_peer && !(settings.variant & VARIANT_NO_REDIRECT_PEER);
  constants->use_check_mtu = !old && kernel.check_mtu;
  constants->use_check_syncookie = !old && kernel.tcp_check_syncookie;
  constants->use_sk_assign = !old && kernel.sk_assign && !(settings.variant & VARIANT_NO_SK_ASSIGN);
  constants->use_spin_lock = !old;
  // What has no bpf_sk_assign (5.7) has no socket lookup programs (5.9).
  constants->use_sk_lookup = constants->use_sk_assign && kernel.sk_lookup && !(settings.variant & VARIANT_NO_SK_LOOKUP);
  constants->use_ringbuf = map_info(state.fd(EVENTS), "events").type == BPF_MAP_TYPE_RINGBUF;
  if (!constants->use_sk_lookup) {
    bpf_program__set_autoload(skeleton->progs.proxy_lookup, false);
    // Without it the in-pod contract has no way to the proxy's listeners.
    for (bpf_program *program : {skeleton->progs.inpod_egress, skeleton->progs.inpod_ingress,
                                 skeleton->progs.inpod_lookup, skeleton->progs.inpod_sign, skeleton->progs.inpod_guard}) {
      bpf_program__set_autoload(program, false);
    }
  }

  for (int i = 0; i < MAP_COUNT; i++) {
    Map map = static_cast<Map>(i);
    // attachments and the jump maps are the loader's alone
    bpf_map *declared = bpf_object__find_map_by_name(skeleton->obj, map_name(map));
    if (!declared) continue;
    int result = kernel_call("bpf(BPF_OBJ_GET_INFO_BY_FD)", [&] { return bpf_map__reuse_fd(declared, state.fd(map)); });
    if (result < 0) throw KernelError(errno, "bpf_map__reuse_fd", map_name(map), said);
  }

  if (kernel_call("bpf(BPF_PROG_LOAD)", [&] { return bpf_object__load(skeleton->obj); }) < 0) {
    KernelError error(errno, "bpf(BPF_PROG_LOAD)", "programs " + tag, said);
    error.verifier_log = log.get();
    std::string verdict = verdict_line(error.verifier_log);
    if (!verdict.empty()) error.kernel_message = verdict + "; " + error.kernel_message;
    throw error;
  }

  // What runs in pods' namespaces already goes on with these.
  for (enum program jumped_to : JUMPED_TO) {
    bpf_program *program = bpf_object__find_program_by_name(skeleton->obj, word_of(PROGRAMS, jumped_to));
    if (!jump || !program || !bpf_program__autoload(program)) continue;
    const Jump place = jump_of(jumped_to);
    int fd = bpf_program__fd(program);
    update(state.fd(place.map), &place.index, &fd, Update::any, map_name(place.map));
  }

  std::string programs = dir + "/programs", directory = programs + "/" + tag;
  make_directory(programs, 0700);
  make_directory(directory, 0700);
  auto pin = [&](const char *name) {
    bpf_program *program = bpf_object__find_program_by_name(skeleton->obj, name);
    if (!program) throw KernelError(ENOENT, "bpf_object__find_program_by_name", name);
    if (!bpf_program__autoload(program)) return;
    // By another name first: who looks meanwhile finds the old pin or the new one.
    std::string path = directory + "/" + name, unfinished = path + "_new";
    remove_file(unfinished);
    pin_object(bpf_program__fd(program), unfinished);
    rename_file(unfinished, path);
  };
  // It counts nothing and is attached nowhere, so it is none of PROGRAMS, whose last one tells that all are there.
  pin("direct_import");
  for (const Name *name = PROGRAMS; name->word; name++) pin(name->word);
}

void jump_to_programs(const State &state, const std::string &directory) {
  for (enum program jumped_to : JUMPED_TO) {
    Fd program = get_object(directory + "/" + word_of(PROGRAMS, jumped_to), true);
    if (!program) continue;
    if (jumped_to == INPOD_LOOKUP) wait_for_programs();
    const Jump place = jump_of(jumped_to);
    int fd = program.get();
    update(state.fd(place.map), &place.index, &fd, Update::any, map_name(place.map));
  }
}

Fd load_stub(const State &state, enum program program, uint32_t interface_id, bool drop) {
  const bool lookup = program == INPOD_LOOKUP;
  const Jump jump = jump_of(program);
  const auto id = static_cast<int32_t>(interface_id);
  std::vector<bpf_insn> code;
  auto map = [&](uint8_t reg, int fd) {
    code.push_back({BPF_LD | BPF_DW | BPF_IMM, reg, BPF_PSEUDO_MAP_FD, 0, fd});
    code.push_back({0, 0, 0, 0, 0});
  };
  if (lookup) {
    // identity[0] = id; the context has no room for it
    code.push_back({BPF_ALU64 | BPF_MOV | BPF_X, BPF_REG_6, BPF_REG_1, 0, 0});
    code.push_back({BPF_ST | BPF_MEM | BPF_W, BPF_REG_10, 0, -4, 0});
    code.push_back({BPF_ALU64 | BPF_MOV | BPF_X, BPF_REG_2, BPF_REG_10, 0, 0});
    code.push_back({BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_2, 0, 0, -4});
    map(BPF_REG_1, state.fd(IDENTITY));
    code.push_back({BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_map_lookup_elem});
    code.push_back({BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_0, 0, 2, 0});
    code.push_back({BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_1, 0, 0, id});
    code.push_back({BPF_STX | BPF_MEM | BPF_W, BPF_REG_0, BPF_REG_1, 0, 0});
    code.push_back({BPF_ALU64 | BPF_MOV | BPF_X, BPF_REG_1, BPF_REG_6, 0, 0});
  } else {
    // skb->cb[0] = id: it lasts over the tail call, and nobody else writes it in between
    code.push_back({BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_2, 0, 0, id});
    code.push_back({BPF_STX | BPF_MEM | BPF_W, BPF_REG_1, BPF_REG_2, offsetof(struct __sk_buff, cb), 0});
  }
  map(BPF_REG_2, state.fd(jump.map));
  code.push_back({BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_3, 0, 0, static_cast<int32_t>(jump.index)});
  code.push_back({BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_tail_call});
  const int32_t otherwise = lookup ? static_cast<int32_t>(SK_PASS) : drop ? TC_ACT_SHOT : TC_ACT_UNSPEC;
  code.push_back({BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_0, 0, 0, otherwise});
  code.push_back({BPF_JMP | BPF_EXIT, 0, 0, 0, 0});

  const char *name = word_of(PROGRAMS, program);
  LIBBPF_OPTS(bpf_prog_load_opts, options);
  if (lookup) options.expected_attach_type = BPF_SK_LOOKUP;
  Fd fd(kernel_call("bpf(BPF_PROG_LOAD)", [&] {
    return bpf_prog_load(lookup ? BPF_PROG_TYPE_SK_LOOKUP : BPF_PROG_TYPE_SCHED_CLS, name, "Dual BSD/GPL", code.data(),
                         code.size(), &options);
  }));
  if (!fd) throw KernelError(errno, "bpf(BPF_PROG_LOAD)", std::string("stub of ") + name);
  return fd;
}

uint32_t jump_target(const State &state, enum program program) {
  const Jump jump = jump_of(program);
  uint32_t id = 0;
  return lookup(state.fd(jump.map), &jump.index, &id, map_name(jump.map)) ? id : 0;
}

}  // namespace ambient
