/* Stage 2: the leaves of one VM, a radix tree of guest frames for each of the two kinds of access.
 *
 * Lookups take no lock: an entry is one word, a table never goes before its space. A run of frames that fills an entry of
 * an upper level is one entry there, whatever the alignment of its host address, and is split when a part of it changes. */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

enum { BITS = 9, ENTRIES = 1 << BITS, LEVELS = 5 };
enum { LEAF = 1, WRITABLE = 2, MMIO_LEAF = 4, ENTRY_BITS = 7 };

struct table {
    _Atomic uint64_t entries[ENTRIES];
};

struct cpu_space {
    pthread_mutex_t lock;      /* of writers of the tables; nobody waits for a CPU under it */
    struct table *root[2];     /* by enum cpu_access */
    pthread_rwlock_t cpus_lock; /* of `cpus`; a drop that waits holds it for reading */
    struct cpu *cpus;
    struct code_index *code;
    _Atomic uint64_t generation; /* grows with each drop */
    _Atomic(struct cpu *) exclusive; /* see exclusive.c */
};

struct cpu_space *cpu_space_create(void)
{
    struct cpu_space *space = calloc(1, sizeof *space);
    if (!space)
        return NULL;
    pthread_mutex_init(&space->lock, NULL);
    pthread_rwlock_init(&space->cpus_lock, NULL);
    space->root[0] = calloc(1, sizeof(struct table));
    space->root[1] = calloc(1, sizeof(struct table));
    space->code = code_index_create();
    space->generation = 1;
    if (space->root[0] && space->root[1] && space->code)
        return space;
    cpu_space_destroy(space);
    errno = ENOMEM;
    return NULL;
}

static void free_table(struct table *table, int level)
{
    if (!table)
        return;
    for (int i = 0; level && i < ENTRIES; i++)
        if (table->entries[i] && !(table->entries[i] & LEAF))
            free_table((struct table *)table->entries[i], level - 1);
    free(table);
}

void cpu_space_destroy(struct cpu_space *space)
{
    free_table(space->root[0], LEVELS - 1);
    free_table(space->root[1], LEVELS - 1);
    if (space->code)
        code_index_destroy(space->code);
    pthread_mutex_destroy(&space->lock);
    pthread_rwlock_destroy(&space->cpus_lock);
    free(space);
}

static struct leaf find_in(struct table *table, uint64_t gfn)
{
    for (int level = LEVELS - 1;; level--) {
        uint64_t entry = atomic_load_explicit(&table->entries[gfn >> level * BITS & (ENTRIES - 1)], memory_order_acquire);
        if (!entry)
            return (struct leaf){0};
        if (entry & LEAF) {
            uint64_t within = gfn & ((1ull << level * BITS) - 1);
            uint64_t hva = (entry & ~(uint64_t)ENTRY_BITS) + within * PAGE;
            return (struct leaf){hva, true, entry & WRITABLE, entry & MMIO_LEAF};
        }
        table = (struct table *)entry;
    }
}

struct leaf space_find(struct cpu_space *space, uint64_t gfn, unsigned access)
{
    if (gfn >> BITS * LEVELS)
        return (struct leaf){0};
    struct leaf leaf = find_in(space->root[access == CPU_ACCESS_PRIVATE], gfn);
    if (!leaf.present && access == CPU_ACCESS_ANY)
        leaf = find_in(space->root[CPU_ACCESS_PRIVATE], gfn);
    return leaf;
}

/* The table under an entry, which is made if there is none. What the entry was as a leaf, all entries of it are. */
static struct table *table_under(_Atomic uint64_t *entry, int level)
{
    uint64_t old = *entry;
    if (old && !(old & LEAF))
        return (struct table *)old;
    struct table *table = calloc(1, sizeof *table);
    if (!table)
        return NULL;
    uint64_t step = old & MMIO_LEAF ? 0 : (uint64_t)PAGE << (level - 1) * BITS;
    for (int i = 0; old && i < ENTRIES; i++)
        table->entries[i] = old + i * step;
    atomic_store_explicit(entry, (uint64_t)table, memory_order_release);
    return table;
}

/* Frames [gfn, end) become `leaf`, which is of `gfn`, or none if it is 0. */
static int set_range(struct table *table, int level, uint64_t gfn, uint64_t end, uint64_t leaf)
{
    while (gfn < end) {
        uint64_t span = 1ull << level * BITS, next = minimum((gfn & ~(span - 1)) + span, end);
        _Atomic uint64_t *entry = &table->entries[gfn >> level * BITS & (ENTRIES - 1)];
        bool whole = next - gfn == span, is_table = *entry && !(*entry & LEAF);
        if (level == 0 || (whole && !is_table)) {
            atomic_store_explicit(entry, leaf, memory_order_release);
        } else if (leaf || *entry) {
            struct table *under = table_under(entry, level);
            if (under ? set_range(under, level - 1, gfn, next, leaf) : leaf != 0)
                return ENOMEM;
            if (!under)
                atomic_store(entry, 0); /* a drop cannot fail, and may drop more than it must */
        }
        if (leaf && !(leaf & MMIO_LEAF))
            leaf += (next - gfn) * PAGE;
        gfn = next;
    }
    return 0;
}

static int set_kinds(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, uint64_t leaf)
{
    uint64_t end = minimum(gfn + count, 1ull << BITS * LEVELS);
    int error = 0;
    pthread_mutex_lock(&space->lock);
    for (int kind = 0; kind < 2; kind++)
        if (kinds & 1u << kind)
            error |= set_range(space->root[kind], LEVELS - 1, gfn, end, leaf);
    pthread_mutex_unlock(&space->lock);
    if (error)
        errno = error;
    return error ? -1 : 0;
}

int cpu_space_map(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, uint64_t hva, bool writable)
{
    return set_kinds(space, gfn, count, kinds, hva | LEAF | (writable ? WRITABLE : 0));
}

int cpu_space_map_mmio(struct cpu_space *space, uint64_t gfn, uint64_t count)
{
    return set_kinds(space, gfn, count, 3, LEAF | MMIO_LEAF);
}

/* Until the CPU has forgotten what was dropped before `generation`, or has left the guest, where it looks when it comes
 * back. It is told again and again: Unicorn changes its request word without a lock now and then. */
static void wait_for(struct cpu *cpu, uint64_t generation)
{
    for (unsigned turn = 0; atomic_load(&cpu->in_guest); turn++) {
        if (__atomic_load_n(&cpu->seen_generation, __ATOMIC_SEQ_CST) >= generation)
            return;
        if (turn % 64 == 0)
            kick(cpu, KICK_WORK);
        sched_yield();
    }
}

void cpu_space_drop(struct cpu_space *space, uint64_t gfn, uint64_t count, unsigned kinds, bool wait)
{
    set_kinds(space, gfn, count, kinds, 0);
    uint64_t generation = atomic_fetch_add(&space->generation, 1) + 1;
    pthread_rwlock_rdlock(&space->cpus_lock);
    for (struct cpu *cpu = space->cpus; cpu; cpu = cpu->next_in_space)
        if (cpu != current_cpu)
            kick(cpu, KICK_WORK);
    for (struct cpu *cpu = space->cpus; wait && cpu; cpu = cpu->next_in_space)
        if (cpu != current_cpu)
            wait_for(cpu, generation);
    pthread_rwlock_unlock(&space->cpus_lock);
}

void space_add(struct cpu_space *space, struct cpu *cpu)
{
    pthread_rwlock_wrlock(&space->cpus_lock);
    uint64_t used = 0;
    for (struct cpu *other = space->cpus; other; other = other->next_in_space)
        used |= 1ull << other->index;
    /* More than 64 CPUs share bits, which costs needless work and is right all the same. */
    cpu->index = ~used ? (unsigned)__builtin_ctzll(~used) : (unsigned)((uintptr_t)cpu >> 12 & 63);
    cpu->next_in_space = space->cpus;
    space->cpus = cpu;
    pthread_rwlock_unlock(&space->cpus_lock);
}

void space_remove(struct cpu_space *space, struct cpu *cpu)
{
    pthread_rwlock_wrlock(&space->cpus_lock);
    for (struct cpu **at = &space->cpus; *at; at = &(*at)->next_in_space)
        if (*at == cpu) {
            *at = cpu->next_in_space;
            break;
        }
    pthread_rwlock_unlock(&space->cpus_lock);
}

void space_each(struct cpu_space *space, uint64_t mask, void (*act)(struct cpu *, void *), void *data)
{
    pthread_rwlock_rdlock(&space->cpus_lock);
    for (struct cpu *cpu = space->cpus; cpu; cpu = cpu->next_in_space)
        if (mask >> cpu->index & 1)
            act(cpu, data);
    pthread_rwlock_unlock(&space->cpus_lock);
}

uint64_t space_generation(struct cpu_space *space)
{
    return atomic_load(&space->generation);
}

struct code_index *space_code(struct cpu_space *space)
{
    return space->code;
}

_Atomic(struct cpu *) *space_exclusive(struct cpu_space *space)
{
    return &space->exclusive;
}
