// SPDX-License-Identifier: Apache-2.0
// The events of the programs, read from the ring buffer (a perf event array below 5.8) when the kernel says that there
// are some.
#ifndef AMBIENT_NATIVE_EVENTS_H
#define AMBIENT_NATIVE_EVENTS_H

#include <napi.h>

#include "state.h"

namespace ambient {

// Calls `on_events` with arrays of events until the returned function is called. What was in the buffer before is
// thrown away.
Napi::Function follow_events(Napi::Env env, const State &state, Napi::Function on_events);

}  // namespace ambient

#endif
