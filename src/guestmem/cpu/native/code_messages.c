/* What one CPU asks others to do about a page of code, each in its own thread.
 *
 * Who asks waits until it is done, or the other is not in the guest, where it looks before it goes on. Meanwhile it does
 * what others ask of it, but not about the page that it is busy with. So two can wait for each other, and one can be
 * blocked in a fault of the host: after WAIT_NS nobody waits any more, and the RECHECK of who stopped writing mends what
 * came between. */
#define _GNU_SOURCE
#include "internal.h"

#include <sched.h>
#include <time.h>

enum { WAIT_NS = 200000 };

struct request {
    uint64_t hva;
    enum code_request request;
};

static void post(struct cpu *cpu, void *data)
{
    struct request *request = data;
    struct inbox *inbox = &cpu->inbox;
    pthread_mutex_lock(&inbox->lock);
    if (inbox->count < MESSAGES) {
        inbox->messages[inbox->count].hva = request->hva;
        inbox->messages[inbox->count++].request = request->request;
    } else
        inbox->overflow = true;
    inbox->posted++;
    pthread_mutex_unlock(&inbox->lock);
    kick(cpu, KICK_WORK);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

struct waiter {
    struct cpu *self;
    uint64_t hva;
};

static void wait_until_handled(struct cpu *cpu, void *data)
{
    struct waiter *waiter = data;
    pthread_mutex_lock(&cpu->inbox.lock);
    uint64_t posted = cpu->inbox.posted;
    pthread_mutex_unlock(&cpu->inbox.lock);
    for (uint64_t end = now_ns() + WAIT_NS; atomic_load(&cpu->in_guest) && atomic_load(&cpu->inbox.handled) < posted;) {
        code_take_messages(waiter->self, waiter->hva);
        if (now_ns() > end)
            return;
        sched_yield();
    }
}

void code_ask(struct cpu *cpu, uint64_t others, uint64_t hva, enum code_request request, bool wait)
{
    struct request what = {hva, request};
    struct waiter waiter = {cpu, hva};
    others &= ~(1ull << cpu->index);
    space_each(cpu->space, others, post, &what);
    if (wait)
        space_each(cpu->space, others, wait_until_handled, &waiter);
}

static void handle(struct cpu *cpu, const struct request *request)
{
    switch (request->request) {
    case DROP_CODE:
        code_drop_page(cpu, request->hva);
        break;
    case DROP_GRANT:
        code_drop_grant(cpu, request->hva);
        break;
    case RECHECK:
        code_recheck(cpu, request->hva);
    }
}

/* Does what is asked, but leaves what concerns the page `but`, which a fill is busy with; 0: everything. */
void code_take_messages(struct cpu *cpu, uint64_t but)
{
    struct inbox *inbox = &cpu->inbox;
    struct request taken[MESSAGES];
    unsigned count = 0, left = 0;
    pthread_mutex_lock(&inbox->lock);
    uint64_t posted = inbox->posted;
    bool all = inbox->overflow && !but;
    for (unsigned i = 0; i < inbox->count; i++) {
        if (inbox->messages[i].hva == but)
            inbox->messages[left++] = inbox->messages[i];
        else
            taken[count++] = (struct request){inbox->messages[i].hva, inbox->messages[i].request};
    }
    inbox->count = left;
    if (all)
        inbox->overflow = false;
    bool done = !left && (all || !inbox->overflow);
    pthread_mutex_unlock(&inbox->lock);
    for (unsigned i = 0; i < count; i++)
        handle(cpu, &taken[i]);
    if (all)
        code_drop_all(cpu);
    if (done)
        atomic_store(&inbox->handled, posted);
}
