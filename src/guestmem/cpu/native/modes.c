/* How the CPUs of a process run beside each other.
 *
 *   SLICES    one at a time, which the caller sees to; a run ends after about a millisecond
 *   SERIAL    one at a time, by a lock that goes round at the end of a slice
 *   PARALLEL  at once. `lock` is an atomic instruction of the host then, as is every store; what the host cannot do as one
 *             (an access across a cache line, 16 bytes) is done while all others stand at a boundary
 *
 * One thread ticks, about every half millisecond while a CPU runs, and has each look: whether its slice is over, whether a
 * signal waits, whether somebody must be alone. */
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "inside.h"

enum cpu_mode mode = CPU_MODE_SLICES;

void cpu_set_mode(enum cpu_mode wanted)
{
    mode = wanted;
}

/* ---- having a CPU look */

enum { REQUEST_INIT = 0x400, LEAVE = 0xffff };

void kick(struct cpu *cpu)
{
    __atomic_store_n(&cpu->slice_over, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&cpu->stepping, __ATOMIC_SEQ_CST))
        return;
    __atomic_or_fetch(cpu->at.interrupt_request, REQUEST_INIT, __ATOMIC_SEQ_CST);
    __atomic_store_n(cpu->at.leave_blocks, LEAVE, __ATOMIC_SEQ_CST);
}

void cpu_kick(struct cpu *cpu)
{
    __atomic_store_n(&cpu->kicked, 1, __ATOMIC_SEQ_CST);
    kick(cpu);
}

/* ---- the ticker */

enum { TICK_NS = 400000, IDLE_TICKS = 100, RUNNING_MAX = 1024 };

static struct cpu *running[RUNNING_MAX]; /* atomic; NULL: free */
static unsigned running_end;             /* one more than the highest place ever used. Atomic */
static uint32_t ticking;                 /* the thread is awake. Atomic */
static pthread_mutex_t ticker_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ticker_wakes = PTHREAD_COND_INITIALIZER;
static bool ticker_started; /* by ticker_lock */

/* Whether any CPU runs. */
static bool tick(void)
{
    bool any = false;
    unsigned end = __atomic_load_n(&running_end, __ATOMIC_ACQUIRE);
    for (unsigned i = 0; i < end; i++) {
        struct cpu *cpu = __atomic_load_n(&running[i], __ATOMIC_ACQUIRE);
        if (!cpu)
            continue;
        any = true;
        if (cpu->ticks++)
            kick(cpu);
    }
    return any;
}

static void *tick_for_ever(void *nothing)
{
    unsigned idle = 0;
    struct timespec period = {.tv_nsec = TICK_NS};
    for (;;) {
        nanosleep(&period, NULL);
        idle = tick() ? 0 : idle + 1;
        if (idle < IDLE_TICKS)
            continue;
        pthread_mutex_lock(&ticker_lock);
        __atomic_store_n(&ticking, 0, __ATOMIC_SEQ_CST);
        if (!tick())
            pthread_cond_wait(&ticker_wakes, &ticker_lock);
        __atomic_store_n(&ticking, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&ticker_lock);
        idle = 0;
    }
    return nothing;
}

/* A child has no ticker, and none of its parent's CPUs. */
static void ticker_after_fork(void)
{
    pthread_mutex_init(&ticker_lock, NULL);
    pthread_cond_init(&ticker_wakes, NULL);
    ticker_started = false;
    ticking = 0;
    running_end = 0;
    memset(running, 0, sizeof(running));
}

static void ticker_start(void)
{
    sigset_t all, old;
    pthread_t thread;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    ticker_started = !pthread_create(&thread, &attributes, tick_for_ever, NULL);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

static void ticker_wake(void)
{
    static bool prepared;
    pthread_mutex_lock(&ticker_lock);
    if (!prepared)
        prepared = !pthread_atfork(NULL, NULL, ticker_after_fork);
    if (!ticker_started)
        ticker_start();
    __atomic_store_n(&ticking, 1, __ATOMIC_SEQ_CST);
    pthread_cond_signal(&ticker_wakes);
    pthread_mutex_unlock(&ticker_lock);
}

/* A CPU keeps its place for as long as it lives. */
static void take_place(struct cpu *cpu)
{
    static uint32_t places;
    unsigned place = __atomic_fetch_add(&places, 1, __ATOMIC_RELAXED) % RUNNING_MAX;
    cpu->place = place + 1;
    unsigned end = __atomic_load_n(&running_end, __ATOMIC_RELAXED);
    while (end <= place && !__atomic_compare_exchange_n(&running_end, &end, place + 1, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        ;
}

void ticker_enter(struct cpu *cpu)
{
    if (!cpu->place)
        take_place(cpu);
    cpu->ticks = 0;
    __atomic_store_n(&running[cpu->place - 1], cpu, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&ticking, __ATOMIC_SEQ_CST))
        ticker_wake();
}

void ticker_leave(struct cpu *cpu)
{
    if (!cpu->place)
        return;
    __atomic_store_n(&running[cpu->place - 1], NULL, __ATOMIC_SEQ_CST);
}

/* ---- signals, which are blocked while a CPU runs */

void cpu_watch_signals(struct cpu *cpu, uint64_t mask)
{
    cpu->watched_signals = mask;
}

bool signals_wait(const struct cpu *cpu)
{
    uint64_t pending = 0;
    if (!cpu->watched_signals)
        return false;
    syscall(SYS_rt_sigpending, &pending, sizeof(pending));
    return pending & cpu->watched_signals;
}

/* ---- serial */

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static uint32_t waiting; /* for the turn. Atomic */

static void turn_take(void)
{
    if (!pthread_mutex_trylock(&turn))
        return;
    __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&turn);
    __atomic_sub_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
}

/* ---- parallel: who must be alone asks, and goes on when everybody else is at a boundary */

static uint32_t inside; /* CPUs that may execute. Atomic */
static uint32_t alone;  /* somebody wants to be, or is. Atomic */

static void inside_enter(void)
{
    for (;;) {
        while (__atomic_load_n(&alone, __ATOMIC_SEQ_CST))
            sched_yield();
        __atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&alone, __ATOMIC_SEQ_CST))
            return;
        __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
    }
}

static void inside_leave(void)
{
    __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
}

static void kick_all_but(const struct cpu *cpu)
{
    unsigned end = __atomic_load_n(&running_end, __ATOMIC_ACQUIRE);
    for (unsigned i = 0; i < end; i++) {
        struct cpu *other = __atomic_load_n(&running[i], __ATOMIC_ACQUIRE);
        if (other && other != cpu)
            kick(other);
    }
}

/* False: it was kicked meanwhile, and is not alone. One that is blocked in a fault of the client's memory may keep it
 * waiting for long. */
bool world_stop(struct cpu *cpu)
{
    if (mode != CPU_MODE_PARALLEL)
        return true;
    cpu->block->exclusive++;
    inside_leave();
    uint32_t nobody = 0;
    while (!__atomic_compare_exchange_n(&alone, &nobody, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        nobody = 0;
        sched_yield();
    }
    while (__atomic_load_n(&inside, __ATOMIC_SEQ_CST)) {
        if (__atomic_load_n(&cpu->kicked, __ATOMIC_SEQ_CST) || signals_wait(cpu)) {
            world_go(cpu);
            return false;
        }
        kick_all_but(cpu);
        sched_yield();
    }
    return true;
}

void world_go(struct cpu *cpu)
{
    (void)cpu;
    if (mode != CPU_MODE_PARALLEL)
        return;
    __atomic_store_n(&alone, 0, __ATOMIC_SEQ_CST);
    inside_enter();
}

void world_enter(struct cpu *cpu)
{
    if (mode == CPU_MODE_SERIAL)
        turn_take();
    else if (mode == CPU_MODE_PARALLEL)
        inside_enter();
    __atomic_store_n(&cpu->in_guest, 1, __ATOMIC_SEQ_CST);
    ticker_enter(cpu);
}

void world_leave(struct cpu *cpu)
{
    ticker_leave(cpu);
    __atomic_store_n(&cpu->in_guest, 0, __ATOMIC_SEQ_CST);
    if (mode == CPU_MODE_SERIAL)
        pthread_mutex_unlock(&turn);
    else if (mode == CPU_MODE_PARALLEL)
        inside_leave();
}

void world_yield(struct cpu *cpu)
{
    if (mode == CPU_MODE_SERIAL && __atomic_load_n(&waiting, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&cpu->in_guest, 0, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&turn);
        sched_yield();
        turn_take();
        __atomic_store_n(&cpu->in_guest, 1, __ATOMIC_SEQ_CST);
    } else if (mode == CPU_MODE_PARALLEL && __atomic_load_n(&alone, __ATOMIC_SEQ_CST)) {
        inside_leave();
        inside_enter();
    }
}
