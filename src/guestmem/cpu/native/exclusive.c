/* Who is in the guest: one CPU at a time, or all at once, and one alone for what the host cannot do atomically.
 *
 * One at a time (SLICES, SERIAL): a lock of the process, given in the order of asking. All at once (PARALLEL): a CPU that
 * wants to be alone says so in its space, has the others leave, and waits until they have; who enters waits for it. Nobody
 * waits when kicked: a CPU that is blocked in a fault of the host may be what it waits for. */
#define _GNU_SOURCE
#include "internal.h"

#include <sched.h>
#include <time.h>

/* A lock that is given in the order of asking: a thread that only yields must not take it again at once. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t turn;
    unsigned next, serving;
} engine = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0};

static void lock_engine(void)
{
    pthread_mutex_lock(&engine.lock);
    for (unsigned mine = engine.next++; engine.serving != mine;)
        pthread_cond_wait(&engine.turn, &engine.lock);
    pthread_mutex_unlock(&engine.lock);
}

static void unlock_engine(void)
{
    pthread_mutex_lock(&engine.lock);
    engine.serving++;
    if (engine.serving != engine.next)
        pthread_cond_broadcast(&engine.turn);
    pthread_mutex_unlock(&engine.lock);
}

/* In a forked child no CPU runs. */
void engine_reset(void)
{
    pthread_mutex_init(&engine.lock, NULL);
    pthread_cond_init(&engine.turn, NULL);
    engine.next = engine.serving = 0;
}

static void pause_a_little(unsigned turn)
{
    struct timespec moment = {0, 20000};
    if (turn < 100)
        sched_yield();
    else
        nanosleep(&moment, NULL);
}

static bool is_kicked(struct cpu *cpu)
{
    return atomic_load(&cpu->kicks) & KICK_USER;
}

/* False, and not in the guest, if it was kicked while another CPU is alone. */
bool enter_guest(struct cpu *cpu)
{
    _Atomic(struct cpu *) *owner = space_exclusive(cpu->space);
    if (cpu_mode != CPU_MODE_PARALLEL)
        lock_engine();
    for (unsigned turn = 0;; turn++) {
        atomic_store(&cpu->in_guest, 1);
        struct cpu *alone = atomic_load(owner);
        if (!alone || alone == cpu)
            return true;
        atomic_store(&cpu->in_guest, 0);
        if (is_kicked(cpu))
            return false;
        pause_a_little(turn);
    }
}

void leave_guest(struct cpu *cpu)
{
    atomic_store(&cpu->in_guest, 0);
    if (cpu_mode != CPU_MODE_PARALLEL)
        unlock_engine();
}

/* Lets others have a turn. False as enter_guest(). */
bool yield_guest(struct cpu *cpu)
{
    if (cpu_mode != CPU_MODE_PARALLEL && __atomic_load_n(&engine.next, __ATOMIC_RELAXED) ==
                                             __atomic_load_n(&engine.serving, __ATOMIC_RELAXED) + 1)
        return true;
    leave_guest(cpu);
    return enter_guest(cpu);
}

static void evict(struct cpu *cpu, void *data)
{
    if (cpu != data && atomic_load(&cpu->in_guest))
        kick(cpu, KICK_WORK);
}

struct count {
    struct cpu *self;
    unsigned inside;
};

static void count_inside(struct cpu *cpu, void *data)
{
    struct count *count = data;
    if (cpu != count->self)
        count->inside += atomic_load(&cpu->in_guest);
}

/* True: no other CPU of the space is in the guest. False: it was kicked meanwhile. This CPU is in the guest after both,
 * unless it was kicked while another was alone. */
bool begin_exclusive(struct cpu *cpu)
{
    _Atomic(struct cpu *) *owner = space_exclusive(cpu->space);
    if (cpu_mode != CPU_MODE_PARALLEL)
        return true;
    cpu->block->exclusive++;
    atomic_store(&cpu->in_guest, 0);
    struct cpu *nobody = NULL;
    for (unsigned turn = 0; !atomic_compare_exchange_strong(owner, &nobody, cpu); nobody = NULL, turn++) {
        if (is_kicked(cpu))
            return enter_guest(cpu) && false;
        pause_a_little(turn);
    }
    for (unsigned turn = 0;; turn++) {
        struct count count = {cpu, 0};
        if (turn % 64 == 0)
            space_each(cpu->space, ~0ull, evict, cpu);
        space_each(cpu->space, ~0ull, count_inside, &count);
        if (!count.inside || is_kicked(cpu))
            atomic_store(&cpu->in_guest, 1);
        if (!count.inside)
            return true;
        if (is_kicked(cpu)) {
            atomic_store(owner, NULL);
            return false;
        }
        pause_a_little(turn);
    }
}

void end_exclusive(struct cpu *cpu)
{
    if (cpu_mode == CPU_MODE_PARALLEL)
        atomic_store(space_exclusive(cpu->space), NULL);
}
