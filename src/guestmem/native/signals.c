/* Signals: kept away while the shim works, as they are from a system call in the kernel; and KVM_SET_SIGNAL_MASK. */
#define _GNU_SOURCE
#include "shim.h"

#include <pthread.h>
#include <sys/signalfd.h>

#define SIGNAL_BIT(signal) (1ULL << ((signal)-1))

/* glibc keeps it for itself and does not name it: setuid() in one thread waits until all others have handled it. */
enum { SIGNAL_SETXID = 33 };

kernel_sigset signals_block(void)
{
    kernel_sigset all = ~SIGNAL_BIT(SIGNAL_SETXID), old = 0;
    sys(SYS_rt_sigprocmask, SIG_BLOCK, &all, &old, sizeof(kernel_sigset));
    return old;
}

void signals_restore(kernel_sigset old)
{
    sys(SYS_rt_sigprocmask, SIG_SETMASK, &old, 0, sizeof(kernel_sigset));
}

bool signals_pending(kernel_sigset blocked)
{
    kernel_sigset pending = 0;
    sys(SYS_rt_sigpending, &pending, sizeof(pending));
    return pending & ~blocked;
}

struct vcpu_mask {
    uint64_t file; /* 0: free */
    kernel_sigset mask;
};

enum { VCPU_MASKS = 4096 };

static struct vcpu_mask masks[VCPU_MASKS];
static unsigned mask_count; /* slots in use, from 0 on */
static pthread_mutex_t masks_lock = PTHREAD_MUTEX_INITIALIZER;

static struct vcpu_mask *mask_find(uint64_t file)
{
    for (unsigned i = 0; i < mask_count; i++)
        if (masks[i].file == file)
            return &masks[i];
    return NULL;
}

bool vcpu_mask_get(uint64_t file, kernel_sigset *mask)
{
    if (!__atomic_load_n(&mask_count, __ATOMIC_ACQUIRE))
        return false;
    kernel_sigset old = signals_block();
    pthread_mutex_lock(&masks_lock);
    struct vcpu_mask *found = mask_find(file);
    if (found)
        *mask = found->mask;
    pthread_mutex_unlock(&masks_lock);
    signals_restore(old);
    return found != NULL;
}

static int mask_store(uint64_t file, kernel_sigset mask)
{
    struct vcpu_mask *slot = mask_find(file);
    if (!slot)
        slot = mask_find(0);
    if (!slot) {
        if (mask_count == VCPU_MASKS)
            return ENOMEM;
        slot = &masks[mask_count];
        __atomic_store_n(&mask_count, mask_count + 1, __ATOMIC_RELEASE);
    }
    *slot = (struct vcpu_mask){file, mask & ~(SIGNAL_BIT(SIGKILL) | SIGNAL_BIT(SIGSTOP))};
    return 0;
}

/* `argument` is the client's struct kvm_signal_mask, or NULL for none: the checks of kvm_vcpu_ioctl(). */
int vcpu_mask_set(uint64_t file, const void *argument)
{
    uint32_t length;
    kernel_sigset mask = 0;
    if (argument) {
        if (copy_from_client(&length, argument, sizeof(length)))
            return EFAULT;
        if (length != sizeof(kernel_sigset))
            return EINVAL;
        if (copy_from_client(&mask, (const char *)argument + sizeof(length), sizeof(mask)))
            return EFAULT;
    }
    int error = 0;
    kernel_sigset old = signals_block();
    pthread_mutex_lock(&masks_lock);
    struct vcpu_mask *found = mask_find(file);
    if (argument)
        error = mask_store(file, mask);
    else if (found)
        found->file = 0;
    pthread_mutex_unlock(&masks_lock);
    signals_restore(old);
    return error;
}

/* Signals that the vCPU's mask lets through, but not the thread's own: they end the run and stay pending. */
int pending_signals_fd(kernel_sigset through)
{
    struct thread *self = thread_self();
    if (self->signal_fd_open && self->signal_fd_set == through)
        return self->signal_fd;
    kernel_sigset old = signals_block();
    long fd = sys(SYS_signalfd4, self->signal_fd_open ? self->signal_fd : -1, &through, sizeof(through),
                  SFD_CLOEXEC | SFD_NONBLOCK);
    if (!is_error(fd) && !self->signal_fd_open) {
        fd = descriptor_move_high((int)fd);
        descriptor_hide((int)fd);
    }
    if (!is_error(fd)) {
        self->signal_fd = (int)fd;
        self->signal_fd_set = through;
        self->signal_fd_open = true;
    }
    signals_restore(old);
    return (int)fd;
}
