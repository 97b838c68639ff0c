/* System calls without libc: the shim's own calls must not meet the shim's own wrappers, and must not touch errno. */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

#if !defined(__x86_64__) || defined(__ILP32__)
#error "the shim knows the system call convention of x86-64 only"
#endif

static inline long raw6(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* sys(SYS_x, arguments...) gives what the kernel gives: -errno on failure. */
#define RAW_PICK(number, a, b, c, d, e, f, ...) \
    raw6((number), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define sys(...) RAW_PICK(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

static inline bool is_error(long result)
{
    return result < 0 && result > -4096;
}

/* The same result in libc's manner. */
static inline long libc_result(long result)
{
    if (!is_error(result))
        return result;
    errno = (int)-result;
    return -1;
}

static inline int fail(int error)
{
    errno = error;
    return -1;
}

/* System calls newer than the headers that we may be built with. */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
