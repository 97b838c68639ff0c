/* Memory as the CPU itself reaches it: descriptor tables, frames of exceptions, and code that we decode. */
#include <string.h>

#include "inside.h"

static bool stage2_refuses(struct cpu *cpu, bool mmio, uint64_t gpa, enum access access, uint8_t kind)
{
    cpu->refused = (struct refused){
        .why = mmio ? REFUSED_MMIO : REFUSED_STAGE2, .gpa = gpa, .write = access == WRITE, .fetch = access == FETCH, .kind = kind};
    return false;
}

/* The host address of `linear`. */
static bool locate(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access, uint8_t **place)
{
    struct leaf_found leaf;
    struct page page;
    if (!walk(cpu, paging, linear, access, &page))
        return false;
    uint64_t gpa = page.gpa + (linear & (PAGE - 1));
    if (!space_lookup(cpu->space, page.gpa >> PAGE_SHIFT, page.kind, &leaf))
        return stage2_refuses(cpu, false, gpa, access, page.kind);
    if (!leaf.hva || (access == WRITE && !leaf.writable))
        return stage2_refuses(cpu, leaf.mmio, gpa, access, page.kind);
    cpu->touching = gpa;
    *place = (uint8_t *)leaf.hva + (linear & (PAGE - 1));
    return true;
}

static void move(uint8_t *place, void *data, uint32_t size, bool write)
{
    if (!write)
        memcpy(data, place, size);
    else if (size == 8)
        *(volatile uint64_t *)place = *(uint64_t *)data; /* whole, as the CPU stores it */
    else
        memcpy(place, data, size);
}

static bool copy(struct cpu *cpu, const struct paging *paging, uint64_t linear, void *data, uint32_t size,
                 enum access access)
{
    while (size) {
        uint32_t part = PAGE - (linear & (PAGE - 1));
        uint8_t *place;
        if (part > size)
            part = size;
        linear &= paging->efer & EFER_LMA ? ~0ULL : 0xffffffff;
        if (!locate(cpu, paging, linear, access, &place))
            return false;
        move(place, data, part, access == WRITE);
        data = (uint8_t *)data + part;
        linear += part;
        size -= part;
    }
    return true;
}

/* A fault of the host on the way is a refusal, too. */
static bool host_refuses(struct cpu *cpu, enum access access)
{
    cpu->guard = NULL;
    cpu->refused = (struct refused){.why = REFUSED_HOST,
                                    .gpa = cpu->touching,
                                    .hva = cpu->host_fault,
                                    .write = access == WRITE,
                                    .kind = CPU_ACCESS_ANY,
                                    .host_signal = cpu->host_signal};
    return false;
}

static bool guarded(struct cpu *cpu, const struct paging *paging, uint64_t linear, void *data, uint32_t size,
                    enum access access)
{
    sigjmp_buf guard;
    if (sigsetjmp(guard, 0))
        return host_refuses(cpu, access);
    cpu->guard = &guard;
    bool done = copy(cpu, paging, linear, data, size, access);
    cpu->guard = NULL;
    return done;
}

bool linear_read(struct cpu *cpu, uint64_t linear, void *data, uint32_t size)
{
    struct paging paging;
    paging_of(cpu, &paging);
    paging_implicit(&paging);
    return guarded(cpu, &paging, linear, data, size, READ);
}

bool linear_write(struct cpu *cpu, uint64_t linear, const void *data, uint32_t size)
{
    struct paging paging;
    paging_of(cpu, &paging);
    paging_implicit(&paging);
    return guarded(cpu, &paging, linear, (void *)data, size, WRITE);
}

bool linear_code(struct cpu *cpu, uint64_t linear, void *data, uint32_t size)
{
    struct paging paging;
    paging_of(cpu, &paging);
    return guarded(cpu, &paging, linear, data, size, FETCH);
}

bool linear_page(struct cpu *cpu, uint64_t linear, uint64_t *gpa, uint8_t *kind)
{
    struct paging paging;
    struct page page;
    sigjmp_buf guard;
    paging_of(cpu, &paging);
    if (sigsetjmp(guard, 0))
        return host_refuses(cpu, READ);
    cpu->guard = &guard;
    bool found = walk(cpu, &paging, linear & PAGE_MASK, READ, &page);
    cpu->guard = NULL;
    *gpa = page.gpa;
    *kind = page.kind;
    return found;
}
