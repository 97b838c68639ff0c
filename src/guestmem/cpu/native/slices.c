/* The end of a slice: one thread that ticks about every half millisecond while some CPU is in cpu_run().
 *
 * A run that is still the same at the next tick is told, so a slice takes one to two ticks. The thread starts with the first
 * run, blocks all signals, parks after IDLE_TICKS ticks without a run, and is not there in a forked child, where the next
 * run starts another. */
#define _GNU_SOURCE
#include "internal.h"

#include <time.h>

enum { PERIOD_NS = 400000, IDLE_TICKS = 100 };

static struct {
    pthread_mutex_t lock; /* of all but `parked` */
    pthread_cond_t wake;
    struct cpu *cpus;
    bool started;
    _Atomic bool parked;
} ticker = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, false, true};

static void in_child(void)
{
    pthread_mutex_init(&ticker.lock, NULL);
    pthread_cond_init(&ticker.wake, NULL);
    ticker.started = false;
    atomic_store(&ticker.parked, true);
    engine_reset();
}

/* Whether any CPU runs. */
static bool tick(void)
{
    bool any = false;
    for (struct cpu *cpu = ticker.cpus; cpu; cpu = cpu->next_in_process) {
        if (!atomic_load(&cpu->inside))
            continue;
        any = true;
        uint64_t serial = atomic_load(&cpu->run_serial);
        if (serial == cpu->ticked_serial)
            kick(cpu, KICK_TICK);
        cpu->ticked_serial = serial;
    }
    return any;
}

static void *tick_on(void *nothing)
{
    struct timespec period = {0, PERIOD_NS};
    (void)nothing;
    for (int idle = 0;;) {
        nanosleep(&period, NULL);
        pthread_mutex_lock(&ticker.lock);
        idle = tick() ? 0 : idle + 1;
        if (idle >= IDLE_TICKS) {
            /* A run that starts between the two lines is seen by the third. */
            atomic_store(&ticker.parked, true);
            while (!tick() && atomic_load(&ticker.parked))
                pthread_cond_wait(&ticker.wake, &ticker.lock);
            atomic_store(&ticker.parked, false);
            idle = 0;
        }
        pthread_mutex_unlock(&ticker.lock);
    }
    return NULL;
}

static void start(void)
{
    pthread_t thread;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    ticker.started = !pthread_create(&thread, NULL, tick_on, NULL);
    if (ticker.started)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* A run starts, or goes on with the same slice. */
void slice_begins(struct cpu *cpu, bool goes_on)
{
    if (!goes_on)
        atomic_fetch_add(&cpu->run_serial, 1);
    atomic_store(&cpu->inside, 1);
    if (!atomic_load(&ticker.parked))
        return;
    pthread_mutex_lock(&ticker.lock);
    atomic_store(&ticker.parked, false);
    if (ticker.started)
        pthread_cond_signal(&ticker.wake);
    else
        start();
    pthread_mutex_unlock(&ticker.lock);
}

/* It has ended. It may still be told to end, by a tick that is on its way. */
void slice_ends(struct cpu *cpu)
{
    atomic_store(&cpu->inside, 0);
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

void slices_add(struct cpu *cpu)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&ticker.lock);
    cpu->next_in_process = ticker.cpus;
    ticker.cpus = cpu;
    pthread_mutex_unlock(&ticker.lock);
}

void slices_remove(struct cpu *cpu)
{
    pthread_mutex_lock(&ticker.lock);
    for (struct cpu **at = &ticker.cpus; *at; at = &(*at)->next_in_process)
        if (*at == cpu) {
            *at = cpu->next_in_process;
            break;
        }
    pthread_mutex_unlock(&ticker.lock);
}
