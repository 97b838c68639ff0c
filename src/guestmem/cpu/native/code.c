/* Translated code stays true to guest memory, whoever writes it.
 *
 * Unicorn sees a store to code only through the linear address that the code was fetched by. The rest is kept true here,
 * as caches keep lines: a host page is either written through other addresses, or executed.
 *
 *   Fetched: translations of the page to be written through another address go from every TLB, this CPU's at once, the
 *   others' by a message. Then its content is compared with what was translated.
 *   Granted for write: whoever has translated the page drops that, unless it is this CPU by this address.
 *
 * What each CPU may write is remembered in a table that includes its TLB: a page that is pushed out of the table goes from
 * the TLB too. The host's own writes and DMA are not seen; so a page is compared each time it is fetched after a flush of
 * the TLB, and at the start of each run for as long as the guest has fetched from at most LIVE_PAGES pages. Hardware has a
 * limit of the same kind (Intel SDM vol. 3, 9.1.3 "Handling self- and cross-modifying code"). */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

extern void tlb_flush_page_x86_64(void *cpu_state, uint64_t linear);
extern void tb_invalidate_phys_range_x86_64(void *uc, uint64_t first, uint64_t end);
extern uint64_t qemu_ram_addr_from_host_x86_64(void *uc, void *host);

enum { GRANT_BITS = 14 };
#define MANY (~0ull)

struct grant {
    _Atomic uint64_t hva; /* 0: none. Read by other CPUs */
    uint64_t linear;
};

struct translated {
    uint64_t hva; /* 0: free */
    uint64_t linear; /* that it was fetched by, or MANY */
    uint64_t content; /* its hash */
};

struct code_map {
    struct grant grants[1 << GRANT_BITS];
    struct translated *pages;
    unsigned bits, used;
};

struct code_map *code_map_create(void)
{
    struct code_map *map = calloc(1, sizeof *map);
    if (!map)
        return NULL;
    map->bits = 10;
    map->pages = calloc(1u << map->bits, sizeof *map->pages);
    if (map->pages)
        return map;
    free(map);
    return NULL;
}

void code_map_destroy(struct code_map *map)
{
    free(map->pages);
    free(map);
}

static uint64_t scatter(uint64_t hva, unsigned bits)
{
    return (hva / PAGE * 0x9e3779b97f4a7c15ull) >> (64 - bits);
}

static struct grant *grant_of(struct cpu *cpu, uint64_t hva)
{
    return &cpu->code->grants[scatter(hva, GRANT_BITS)];
}

static struct translated *place_of(struct code_map *map, uint64_t hva)
{
    unsigned i = (unsigned)scatter(hva, map->bits);
    while (map->pages[i].hva && map->pages[i].hva != hva)
        i = (i + 1) & ((1u << map->bits) - 1);
    return &map->pages[i];
}

/* The entry of a page, made if there is none. With no memory for a larger table, all code is dropped and forgotten. */
static struct translated *remember(struct cpu *cpu, uint64_t hva)
{
    struct code_map *map = cpu->code;
    struct translated *page = place_of(map, hva), *old = map->pages;
    if (page->hva)
        return page;
    unsigned count = 1u << map->bits;
    if (++map->used > count / 2) {
        struct translated *pages = calloc((size_t)count * 2, sizeof *pages);
        if (pages) {
            map->pages = pages;
            map->bits++;
            for (unsigned i = 0; i < count; i++)
                if (old[i].hva)
                    *place_of(map, old[i].hva) = old[i];
            free(old);
        } else {
            code_drop_all(cpu);
            map->used = 1;
        }
        page = place_of(map, hva);
    }
    page->hva = hva;
    return page;
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Of a page; 0.1 us. A guest that finds two contents with one hash fools itself alone. */
static uint64_t hash_page(uint64_t hva)
{
    const uint64_t *words = (const uint64_t *)hva;
    uint64_t a = 0x9e3779b97f4a7c15ull, b = 0xbf58476d1ce4e5b9ull, c = 0x94d049bb133111ebull, d = 0xd6e8feb86659fd93ull;
    for (unsigned i = 0; i < PAGE / 8; i += 8) {
        a = fold(words[i] ^ a, words[i + 1] ^ 0x2d358dccaa6c78a5ull);
        b = fold(words[i + 2] ^ b, words[i + 3] ^ 0x8bb84b93962eacc9ull);
        c = fold(words[i + 4] ^ c, words[i + 5] ^ 0x4b33a62ed433d4a3ull);
        d = fold(words[i + 6] ^ d, words[i + 7] ^ 0x4d5a2da51de1aa47ull);
    }
    return fold(a ^ b, c ^ d) | 1;
}

static void invalidate(struct cpu *cpu, uint64_t hva, unsigned size)
{
    uint64_t first = qemu_ram_addr_from_host_x86_64(cpu->uc, (void *)hva);
    tb_invalidate_phys_range_x86_64(cpu->uc, first, first + size);
}

/* Everything that was translated from the page. */
void code_drop_page(struct cpu *cpu, uint64_t hva)
{
    struct translated *page = place_of(cpu->code, hva);
    if (!page->hva)
        return;
    invalidate(cpu, hva, PAGE);
    if (page->linear == MANY)
        tlb_flush(cpu);
    else
        tlb_flush_page_x86_64(cpu->cpu_state, page->linear);
    page->content = page->linear = 0;
    cpu->block->code_flushes++;
}

/* What lets this CPU write the page. Whoever executes it looks once more what it has translated: the last store may have
 * come after that. */
void code_drop_grant(struct cpu *cpu, uint64_t hva)
{
    struct grant *grant = grant_of(cpu, hva);
    if (atomic_load(&grant->hva) == hva) {
        tlb_flush_page_x86_64(cpu->cpu_state, grant->linear);
        atomic_store(&grant->hva, 0);
    }
    uint64_t others = code_executors(space_code(cpu->space), hva) & ~(1ull << cpu->index);
    if (others)
        code_ask(cpu, others, hva, RECHECK, false);
}

/* The page is fetched from again only after it was compared. */
void code_recheck(struct cpu *cpu, uint64_t hva)
{
    struct translated *page = place_of(cpu->code, hva);
    if (page->hva)
        invalidate(cpu, hva, PAGE), page->content = 0;
}

/* Every translation of code and of addresses. Not inside of a pass. */
void code_drop_all(struct cpu *cpu)
{
    if (!cpu->in_pass)
        uc_ctl_flush_tb(cpu->uc);
    else
        for (unsigned i = 0; i < 1u << cpu->code->bits; i++)
            if (cpu->code->pages[i].hva)
                invalidate(cpu, cpu->code->pages[i].hva, PAGE);
    tlb_flush(cpu);
    memset(cpu->code->pages, 0, sizeof *cpu->code->pages << cpu->code->bits);
    cpu->code->used = 0;
    for (unsigned i = 0; i < 1u << GRANT_BITS; i++)
        atomic_store_explicit(&cpu->code->grants[i].hva, 0, memory_order_relaxed);
    cpu->block->code_flushes++;
}

struct find_writers {
    uint64_t hva, found;
};

static void find_writer(struct cpu *cpu, void *data)
{
    struct find_writers *find = data;
    if (atomic_load(&grant_of(cpu, find->hva)->hva) == find->hva)
        find->found |= 1ull << cpu->index;
}

/* The guest is about to execute from the page, at `linear`. */
void code_fetched(struct cpu *cpu, uint64_t linear, uint64_t hva)
{
    uint64_t bit = 1ull << cpu->index;
    struct find_writers find = {hva, 0};
    /* Who writes looks for executors after it has noted its grant; one of the two sees the other. */
    code_add_executor(space_code(cpu->space), hva, bit);
    space_each(cpu->space, ~bit, find_writer, &find);
    if (find.found)
        code_ask(cpu, find.found, hva, DROP_GRANT, true);
    struct grant *grant = grant_of(cpu, hva);
    if (atomic_load(&grant->hva) == hva && grant->linear != linear) {
        tlb_flush_page_x86_64(cpu->cpu_state, grant->linear);
        atomic_store(&grant->hva, 0);
    }
    uint64_t content = hash_page(hva);
    struct translated *page = remember(cpu, hva);
    if (page->content && page->content != content) {
        invalidate(cpu, hva, PAGE);
        cpu->block->code_flushes++;
    }
    page->content = content;
    page->linear = page->linear && page->linear != linear ? MANY : linear;
    for (unsigned i = 0; i < cpu->live_count && i < LIVE_PAGES; i++)
        if (cpu->live[i] == hva)
            return;
    if (cpu->live_count < LIVE_PAGES)
        cpu->live[cpu->live_count] = hva;
    if (cpu->live_count <= LIVE_PAGES)
        cpu->live_count++;
}

/* The guest may write the page from now on, at `linear`. Whether that must be a translation to execute as well, so that
 * Unicorn looks at each store. */
bool code_write_granted(struct cpu *cpu, uint64_t linear, uint64_t hva, bool executable)
{
    uint64_t bit = 1ull << cpu->index;
    struct grant *grant = grant_of(cpu, hva);
    uint64_t before = atomic_load_explicit(&grant->hva, memory_order_relaxed);
    if (before && (before != hva || grant->linear != linear))
        tlb_flush_page_x86_64(cpu->cpu_state, grant->linear);
    grant->linear = linear;
    atomic_store(&grant->hva, hva);
    struct code_index *index = space_code(cpu->space);
    uint64_t executors = code_executors(index, hva);
    if (!executors)
        return false;
    struct translated *page = place_of(cpu->code, hva);
    bool same = executors & bit && executable && page->hva && page->linear == linear;
    executors = code_keep_executors(index, hva, same ? bit : 0);
    if (executors & bit && !same)
        code_drop_page(cpu, hva);
    if (executors & ~bit)
        code_ask(cpu, executors & ~bit, hva, DROP_CODE, true);
    return same;
}

/* The library itself has written: a frame, of which Unicorn knows nothing. */
void code_written(struct cpu *cpu, uint64_t hva, unsigned size)
{
    uint64_t page = hva & PAGE_MASK, bit = 1ull << cpu->index;
    uint64_t executors = code_executors(space_code(cpu->space), page);
    if (executors & bit)
        invalidate(cpu, hva, size);
    if (executors & ~bit)
        code_ask(cpu, executors & ~bit, page, DROP_CODE, false);
}

/* Before a run: has anybody written what may be executed without another fetch? */
void code_check_live(struct cpu *cpu)
{
    for (unsigned i = 0; cpu->live_count <= LIVE_PAGES && i < cpu->live_count; i++) {
        uint64_t hva = cpu->live[i];
        struct translated *page = place_of(cpu->code, hva);
        if (page->hva && page->content != hash_page(hva)) {
            code_drop_page(cpu, hva);
            tlb_flush(cpu);
        }
    }
}

/* What the guest itself has written by the address that it executes at, Unicorn has seen. */
void code_run_ended(struct cpu *cpu)
{
    for (unsigned i = 0; cpu->live_count <= LIVE_PAGES && i < cpu->live_count; i++) {
        uint64_t hva = cpu->live[i];
        struct translated *page = place_of(cpu->code, hva);
        struct grant *grant = grant_of(cpu, hva);
        if (page->content && atomic_load_explicit(&grant->hva, memory_order_relaxed) == hva && grant->linear == page->linear)
            page->content = hash_page(hva);
    }
}
