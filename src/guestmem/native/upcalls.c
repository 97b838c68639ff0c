/* What the server asks a thread of the client to do, since only code inside of a process can. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

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

struct range {
    uint64_t address, length;
};

/* A range may have lost pages or all of itself since the server looked: what is not there needs no zap. */
static int zap(struct range range)
{
    long result = sys(SYS_madvise, range.address, range.length, MADV_DONTNEED);
    if (result == -EINVAL) /* mlocked */
        result = sys(SYS_madvise, range.address, range.length, MADV_DONTNEED_LOCKED);
    return result && result != -ENOMEM ? (int)-result : 0;
}

static int up_zap(const struct channel *channel, size_t length)
{
    int error = 0;
    for (size_t at = 0; at + sizeof(struct range) <= length; at += sizeof(struct range)) {
        struct range range;
        memcpy(&range, channel->buffer + at, sizeof(range));
        int failed = zap(range);
        error = error ? error : failed;
    }
    return error;
}

static int map_over(uint64_t address, uint64_t length, int protection, int flags, int fd, uint64_t offset)
{
    long result = sys(SYS_mmap, address, length, protection, MAP_FIXED | MAP_NORESERVE | flags, fd, offset);
    return is_error(result) ? (int)-result : 0;
}

/* A mapping without a file's page behind it gives SIGBUS, like a private page. */
static int up_overlay(const struct wire_answer *up)
{
    long empty = sys(SYS_memfd_create, "guestmem-private", MFD_CLOEXEC);
    if (is_error(empty))
        return (int)-empty;
    int error = map_over(up->a, up->b, PROT_READ | PROT_WRITE, MAP_SHARED, (int)empty, 0);
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

static int up_replace(const struct wire_answer *up, int fd)
{
    int error = fd < 0 ? EINVAL : replace_memory((char *)up->a, up->b, (int)up->c, (unsigned)up->d, fd);
    if (!error)
        areas_add((void *)up->a, up->b, AREA_WATCHED);
    return error;
}

static int run(const struct channel *channel, const struct message *message, struct done *done)
{
    const struct wire_answer *up = &message->head;
    int fd = message->fd_count ? message->fds[0] : -1;
    switch (up->op) {
    case UP_ZAP:
        return up_zap(channel, message->length);
    case UP_READ:
        done->payload = (const void *)up->a;
        done->length = up->b;
        return 0;
    case UP_WRITE:
        return copy_to_client((void *)up->a, channel->buffer, message->length);
    case UP_REPLACE:
        return up_replace(up, fd);
    case UP_WATCH:
        areas_add((void *)up->a, up->b, AREA_WATCHED);
        return 0;
    case UP_OVERLAY:
        return up_overlay(up);
    case UP_UNCOVER:
        return map_over(up->a, up->b, (int)up->c, MAP_SHARED, fd, up->d);
    case UP_PRIVATE:
        return map_over(up->a, up->b, (int)up->c, MAP_PRIVATE, fd, up->d);
    case UP_FD:
        return up_fd(up, done);
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
