// SPDX-License-Identifier: Apache-2.0
// The values of the maps as JavaScript objects and back: the only place that knows both plugin/native.ts and
// bpf/redirect.h. `path` names the argument in a TypeError. A value that the kernel gave and that no version of this
// program can have written throws EPROTO.
#ifndef AMBIENT_NATIVE_RECORDS_H
#define AMBIENT_NATIVE_RECORDS_H

#include <napi.h>

#include <string>

#include "redirect.h"

namespace ambient {

Napi::Object bytes_object(Napi::Env env, const void *data, size_t size);  // a Uint8Array
Napi::Object to_object(Napi::Env env, const struct settings &settings);
Napi::Object to_object(Napi::Env env, const struct attachment &record);
Napi::Object to_object(Napi::Env env, const struct interface &record);
Napi::Object to_object(Napi::Env env, const struct endpoint &record);
Napi::Object to_object(Napi::Env env, const struct proxies &record);

struct attachment to_attachment(Napi::Value value, const std::string &path);
struct interface to_interface(Napi::Value value, const std::string &path);
struct endpoint to_endpoint(Napi::Value value, const std::string &path);
struct proxies to_proxies(Napi::Value generation, Napi::Value proxies);

}  // namespace ambient

#endif
