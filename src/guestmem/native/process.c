/* Start, fork and exec. */
#define _GNU_SOURCE
#include "vcpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct process process;

enum { SPINS = 600 }; /* some 200 us, as long as KVM itself polls for a halted vCPU */

/* A word in memory that fork() clears in the child, whoever makes it: it is how a bare clone() is noticed. */
static uint64_t *alive;

static void alive_prepare(void)
{
    static uint64_t always;
    long page = sys(SYS_mmap, 0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    alive = is_error(page) || is_error(sys(SYS_madvise, page, 4096, MADV_WIPEONFORK)) ? &always : (uint64_t *)page;
    *alive = 1;
}

static void become_child(void)
{
    if (process.client)
        process.forked_from = process.client;
    process.client = 0;
    areas_after_fork();
    guard_after_fork();
    spaces_after_fork();
    faults_after_fork();
    channels_after_fork();
    *alive = 1;
    if (areas_exist())
        guard_child();
}

bool shim_active(void)
{
    if (!process.active)
        return false;
    if (!__atomic_load_n(alive, __ATOMIC_RELAXED)) {
        kernel_sigset old = signals_block();
        become_child();
        signals_restore(old);
    }
    return true;
}

/* ---- fork(): no lock is held by a thread that the child has not, and the child is in order before its code runs */

static __thread kernel_sigset mask_before_fork __attribute__((tls_model("initial-exec")));

static void fork_prepare(void)
{
    mask_before_fork = signals_block();
    channels_lock();
    guard_lock();
    spaces_lock();
    areas_lock();
}

static void fork_parent(void)
{
    areas_unlock();
    spaces_unlock();
    guard_unlock();
    channels_unlock();
    signals_restore(mask_before_fork);
}

static void fork_child(void)
{
    become_child();
    signals_restore(mask_before_fork);
}

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("GUESTMEM_SOCKET");
    if (!path || !*path || strlen(path) >= sizeof(process.socket_path))
        return;
    strcpy(process.socket_path, path);
    alive_prepare();
    if (pthread_atfork(fork_prepare, fork_parent, fork_child))
        return;
    cpu_set_t cpus;
    process.spins = !sched_getaffinity(0, sizeof(cpus), &cpus) && CPU_COUNT(&cpus) > 1 ? SPINS : 0;
    process.active = true;
    files_mark_inherited();
}
