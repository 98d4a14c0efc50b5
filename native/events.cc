// SPDX-License-Identifier: Apache-2.0
#include "events.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <uv.h>

#include <cstring>
#include <vector>

#include "error.h"
#include "faults.h"
#include "names.h"
#include "records.h"

namespace ambient {

namespace {

// Per CPU; a page each keeps what one wake-up can carry near what the ring buffer does.
constexpr size_t PERF_PAGES = 64;

class Follower {
 public:
  Follower(Napi::Env env, Napi::Function on_events)
      : env_(env), async_(env, "ambient_redirect.events"), on_events_(Napi::Persistent(on_events)) {}

  ~Follower() {
    if (ring_) ring_buffer__free(ring_);
    if (perf_) perf_buffer__free(perf_);
  }

  void open(const State &state) {
    // The buffer maps it for itself; it outlives the state that was given.
    map_ = Fd(kernel_call("fcntl(F_DUPFD_CLOEXEC)", [&] { return ::fcntl(state.fd(EVENTS), F_DUPFD_CLOEXEC, 0); }));
    if (!map_) throw KernelError(errno, "fcntl(F_DUPFD_CLOEXEC)", "map events");
    const bool ring = map_info(map_.get(), "events").type == BPF_MAP_TYPE_RINGBUF;
    int result = kernel_call("ring_buffer__new", [&] {
      if (ring) {
        ring_ = ring_buffer__new(map_.get(), on_record, this, nullptr);
        return ring_ ? 0 : -1;
      }
      perf_ = perf_buffer__new(
          map_.get(), PERF_PAGES,
          [](void *self, int, void *data, uint32_t size) { on_record(self, data, size); }, nullptr, this, nullptr);
      return perf_ ? 0 : -1;
    });
    if (result < 0) throw KernelError(errno, "ring_buffer__new", "map events");
    consume();
    records_.clear();

    uv_loop_t *loop = nullptr;
    napi_get_uv_event_loop(env_, &loop);
    int error = uv_poll_init(loop, &poll_, ring_ ? ring_buffer__epoll_fd(ring_) : perf_buffer__epoll_fd(perf_));
    if (error) throw KernelError(-error, "epoll", "map events");
    poll_.data = this;
    polling_ = true;
    napi_add_env_cleanup_hook(env_, on_exit, this);
    uv_poll_start(&poll_, UV_READABLE, [](uv_poll_t *handle, int, int) {
      static_cast<Follower *>(handle->data)->deliver();
    });
  }

  void stop() {
    if (!polling_) return;
    napi_remove_env_cleanup_hook(env_, on_exit, this);
    close();
  }

 private:
  static int on_record(void *self, void *data, size_t size) {
    // A perf event's size is rounded up.
    if (size < sizeof(struct event)) return 0;
    struct event event;
    memcpy(&event, data, sizeof(event));
    static_cast<Follower *>(self)->records_.push_back(event);
    return 0;
  }

  void consume() {
    if (ring_) ring_buffer__consume(ring_);
    else perf_buffer__consume(perf_);
  }

  Napi::Object object(const struct event &event) {
    Napi::Object object = Napi::Object::New(env_);
    const char *program = word_of(PROGRAMS, event.program), *reason = word_of(REASONS, event.reason);
    object.Set("time", Napi::BigInt::New(env_, static_cast<uint64_t>(event.time)));
    object.Set("ifindex", event.ifindex);
    object.Set("program", program ? program : std::to_string(event.program));
    object.Set("reason", reason ? reason : std::to_string(event.reason));
    object.Set("length", event.length);
    object.Set("family", event.family);
    object.Set("flags", event.flags);
    object.Set("protocol", event.protocol);
    object.Set("source", bytes_object(env_, event.tuple.source, 16));
    object.Set("destination", bytes_object(env_, event.tuple.destination, 16));
    object.Set("sourcePort", event.tuple.source_port);
    object.Set("destinationPort", event.tuple.destination_port);
    return object;
  }

  void deliver() {
    consume();
    if (records_.empty()) return;
    Napi::HandleScope handles(env_);
    Napi::Array events = Napi::Array::New(env_, records_.size());
    for (uint32_t i = 0; i < records_.size(); i++) events.Set(i, object(records_[i]));
    records_.clear();
    try {
      on_events_.MakeCallback(env_.Global(), {events}, async_);
    } catch (const Napi::Error &error) {
      napi_fatal_exception(env_, error.Value());
    }
  }

  static void on_exit(void *data) { static_cast<Follower *>(data)->close(); }

  // Deleted when the handle is closed, as libuv still looks at it until then.
  void close() {
    polling_ = false;
    uv_poll_stop(&poll_);
    uv_close(reinterpret_cast<uv_handle_t *>(&poll_),
             [](uv_handle_t *handle) { delete static_cast<Follower *>(handle->data); });
  }

  Napi::Env env_;
  Napi::AsyncContext async_;
  Napi::FunctionReference on_events_;
  Fd map_;
  ring_buffer *ring_ = nullptr;
  perf_buffer *perf_ = nullptr;
  std::vector<struct event> records_;
  uv_poll_t poll_;
  bool polling_ = false;
};

}  // namespace

Napi::Function follow_events(Napi::Env env, const State &state, Napi::Function on_events) {
  auto follower = std::make_unique<Follower>(env, on_events);
  follower->open(state);
  // Called once: the second time there is nothing behind the pointer.
  auto *holder = new Follower *(follower.release());
  return Napi::Function::New(
      env,
      [holder](const Napi::CallbackInfo &) {
        if (*holder) (*holder)->stop();
        *holder = nullptr;
      },
      "stop");
}

}  // namespace ambient
