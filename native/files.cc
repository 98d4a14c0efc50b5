// SPDX-License-Identifier: Apache-2.0
#include "files.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "error.h"
#include "faults.h"
#include "fd.h"

namespace ambient {

void close_fd(int fd) {
  if (::close(fd) < 0) throw KernelError(errno, "close", "fd " + std::to_string(fd));
}

namespace {

struct FileIdentity {
  uint32_t dev_major, dev_minor;
  uint64_t ino;
  bool directory;

  bool operator==(const FileIdentity &other) const {
    return dev_major == other.dev_major && dev_minor == other.dev_minor && ino == other.ino;
  }
};

// statx instead of stat: glibc 2.33 made stat and fstat symbols of their own, which older hosts lack.
// false: it does not exist
bool identify(int fd, const std::string &path, FileIdentity &identity) {
  struct statx status;
  int flags = fd >= 0 ? AT_EMPTY_PATH : AT_SYMLINK_NOFOLLOW;
  int result = kernel_call("statx", [&] {
    return ::statx(fd >= 0 ? fd : AT_FDCWD, fd >= 0 ? "" : path.c_str(), flags, STATX_INO | STATX_TYPE, &status);
  });
  if (result < 0 && errno == ENOENT) return false;
  if (result < 0) throw KernelError(errno, "statx", path);
  identity = {status.stx_dev_major, status.stx_dev_minor, status.stx_ino, S_ISDIR(status.stx_mode)};
  return true;
}

int64_t monotonic_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

}  // namespace

int lock_file(const std::string &path, uint32_t timeout_ms, bool shared) {
  const int64_t deadline = monotonic_ms() + timeout_ms;
  for (;;) {
    Fd fd(kernel_call("open", [&] {
      return ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    }));
    if (!fd) throw KernelError(errno, "open", path);
    // flock has no time limit of its own, and an alarm signal would belong to Node. The steps are short against what
    // holders do under the lock (links: tens of milliseconds).
    int64_t step_ms = 1;
    while (kernel_call("flock", [&] { return ::flock(fd.get(), (shared ? LOCK_SH : LOCK_EX) | LOCK_NB); }) < 0) {
      if (errno == EINTR) continue;
      if (errno != EWOULDBLOCK) throw KernelError(errno, "flock", path);
      int64_t left = deadline - monotonic_ms();
      if (left <= 0) {
        throw KernelError(ETIMEDOUT, "flock", path + ", held by another process for " + std::to_string(timeout_ms) + " ms");
      }
      timespec pause = {0, static_cast<long>(std::min(left, step_ms)) * 1000000};
      nanosleep(&pause, nullptr);
      step_ms = std::min<int64_t>(step_ms * 2, 8);
    }
    // A holder may have removed the file while we waited: then this lock excludes nobody who opens the path now.
    FileIdentity held, named;
    identify(fd.get(), path, held);
    if (identify(-1, path, named) && named == held) return fd.release();
  }
}

bool is_bpffs(const std::string &path) {
  struct statfs status;
  int result = kernel_call("statfs", [&] { return ::statfs(path.c_str(), &status); });
  if (result < 0 && (errno == ENOENT || errno == ENOTDIR)) return false;
  if (result < 0) throw KernelError(errno, "statfs", path);
  return static_cast<uint32_t>(status.f_type) == BPF_FS_MAGIC;
}

void mount_bpffs(const std::string &path) {
  int result = kernel_call("mount", [&] {
    return ::mount("bpf", path.c_str(), "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RELATIME, "mode=0700");
  });
  if (result < 0) throw KernelError(errno, "mount", "bpf on " + path);
}

bool make_directory(const std::string &path, mode_t mode) {
  if (kernel_call("mkdir", [&] { return ::mkdir(path.c_str(), mode); }) == 0) return true;
  if (errno != EEXIST) throw KernelError(errno, "mkdir", path);
  FileIdentity present;
  if (identify(-1, path, present) && !present.directory) throw KernelError(ENOTDIR, "mkdir", path);
  return false;
}

bool remove_directory(const std::string &path) {
  if (kernel_call("rmdir", [&] { return ::rmdir(path.c_str()); }) == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "rmdir", path);
}

bool remove_file(const std::string &path) {
  if (kernel_call("unlink", [&] { return ::unlink(path.c_str()); }) == 0) return true;
  if (errno == ENOENT) return false;
  throw KernelError(errno, "unlink", path);
}

void rename_file(const std::string &from, const std::string &to) {
  if (kernel_call("rename", [&] { return ::rename(from.c_str(), to.c_str()); }) < 0) {
    throw KernelError(errno, "rename", from + " to " + to);
  }
}

std::string read_file(const std::string &path) {
  Fd fd(kernel_call("open", [&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); }));
  if (!fd) throw KernelError(errno, "open", path);
  std::string text;
  char buffer[4096];
  for (;;) {
    ssize_t count = kernel_call("read", [&] { return ::read(fd.get(), buffer, sizeof(buffer)); });
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw KernelError(errno, "read", path);
    if (count == 0) return text;
    text.append(buffer, static_cast<size_t>(count));
  }
}

uint64_t capabilities() {
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};
  if (kernel_call("capget", [&] { return syscall(SYS_capget, &header, data); }) < 0) {
    throw KernelError(errno, "capget", "this thread");
  }
  return static_cast<uint64_t>(data[1].effective) << 32 | data[0].effective;
}

}  // namespace ambient
