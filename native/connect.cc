// SPDX-License-Identifier: Apache-2.0
#include "connect.h"

#include <uv.h>

#include "error.h"
#include "errors_js.h"
#include "sockets.h"

namespace ambient {

namespace {

class Connection {
 public:
  Connection(Napi::Env env, Fd socket, std::string object)
      : env_(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        async_(env, "ambient_redirect.connect"),
        socket_(std::move(socket)),
        object_(std::move(object)) {}

  Napi::Promise start(uint32_t timeout_ms) {
    Napi::Promise promise = deferred_.Promise();
    uv_loop_t *loop = nullptr;
    napi_get_uv_event_loop(env_, &loop);
    int error = uv_poll_init(loop, &poll_, socket_.get());
    if (error) {
      deferred_.Reject(error_value(env_, KernelError(-error, "epoll", object_)));
      delete this;
      return promise;
    }
    poll_.data = this;
    uv_timer_init(loop, &timer_);
    timer_.data = this;
    napi_add_env_cleanup_hook(env_, on_exit, this);
    uv_poll_start(&poll_, UV_WRITABLE, [](uv_poll_t *handle, int status, int) {
      auto *self = static_cast<Connection *>(handle->data);
      // libuv calls an error on the socket EBADF; the socket knows which.
      int error = connect_result(self->socket_.get());
      self->settle(error || status >= 0 ? error : -status);
    });
    // The loop's clock stands still while JavaScript runs.
    uv_update_time(loop);
    uv_timer_start(
        &timer_, [](uv_timer_t *handle) { static_cast<Connection *>(handle->data)->settle(ETIMEDOUT); }, timeout_ms, 0);
    return promise;
  }

 private:
  void settle(int error) {
    napi_remove_env_cleanup_hook(env_, on_exit, this);
    Napi::HandleScope handles(env_);
    {
      // Closing it runs the microtasks, and with them what awaits the promise.
      Napi::CallbackScope callback(env_, async_);
      uv_poll_stop(&poll_);
      if (error) deferred_.Reject(error_value(env_, KernelError(error, "connect", object_)));
      else deferred_.Resolve(Napi::Number::New(env_, socket_.release()));
    }
    close();
  }

  // The environment (a worker, the process) ends while the connection is pending.
  static void on_exit(void *data) { static_cast<Connection *>(data)->close(); }

  // Deleted when both handles are closed, as libuv still looks at them until then.
  void close() {
    uv_close(reinterpret_cast<uv_handle_t *>(&poll_), closed);
    uv_close(reinterpret_cast<uv_handle_t *>(&timer_), closed);
  }

  static void closed(uv_handle_t *handle) {
    auto *self = static_cast<Connection *>(handle->data);
    if (++self->closed_ == 2) delete self;
  }

  Napi::Env env_;
  Napi::Promise::Deferred deferred_;
  Napi::AsyncContext async_;
  Fd socket_;
  std::string object_;
  uv_poll_t poll_;
  uv_timer_t timer_;
  int closed_ = 0;
};

}  // namespace

Napi::Promise await_connection(Napi::Env env, Fd socket, const std::string &object, uint32_t timeout_ms) {
  return (new Connection(env, std::move(socket), object))->start(timeout_ms);
}

}  // namespace ambient
