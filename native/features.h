// SPDX-License-Identifier: Apache-2.0
// What the running kernel can do, found by doing it: a version number says nothing about backports, configuration or
// what a container may.
#ifndef AMBIENT_NATIVE_FEATURES_H
#define AMBIENT_NATIVE_FEATURES_H

#include "fd.h"

namespace ambient {

struct Features {
  bool tcx;                 // 6.6
  bool redirect_peer;       // 5.10
  bool sk_assign;           // 5.7
  bool sk_lookup;           // 5.10, its sockets put there by a tc program
  bool skc_lookup;          // 5.2
  bool check_mtu;           // 5.12
  bool tcp_check_syncookie; // 5.2
  bool netns_cookie;        // 5.14
  bool btf;                 // 4.18
};

// Probed at the first call, and never by anything that does not load programs. Throws EPERM where the process may not
// load programs: then nothing is known.
const Features &features();

// A description of one type, number 1: int. Closed, with errno left, where the kernel takes none.
Fd load_int_btf();

}  // namespace ambient

#endif
