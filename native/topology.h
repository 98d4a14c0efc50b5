// SPDX-License-Identifier: Apache-2.0
#ifndef AMBIENT_REDIRECT_TOPOLOGY_H
#define AMBIENT_REDIRECT_TOPOLOGY_H

#include <napi.h>

// Adds the functions of plugin/demo/native-topology.ts to `exports`.
void InitTopology(Napi::Env env, Napi::Object exports);

#endif
