/* libc's own versions of the functions that we stand before. Those that are points of cancellation, or do more than one
 * system call, are called through these. */
#pragma once

#include <dlfcn.h>

/* Looked up when first needed and in advance at start (real_resolve), since dlsym() is not for signal handlers. */
#define REAL(name)                                                                                                     \
    ({                                                                                                                 \
        static __typeof__(&name) real_##name;                                                                          \
        if (!real_##name)                                                                                              \
            real_##name = (__typeof__(&name))dlsym(RTLD_NEXT, #name);                                                  \
        real_##name;                                                                                                   \
    })
