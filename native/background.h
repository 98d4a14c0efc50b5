// SPDX-License-Identifier: Apache-2.0
// Kernel calls that take effect at once and return late: after a change to a map of maps bpf(2) waits for an RCU grace
// period (6 to 16 ms here) so that no program still sees the old inner map. Nothing of ours needs that wait.
#ifndef AMBIENT_NATIVE_BACKGROUND_H
#define AMBIENT_NATIVE_BACKGROUND_H

#include <functional>

namespace ambient {

// Makes `call` on a thread of its own and returns when it has returned or as soon as `effective` is true. The result
// is what `call` returned (-1 with errno set for failure), 0 if it is still waiting. The process cannot end before
// the thread has come back from the kernel. With fault injection the call is made here, so that the numbering holds.
int call_until(std::function<int()> call, const std::function<bool()> &effective);
// Waits for the threads that are still in the kernel: they run code of this module, which may be unloaded.
void join_background();

}  // namespace ambient

#endif
