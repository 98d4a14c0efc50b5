# SPDX-License-Identifier: Apache-2.0
#
# bpf                      bpf/NAME.bpf.c -> NAME.skel.h, included by native/ as "NAME.skel.h"
# ambient_redirect         the addon, with libbpf, libelf and zlib inside
# ambient_redirect_faults  the same with AMBIENT_FAULTS: every kernel call is numbered and can be made to fail
# ambient_redirect_asan    the same under AddressSanitizer
{
  'variables': {
    'skeletons': 'build/skeletons',
    'programs': '<!(ls bpf/*.bpf.c 2>/dev/null || true)',
  },
  'target_defaults': {
    'target_conditions': [
      ['_type=="loadable_module"', {
        'sources': ['<!@(ls native/*.c native/*.cc)'],
        # Not native/ itself: its files include each other by quotes, and a features.h there would hide the C library's.
        'include_dirs': ['bpf', '<(skeletons)', '<!(node -p "require(\'node-addon-api\').include_dir")'],
        'defines': ['NAPI_VERSION=9', 'NAPI_CPP_EXCEPTIONS', '_GNU_SOURCE'],
        'cflags!': ['-fno-exceptions'],
        'cflags': [
          '-Wall', '-Wextra', '-fvisibility=hidden', '-ffunction-sections', '-fdata-sections', '-O2',
          '-ffile-prefix-map=<!(pwd)=.',
        ],
        'cflags_c': ['-std=gnu11'],
        'cflags_cc!': ['-fno-exceptions', '-std=gnu++17', '-std=gnu++20'],
        # gcc 12 sees overlapping copies in std::string that are not there (GCC bug 105329).
        'cflags_cc': ['-std=c++20', '-fvisibility-inlines-hidden', '-Wno-restrict'],
        'libraries': ['-l:libbpf.a', '-l:libelf.a', '-l:libz.a'],
        'ldflags': [
          # libstdc++ is linked in, so that no symbol version of the host's matters; libgcc_s is not, because its
          # static form needs _dl_find_object of glibc 2.35, and Node needs the shared one anyway.
          '-static-libstdc++', '-Wl,--version-script=<!(pwd)/native/exports.map',
          '-Wl,--exclude-libs,ALL', '-Wl,--gc-sections', '-Wl,-z,relro,-z,now', '-Wl,--build-id=sha1',
          # Debian's static libraries are built for executables: see native/static_link.c.
          '-Wl,--wrap=stderr',
        ],
      }],
    ],
  },
  'targets': [
    {
      'target_name': 'bpf',
      'type': 'none',
      'conditions': [
        ['"<(programs)" != ""', {
          'actions': [{
            'action_name': 'skeletons',
            'inputs': ['<!@(ls bpf/*.bpf.c bpf/*.h)', '.ci/bpf'],
            'outputs': ['<!@(ls bpf/*.bpf.c | sed "s,.*/,<(skeletons)/,; s,[.]bpf[.]c$,.skel.h,")'],
            'action': ['sh', '.ci/bpf', '<(skeletons)', '<!@(ls bpf/*.bpf.c)'],
          }],
        }],
      ],
    },
    {
      'target_name': 'ambient_redirect',
      'type': 'loadable_module',
      'dependencies': ['bpf'],
    },
    {
      'target_name': 'ambient_redirect_faults',
      'type': 'loadable_module',
      'dependencies': ['bpf'],
      'defines': ['AMBIENT_FAULTS=1'],
    },
    {
      'target_name': 'ambient_redirect_asan',
      'type': 'loadable_module',
      'dependencies': ['bpf'],
      'cflags': ['-fsanitize=address', '-fno-omit-frame-pointer', '-g'],
      'ldflags': ['-fsanitize=address'],
    },
  ],
}
