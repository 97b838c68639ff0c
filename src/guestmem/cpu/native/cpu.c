/* A CPU as its users have it: made, run, answered, given back. */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__thread struct cpu *current_cpu;
enum cpu_mode cpu_mode = CPU_MODE_SLICES;
static __thread char last_error[128];

void set_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
}

const char *cpu_last_error(void)
{
    return last_error;
}

void cpu_set_mode(enum cpu_mode mode)
{
    cpu_mode = mode;
}

static struct kvm_segment reset_segment(uint64_t base, uint16_t selector, uint8_t type, uint8_t s)
{
    return (struct kvm_segment){.base = base, .limit = 0xffff, .selector = selector, .type = type, .present = 1, .s = s};
}

/* Intel SDM vol. 3, table 10-1. RDX is the signature of the processor; KVM gives 0x600 before it knows one. */
void cpu_block_init(struct cpu_block *block)
{
    memset(block, 0, sizeof *block);
    block->abi = CPU_ABI;
    block->size = sizeof *block;
    block->regs = (struct kvm_regs){.rip = 0xfff0, .rdx = 0x600, .rflags = 2};
    struct kvm_segment data = reset_segment(0, 0, 3, 1);
    block->sregs = (struct kvm_sregs){.cs = reset_segment(0xffff0000, 0xf000, 11, 1),
                                      .ds = data,
                                      .es = data,
                                      .fs = data,
                                      .gs = data,
                                      .ss = data,
                                      .tr = reset_segment(0, 0, 11, 0),
                                      .ldt = reset_segment(0, 0, 2, 0),
                                      .gdt = {.limit = 0xffff},
                                      .idt = {.limit = 0xffff},
                                      .cr0 = 0x60000010,
                                      .apic_base = 0xfee00900};
    block->debug.dr6 = 0xffff0ff0;
    block->debug.dr7 = 0x400;
    block->xcr0 = 1;
    *(uint16_t *)block->xsave = 0x37f;
    *(uint32_t *)(block->xsave + 24) = 0x1f80;
    *(uint32_t *)(block->xsave + 28) = 0xffff;
    block->xsave[512] = 3;
    msrs_reset(block);
    block->dirty = CPU_ALL;
}

struct cpu *cpu_create(struct cpu_space *space, struct cpu_block *block)
{
    if (block->abi != CPU_ABI || block->size != sizeof *block) {
        set_error("the block is of another ABI: %u, %u bytes", block->abi, block->size);
        errno = EINVAL;
        return NULL;
    }
    if (!layout_check()) {
        errno = ENOSYS;
        return NULL;
    }
    struct cpu *cpu = calloc(1, sizeof *cpu);
    if (cpu && (cpu->code = code_map_create())) {
        cpu->space = space;
        cpu->block = block;
        cpu->pending.vector = cpu->interrupt = -1;
        pthread_mutex_init(&cpu->inbox.lock, NULL);
        if (pass_open(cpu) && add_port_hooks(cpu) && add_instruction_hooks(cpu)) {
            cpu->env->efer = 0;
            block->dirty = CPU_ALL;
            space_add(space, cpu);
            slices_add(cpu);
            return cpu;
        }
        if (cpu->uc)
            uc_close(cpu->uc);
        code_map_destroy(cpu->code);
    }
    free(cpu);
    set_error("no memory for a CPU");
    errno = ENOMEM;
    return NULL;
}

void cpu_destroy(struct cpu *cpu)
{
    slices_remove(cpu);
    space_remove(cpu->space, cpu);
    uc_close(cpu->uc);
    code_map_destroy(cpu->code);
    pthread_mutex_destroy(&cpu->inbox.lock);
    free(cpu);
}

/* What may be executed without another fetch is compared; memory that cannot be read is fetched again. */
static void compare_code(struct cpu *cpu)
{
    sigjmp_buf fault;
    if (sigsetjmp(fault, 0)) {
        cpu->guard = NULL;
        tlb_flush(cpu);
        return;
    }
    cpu->guard = &fault;
    code_check_live(cpu);
    cpu->guard = NULL;
}

static void code_ended(struct cpu *cpu)
{
    sigjmp_buf fault;
    if (!sigsetjmp(fault, 0)) {
        cpu->guard = &fault;
        code_run_ended(cpu);
    }
    cpu->guard = NULL;
}

/* RDMSR: the value to EDX:EAX. */
static void complete_msr(struct cpu *cpu, const struct question *asked, uint64_t value)
{
    if (asked->kind == CPU_STOP_RDMSR) {
        cpu->env->regs[RAX] = (uint32_t)value;
        cpu->env->regs[RDX] = value >> 32;
    }
    instruction_done(cpu, asked->start + asked->length);
    trap_if_traced(cpu);
}

static int complete_mmio(struct cpu *cpu, uint64_t value)
{
    int stop = CPU_STOP_NONE;
    mmio_supply(cpu, value);
    while (mmio_active(cpu) && !stop) {
        stop = take_kicks(cpu);
        if (!stop)
            stop = advance(cpu);
    }
    return stop;
}

/* The value that the last stop asked for. What its instruction met next, or 0. */
static int complete(struct cpu *cpu, const struct question *asked, const struct cpu_answer *answer)
{
    uint64_t value;
    switch (asked->kind) {
    case CPU_STOP_PORT_IN:
        return port_answer(cpu, answer->data);
    case CPU_STOP_MMIO_READ:
        memcpy(&value, answer->data, sizeof value);
        return complete_mmio(cpu, value);
    case CPU_STOP_RDMSR:
    case CPU_STOP_WRMSR:
        complete_msr(cpu, asked, answer->value);
        break;
    default:
        complete_call(cpu, asked, answer->value);
    }
    return CPU_STOP_NONE;
}

/* What block->answer says about the last stop. */
static void take_answer(struct cpu *cpu)
{
    struct question asked = cpu->asked;
    struct cpu_answer *answer = &cpu->block->answer;
    uint32_t kind = answer->kind;
    answer->kind = CPU_ANSWER_NONE;
    cpu->asked.kind = CPU_STOP_NONE;
    if (kind == CPU_ANSWER_VALUE && asked.kind) {
        cpu->next = complete(cpu, &asked, answer);
    } else if (kind == CPU_ANSWER_MMIO && asked.kind == CPU_STOP_MISS) {
        cpu->next = mmio_add_page(cpu, answer->value);
    } else if (kind == CPU_ANSWER_RAISE) {
        /* At the instruction, which has not happened. */
        if (asked.kind == CPU_STOP_HYPERCALL || asked.kind == CPU_STOP_VMGEXIT)
            cpu->env->eip = asked.start;
        raise_event(cpu, (int)(answer->vector & 255), answer->error_code, 0, 0, false);
    }
}

static bool enter(struct cpu *cpu)
{
    current_cpu = cpu;
    slice_begins(cpu, cpu->block->stop.kind == CPU_STOP_MISS);
    cpu->out = !enter_guest(cpu);
    return !cpu->out;
}

static void leave(struct cpu *cpu)
{
    code_ended(cpu);
    store_state(cpu);
    if (!cpu->out)
        leave_guest(cpu);
    slice_ends(cpu);
    current_cpu = NULL;
}

static bool asks(int kind)
{
    return kind == CPU_STOP_PORT_IN || kind == CPU_STOP_MMIO_READ || (kind >= CPU_STOP_RDMSR && kind <= CPU_STOP_TDCALL);
}

static int execute(struct cpu *cpu)
{
    int stop = cpu->next;
    cpu->next = CPU_STOP_NONE;
    if (!stop)
        stop = mmio_next_write(cpu);
    while (!stop && !(stop = take_kicks(cpu)))
        stop = advance(cpu);
    return stop;
}

/* What was kicked before it entered. */
static int not_entered(struct cpu *cpu)
{
    atomic_fetch_and(&cpu->kicks, ~(uint32_t)KICK_USER);
    return CPU_STOP_KICKED;
}

int cpu_run(struct cpu *cpu)
{
    int stop;
    bool in = enter(cpu);
    cpu->block->runs++;
    load_state(cpu);
    if (in) {
        look_at_space(cpu);
        compare_code(cpu);
        take_answer(cpu);
        stop = execute(cpu);
        cpu->asked.kind = asks(stop) || stop == CPU_STOP_MISS ? stop : CPU_STOP_NONE;
        cpu->asked.size = cpu->block->stop.size;
    } else {
        stop = not_entered(cpu);
    }
    cpu->block->stop.kind = (uint32_t)stop;
    leave(cpu);
    return stop;
}

void cpu_settle(struct cpu *cpu)
{
    bool in = enter(cpu);
    load_state(cpu);
    if (in) {
        look_at_space(cpu);
        compare_code(cpu);
        take_answer(cpu);
    }
    leave(cpu);
}

void cpu_kick(struct cpu *cpu)
{
    kick(cpu, KICK_USER);
}

void cpu_watch_signals(struct cpu *cpu, uint64_t mask)
{
    cpu->watched_signals = mask;
}

/* KVM_CAP_READY_FOR_INTERRUPT_INJECTION. */
bool cpu_takes_interrupts(const struct cpu_block *block)
{
    const struct kvm_vcpu_events *events = &block->events;
    return block->regs.rflags & RFLAGS_IF && !events->interrupt.shadow && !events->interrupt.injected &&
           !events->exception.injected && !events->nmi.injected;
}
