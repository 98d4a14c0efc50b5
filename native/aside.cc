// SPDX-License-Identifier: Apache-2.0
#include "aside.h"

#include <new>
#include <optional>

#include "error.h"
#include "errors_js.h"

namespace ambient {

namespace {

class Call : public Napi::AsyncWorker {
 public:
  Call(Napi::Env env, std::function<void()> call, std::function<Napi::Value(Napi::Env)> result)
      : Napi::AsyncWorker(env, "ambient_redirect.aside"),
        deferred_(Napi::Promise::Deferred::New(env)),
        call_(std::move(call)),
        result_(std::move(result)) {}

  Napi::Promise start() {
    Napi::Promise promise = deferred_.Promise();
    Queue();
    return promise;
  }

 private:
  void Execute() override {
    try {
      call_();
    } catch (const KernelError &error) {
      error_.emplace(error);
    } catch (const std::bad_alloc &) {
      error_.emplace(ENOMEM, "malloc", "");
    }
  }

  void OnOK() override {
    if (error_) deferred_.Reject(error_value(Env(), *error_));
    else deferred_.Resolve(result_(Env()));
  }

  Napi::Promise::Deferred deferred_;
  std::function<void()> call_;
  std::function<Napi::Value(Napi::Env)> result_;
  std::optional<KernelError> error_;
};

}  // namespace

Napi::Promise await_call(Napi::Env env, std::function<void()> call, std::function<Napi::Value(Napi::Env)> result) {
  // Deletes itself when it is done.
  return (new Call(env, std::move(call), std::move(result)))->start();
}

}  // namespace ambient
