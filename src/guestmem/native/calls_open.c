/* open(): our device, and names under /proc that lead to our files. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "real.h"

/* ---- open */

/* Text before the client's own errors: a bad address near 0 is what a NULL becomes. */
static uint64_t special_path(const char *path)
{
    if ((uintptr_t)path < 4096 || path[0] != '/')
        return 0;
    if (!strcmp(path, "/dev/kvm"))
        return OPEN_KVM;
    return strcmp(path, "/sys/kernel/debug/gup_test") ? 0 : OPEN_GUP_TEST;
}

static int open_special(uint64_t what, int flags)
{
    struct call call = {.request = {.op = OP_OPEN, .a = what}};
    int error = call_server(&call);
    if (error)
        return fail(error == EIO ? ENODEV : error);
    if (!(flags & O_CLOEXEC))
        sys(SYS_fcntl, call.fd, F_SETFD, 0);
    file_made(call.fd, what == OPEN_KVM ? KIND_KVM : KIND_GUP_TEST);
    return call.fd;
}

static bool needs_mode(int flags)
{
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE;
}

#define MODE_ARGUMENT(flags)                                                                                           \
    ({                                                                                                                 \
        mode_t mode_ = 0;                                                                                              \
        if (needs_mode(flags)) {                                                                                       \
            va_list arguments_;                                                                                        \
            va_start(arguments_, flags);                                                                               \
            mode_ = va_arg(arguments_, mode_t);                                                                        \
            va_end(arguments_);                                                                                        \
        }                                                                                                              \
        mode_;                                                                                                         \
    })

static int open_any(int directory, const char *path, int flags, mode_t mode)
{
    uint64_t special = process.active && !(flags & O_PATH) ? special_path(path) : 0;
    if (special && shim_active())
        return open_special(special, flags);
    return REAL(openat)(directory, path, flags, mode);
}

EXPORT int open(const char *path, int flags, ...)
{
    return open_any(AT_FDCWD, path, flags, MODE_ARGUMENT(flags));
}

EXPORT int openat(int directory, const char *path, int flags, ...)
{
    return open_any(directory, path, flags, MODE_ARGUMENT(flags));
}

EXPORT int open64(const char *path, int flags, ...) __attribute__((alias("open")));
EXPORT int openat64(int directory, const char *path, int flags, ...) __attribute__((alias("openat")));

/* The names that fortified programs call. */
EXPORT int __open_2(const char *path, int flags)
{
    return open_any(AT_FDCWD, path, flags, 0);
}

EXPORT int __openat_2(int directory, const char *path, int flags)
{
    return open_any(directory, path, flags, 0);
}

EXPORT int __open64_2(const char *path, int flags) __attribute__((alias("__open_2")));
EXPORT int __openat64_2(int directory, const char *path, int flags) __attribute__((alias("__openat_2")));
