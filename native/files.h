// SPDX-License-Identifier: Apache-2.0
// Files, directories and mounts of the state directory, and what the process is allowed to do.
#ifndef AMBIENT_NATIVE_FILES_H
#define AMBIENT_NATIVE_FILES_H

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace ambient {

void close_fd(int fd);
// `shared`: beside others that are; else alone.
int lock_file(const std::string &path, uint32_t timeout_ms, bool shared);
bool is_bpffs(const std::string &path);
void mount_bpffs(const std::string &path);
bool make_directory(const std::string &path, mode_t mode);
bool remove_directory(const std::string &path);
bool remove_file(const std::string &path);
void rename_file(const std::string &from, const std::string &to);
// The whole of a small file of proc or sysfs.
std::string read_file(const std::string &path);
uint64_t capabilities();

}  // namespace ambient

#endif
