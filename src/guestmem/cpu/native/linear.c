/* Guest memory by linear address, as the CPU itself reads and writes it: what it needs to deliver an exception, and the
 * bytes of an instruction. All return false with cpu->refused. A write that is refused may have stored its first part:
 * whoever repeats it stores the same bytes again. */
#include "internal.h"

#include <string.h>

/* Where the page of `linear` is on the host. */
static uint8_t *host_page(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access_kind kind)
{
    struct guest_page page;
    if (!walk(cpu, paging, linear & PAGE_MASK, kind, &page)) {
        if (cpu->refused.kind == REFUSED_GUEST)
            cpu->refused.address = linear;
        return NULL;
    }
    struct leaf leaf = space_find(cpu->space, page.gpa / PAGE, page.access);
    bool write = kind == WRITE;
    if (!leaf.present || leaf.mmio || (write && !leaf.writable)) {
        cpu->refused = (struct refusal){.kind = leaf.mmio ? REFUSED_MMIO : REFUSED_STAGE2,
                                        .asked = kind,
                                        .write = write,
                                        .fetch = kind == FETCH,
                                        .access = page.access,
                                        .gpa = page.gpa + linear % PAGE};
        return NULL;
    }
    cpu->refused.gpa = page.gpa + linear % PAGE;
    cpu->refused.write = write;
    return (uint8_t *)leaf.hva + linear % PAGE;
}

static bool transfer_guarded(struct cpu *cpu, const struct paging *paging, uint64_t linear, uint8_t *data, unsigned size,
                             enum access_kind kind)
{
    while (size) {
        if (!(paging->efer & EFER_LMA))
            linear = (uint32_t)linear;
        unsigned part = (unsigned)minimum(size, PAGE - linear % PAGE);
        uint8_t *place = host_page(cpu, paging, linear, kind);
        if (!place)
            return false;
        /* A frame is seen by other CPUs and by the host: no word of it in two pieces. */
        if (part == 8 && kind == WRITE)
            __atomic_store((uint64_t *)place, (uint64_t *)data, __ATOMIC_RELEASE);
        else if (kind == WRITE)
            memcpy(place, data, part);
        else
            memcpy(data, place, part);
        if (kind == WRITE)
            code_written(cpu, (uint64_t)place, part);
        data += part, linear += part, size -= part;
    }
    return true;
}

static bool transfer(struct cpu *cpu, const struct paging *paging, uint64_t linear, void *data, unsigned size,
                     enum access_kind kind)
{
    sigjmp_buf fault, *outer = cpu->guard;
    if (sigsetjmp(fault, 0)) {
        cpu->guard = outer;
        cpu->refused.kind = REFUSED_HOST;
        cpu->refused.hva = cpu->fault_hva;
        return false;
    }
    cpu->guard = &fault;
    bool done = transfer_guarded(cpu, paging, linear, data, size, kind);
    cpu->guard = outer;
    return done;
}

/* Implicit supervisor accesses. */
bool read_linear(struct cpu *cpu, uint64_t linear, void *data, unsigned size)
{
    struct paging paging;
    current_paging(cpu, &paging);
    implicit_paging(&paging);
    return transfer(cpu, &paging, linear, data, size, READ);
}

bool write_linear(struct cpu *cpu, uint64_t linear, const void *data, unsigned size)
{
    struct paging paging;
    current_paging(cpu, &paging);
    implicit_paging(&paging);
    return transfer(cpu, &paging, linear, (uint8_t *)data, size, WRITE);
}

/* Code, with the rights of the code that executes. */
bool read_code(struct cpu *cpu, uint64_t linear, void *data, unsigned size)
{
    struct paging paging;
    current_paging(cpu, &paging);
    return transfer(cpu, &paging, linear, data, size, FETCH);
}

/* What the guest's tables have for `linear`, with the rights of the code that executes. */
bool walk_as_guest(struct cpu *cpu, uint64_t linear, enum access_kind kind, struct guest_page *page)
{
    struct paging paging;
    sigjmp_buf fault;
    current_paging(cpu, &paging);
    if (sigsetjmp(fault, 0)) {
        cpu->guard = NULL;
        cpu->refused.kind = REFUSED_HOST;
        cpu->refused.hva = cpu->fault_hva;
        return false;
    }
    cpu->guard = &fault;
    bool done = walk(cpu, &paging, linear, kind, page);
    cpu->guard = NULL;
    return done;
}
