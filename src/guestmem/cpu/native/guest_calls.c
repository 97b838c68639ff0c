/* What a guest asks of its hypervisor, its firmware or the CPU by an instruction that Unicorn does not know.
 *
 *   VMCALL, VMMCALL                 any guest
 *   VMGEXIT, PVALIDATE, RMPADJUST   an SNP guest; to another, VMGEXIT is VMMCALL and the other two are no instructions
 *   TDCALL                          a TD
 *
 * All are 0F 01 and a third byte, told apart by 66, F2 or F3 in front, the last two of which win. To Unicorn they are invalid,
 * so they are looked at where they stand.
 *
 * Source: AMD APM vol. 3, PVALIDATE, RMPADJUST, VMGEXIT, VMMCALL (return codes set OF, ZF, AF, PF and SF: as TEST would, which
 * the manual leaves open); Intel SDM vol. 2, VMCALL, TDCALL; binutils gas/testsuite/gas/i386/x86-64-snp.d and x86-64-tdx.d
 * for encodings. */
#include "inside.h"

enum { REPNE = 0xf2, REP = 0xf3 };
enum { FLAG_CF = 1 << 0, FLAG_PF = 1 << 2, FLAG_AF = 1 << 4, FLAG_ZF = 1 << 6, FLAG_SF = 1 << 7, FLAG_OF = 1 << 11 };

/* ---- the calls */

static int raise_in_guest(struct cpu *cpu, uint8_t vector)
{
    pend(cpu, vector, 0);
    return CPU_STOP_NONE;
}

static void move_past(struct cpu *cpu)
{
    cpu->at.env->eip = cpu->call_start + cpu->call_length;
    instruction_done(cpu);
}

static bool outside_of_ring_0(const struct cpu *cpu)
{
    return cpu->at.env->hflags & HF_CPL;
}

static int hypercall(struct cpu *cpu)
{
    const struct env *env = cpu->at.env;
    uint64_t mask = env->hflags & HF_CS64 ? ~0ULL : 0xffffffff;
    struct cpu_stop *stop = stop_begin(cpu, CPU_STOP_HYPERCALL);
    stop->nr = env->regs[RAX] & mask;
    stop->value[0] = env->regs[RBX] & mask;
    stop->value[1] = env->regs[RCX] & mask;
    stop->value[2] = env->regs[RDX] & mask;
    stop->value[3] = env->regs[RSI] & mask;
    stop->cpl = env->hflags & HF_CPL;
    move_past(cpu);
    trap_if_traced(cpu);
    return CPU_STOP_HYPERCALL;
}

enum { MSR_GHCB = (int)0xc0010130 };

static int vmgexit(struct cpu *cpu)
{
    stop_begin(cpu, CPU_STOP_VMGEXIT)->value[0] = *msr_place(cpu->block, (uint32_t)MSR_GHCB);
    move_past(cpu);
    trap_if_traced(cpu);
    return CPU_STOP_VMGEXIT;
}

/* #GP(0) outside of 64-bit code as well. Source: td_call() of the TDX module's tdx_td_dispatcher.c */
static int tdcall(struct cpu *cpu)
{
    if (!(cpu->at.env->hflags & HF_CS64) || outside_of_ring_0(cpu))
        return raise_in_guest(cpu, GP);
    stop_begin(cpu, CPU_STOP_TDCALL)->nr = cpu->at.env->regs[RAX];
    return CPU_STOP_TDCALL;
}

static uint64_t address_mask(const struct cpu *cpu)
{
    const struct env *env = cpu->at.env;
    if (env->hflags & HF_CS64)
        return cpu->call_address_size ? 0xffffffff : ~0ULL;
    return ((env->segs[CS].flags & DESC_B) != 0) != cpu->call_address_size ? 0xffffffff : 0xffff;
}

/* The page at rAX, which must be mapped as private. Else it is a page fault with the reserved bit. Source: an SNP machine's
 * oops at a PVALIDATE, error code 9, RAX in CR2, a leaf without the C-bit: TUM-DSE/CVM_eval issue 37. */
static int page_stop(struct cpu *cpu, enum cpu_stop_kind kind)
{
    uint64_t linear = cpu->at.env->regs[RAX] & address_mask(cpu) & PAGE_MASK, gpa;
    uint8_t access;
    if (!linear_page(cpu, linear, &gpa, &access))
        return stop_not_done(cpu, &cpu->refused);
    if (access == CPU_ACCESS_SHARED) {
        pend(cpu, PF, PF_PRESENT | PF_RESERVED);
        cpu->pending.address = linear;
        return CPU_STOP_NONE;
    }
    struct cpu_stop *stop = stop_begin(cpu, kind);
    stop->gpa = gpa;
    stop->large = cpu->at.env->regs[RCX] & 1;
    stop->validate = cpu->at.env->regs[RDX] & 1;
    stop->value[0] = cpu->at.env->regs[RDX];
    return (int)kind;
}

static int pvalidate(struct cpu *cpu)
{
    return outside_of_ring_0(cpu) ? raise_in_guest(cpu, GP) : page_stop(cpu, CPU_STOP_PVALIDATE);
}

static int rmpadjust(struct cpu *cpu)
{
    if (!(cpu->at.env->hflags & HF_CS64))
        return raise_in_guest(cpu, UD);
    return outside_of_ring_0(cpu) ? raise_in_guest(cpu, GP) : page_stop(cpu, CPU_STOP_RMPADJUST);
}

typedef int call(struct cpu *cpu);

/* By the prefix that is part of the name, and the third byte; NULL: none. */
static call *call_of(const struct cpu *cpu, const struct instruction *instruction, uint8_t third)
{
    bool snp = cpu->block->guest_kind == CPU_GUEST_SNP, td = cpu->block->guest_kind == CPU_GUEST_TD;
    uint8_t repeat = instruction->repeat;
    bool plain = !repeat && !instruction->operand_size;
    if (plain && third == 0xc1)
        return hypercall;
    if (third == 0xd9 && (plain || repeat))
        return snp && repeat ? vmgexit : hypercall;
    if (snp && repeat == REPNE && third == 0xff)
        return pvalidate;
    if (snp && repeat == REP && third == 0xfe)
        return rmpadjust;
    return td && !repeat && instruction->operand_size && third == 0xcc ? tdcall : NULL;
}

static call *find_call(struct cpu *cpu, struct instruction *instruction)
{
    const uint8_t *opcode = &instruction->bytes[instruction->opcode];
    if (opcode[0] != 0x0f || !decode_more(cpu, instruction, instruction->opcode + 3u) || opcode[1] != 0x01)
        return NULL;
    cpu->call_start = cpu->at.env->eip;
    cpu->call_length = instruction->opcode + 3;
    cpu->call_address_size = instruction->address_size;
    return call_of(cpu, instruction, opcode[2]);
}

int guest_call(struct cpu *cpu)
{
    struct instruction instruction;
    call *found = decode(cpu, &instruction) ? find_call(cpu, &instruction) : NULL;
    return found ? found(cpu) : raise_in_guest(cpu, UD);
}

/* EAX and the flags that follow from it; the instruction is done. */
static void return_status(struct cpu *cpu, uint32_t status)
{
    struct env *env = cpu->at.env;
    env->regs[RAX] = status;
    env->eflags &= ~(uint64_t)(FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF);
    env->eflags |= status ? 0 : FLAG_ZF;
    env->eflags |= __builtin_parity(status & 0xff) ? 0 : FLAG_PF;
    env->eflags |= status >> 31 ? FLAG_SF : 0;
    move_past(cpu);
}

void guest_call_finish(struct cpu *cpu, uint32_t kind, uint64_t value)
{
    struct env *env = cpu->at.env;
    switch (kind) {
    case CPU_STOP_HYPERCALL:
        env->regs[RAX] = value & (env->hflags & HF_CS64 ? ~0ULL : 0xffffffff);
        break;
    case CPU_STOP_VMGEXIT:
        *msr_place(cpu->block, (uint32_t)MSR_GHCB) = value;
        break;
    case CPU_STOP_TDCALL:
        env->regs[RAX] = value;
        move_past(cpu);
        break;
    case CPU_STOP_PVALIDATE:
        return_status(cpu, (uint32_t)value);
        env->eflags = (env->eflags & ~(uint64_t)FLAG_CF) | (value >> 32 & 1 ? FLAG_CF : 0);
        break;
    default:
        return_status(cpu, (uint32_t)value);
        break;
    }
}
