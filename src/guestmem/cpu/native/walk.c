/* The guest's own page tables: linear address to guest-physical address, as the CPU walks them.
 *
 * Each touch of a page-table page goes through stage 2: a table that stage 2 does not hold is no fault of the guest. The
 * accessed bit of an entry is set when the walk goes through it, that of the leaf and its dirty bit when the access is
 * allowed, by compare-and-exchange, as other CPUs and the host's threads may write the entry. A read through a clean leaf
 * is answered as not writable, so that the first write walks again and sets the dirty bit.
 *
 * Source: Intel SDM vol. 3, chapter 5 "Paging"; AMD APM vol. 2, 15.34.5 for the C-bit; Intel TDX module base
 * specification, "GPA space". Not modelled: protection keys, and the cache of PDPTEs that PAE paging loads with CR3 (they
 * are read at each walk). */
#include "internal.h"

enum { PTE_P = 1 << 0, PTE_W = 1 << 1, PTE_U = 1 << 2, PTE_A = 1 << 5, PTE_D = 1 << 6, PTE_PS = 1 << 7 };
#define PTE_NX (1ull << 63)
#define PTE_ADDRESS 0x000ffffffffff000ull
enum { PF_PRESENT = 1, PF_WRITE = 2, PF_USER = 4, PF_RESERVED = 8, PF_FETCH = 16 };

/* One walk. */
struct walk {
    struct cpu *cpu;
    const struct paging *paging;
    uint64_t linear, mask, no_table, address_mask, reserved;
    enum access_kind kind;
    uint8_t tables; /* enum cpu_access of page-table pages, and of accesses through entries that have no page bit */
    bool set_is_private;
    struct guest_page *page;
};

void current_paging(const struct cpu *cpu, struct paging *paging)
{
    const struct uc_env *env = cpu->env;
    *paging = (struct paging){env->cr[0], env->cr[3], env->cr[4], env->efer, env->hflags & HF_CPL,
                              env->eflags & RFLAGS_AC};
}

/* Descriptor tables and the frame of an exception are read and written as supervisor, whoever executes. */
void implicit_paging(struct paging *paging)
{
    paging->cpl = 0;
    paging->ac = false;
}

static bool refuse_stage2(const struct walk *w, uint64_t gpa, bool write, bool mmio)
{
    w->cpu->refused = (struct refusal){
        .kind = mmio ? REFUSED_MMIO : REFUSED_STAGE2, .asked = w->kind, .write = write, .access = w->tables, .gpa = gpa};
    return false;
}

static bool fault(const struct walk *w, int vector, uint32_t error_code)
{
    w->cpu->refused = (struct refusal){
        .kind = REFUSED_GUEST, .asked = w->kind, .vector = vector, .error_code = error_code, .address = w->linear};
    return false;
}

static bool page_fault(const struct walk *w, uint32_t code)
{
    const struct paging *p = w->paging;
    if (w->kind == WRITE)
        code |= PF_WRITE;
    else if (w->kind == FETCH && ((p->efer & EFER_NXE && p->cr4 & CR4_PAE) || p->cr4 & CR4_SMEP))
        code |= PF_FETCH;
    return fault(w, PF, code | (p->cpl == 3 ? PF_USER : 0));
}

/* Where the entry at `gpa` is on the host; NULL if stage 2 refuses. */
static void *entry_at(const struct walk *w, uint64_t gpa, bool write)
{
    struct leaf leaf = space_find(w->cpu->space, gpa / PAGE, w->tables);
    if (!leaf.present || leaf.mmio || (write && !leaf.writable)) {
        refuse_stage2(w, gpa, write, leaf.mmio);
        return NULL;
    }
    /* If the host refuses to have it touched, the fault handler finds here what was touched. */
    w->cpu->refused.gpa = gpa;
    w->cpu->refused.write = write;
    return (void *)(leaf.hva + gpa % PAGE);
}

/* Sets `bits` of an entry of `size` bytes that is `entry`; *changed if it is no longer that. */
static bool mark_entry(const struct walk *w, uint64_t gpa, unsigned size, uint64_t entry, uint64_t bits, bool *changed)
{
    void *place = entry_at(w, gpa, true);
    if (!place)
        return false;
    uint32_t old = (uint32_t)entry;
    if (size == 4)
        *changed = !__atomic_compare_exchange_n((uint32_t *)place, &old, old | (uint32_t)bits, false, __ATOMIC_SEQ_CST,
                                                __ATOMIC_SEQ_CST);
    else
        *changed = !__atomic_compare_exchange_n((uint64_t *)place, &entry, entry | bits, false, __ATOMIC_SEQ_CST,
                                                __ATOMIC_SEQ_CST);
    return true;
}

/* What the leaf entry gives. */
struct leaf_entry {
    uint64_t gpa, entry, allowed, nx, base;
    unsigned shift, size;
    uint8_t access;
};

/* Checks the rights of all levels (`allowed`, `nx`) against the access, and marks the entry. */
static bool finish(const struct walk *w, const struct leaf_entry *leaf, bool *changed)
{
    const struct paging *p = w->paging;
    bool user = leaf->allowed & PTE_U, write = leaf->allowed & PTE_W, readable, writable, executable;
    if (p->cpl == 3) {
        readable = user;
        writable = user && write;
        executable = user && !leaf->nx;
    } else {
        readable = !(user && p->cr4 & CR4_SMAP && !p->ac);
        writable = readable && (write || !(p->cr0 & CR0_WP));
        executable = !leaf->nx && !(user && p->cr4 & CR4_SMEP);
    }
    if (!(w->kind == READ ? readable : w->kind == WRITE ? writable : executable))
        return page_fault(w, PF_PRESENT);
    bool shared_code = w->kind == FETCH && leaf->access == CPU_ACCESS_SHARED;
    if (shared_code && w->no_table)
        return page_fault(w, PF_PRESENT | PF_RESERVED);
    uint64_t gpa = leaf->base | (w->linear & ((1ull << leaf->shift) - 1) & PAGE_MASK);
    /* Code is private whatever the C-bit says; data in the same page is as it says. */
    if (shared_code)
        *w->page = (struct guest_page){gpa, false, false, true, CPU_ACCESS_PRIVATE};
    else
        *w->page = (struct guest_page){gpa, readable, writable && (w->kind == WRITE || leaf->entry & PTE_D), executable,
                                       leaf->access};
    uint64_t bits = w->kind == WRITE ? PTE_A | PTE_D : PTE_A;
    *changed = false;
    return !(bits & ~leaf->entry) || mark_entry(w, leaf->gpa, leaf->size, leaf->entry, bits, changed);
}

/* From `table`, whose entries of 8 bytes each cover 1 << `shift` bytes, down to a leaf. */
static bool walk_64(const struct walk *w, uint64_t table, unsigned shift, uint64_t reserved)
{
    uint64_t allowed = PTE_W | PTE_U, nx = 0;
    for (;;) {
        uint64_t gpa = table + (w->linear >> shift & 511) * 8;
        bool changed = false;
        uint64_t *place = entry_at(w, gpa, false);
        if (!place)
            return false;
        uint64_t entry = __atomic_load_n(place, __ATOMIC_ACQUIRE);
        if (!(entry & PTE_P))
            return page_fault(w, 0);
        bool last = shift == 12 || (entry & PTE_PS && shift <= 30);
        /* An entry of the two top levels has no page size bit: it is reserved there. Bit 12 of a large leaf is its PAT
         * bit; the address bits between it and the page size are reserved. */
        uint64_t bad = last ? reserved | (((1ull << shift) - 1) & ~0x1fffull) : reserved | PTE_PS | w->no_table;
        if (entry & bad)
            return page_fault(w, PF_PRESENT | PF_RESERVED);
        if (last) {
            uint8_t access = w->tables;
            if (w->mask)
                access = !(entry & w->mask) != w->set_is_private ? CPU_ACCESS_PRIVATE : CPU_ACCESS_SHARED;
            struct leaf_entry leaf = {gpa,   entry, allowed & entry, nx | (entry & PTE_NX),
                                      (entry & w->address_mask) >> shift << shift, shift, 8, access};
            if (!finish(w, &leaf, &changed))
                return false;
            if (!changed)
                return true;
            continue;
        }
        if (!(entry & PTE_A) && !mark_entry(w, gpa, 8, entry, PTE_A, &changed))
            return false;
        if (changed)
            continue;
        allowed &= entry;
        nx |= entry & PTE_NX;
        table = entry & w->address_mask;
        shift -= 9;
    }
}

/* Two levels of 4-byte entries, with 4M pages when CR4.PSE is set (and PSE-36: bits 20:13 are address 39:32). False with
 * *changed: an entry was written meanwhile, walk again. */
static bool walk_32(const struct walk *w, bool *changed)
{
    uint64_t gpa = (w->paging->cr3 & 0xfffff000) + (w->linear >> 22 & 1023) * 4;
    uint32_t *place = entry_at(w, gpa, false);
    if (!place)
        return false;
    uint32_t entry = __atomic_load_n(place, __ATOMIC_ACQUIRE);
    if (!(entry & PTE_P))
        return page_fault(w, 0);
    struct leaf_entry leaf = {gpa, entry, entry, 0, (entry & 0xffc00000) | (uint64_t)(entry & 0x1fe000) << 19, 22, 4,
                              w->tables};
    if (entry & PTE_PS && w->paging->cr4 & CR4_PSE) {
        if (entry & 1 << 21)
            return page_fault(w, PF_PRESENT | PF_RESERVED);
        return finish(w, &leaf, changed) && !*changed;
    }
    if (!(entry & PTE_A) && (!mark_entry(w, gpa, 4, entry, PTE_A, changed) || *changed))
        return false;
    leaf.gpa = (entry & 0xfffff000) + (w->linear >> 12 & 1023) * 4;
    if (!(place = entry_at(w, leaf.gpa, false)))
        return false;
    leaf.entry = __atomic_load_n(place, __ATOMIC_ACQUIRE);
    if (!(leaf.entry & PTE_P))
        return page_fault(w, 0);
    leaf.allowed &= leaf.entry;
    leaf.base = leaf.entry & 0xfffff000;
    leaf.shift = 12;
    return finish(w, &leaf, changed) && !*changed;
}

static bool walk_long(struct walk *w)
{
    const struct paging *p = w->paging;
    unsigned top = p->cr4 & CR4_LA57 ? 48 : 39;
    int64_t sign = (int64_t)w->linear >> (top + 8);
    if (sign && sign != -1)
        return fault(w, GP, 0);
    if (p->cr3 & w->no_table)
        return page_fault(w, PF_PRESENT | PF_RESERVED);
    return walk_64(w, p->cr3 & w->address_mask, top, w->reserved);
}

static bool walk_pae(struct walk *w)
{
    uint64_t gpa = (w->paging->cr3 & 0xffffffe0) + (w->linear >> 30 & 3) * 8;
    uint64_t *place = entry_at(w, gpa, false);
    if (!place)
        return false;
    uint64_t pdpte = __atomic_load_n(place, __ATOMIC_ACQUIRE), reserved = w->reserved | 0x7ff0000000000000ull;
    if (!(pdpte & PTE_P))
        return page_fault(w, 0);
    if (pdpte & (reserved | PTE_NX | w->no_table))
        return page_fault(w, PF_PRESENT | PF_RESERVED);
    return walk_64(w, pdpte & w->address_mask, 21, reserved);
}

/* Translates the 4K page of `linear`. False with cpu->refused. */
bool walk(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access_kind kind, struct guest_page *page)
{
    const struct cpu_block *block = cpu->block;
    struct walk w = {.cpu = cpu, .paging = paging, .linear = linear, .kind = kind, .page = page};
    w.mask = block->page_bit ? 1ull << block->page_bit : 0;
    w.set_is_private = block->guest_kind == CPU_GUEST_SNP;
    w.no_table = w.set_is_private ? 0 : w.mask;
    w.address_mask = PTE_ADDRESS & ~w.mask;
    w.tables = w.mask ? CPU_ACCESS_PRIVATE : CPU_ACCESS_ANY;
    w.reserved = (PTE_ADDRESS & ~cpu->physical_mask & ~w.mask) | (paging->efer & EFER_NXE ? 0 : PTE_NX);
    if (!(paging->cr0 & CR0_PG)) {
        *page = (struct guest_page){linear & 0xfffff000, true, true, true, w.tables};
        return true;
    }
    if (paging->cr4 & CR4_PAE)
        return paging->efer & EFER_LMA ? walk_long(&w) : walk_pae(&w);
    bool changed;
    do {
        changed = false;
        if (walk_32(&w, &changed))
            return true;
    } while (changed);
    return false;
}
