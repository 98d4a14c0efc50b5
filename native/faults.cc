// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

#ifdef AMBIENT_FAULTS

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>

namespace ambient {

namespace {

std::vector<std::string> calls;
unsigned long failing_call = 0;
int failing_errno = ENOMEM;
unsigned long killing_call = 0;
unsigned long stopping_call = 0;
int calls_file = -1;

unsigned long number_from_environment(const char *name, unsigned long otherwise) {
  const char *text = getenv(name);
  return text ? strtoul(text, nullptr, 10) : otherwise;
}

}  // namespace

void read_fault_environment() {
  failing_call = number_from_environment("AMBIENT_REDIRECT_FAIL_CALL", 0);
  failing_errno = static_cast<int>(number_from_environment("AMBIENT_REDIRECT_FAIL_ERRNO", ENOMEM));
  killing_call = number_from_environment("AMBIENT_REDIRECT_KILL_CALL", 0);
  stopping_call = number_from_environment("AMBIENT_REDIRECT_STOP_CALL", 0);
  if (const char *path = getenv("AMBIENT_REDIRECT_CALLS_FILE")) {
    calls_file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  }
}

int next_fault(const char *name) {
  calls.emplace_back(name);
  if (calls_file >= 0) {
    std::string line = calls.back() + "\n";
    // One write a line, so that the file is whole up to the call that kills.
    if (write(calls_file, line.data(), line.size()) < 0) abort();
  }
  if (calls.size() == killing_call) kill(getpid(), SIGKILL);
  // To this thread, which then stands when raise() returns.
  if (calls.size() == stopping_call) raise(SIGSTOP);
  return calls.size() == failing_call ? failing_errno : 0;
}

void set_fault(unsigned long n, int number) {
  failing_call = n ? calls.size() + n : 0;
  failing_errno = number;
}

const std::vector<std::string> &kernel_calls() { return calls; }

}  // namespace ambient

#endif
