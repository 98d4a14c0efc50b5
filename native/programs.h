// SPDX-License-Identifier: Apache-2.0
// The programs of bpf/redirect.bpf.c, which are part of the addon as a BPF object.
#ifndef AMBIENT_NATIVE_PROGRAMS_H
#define AMBIENT_NATIVE_PROGRAMS_H

#include <string>

#include "state.h"

namespace ambient {

// Loads all programs against the maps of `state` and pins them under dir/programs/<tag>. A pin that is there is
// replaced; programs that are attached keep running. `jump`: stubs go on to these from now on.
void load_programs(const State &state, const std::string &dir, const std::string &tag, bool jump);
// Stubs go on to the programs that are pinned in `directory`, those of the socket lookup last: what was steered by the
// others is looked up by them.
void jump_to_programs(const State &state, const std::string &directory);
// A program of a few instructions for one hook in a pod's netns: it says whose hook it is and goes on to `program`, which
// is INPOD_EGRESS, INPOD_INGRESS or INPOD_LOOKUP, by the maps JUMP and JUMP_LOOKUP. `drop`: what it does without them,
// once the state directory is gone.
Fd load_stub(const State &state, enum program program, uint32_t interface_id, bool drop);
// Id of what stubs of `program` go on to now; 0: nothing.
uint32_t jump_target(const State &state, enum program program);
// the first 16 hex digits of the object's SHA-256
const char *object_id();

}  // namespace ambient

#endif
