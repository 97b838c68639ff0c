/* The TLB of one CPU: what Unicorn asks when its own misses.
 *
 * Unicorn's physical address space is this process's virtual one: all of it is one region at its own address, and the answer
 * to a fill is the host address of the page. So whatever memory the leaves name is there without a change to Unicorn's memory
 * map. Above all host addresses lies an area for MMIO, in which a page stands at its guest-physical address.
 *
 * Only what is fetched is made executable: Unicorn takes each store to an executable page the slow way, and code.c must see
 * each fetch. */
#include <string.h>

#include "inside.h"

enum { ENTRIES_MIN = 1 << 8, ENTRIES_MAX = 1 << 13 }; /* of Unicorn's TLB */

/* At CPL 3 the CPU reads the GDT, the LDT and the TSS as a supervisor, to load a segment or call a gate. Unicorn does not
 * tell such an access from one of the program, so a program that reads the page of its own GDT is not stopped. */
static bool holds_descriptors(const struct cpu *cpu, uint64_t linear)
{
    const struct env *env = cpu->at.env;
    const struct segment_cache *tables[] = {&env->gdt, &env->ldt, &env->tr};
    for (int i = 0; i < 3; i++) {
        const struct segment_cache *table = tables[i];
        if (i && !table->selector)
            continue;
        if (linear + (PAGE - 1) >= table->base && linear <= table->base + table->limit)
            return true;
    }
    return false;
}

static bool refuse(struct cpu *cpu, enum refusal why, const struct page *page, enum access access)
{
    cpu->refused = (struct refused){.why = why,
                                    .gpa = page->gpa,
                                    .write = access == WRITE,
                                    .fetch = access == FETCH,
                                    .kind = page->kind,
                                    .whole_page = true};
    return false;
}

/* An access to what is no memory: for the instruction that uses it the page stands in the MMIO area. */
static bool fill_mmio(struct cpu *cpu, const struct page *page, enum access access, uc_tlb_entry *entry)
{
    if (!cpu->mmio.active || access == FETCH || page->gpa >= MMIO_BASE)
        return refuse(cpu, REFUSED_MMIO, page, access);
    entry->paddr = MMIO_BASE + page->gpa;
    entry->perms = access == WRITE ? UC_PROT_WRITE : UC_PROT_READ;
    return true;
}

static void remember_fetch(struct cpu *cpu, uint64_t linear, uint64_t hva)
{
    unsigned at = linear >> PAGE_SHIFT & 63;
    cpu->fetched[at].linear = linear;
    cpu->fetched[at].hva = hva;
}

/* A step that looks for the page which the host has refused. */
static bool is_looked_for(const struct cpu *cpu, uint64_t hva)
{
    return cpu->find_gpa && !((hva ^ cpu->host_fault) & PAGE_MASK);
}

static bool is_refused_by_host(struct cpu *cpu, const struct page *page, uint64_t hva, enum access access)
{
    if (!is_looked_for(cpu, hva) || (access == WRITE) != cpu->host_write)
        return false;
    refuse(cpu, REFUSED_HOST, page, access);
    cpu->refused.hva = cpu->host_fault;
    cpu->refused.gpa += cpu->host_fault & (PAGE - 1);
    cpu->refused.host_signal = cpu->host_signal;
    cpu->refused.whole_page = false;
    return true;
}

static bool answer(struct cpu *cpu, uint64_t linear, enum access access, const struct page *page,
                   const struct leaf_found *leaf, uc_tlb_entry *entry)
{
    bool writable = page->writable && leaf->writable && (access == WRITE || !is_looked_for(cpu, leaf->hva));
    cpu->touching = page->gpa;
    if (is_refused_by_host(cpu, page, leaf->hva, access))
        return false;
    if (access == FETCH && !code_fetched(cpu, linear, leaf->hva))
        return false;
    if (access == FETCH)
        writable = false;
    else if (writable && !code_may_write(cpu, linear, leaf->hva, access == WRITE)) {
        if (access == WRITE)
            return false;
        writable = false;
    }
    entry->paddr = leaf->hva;
    entry->perms = (page->readable ? UC_PROT_READ : 0) | (writable ? UC_PROT_WRITE : 0);
    if (access == FETCH) {
        entry->perms |= UC_PROT_EXEC;
        remember_fetch(cpu, linear, leaf->hva);
    }
    return true;
}

static bool translate(struct cpu *cpu, uint64_t linear, enum access access, uc_tlb_entry *entry)
{
    struct paging paging;
    struct page page;
    struct leaf_found leaf;
    paging_of(cpu, &paging);
    if (paging.cpl == 3 && access != FETCH && holds_descriptors(cpu, linear))
        paging_implicit(&paging);
    if (!walk(cpu, &paging, linear, access, &page))
        return false;
    if (!space_lookup(cpu->space, page.gpa >> PAGE_SHIFT, page.kind, &leaf))
        return refuse(cpu, REFUSED_STAGE2, &page, access);
    if (leaf.mmio && (access == WRITE || !leaf.hva))
        return fill_mmio(cpu, &page, access, entry);
    if (access == WRITE && !leaf.writable)
        return refuse(cpu, REFUSED_STAGE2, &page, access);
    return answer(cpu, linear, access, &page, &leaf, entry);
}

static enum access access_of(uc_mem_type type)
{
    return type == UC_MEM_WRITE ? WRITE : type == UC_MEM_FETCH ? FETCH : READ;
}

static bool fill(uc_engine *uc, uint64_t linear, uc_mem_type type, uc_tlb_entry *entry, void *data)
{
    struct cpu *cpu = data;
    sigjmp_buf guard;
    (void)uc;
    if (cpu->sealed)
        return false;
    cpu->fills++;
    cpu->block->fills++;
    cpu->refused_access = access_of(type);
    if (sigsetjmp(guard, 0)) { /* a table, or code, that cannot be read */
        cpu->guard = NULL;
        cpu->refused = (struct refused){.why = REFUSED_HOST,
                                        .gpa = cpu->touching,
                                        .hva = cpu->host_fault,
                                        .kind = CPU_ACCESS_ANY,
                                        .host_signal = cpu->host_signal};
        return false;
    }
    cpu->guard = &guard;
    bool done = translate(cpu, linear & PAGE_MASK, cpu->refused_access, entry);
    cpu->guard = NULL;
    return done;
}

bool tlb_hook(struct cpu *cpu)
{
    uc_hook hook;
    cpu->entries = ENTRIES_MIN;
    return uc_hook_add(cpu->uc, &hook, UC_HOOK_TLB_FILL, (void *)fill, cpu, 1, 0) == UC_ERR_OK;
}

/* ---- flushes */

void tlb_flush(struct cpu *cpu)
{
    uc_ctl_flush_tlb(cpu->uc);
    cpu->fills = 0;
    memset(cpu->fetched, 0xff, sizeof(cpu->fetched));
    code_tlb_flushed(cpu);
}

void tlb_flush_code(struct cpu *cpu)
{
    uc_ctl_flush_tlb(cpu->uc);
    uc_ctl_flush_tb(cpu->uc);
    cpu->fills = 0;
    memset(cpu->fetched, 0xff, sizeof(cpu->fetched));
    cpu->block->code_flushes++;
    code_forget(cpu);
}

/* Unicorn's TLB doubles when it is flushed while it is full, and only then; without, it stays at 256 pages. */
static void grow(struct cpu *cpu)
{
    if (cpu->fills <= cpu->entries || cpu->entries >= ENTRIES_MAX)
        return;
    cpu->entries *= 2;
    tlb_flush(cpu);
}

/* What is acknowledged was seen before the flush, so nothing that came after is. */
void tlb_look(struct cpu *cpu)
{
    uint64_t generation = space_generation(cpu->space);
    bool stale = __atomic_exchange_n(&cpu->code_stale, 0, __ATOMIC_SEQ_CST);
    bool wanted = __atomic_load_n(&cpu->flush_wanted, __ATOMIC_SEQ_CST);
    if (stale)
        tlb_flush_code(cpu);
    else if (wanted || generation != cpu->seen_generation)
        tlb_flush(cpu);
    else
        grow(cpu);
    if (wanted)
        __atomic_store_n(&cpu->flush_wanted, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&cpu->seen_generation, generation, __ATOMIC_SEQ_CST);
}
