/* The guest's own page tables: linear address to guest-physical address, as the CPU walks them. Each touch of a table goes
 * through stage 2: one that it does not hold is a refusal of stage 2 and not a fault of the guest. The accessed bit of an
 * entry is set when the walk goes through it, that of the leaf and its dirty bit when the access is allowed, by an atomic
 * exchange, since other CPUs walk and write the same tables. A read through a clean leaf is answered as not writable, so that
 * the first write walks again and sets the dirty bit.
 *
 * Source: Intel SDM vol. 3, chapter 5 "Paging"; AMD APM vol. 2, 15.34.5 for the C-bit; Intel TDX module base specification,
 * "GPA space", for the shared bit. Not modelled: protection keys, and the cache of PDPTEs that PAE paging loads with CR3. */
#include "inside.h"

#define PTE_P (1ULL << 0)
#define PTE_W (1ULL << 1)
#define PTE_U (1ULL << 2)
#define PTE_A (1ULL << 5)
#define PTE_D (1ULL << 6)
#define PTE_PS (1ULL << 7)
#define PTE_NX (1ULL << 63)
#define PTE_ADDRESS 0x000ffffffffff000ULL
#define PDPTE_RESERVED 0x7ff0000000000000ULL

void paging_of(const struct cpu *cpu, struct paging *paging)
{
    const struct env *env = cpu->at.env;
    uint64_t bit = cpu->block->page_bit ? 1ULL << cpu->block->page_bit : 0;
    uint64_t beyond = PTE_ADDRESS & ~cpu->physical_mask & ~bit;
    *paging = (struct paging){
        .cr0 = env->cr[0],
        .cr3 = env->cr[3],
        .cr4 = env->cr[4],
        .efer = env->efer,
        .bit = bit,
        .set_is_private = cpu->block->guest_kind == CPU_GUEST_SNP,
        .address = PTE_ADDRESS & ~bit,
        .reserved = env->efer & EFER_NXE ? beyond : beyond | PTE_NX,
        .ac = env->eflags & RFLAGS_AC,
        .cpl = env->hflags & HF_CPL,
    };
    paging->no_table = paging->set_is_private ? 0 : bit;
}

/* The CPU's own accesses: descriptor tables, the frame of an exception. */
void paging_implicit(struct paging *paging)
{
    paging->cpl = 0;
    paging->ac = false;
}

/* ---- refusals */

static bool fault(struct cpu *cpu, uint64_t linear, uint8_t vector, uint32_t error_code)
{
    cpu->refused =
        (struct refused){.why = REFUSED_GUEST, .vector = vector, .error_code = error_code, .address = linear};
    return false;
}

static bool page_fault(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access, uint32_t code)
{
    bool fetches_count = (paging->efer & EFER_NXE && paging->cr4 & CR4_PAE) || paging->cr4 & CR4_SMEP;
    if (access == WRITE)
        code |= PF_WRITE;
    if (access == FETCH && fetches_count)
        code |= PF_FETCH;
    if (paging->cpl == 3)
        code |= PF_USER;
    return fault(cpu, linear, PF, code);
}

/* ---- entries of tables */

/* Where the entry is; NULL: stage 2 does not hold its page, or not for writing. Tables are private to a guest that can say
 * which of its pages are. Those in a ROM are never marked: `*rom` says so. */
static void *entry_at(struct cpu *cpu, const struct paging *paging, uint64_t gpa, bool write, bool *rom)
{
    uint8_t kind = paging->bit ? CPU_ACCESS_PRIVATE : CPU_ACCESS_ANY;
    struct leaf_found leaf = {0};
    bool found = space_lookup(cpu->space, gpa >> PAGE_SHIFT, kind, &leaf);
    *rom = leaf.mmio && leaf.hva;
    cpu->touching = gpa;
    if (found && leaf.hva && (!write || leaf.writable || *rom))
        return (void *)(leaf.hva + (gpa & (PAGE - 1)));
    enum refusal why = found && !leaf.hva ? REFUSED_MMIO : REFUSED_STAGE2;
    cpu->refused = (struct refused){.why = why, .gpa = gpa, .write = write, .kind = kind};
    return NULL;
}

/* Set bits of an entry that was read as `seen`. False: refused, or *changed says that it is another by now. */
static bool mark(struct cpu *cpu, const struct paging *paging, uint64_t gpa, bool wide, uint64_t seen, uint64_t bits,
                 bool *changed)
{
    if ((seen & bits) == bits)
        return true;
    bool done, rom;
    void *entry = entry_at(cpu, paging, gpa, true, &rom);
    if (!entry || rom)
        return entry;
    if (wide) {
        done = __atomic_compare_exchange_n((uint64_t *)entry, &seen, seen | bits, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    } else {
        uint32_t narrow = (uint32_t)seen;
        done = __atomic_compare_exchange_n((uint32_t *)entry, &narrow, narrow | (uint32_t)bits, false, __ATOMIC_SEQ_CST,
                                           __ATOMIC_SEQ_CST);
    }
    *changed = !done;
    return done;
}

static bool read_entry(struct cpu *cpu, const struct paging *paging, uint64_t gpa, bool wide, uint64_t *value)
{
    bool rom;
    const void *entry = entry_at(cpu, paging, gpa, false, &rom);
    if (!entry)
        return false;
    *value = wide ? __atomic_load_n((const uint64_t *)entry, __ATOMIC_ACQUIRE)
                  : __atomic_load_n((const uint32_t *)entry, __ATOMIC_ACQUIRE);
    return true;
}

/* ---- the leaf */

struct leaf {
    uint64_t gpa, entry; /* of the entry, and its value */
    uint64_t allowed, nx; /* rights of all levels */
    uint64_t base;        /* of the page */
    unsigned shift;
    bool wide;
    uint8_t kind;
};

static bool rights(struct cpu *cpu, const struct paging *paging, const struct leaf *leaf, uint64_t linear,
                   enum access access, struct page *page)
{
    bool user = leaf->allowed & PTE_U, writable = leaf->allowed & PTE_W;
    if (paging->cpl == 3) {
        page->readable = user;
        page->writable = user && writable;
        page->executable = user && !leaf->nx;
    } else {
        page->readable = !(user && paging->cr4 & CR4_SMAP && !paging->ac);
        page->writable = page->readable && (writable || !(paging->cr0 & CR0_WP));
        page->executable = !leaf->nx && !(user && paging->cr4 & CR4_SMEP);
    }
    bool permitted = access == READ ? page->readable : access == WRITE ? page->writable : page->executable;
    return permitted || page_fault(cpu, paging, linear, access, PF_PRESENT);
}

static bool finish(struct cpu *cpu, const struct paging *paging, const struct leaf *leaf, uint64_t linear,
                   enum access access, struct page *page, bool *changed)
{
    if (!rights(cpu, paging, leaf, linear, access, page))
        return false;
    page->gpa = leaf->base | (linear & ((1ULL << leaf->shift) - 1) & PAGE_MASK);
    page->kind = leaf->kind;
    if (access == FETCH && leaf->kind == CPU_ACCESS_SHARED) {
        if (paging->no_table)
            return page_fault(cpu, paging, linear, access, PF_PRESENT | PF_RESERVED);
        page->kind = CPU_ACCESS_PRIVATE; /* code is private whatever the C-bit says; data in the same page is as it says */
        page->readable = page->writable = false;
    }
    page->writable = page->writable && (access == WRITE || leaf->entry & PTE_D);
    uint64_t used = access == WRITE ? PTE_A | PTE_D : PTE_A;
    return mark(cpu, paging, leaf->gpa, leaf->wide, leaf->entry, used, changed);
}

/* ---- tables */

/* From `table`, whose entries of 8 bytes each cover 1 << `shift` bytes, down to a leaf. */
static bool walk_wide(struct cpu *cpu, const struct paging *paging, uint64_t table, unsigned shift, uint64_t linear,
                      enum access access, uint64_t reserved, struct page *page, bool *changed)
{
    struct leaf leaf = {.allowed = PTE_W | PTE_U, .wide = true};
    for (;; shift -= 9) {
        leaf.gpa = table + (linear >> shift & 511) * 8;
        if (!read_entry(cpu, paging, leaf.gpa, true, &leaf.entry))
            return false;
        if (!(leaf.entry & PTE_P))
            return page_fault(cpu, paging, linear, access, 0);
        leaf.allowed &= leaf.entry;
        leaf.nx |= leaf.entry & PTE_NX;
        if (shift == 12 || (leaf.entry & PTE_PS && shift <= 30))
            break;
        /* An entry of the two top levels has no page size bit: it is reserved there. */
        if (leaf.entry & (reserved | PTE_PS | paging->no_table))
            return page_fault(cpu, paging, linear, access, PF_PRESENT | PF_RESERVED);
        if (!mark(cpu, paging, leaf.gpa, true, leaf.entry, PTE_A, changed))
            return false;
        table = leaf.entry & paging->address;
    }
    /* Bit 12 of a large leaf is its PAT bit; the address bits between it and the page size are reserved. */
    if (leaf.entry & (reserved | (((1ULL << shift) - 1) & ~0x1fffULL)))
        return page_fault(cpu, paging, linear, access, PF_PRESENT | PF_RESERVED);
    bool set = leaf.entry & paging->bit;
    leaf.kind = !paging->bit ? CPU_ACCESS_ANY : set == paging->set_is_private ? CPU_ACCESS_PRIVATE : CPU_ACCESS_SHARED;
    leaf.base = (leaf.entry & paging->address) >> shift << shift;
    leaf.shift = shift;
    return finish(cpu, paging, &leaf, linear, access, page, changed);
}

/* Two levels of 4-byte entries, with 4M pages when CR4.PSE is set (PSE-36: bits 20:13 are address bits 39:32). */
static bool walk_narrow(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access,
                        struct page *page, bool *changed)
{
    struct leaf leaf = {.gpa = (paging->cr3 & 0xfffff000) + (linear >> 22 & 1023) * 4,
                        .kind = paging->bit ? CPU_ACCESS_PRIVATE : CPU_ACCESS_ANY,
                        .shift = 22};
    if (!read_entry(cpu, paging, leaf.gpa, false, &leaf.entry))
        return false;
    if (!(leaf.entry & PTE_P))
        return page_fault(cpu, paging, linear, access, 0);
    leaf.allowed = leaf.entry;
    leaf.base = (leaf.entry & 0xffc00000) | (leaf.entry & 0x1fe000) << 19;
    if (leaf.entry & PTE_PS && paging->cr4 & CR4_PSE) {
        if (leaf.entry & 1 << 21)
            return page_fault(cpu, paging, linear, access, PF_PRESENT | PF_RESERVED);
        return finish(cpu, paging, &leaf, linear, access, page, changed);
    }
    if (!mark(cpu, paging, leaf.gpa, false, leaf.entry, PTE_A, changed))
        return false;
    leaf.gpa = (leaf.entry & 0xfffff000) + (linear >> 12 & 1023) * 4;
    if (!read_entry(cpu, paging, leaf.gpa, false, &leaf.entry))
        return false;
    if (!(leaf.entry & PTE_P))
        return page_fault(cpu, paging, linear, access, 0);
    leaf.allowed &= leaf.entry;
    leaf.base = leaf.entry & 0xfffff000;
    leaf.shift = 12;
    return finish(cpu, paging, &leaf, linear, access, page, changed);
}

static bool walk_long(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access,
                      struct page *page, bool *changed)
{
    unsigned top = paging->cr4 & CR4_LA57 ? 48 : 39;
    int64_t sign = (int64_t)linear >> (top + 8);
    if (sign && sign != -1)
        return fault(cpu, linear, GP, 0);
    if (paging->cr3 & paging->no_table)
        return page_fault(cpu, paging, linear, access, PF_PRESENT | PF_RESERVED);
    return walk_wide(cpu, paging, paging->cr3 & paging->address, top, linear, access, paging->reserved, page, changed);
}

static bool walk_pae(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access,
                     struct page *page, bool *changed)
{
    uint64_t pdpte, reserved = paging->reserved | PDPTE_RESERVED;
    if (!read_entry(cpu, paging, (paging->cr3 & 0xffffffe0) + (linear >> 30 & 3) * 8, true, &pdpte))
        return false;
    if (!(pdpte & PTE_P))
        return page_fault(cpu, paging, linear, access, 0);
    if (pdpte & (reserved | PTE_NX | paging->no_table))
        return page_fault(cpu, paging, linear, access, PF_PRESENT | PF_RESERVED);
    return walk_wide(cpu, paging, pdpte & paging->address, 21, linear, access, reserved, page, changed);
}

static bool walk_once(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access,
                      struct page *page, bool *changed)
{
    if (!(paging->cr4 & CR4_PAE))
        return walk_narrow(cpu, paging, linear, access, page, changed);
    if (paging->efer & EFER_LMA)
        return walk_long(cpu, paging, linear, access, page, changed);
    return walk_pae(cpu, paging, linear, access, page, changed);
}

bool walk(struct cpu *cpu, const struct paging *paging, uint64_t linear, enum access access, struct page *page)
{
    if (!(paging->cr0 & CR0_PG)) {
        uint8_t kind = paging->bit ? CPU_ACCESS_PRIVATE : CPU_ACCESS_ANY;
        *page = (struct page){linear & 0xfffff000, kind, true, true, true};
        return true;
    }
    for (;;) { /* again where another CPU has changed an entry under the walk */
        bool changed = false;
        if (walk_once(cpu, paging, linear, access, page, &changed))
            return true;
        if (!changed)
            return false;
    }
}
