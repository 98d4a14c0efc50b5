// SPDX-License-Identifier: Apache-2.0
// Every kernel call of the addon passes kernel_call(), so that the fault-injecting build can number the calls and make
// one of them fail. In the ordinary build it is the call and nothing else. close(2) is not among them: after its
// failure the descriptor is gone as well, and no caller could act on it.
//
// Environment of the fault-injecting build, read when the addon is loaded:
//   AMBIENT_REDIRECT_FAIL_CALL=N     the N-th call (1-based) fails
//   AMBIENT_REDIRECT_FAIL_ERRNO=E    with this errno, 12 (ENOMEM) if absent
//   AMBIENT_REDIRECT_KILL_CALL=N     the process is killed (SIGKILL) instead of making the N-th call
//   AMBIENT_REDIRECT_STOP_CALL=N     the process stops (SIGSTOP) before the N-th call, until it is sent SIGCONT
//   AMBIENT_REDIRECT_CALLS_FILE=PATH the names of all calls are appended, one a line, each before it is made
#ifndef AMBIENT_NATIVE_FAULTS_H
#define AMBIENT_NATIVE_FAULTS_H

#include <cerrno>
#include <string>
#include <vector>

namespace ambient {

#ifdef AMBIENT_FAULTS
// 0, or the errno that this call fails with instead of being made.
int next_fault(const char *name);
void read_fault_environment();
// The n-th call from now on fails with `number`; n of 0 switches off.
void set_fault(unsigned long n, int number);
const std::vector<std::string> &kernel_calls();
#endif

// `call` makes one kernel call and returns what it returns: negative, with errno set, for failure.
template <typename Call>
inline auto kernel_call([[maybe_unused]] const char *name, Call call) -> decltype(call()) {
#ifdef AMBIENT_FAULTS
  if (int number = next_fault(name)) {
    errno = number;
    return static_cast<decltype(call())>(-1);
  }
#endif
  return call();
}

}  // namespace ambient

#endif
