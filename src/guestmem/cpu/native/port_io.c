/* IN, OUT and their string forms, exact at the exit.
 *
 * After a port hook Unicorn executes the instructions that follow. What stops it at once is an I/O breakpoint: with HF_IOBPT
 * each port instruction asks for one right after its hook, and the hook sets DR0 and DR7 so that it hits. The #DB that it
 * raises ends the pass between the two instructions; the registers of the guest's own breakpoints are put back, so a guest has
 * no I/O breakpoints.
 *
 * OUT and OUTS are complete when their exit is seen; a REP OUTS executes one element per exit. IN and INS have executed with a
 * zero, which is taken back: at the exit, registers are those before the instruction. The value completes IN by itself; INS is
 * stepped once more for each element, with its value. (INS has written zeros to its destination before it asks the port, as
 * QEMU has it.) A REP INS asks for as many elements at once as KVM does, and takes as many as the registers say when the
 * values are there, whatever the VMM has changed. Source: arch/x86/kvm/emulate.c pio_in_emulated. */
#include <string.h>

#include "inside.h"

enum { REP = 0xf3, REPNE = 0xf2, ADDRESS_SIZE = 0x67, LENGTH_MAX = 15, AHEAD_MAX = 1024 };
#define DR7_PORT_IN_DR0 (0x400ULL | 2 << 16 | 1)

/* ---- may a program use the port? Source: Intel SDM vol. 1, 19.5.2 "I/O permission bit map" */

static bool io_permitted(struct cpu *cpu, uint16_t port, unsigned size, struct refused *refused)
{
    const struct env *env = cpu->at.env;
    const struct segment_cache *tr = &env->tr;
    struct refused before = cpu->refused;
    uint16_t base, bits;
    bool is_tss = env->cr[0] & CR0_PE && tr->flags >> 8 & 8, read, permitted = false;
    read = linear_read(cpu, tr->base + 102, &base, 2);
    if (read && is_tss && (uint32_t)base + (port >> 3) + 1 <= tr->limit) {
        read = linear_read(cpu, tr->base + base + (port >> 3), &bits, 2);
        permitted = read && !(bits >> (port & 7) & ((1u << size) - 1));
    }
    if (!permitted)
        *refused = (struct refused){.why = REFUSED_GUEST, .vector = GP};
    if (!read && cpu->refused.why != REFUSED_GUEST)
        *refused = cpu->refused;
    cpu->refused = before;
    return permitted;
}

/* ---- hooks: the pass ends after this instruction */

static bool begin(struct cpu *cpu, uint32_t port, int size)
{
    const struct env *env = cpu->at.env;
    uint64_t *dr = cpu->at.tail->dr;
    struct port_io *io = &cpu->port;
    io->port = (uint16_t)port;
    io->size = (uint32_t)size;
    io->rax = env->regs[RAX];
    io->rsi = env->regs[RSI];
    io->rdi = env->regs[RDI];
    io->rip = env->eip;
    io->rflags = env->eflags;
    io->hflags = env->hflags;
    io->dr0 = dr[0];
    io->dr6 = dr[6];
    io->dr7 = dr[7];
    dr[0] = port;
    dr[6] = 0;
    dr[7] = DR7_PORT_IN_DR0;
    return (env->hflags & HF_CPL) <= (env->eflags >> 12 & 3) || io_permitted(cpu, io->port, io->size, &io->refused);
}

static void on_out(uc_engine *uc, uint32_t port, int size, uint32_t value, void *data)
{
    struct cpu *cpu = data;
    (void)uc;
    if (cpu->cause != NO_CAUSE)
        return;
    cpu->cause = begin(cpu, port, size) ? CAUSE_PORT_OUT : CAUSE_PORT_REFUSED;
    cpu->port.value = value;
}

static bool is_supplied(const struct cpu *cpu, uint64_t rip)
{
    const struct port_io *io = &cpu->port;
    return io->supply_at < io->supply_end && io->supply_rip == rip;
}

static uint32_t on_in(uc_engine *uc, uint32_t port, int size, void *data)
{
    struct cpu *cpu = data;
    struct port_io *io = &cpu->port;
    uint32_t value = 0;
    (void)uc;
    if (cpu->cause != NO_CAUSE)
        return 0;
    if (!begin(cpu, port, size)) {
        cpu->cause = CAUSE_PORT_REFUSED;
    } else if (is_supplied(cpu, io->rip)) {
        memcpy(&value, cpu->block->answer.data + io->supply_at, (size_t)size);
        io->supply_at += (uint32_t)size;
        cpu->cause = CAUSE_PORT_IN_DONE;
        return value;
    } else {
        cpu->cause = CAUSE_PORT_IN;
    }
    io->supply_end = 0;
    return 0;
}

bool port_hooks(struct cpu *cpu)
{
    uc_hook hook;
    return !uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)on_out, cpu, 1, 0, UC_X86_INS_OUT) &&
           !uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)on_in, cpu, 1, 0, UC_X86_INS_IN);
}

/* ---- registers before and after */

static void disarm(struct cpu *cpu)
{
    uint64_t *dr = cpu->at.tail->dr;
    dr[0] = cpu->port.dr0;
    dr[6] = cpu->port.dr6;
    dr[7] = cpu->port.dr7;
}

static void roll_back(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    struct port_io *io = &cpu->port;
    io->next = env->eip;
    io->string = env->regs[RDI] != io->rdi;
    env->regs[RAX] = io->rax;
    env->regs[RSI] = io->rsi;
    env->regs[RDI] = io->rdi;
    env->eip = io->rip;
    disarm(cpu);
}

/* The bits of the counter of the REP at `rip`, whose instruction ends at `next`: the size of addresses. 0 without a REP. */
static bool counter_of_rep(struct cpu *cpu, uint64_t rip, uint64_t next, uint64_t *mask)
{
    const struct env *env = cpu->at.env;
    uint8_t code[LENGTH_MAX];
    unsigned length = next - rip <= LENGTH_MAX ? (unsigned)(next - rip) : LENGTH_MAX;
    bool rep = false, other_size = false;
    if (!linear_code(cpu, env->segs[CS].base + rip, code, length))
        return false;
    for (unsigned i = 0; i < length; i++) {
        rep |= code[i] == REP || code[i] == REPNE;
        other_size |= code[i] == ADDRESS_SIZE;
    }
    bool wide = (env->hflags & HF_CS32) != 0;
    *mask = !rep ? 0
            : env->hflags & HF_CS64 ? (other_size ? 0xffffffff : ~0ULL)
            : wide != other_size ? 0xffffffff : 0xffff;
    return true;
}

/* INS or OUTS: the counter of a REP. One of 32 bits clears the upper half; one of 16 leaves the rest. */
static bool count(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    uint64_t mask, value = env->regs[RCX];
    if (!counter_of_rep(cpu, cpu->port.rip, env->eip, &mask)) {
        roll_back(cpu);
        return false;
    }
    if (mask) {
        env->regs[RCX] = ((value - 1) & mask) | (mask == 0xffff ? value & ~0xffffULL : 0);
        env->eip = cpu->port.rip;
    }
    return true;
}

/* The registers after the instruction, or after one element of a REP, which stays where it is. False: rolled back. */
static bool complete(struct cpu *cpu)
{
    const struct env *env = cpu->at.env;
    disarm(cpu);
    bool string = env->regs[RSI] != cpu->port.rsi || env->regs[RDI] != cpu->port.rdi;
    if (string && !count(cpu))
        return false;
    instruction_done(cpu);
    trap_if_traced(cpu);
    return true;
}

/* ---- after the pass */

int port_out_done(struct cpu *cpu)
{
    if (!complete(cpu))
        return stop_not_done(cpu, &cpu->refused);
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_PORT_OUT);
    stop->port = cpu->port.port;
    stop->size = cpu->port.size;
    stop->count = 1;
    memcpy(stop->data, &cpu->port.value, sizeof(cpu->port.value));
    return CPU_STOP_PORT_OUT;
}

int port_in_done(struct cpu *cpu)
{
    return complete(cpu) ? CPU_STOP_NONE : stop_not_done(cpu, &cpu->refused);
}

int port_refused(struct cpu *cpu)
{
    roll_back(cpu);
    return stop_not_done(cpu, &cpu->port.refused);
}

/* How many elements the INS that was rolled back asks for: up to the end of its page. */
static bool ahead(struct cpu *cpu, uint32_t *elements)
{
    const struct env *env = cpu->at.env;
    uint64_t mask = 0, offset = env->regs[RDI] & (PAGE - 1), most = AHEAD_MAX / cpu->port.size;
    *elements = 1;
    if (cpu->port.string && !counter_of_rep(cpu, env->eip, cpu->port.next, &mask))
        return false;
    if (!mask)
        return true;
    uint64_t in_page = env->eflags & RFLAGS_DF ? offset : PAGE - offset;
    uint64_t wanted = env->regs[RCX] & mask;
    if (in_page < most)
        most = in_page;
    if (wanted < most)
        most = wanted;
    *elements = most ? (uint32_t)most : 1;
    return true;
}

int port_in_stop(struct cpu *cpu)
{
    uint32_t elements;
    roll_back(cpu);
    if (!ahead(cpu, &elements))
        return stop_not_done(cpu, &cpu->refused);
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_PORT_IN);
    stop->port = cpu->port.port;
    stop->size = cpu->port.size;
    stop->count = elements;
    return CPU_STOP_PORT_IN;
}

/* ---- the answer */

static int take_value(struct cpu *cpu)
{
    static const uint64_t kept[5] = {0, ~0xffULL, ~0xffffULL, 0, 0};
    struct env *env = cpu->at.env;
    uint32_t value = 0;
    memcpy(&value, cpu->block->answer.data, cpu->port.size);
    env->regs[RAX] = (env->regs[RAX] & kept[cpu->port.size]) | value;
    env->eip = cpu->port.next;
    instruction_done(cpu);
    trap_if_traced(cpu);
    return CPU_STOP_NONE;
}

/* An INS takes as many steps as there are values. */
static int take_values(struct cpu *cpu)
{
    struct port_io *io = &cpu->port;
    uint32_t elements;
    int stop;
    if (!ahead(cpu, &elements))
        return stop_not_done(cpu, &cpu->refused);
    io->supply_rip = cpu->at.env->eip;
    io->supply_at = 0;
    io->supply_end = elements * io->size;
    do
        stop = cpu_judge(cpu, cpu_step(cpu), true);
    while (stop == CPU_STOP_NONE && !cpu->pending.present && is_supplied(cpu, cpu->at.env->eip));
    if (stop != CPU_STOP_MISS && stop != CPU_STOP_HOST_FAULT)
        io->supply_end = 0;
    return stop;
}

int port_answer(struct cpu *cpu)
{
    return cpu->port.string ? take_values(cpu) : take_value(cpu);
}
