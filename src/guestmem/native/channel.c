/* A thread's connection to the server, and the descriptor numbers that the client must not meet. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

/* ---- hidden descriptors */

enum { HIDEABLE = 1 << 20, HIGHEST_BASE = 4096, ROOM_ABOVE_BASE = 256 };

static uint64_t hidden[HIDEABLE / 64];
static int hidden_end; /* one more than the highest ever hidden */

void descriptor_hide(int fd)
{
    if (fd >= HIDEABLE)
        return;
    __atomic_or_fetch(&hidden[fd / 64], 1ULL << fd % 64, __ATOMIC_RELEASE);
    int end = __atomic_load_n(&hidden_end, __ATOMIC_RELAXED);
    while (end <= fd && !__atomic_compare_exchange_n(&hidden_end, &end, fd + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        ;
}

void descriptor_unhide(int fd)
{
    if (fd < HIDEABLE)
        __atomic_and_fetch(&hidden[fd / 64], ~(1ULL << fd % 64), __ATOMIC_RELEASE);
}

bool descriptor_hidden(int fd)
{
    return fd >= 0 && fd < __atomic_load_n(&hidden_end, __ATOMIC_ACQUIRE) &&
           (__atomic_load_n(&hidden[fd / 64], __ATOMIC_RELAXED) >> fd % 64 & 1);
}

int descriptor_next_hidden(int from)
{
    int end = __atomic_load_n(&hidden_end, __ATOMIC_ACQUIRE);
    for (int fd = from < 0 ? 0 : from; fd < end; fd++) {
        if (!hidden[fd / 64])
            fd |= 63;
        else if (descriptor_hidden(fd))
            return fd;
    }
    return -1;
}

static void descriptors_close_hidden(void)
{
    for (int fd = descriptor_next_hidden(0); fd >= 0; fd = descriptor_next_hidden(fd + 1)) {
        sys(SYS_close, fd);
        descriptor_unhide(fd);
    }
}

/* New descriptors take the lowest number, and clients count on that: ours stand out of the way. */
int descriptor_move_high(int fd)
{
    struct rlimit limit = {0};
    sys(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, &limit);
    long base = HIGHEST_BASE;
    if (limit.rlim_cur < (rlim_t)(base + ROOM_ABOVE_BASE))
        base = (long)limit.rlim_cur - (long)limit.rlim_cur / 4;
    long high = sys(SYS_fcntl, fd, F_DUPFD_CLOEXEC, base);
    if (is_error(high))
        high = sys(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 0);
    if (is_error(high))
        return fd;
    sys(SYS_close, fd);
    return (int)high;
}

/* ---- channels */

static pthread_mutex_t first_lock = PTHREAD_MUTEX_INITIALIZER;

static int server_address(struct sockaddr_un *address, socklen_t *length)
{
    const char *path = process.socket_path;
    size_t size = strlen(path);
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(address->sun_path, path, size);
    if (path[0] == '@')
        address->sun_path[0] = '\0'; /* a name without a file */
    *length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size + (path[0] != '@'));
    return 0;
}

static int server_connect(int *connected)
{
    struct sockaddr_un address;
    socklen_t length;
    int error = server_address(&address, &length);
    if (error)
        return error;
    long fd = sys(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (is_error(fd))
        return (int)-fd;
    long result;
    do
        result = sys(SYS_connect, fd, &address, length);
    while (result == -EINTR);
    if (is_error(result)) {
        sys(SYS_close, fd);
        return ENODEV;
    }
    *connected = descriptor_move_high((int)fd);
    descriptor_hide(*connected);
    return 0;
}

static int channel_hello(struct channel *channel, uint32_t flags, int userfaultfd)
{
    uint64_t parent = process.client ? 0 : process.forked_from;
    struct call call = {.request = {.op = OP_HELLO,
                                    .flags = flags | (parent ? HELLO_FORKED : 0),
                                    .a = WIRE_VERSION,
                                    .b = parent,
                                    .c = process.client},
                        .send_fd = userfaultfd,
                        .with_fd = userfaultfd >= 0};
    int error = call_on_channel(channel, &call);
    if (error)
        return error == EIO ? ENODEV : error;
    __atomic_store_n(&process.memfd_device, call.answer.a, __ATOMIC_RELEASE);
    process.gmem_magic = call.answer.c;
    __atomic_store_n(&process.client, (uint64_t)call.answer.value, __ATOMIC_RELEASE);
    return 0;
}

/* The first channel of a process makes the client: one at a time. */
static int channel_introduce(struct channel *channel, uint32_t flags, int userfaultfd)
{
    if (__atomic_load_n(&process.client, __ATOMIC_ACQUIRE))
        return channel_hello(channel, flags, userfaultfd);
    pthread_mutex_lock(&first_lock);
    int error = channel_hello(channel, flags, userfaultfd);
    pthread_mutex_unlock(&first_lock);
    return error;
}

void channels_lock(void)
{
    pthread_mutex_lock(&first_lock);
}

void channels_unlock(void)
{
    pthread_mutex_unlock(&first_lock);
}

struct channel *channel_open(uint32_t hello_flags, int userfaultfd, int *error)
{
    long place = sys(SYS_mmap, 0, sizeof(struct channel), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (is_error(place)) {
        *error = ENOMEM;
        return NULL;
    }
    struct channel *channel = (struct channel *)place;
    sys(SYS_madvise, channel, sizeof(*channel), MADV_DONTFORK); /* a child has no use for it */
    channel->fd = -1;
    *error = server_connect(&channel->fd);
    if (!*error)
        *error = channel_introduce(channel, hello_flags, userfaultfd);
    if (*error) {
        channel_close(channel);
        return NULL;
    }
    return channel;
}

void channel_close(struct channel *channel)
{
    if (channel->fd >= 0) {
        descriptor_unhide(channel->fd);
        sys(SYS_close, channel->fd);
    }
    sys(SYS_munmap, channel, sizeof(*channel));
}

/* ---- the thread's own */

static __thread struct thread self __attribute__((tls_model("initial-exec")));
static pthread_key_t thread_end;

static void thread_ends(void *channel)
{
    kernel_sigset old = signals_block();
    self.channel = NULL;
    channel_close(channel);
    if (self.signal_fd_open) {
        self.signal_fd_open = false;
        descriptor_unhide(self.signal_fd);
        sys(SYS_close, self.signal_fd);
    }
    signals_restore(old);
}

__attribute__((constructor)) static void thread_end_prepare(void)
{
    pthread_key_create(&thread_end, thread_ends);
}

struct thread *thread_self(void)
{
    return &self;
}

int thread_channel(struct thread *thread)
{
    int error = 0;
    if (thread->channel)
        return 0;
    thread->channel = channel_open(0, -1, &error);
    if (thread->channel)
        thread_keep_channel(thread->channel);
    return error;
}

void thread_keep_channel(struct channel *channel)
{
    pthread_setspecific(thread_end, channel);
}

/* Only the number is dropped: the memory is not in this process, or no longer of use. A handler may have forked while its
 * thread waited: in the child that call ends, too. */
static void thread_forget_channel(void)
{
    self = (struct thread){.calls = self.calls, .parked.answer.error = EINTR};
    pthread_setspecific(thread_end, NULL);
}

void channels_after_fork(void)
{
    first_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    descriptors_close_hidden();
    thread_forget_channel();
}
