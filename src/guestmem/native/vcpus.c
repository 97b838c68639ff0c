/* KVM_RUN: guest code runs in the thread that calls it. The server is asked for what is its own: leaves, hypercalls, exits
 * that touch what a kernel would have. Where a VM has nothing of that, a port or MMIO exit does not leave this process.
 *
 * A thread that calls has its vCPU as it has vcpu->mutex in a kernel, until it comes back: others wait for it. */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vcpu.h"

enum { PAGE = 4096, RUN_PAGES = 3 };

static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
static struct vcpu *vcpus; /* by `making`; found without it */

/* ---- making one */

static struct vcpu *find(uint64_t file)
{
    struct vcpu *vcpu = __atomic_load_n(&vcpus, __ATOMIC_ACQUIRE);
    while (vcpu && vcpu->file != file)
        vcpu = vcpu->next;
    return vcpu;
}

/* A child has no use for it: its parent's VMs are none of its own. */
static void *map_shared(int fd, size_t size)
{
    long place = sys(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    sys(SYS_close, fd);
    if (is_error(place))
        return NULL;
    sys(SYS_madvise, place, size, MADV_DONTFORK);
    return (void *)place;
}

static size_t page_round(size_t size)
{
    return (size + PAGE - 1) & ~(size_t)(PAGE - 1);
}

static void vcpu_free(struct vcpu *vcpu)
{
    if (vcpu->cpu)
        library.destroy(vcpu->cpu);
    if (vcpu->run)
        sys(SYS_munmap, vcpu->run, RUN_PAGES * PAGE);
    if (vcpu->page)
        sys(SYS_munmap, vcpu->page, PAGE + page_round(sizeof(struct cpu_block)));
    free(vcpu);
}

/* Both parts of what the server shares; and the path of the library, which is the server's. */
static int ask_server(struct vcpu *vcpu)
{
    char path[PATH_MAX] = "";
    struct call call = {.request = {.op = OP_VCPU, .file = vcpu->file}, .reply = path};
    int error = call_server(&call);
    if (error)
        return error;
    if (!library_load(path, (enum cpu_mode)call.answer.b)) {
        sys(SYS_close, call.fd);
        return ENOSYS;
    }
    vcpu->page = map_shared(call.fd, PAGE + page_round(sizeof(struct cpu_block)));
    struct call run = {.request = {.op = OP_RUN_FD, .file = vcpu->file, .a = RUN_OWN}};
    error = call_server(&run);
    if (error)
        return error;
    vcpu->run = map_shared(run.fd, RUN_PAGES * PAGE);
    if (!vcpu->page || !vcpu->run)
        return ENOMEM;
    vcpu->block = (struct cpu_block *)((char *)vcpu->page + PAGE);
    vcpu->space = space_of((uint64_t)call.answer.value);
    return vcpu->space ? 0 : ENOMEM;
}

static int vcpu_make(struct vcpu *vcpu)
{
    int error = ask_server(vcpu);
    if (error)
        return error;
    vcpu->cpu = library.create(vcpu->space->leaves, vcpu->block);
    if (vcpu->cpu)
        return 0;
    dprintf(2, "guestmem: a vCPU cannot run in this process: %s\n", library.last_error());
    return errno ? errno : ENOSYS;
}

static struct vcpu *make(uint64_t file, int *error)
{
    struct vcpu *vcpu = calloc(1, sizeof(*vcpu));
    if (!vcpu) {
        *error = ENOMEM;
        return NULL;
    }
    vcpu->file = file;
    *error = vcpu_make(vcpu);
    if (*error) {
        vcpu_free(vcpu);
        return NULL;
    }
    vcpu->next = vcpus;
    __atomic_store_n(&vcpus, vcpu, __ATOMIC_RELEASE);
    return vcpu;
}

struct vcpu *vcpu_known(uint64_t file)
{
    return find(file);
}

/* The helper first, since from the first leaf on the server must be able to take it back. */
struct vcpu *vcpu_of(uint64_t file, int *error)
{
    struct vcpu *vcpu = find(file);
    if (vcpu)
        return vcpu;
    *error = guard_prepare();
    if (*error)
        return NULL;
    kernel_sigset old = signals_block();
    pthread_mutex_lock(&making);
    vcpu = find(file);
    if (!vcpu)
        vcpu = make(file, error);
    pthread_mutex_unlock(&making);
    signals_restore(old);
    return vcpu;
}

/* The server says that their VM is no more: no descriptor of them is left, so nobody has one. */
void vcpus_forget(uint64_t vm)
{
    pthread_mutex_lock(&making);
    struct vcpu **at = &vcpus;
    while (*at) {
        struct vcpu *vcpu = *at;
        if (vcpu->space->vm != vm) {
            at = &vcpu->next;
            continue;
        }
        __atomic_store_n(at, vcpu->next, __ATOMIC_RELEASE);
        vcpu_free(vcpu);
    }
    pthread_mutex_unlock(&making);
}

void vcpus_after_fork(void)
{
    making = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    vcpus = NULL;
}

/* ---- who has it */

enum { WAITED_FOR = 1U << 31 };

void vcpu_lock(struct vcpu *vcpu)
{
    uint32_t self = (uint32_t)sys(SYS_gettid), owner = 0;
    if (__atomic_compare_exchange_n(&vcpu->owner, &owner, self, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    for (;;) {
        owner = __atomic_load_n(&vcpu->owner, __ATOMIC_RELAXED);
        if (!owner) {
            if (__atomic_compare_exchange_n(&vcpu->owner, &owner, self | WAITED_FOR, false, __ATOMIC_ACQUIRE,
                                            __ATOMIC_RELAXED))
                return;
            continue;
        }
        if (!(owner & WAITED_FOR) &&
            !__atomic_compare_exchange_n(&vcpu->owner, &owner, owner | WAITED_FOR, false, __ATOMIC_RELAXED,
                                         __ATOMIC_RELAXED))
            continue;
        sys(SYS_futex, &vcpu->owner, FUTEX_WAIT_PRIVATE, owner | WAITED_FOR, 0);
    }
}

void vcpu_unlock(struct vcpu *vcpu)
{
    if (__atomic_exchange_n(&vcpu->owner, 0, __ATOMIC_RELEASE) & WAITED_FOR)
        sys(SYS_futex, &vcpu->owner, FUTEX_WAKE_PRIVATE, INT_MAX);
}

/* ---- in the guest */

static void enter_begin(struct vcpu *vcpu, kernel_sigset ends_by)
{
    vcpu->runner = pthread_self();
    __atomic_store_n(&vcpu->in_guest, true, __ATOMIC_SEQ_CST);
    library.watch_signals(vcpu->cpu, ends_by);
    faults_begin();
}

static void enter_end(struct vcpu *vcpu)
{
    faults_end();
    __atomic_store_n(&vcpu->in_guest, false, __ATOMIC_SEQ_CST);
}

/* Until a stop that means something. A kick only has the CPU look again: at its signals. */
static int enter(struct vcpu *vcpu, kernel_sigset ends_by)
{
    int kind;
    enter_begin(vcpu, ends_by);
    do
        kind = library.run(vcpu->cpu);
    while (kind == CPU_STOP_SLICE || (kind == CPU_STOP_KICKED && !__atomic_exchange_n(&vcpu->called_back, false, __ATOMIC_ACQ_REL)));
    enter_end(vcpu);
    return kind;
}

/* Source: kvm_arch_vcpu_ioctl_run: CR8 is the VMM's where the local APIC is. */
static void take_run_state(struct vcpu *vcpu)
{
    struct cpu_block *block = vcpu->block;
    block->request_interrupt_window = vcpu->run->request_interrupt_window;
    if (vcpu->page->direct && vcpu->run->cr8 != block->sregs.cr8) {
        block->sregs.cr8 = vcpu->run->cr8;
        block->dirty |= CPU_SREGS;
    }
}

/* Whether the stop is an exit that the server has given leave for. */
static bool exit_direct(struct vcpu *vcpu, int kind)
{
    if (!__atomic_load_n(&vcpu->page->direct, __ATOMIC_ACQUIRE) || !exit_write(vcpu, kind))
        return false;
    vcpu->page->direct_exits++;
    return true;
}

int vcpu_enter(const unsigned char *payload, size_t length, uint64_t *kind)
{
    struct thread *self = thread_self();
    struct enter head;
    if (length < sizeof(head))
        return EPROTO;
    memcpy(&head, payload, sizeof(head));
    struct vcpu *vcpu = find(head.vcpu);
    if (!vcpu || length != sizeof(head) + head.leaves * sizeof(struct leaf))
        return EPROTO;
    const struct leaf *leaves = (const struct leaf *)(payload + sizeof(head));
    int error = space_install(vcpu->space, head.generation, leaves, head.leaves);
    if (error)
        return error;
    *kind = self->cancelling ? CPU_STOP_SIGNAL : (uint64_t)enter(vcpu, self->ends_by);
    if (exit_direct(vcpu, (int)*kind))
        *kind = STOP_LEFT;
    return 0;
}

void vcpu_kick(uint64_t file)
{
    struct vcpu *vcpu = find(file);
    if (!vcpu)
        return;
    __atomic_store_n(&vcpu->called_back, true, __ATOMIC_RELEASE);
    library.kick(vcpu->cpu);
}

/* ---- KVM_RUN */

/* Signals that it lets through and the thread does not end it, too, and stay pending. */
static kernel_sigset run_mask(uint64_t file, kernel_sigset thread_mask)
{
    kernel_sigset mask;
    return vcpu_mask_get(file, &mask) ? mask : thread_mask;
}

enum { ASK_SERVER = 1 };

static long run_direct(struct vcpu *vcpu, kernel_sigset ends_by, bool *stopped)
{
    if (vcpu->asked)
        exit_take_answer(vcpu);
    if (!__atomic_load_n(&vcpu->page->direct, __ATOMIC_ACQUIRE) || vcpu->run->kvm_valid_regs || vcpu->run->kvm_dirty_regs)
        return ASK_SERVER;
    if (vcpu->run->immediate_exit) {
        library.settle(vcpu->cpu);
        return -EINTR;
    }
    take_run_state(vcpu);
    int kind = enter(vcpu, ends_by);
    if (exit_direct(vcpu, kind))
        return 0;
    if (kind == CPU_STOP_SIGNAL) {
        exit_write_interrupted(vcpu);
        return -EINTR;
    }
    *stopped = true;
    return ASK_SERVER;
}

static long run_by_server(struct vcpu *vcpu, const struct file *file, uintptr_t argument, bool stopped,
                          kernel_sigset thread_mask)
{
    struct thread *self = thread_self();
    struct call call = {.request = {.op = OP_IOCTL, .file = file->id, .a = KVM_RUN, .b = argument, .c = stopped},
                        .wait = WAIT_SIGNALS};
    kernel_sigset mask;
    if (vcpu_mask_get(file->id, &mask)) {
        call.run_mask = mask;
        call.signal_fd = thread_mask & ~mask ? pending_signals_fd(thread_mask & ~mask) : -1;
        call.with_signal_fd = call.signal_fd >= 0;
    }
    self->running = vcpu;
    int error = call_blocked(&call, thread_mask);
    bool still_mine = self->running == vcpu; /* else a handler has brought the call to its end */
    self->running = NULL;
    if (still_mine)
        vcpu_unlock(vcpu);
    return error ? -error : call.answer.value;
}

long vcpu_run(const struct file *file, uintptr_t argument)
{
    struct thread *self = thread_self();
    kernel_sigset old = signals_block(); /* from here on a signal ends the run */
    call_finish_waiting(self);
    int error = 0;
    struct vcpu *vcpu = vcpu_of(file->id, &error);
    if (!vcpu) {
        signals_restore(old);
        return -error;
    }
    vcpu_lock(vcpu);
    self->ends_by = ~run_mask(file->id, old);
    bool stopped = false;
    long result = argument ? ASK_SERVER : run_direct(vcpu, self->ends_by, &stopped);
    if (result == ASK_SERVER)
        result = run_by_server(vcpu, file, argument, stopped, old);
    else
        vcpu_unlock(vcpu);
    signals_restore(old);
    return result;
}

long vcpu_get_regs(const struct file *file, void *regs)
{
    struct vcpu *vcpu = find(file->id);
    if (!vcpu || !__atomic_load_n(&vcpu->page->direct, __ATOMIC_ACQUIRE))
        return ASK_SERVER;
    kernel_sigset old = signals_block();
    call_finish_waiting(thread_self());
    vcpu_lock(vcpu);
    int error = copy_to_client(regs, &vcpu->block->regs, sizeof(vcpu->block->regs));
    vcpu_unlock(vcpu);
    signals_restore(old);
    return -error;
}

/* ---- threads that signals are sent to: a vCPU looks for them when it is told, and every half millisecond else */

void vcpus_look(pthread_t thread)
{
    for (struct vcpu *vcpu = __atomic_load_n(&vcpus, __ATOMIC_ACQUIRE); vcpu; vcpu = vcpu->next)
        if (__atomic_load_n(&vcpu->in_guest, __ATOMIC_SEQ_CST) && pthread_equal(vcpu->runner, thread))
            library.kick(vcpu->cpu);
}

void vcpus_look_all(void)
{
    for (struct vcpu *vcpu = __atomic_load_n(&vcpus, __ATOMIC_ACQUIRE); vcpu; vcpu = vcpu->next)
        if (__atomic_load_n(&vcpu->in_guest, __ATOMIC_SEQ_CST))
            library.kick(vcpu->cpu);
}
