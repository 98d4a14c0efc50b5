// SPDX-License-Identifier: Apache-2.0
// Waiting for a connect() in Node's event loop: the one thing here that is not synchronous.
#ifndef AMBIENT_NATIVE_CONNECT_H
#define AMBIENT_NATIVE_CONNECT_H

#include <napi.h>

#include <string>

#include "fd.h"

namespace ambient {

// Resolves with the descriptor, which then is the caller's; rejects with the errno of the connection, or ETIMEDOUT.
Napi::Promise await_connection(Napi::Env env, Fd socket, const std::string &object, uint32_t timeout_ms);

}  // namespace ambient

#endif
