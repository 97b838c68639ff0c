/* Stage 2: the leaves that the CPUs of one VM may use, a radix tree for each kind of access. Looked up without a lock, by
 * several threads; `lock` is held to change it. A table stays where it is until the space goes, so a reader never meets
 * one that is gone. A run of frames is stored at the highest level at which it fills a whole entry. */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "inside.h"

enum { BITS = 9, ENTRIES = 1 << BITS, TOP_SHIFT = 36, GFN_BITS = TOP_SHIFT + BITS, TREES = 2 };

/* An entry is 0, a table, or a leaf with the address of its first byte. */
enum { LEAF = 1, WRITABLE = 2, MMIO = 4, TABLE = 8, FLAGS = 15 };

struct table {
    uint64_t entry[ENTRIES];
};

struct cpu_space {
    struct table *trees[TREES]; /* by enum cpu_access */
    pthread_mutex_t lock;       /* to change a tree, and `cpus` */
    uint64_t generation;        /* of the last drop. Atomic */
    struct cpu *cpus;           /* by `lock`, followed without */
    unsigned numbers;           /* given to CPUs so far */
    struct code_table *code;
};

static struct table *table_new(void)
{
    void *table = mmap(NULL, sizeof(struct table), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return table == MAP_FAILED ? NULL : table;
}

static uint64_t load(const uint64_t *entry)
{
    return __atomic_load_n(entry, __ATOMIC_ACQUIRE);
}

static void store(uint64_t *entry, uint64_t value)
{
    __atomic_store_n(entry, value, __ATOMIC_RELEASE);
}

static struct table *table_of(uint64_t entry)
{
    return (struct table *)(entry & ~(uint64_t)FLAGS);
}

struct cpu_space *cpu_space_create(void)
{
    struct cpu_space *space = calloc(1, sizeof(*space));
    if (!space)
        return NULL;
    pthread_mutex_init(&space->lock, NULL);
    space->code = code_table_create();
    for (int i = 0; i < TREES; i++)
        space->trees[i] = table_new();
    if (space->code && space->trees[0] && space->trees[1])
        return space;
    cpu_space_destroy(space);
    return NULL;
}

static void table_free(struct table *table)
{
    for (int i = 0; i < ENTRIES; i++)
        if (table->entry[i] & TABLE)
            table_free(table_of(table->entry[i]));
    munmap(table, sizeof(*table));
}

void cpu_space_destroy(struct cpu_space *space)
{
    for (int i = 0; i < TREES; i++)
        if (space->trees[i])
            table_free(space->trees[i]);
    if (space->code)
        code_table_destroy(space->code);
    pthread_mutex_destroy(&space->lock);
    free(space);
}

struct code_table *space_code(struct cpu_space *space)
{
    return space->code;
}

/* ---- looking up */

static uint64_t find(const struct table *table, uint64_t gfn, uint64_t *inside)
{
    for (unsigned shift = TOP_SHIFT;; shift -= BITS) {
        uint64_t entry = load(&table->entry[gfn >> shift & (ENTRIES - 1)]);
        if (!(entry & TABLE)) {
            *inside = gfn & ((1ULL << shift) - 1);
            return entry;
        }
        table = table_of(entry);
    }
}

static bool find_kind(struct cpu_space *space, uint64_t gfn, unsigned kind, struct leaf_found *found)
{
    uint64_t inside, entry = find(space->trees[kind], gfn, &inside);
    if (!(entry & LEAF))
        return false;
    found->mmio = entry & MMIO;
    found->writable = entry & WRITABLE;
    found->hva = entry & ~(uint64_t)FLAGS;
    if (found->hva)
        found->hva += inside << PAGE_SHIFT;
    return true;
}

/* A guest that cannot assert a kind has the page that it can see. */
bool space_lookup(struct cpu_space *space, uint64_t gfn, uint8_t kind, struct leaf_found *found)
{
    if (gfn >> GFN_BITS)
        return false;
    if (kind != CPU_ACCESS_ANY)
        return find_kind(space, gfn, kind, found);
    return find_kind(space, gfn, CPU_ACCESS_SHARED, found) || find_kind(space, gfn, CPU_ACCESS_PRIVATE, found);
}

/* ---- changing */

/* The entry is to have a table under it that says what it said. */
static struct table *split(uint64_t *entry, unsigned shift)
{
    uint64_t old = *entry;
    if (old & TABLE)
        return table_of(old);
    struct table *table = table_new();
    if (!table)
        return NULL;
    uint64_t step = old & ~(uint64_t)FLAGS ? 1ULL << (shift - BITS + PAGE_SHIFT) : 0;
    for (int i = 0; old && i < ENTRIES; i++)
        table->entry[i] = old + i * step;
    store(entry, (uint64_t)table | TABLE);
    return table;
}

static bool set(struct table *table, unsigned shift, uint64_t first, uint64_t last, uint64_t leaf);

/* An entry that the run fills; where a table is already, it stays and is filled. */
static bool set_whole(uint64_t *entry, unsigned shift, uint64_t leaf)
{
    if (*entry & TABLE)
        return set(table_of(*entry), shift - BITS, 0, (1ULL << shift) - 1, leaf);
    store(entry, leaf);
    return true;
}

/* Without memory for a table more goes than was asked for: it is missed, and comes again. */
static bool set_part(uint64_t *entry, unsigned shift, uint64_t first, uint64_t last, uint64_t leaf)
{
    struct table *below = split(entry, shift);
    if (below)
        return set(below, shift - BITS, first, last, leaf);
    if (!leaf)
        store(entry, 0);
    return !leaf;
}

/* Frames first .. last of what `table` covers; `leaf` is that of `first`, or 0. */
static bool set(struct table *table, unsigned shift, uint64_t first, uint64_t last, uint64_t leaf)
{
    uint64_t size = 1ULL << shift, step = leaf & ~(uint64_t)FLAGS ? 1ULL << PAGE_SHIFT : 0;
    for (uint64_t at = first; at <= last;) {
        uint64_t *entry = &table->entry[at >> shift & (ENTRIES - 1)];
        uint64_t start = at & ~(size - 1), end = start + size - 1 < last ? start + size - 1 : last;
        uint64_t part = leaf ? leaf + (at - first) * step : 0;
        bool whole = at == start && end == start + size - 1;
        if (whole ? !set_whole(entry, shift, part) : false)
            return false;
        if (!whole && (leaf || *entry) && !set_part(entry, shift, at - start, end - start, part))
            return false;
        at = end + 1;
    }
    return true;
}

static int map(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, uint64_t leaf)
{
    if (!count || gfn >> GFN_BITS || (gfn + count - 1) >> GFN_BITS)
        return EINVAL;
    bool done = true;
    pthread_mutex_lock(&space->lock);
    for (int i = 0; i < TREES && done; i++)
        if (kinds >> i & 1)
            done = set(space->trees[i], TOP_SHIFT, gfn, gfn + count - 1, leaf);
    pthread_mutex_unlock(&space->lock);
    return done ? 0 : ENOMEM;
}

int cpu_space_map(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, uint64_t hva, bool writable)
{
    return map(space, gfn, count, kinds, hva | LEAF | (writable ? WRITABLE : 0));
}

int cpu_space_map_mmio(struct cpu_space *space, uint64_t gfn, uint64_t count)
{
    return map(space, gfn, count, (1 << TREES) - 1, LEAF | MMIO);
}

int cpu_space_map_rom(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, uint64_t hva)
{
    return map(space, gfn, count, kinds, hva | LEAF | MMIO);
}

/* ---- taking away */

uint64_t space_generation(const struct cpu_space *space)
{
    return __atomic_load_n(&space->generation, __ATOMIC_SEQ_CST);
}

static bool may_reach(const struct cpu *cpu, uint64_t generation)
{
    return __atomic_load_n(&cpu->in_guest, __ATOMIC_SEQ_CST) &&
           __atomic_load_n(&cpu->seen_generation, __ATOMIC_SEQ_CST) < generation;
}

/* Each looks at the generation before it executes anything, and when it is kicked. */
static void shoot_down(struct cpu_space *space, uint64_t generation, bool wait)
{
    for (struct cpu *cpu = space_cpus(space); cpu; cpu = cpu->next)
        if (cpu != current && may_reach(cpu, generation))
            kick(cpu);
    for (struct cpu *cpu = space_cpus(space); wait && cpu; cpu = cpu->next)
        while (cpu != current && may_reach(cpu, generation)) {
            kick(cpu);
            sched_yield();
        }
}

void cpu_space_drop(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, bool wait)
{
    if (!count || gfn >> GFN_BITS)
        return;
    uint64_t last = gfn + count - 1;
    if (last < gfn || last >> GFN_BITS)
        last = (1ULL << GFN_BITS) - 1;
    pthread_mutex_lock(&space->lock);
    for (int i = 0; i < TREES; i++)
        if (kinds >> i & 1)
            set(space->trees[i], TOP_SHIFT, gfn, last, 0);
    uint64_t generation = __atomic_add_fetch(&space->generation, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&space->lock);
    shoot_down(space, generation, wait);
}

/* ---- CPUs */

void space_add(struct cpu_space *space, struct cpu *cpu)
{
    pthread_mutex_lock(&space->lock);
    cpu->number = space->numbers++ % 64;
    cpu->next = space->cpus;
    __atomic_store_n(&space->cpus, cpu, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&space->lock);
}

void space_remove(struct cpu_space *space, struct cpu *cpu)
{
    pthread_mutex_lock(&space->lock);
    struct cpu **at = &space->cpus;
    while (*at && *at != cpu)
        at = &(*at)->next;
    if (*at)
        __atomic_store_n(at, cpu->next, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&space->lock);
}

struct cpu *space_cpus(struct cpu_space *space)
{
    return __atomic_load_n(&space->cpus, __ATOMIC_ACQUIRE);
}
