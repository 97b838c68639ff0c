/* close, close_range, dup and their kin; and descriptors that arrive in messages. After one of our files was closed its
 * release is waited for: it has happened when the call returns, as in the kernel. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <unistd.h>

#include "calls.h"
#include "real.h"

static bool is_ours(int fd)
{
    struct file file;
    return file_of_marked(fd, &file) != KIND_NONE;
}

EXPORT int close(int fd)
{
    if (process.active && descriptor_hidden(fd))
        return fail(EBADF);
    bool ours = is_ours(fd);
    int result = REAL(close)(fd);
    if (ours && !result)
        files_sync();
    return result;
}

/* ---- close_range: around what is hidden */

static bool any_ours(unsigned first, unsigned last)
{
    bool found = false;
    for (int fd = file_next_marked((int)first); !found && fd >= 0 && (unsigned)fd <= last; fd = file_next_marked(fd + 1))
        found = is_ours(fd);
    return found;
}

static long close_around_hidden(unsigned first, unsigned last, unsigned flags)
{
    while (first <= last) {
        int obstacle = first > INT32_MAX ? -1 : descriptor_next_hidden((int)first);
        bool inside = obstacle >= 0 && (unsigned)obstacle <= last;
        if (!inside)
            return sys(SYS_close_range, first, last, flags);
        long result = (unsigned)obstacle > first ? sys(SYS_close_range, first, obstacle - 1, flags) : 0;
        if (result)
            return result;
        first = (unsigned)obstacle + 1;
    }
    return 0;
}

long call_close_range(unsigned first, unsigned last, unsigned flags)
{
    if (!process.active || first > last || flags & CLOSE_RANGE_CLOEXEC)
        return sys(SYS_close_range, first, last, flags);
    bool ours = any_ours(first, last);
    long result = close_around_hidden(first, last, flags);
    if (ours && !result)
        files_sync();
    return result;
}

EXPORT int close_range(unsigned first, unsigned last, int flags)
{
    return (int)libc_result(call_close_range(first, last, (unsigned)flags));
}

EXPORT void closefrom(int low)
{
    if (!process.active)
        REAL(closefrom)(low);
    else
        call_close_range(low < 0 ? 0 : (unsigned)low, ~0U, 0);
}

/* ---- dup */

/* `from` and `to` name one file now. */
static void duplicated(int from, int to)
{
    if (to >= 0 && file_marked(from))
        file_mark(to);
}

EXPORT int dup(int fd)
{
    int copy = (int)libc_result(sys(SYS_dup, fd));
    duplicated(fd, copy);
    return copy;
}

/* What `to` was is closed by that. A number of ours is busy, as one is that another thread is about to open. */
static int dup_onto(int from, int to, int flags)
{
    if (process.active && descriptor_hidden(to))
        return fail(EBUSY);
    bool ours = from != to && is_ours(to);
    int result = (int)libc_result(flags < 0 ? sys(SYS_dup2, from, to) : sys(SYS_dup3, from, to, flags));
    duplicated(from, result);
    if (ours && result >= 0)
        files_sync();
    return result;
}

EXPORT int dup2(int from, int to)
{
    return dup_onto(from, to, -1);
}

EXPORT int dup3(int from, int to, int flags)
{
    return dup_onto(from, to, flags & INT32_MAX);
}

/* ---- fcntl */

static long fcntl_gmem(int command, uintptr_t argument)
{
    switch (command) {
    case F_ADD_SEALS:
    case F_GET_SEALS:
        return -EINVAL;
    case F_SETLEASE:
        return argument == F_UNLCK ? 1 : -EAGAIN;
    case F_SETFL:
        return argument & O_DIRECT ? -EINVAL : 1;
    default:
        return 1;
    }
}

static int fcntl_any(int fd, int command, uintptr_t argument)
{
    struct file file;
    if (file_marked(fd) && file_of(fd, &file) == KIND_GMEM) {
        long refused = fcntl_gmem(command, argument);
        if (refused < 0)
            return fail((int)-refused);
    }
    int result = REAL(fcntl64)(fd, command, argument);
    if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)
        duplicated(fd, result);
    return result;
}

EXPORT int fcntl64(int fd, int command, ...)
{
    va_list arguments;
    va_start(arguments, command);
    uintptr_t argument = va_arg(arguments, uintptr_t);
    va_end(arguments);
    return fcntl_any(fd, command, argument);
}

EXPORT int fcntl(int fd, int command, ...) __attribute__((alias("fcntl64")));

/* ---- descriptors that arrive: any may be ours */

static void mark_received(struct msghdr *message)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        const int *fds = (const int *)CMSG_DATA(part);
        for (size_t i = 0; i < (part->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++)
            file_mark(fds[i]);
    }
}

EXPORT ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    ssize_t got = REAL(recvmsg)(fd, message, flags);
    if (got >= 0 && process.active && message->msg_controllen)
        mark_received(message);
    return got;
}

EXPORT int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    int got = REAL(recvmmsg)(fd, messages, count, flags, timeout);
    for (int i = 0; i < got && process.active; i++)
        mark_received(&messages[i].msg_hdr);
    return got;
}
