/* Interrupts and NMIs from outside, and the moment at which the guest takes one.
 *
 * Between two passes the moment is looked for in the registers. During a pass the CPU looks for it: it is told that an
 * interrupt of its SVM host is pending (CPU_INTERRUPT_VIRQ), and exits in front of the first instruction at which it could
 * be taken. An NMI that is masked waits in the same way for the IRET that ends the last one.
 *
 * Source: arch/x86/kvm/x86.c kvm_check_and_inject_events, dm_request_for_irq_injection. */
#include "internal.h"

static bool shadow(const struct cpu *cpu)
{
    return cpu->env->hflags & HF_INHIBIT_IRQ;
}

/* Whether an interrupt could be taken now. */
bool interrupts_open(const struct cpu *cpu)
{
    return cpu->env->eflags & RFLAGS_IF && !shadow(cpu);
}

/* An NMI that only the shadow keeps off: one instruction, and it is taken. */
bool must_step(const struct cpu *cpu)
{
    return cpu->nmi && shadow(cpu) && !(cpu->env->hflags2 & HF2_NMI);
}

/* What happens before the next instruction: a stop, or *taken with an event that is pending now; else the CPU looks out for
 * what waits. */
int poll_interrupts(struct cpu *cpu, bool *taken)
{
    uint32_t request = 0;
    *taken = false;
    if (cpu->nmi) {
        bool masked = cpu->env->hflags2 & HF2_NMI;
        if (!masked && !shadow(cpu)) {
            cpu->nmi = false;
            cpu->env->hflags2 |= HF2_NMI;
            raise_event(cpu, NMI, 0, 0, 0, true);
            *taken = true;
            return CPU_STOP_NONE;
        }
        request = masked ? REQUEST_NMI : 0;
    }
    if (cpu->interrupt >= 0 || cpu->block->request_interrupt_window) {
        if (interrupts_open(cpu)) {
            if (cpu->interrupt < 0)
                return CPU_STOP_WINDOW;
            raise_event(cpu, cpu->interrupt, 0, 0, 0, true);
            cpu->interrupt = -1;
            *taken = true;
            return CPU_STOP_NONE;
        }
        request |= REQUEST_VIRQ;
    }
    set_interrupt_request(cpu, request, 0);
    return CPU_STOP_NONE;
}
