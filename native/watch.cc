// SPDX-License-Identifier: Apache-2.0
#include "watch.h"

#include <uv.h>

#include <memory>

#include "error.h"
#include "faults.h"

namespace ambient {

namespace {

class Watcher {
 public:
  Watcher(Napi::Env env, Napi::Function on_readable)
      : env_(env), async_(env, "ambient_redirect.watch"), on_readable_(Napi::Persistent(on_readable)) {}

  void start(int fd) {
    uv_loop_t *loop = nullptr;
    napi_get_uv_event_loop(env_, &loop);
    int failure = 0;
    kernel_call("epoll", [&] {
      failure = uv_poll_init(loop, &poll_, fd);
      errno = -failure;
      return failure;
    });
    // An injected failure leaves no handle behind, as one of the kernel's does.
    if (failure || poll_.loop == nullptr) throw KernelError(failure ? -failure : errno, "epoll", "fd " + std::to_string(fd));
    poll_.data = this;
    watching_ = true;
    napi_add_env_cleanup_hook(env_, on_exit, this);
    uv_poll_start(&poll_, UV_READABLE, [](uv_poll_t *handle, int, int) {
      // An error of the descriptor is told by the next call on it.
      static_cast<Watcher *>(handle->data)->call();
    });
  }

  void stop() {
    if (!watching_) return;
    napi_remove_env_cleanup_hook(env_, on_exit, this);
    close();
  }

 private:
  void call() {
    Napi::HandleScope handles(env_);
    try {
      on_readable_.MakeCallback(env_.Global(), std::initializer_list<napi_value>{}, async_);
    } catch (const Napi::Error &error) {
      napi_fatal_exception(env_, error.Value());
    }
  }

  static void on_exit(void *data) { static_cast<Watcher *>(data)->close(); }

  // Deleted when the handle is closed, as libuv still looks at it until then, and as the callback may be what stops it.
  void close() {
    watching_ = false;
    uv_poll_stop(&poll_);
    uv_close(reinterpret_cast<uv_handle_t *>(&poll_),
             [](uv_handle_t *handle) { delete static_cast<Watcher *>(handle->data); });
  }

  Napi::Env env_;
  Napi::AsyncContext async_;
  Napi::FunctionReference on_readable_;
  uv_poll_t poll_ = {};
  bool watching_ = false;
};

}  // namespace

Napi::Function watch_readable(Napi::Env env, int fd, Napi::Function on_readable) {
  auto watcher = std::make_unique<Watcher>(env, on_readable);
  watcher->start(fd);
  // Called once: the second time there is nothing behind the pointer.
  auto holder = std::make_shared<Watcher *>(watcher.release());
  return Napi::Function::New(
      env,
      [holder](const Napi::CallbackInfo &) {
        if (*holder) (*holder)->stop();
        *holder = nullptr;
      },
      "stop");
}

}  // namespace ambient
