/* One packet out, one packet in. */
#define _GNU_SOURCE
#include "shim.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

union control {
    char bytes[CMSG_SPACE(WIRE_FDS * sizeof(int))];
    struct cmsghdr align;
};

static void control_put(struct msghdr *header, union control *control, int fd)
{
    header->msg_control = control->bytes;
    header->msg_controllen = CMSG_SPACE(sizeof(int));
    struct cmsghdr *part = CMSG_FIRSTHDR(header);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(part), &fd, sizeof(int));
}

/* The payload goes straight from the client's memory: the kernel checks it, and nothing is sent after EFAULT. */
ssize_t wire_send(int fd, const struct wire_request *request, const void *payload, size_t length, int send_fd,
                  bool with_fd)
{
    struct iovec parts[2] = {{(void *)(uintptr_t)request, sizeof(*request)}, {(void *)(uintptr_t)payload, length}};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = length ? 2 : 1};
    union control control;
    if (with_fd)
        control_put(&header, &control, send_fd);
    long sent;
    do
        sent = sys(SYS_sendmsg, fd, &header, MSG_NOSIGNAL);
    while (sent == -EINTR);
    return sent;
}

static void control_take(struct msghdr *header, struct message *message)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        message->fd_count = (int)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(message->fds, CMSG_DATA(part), (size_t)message->fd_count * sizeof(int));
    }
}

/* EIO: the server is gone. EAGAIN: with MSG_DONTWAIT, nothing there. */
int wire_receive(struct channel *channel, struct message *message, int flags)
{
    struct iovec parts[2] = {{&message->head, sizeof(message->head)}, {channel->buffer, sizeof(channel->buffer)}};
    union control control;
    struct msghdr header = {
        .msg_iov = parts, .msg_iovlen = 2, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    long got;
    do
        got = sys(SYS_recvmsg, channel->fd, &header, MSG_CMSG_CLOEXEC | flags);
    while (got == -EINTR);
    if (got == -EAGAIN)
        return EAGAIN;
    if (got < (long)sizeof(message->head))
        return EIO;
    message->length = (size_t)got - sizeof(message->head);
    message->fd_count = 0;
    message->fds_lost = header.msg_flags & MSG_CTRUNC;
    control_take(&header, message);
    return 0;
}
