/* What Unicorn asks when its TLB misses.
 *
 * Unicorn's physical address space is the virtual one of this process: all of it is one region, mapped at its own address,
 * and the answer to a fill is the host address of the page. Above all host addresses lies an area for MMIO, in which a
 * page stands at its guest-physical address.
 *
 * Only what is fetched is made executable: Unicorn takes each store to an executable page the slow way, a fifth of the
 * speed, and code.c must see each fetch. */
#include "internal.h"

enum { ENTRIES_MIN = 1 << 8, ENTRIES_MAX = 1 << 13 }; /* of Unicorn's TLB */

void tlb_flush(struct cpu *cpu)
{
    uc_ctl_flush_tlb(cpu->uc);
    cpu->fill_count = 0;
    cpu->live_count = 0;
}

/* Unicorn's TLB doubles when it is flushed while it is full, and only then; without, it stays at 256 pages. */
void tlb_slice_over(struct cpu *cpu)
{
    if (!cpu->tlb_entries)
        cpu->tlb_entries = ENTRIES_MIN;
    if (cpu->fill_count > cpu->tlb_entries && cpu->tlb_entries < ENTRIES_MAX) {
        cpu->tlb_entries *= 2;
        uc_ctl_flush_tlb(cpu->uc);
        cpu->fill_count = 0;
    }
}

static bool overlaps(const struct segment_cache *table, uint64_t page)
{
    return page - (table->base - (PAGE - 1)) <= (uint64_t)table->limit + (PAGE - 1);
}

/* Whether the page overlaps the GDT, or the LDT or TSS if one is loaded. At CPL 3 the CPU reads them as supervisor, to
 * load a segment or call a gate. Unicorn does not tell such an access from one of the program, so a program that reads the
 * page of its own GDT is not stopped. */
static bool holds_descriptors(const struct uc_env *env, uint64_t page)
{
    return overlaps(&env->gdt, page) || (env->ldt.selector && overlaps(&env->ldt, page)) ||
           (env->tr.selector && overlaps(&env->tr, page));
}

static bool refuse(struct cpu *cpu, enum refusal_kind kind, const struct guest_page *page, enum access_kind asked)
{
    cpu->refused = (struct refusal){.kind = kind,
                                    .asked = asked,
                                    .write = asked == WRITE,
                                    .fetch = asked == FETCH,
                                    .whole_page = true,
                                    .access = page->access,
                                    .gpa = page->gpa};
    return false;
}

/* The page that has just faulted: see fault.c. */
static bool refuse_host(struct cpu *cpu, const struct guest_page *page, enum access_kind asked)
{
    refuse(cpu, REFUSED_HOST, page, asked);
    cpu->refused.hva = cpu->probe_hva + cpu->probe_offset;
    cpu->refused.gpa += cpu->probe_offset;
    cpu->refused.whole_page = false;
    return false;
}

static bool translate(struct cpu *cpu, uint64_t linear, enum access_kind kind, uc_tlb_entry *entry)
{
    struct paging paging;
    struct guest_page page;
    current_paging(cpu, &paging);
    if (paging.cpl == 3 && kind != FETCH && holds_descriptors(cpu->env, linear))
        implicit_paging(&paging);
    if (!walk(cpu, &paging, linear, kind, &page))
        return false;
    struct leaf leaf = space_find(cpu->space, page.gpa / PAGE, page.access);
    if ((!leaf.present || leaf.mmio || (kind == WRITE && !leaf.writable)) && mmio_covers(cpu, page.gpa) && kind != FETCH) {
        *entry = (uc_tlb_entry){MMIO_BASE + page.gpa, kind == WRITE ? UC_PROT_WRITE : UC_PROT_READ};
        return true;
    }
    if (!leaf.present || leaf.mmio || (kind == WRITE && !leaf.writable))
        return refuse(cpu, leaf.mmio ? REFUSED_MMIO : REFUSED_STAGE2, &page, kind);
    if (leaf.hva == cpu->probe_hva)
        return refuse_host(cpu, &page, kind);
    cpu->refused.gpa = page.gpa;
    cpu->refused.write = kind == WRITE;
    bool writable = page.writable && leaf.writable;
    bool executes = kind == FETCH;
    if (writable)
        executes |= code_write_granted(cpu, linear, leaf.hva, page.executable);
    if (kind == FETCH)
        code_fetched(cpu, linear, leaf.hva);
    *entry = (uc_tlb_entry){leaf.hva, (page.readable ? UC_PROT_READ : 0) | (writable ? UC_PROT_WRITE : 0) |
                                          (executes ? UC_PROT_EXEC : 0)};
    return true;
}

bool on_fill(uc_engine *uc, uint64_t linear, uc_mem_type kind, uc_tlb_entry *entry, void *data)
{
    struct cpu *cpu = data;
    sigjmp_buf fault;
    (void)uc;
    if (cpu->sealed)
        return false;
    cpu->fill_count++;
    cpu->block->fills++;
    if (sigsetjmp(fault, 0)) {
        cpu->guard = NULL;
        cpu->refused.kind = REFUSED_HOST;
        cpu->refused.asked = (enum access_kind)kind;
        cpu->refused.hva = cpu->fault_hva;
        return false;
    }
    cpu->guard = &fault;
    bool done = translate(cpu, linear, (enum access_kind)kind, entry);
    cpu->guard = NULL;
    return done;
}
