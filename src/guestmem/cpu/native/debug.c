/* KVM_SET_GUEST_DEBUG: single steps and breakpoints for who debugs the guest from outside.
 *
 * While hardware breakpoints are armed each instruction is a step, in front of which RIP is compared, as Unicorn looks for
 * the guest's own. A step ends behind an instruction, or at the first of the handler of what it raised. Breakpoints on data
 * see what instructions access, and not what the CPU itself does, as frames of exceptions. Source:
 * Documentation/virt/kvm/api.rst KVM_SET_GUEST_DEBUG; arch/x86/kvm/vmx/vmx.c handle_exception_nmi(); arch/x86/kvm/x86.c
 * kvm_vcpu_check_code_breakpoint(), kvm_check_and_inject_events(). */
#include "inside.h"

enum { DR6_FIXED = (int)0xffff0ff0 };

static bool wants(const struct cpu *cpu, uint32_t bits)
{
    uint32_t control = cpu->block->guest_debug.control;
    return control & KVM_GUESTDBG_ENABLE && control & bits;
}

bool debug_wants_step(struct cpu *cpu)
{
    return wants(cpu, KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP);
}

static int stop_debug(struct cpu *cpu, unsigned vector, uint64_t rip, uint64_t dr6)
{
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_DEBUG);
    stop->nr = vector;
    stop->value[0] = rip;
    stop->value[1] = dr6;
    stop->value[2] = wants(cpu, KVM_GUESTDBG_USE_HW_BP) ? cpu->block->guest_debug.arch.debugreg[7] : cpu->at.tail->dr[7];
    return CPU_STOP_DEBUG;
}

enum kind { ON_EXECUTION, ON_WRITE, ON_IO, ON_ACCESS };

static const __u64 *registers(const struct cpu *cpu)
{
    return cpu->block->guest_debug.arch.debugreg;
}

static bool is_enabled(const struct cpu *cpu, unsigned i)
{
    return registers(cpu)[7] >> (2 * i) & 3;
}

static enum kind kind_of(const struct cpu *cpu, unsigned i)
{
    return registers(cpu)[7] >> (16 + 4 * i) & 3;
}

/* Bits of DR6 for the breakpoints on execution that RIP is at. */
static uint64_t hits(const struct cpu *cpu)
{
    uint64_t found = 0;
    for (unsigned i = 0; i < 4; i++)
        if (is_enabled(cpu, i) && kind_of(cpu, i) == ON_EXECUTION && registers(cpu)[i] == linear_rip(cpu))
            found |= 1ULL << i;
    return found;
}

/* ---- breakpoints on data. Unicorn's hook tells the address that the TLB has, so theirs is looked up as well. */

static bool watches_data(const struct cpu *cpu)
{
    if (!wants(cpu, KVM_GUESTDBG_USE_HW_BP))
        return false;
    for (unsigned i = 0; i < 4; i++)
        if (is_enabled(cpu, i) && (kind_of(cpu, i) == ON_WRITE || kind_of(cpu, i) == ON_ACCESS))
            return true;
    return false;
}

static bool translate(struct cpu *cpu, uint64_t linear, uint64_t *address)
{
    struct refused before = cpu->refused;
    struct leaf_found leaf;
    uint64_t gpa;
    uint8_t kind;
    bool found = linear_page(cpu, linear, &gpa, &kind) && space_lookup(cpu->space, gpa >> PAGE_SHIFT, kind, &leaf);
    cpu->refused = before;
    if (!found)
        return false;
    *address = (cpu->mmio.active && leaf.mmio ? MMIO_BASE + gpa : leaf.hva) + (linear & (PAGE - 1));
    return true;
}

static void on_access(uc_engine *uc, uc_mem_type type, uint64_t address, int size, int64_t value, void *data)
{
    static const uint8_t lengths[] = {1, 2, 8, 4};
    struct cpu *cpu = data;
    uint64_t at;
    for (unsigned i = 0; i < 4; i++) {
        enum kind kind = is_enabled(cpu, i) ? kind_of(cpu, i) : ON_EXECUTION;
        if (kind != ON_ACCESS && (kind != ON_WRITE || type != UC_MEM_WRITE))
            continue;
        unsigned length = lengths[registers(cpu)[7] >> (18 + 4 * i) & 3];
        if (translate(cpu, registers(cpu)[i] & ~(uint64_t)(length - 1), &at) && address < at + length &&
            at < address + (unsigned)size)
            cpu->watch_hits |= 1u << i;
    }
    (void)uc;
    (void)value;
}

/* What is translated without the hook does not call it, and with it is slow. */
static void watch(struct cpu *cpu)
{
    cpu->watch_hits = 0;
    if (cpu->watching || !watches_data(cpu))
        return;
    cpu->watching = !uc_hook_add(cpu->uc, &cpu->watch, UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, (void *)on_access, cpu, 1, 0);
    tlb_flush_code(cpu);
}

void debug_release(struct cpu *cpu)
{
    if (!cpu->watching || watches_data(cpu))
        return;
    uc_hook_del(cpu->uc, cpu->watch);
    cpu->watching = false;
    sealed_pass(cpu);
    tlb_flush_code(cpu);
}

/* ---- */

bool debug_blocks_interrupts(struct cpu *cpu)
{
    return wants(cpu, KVM_GUESTDBG_BLOCKIRQ);
}

/* RF lets an instruction happen on which a breakpoint was reported. */
int debug_before_step(struct cpu *cpu)
{
    watch(cpu);
    if (!wants(cpu, KVM_GUESTDBG_USE_HW_BP) || cpu->at.env->eflags & RFLAGS_RF)
        return CPU_STOP_NONE;
    uint64_t found = hits(cpu);
    return found ? stop_debug(cpu, DB, linear_rip(cpu), (uint32_t)DR6_FIXED | found) : CPU_STOP_NONE;
}

int debug_after_step(struct cpu *cpu)
{
    uint64_t found = cpu->watch_hits | (wants(cpu, KVM_GUESTDBG_SINGLESTEP) ? DR6_BS : 0);
    cpu->watch_hits = 0;
    return found ? stop_debug(cpu, DB, linear_rip(cpu), (uint32_t)DR6_FIXED | found) : CPU_STOP_NONE;
}

/* INT3 is the debugger's, and has not happened. */
int debug_before_delivery(struct cpu *cpu)
{
    const struct event *pending = &cpu->pending;
    if (pending->vector != BP || pending->length != 1 || !wants(cpu, KVM_GUESTDBG_USE_SW_BP))
        return CPU_STOP_NONE;
    cpu->pending.present = false;
    cpu->at.env->eip -= pending->length;
    return stop_debug(cpu, BP, linear_rip(cpu), (uint32_t)DR6_FIXED);
}
