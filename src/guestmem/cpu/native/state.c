/* The state of a CPU, between its block and Unicorn's structures. Unicorn's are the truth while it runs, the block when it
 * does not: all of it is stored at a stop, and loaded again as far as somebody has written it. */
#include <string.h>

#include "inside.h"

/* ---- segments: KVM's fields are bits of the second word of a descriptor */

static void segment_to_kvm(const struct segment_cache *cache, struct kvm_segment *segment)
{
    uint32_t flags = cache->flags;
    *segment = (struct kvm_segment){
        .base = cache->base,
        .limit = cache->limit,
        .selector = (uint16_t)cache->selector,
        .type = flags >> 8 & 15,
        .s = flags >> 12 & 1,
        .dpl = flags >> 13 & 3,
        .present = flags >> 15 & 1,
        .avl = flags >> 20 & 1,
        .l = flags >> 21 & 1,
        .db = flags >> 22 & 1,
        .g = flags >> 23 & 1,
        .unusable = !(flags >> 15 & 1),
    };
}

static void segment_of_kvm(const struct kvm_segment *segment, struct segment_cache *cache)
{
    uint32_t present = segment->present && !segment->unusable;
    cache->selector = segment->selector;
    cache->base = segment->base;
    cache->limit = segment->limit;
    cache->flags = (uint32_t)(segment->type & 15) << 8 | (uint32_t)(segment->s & 1) << 12 |
                   (uint32_t)(segment->dpl & 3) << 13 | present << 15 | (uint32_t)(segment->avl & 1) << 20 |
                   (uint32_t)(segment->l & 1) << 21 | (uint32_t)(segment->db & 1) << 22 |
                   (uint32_t)(segment->g & 1) << 23;
}

struct pair {
    struct segment_cache *cache;
    struct kvm_segment *segment;
};

enum { PAIRS = 8 };

static void pairs_of(struct cpu *cpu, struct pair pairs[PAIRS])
{
    struct env *env = cpu->at.env;
    struct kvm_sregs *sregs = &cpu->block->sregs;
    struct kvm_segment *segments[6] = {&sregs->es, &sregs->cs, &sregs->ss, &sregs->ds, &sregs->fs, &sregs->gs};
    for (int i = 0; i < 6; i++)
        pairs[i] = (struct pair){&env->segs[i], segments[i]};
    pairs[6] = (struct pair){&env->ldt, &sregs->ldt};
    pairs[7] = (struct pair){&env->tr, &sregs->tr};
}

/* ---- general registers: KVM has them in the order of its structure, Unicorn by number */

static const uint8_t number_of[16] = {RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, 8, 9, 10, 11, 12, 13, 14, 15};

static void regs_store(struct cpu *cpu)
{
    uint64_t *words = (uint64_t *)&cpu->block->regs;
    for (int i = 0; i < 16; i++)
        words[i] = cpu->at.env->regs[number_of[i]];
    cpu->block->regs.rip = cpu->at.env->eip;
    cpu->block->regs.rflags = cpu->at.env->eflags;
}

static void regs_load(struct cpu *cpu)
{
    const uint64_t *words = (const uint64_t *)&cpu->block->regs;
    struct env *env = cpu->at.env;
    uint64_t virtual = (env->eflags ^ cpu->block->regs.rflags) & RFLAGS_VM;
    for (int i = 0; i < 16; i++)
        env->regs[number_of[i]] = words[i];
    env->eip = cpu->block->regs.rip;
    env->eflags = cpu->block->regs.rflags | 2;
    if (virtual)
        update_hflags(cpu);
}

/* ---- segments, tables, control registers */

static void sregs_store(struct cpu *cpu)
{
    const struct env *env = cpu->at.env;
    struct kvm_sregs *sregs = &cpu->block->sregs;
    struct pair pairs[PAIRS];
    pairs_of(cpu, pairs);
    for (int i = 0; i < PAIRS; i++)
        segment_to_kvm(pairs[i].cache, pairs[i].segment);
    sregs->gdt.base = env->gdt.base;
    sregs->gdt.limit = (uint16_t)env->gdt.limit;
    sregs->idt.base = env->idt.base;
    sregs->idt.limit = (uint16_t)env->idt.limit;
    sregs->cr0 = env->cr[0];
    sregs->cr2 = env->cr[2];
    sregs->cr3 = env->cr[3];
    sregs->cr4 = env->cr[4];
    sregs->cr8 = cpu->at.tail->v_tpr & 15;
    sregs->efer = env->efer;
}

static void sregs_load(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    const struct kvm_sregs *sregs = &cpu->block->sregs;
    bool paging = env->cr[0] != sregs->cr0 || env->cr[3] != sregs->cr3 || env->cr[4] != sregs->cr4 ||
                  env->efer != sregs->efer;
    struct pair pairs[PAIRS];
    pairs_of(cpu, pairs);
    for (int i = 0; i < PAIRS; i++)
        segment_of_kvm(pairs[i].segment, pairs[i].cache);
    env->gdt = (struct segment_cache){0, sregs->gdt.base, sregs->gdt.limit, 0};
    env->idt = (struct segment_cache){0, sregs->idt.base, sregs->idt.limit, 0};
    env->cr[0] = sregs->cr0;
    env->cr[2] = sregs->cr2;
    env->cr[3] = sregs->cr3;
    env->cr[4] = sregs->cr4;
    env->efer = sregs->efer;
    cpu->at.tail->v_tpr = sregs->cr8 & 15;
    update_hflags(cpu);
    if (paging)
        tlb_flush(cpu);
}

/* Source: x86_update_hflags() of QEMU's target/i386/kvm.c */
void update_hflags(struct cpu *cpu)
{
    enum { MODE = HF_CPL | HF_CS32 | HF_SS32 | HF_ADDSEG | HF_PE | HF_LMA | HF_CS64 | HF_OSFXSR | HF_SMAP | HF_FPU };
    struct env *env = cpu->at.env;
    uint32_t cs = env->segs[CS].flags, ss = env->segs[SS].flags;
    uint32_t hflags = (env->hflags & ~(uint32_t)MODE) | (ss >> 13 & 3) | ((uint32_t)env->cr[0] << 8 & HF_FPU);
    hflags |= env->cr[0] & CR0_PE ? HF_PE : 0;
    hflags |= env->cr[4] & CR4_OSFXSR ? HF_OSFXSR : 0;
    hflags |= env->cr[4] & CR4_SMAP ? HF_SMAP : 0;
    hflags |= env->efer & EFER_LMA ? HF_LMA : 0;
    if (env->efer & EFER_LMA && cs & DESC_L) {
        env->hflags = hflags | HF_CS32 | HF_SS32 | HF_CS64;
        return;
    }
    hflags |= (cs & DESC_B ? HF_CS32 : 0) | (ss & DESC_B ? HF_SS32 : 0);
    bool bases = env->segs[DS].base || env->segs[ES].base || env->segs[SS].base;
    if (bases || !(env->cr[0] & CR0_PE) || env->eflags & RFLAGS_VM || !(hflags & HF_CS32))
        hflags |= HF_ADDSEG;
    env->hflags = hflags;
}

/* ---- debug registers */

static void debug_store(struct cpu *cpu)
{
    const uint64_t *dr = cpu->at.tail->dr;
    for (int i = 0; i < 4; i++)
        cpu->block->debug.db[i] = dr[i];
    cpu->block->debug.dr6 = dr[6];
    cpu->block->debug.dr7 = dr[7];
}

static void debug_load(struct cpu *cpu)
{
    uint64_t *dr = cpu->at.tail->dr;
    for (int i = 0; i < 4; i++)
        dr[i] = cpu->block->debug.db[i];
    dr[6] = cpu->block->debug.dr6;
    dr[7] = cpu->block->debug.dr7;
}

/* ---- what waits to be delivered: struct kvm_vcpu_events. The CPU does not tell the shadow of STI from that of MOV SS */

static void pending_store(const struct event *pending, struct kvm_vcpu_events *events)
{
    if (event_is_exception(pending)) {
        events->exception.injected = 1;
        events->exception.nr = pending->vector;
        events->exception.has_error_code = has_error_code(pending->vector);
        events->exception.error_code = events->exception.has_error_code ? pending->error_code : 0;
        events->exception_has_payload = pending->vector == PF;
        events->exception_payload = pending->vector == PF ? pending->address : 0;
    } else if (pending->external && pending->vector == NMI) {
        events->nmi.injected = 1;
    } else {
        events->interrupt.injected = 1;
        events->interrupt.nr = pending->vector;
        events->interrupt.soft = pending->length > 0;
    }
}

static void events_store(struct cpu *cpu)
{
    struct kvm_vcpu_events *events = &cpu->block->events;
    uint32_t sipi = events->sipi_vector;
    memset(events, 0, sizeof(*events));
    events->sipi_vector = sipi;
    events->interrupt.injected = cpu->interrupt >= 0;
    events->interrupt.nr = cpu->interrupt >= 0 ? (uint8_t)cpu->interrupt : 0;
    events->interrupt.shadow = cpu->at.env->hflags & HF_INHIBIT_IRQ ? KVM_X86_SHADOW_INT_STI : 0;
    events->nmi.pending = cpu->nmi;
    events->nmi.masked = (cpu->at.env->hflags2 & HF2_NMI) != 0;
    if (cpu->pending.present)
        pending_store(&cpu->pending, events);
}

/* An INT instruction that is being delivered is taken to have two bytes, which RIP is past. */
static void events_load(struct cpu *cpu)
{
    const struct kvm_vcpu_events *events = &cpu->block->events;
    struct env *env = cpu->at.env;
    cpu->pending.present = false;
    cpu->interrupt = -1;
    if (events->exception.injected || events->exception.pending) {
        pend(cpu, events->exception.nr, events->exception.has_error_code ? events->exception.error_code : 0);
        cpu->pending.address = events->exception_has_payload ? events->exception_payload : env->cr[2];
    } else if (events->nmi.injected) {
        pend(cpu, NMI, 0);
        cpu->pending.external = true;
    } else if (events->interrupt.injected && events->interrupt.soft) {
        pend(cpu, events->interrupt.nr, 0);
        cpu->pending.length = 2;
    } else if (events->interrupt.injected) {
        cpu->interrupt = events->interrupt.nr;
    }
    cpu->nmi = events->nmi.pending;
    env->hflags2 = (env->hflags2 & ~(uint32_t)HF2_NMI) | (events->nmi.masked ? HF2_NMI : 0);
    env->hflags = (env->hflags & ~(uint32_t)HF_INHIBIT_IRQ) | (events->interrupt.shadow ? HF_INHIBIT_IRQ : 0);
}

bool cpu_takes_interrupts(const struct cpu_block *block)
{
    const struct kvm_vcpu_events *events = &block->events;
    bool something = events->exception.injected || events->exception.pending || events->nmi.injected ||
                     events->interrupt.injected;
    return !something && block->regs.rflags & RFLAGS_IF && !events->interrupt.shadow;
}

/* ---- all of it */

static void cpuid_load(struct cpu *cpu)
{
    uint32_t sizes[4];
    cpuid_lookup(cpu->block, 0x80000008, 0, sizes);
    unsigned bits = sizes[0] & 0xff;
    cpu->physical_mask = (1ULL << (bits && bits < 52 ? bits : 52)) - 1;
    tlb_flush(cpu);
}

void state_load(struct cpu *cpu, uint32_t groups)
{
    if (groups & CPU_CPUID)
        cpuid_load(cpu);
    if (groups & CPU_REGS)
        regs_load(cpu);
    if (groups & CPU_MSRS)
        msrs_load(cpu);
    if (groups & CPU_SREGS)
        sregs_load(cpu);
    if (groups & CPU_FPU)
        fpu_load(cpu);
    if (groups & CPU_DEBUG)
        debug_load(cpu);
    if (groups & CPU_EVENTS)
        events_load(cpu);
    if (groups & CPU_CONTROL)
        tlb_flush(cpu); /* the page bit may be another */
}

void state_store(struct cpu *cpu)
{
    regs_store(cpu);
    sregs_store(cpu);
    msrs_store(cpu);
    fpu_store(cpu);
    debug_store(cpu);
    events_store(cpu);
}

/* Intel SDM vol. 3, table 10-1; RDX is the signature of the processor, and KVM gives 0x600 before it knows one. */
void cpu_block_init(struct cpu_block *block)
{
    static const struct kvm_segment data = {.limit = 0xffff, .type = 3, .present = 1, .s = 1};
    memset(block, 0, sizeof(*block));
    block->abi = CPU_ABI;
    block->size = sizeof(*block);
    block->dirty = CPU_ALL;
    block->regs = (struct kvm_regs){.rip = 0xfff0, .rdx = 0x600, .rflags = 2};
    struct kvm_sregs *sregs = &block->sregs;
    sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
    sregs->cs = (struct kvm_segment){
        .base = 0xffff0000, .limit = 0xffff, .selector = 0xf000, .type = 11, .present = 1, .s = 1};
    sregs->tr = (struct kvm_segment){.limit = 0xffff, .type = 11, .present = 1};
    sregs->ldt = (struct kvm_segment){.limit = 0xffff, .type = 2, .present = 1};
    sregs->gdt.limit = sregs->idt.limit = 0xffff;
    sregs->cr0 = 0x60000010;
    sregs->apic_base = 0xfee00900;
    block->debug.dr6 = 0xffff0ff0;
    block->debug.dr7 = 0x400;
    fpu_reset(block);
    msrs_reset(block);
}

/* ---- instructions that are answered from inside of their hook */

static int on_cpuid(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    uint32_t leaf, subleaf, out[4];
    static const int registers[4] = {UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RCX, UC_X86_REG_RDX};
    uc_reg_read(uc, UC_X86_REG_EAX, &leaf);
    uc_reg_read(uc, UC_X86_REG_ECX, &subleaf);
    cpuid_lookup(cpu->block, leaf, subleaf, out);
    for (int i = 0; i < 4; i++) {
        uint64_t word = out[i];
        uc_reg_write(uc, registers[i], &word);
    }
    return 1;
}

static int on_rdtsc(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    uint64_t now = cpu_tsc(cpu->block);
    (void)uc;
    cpu->at.env->regs[RAX] = (uint32_t)now;
    cpu->at.env->regs[RDX] = now >> 32;
    return 1;
}

static int on_rdtscp(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    cpu->at.env->regs[RCX] = (uint32_t)cpu->at.msrs->tsc_aux;
    return on_rdtsc(uc, data);
}

static bool hook(struct cpu *cpu, int instruction, void *function)
{
    uc_hook added;
    return !uc_hook_add(cpu->uc, &added, UC_HOOK_INSN, function, cpu, 1, 0, instruction);
}

bool state_hooks(struct cpu *cpu)
{
    return fpu_find(cpu) && hook(cpu, UC_X86_INS_CPUID, (void *)on_cpuid) &&
           hook(cpu, UC_X86_INS_RDTSC, (void *)on_rdtsc) && hook(cpu, UC_X86_INS_RDTSCP, (void *)on_rdtscp);
}
