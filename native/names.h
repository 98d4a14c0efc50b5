// SPDX-License-Identifier: Apache-2.0
// The words for the numbers of bpf/redirect.h: the same in counters, trace, metrics and records.
#ifndef AMBIENT_NATIVE_NAMES_H
#define AMBIENT_NATIVE_NAMES_H

#include <cstdint>

namespace ambient {

struct Name {
  const char *word;
  uint32_t number;
};

// Each ends with a null word.
extern const Name PROGRAMS[];
extern const Name REASONS[];
extern const Name FLAGS[];  // INTERFACE_* and VARIANT_* under their full names
extern const Name SIZES[];
extern const Name HOOK_KINDS[];
extern const Name EXCLUSION_KINDS[];
extern const Name ATTACHMENT_STATES[];
extern const Name ROLES[];
extern const Name CONTRACTS[];

// nullptr if there is no such number
const char *word_of(const Name *names, uint32_t number);
// nullptr if there is no such word
const Name *name_of(const Name *names, const char *word);

}  // namespace ambient

#endif
