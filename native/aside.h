// SPDX-License-Identifier: Apache-2.0
// Kernel calls that wait for an RCU grace period (10 ms and more), made on a thread of libuv's pool meanwhile Node's
// event loop goes on. The kernel makes them one after the other in any case: each holds the lock of rtnetlink.
#ifndef AMBIENT_NATIVE_ASIDE_H
#define AMBIENT_NATIVE_ASIDE_H

#include <napi.h>

#include <functional>

namespace ambient {

// Resolves with what `result` makes of it after `call` has returned on the other thread; rejects with its KernelError.
// `call` may not touch JavaScript, `result` runs where it may.
Napi::Promise await_call(Napi::Env env, std::function<void()> call, std::function<Napi::Value(Napi::Env)> result);

}  // namespace ambient

#endif
