/* What becomes of an exception that meets another on its way: double and triple faults.
 *
 * Source: Intel SDM vol. 3, chapter 7 "Interrupt and exception handling", tables 7-4 and 7-5; AMD APM vol. 2, 15.35.5 for
 * #VC, which makes no double fault here. */
#include "internal.h"

static bool among(int vector, uint32_t set)
{
    return vector >= 0 && vector < 32 && set >> vector & 1;
}

bool has_error_code(int vector)
{
    return among(vector, 1u << DF | 1u << TS | 1u << NP | 1u << SS_FAULT | 1u << GP | 1u << PF | 1u << 17 | 1u << 21 | 1u << VC);
}

/* Whether RIP of the frame is the instruction that raised it. */
bool is_fault(int vector)
{
    return among(vector, 1u << 0 | 1u << 5 | 1u << UD | 1u << 7 | 1u << TS | 1u << NP | 1u << SS_FAULT | 1u << GP | 1u << PF |
                             1u << 16 | 1u << 17 | 1u << 19 | 1u << VC);
}

static bool contributory(int vector)
{
    return among(vector, 1u << 0 | 1u << TS | 1u << NP | 1u << SS_FAULT | 1u << GP);
}

static bool makes_double_fault(const struct event *first, int second)
{
    if (first->length || first->external)
        return false;
    if (first->vector == PF)
        return contributory(second) || second == PF;
    return contributory(first->vector) && contributory(second);
}

/* Enters the guest's handler of cpu->pending. The stop, 0 if it is entered. A delivery that stage 2 interrupts is repeated
 * as a whole. */
int deliver_pending(struct cpu *cpu)
{
    struct event event = cpu->pending, second;
    uint64_t rip = cpu->env->eip;
    cpu->block->deliveries++;
    for (;;) {
        if (event.vector == PF)
            cpu->env->cr[2] = event.address;
        cpu->refused.kind = NOT_REFUSED;
        switch (deliver_once(cpu, &event, rip, &second)) {
        case DELIVERED:
            cpu->pending.vector = -1;
            mmio_forget(cpu);
            return CPU_STOP_NONE;
        case DELIVERY_UNSUPPORTED:
            return fail(cpu, "vector %d %s", event.vector,
                        cpu->env->eflags & RFLAGS_VM ? "in virtual-8086 mode" : "through a task gate");
        case DELIVERY_REFUSED:
            return not_done(cpu);
        case DELIVERY_FAULT:
            break;
        }
        if (event.vector == DF && (contributory(second.vector) || second.vector == PF)) {
            cpu->pending.vector = -1;
            return CPU_STOP_SHUTDOWN;
        }
        /* A fault of an INT is reported at the INT. */
        rip -= (uint64_t)event.length;
        event = makes_double_fault(&event, second.vector) ? (struct event){.vector = DF} : second;
        if (second.vector == PF)
            cpu->env->cr[2] = second.address;
    }
}
