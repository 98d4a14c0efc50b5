// SPDX-License-Identifier: Apache-2.0
#include "background.h"

#include <sched.h>
#include <uv.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <vector>

#ifdef AMBIENT_FAULTS
namespace ambient {
int call_until(std::function<int()> call, const std::function<bool()> &) { return call(); }
void join_background() {}
}  // namespace ambient
#else

namespace ambient {

namespace {

// libuv's threads instead of std::thread: pthread_create has a symbol version of glibc 2.34 here.
struct Pending {
  std::function<int()> call;
  uv_thread_t thread;
  // 1 until the call has returned; then 0 or the negative errno
  std::atomic<int> result{1};
};

// Of this JavaScript thread. A pointer that is never freed, because exit() would otherwise destroy what threads use.
std::vector<std::unique_ptr<Pending>> &pending() {
  thread_local auto *list = new std::vector<std::unique_ptr<Pending>>;
  return *list;
}

void forget_finished() {
  auto &list = pending();
  for (size_t i = 0; i < list.size();) {
    if (list[i]->result.load() > 0) {
      i++;
      continue;
    }
    uv_thread_join(&list[i]->thread);
    list.erase(list.begin() + static_cast<ptrdiff_t>(i));
  }
}

}  // namespace

int call_until(std::function<int()> call, const std::function<bool()> &effective) {
  forget_finished();
  pending().push_back(std::make_unique<Pending>());
  Pending &entry = *pending().back();
  entry.call = std::move(call);
  int error = uv_thread_create(
      &entry.thread,
      [](void *argument) {
        auto *self = static_cast<Pending *>(argument);
        int result = self->call() < 0 ? -errno : 0;
        self->result.store(result);
      },
      &entry);
  if (error) {
    // No thread can be had: then the caller waits as the kernel does.
    std::function<int()> made = std::move(entry.call);
    pending().pop_back();
    return made();
  }
  for (;;) {
    int result = entry.result.load();
    if (result == 1 && effective()) return 0;
    if (result < 0) {
      errno = -result;
      return -1;
    }
    if (result == 0) return 0;
    sched_yield();
  }
}

void join_background() {
  for (auto &entry : pending()) uv_thread_join(&entry->thread);
  pending().clear();
}

}  // namespace ambient

#endif
