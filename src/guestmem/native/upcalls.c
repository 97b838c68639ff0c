/* What the server asks a thread of the client to do, since only code inside of a process can. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "vcpu.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

/* The answer to an upcall. */
struct done {
    struct wire_request request;
    const void *payload;
    size_t length;
    int fd;
    bool with_fd;
    uint64_t facts[3];
};

/* A range may have lost pages or all of itself since the server looked: what is not there needs no zap. */
static int zap(struct range range)
{
    long result = sys(SYS_madvise, range.address, range.length, MADV_DONTNEED);
    if (result == -EINVAL) /* mlocked */
        result = sys(SYS_madvise, range.address, range.length, MADV_DONTNEED_LOCKED);
    return result && result != -ENOMEM ? (int)-result : 0;
}

int zap_ranges(const unsigned char *ranges, size_t length)
{
    int error = 0;
    for (size_t at = 0; at + sizeof(struct range) <= length; at += sizeof(struct range)) {
        struct range range;
        memcpy(&range, ranges + at, sizeof(range));
        int failed = zap(range);
        error = error ? error : failed;
    }
    return error;
}

static int map_over(uint64_t address, uint64_t length, int protection, int fd, uint64_t offset)
{
    long result = sys(SYS_mmap, address, length, protection, MAP_FIXED | MAP_NORESERVE | MAP_SHARED, fd, offset);
    return is_error(result) ? (int)-result : 0;
}

/* A mapping without a file's page behind it gives SIGBUS, like a private page. */
static int up_overlay(const struct wire_answer *up)
{
    long empty = sys(SYS_memfd_create, "guestmem-private", MFD_CLOEXEC);
    if (is_error(empty))
        return (int)-empty;
    int error = map_over(up->a, up->b, PROT_READ | PROT_WRITE, (int)empty, 0);
    sys(SYS_close, empty);
    return error;
}

static int up_fd(const struct wire_answer *up, struct done *done)
{
    struct stat status;
    int fd = (int)up->a;
    long flags = descriptor_hidden(fd) ? -EBADF : sys(SYS_fcntl, fd, F_GETFL);
    if (is_error(flags) || is_error(sys(SYS_fstat, fd, &status)))
        return EBADF;
    done->facts[0] = status.st_dev;
    done->facts[1] = file_number(fd, &status);
    done->facts[2] = (uint64_t)flags;
    done->payload = done->facts;
    done->length = sizeof(done->facts);
    done->fd = fd;
    done->with_fd = up->b;
    return 0;
}

static int up_alias(const struct wire_answer *up, int fd, struct done *done)
{
    return fd < 0 ? EINVAL : alias_map(fd, up->a, up->b, &done->request.b);
}

/* A pin's fault: the page is there, and may be written. */
static int up_populate(const struct wire_answer *up)
{
    return (int)-sys(SYS_madvise, up->a, up->b, up->c ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
}

static int up_unalias(const struct wire_answer *up)
{
    return (int)-sys(SYS_munmap, up->a, up->b);
}

static int run(const struct channel *channel, const struct message *message, struct done *done)
{
    const struct wire_answer *up = &message->head;
    int fd = message->fd_count ? message->fds[0] : -1;
    switch (up->op) {
    case UP_ZAP:
        return zap_ranges(channel->buffer, message->length);
    case UP_READ:
        done->payload = (const void *)up->a;
        done->length = up->b;
        return 0;
    case UP_WRITE:
        return copy_to_client((void *)up->a, channel->buffer, message->length);
    case UP_OVERLAY:
        return up_overlay(up);
    case UP_UNCOVER:
        return map_over(up->a, up->b, (int)up->c, fd, up->d);
    case UP_FD:
        return up_fd(up, done);
    case UP_ENTER:
        return vcpu_enter(channel->buffer, message->length, &done->request.b);
    case UP_DROP:
        return space_drop(channel->buffer, message->length);
    case UP_ALIAS:
        return up_alias(up, fd, done);
    case UP_UNALIAS:
        return up_unalias(up);
    case UP_POPULATE:
        return up_populate(up);
    case UP_KICK:
        vcpu_kick(up->a);
        return 0;
    case UP_FORGET:
        space_forget(up->a);
        return 0;
    default:
        return ENOSYS;
    }
}

static ssize_t done_send(const struct channel *channel, const struct done *done)
{
    return wire_send(channel->fd, &done->request, done->payload, done->length, done->fd, done->with_fd);
}

int upcall_do(struct channel *channel, struct message *message)
{
    struct done done = {.request = {.op = OP_UPCALL_DONE}};
    done.request.a = (uint64_t)run(channel, message, &done);
    for (int i = 0; i < message->fd_count; i++)
        sys(SYS_close, message->fds[i]);
    ssize_t sent = done_send(channel, &done);
    if (sent == -EFAULT || sent == -EBADF) { /* what READ points at is no memory; what FD names was closed */
        done = (struct done){.request = {.op = OP_UPCALL_DONE, .a = (uint64_t)-sent}};
        sent = done_send(channel, &done);
    }
    return sent < 0 ? EIO : 0;
}
