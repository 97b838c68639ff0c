/* The state of a CPU between its block and Unicorn's structures, in KVM's form and in QEMU's. */
#include "internal.h"

#include <string.h>

extern void cpu_x86_update_dr7_x86_64(void *env, uint32_t dr7);

enum { KVM_SHADOW_STI = KVM_X86_SHADOW_INT_STI };

/* The order of struct kvm_regs as indices of CPUX86State.regs. */
static const uint8_t general[16] = {RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, 8, 9, 10, 11, 12, 13, 14, 15};

static void load_regs(struct cpu *cpu)
{
    const __u64 *from = &cpu->block->regs.rax;
    struct uc_env *env = cpu->env;
    /* Another RIP: what the instruction there waited for is void. */
    if (env->eip != cpu->block->regs.rip)
        forget_instruction(cpu);
    for (int i = 0; i < 16; i++)
        env->regs[general[i]] = from[i];
    env->eip = cpu->block->regs.rip;
    uint64_t changed = env->eflags ^ cpu->block->regs.rflags;
    env->eflags = cpu->block->regs.rflags | 2;
    if (changed & RFLAGS_VM)
        update_hflags(cpu);
}

static void store_regs(struct cpu *cpu)
{
    __u64 *to = &cpu->block->regs.rax;
    for (int i = 0; i < 16; i++)
        to[i] = cpu->env->regs[general[i]];
    cpu->block->regs.rip = cpu->env->eip;
    cpu->block->regs.rflags = cpu->env->eflags;
}

static void load_segment(struct segment_cache *to, const struct kvm_segment *from)
{
    uint32_t present = from->present && !from->unusable ? DESC_P : 0;
    to->selector = from->selector;
    to->base = from->base;
    to->limit = from->limit;
    to->flags = (from->type & 15u) << 8 | (from->s & 1u) << 12 | (from->dpl & 3u) << 13 | present |
                (from->avl & 1u) << 20 | (from->l & 1u) << 21 | (from->db & 1u) << 22 | (from->g & 1u) << 23;
}

static void store_segment(struct kvm_segment *to, const struct segment_cache *from)
{
    uint32_t flags = from->flags;
    to->base = from->base;
    to->limit = from->limit;
    to->selector = (uint16_t)from->selector;
    to->type = flags >> 8 & 15;
    to->present = flags >> 15 & 1;
    to->dpl = flags >> 13 & 3;
    to->db = flags >> 22 & 1;
    to->s = flags >> 12 & 1;
    to->l = flags >> 21 & 1;
    to->g = flags >> 23 & 1;
    to->avl = flags >> 20 & 1;
    to->unusable = !to->present;
    to->padding = 0;
}

static void load_sregs(struct cpu *cpu)
{
    const struct kvm_sregs *from = &cpu->block->sregs;
    struct uc_env *env = cpu->env;
    load_segment(&env->segs[ES], &from->es);
    load_segment(&env->segs[CS], &from->cs);
    load_segment(&env->segs[SS], &from->ss);
    load_segment(&env->segs[DS], &from->ds);
    load_segment(&env->segs[FS], &from->fs);
    load_segment(&env->segs[GS], &from->gs);
    load_segment(&env->ldt, &from->ldt);
    load_segment(&env->tr, &from->tr);
    env->gdt.base = from->gdt.base, env->gdt.limit = from->gdt.limit;
    env->idt.base = from->idt.base, env->idt.limit = from->idt.limit;
    env->cr[0] = from->cr0;
    env->cr[2] = from->cr2;
    env->cr[3] = from->cr3;
    env->cr[4] = from->cr4;
    env->efer = from->efer;
    cpu->tail->v_tpr = from->cr8 & 15;
    update_hflags(cpu);
    /* Whoever sets an address space from outside may have written its tables as well. */
    tlb_flush(cpu);
}

static void store_sregs(struct cpu *cpu)
{
    struct kvm_sregs *to = &cpu->block->sregs;
    const struct uc_env *env = cpu->env;
    store_segment(&to->es, &env->segs[ES]);
    store_segment(&to->cs, &env->segs[CS]);
    store_segment(&to->ss, &env->segs[SS]);
    store_segment(&to->ds, &env->segs[DS]);
    store_segment(&to->fs, &env->segs[FS]);
    store_segment(&to->gs, &env->segs[GS]);
    store_segment(&to->ldt, &env->ldt);
    store_segment(&to->tr, &env->tr);
    to->gdt.base = env->gdt.base, to->gdt.limit = (uint16_t)env->gdt.limit;
    to->idt.base = env->idt.base, to->idt.limit = (uint16_t)env->idt.limit;
    to->cr0 = env->cr[0];
    to->cr2 = env->cr[2];
    to->cr3 = env->cr[3];
    to->cr4 = env->cr[4];
    to->efer = env->efer;
    to->cr8 = cpu->tail->v_tpr & 15;
}

/* The mode, from segments and control registers. Source: x86_update_hflags() of QEMU's target/i386/kvm.c. */
void update_hflags(struct cpu *cpu)
{
    struct uc_env *env = cpu->env;
    const uint32_t mode = HF_CPL | HF_CS32 | HF_SS32 | HF_ADDSEG | HF_PE | HF_FPU | HF_LMA | HF_CS64 | HF_OSFXSR | HF_SMAP;
    uint32_t cs = env->segs[CS].flags, ss = env->segs[SS].flags, hflags = env->hflags & ~mode;
    uint64_t cr0 = env->cr[0], cr4 = env->cr[4];
    hflags |= (ss >> DESC_DPL_SHIFT & 3) | (cr0 << 8 & HF_FPU) | (cr0 & CR0_PE ? HF_PE : 0);
    hflags |= (cr4 & CR4_OSFXSR ? HF_OSFXSR : 0) | (cr4 & CR4_SMAP ? HF_SMAP : 0);
    if (env->efer & EFER_LMA)
        hflags |= HF_LMA;
    if (env->efer & EFER_LMA && cs & DESC_L) {
        hflags |= HF_CS32 | HF_SS32 | HF_CS64;
    } else {
        hflags |= (cs & DESC_B ? HF_CS32 : 0) | (ss & DESC_B ? HF_SS32 : 0);
        bool bases = env->segs[DS].base || env->segs[ES].base || env->segs[SS].base;
        if (bases || !(cr0 & CR0_PE) || env->eflags & RFLAGS_VM || !(hflags & HF_CS32))
            hflags |= HF_ADDSEG;
    }
    env->hflags = hflags;
}

/* The breakpoints of KVM_SET_GUEST_DEBUG stand in the CPU in place of the guest's, which the block keeps. A guest that loads
 * DR7 meanwhile takes them out. Source: arch/x86/kvm/x86.c kvm_update_dr7. */
static void load_guest_debug(struct cpu *cpu)
{
    const struct kvm_guest_debug *asked = &cpu->block->guest_debug;
    const uint32_t both = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
    bool host = (asked->control & both) == both;
    if (!host && !cpu->host_breakpoints)
        return;
    cpu->host_breakpoints = host;
    for (int i = 0; i < 4; i++)
        cpu->tail->dr[i] = host ? asked->arch.debugreg[i] : cpu->block->debug.db[i];
    cpu_x86_update_dr7_x86_64(cpu->env, (uint32_t)(host ? asked->arch.debugreg[7] : cpu->block->debug.dr7));
    cpu->env->hflags |= HF_IOBPT;
}

static void load_debug(struct cpu *cpu)
{
    if (cpu->host_breakpoints)
        return;
    memcpy(cpu->tail->dr, cpu->block->debug.db, sizeof cpu->block->debug.db);
    cpu->tail->dr[6] = cpu->block->debug.dr6;
    cpu->tail->dr[7] = cpu->block->debug.dr7;
}

static void store_debug(struct cpu *cpu)
{
    if (cpu->host_breakpoints)
        return;
    memcpy(cpu->block->debug.db, cpu->tail->dr, sizeof cpu->block->debug.db);
    cpu->block->debug.dr6 = cpu->tail->dr[6];
    cpu->block->debug.dr7 = cpu->tail->dr[7];
}

/* An INT instruction that is being delivered (`interrupt.soft`) is taken to have two bytes, which RIP is past, unless it is
 * the one that this CPU knows. */
static void load_events(struct cpu *cpu)
{
    const struct kvm_vcpu_events *from = &cpu->block->events;
    int length = cpu->pending.vector == from->interrupt.nr && cpu->pending.length ? cpu->pending.length : 2;
    cpu->pending.vector = cpu->interrupt = -1;
    if (from->exception.injected || from->exception.pending) {
        uint64_t address = from->exception_has_payload ? from->exception_payload : cpu->env->cr[2];
        uint32_t error_code = from->exception.has_error_code ? from->exception.error_code : 0;
        raise_event(cpu, from->exception.nr, error_code, address, 0, false);
    } else if (from->nmi.injected) {
        raise_event(cpu, NMI, 0, 0, 0, true);
    }
    if (from->interrupt.injected && from->interrupt.soft && cpu->pending.vector < 0)
        raise_event(cpu, from->interrupt.nr, 0, 0, length, false);
    else if (from->interrupt.injected && !from->interrupt.soft)
        cpu->interrupt = from->interrupt.nr;
    cpu->nmi = from->nmi.pending;
    cpu->env->hflags2 = (cpu->env->hflags2 & ~(uint32_t)HF2_NMI) | (from->nmi.masked ? HF2_NMI : 0);
    cpu->env->hflags = (cpu->env->hflags & ~(uint32_t)HF_INHIBIT_IRQ) | (from->interrupt.shadow ? HF_INHIBIT_IRQ : 0);
}

static void store_events(struct cpu *cpu)
{
    struct kvm_vcpu_events *to = &cpu->block->events;
    const struct event *pending = &cpu->pending;
    bool exception = pending->vector >= 0 && !pending->external && !pending->length;
    memset(to, 0, sizeof *to);
    to->interrupt.injected = cpu->interrupt >= 0;
    to->interrupt.nr = cpu->interrupt >= 0 ? (uint8_t)cpu->interrupt : 0;
    to->interrupt.shadow = cpu->env->hflags & HF_INHIBIT_IRQ ? KVM_SHADOW_STI : 0;
    to->nmi.pending = cpu->nmi;
    to->nmi.masked = !!(cpu->env->hflags2 & HF2_NMI);
    if (exception) {
        to->exception.injected = 1;
        to->exception.nr = (uint8_t)pending->vector;
        to->exception.has_error_code = has_error_code(pending->vector);
        to->exception.error_code = to->exception.has_error_code ? pending->error_code : 0;
        to->exception_has_payload = pending->vector == PF;
        to->exception_payload = pending->vector == PF ? pending->address : 0;
    } else if (pending->external && pending->vector == NMI) {
        to->nmi.injected = 1;
    } else if (pending->vector >= 0) {
        to->interrupt.injected = 1;
        to->interrupt.nr = (uint8_t)pending->vector;
        to->interrupt.soft = pending->length > 0;
    }
}

/* The registers of the CPU itself that are MSRs: block->msrs holds them while it does not run. */
static const uint32_t cpu_msrs[] = {0x174, 0x175, 0x176, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102, 0xc0000103};

static uint64_t *cpu_msr(struct cpu *cpu, uint32_t index)
{
    struct uc_msrs *msrs = cpu->msrs;
    switch (index) {
    case 0x175:
        return &msrs->sysenter_esp;
    case 0x176:
        return &msrs->sysenter_eip;
    case 0xc0000081:
        return &msrs->star;
    case 0xc0000082:
        return &msrs->lstar;
    case 0xc0000083:
        return &msrs->cstar;
    case 0xc0000084:
        return &msrs->fmask;
    case 0xc0000102:
        return &msrs->kernel_gs_base;
    default:
        return &msrs->tsc_aux;
    }
}

/* The first slots of block->msrs are those of cpu_msrs, in its order: see msrs_reset(). */
void load_msrs(struct cpu *cpu)
{
    cpu->msrs->sysenter_cs = (uint32_t)cpu->block->msrs[0].value;
    for (unsigned i = 1; i < sizeof cpu_msrs / sizeof *cpu_msrs; i++)
        *cpu_msr(cpu, cpu_msrs[i]) = cpu->block->msrs[i].value;
}

void store_msrs(struct cpu *cpu)
{
    cpu->block->msrs[0].value = cpu->msrs->sysenter_cs;
    for (unsigned i = 1; i < sizeof cpu_msrs / sizeof *cpu_msrs; i++)
        cpu->block->msrs[i].value = *cpu_msr(cpu, cpu_msrs[i]);
}

/* An answer, a device access or an exception that is not delivered yet. */
void forget_instruction(struct cpu *cpu)
{
    if (cpu->asked.kind != CPU_STOP_HYPERCALL && cpu->asked.kind != CPU_STOP_VMGEXIT)
        cpu->asked.kind = CPU_STOP_NONE;
    cpu->next = CPU_STOP_NONE;
    if (!cpu->pending.external)
        cpu->pending.vector = -1;
    cpu->ports.supply_next = cpu->ports.supply_size = 0;
    cpu->mmio.write_count = 0;
    mmio_forget(cpu);
}

/* Takes what was written to the block. REGS comes first: another RIP voids an exception that EVENTS may set again. */
void load_state(struct cpu *cpu)
{
    struct cpu_block *block = cpu->block;
    uint32_t dirty = block->dirty;
    if (!dirty)
        return;
    block->dirty = 0;
    if (dirty & CPU_REGS)
        load_regs(cpu);
    if (dirty & CPU_SREGS)
        load_sregs(cpu);
    if (dirty & CPU_MSRS)
        load_msrs(cpu);
    if (dirty & CPU_FPU)
        load_fpu(cpu);
    if (dirty & CPU_DEBUG)
        load_debug(cpu);
    if (dirty & CPU_EVENTS)
        load_events(cpu);
    if (dirty & CPU_CONTROL)
        load_guest_debug(cpu);
    if (dirty & (CPU_CPUID | CPU_CONTROL)) {
        uint64_t mask = (1ull << physical_bits(block)) - 1;
        if (mask != cpu->physical_mask || dirty & CPU_CONTROL)
            tlb_flush(cpu);
        cpu->physical_mask = mask;
    }
}

void store_state(struct cpu *cpu)
{
    store_regs(cpu);
    store_sregs(cpu);
    store_msrs(cpu);
    store_fpu(cpu);
    store_debug(cpu);
    store_events(cpu);
}
