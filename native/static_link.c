// SPDX-License-Identifier: Apache-2.0
// What Debian's libelf.a and libbpf.a lack to be linked into a shared object. They are compiled for executables
// (-fPIE): most of their code is position independent, with two exceptions that this file takes away.
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

// libelf's elf_error.o keeps its error in a thread-local variable with the local-exec model (R_X86_64_TPOFF32), which
// the linker refuses in a shared object. Defining all that the others need from it keeps that member out of the link.
static _Thread_local int last_error;

void __libelf_seterrno(int value);
int elf_errno(void);
const char *elf_errmsg(int error);

void __libelf_seterrno(int value) { last_error = value; }

int elf_errno(void) {
  int error = last_error;
  last_error = 0;
  return error;
}

/* As libelf's: 0 asks for the last error or NULL, -1 for the last error always. The number stands for the text. */
const char *elf_errmsg(int error) {
  static _Thread_local char text[32];
  if (error == 0 && last_error == 0) return NULL;
  snprintf(text, sizeof(text), "libelf error %d", error == 0 || error == -1 ? last_error : error);
  return text;
}

// libbpf reads `stderr` by a PC-relative reference, which only an executable can resolve (by a copy relocation).
// --wrap=stderr turns every such reference into this hidden variable, set from the C library's before main.
extern FILE *__real_stderr;
__attribute__((visibility("hidden"))) FILE *__wrap_stderr;

__attribute__((constructor(101))) static void copy_stderr(void) { __wrap_stderr = __real_stderr; }

// Two symbols that glibc has only since 2.33 and 2.32, where Node itself is content with 2.28: libelf's fstat, whose
// struct is the kernel's, and libstdc++'s question whether atomic operations may be spared.
// By its name for the linker, because sys/stat.h turns `fstat` into another with _FILE_OFFSET_BITS.
__attribute__((visibility("hidden"))) int own_fstat(int fd, struct stat *status) __asm__("fstat");
int own_fstat(int fd, struct stat *status) { return (int)syscall(SYS_fstat, fd, status); }

extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
