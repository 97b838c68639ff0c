/* The passes of one CPU, and what the end of each means: a stop, or work of ours and another pass.
 *
 * advance() is one such round. What raises an exception in the guest is only noted (`pending`); the next round delivers it
 * before it executes anything, and repeats the delivery if stage 2 interrupts it.
 *
 * Unicorn translates a block as a whole, and for that fetches the next page while the instructions before the page boundary
 * have not run. So a refused fetch beyond the page of RIP is believed only if a single step repeats it. */
#define _GNU_SOURCE
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int fail(struct cpu *cpu, const char *why, ...)
{
    va_list arguments;
    va_start(arguments, why);
    vsnprintf(cpu->block->stop.why, sizeof cpu->block->stop.why, why, arguments);
    va_end(arguments);
    return CPU_STOP_FAILED;
}

void raise_event(struct cpu *cpu, int vector, uint32_t error_code, uint64_t address, int length, bool external)
{
    cpu->pending = (struct event){vector, error_code, length, external, address};
}

uint64_t linear_rip(const struct cpu *cpu)
{
    return cpu->env->segs[CS].base + cpu->env->eip;
}

/* RIP moves past an instruction that we have done, and what lasts for one instruction is over. */
void instruction_done(struct cpu *cpu, uint64_t rip)
{
    cpu->env->eip = rip;
    cpu->env->hflags &= ~(uint32_t)HF_INHIBIT_IRQ;
    cpu->env->eflags &= ~(uint64_t)RFLAGS_RF;
}

static bool is_stepped(const struct cpu *cpu)
{
    const uint32_t asked = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    return (cpu->block->guest_debug.control & asked) == asked;
}

static int debug_stop(struct cpu *cpu, int vector, uint64_t dr6)
{
    struct cpu_stop *stop = &cpu->block->stop;
    stop->nr = (uint64_t)vector;
    stop->value[0] = linear_rip(cpu);
    stop->value[1] = dr6;
    stop->value[2] = cpu->tail->dr[7];
    cpu->tail->dr[6] &= ~15ull; /* the guest's, which did not hit */
    return CPU_STOP_DEBUG;
}

/* RFLAGS.TF of the guest: #DB follows the instruction that was just completed. */
void trap_if_traced(struct cpu *cpu)
{
    if (is_stepped(cpu)) {
        cpu->step_done = true;
    } else if (cpu->env->eflags & RFLAGS_TF) {
        cpu->tail->dr[6] |= DR6_BS;
        raise_event(cpu, DB, 0, 0, 0, false);
    }
}

/* The stop for a page that cannot be used. As MMIO it is of no use to the CPU itself. */
static int missed(struct cpu *cpu, uint64_t offset)
{
    const struct refusal *why = &cpu->refused;
    struct cpu_stop *stop = &cpu->block->stop;
    if (mmio_covers(cpu, why->gpa))
        return fail(cpu, "a fetch, a page-table walk or a descriptor table in MMIO");
    stop->gpa = why->gpa + offset;
    stop->write = why->write;
    stop->fetch = why->fetch;
    stop->access = why->access;
    cpu->block->misses++;
    return CPU_STOP_MISS;
}

static int host_fault(struct cpu *cpu)
{
    struct cpu_stop *stop = &cpu->block->stop;
    stop->gpa = cpu->refused.gpa;
    stop->hva = cpu->refused.hva;
    stop->write = cpu->refused.write;
    stop->fetch = cpu->refused.fetch;
    stop->access = cpu->refused.access;
    stop->host_signal = cpu->fault_signal;
    return CPU_STOP_HOST_FAULT;
}

/* Something that was rolled back, or has not begun: the stop for cpu->refused, or 0 with an exception pending. */
int not_done(struct cpu *cpu)
{
    const struct refusal *why = &cpu->refused;
    switch (why->kind) {
    case REFUSED_GUEST:
        raise_event(cpu, why->vector, why->error_code, why->address, 0, false);
        return CPU_STOP_NONE;
    case REFUSED_HOST:
        return host_fault(cpu);
    case REFUSED_MMIO:
        return fail(cpu, "a fetch, a page-table walk or a descriptor table in MMIO");
    default:
        return missed(cpu, 0);
    }
}

/* One that uses MMIO begins with the first of its accesses again. */
int step(struct cpu *cpu)
{
    return mmio_active(cpu) ? advance_mmio(cpu) : judge(cpu, single_step(cpu), true);
}

/* Alone in the guest: what the host cannot do at once. */
static int step_alone(struct cpu *cpu)
{
    if (!begin_exclusive(cpu))
        return CPU_STOP_NONE;
    /* Others may have changed leaves and code while this CPU was out. */
    tlb_flush(cpu);
    int stop = step(cpu);
    end_exclusive(cpu);
    return stop;
}

static int after_refusal(struct cpu *cpu, bool stepped)
{
    struct refusal *why = &cpu->refused;
    uint64_t address = *cpu->fault_address;
    if (why->asked == FETCH && !stepped && (address ^ linear_rip(cpu)) & PAGE_MASK)
        return judge(cpu, single_step(cpu), true);
    if (why->kind == REFUSED_GUEST) {
        raise_event(cpu, why->vector, why->error_code, address, 0, false);
        return CPU_STOP_NONE;
    }
    if (why->kind == REFUSED_MMIO && why->whole_page && why->asked != FETCH)
        return mmio_add_page(cpu, why->gpa);
    if (why->kind == REFUSED_STAGE2)
        return missed(cpu, why->whole_page ? address % PAGE : 0);
    return not_done(cpu);
}

/* Lets the instruction happen; then port instructions look for breakpoints again, whatever DR7 says. */
static int write_dr7(struct cpu *cpu)
{
    cpu->tail->intercept_dr_write = 0;
    int code = single_step(cpu);
    cpu->tail->intercept_dr_write = DR_WRITES;
    cpu->env->hflags |= HF_IOBPT;
    uc_ctl_flush_tlb(cpu->uc); /* pages with breakpoints on data become slow, others fast */
    return judge(cpu, code, true);
}

static int exception_raised(struct cpu *cpu, int vector)
{
    struct uc_tail *tail = cpu->tail;
    uint32_t debug = cpu->block->guest_debug.control;
    int length = tail->exception_is_int ? int_length(cpu, vector) : 0;
    /* QEMU would take the next exception for a second one inside of the delivery of this, and Unicorn would move RIP past
     * an INT that is long done. */
    tail->old_exception = -1;
    tail->exception_is_int = 0;
    if (debug & KVM_GUESTDBG_ENABLE && debug & KVM_GUESTDBG_USE_SW_BP && vector == BP && length == 1) {
        cpu->env->eip -= 1;
        return debug_stop(cpu, BP, 0);
    }
    if (debug & KVM_GUESTDBG_ENABLE && debug & KVM_GUESTDBG_USE_HW_BP && vector == DB)
        return debug_stop(cpu, DB, tail->dr[6]);
    raise_event(cpu, vector, (uint32_t)tail->error_code, 0, length, false);
    return CPU_STOP_NONE;
}

/* A breakpoint on data traps after its instruction. */
static int after_watch(struct cpu *cpu)
{
    int stop = step_watched(cpu);
    if (!cpu->watch_hits || (stop && stop != CPU_STOP_MMIO_WRITE))
        return stop;
    uint64_t dr6 = cpu->tail->dr[6] | cpu->watch_hits;
    if (cpu->host_breakpoints) {
        if (stop)
            cpu->mmio.write_next = 0; /* told after this one */
        return debug_stop(cpu, DB, dr6);
    }
    cpu->tail->dr[6] = dr6;
    if (cpu->pending.vector < 0)
        raise_event(cpu, DB, 0, 0, 0, false);
    return stop;
}

/* An exception of the guest, or VMEXIT and the number of an exit, with RIP on the instruction. */
static int after_exception(struct cpu *cpu, int vector, bool stepped)
{
    if (vector == EXIT_FAULT)
        return after_fault(cpu);
    if (vector == EXIT_WATCH)
        return after_watch(cpu);
    if (vector == EXIT_ATOMIC)
        return step_alone(cpu);
    if (stepped && vector == DB) {
        trap_if_traced(cpu);
        return CPU_STOP_NONE;
    }
    if (vector == VMEXIT + EXIT_MSR)
        return access_msr(cpu);
    if (vector == VMEXIT + EXIT_WRITE_DR5 || vector == VMEXIT + EXIT_WRITE_DR7)
        return write_dr7(cpu);
    /* The rest of the exits is looked at before the next pass. */
    return vector < VMEXIT ? exception_raised(cpu, vector) : CPU_STOP_NONE;
}

static int after_hook(struct cpu *cpu)
{
    switch (cpu->cause) {
    case CAUSE_SYSCALL:
    case CAUSE_SYSENTER:
        enter_kernel(cpu, cpu->cause);
        return CPU_STOP_NONE;
    default:
        return port_stop(cpu);
    }
}

/* What the end of a pass means. `code` is Unicorn's error; `stepped`: the pass was to be of one instruction. */
int judge(struct cpu *cpu, int code, bool stepped)
{
    if (cpu->cause)
        return after_hook(cpu);
    if (cpu->refused.kind)
        return after_refusal(cpu, stepped);
    switch (code) {
    case UC_ERR_OK:
        return CPU_STOP_HALT;
    case UC_ERR_INSN_INVALID:
        return guest_call(cpu);
    case UC_ERR_EXCEPTION:
        return after_exception(cpu, cpu->pass_end->exception_index, stepped);
    default:
        return fail(cpu, "%s", uc_strerror((uc_err)code));
    }
}

static int advance_interrupted(struct cpu *cpu)
{
    bool taken;
    int stop = poll_interrupts(cpu, &taken);
    if (stop || taken)
        return stop;
    if (must_step(cpu) || is_stepped(cpu))
        return judge(cpu, single_step(cpu), true);
    int code = emulate(cpu);
    set_interrupt_request(cpu, 0, REQUEST_VIRQ | REQUEST_NMI);
    return judge(cpu, code, false);
}

/* One round. 0: nothing for the caller yet. */
int advance(struct cpu *cpu)
{
    if (cpu->step_done && is_stepped(cpu)) {
        cpu->step_done = false;
        return debug_stop(cpu, DB, 0xffff0ff0 | DR6_BS);
    }
    if (cpu->pending.vector >= 0) {
        int stop = deliver_pending(cpu);
        if (stop)
            return stop;
    }
    if (mmio_active(cpu))
        return advance_mmio(cpu);
    mmio_release(cpu);
    if (cpu->interrupt >= 0 || cpu->nmi || cpu->block->request_interrupt_window)
        return advance_interrupted(cpu);
    if (is_stepped(cpu))
        return judge(cpu, single_step(cpu), true);
    return judge(cpu, emulate(cpu), false);
}

/* Leaves that were dropped are forgotten. */
void look_at_space(struct cpu *cpu)
{
    uint64_t generation = space_generation(cpu->space);
    if (cpu->seen_generation == generation)
        return;
    tlb_flush(cpu);
    __atomic_store_n(&cpu->seen_generation, generation, __ATOMIC_SEQ_CST);
}

static bool signal_waits(const struct cpu *cpu)
{
    sigset_t pending;
    uint64_t waiting;
    if (!cpu->watched_signals || sigpending(&pending))
        return false;
    memcpy(&waiting, &pending, sizeof waiting);
    return waiting & cpu->watched_signals;
}

static int after_tick(struct cpu *cpu)
{
    tlb_slice_over(cpu);
    cpu->block->slices++;
    if (signal_waits(cpu))
        return CPU_STOP_SIGNAL;
    if (cpu_mode == CPU_MODE_SLICES)
        return CPU_STOP_SLICE;
    if (yield_guest(cpu))
        return CPU_STOP_NONE;
    atomic_store(&cpu->out, true);
    return CPU_STOP_KICKED;
}

/* What other threads want, between two rounds. The stop, or 0. */
int take_kicks(struct cpu *cpu)
{
    struct cpu *alone = atomic_load(space_exclusive(cpu->space));
    look_at_space(cpu);
    if (!atomic_load(&cpu->kicks) && (!alone || alone == cpu))
        return CPU_STOP_NONE;
    set_interrupt_request(cpu, 0, REQUEST_INIT);
    uint32_t kicks = atomic_exchange(&cpu->kicks, 0);
    if (kicks & KICK_WORK)
        code_take_messages(cpu, 0);
    if (alone && alone != cpu && !yield_guest(cpu))
        atomic_store(&cpu->out, true);
    if (kicks & KICK_USER || cpu->out) {
        atomic_fetch_and(&cpu->kicks, ~(uint32_t)KICK_USER);
        return CPU_STOP_KICKED;
    }
    int stop = kicks & KICK_TICK ? after_tick(cpu) : CPU_STOP_NONE;
    look_at_space(cpu);
    return stop;
}
