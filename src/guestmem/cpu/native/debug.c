/* KVM_SET_GUEST_DEBUG: single steps and breakpoints for who debugs the guest from outside.
 *
 * While hardware breakpoints are armed each instruction is a step, in front of which RIP is compared, as Unicorn looks for
 * the guest's own. A step ends behind an instruction, or at the first of the handler of what it raised. No breakpoints on
 * data. Source: Documentation/virt/kvm/api.rst KVM_SET_GUEST_DEBUG; arch/x86/kvm/vmx/vmx.c handle_exception_nmi();
 * arch/x86/kvm/x86.c kvm_vcpu_check_code_breakpoint(), kvm_check_and_inject_events(). */
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

/* Bits of DR6 for the breakpoints on execution that RIP is at: enabled in DR7, of kind 0. */
static uint64_t hits(const struct cpu *cpu)
{
    const __u64 *dr = cpu->block->guest_debug.arch.debugreg;
    uint64_t found = 0;
    for (unsigned i = 0; i < 4; i++)
        if (dr[7] >> (2 * i) & 3 && !(dr[7] >> (16 + 4 * i) & 3) && dr[i] == linear_rip(cpu))
            found |= 1ULL << i;
    return found;
}

bool debug_blocks_interrupts(struct cpu *cpu)
{
    return wants(cpu, KVM_GUESTDBG_BLOCKIRQ);
}

/* RF lets an instruction happen on which a breakpoint was reported. */
int debug_before_step(struct cpu *cpu)
{
    if (!wants(cpu, KVM_GUESTDBG_USE_HW_BP) || cpu->at.env->eflags & RFLAGS_RF)
        return CPU_STOP_NONE;
    uint64_t found = hits(cpu);
    return found ? stop_debug(cpu, DB, linear_rip(cpu), (uint32_t)DR6_FIXED | found) : CPU_STOP_NONE;
}

int debug_after_step(struct cpu *cpu)
{
    if (!wants(cpu, KVM_GUESTDBG_SINGLESTEP))
        return CPU_STOP_NONE;
    return stop_debug(cpu, DB, linear_rip(cpu), (uint32_t)DR6_FIXED | DR6_BS);
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
