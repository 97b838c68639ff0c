/* IN, OUT, INS and OUTS: exits that are exact.
 *
 * Unicorn calls a hook from the middle of a block and goes on with the instructions that follow. What stops it at once is
 * an I/O breakpoint: with HF_IOBPT each port instruction asks for one right after its hook, and the hook sets DR0 and DR7
 * so that it hits. The #DB that it raises ends the pass between the two instructions; the registers of the guest's own
 * breakpoints are put back, so a guest has no I/O breakpoints.
 *
 * OUT and OUTS are complete when their stop is seen; a REP OUTS executes one element per stop. IN and INS have executed
 * with a zero, which is taken back: at the stop, registers are those before the instruction. The value completes IN by
 * itself; INS is stepped once more for each element, with its value. (INS has written zeros to its destination before it
 * asks the port, as QEMU has it.) A REP INS asks for as many elements at once as KVM does, and takes as many as the
 * registers say when the values are there. Source: arch/x86/kvm/emulate.c pio_in_emulated. */
#include "internal.h"

#include <string.h>

enum { AHEAD_MAX = 1024 }; /* bytes that a REP INS asks for at once */
#define DR7_PORT_IN_DR0 (0x400 | 2 << 16 | 1)

/* Whether the I/O bitmap of the TSS lets a program use the ports. False with cpu->refused, which is #GP(0) or the refusal of
 * the bitmap itself. Source: Intel SDM vol. 1, 19.5.2 "I/O permission bit map". */
static bool permitted(struct cpu *cpu, uint16_t port, unsigned size)
{
    const struct segment_cache *tr = &cpu->env->tr;
    uint16_t base, bits;
    bool readable = read_linear(cpu, tr->base + 102, &base, 2);
    if (readable && cpu->env->cr[0] & CR0_PE && tr->flags >> 8 & 8) {
        uint32_t at = base + (port >> 3);
        if (at + 1 <= tr->limit && (readable = read_linear(cpu, tr->base + at, &bits, 2)) &&
            !(bits >> (port & 7) & ((1u << size) - 1)))
            return true;
    }
    if (readable || cpu->refused.kind == REFUSED_GUEST)
        cpu->refused = (struct refusal){.kind = REFUSED_GUEST, .vector = GP};
    return false;
}

/* Ends the pass after this instruction. Whether it is to happen. */
static bool enter(struct cpu *cpu, uint16_t port, unsigned size)
{
    struct port_io *io = &cpu->ports;
    struct uc_env *env = cpu->env;
    uint64_t *dr = cpu->tail->dr;
    io->rax = env->regs[RAX], io->rsi = env->regs[RSI], io->rdi = env->regs[RDI];
    io->rip = env->eip, io->rflags = env->eflags, io->hflags = env->hflags;
    io->dr0 = dr[0], io->dr6 = dr[6], io->dr7 = dr[7];
    io->port = port, io->size = size;
    dr[0] = port, dr[6] = 0, dr[7] = DR7_PORT_IN_DR0;
    bool unprivileged = (io->hflags & HF_CPL) > (io->rflags >> 12 & 3);
    if (!unprivileged || permitted(cpu, port, size))
        return true;
    cpu->cause = CAUSE_PORT_REFUSED;
    return false;
}

static void on_out(uc_engine *uc, uint32_t port, int size, uint32_t value, void *data)
{
    struct cpu *cpu = data;
    (void)uc;
    if (cpu->cause || !enter(cpu, (uint16_t)port, (unsigned)size))
        return;
    cpu->cause = CAUSE_PORT_OUT;
    cpu->ports.value = value;
}

static uint32_t on_in(uc_engine *uc, uint32_t port, int size, void *data)
{
    struct cpu *cpu = data;
    struct port_io *io = &cpu->ports;
    (void)uc;
    if (cpu->cause || !enter(cpu, (uint16_t)port, (unsigned)size))
        return 0;
    uint32_t value = 0;
    if (io->supply_rip == io->rip && io->supply_next + (unsigned)size <= io->supply_size) {
        memcpy(&value, io->supply + io->supply_next, (size_t)size);
        io->supply_next += (unsigned)size;
        cpu->cause = CAUSE_PORT_IN_DONE;
        return value;
    }
    io->supply_next = io->supply_size = 0;
    cpu->cause = CAUSE_PORT_IN;
    return value;
}

bool add_port_hooks(struct cpu *cpu)
{
    uc_hook hook;
    return !uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)on_out, cpu, 1, 0, UC_X86_INS_OUT) &&
           !uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)on_in, cpu, 1, 0, UC_X86_INS_IN);
}

/* The guest's own debug registers. */
static void disarm(struct cpu *cpu)
{
    uint64_t *dr = cpu->tail->dr;
    dr[0] = cpu->ports.dr0, dr[6] = cpu->ports.dr6, dr[7] = cpu->ports.dr7;
}

/* The registers before the instruction. */
void port_roll_back(struct cpu *cpu)
{
    struct port_io *io = &cpu->ports;
    uint64_t *regs = cpu->env->regs;
    io->next = cpu->env->eip;
    io->string = regs[RDI] != io->rdi;
    regs[RAX] = io->rax, regs[RSI] = io->rsi, regs[RDI] = io->rdi;
    cpu->env->eip = io->rip;
    disarm(cpu);
}

/* The bits of the counter of the instruction at `rip`: the size of addresses; 0 without a REP. False with cpu->refused. */
static bool counter_mask(struct cpu *cpu, uint64_t rip, uint64_t after, uint64_t *mask)
{
    uint8_t code[15];
    unsigned size = (unsigned)minimum(after - rip, sizeof code);
    const struct uc_env *env = cpu->env;
    if (!read_code(cpu, env->segs[CS].base + rip, code, size))
        return false;
    bool rep = memchr(code, 0xf2, size) || memchr(code, 0xf3, size), other = memchr(code, 0x67, size);
    if (!rep)
        *mask = 0;
    else if (env->hflags & HF_CS64)
        *mask = other ? 0xffffffff : ~0ull;
    else
        *mask = !!(env->hflags & HF_CS32) == other ? 0xffff : 0xffffffff;
    return true;
}

/* The registers after the instruction, or after one element of a REP, which stays where it is. False with cpu->refused and
 * the registers before it. */
static bool finish(struct cpu *cpu)
{
    struct port_io *io = &cpu->ports;
    struct uc_env *env = cpu->env;
    disarm(cpu);
    if (env->regs[RSI] != io->rsi || env->regs[RDI] != io->rdi) {
        uint64_t mask, count = env->regs[RCX];
        if (!counter_mask(cpu, io->rip, env->eip, &mask)) {
            port_roll_back(cpu);
            return false;
        }
        if (mask) {
            /* A counter of 32 bits clears the upper half; one of 16 leaves the rest. */
            env->regs[RCX] = ((count - 1) & mask) | (mask == 0xffff ? count & ~0xffffull : 0);
            env->eip = io->rip;
        }
    }
    instruction_done(cpu, env->eip);
    return true;
}

/* How many elements the INS that was rolled back asks for. False with cpu->refused. */
static bool ahead(struct cpu *cpu, unsigned size, unsigned *count)
{
    const struct uc_env *env = cpu->env;
    uint64_t mask = 0;
    *count = 1;
    if (cpu->ports.string && !counter_mask(cpu, env->eip, cpu->ports.next, &mask))
        return false;
    if (!mask)
        return true;
    uint64_t offset = env->regs[RDI] % PAGE, in_page = env->eflags & RFLAGS_DF ? offset : PAGE - offset;
    uint64_t most = minimum(minimum(in_page, AHEAD_MAX / size), env->regs[RCX] & mask);
    *count = most ? (unsigned)most : 1;
    return true;
}

static int out_stop(struct cpu *cpu)
{
    struct cpu_stop *stop = &cpu->block->stop;
    if (!finish(cpu))
        return not_done(cpu);
    trap_if_traced(cpu);
    stop->port = cpu->ports.port;
    stop->size = cpu->ports.size;
    stop->count = 1;
    memcpy(stop->data, &cpu->ports.value, 4);
    return CPU_STOP_PORT_OUT;
}

/* After the hook: the stop, or 0. */
int port_stop(struct cpu *cpu)
{
    struct cpu_stop *stop = &cpu->block->stop;
    unsigned count;
    switch (cpu->cause) {
    case CAUSE_PORT_OUT:
        return out_stop(cpu);
    case CAUSE_PORT_IN_DONE:
        if (!finish(cpu))
            return not_done(cpu);
        trap_if_traced(cpu);
        return CPU_STOP_NONE;
    case CAUSE_PORT_REFUSED:
        port_roll_back(cpu);
        return not_done(cpu);
    default:
        port_roll_back(cpu);
        if (!ahead(cpu, cpu->ports.size, &count))
            return not_done(cpu);
        stop->port = cpu->ports.port;
        stop->size = cpu->ports.size;
        stop->count = count;
        return CPU_STOP_PORT_IN;
    }
}

/* Whether the instruction at RIP is an INS for which there are values. */
bool port_supplied(const struct cpu *cpu)
{
    return cpu->ports.supply_next < cpu->ports.supply_size && cpu->ports.supply_rip == cpu->env->eip;
}

/* INS takes as many steps as there are values. */
static int answer_string(struct cpu *cpu)
{
    int stop = judge(cpu, single_step(cpu), true);
    while (!stop && cpu->pending.vector < 0 && port_supplied(cpu))
        stop = judge(cpu, single_step(cpu), true);
    if (stop != CPU_STOP_MISS && stop != CPU_STOP_HOST_FAULT)
        cpu->ports.supply_next = cpu->ports.supply_size = 0;
    return stop;
}

/* Finishes the IN or INS that was rolled back. What its last part met; 0 if it is done. */
int port_answer(struct cpu *cpu, const uint8_t *data)
{
    struct port_io *io = &cpu->ports;
    unsigned size = cpu->asked.size, count;
    if (io->string) {
        if (!ahead(cpu, size, &count))
            return not_done(cpu);
        io->supply_rip = cpu->env->eip;
        io->supply_size = (unsigned)minimum(count * size, sizeof io->supply);
        io->supply_next = 0;
        memcpy(io->supply, data, io->supply_size);
        return answer_string(cpu);
    }
    uint64_t *rax = &cpu->env->regs[RAX], value = 0, mask = size == 4 ? ~0ull : (1ull << size * 8) - 1;
    memcpy(&value, data, size);
    *rax = (*rax & ~mask) | value;
    instruction_done(cpu, io->next);
    trap_if_traced(cpu);
    return CPU_STOP_NONE;
}
