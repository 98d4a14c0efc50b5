// SPDX-License-Identifier: Apache-2.0
// The two ways in which an exported function fails. addon.cc turns them into a JavaScript Error and TypeError.
#ifndef AMBIENT_NATIVE_ERROR_H
#define AMBIENT_NATIVE_ERROR_H

#include <cerrno>
#include <string>
#include <utility>

namespace ambient {

// A kernel call failed. `syscall` is a literal: "setns", "RTM_NEWQDISC", "bpf(BPF_LINK_CREATE)".
struct KernelError {
  KernelError(int number, const char *syscall, std::string object, std::string kernel_message = {})
      : number(number), syscall(syscall), object(std::move(object)), kernel_message(std::move(kernel_message)) {}

  int number;
  const char *syscall;
  std::string object;
  std::string kernel_message;
  std::string verifier_log;
};

// A programmer gave a wrong argument; the message names it.
struct ArgumentError {
  std::string message;
};

// "EEXIST"; "ERRNO_600" for a number that Linux does not define.
std::string errno_name(int number);

}  // namespace ambient

#endif
