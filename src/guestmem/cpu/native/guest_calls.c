/* What a guest asks of its hypervisor, its firmware or the CPU by an instruction that Unicorn does not know.
 *
 *     VMCALL, VMMCALL                 any guest
 *     VMGEXIT, PVALIDATE, RMPADJUST   an SNP guest; to another, VMGEXIT is VMMCALL and the other two are no instructions
 *     TDCALL                          a TD
 *
 * All are 0F 01 and a third byte, told apart by 66, F2 or F3 in front, the last two of which win. To Unicorn they are
 * invalid, so they are looked at where they stand.
 *
 * Source: AMD APM vol. 3, PVALIDATE, RMPADJUST, VMGEXIT, VMMCALL (return codes set OF, ZF, AF, PF and SF: as TEST would,
 * which the manual leaves open); Intel SDM vol. 2, VMCALL, TDCALL; binutils gas/testsuite/gas/i386/x86-64-snp.d and
 * x86-64-tdx.d for encodings. Conditions that other places tell are named there. */
#include "internal.h"

#include <string.h>

enum { LENGTH_MAX = 15, OPERAND_SIZE = 0x66, ADDRESS_SIZE = 0x67, REPNE = 0xf2, REP = 0xf3 };
enum { PF_PRESENT_RESERVED = 9 };
#define GHCB_MSR 0xc0010130u

struct decoded {
    uint8_t prefix, last; /* the prefix that is part of the name, or 0, and the third byte */
    unsigned length;
    bool address_size; /* whether it has that prefix */
};

static bool is_prefix(uint8_t byte, bool is_long)
{
    return memchr("\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3", byte, 10) || (is_long && byte >> 4 == 4);
}

/* False: it is none, or (with cpu->refused) its bytes cannot be had. */
static bool decode(struct cpu *cpu, struct decoded *found)
{
    uint64_t place = linear_rip(cpu);
    bool is_long = cpu->env->hflags & HF_CS64, operand_size = false;
    uint8_t byte, repeat = 0, rest[2];
    memset(found, 0, sizeof *found);
    for (unsigned length = 0; length < LENGTH_MAX - 2; length++) {
        if (!read_code(cpu, place + length, &byte, 1))
            return false;
        if (byte == REPNE || byte == REP)
            repeat = byte;
        operand_size |= byte == OPERAND_SIZE;
        found->address_size |= byte == ADDRESS_SIZE;
        if (is_prefix(byte, is_long))
            continue;
        if (byte != 0x0f || !read_code(cpu, place + length + 1, rest, 1) || rest[0] != 0x01 ||
            !read_code(cpu, place + length + 2, rest, 1))
            return false;
        found->prefix = repeat ? repeat : operand_size ? OPERAND_SIZE : 0;
        found->last = rest[0];
        found->length = length + 3;
        return true;
    }
    return false;
}

/* #GP(0) or #UD instead of the instruction. */
static int raise_instead(struct cpu *cpu, int vector)
{
    raise_event(cpu, vector, 0, 0, 0, false);
    return CPU_STOP_NONE;
}

static int hypercall(struct cpu *cpu)
{
    struct cpu_stop *stop = &cpu->block->stop;
    const uint64_t *regs = cpu->env->regs;
    uint64_t mask = cpu->env->hflags & HF_CS64 ? ~0ull : 0xffffffff;
    stop->nr = regs[RAX] & mask;
    stop->value[0] = regs[RBX] & mask, stop->value[1] = regs[RCX] & mask;
    stop->value[2] = regs[RDX] & mask, stop->value[3] = regs[RSI] & mask;
    stop->cpl = cpu->env->hflags & HF_CPL;
    return CPU_STOP_HYPERCALL;
}

static int vmgexit(struct cpu *cpu)
{
    cpu->block->stop.value[0] = *msr_slot(cpu->block, GHCB_MSR);
    return CPU_STOP_VMGEXIT;
}

/* #GP(0) outside of 64-bit code as well. Source: td_call() of the TDX module's tdx_td_dispatcher.c. */
static int tdcall(struct cpu *cpu)
{
    if (!(cpu->env->hflags & HF_CS64) || cpu->env->hflags & HF_CPL)
        return raise_instead(cpu, GP);
    cpu->block->stop.nr = cpu->env->regs[RAX];
    return CPU_STOP_TDCALL;
}

static uint64_t address_mask(const struct cpu *cpu, bool address_size)
{
    if (cpu->env->hflags & HF_CS64)
        return address_size ? 0xffffffff : ~0ull;
    bool big = cpu->env->segs[CS].flags & DESC_B;
    return big != address_size ? 0xffffffff : 0xffff;
}

/* The guest-physical address of the page at rAX, which must be mapped as private; false with what it raises pending, or
 * with a *stop. Else it is a page fault with the reserved bit. Source: an SNP machine's oops at a PVALIDATE, error code 9,
 * RAX in CR2, a leaf without the C-bit: TUM-DSE/CVM_eval issue 37. */
static bool private_page(struct cpu *cpu, const struct decoded *found, int *stop)
{
    uint64_t linear = cpu->env->regs[RAX] & address_mask(cpu, found->address_size) & PAGE_MASK;
    struct guest_page page;
    *stop = CPU_STOP_NONE;
    if (!walk_as_guest(cpu, linear, READ, &page)) {
        *stop = not_done(cpu);
        return false;
    }
    if (page.access == CPU_ACCESS_SHARED) {
        raise_event(cpu, PF, PF_PRESENT_RESERVED, linear, 0, false);
        return false;
    }
    cpu->block->stop.gpa = page.gpa;
    cpu->block->stop.large = cpu->env->regs[RCX] & 1;
    return true;
}

static int pvalidate(struct cpu *cpu, const struct decoded *found)
{
    int stop;
    if (cpu->env->hflags & HF_CPL)
        return raise_instead(cpu, GP);
    if (!private_page(cpu, found, &stop))
        return stop;
    cpu->block->stop.validate = cpu->env->regs[RDX] & 1;
    return CPU_STOP_PVALIDATE;
}

static int rmpadjust(struct cpu *cpu, const struct decoded *found)
{
    int stop;
    if (!(cpu->env->hflags & HF_CS64))
        return raise_instead(cpu, UD);
    if (cpu->env->hflags & HF_CPL)
        return raise_instead(cpu, GP);
    if (!private_page(cpu, found, &stop))
        return stop;
    cpu->block->stop.value[0] = cpu->env->regs[RDX];
    return CPU_STOP_RMPADJUST;
}

static int dispatch(struct cpu *cpu, const struct decoded *found)
{
    bool repeated = found->prefix == REPNE || found->prefix == REP;
    if (cpu->block->guest_kind == CPU_GUEST_SNP) {
        if (repeated && found->last == 0xd9)
            return vmgexit(cpu);
        if (found->prefix == REPNE && found->last == 0xff)
            return pvalidate(cpu, found);
        if (found->prefix == REP && found->last == 0xfe)
            return rmpadjust(cpu, found);
    }
    if (cpu->block->guest_kind == CPU_GUEST_TD && found->prefix == OPERAND_SIZE && found->last == 0xcc)
        return tdcall(cpu);
    if ((!found->prefix && found->last == 0xc1) || ((!found->prefix || repeated) && found->last == 0xd9))
        return hypercall(cpu);
    return raise_instead(cpu, UD);
}

int guest_call(struct cpu *cpu)
{
    struct decoded found;
    cpu->refused.kind = NOT_REFUSED;
    if (!decode(cpu, &found))
        /* Unicorn found it invalid before it had all of it. */
        return cpu->refused.kind == REFUSED_HOST ? not_done(cpu) : raise_instead(cpu, UD);
    cpu->asked = (struct question){.start = cpu->env->eip, .length = found.length};
    int stop = dispatch(cpu, &found);
    if (stop == CPU_STOP_HYPERCALL || stop == CPU_STOP_VMGEXIT) {
        instruction_done(cpu, cpu->env->eip + found.length);
        trap_if_traced(cpu);
    }
    return stop;
}

/* EAX and the flags that follow from it; the instruction is done. */
static void return_status(struct cpu *cpu, const struct question *asked, uint32_t status)
{
    struct uc_env *env = cpu->env;
    uint64_t flags = env->eflags & ~(uint64_t)(RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF);
    env->regs[RAX] = status;
    flags |= status ? 0 : RFLAGS_ZF;
    flags |= __builtin_parity(status & 0xff) ? 0 : RFLAGS_PF;
    env->eflags = flags | (status >> 31 ? RFLAGS_SF : 0);
    instruction_done(cpu, asked->start + asked->length);
    trap_if_traced(cpu);
}

/* Puts the result of the call where the guest expects it. */
void complete_call(struct cpu *cpu, const struct question *asked, uint64_t value)
{
    struct uc_env *env = cpu->env;
    switch (asked->kind) {
    case CPU_STOP_HYPERCALL:
        env->regs[RAX] = env->hflags & HF_CS64 ? value : (uint32_t)value;
        break;
    case CPU_STOP_VMGEXIT:
        *msr_slot(cpu->block, GHCB_MSR) = value;
        break;
    case CPU_STOP_TDCALL:
        env->regs[RAX] = value;
        instruction_done(cpu, asked->start + asked->length);
        trap_if_traced(cpu);
        break;
    case CPU_STOP_PVALIDATE:
        return_status(cpu, asked, (uint32_t)value);
        env->eflags = (env->eflags & ~(uint64_t)RFLAGS_CF) | (value >> 32 & 1 ? RFLAGS_CF : 0);
        break;
    case CPU_STOP_RMPADJUST:
        return_status(cpu, asked, (uint32_t)value);
        break;
    }
}
