/* A call: the request out, the server's upcalls done, the answer in, signals held back as in a system call. */
#define _GNU_SOURCE
#include "vcpu.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

static void fds_close(struct message *message, int from)
{
    for (int i = from; i < message->fd_count; i++)
        sys(SYS_close, message->fds[i]);
}

/* An answer came: its bytes go to the client's argument, its descriptor into the client's table. */
static int answer_take(struct channel *channel, struct call *call, struct message *message)
{
    call->answer = message->head;
    if (message->length && copy_to_client(call->reply, channel->buffer, message->length)) {
        fds_close(message, 0);
        return EFAULT;
    }
    if (call->answer.error) { /* some errors have bytes with them, as error_offset of a conversion */
        fds_close(message, 0);
        return call->answer.error;
    }
    if (message->fds_lost) {
        fds_close(message, 0);
        return EMFILE;
    }
    if (message->fd_count) {
        call->fd = message->fds[0];
        fds_close(message, 1);
        if (message->head.a & ANSWER_KEEP_ON_EXEC)
            sys(SYS_fcntl, call->fd, F_SETFD, 0);
    }
    return 0;
}

/* Receives until an answer is there. With MSG_DONTWAIT EAGAIN says that none is yet. */
static int answer_wait(struct channel *channel, struct message *message, int flags)
{
    for (;;) {
        int error = wire_receive(channel, message, flags);
        if (error || message->head.op == UP_ANSWER)
            return error;
        error = upcall_do(channel, message);
        if (error)
            return error;
    }
}

/* Most answers come within microseconds, and to sleep and be woken costs many: first look a while without sleeping, if
 * there is a CPU for the server to run on meanwhile. EAGAIN when none came. */
static int answer_soon(struct channel *channel, struct message *message)
{
    int error = EAGAIN;
    for (int looks = process.spins; looks && error == EAGAIN; looks--) {
        error = answer_wait(channel, message, MSG_DONTWAIT);
        if (looks % 16 == 0)
            sys(SYS_sched_yield);  /* the server may be waiting for this very CPU */
    }
    return error;
}

static int request_send(struct channel *channel, struct call *call)
{
    ssize_t sent = wire_send(channel->fd, &call->request, call->payload, call->payload_length, call->send_fd,
                             call->with_fd);
    if (sent == -EFAULT || sent == -EBADF)
        return (int)-sent;
    return sent < 0 ? EIO : 0;
}

int call_on_channel(struct channel *channel, struct call *call)
{
    struct message message;
    call->fd = -1;
    int error = request_send(channel, call);
    if (!error)
        error = answer_soon(channel, &message);
    if (error == EAGAIN)
        error = answer_wait(channel, &message, 0);
    return error ? error : answer_take(channel, call, &message);
}

/* ---- calls that a signal ends: KVM_RUN, fallocate */

static int cancel_and_wait(struct channel *channel, struct wire_answer *answer)
{
    struct wire_request cancel = {.op = OP_CANCEL};
    struct thread *self = thread_self();
    struct message message;
    if (wire_send(channel->fd, &cancel, NULL, 0, -1, false) < 0)
        return EIO;
    self->cancelling = true;
    int error = answer_wait(channel, &message, 0);
    self->cancelling = false;
    if (error)
        return error;
    fds_close(&message, 0);
    *answer = message.head;
    return 0;
}

/* We run in a signal handler that interrupted the wait below, or after a siglongjmp() out of one. Either way the waiting
 * call was to end with this signal; it ends now, since its channel is needed. */
void call_finish_waiting(struct thread *self)
{
    if (!self->waiting)
        return;
    self->parked.call = self->waiting;
    self->waiting = 0;
    int error = cancel_and_wait(self->channel, &self->parked.answer);
    if (error)
        self->parked.answer = (struct wire_answer){.error = error};
    if (self->running) {
        vcpu_unlock(self->running);
        self->running = NULL;
    }
}

/* EINTR: a signal was handled, or stays pending in the signal descriptor. EAGAIN: a packet is there. */
static int wait_for_packet_or_signal(struct thread *self, const struct call *call, kernel_sigset mask)
{
    struct pollfd poll[2] = {{self->channel->fd, POLLIN, 0}, {call->signal_fd, POLLIN, 0}};
    long ready = sys(SYS_ppoll, poll, call->with_signal_fd ? 2 : 1, 0, &mask, sizeof(mask));
    if (ready == -EINTR)
        return EINTR;
    return poll[0].revents || ready < 0 ? EAGAIN : EINTR;
}

/* A vCPU's mask takes the place of the thread's. */
static kernel_sigset run_blocks(const struct call *call, kernel_sigset thread_mask)
{
    return call->run_mask || call->with_signal_fd ? call->run_mask : thread_mask;
}

/* Signals are blocked except inside of ppoll(), so one that comes at any moment after the request was sent, or was pending
 * before, is seen there. Handlers run there too, and they may call. */
static int wait_interruptible(struct thread *self, struct call *call, kernel_sigset thread_mask)
{
    struct parked outer = self->parked;
    uint64_t number = ++self->calls;
    struct message message;
    int soon = signals_pending(run_blocks(call, thread_mask)) ? EAGAIN : answer_soon(self->channel, &message);
    if (soon && soon != EAGAIN)
        return soon;
    if (!soon) {
        fds_close(&message, 0);
        call->answer = message.head;
        return message.head.error;
    }
    for (;;) {
        self->waiting = number;
        int why = wait_for_packet_or_signal(self, call, thread_mask | call->run_mask);
        bool finished_by_handler = self->waiting != number;
        self->waiting = 0;
        int error = 0;
        if (finished_by_handler) {
            message.head = self->parked.answer;
        } else if (why == EINTR) {
            error = cancel_and_wait(self->channel, &message.head);
        } else {
            error = answer_wait(self->channel, &message, MSG_DONTWAIT);
            if (error == EAGAIN)
                continue;
            if (!error)
                fds_close(&message, 0);
        }
        self->parked = outer;
        call->answer = message.head;
        return error ? error : message.head.error;
    }
}

static int call_interruptible(struct thread *self, struct call *call, kernel_sigset thread_mask)
{
    call->fd = -1;
    int error = request_send(self->channel, call);
    return error ? error : wait_interruptible(self, call, thread_mask);
}

int call_blocked(struct call *call, kernel_sigset thread_mask)
{
    struct thread *self = thread_self();
    call->fd = -1;
    int error = thread_channel(self);
    if (!error && call->wait == WAIT_SIGNALS)
        error = call_interruptible(self, call, thread_mask);
    else if (!error)
        error = call_on_channel(self->channel, call);
    return error;
}

int call_server(struct call *call)
{
    kernel_sigset old = signals_block();
    call_finish_waiting(thread_self());
    int error = call_blocked(call, old);
    signals_restore(old);
    return error;
}

int call_words(enum wire_op op, uint64_t file, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    struct call call = {.request = {.op = op, .file = file, .a = a, .b = b, .c = c, .d = d}};
    return call_server(&call);
}
