// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4) of a block of memory, as lower-case hex digits.
#ifndef AMBIENT_NATIVE_SHA256_H
#define AMBIENT_NATIVE_SHA256_H

#include <cstddef>
#include <string>

namespace ambient {

std::string sha256_hex(const void *data, size_t size);

}  // namespace ambient

#endif
