// SPDX-License-Identifier: Apache-2.0
// KernelError as the NativeError of plugin/native.ts.
#ifndef AMBIENT_NATIVE_ERRORS_JS_H
#define AMBIENT_NATIVE_ERRORS_JS_H

#include <napi.h>

#include "error.h"

namespace ambient {

Napi::Value error_value(Napi::Env env, const KernelError &error);

}  // namespace ambient

#endif
