/* Instructions that Unicorn leaves to its user: CPUID, RDTSC, MSRs, SYSCALL and SYSENTER, INT. See also guest_calls.c.
 *
 * CPUID and RDTSC are answered from inside of their hook. RDMSR and WRMSR are exits of the CPU, and done here. SYSCALL and
 * SYSENTER, which Unicorn only skips, end the pass, because they change segments; the way back it executes itself.
 *
 * Source: AMD APM vol. 3 "SYSCALL", Intel SDM vol. 2 "SYSENTER"; arch/x86/kvm/cpuid.c kvm_update_cpuid_runtime. */
#include "internal.h"

enum { CALL_LENGTH = 2, CPUID_XSAVE = 1 << 26, CPUID_OSXSAVE = 1 << 27 };

static int on_cpuid(uc_engine *uc, void *data)
{
    static const int registers[4] = {UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RCX, UC_X86_REG_RDX};
    const struct cpu *cpu = data;
    uint32_t leaf, subleaf, answer[4];
    uc_reg_read(uc, UC_X86_REG_EAX, &leaf);
    uc_reg_read(uc, UC_X86_REG_ECX, &subleaf);
    cpuid_lookup(cpu->block, leaf, subleaf, answer);
    if (leaf == 1 && answer[2] & CPUID_XSAVE)
        answer[2] = (answer[2] & ~(uint32_t)CPUID_OSXSAVE) | (cpu->env->cr[4] & CR4_OSXSAVE ? CPUID_OSXSAVE : 0);
    for (int i = 0; i < 4; i++) {
        uint64_t word = answer[i];
        uc_reg_write(uc, registers[i], &word);
    }
    return 1; /* it is done */
}

static int on_rdtsc(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    uint64_t now = tsc_now(cpu->block);
    (void)uc;
    cpu->env->regs[RAX] = (uint32_t)now;
    cpu->env->regs[RDX] = now >> 32;
    return 1;
}

static int on_rdtscp(uc_engine *uc, void *data)
{
    struct cpu *cpu = data;
    cpu->env->regs[RCX] = (uint32_t)cpu->msrs->tsc_aux;
    return on_rdtsc(uc, data);
}

static int on_syscall(uc_engine *uc, void *data)
{
    (void)uc;
    end_pass(data, CAUSE_SYSCALL);
    return 1;
}

static int on_sysenter(uc_engine *uc, void *data)
{
    (void)uc;
    end_pass(data, CAUSE_SYSENTER);
    return 1;
}

bool add_instruction_hooks(struct cpu *cpu)
{
    static const struct {
        int instruction;
        int (*hook)(uc_engine *, void *);
    } hooks[] = {{UC_X86_INS_CPUID, on_cpuid},
                 {UC_X86_INS_RDTSC, on_rdtsc},
                 {UC_X86_INS_RDTSCP, on_rdtscp},
                 {UC_X86_INS_SYSCALL, on_syscall},
                 {UC_X86_INS_SYSENTER, on_sysenter}};
    uc_hook hook;
    for (unsigned i = 0; i < sizeof hooks / sizeof *hooks; i++)
        if (uc_hook_add(cpu->uc, &hook, UC_HOOK_INSN, (void *)hooks[i].hook, cpu, 1, 0, hooks[i].instruction))
            return false;
    return true;
}

/* CS and SS of ring 0 with fixed contents: both instructions read no descriptor. */
static void enter_flat(struct cpu *cpu, uint16_t selector)
{
    const uint32_t common = DESC_S | DESC_P | DESC_G;
    cpu->env->segs[CS] = (struct segment_cache){.selector = selector, .limit = ~0u,
                                                .flags = common | 11 << 8 | (long_mode(cpu) ? DESC_L : DESC_B)};
    cpu->env->segs[SS] = (struct segment_cache){.selector = selector + 8u, .limit = ~0u, .flags = common | 3 << 8 | DESC_B};
    update_hflags(cpu);
}

static bool do_syscall(struct cpu *cpu)
{
    struct uc_env *env = cpu->env;
    if (!(env->efer & EFER_SCE) || !(env->efer & EFER_LMA))
        return false;
    env->regs[RCX] = env->eip;
    env->regs[11] = env->eflags;
    env->eip = env->segs[CS].flags & DESC_L ? cpu->msrs->lstar : cpu->msrs->cstar;
    env->eflags = (env->eflags & ~(cpu->msrs->fmask | RFLAGS_RF)) | 2;
    enter_flat(cpu, cpu->msrs->star >> 32 & 0xfffc);
    return true;
}

static bool do_sysenter(struct cpu *cpu)
{
    struct uc_env *env = cpu->env;
    uint16_t selector = cpu->msrs->sysenter_cs & 0xfffc;
    if (!(env->cr[0] & CR0_PE) || !selector)
        return false;
    uint64_t mask = long_mode(cpu) ? ~0ull : 0xffffffff;
    env->regs[RSP] = cpu->msrs->sysenter_esp & mask;
    env->eip = cpu->msrs->sysenter_eip & mask;
    env->eflags &= ~(uint64_t)(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM);
    enter_flat(cpu, selector);
    return true;
}

/* SYSCALL or SYSENTER, which RIP is past. */
void enter_kernel(struct cpu *cpu, enum cause cause)
{
    bool done = cause == CAUSE_SYSCALL ? do_syscall(cpu) : do_sysenter(cpu);
    cpu->env->hflags &= ~(uint32_t)HF_INHIBIT_IRQ;
    if (done)
        return;
    cpu->env->eip -= CALL_LENGTH;
    raise_event(cpu, cause == CAUSE_SYSCALL ? UD : GP, 0, 0, 0, false);
}

static bool stops(const struct cpu_block *block, uint32_t index, bool write)
{
    for (uint32_t i = 0; i < block->stop_msrs_count && i < CPU_STOP_MSRS_MAX; i++) {
        const struct cpu_msr_range *range = &block->stop_msrs[i];
        if (index - range->first < range->count && (write ? range->writes : range->reads))
            return true;
    }
    return false;
}

/* RDMSR or WRMSR at RIP. The stop, or 0: RIP is past it, or what it raises is pending. */
int access_msr(struct cpu *cpu)
{
    struct uc_env *env = cpu->env;
    struct cpu_block *block = cpu->block;
    uint8_t code[15];
    unsigned length = 0;
    do {
        if (!read_code(cpu, linear_rip(cpu) + length, &code[length], 1))
            return not_done(cpu);
    } while (code[length++] != 0x0f && length < 14);
    if (!read_code(cpu, linear_rip(cpu) + length, &code[length], 1))
        return not_done(cpu);
    bool write = code[length++] == 0x30;
    uint32_t index = (uint32_t)env->regs[RCX];
    uint64_t value = (uint32_t)env->regs[RAX] | env->regs[RDX] << 32;
    bool stop = stops(block, index, write), done = false;
    if (!stop) {
        store_state(cpu);
        done = write ? msr_write(block, index, value, true) : msr_read(block, index, &value);
        load_state(cpu);
        uint64_t any;
        stop = !done && block->msr_mode & CPU_MSR_STOP_UNKNOWN && !msr_read(block, index, &any);
    }
    if (stop) {
        cpu->asked = (struct question){.start = env->eip, .length = length};
        block->stop.nr = index;
        block->stop.value[0] = value;
        return write ? CPU_STOP_WRMSR : CPU_STOP_RDMSR;
    }
    if (!done) {
        raise_event(cpu, GP, 0, 0, 0, false);
        return CPU_STOP_NONE;
    }
    if (!write)
        env->regs[RAX] = (uint32_t)value, env->regs[RDX] = value >> 32;
    instruction_done(cpu, env->eip + length);
    trap_if_traced(cpu);
    return CPU_STOP_NONE;
}

/* Bytes of the INT instruction before RIP. INT3 and INTO have one, INT n has two. */
int int_length(struct cpu *cpu, int vector)
{
    uint8_t code = 0;
    if (vector != BP && vector != OF)
        return 2;
    return read_code(cpu, linear_rip(cpu) - 1, &code, 1) && (code == 0xcc || code == 0xce) ? 1 : 2;
}
