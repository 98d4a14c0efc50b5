// SPDX-License-Identifier: Apache-2.0
#include "programs.h"

#include <bpf/libbpf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

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

const char *object_id() { return redirect_OBJECT_ID; }

void load_programs(const State &state, const std::string &dir, const std::string &tag) {
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
  if (!constants->use_sk_lookup) bpf_program__set_autoload(skeleton->progs.proxy_lookup, false);

  for (int i = 0; i < SETTINGS; i++) {
    Map map = static_cast<Map>(i);
    // attachments is a map of the loader alone
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

}  // namespace ambient
