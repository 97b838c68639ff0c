/* Passes of Unicorn, and what the end of each means: a stop for who steers, or work of ours and another pass.
 *
 * A pass ends for one of four reasons. A hook asked for it: `cause` says why, and the first wins. A TLB fill was refused:
 * `refused` says why, `fault_address` for which linear address, and the instruction has not happened. An exception, or an
 * exit of the SVM kind. Or HLT. What raises an exception in the guest is only noted (`pending`); the next round delivers it
 * before anything is executed, and repeats the delivery if stage 2 interrupts it.
 *
 * Exact ends. Unicorn by itself looks for a stop after each load and store, when RIP is still on the instruction: after a
 * store it would happen twice. `no_exit_request`, which exists for the IT blocks of ARM, leaves these checks out. A step
 * wants them, because a read must be stopped before its value is used. With HF_GUEST set the CPU is the guest of an SVM host
 * that intercepts MSRs, writes to DR7, an INIT and the moment at which an interrupt or NMI could be taken: these end a pass
 * exactly, and no host is entered. An INIT is how others have a CPU look (kick). */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "inside.h"

_Thread_local struct cpu *current;

static _Thread_local const char *last_error = "";

const char *cpu_last_error(void)
{
    return last_error;
}

/* ---- exits of the SVM kind: AMD APM vol. 2, appendix C */

enum {
    VMEXIT = 0x100, /* and the number is the exception of the pass */
    EXIT_WRITE_DR5 = 0x35,
    EXIT_WRITE_DR7 = 0x37,
    EXIT_INTR = 0x60,
    EXIT_NMI = 0x61,
    EXIT_INIT = 0x63,
    EXIT_VINTR = 0x64,
    EXIT_MSR = 0x7c,
};
enum { INTERCEPT_DR = 1 << 5 | 1 << 7, REQUEST_VIRQ = 0x100, REQUEST_NMI = 0x200, REQUEST_INIT = 0x400 };
#define INTERCEPTS                                                                                                     \
    (1ULL << (EXIT_NMI - EXIT_INTR) | 1ULL << (EXIT_INIT - EXIT_INTR) | 1ULL << (EXIT_VINTR - EXIT_INTR) |             \
     1ULL << (EXIT_MSR - EXIT_INTR))

/* ---- making one */

enum { VMCB_MSRPM = 72, MSRPM_SIZE = 0x2000, CODE_BUFFER = 32 << 20 };

/* What QEMU reads of the host's control block: that every MSR is intercepted. */
static uint8_t *vmcb(void)
{
    static uint8_t *block;
    uint8_t *made = __atomic_load_n(&block, __ATOMIC_ACQUIRE);
    if (made)
        return made;
    made = mmap(NULL, PAGE + MSRPM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED)
        return NULL;
    memset(made + PAGE, 0xff, MSRPM_SIZE);
    uint64_t map = (uint64_t)made + PAGE;
    memcpy(made + VMCB_MSRPM, &map, sizeof(map));
    __atomic_store_n(&block, made, __ATOMIC_RELEASE);
    return made;
}

static bool open_unicorn(struct cpu *cpu)
{
    if (uc_open(UC_ARCH_X86, UC_MODE_64, &cpu->uc))
        return false;
    uc_ctl_set_tcg_buffer_size(cpu->uc, CODE_BUFFER);
    /* The richest model that Unicorn lets one choose; CPUID is answered by us, this decides what executes. */
    uc_ctl_set_cpu_model(cpu->uc, UC_CPU_X86_EPYC);
    uc_ctl_tlb_mode(cpu->uc, UC_TLB_VIRTUAL);
    uc_ctl_exits_enable(cpu->uc); /* emulation ends at an address, and 0 is one like another: an empty set has none */
    return !uc_mem_map_ptr(cpu->uc, PAGE, (1ULL << 48) - PAGE, UC_PROT_ALL, (void *)(uint64_t)PAGE);
}

static void prepare_registers(struct cpu *cpu)
{
    struct unicorn_state *at = &cpu->at;
    uint64_t fpcw = 0x37f, fptag = 0xffff, mxcsr = 0x1f80;
    uc_reg_write(cpu->uc, UC_X86_REG_FPCW, &fpcw);
    uc_reg_write(cpu->uc, UC_X86_REG_FPTAG, &fptag);
    uc_reg_write(cpu->uc, UC_X86_REG_MXCSR, &mxcsr);
    at->tail->vm_vmcb = (uint64_t)vmcb();
    at->tail->intercept = INTERCEPTS;
    at->tail->intercept_dr_write = INTERCEPT_DR;
    at->env->hflags |= HF_GUEST | HF_IOBPT;
    at->env->hflags2 |= HF2_GIF | HF2_VINTR; /* with VINTR, CR8 is v_tpr, and what is written to it stays */
    at->env->efer = 0;
    *at->no_exit_request = 1;
}

static bool make(struct cpu *cpu, struct cpu_block *block)
{
    if (block->abi != CPU_ABI || block->size != sizeof(*block)) {
        last_error = "the block is of another version of this library";
        errno = EINVAL;
        return false;
    }
    last_error = "no memory for another CPU";
    errno = ENOMEM;
    if (!vmcb() || !open_unicorn(cpu))
        return false;
    errno = ENOSYS;
    if (!unicorn_state_find(cpu->uc, &cpu->at, &last_error))
        return false;
    prepare_registers(cpu);
    errno = ENOMEM;
    last_error = "no memory for the hooks of another CPU";
    return tlb_hook(cpu) && state_hooks(cpu) && port_hooks(cpu) && fast_call_hooks(cpu);
}

struct cpu *cpu_create(struct cpu_space *space, struct cpu_block *block)
{
    struct cpu *cpu = calloc(1, sizeof(*cpu));
    if (!cpu)
        return NULL;
    cpu->space = space;
    cpu->block = block;
    cpu->interrupt = -1;
    cpu->physical_mask = (1ULL << 52) - 1;
    if (!make(cpu, block)) {
        int error = errno;
        if (cpu->uc)
            uc_close(cpu->uc);
        free(cpu);
        errno = error;
        return NULL;
    }
    space_add(space, cpu);
    tlb_flush(cpu);
    block->dirty = CPU_ALL;
    return cpu;
}

void cpu_destroy(struct cpu *cpu)
{
    space_remove(cpu->space, cpu);
    ticker_leave(cpu);
    uc_close(cpu->uc);
    free(cpu);
}

/* ---- stops */

struct cpu_stop *stop_begin(struct cpu *cpu, enum cpu_stop_kind kind)
{
    struct cpu_stop *stop = &cpu->block->stop;
    memset(stop, 0, offsetof(struct cpu_stop, data));
    stop->kind = kind;
    stop->access = CPU_ACCESS_ANY;
    return stop;
}

int stop_failed(struct cpu *cpu, const char *why)
{
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_FAILED);
    strncpy(stop->why, why, sizeof(stop->why) - 1);
    stop->value[0] = cpu->at.env->eip;
    return CPU_STOP_FAILED;
}

static int stop_missed(struct cpu *cpu, const struct refused *why, uint64_t offset)
{
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_MISS);
    stop->gpa = why->gpa + offset;
    stop->write = why->write;
    stop->fetch = why->fetch;
    stop->access = why->kind;
    cpu->block->misses++;
    return CPU_STOP_MISS;
}

static int stop_host_fault(struct cpu *cpu, const struct refused *why)
{
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_HOST_FAULT);
    stop->gpa = why->gpa;
    stop->hva = why->hva;
    stop->write = why->write;
    stop->access = why->kind;
    stop->host_signal = why->host_signal;
    return CPU_STOP_HOST_FAULT;
}

void pend(struct cpu *cpu, uint8_t vector, uint32_t error_code)
{
    cpu->pending = (struct event){.present = true, .vector = vector, .error_code = error_code};
}

static int after_refusal(struct cpu *cpu, const struct refused *why, uint64_t address, uint64_t offset)
{
    switch (why->why) {
    case REFUSED_GUEST:
        pend(cpu, why->vector, why->error_code);
        cpu->pending.address = address;
        return CPU_STOP_NONE;
    case REFUSED_HOST:
        return stop_host_fault(cpu, why);
    case REFUSED_CODE:
        tlb_flush_code(cpu);
        return CPU_STOP_NONE;
    case REFUSED_MMIO:
        if (why->gpa >= MMIO_BASE)
            return stop_failed(cpu, "a device above 2^51");
        if (!why->whole_page || why->fetch || cpu->mmio.active)
            return stop_failed(cpu, "a fetch, a page-table walk or a descriptor table in MMIO");
        mmio_begin_instruction(cpu);
        return CPU_STOP_NONE;
    default:
        return stop_missed(cpu, why, offset);
    }
}

int stop_not_done(struct cpu *cpu, const struct refused *why)
{
    struct refused copy = *why;
    copy.whole_page = false;
    return after_refusal(cpu, &copy, why->address, 0);
}

uint64_t linear_rip(const struct cpu *cpu)
{
    return cpu->at.env->segs[CS].base + cpu->at.env->eip;
}

void instruction_done(struct cpu *cpu)
{
    cpu->at.env->hflags &= ~(uint32_t)HF_INHIBIT_IRQ;
    cpu->at.env->eflags &= ~RFLAGS_RF;
}

void trap_if_traced(struct cpu *cpu)
{
    if (!(cpu->at.env->eflags & RFLAGS_TF))
        return;
    cpu->at.tail->dr[6] |= DR6_BS;
    pend(cpu, DB, 0);
}

/* ---- passes */

int cpu_emulate(struct cpu *cpu)
{
    cpu->cause = NO_CAUSE;
    cpu->refused.why = NOT_REFUSED;
    cpu->emulating = true;
    int code = uc_emu_start(cpu->uc, cpu->at.env->eip, 0, 0, 0);
    cpu->emulating = false;
    cpu->fault_address = *cpu->at.fault_address;
    cpu->exception = cpu->at.pass_end->exception_index;
    return code;
}

enum { NOT_STEPPED = -1 }; /* it was kicked while it waited to be alone */

/* Blocks of one instruction are translated without host atomics (atomic.c), so one that locks is executed alone. */
static int step(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    uint64_t traced = env->eflags & RFLAGS_TF, dr6 = cpu->at.tail->dr[6];
    __atomic_store_n(&cpu->stepping, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(cpu->at.interrupt_request, 0, __ATOMIC_SEQ_CST);
    *cpu->at.no_exit_request = 0;
    env->eflags |= RFLAGS_TF;
    int code = cpu_emulate(cpu);
    env->eflags = (env->eflags & ~RFLAGS_TF) | traced;
    cpu->at.tail->dr[6] = dr6;
    *cpu->at.no_exit_request = 1;
    __atomic_store_n(&cpu->stepping, 0, __ATOMIC_SEQ_CST);
    return code;
}

static int step_alone(struct cpu *cpu)
{
    if (!world_stop(cpu))
        return NOT_STEPPED;
    int code = step(cpu);
    world_go(cpu);
    return code;
}

int cpu_step(struct cpu *cpu)
{
    if (locks_at_rip(cpu))
        return step_alone(cpu);
    int code = step(cpu);
    bool refused = code == UC_ERR_INSN_INVALID || (code == UC_ERR_EXCEPTION && cpu->exception == NM);
    return refused && is_refused_as_sse(cpu) ? step_as_general(cpu, step) : code;
}

void sealed_pass(struct cpu *cpu)
{
    tlb_flush(cpu);
    cpu->sealed = true;
    cpu_emulate(cpu);
    cpu->sealed = false;
}

/* ---- the end of a pass */

static int after_hook(struct cpu *cpu)
{
    switch (cpu->cause) {
    case CAUSE_PORT_OUT:
        return port_out_done(cpu);
    case CAUSE_PORT_IN:
        return port_in_stop(cpu);
    case CAUSE_PORT_IN_DONE:
        return port_in_done(cpu);
    case CAUSE_PORT_REFUSED:
        return port_refused(cpu);
    case CAUSE_SYSCALL:
    case CAUSE_SYSENTER:
        fast_call(cpu, cpu->cause == CAUSE_SYSCALL);
        return CPU_STOP_NONE;
    case CAUSE_MMIO_READ:
        return CPU_STOP_MMIO_READ;
    default:
        return stop_failed(cpu, "an access of two pages, one of which is MMIO");
    }
}

/* A block fetches its next page before its earlier instructions have run; a refused fetch beyond the page of RIP is believed
 * only if a single step repeats it. */
static int after_refused_fill(struct cpu *cpu, bool stepped)
{
    uint64_t address = cpu->fault_address;
    bool ahead = (address ^ linear_rip(cpu)) & PAGE_MASK;
    struct refused why = cpu->refused;
    if (cpu->refused_access == FETCH && !stepped && ahead && why.why != REFUSED_CODE)
        return cpu_judge(cpu, cpu_step(cpu), true);
    return after_refusal(cpu, &why, address, why.whole_page ? address & (PAGE - 1) : 0);
}

/* Let the instruction happen; then port instructions look for breakpoints again, whatever DR7 says. */
static int write_dr7(struct cpu *cpu)
{
    cpu->at.tail->intercept_dr_write = 0;
    int code = cpu_step(cpu);
    cpu->at.tail->intercept_dr_write = INTERCEPT_DR;
    cpu->at.env->hflags |= HF_IOBPT;
    return cpu_judge(cpu, code, true);
}

/* INT3 and INTO have one byte, INT n has two; RIP is past it. */
static uint8_t int_length(struct cpu *cpu, int vector)
{
    uint8_t byte = 0;
    if (vector == BP || vector == OF)
        linear_code(cpu, linear_rip(cpu) - 1, &byte, 1);
    return byte == 0xcc || byte == 0xce ? 1 : 2;
}

static void take_exception(struct cpu *cpu, int vector)
{
    struct env_tail *tail = cpu->at.tail;
    uint8_t length = tail->exception_is_int ? int_length(cpu, vector) : 0;
    pend(cpu, (uint8_t)vector, (uint32_t)tail->error_code);
    cpu->pending.length = length;
    /* QEMU would take the next exception for a second one inside of the delivery of this, and Unicorn would move RIP past an
     * INT that is long done. */
    tail->old_exception = -1;
    tail->exception_is_int = 0;
}

/* Which page it was: the fills of the instruction say, in a step. */
static int after_host_fault(struct cpu *cpu)
{
    tlb_flush(cpu);
    cpu->find_gpa = true;
    int code = cpu_step(cpu);
    cpu->find_gpa = false;
    tlb_flush(cpu);
    if (code == UC_ERR_EXCEPTION && cpu->exception == EXIT_HOST_FAULT && cpu->refused.why == NOT_REFUSED)
        return stop_failed(cpu, "a fault of the host that no access of the guest explains");
    return cpu_judge(cpu, code, true);
}

static int after_exception(struct cpu *cpu, bool stepped)
{
    switch (cpu->exception) {
    case EXIT_ATOMIC:
        return cpu_judge(cpu, step_alone(cpu), true);
    case EXIT_HOST_FAULT:
        return after_host_fault(cpu);
    case VMEXIT + EXIT_MSR:
        return msr_instruction(cpu);
    case VMEXIT + EXIT_WRITE_DR5:
    case VMEXIT + EXIT_WRITE_DR7:
        return write_dr7(cpu);
    case NM:
        if (!stepped && is_refused_as_sse(cpu))
            return cpu_judge(cpu, cpu_step(cpu), true);
        break;
    case DB:
        if (stepped) {
            trap_if_traced(cpu);
            return CPU_STOP_NONE;
        }
        break;
    default:
        break;
    }
    if (cpu->exception < VMEXIT)
        take_exception(cpu, cpu->exception);
    return CPU_STOP_NONE; /* the others end a pass so that we look */
}

int cpu_judge(struct cpu *cpu, int code, bool stepped)
{
    if (code == NOT_STEPPED)
        return CPU_STOP_NONE;
    if (cpu->cause != NO_CAUSE)
        return after_hook(cpu);
    if (cpu->refused.why != NOT_REFUSED)
        return after_refused_fill(cpu, stepped);
    switch (code) {
    case UC_ERR_OK:
        stop_begin(cpu, CPU_STOP_HALT);
        return CPU_STOP_HALT;
    case UC_ERR_INSN_INVALID:
        if (!stepped && is_refused_as_sse(cpu))
            return cpu_judge(cpu, cpu_step(cpu), true);
        return guest_call(cpu);
    case UC_ERR_EXCEPTION:
        return after_exception(cpu, stepped);
    default:
        return stop_failed(cpu, uc_strerror(code));
    }
}

/* ---- interrupts and NMIs from outside. Between two passes the moment is looked for in the registers; during one the CPU
 * looks for it, and exits in front of the first instruction at which it could be taken. A masked NMI waits for the IRET.
 * Source: arch/x86/kvm/x86.c kvm_check_and_inject_events, dm_request_for_irq_injection */

static bool take_nmi(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    if (!cpu->nmi || env->hflags2 & HF2_NMI || env->hflags & HF_INHIBIT_IRQ)
        return false;
    cpu->nmi = false;
    env->hflags2 |= HF2_NMI;
    pend(cpu, NMI, 0);
    cpu->pending.external = true;
    return true;
}

static bool is_open(const struct cpu *cpu)
{
    return cpu->at.env->eflags & RFLAGS_IF && !(cpu->at.env->hflags & HF_INHIBIT_IRQ);
}

static int advance_debugged(struct cpu *cpu);

static int advance_interrupted(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    uint32_t request = 0;
    if (take_nmi(cpu))
        return CPU_STOP_NONE;
    if (cpu->interrupt >= 0 && is_open(cpu)) {
        pend(cpu, (uint8_t)cpu->interrupt, 0);
        cpu->pending.external = true;
        cpu->interrupt = -1;
        return CPU_STOP_NONE;
    }
    if (cpu->block->request_interrupt_window && cpu->interrupt < 0 && is_open(cpu)) {
        stop_begin(cpu, CPU_STOP_WINDOW);
        return CPU_STOP_WINDOW;
    }
    if (debug_wants_step(cpu))
        return advance_debugged(cpu);
    if (cpu->nmi && !(env->hflags2 & HF2_NMI)) /* only the shadow keeps it off: one instruction, and it is taken */
        return cpu_judge(cpu, cpu_step(cpu), true);
    if (cpu->nmi)
        request |= REQUEST_NMI;
    if (cpu->interrupt >= 0 || cpu->block->request_interrupt_window)
        request |= REQUEST_VIRQ;
    __atomic_or_fetch(cpu->at.interrupt_request, request, __ATOMIC_SEQ_CST);
    int stop = cpu_judge(cpu, cpu_emulate(cpu), false);
    __atomic_and_fetch(cpu->at.interrupt_request, (uint32_t)REQUEST_INIT, __ATOMIC_SEQ_CST);
    return stop;
}

/* ---- rounds */

static int deliver_pending(struct cpu *cpu)
{
    int stop = debug_before_delivery(cpu);
    if (stop != CPU_STOP_NONE)
        return stop;
    cpu->block->deliveries++;
    stop = deliver(cpu);
    return stop == CPU_STOP_NONE ? debug_after_step(cpu) : stop;
}

/* An instruction that raises an exception is not done before that is delivered, and one that was refused is repeated. */
static int after_debugged(struct cpu *cpu, int stop)
{
    bool done = !cpu->pending.present && !cpu->mmio.active && cpu->refused.why == NOT_REFUSED;
    return stop == CPU_STOP_NONE && done ? debug_after_step(cpu) : stop;
}

static int advance_debugged(struct cpu *cpu)
{
    int stop = debug_before_step(cpu);
    if (stop != CPU_STOP_NONE)
        return stop;
    int code = cpu_step(cpu);
    return code == NOT_STEPPED ? CPU_STOP_NONE : after_debugged(cpu, cpu_judge(cpu, code, true));
}

static bool waits_for_moment(const struct cpu *cpu)
{
    return cpu->interrupt >= 0 || cpu->nmi || cpu->block->request_interrupt_window;
}

static int advance(struct cpu *cpu)
{
    if (cpu->pending.present)
        return deliver_pending(cpu);
    if (cpu->mmio.active)
        return after_debugged(cpu, mmio_advance(cpu));
    mmio_release(cpu);
    debug_release(cpu);
    if (waits_for_moment(cpu) && !debug_blocks_interrupts(cpu))
        return advance_interrupted(cpu);
    if (debug_wants_step(cpu))
        return advance_debugged(cpu);
    return cpu_judge(cpu, cpu_emulate(cpu), false);
}

static int stop_plainly(struct cpu *cpu, enum cpu_stop_kind kind)
{
    stop_begin(cpu, kind);
    return kind;
}

/* At a boundary, when somebody wants it to be looked. */
static int look(struct cpu *cpu)
{
    if (!__atomic_exchange_n(&cpu->slice_over, 0, __ATOMIC_SEQ_CST)) {
        if (space_generation(cpu->space) != cpu->seen_generation)
            tlb_look(cpu);
        return CPU_STOP_NONE;
    }
    __atomic_and_fetch(cpu->at.interrupt_request, ~(uint32_t)REQUEST_INIT, __ATOMIC_SEQ_CST);
    world_yield(cpu);
    tlb_look(cpu);
    if (__atomic_exchange_n(&cpu->kicked, 0, __ATOMIC_SEQ_CST))
        return stop_plainly(cpu, CPU_STOP_KICKED);
    if (signals_wait(cpu))
        return stop_plainly(cpu, CPU_STOP_SIGNAL);
    if (mode != CPU_MODE_SLICES || cpu->mmio.active)
        return CPU_STOP_NONE;
    cpu->block->slices++;
    return stop_plainly(cpu, CPU_STOP_SLICE);
}

/* ---- what the last stop asked for */

static bool is_past_instruction(uint32_t kind)
{
    return kind == CPU_STOP_HYPERCALL || kind == CPU_STOP_VMGEXIT;
}

static int finish_mmio(struct cpu *cpu, const struct cpu_answer *answer)
{
    uint64_t value;
    int stop = CPU_STOP_NONE;
    memcpy(&value, answer->data, sizeof(value));
    mmio_supply(cpu, value);
    while (cpu->mmio.active && stop == CPU_STOP_NONE)
        stop = advance(cpu);
    return stop;
}

static int finish(struct cpu *cpu, const struct cpu_answer *answer, uint32_t asked)
{
    switch (asked) {
    case CPU_STOP_PORT_IN:
        return port_answer(cpu);
    case CPU_STOP_MMIO_READ:
        return finish_mmio(cpu, answer);
    case CPU_STOP_RDMSR:
    case CPU_STOP_WRMSR:
        msr_finish(cpu, answer->value);
        break;
    case CPU_STOP_HYPERCALL:
    case CPU_STOP_PVALIDATE:
    case CPU_STOP_RMPADJUST:
    case CPU_STOP_VMGEXIT:
    case CPU_STOP_TDCALL:
        guest_call_finish(cpu, asked, answer->value);
        break;
    default:
        return CPU_STOP_NONE;
    }
    if (!is_past_instruction(asked))
        trap_if_traced(cpu);
    return CPU_STOP_NONE;
}

static int apply_answer(struct cpu *cpu)
{
    struct cpu_answer *answer = &cpu->block->answer;
    uint32_t kind = answer->kind, asked = cpu->block->stop.kind;
    answer->kind = CPU_ANSWER_NONE;
    if (kind != CPU_ANSWER_NONE)
        cpu->block->stop.kind = CPU_STOP_NONE; /* a second answer is nobody's */
    if (kind == CPU_ANSWER_VALUE)
        return finish(cpu, answer, asked);
    if (kind != CPU_ANSWER_RAISE)
        return CPU_STOP_NONE;
    if (is_past_instruction(asked))
        cpu->at.env->eip = cpu->call_start;
    mmio_forget(cpu);
    pend(cpu, (uint8_t)answer->vector, answer->error_code);
    return CPU_STOP_NONE;
}

/* What who steers has written. Somewhere else by RIP, nothing asks any more. */
static void take_state(struct cpu *cpu)
{
    struct cpu_block *block = cpu->block;
    uint32_t dirty = __atomic_exchange_n(&block->dirty, 0, __ATOMIC_SEQ_CST);
    uint64_t rip = cpu->at.env->eip;
    if (!dirty)
        return;
    state_load(cpu, dirty);
    if (!(dirty & CPU_REGS) || cpu->at.env->eip == rip)
        return;
    block->answer.kind = CPU_ANSWER_NONE;
    cpu->next_stop = CPU_STOP_NONE;
    cpu->mmio.write_next = cpu->mmio.write_count;
    mmio_forget(cpu);
}

/* ---- runs */

static void enter(struct cpu *cpu)
{
    current = cpu;
    world_enter(cpu);
    tlb_look(cpu);
    if (!code_unchanged(cpu))
        tlb_flush_code(cpu);
    take_state(cpu);
}

static void leave(struct cpu *cpu)
{
    code_run_ended(cpu);
    state_store(cpu);
    world_leave(cpu);
    current = NULL;
}

int cpu_run(struct cpu *cpu)
{
    cpu->block->runs++;
    enter(cpu);
    int stop = cpu->next_stop;
    cpu->next_stop = CPU_STOP_NONE;
    if (stop == CPU_STOP_NONE)
        stop = apply_answer(cpu);
    if (stop == CPU_STOP_NONE)
        stop = mmio_next_write(cpu);
    if (stop == CPU_STOP_NONE && signals_wait(cpu))
        stop = stop_plainly(cpu, CPU_STOP_SIGNAL);
    while (stop == CPU_STOP_NONE) {
        stop = look(cpu);
        if (stop == CPU_STOP_NONE)
            stop = advance(cpu);
    }
    leave(cpu);
    return stop;
}

void cpu_settle(struct cpu *cpu)
{
    enter(cpu);
    if (cpu->next_stop == CPU_STOP_NONE)
        cpu->next_stop = apply_answer(cpu);
    leave(cpu);
}

void cpu_flush(struct cpu *cpu)
{
    tlb_flush(cpu);
}
