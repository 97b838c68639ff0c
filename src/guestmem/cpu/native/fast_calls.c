/* SYSCALL and SYSENTER. Unicorn only skips them; the way back (SYSRET, SYSEXIT) it executes itself.
 *
 * Source: AMD APM vol. 3 "SYSCALL", Intel SDM vol. 2 "SYSENTER". */
#include "inside.h"

enum { LENGTH = 2 }; /* of both instructions */
enum { FLAGS_CODE = 11 << 8 | 1 << 12 | DESC_P | 1 << 23, FLAGS_DATA = 3 << 8 | 1 << 12 | DESC_P | DESC_B | 1 << 23 };

static int on_syscall(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    if (cpu->cause == NO_CAUSE)
        cpu->cause = CAUSE_SYSCALL;
    uc_emu_stop(uc);
    return 1;
}

static int on_sysenter(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    if (cpu->cause == NO_CAUSE)
        cpu->cause = CAUSE_SYSENTER;
    uc_emu_stop(uc);
    return 1;
}

bool fast_call_hooks(struct cpu *cpu)
{
    uc_hook hook;
    return !uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)on_syscall, cpu, 1, 0, UC_X86_INS_SYSCALL) &&
           !uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)on_sysenter, cpu, 1, 0, UC_X86_INS_SYSENTER);
}

/* CS and SS of ring 0 with fixed contents: both instructions read no descriptor. */
static void enter_flat(struct env *env, uint32_t selector, bool long_mode)
{
    uint32_t size = long_mode ? DESC_L : DESC_B;
    env->segs[CS] = (struct segment_cache){selector, 0, ~0u, FLAGS_CODE | size};
    env->segs[SS] = (struct segment_cache){selector + 8, 0, ~0u, FLAGS_DATA};
}

static void raise_at_instruction(struct cpu *cpu, uint8_t vector)
{
    cpu->at.env->eip -= LENGTH;
    pend(cpu, vector, 0);
}

static void enter_by_syscall(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    const struct env_msrs *msrs = cpu->at.msrs;
    if (!(env->efer & EFER_SCE) || !(env->efer & EFER_LMA)) {
        raise_at_instruction(cpu, UD);
        return;
    }
    env->regs[RCX] = env->eip;
    env->regs[11] = env->eflags;
    env->eip = env->segs[CS].flags & DESC_L ? msrs->lstar : msrs->cstar;
    env->eflags = (env->eflags & ~(msrs->fmask | RFLAGS_RF)) | 2;
    enter_flat(env, msrs->star >> 32 & 0xfffc, true);
    update_hflags(cpu);
}

static void enter_by_sysenter(struct cpu *cpu)
{
    struct env *env = cpu->at.env;
    const struct env_msrs *msrs = cpu->at.msrs;
    uint32_t selector = msrs->sysenter_cs & 0xfffc;
    bool long_mode = env->efer & EFER_LMA;
    uint64_t mask = long_mode ? ~0ULL : 0xffffffff;
    if (!(env->cr[0] & CR0_PE) || !selector) {
        raise_at_instruction(cpu, GP);
        return;
    }
    env->regs[RSP] = msrs->sysenter_esp & mask;
    env->eip = msrs->sysenter_eip & mask;
    env->eflags &= ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM);
    enter_flat(env, selector, long_mode);
    update_hflags(cpu);
}

void fast_call(struct cpu *cpu, bool syscall)
{
    if (syscall)
        enter_by_syscall(cpu);
    else
        enter_by_sysenter(cpu);
}
