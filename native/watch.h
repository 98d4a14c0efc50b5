// SPDX-License-Identifier: Apache-2.0
// Node's event loop tells when a descriptor can be read: no thread, no polling.
#ifndef AMBIENT_NATIVE_WATCH_H
#define AMBIENT_NATIVE_WATCH_H

#include <napi.h>

namespace ambient {

// Calls `on_readable` as long as `fd` has something to read or has ended, until the returned function is called. That
// has to be before the descriptor is closed. EEXIST: it is watched already; EPERM: its kind cannot be.
Napi::Function watch_readable(Napi::Env env, int fd, Napi::Function on_readable);

}  // namespace ambient

#endif
