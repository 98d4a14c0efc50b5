// SPDX-License-Identifier: Apache-2.0
// The programs of bpf/redirect.bpf.c, which are part of the addon as a BPF object.
#ifndef AMBIENT_NATIVE_PROGRAMS_H
#define AMBIENT_NATIVE_PROGRAMS_H

#include <string>

#include "state.h"

namespace ambient {

// Loads all programs against the maps of `state` and pins them under dir/programs/<tag>. A pin that is there is
// replaced; programs that are attached keep running.
void load_programs(const State &state, const std::string &dir, const std::string &tag);
// the first 16 hex digits of the object's SHA-256
const char *object_id();

}  // namespace ambient

#endif
