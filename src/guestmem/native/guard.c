/* What must be there before a guest_memfd is mapped: a userfaultfd for the server, and a thread that drops page-table
 * entries when the server says so and no other thread is in a call. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_MINOR_HUGETLBFS
#define UFFD_FEATURE_MINOR_HUGETLBFS (1 << 9)
#endif
#ifndef UFFD_FEATURE_MINOR_SHMEM
#define UFFD_FEATURE_MINOR_SHMEM (1 << 10)
#endif

enum { HELPER_STACK = 64 * 1024 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool helper_runs;

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* One at whose faults system calls wait, too. That takes a right which few have, or the device. */
static long userfaultfd_of_all_faults(void)
{
    long fd = sys(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (!is_error(fd))
        return fd;
    long device = sys(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
    if (is_error(device))
        return device;
    fd = sys(SYS_ioctl, device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    sys(SYS_close, device);
    return fd;
}

/* With FEATURE_SIGBUS nobody waits, and faults of user code are enough: a system call fails at the others. */
int userfaultfd_open(uint64_t features)
{
    long fd = features & UFFD_FEATURE_SIGBUS ? -EPERM : userfaultfd_of_all_faults();
    if (is_error(fd))
        fd = sys(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (is_error(fd))
        return (int)fd;
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    long result = sys(SYS_ioctl, fd, UFFDIO_API, &api);
    if (is_error(result)) {
        sys(SYS_close, fd);
        return (int)result;
    }
    return (int)fd;
}

static int guard_userfaultfd(void)
{
    const uint64_t shmem = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM;
    int fd = userfaultfd_open(shmem | UFFD_FEATURE_MINOR_HUGETLBFS | UFFD_FEATURE_MISSING_HUGETLBFS);
    return fd >= 0 ? fd : userfaultfd_open(shmem);
}

/* Ends when the server does, or with the process. */
static void *helper(void *argument)
{
    struct channel *channel = argument;
    struct message message;
    while (!wire_receive(channel, &message, 0) && !upcall_do(channel, &message))
        ;
    channel_close(channel);
    return NULL;
}

static int thread_start(struct channel *channel)
{
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, (size_t)PTHREAD_STACK_MIN + HELPER_STACK);
    int error = pthread_create(&thread, &attributes, helper, channel); /* it inherits our mask: all blocked */
    pthread_attr_destroy(&attributes);
    return error;
}

static int helper_start(void)
{
    int error = 0;
    if (helper_runs)
        return 0;
    struct channel *channel = channel_open(HELLO_HELPER, -1, &error);
    if (!channel)
        return error;
    error = thread_start(channel);
    if (error)
        channel_close(channel);
    helper_runs = !error;
    return error;
}

static int guard_tell(void)
{
    int fd = guard_userfaultfd();
    struct call call = {.request = {.op = OP_GUARD}, .send_fd = fd, .with_fd = fd >= 0};
    int error = call_server(&call);
    if (fd >= 0)
        sys(SYS_close, fd); /* the server's copy keeps it */
    return error;
}

/* Helper first: from the first mapping on the server can reach into this process. */
static int prepare_locked(void)
{
    int error = helper_start();
    if (!error && !process.guarded)
        error = guard_tell();
    if (!error)
        __atomic_store_n(&process.guarded, true, __ATOMIC_RELEASE);
    return error;
}

int guard_prepare(void)
{
    if (__atomic_load_n(&process.guarded, __ATOMIC_ACQUIRE))
        return 0;
    kernel_sigset old = signals_block();
    struct thread *self = thread_self();
    call_finish_waiting(self);
    int error = thread_channel(self); /* before the helper's: the first HELLO of a child names its parent */
    if (!error) {
        pthread_mutex_lock(&lock);
        error = prepare_locked();
        pthread_mutex_unlock(&lock);
    }
    signals_restore(old);
    return error;
}

void guard_lock(void)
{
    pthread_mutex_lock(&lock);
}

void guard_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

void guard_after_fork(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    helper_runs = false;
    process.guarded = false;
}

/* A child that has mappings of guest_memfds: the server puts them in order before it answers HELLO. */
void guard_child(void)
{
    struct thread *self = thread_self();
    int error, fd = guard_userfaultfd();
    self->channel = channel_open(0, fd, &error);
    if (fd >= 0)
        sys(SYS_close, fd);
    if (!self->channel)
        return;
    thread_keep_channel(self->channel);
    process.guarded = !helper_start();
}
