/* Translated code stays true to guest memory, whoever writes it.
 *
 * Unicorn sees what a CPU writes through the linear address that it executes from, and nothing else: not another linear
 * address of the same page, not another CPU, not the host. So each page that was executed is known here, with its content
 * when it was translated, and who has translated code of it and who may write it. A page is in one of two states for each
 * CPU, much as a line of a cache is. Who executes it takes the right to write it from all others, and from its own other
 * addresses; who may write it has its executors drop what they have translated. The right is in a TLB, so it is taken by a
 * flush, which a CPU in the guest does at its next boundary, and which is waited for. A page that is executed for the first
 * time may have been writable to anybody.
 *
 * What the host writes is seen when a page is fetched after a flush, and at the start of a run as long as the CPU has
 * executed from at most four pages since. Hardware has a limit of the same kind (Intel SDM vol. 3, 9.1.3). */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "inside.h"

enum { PAGES = 1 << 14, PROBES = 64, LIVE_MAX = 4 };
enum { SEVERAL = 1 }; /* in the place of a linear address */

struct code_page {
    uint64_t hva;                             /* 0: free */
    uint64_t executors, writers;              /* masks of cpu->number */
    uint64_t executor_linear, writer_linear;  /* the only address that it is executed from, or written at; or SEVERAL */
};

struct code_table {
    pthread_mutex_t lock; /* guards all of it; never held while somebody is waited for */
    unsigned used;        /* read without it */
    struct code_page page[PAGES];
    unsigned char content[PAGES][PAGE]; /* of the page when it was translated */
};

struct code_table *code_table_create(void)
{
    struct code_table *table = mmap(NULL, sizeof(*table), PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (table == MAP_FAILED)
        return NULL;
    pthread_mutex_init(&table->lock, NULL);
    return table;
}

void code_table_destroy(struct code_table *table)
{
    munmap(table, sizeof(*table));
}

static uint64_t bit_of(const struct cpu *cpu)
{
    return 1ULL << cpu->number;
}

/* `hva` 0 looks for nothing; a page that is not there gets the first free place, `place`, if there is one. */
static struct code_page *find(struct code_table *table, uint64_t hva, struct code_page **place)
{
    unsigned at = (unsigned)((hva >> PAGE_SHIFT) * 0x9e3779b97f4a7c15ULL >> 50);
    *place = NULL;
    for (unsigned probe = 0; probe < PROBES; probe++, at = (at + 1) % PAGES) {
        struct code_page *page = &table->page[at];
        if (page->hva == hva)
            return page;
        if (!page->hva) {
            *place = page;
            return NULL;
        }
    }
    return NULL;
}

static unsigned char *content_of(struct code_table *table, const struct code_page *page)
{
    return table->content[page - table->page];
}

/* ---- asking other CPUs */

/* They are to drop what they have translated; before they execute anything more, since they look at each boundary. */
static void make_stale(struct cpu *cpu, uint64_t executors)
{
    for (struct cpu *other = space_cpus(cpu->space); other; other = other->next)
        if (other != cpu && executors & bit_of(other)) {
            __atomic_store_n(&other->code_stale, 1, __ATOMIC_SEQ_CST);
            kick(other);
        }
}

static bool holds_grant(struct cpu *other)
{
    return __atomic_load_n(&other->flush_wanted, __ATOMIC_SEQ_CST) &&
           __atomic_load_n(&other->in_guest, __ATOMIC_SEQ_CST) && !__atomic_load_n(&other->parked, __ATOMIC_SEQ_CST);
}

/* Their right to write is gone when this returns: each has flushed, is not in the guest, or waits itself and flushes
 * before it goes on. */
static void take_writes(struct cpu *cpu, uint64_t writers)
{
    for (struct cpu *other = space_cpus(cpu->space); other; other = other->next)
        if (other != cpu && writers & bit_of(other))
            __atomic_store_n(&other->flush_wanted, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&cpu->parked, 1, __ATOMIC_SEQ_CST);
    for (struct cpu *other = space_cpus(cpu->space); other; other = other->next)
        while (other != cpu && writers & bit_of(other) && holds_grant(other)) {
            kick(other);
            sched_yield();
        }
    __atomic_store_n(&cpu->parked, 0, __ATOMIC_SEQ_CST);
    if (__atomic_exchange_n(&cpu->flush_wanted, 0, __ATOMIC_SEQ_CST))
        tlb_flush(cpu);
}

/* ---- fetches and grants */

static void add_live(struct cpu *cpu, struct code_page *page)
{
    if (cpu->live_count < LIVE_MAX)
        cpu->live[cpu->live_count] = page;
    if (cpu->live_count <= LIVE_MAX)
        cpu->live_count++;
}

static bool refuse(struct cpu *cpu)
{
    cpu->refused = (struct refused){.why = REFUSED_CODE};
    return false;
}

/* The table is full: everybody begins anew. `lock` held. */
static void begin_anew(struct cpu *cpu, struct code_table *table)
{
    memset(table->page, 0, sizeof(table->page));
    table->used = 0;
    make_stale(cpu, ~0ULL);
}

/* Whether the page may be executed from `linear` as it is; else whose right to write it must go first. `lock` held. */
static bool only_read(struct cpu *cpu, struct code_table *table, uint64_t linear, uint64_t hva, struct code_page **page,
                      uint64_t *writers)
{
    struct code_page *place;
    *writers = ~0ULL;
    *page = find(table, hva, &place);
    if (!*page && place) {
        *place = (struct code_page){.hva = hva, .executor_linear = linear};
        __atomic_store_n(&table->used, table->used + 1, __ATOMIC_SEQ_CST);
        return false;
    }
    if (!*page)
        return true;
    *writers = (*page)->writers;
    if ((*page)->writers == bit_of(cpu) && (*page)->writer_linear == linear)
        return true; /* Unicorn sees these */
    (*page)->writers = 0;
    return !*writers;
}

/* `lock` held. False: this CPU has translated another content. */
static bool execute(struct cpu *cpu, struct code_table *table, struct code_page *page, uint64_t linear,
                    const unsigned char *now)
{
    uint64_t mine = bit_of(cpu);
    if (memcmp(content_of(table, page), now, PAGE)) {
        if (page->executors & mine)
            return refuse(cpu);
        make_stale(cpu, page->executors);
        page->executors = 0;
        memcpy(content_of(table, page), now, PAGE);
    }
    if (!page->executors)
        page->executor_linear = linear;
    else if (page->executor_linear != linear || page->executors != mine)
        page->executor_linear = SEVERAL;
    page->executors |= mine;
    add_live(cpu, page);
    return true;
}

bool code_fetched(struct cpu *cpu, uint64_t linear, uint64_t hva)
{
    struct code_table *table = space_code(cpu->space);
    unsigned char now[PAGE];
    struct code_page *page;
    uint64_t writers;
    for (;;) {
        memcpy(now, (const void *)hva, PAGE); /* before the lock: it may be a fault of the host */
        pthread_mutex_lock(&table->lock);
        if (only_read(cpu, table, linear, hva, &page, &writers))
            break;
        pthread_mutex_unlock(&table->lock);
        take_writes(cpu, writers);
        if (writers & bit_of(cpu))
            tlb_flush(cpu);
    }
    if (!page)
        begin_anew(cpu, table);
    bool done = page ? execute(cpu, table, page, linear, now) : refuse(cpu);
    pthread_mutex_unlock(&table->lock);
    return done;
}

/* A page that nobody executes may be written by all. One that is executed is made writable when it is written. */
bool code_may_write(struct cpu *cpu, uint64_t linear, uint64_t hva, bool writes)
{
    struct code_table *table = space_code(cpu->space);
    uint64_t mine = bit_of(cpu);
    struct code_page *place;
    if (!__atomic_load_n(&table->used, __ATOMIC_SEQ_CST))
        return true;
    pthread_mutex_lock(&table->lock);
    struct code_page *page = find(table, hva, &place);
    if (!page || !writes) {
        pthread_mutex_unlock(&table->lock);
        return !page;
    }
    bool own = page->executors & mine && page->executor_linear != linear;
    make_stale(cpu, page->executors & ~mine);
    page->executors &= mine;
    page->writer_linear = page->writers & ~mine || (page->writers && page->writer_linear != linear) ? SEVERAL : linear;
    page->writers |= mine;
    pthread_mutex_unlock(&table->lock);
    return !own || refuse(cpu);
}

/* ---- what a CPU has forgotten */

void code_forget(struct cpu *cpu)
{
    struct code_table *table = space_code(cpu->space);
    uint64_t others = ~bit_of(cpu);
    pthread_mutex_lock(&table->lock);
    for (unsigned i = 0; i < PAGES; i++)
        table->page[i].executors &= others;
    cpu->live_count = 0;
    pthread_mutex_unlock(&table->lock);
}

/* The rights stay noted: to take one that is gone costs a flush, to forget one that is there would be wrong. */
void code_tlb_flushed(struct cpu *cpu)
{
    cpu->live_count = 0;
}

/* ---- between runs. The pages may be gone by now. */

bool code_unchanged(struct cpu *cpu)
{
    struct code_table *table = space_code(cpu->space);
    sigjmp_buf guard;
    if (cpu->live_count > LIVE_MAX)
        return true;
    bool same = !sigsetjmp(guard, 0);
    cpu->guard = &guard;
    for (unsigned i = 0; same && i < cpu->live_count; i++)
        same = cpu->live[i]->hva && !memcmp(content_of(table, cpu->live[i]), (const void *)cpu->live[i]->hva, PAGE);
    cpu->guard = NULL;
    return same;
}

/* What the guest itself wrote through the address that it executes from, Unicorn has seen. */
void code_run_ended(struct cpu *cpu)
{
    struct code_table *table = space_code(cpu->space);
    sigjmp_buf guard;
    if (cpu->live_count > LIVE_MAX || sigsetjmp(guard, 0)) {
        cpu->guard = NULL;
        return;
    }
    cpu->guard = &guard;
    for (unsigned i = 0; i < cpu->live_count; i++)
        if (cpu->live[i]->writers == bit_of(cpu))
            memcpy(content_of(table, cpu->live[i]), (const void *)cpu->live[i]->hva, PAGE);
    cpu->guard = NULL;
}
