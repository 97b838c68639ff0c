/* Changes to Unicorn's translator, by wrapping two functions of it at link time.
 *
 * Parallel CPUs: with CF_PARALLEL a `lock` prefix becomes an atomic access of the host, and what the host cannot do at once
 * ends in cpu_loop_exit_atomic(). The flag is there while a block is translated only: Unicorn looks blocks up without it.
 *
 * BMI and ADX: they are instructions of general registers, which CR4.OSFXSR does not concern. QEMU 5 decodes those with a
 * prefix of 66 as if they were of SSE. They are decoded as if the bit were set. */
#include "internal.h"

#include <string.h>

enum { CF_PARALLEL = 0x80000, CONTEXT_SIZE = 512 };

/* Of qemu/include/exec/translator.h. */
struct disas_context_base {
    void *tb;
    uint64_t pc_first, pc_next;
};

struct translator_ops {
    void (*init_disas_context)(struct disas_context_base *, void *);
    void (*tb_start)(struct disas_context_base *, void *);
    void (*insn_start)(struct disas_context_base *, void *);
    bool (*breakpoint_check)(struct disas_context_base *, void *, const void *);
    void (*translate_insn)(struct disas_context_base *, void *);
    void (*tb_stop)(struct disas_context_base *, void *);
    void (*pc_sync)(struct disas_context_base *, void *);
};

extern uint32_t cpu_ldub_code_x86_64(void *env, uint64_t at);
extern void __real_gen_intermediate_code_x86_64(void *cpu_state, void *tb, int max);
extern void __real_translator_loop_x86_64(const struct translator_ops *ops, struct disas_context_base *base, void *cpu_state,
                                          void *tb, int max);

unsigned layout_disas_flags;
static __thread const struct translator_ops *real_ops;

/* Whether the instruction at `at` is 66 0F 38 F6 (ADCX) or VEX.0F38 of pp 1 with F7 (SHLX), with prefixes in front. No byte
 * is read that the instruction may not have. */
static bool is_bmi_or_adx(void *env, uint64_t at)
{
    bool operand_size = false;
    uint8_t byte = (uint8_t)cpu_ldub_code_x86_64(env, at++);
    for (int i = 0; i < 4 && (byte >> 4 == 4 || memchr("\x26\x2e\x36\x3e\x64\x65\x66\x67", byte, 8)); i++) {
        operand_size |= byte == 0x66;
        byte = (uint8_t)cpu_ldub_code_x86_64(env, at++);
    }
    if (byte == 0xc4)
        return (cpu_ldub_code_x86_64(env, at) & 31) == 2 && (cpu_ldub_code_x86_64(env, at + 1) & 3) == 1 &&
               cpu_ldub_code_x86_64(env, at + 2) == 0xf7;
    return byte == 0x0f && operand_size && cpu_ldub_code_x86_64(env, at) == 0x38 &&
           cpu_ldub_code_x86_64(env, at + 1) == 0xf6;
}

static uint64_t *flags_of(struct disas_context_base *base)
{
    return (uint64_t *)((uint8_t *)base + layout_disas_flags);
}

/* Finds DisasContext.flags once, in a context that has just been set up: the only copy of the block's flags. */
static void find_flags(struct disas_context_base *base, const void *tb)
{
    uint64_t flags = *(const uint32_t *)((const uint8_t *)tb + TB_FLAGS);
    unsigned found = 0, count = 0;
    for (unsigned at = 24; at < CONTEXT_SIZE; at += 8)
        if (*(uint64_t *)((uint8_t *)base + at) == flags)
            found = at, count++;
    layout_disas_flags = count == 1 ? found : 0;
}

static void translate_insn(struct disas_context_base *base, void *cpu_state)
{
    struct cpu *cpu = current_cpu;
    if (!layout_disas_flags)
        find_flags(base, base->tb);
    bool without = cpu && !(*flags_of(base) & HF_OSFXSR) && is_bmi_or_adx(cpu->env, base->pc_next);
    if (without)
        *flags_of(base) |= HF_OSFXSR;
    real_ops->translate_insn(base, cpu_state);
    if (without)
        *flags_of(base) &= ~(uint64_t)HF_OSFXSR;
}

void __wrap_translator_loop_x86_64(const struct translator_ops *ops, struct disas_context_base *base, void *cpu_state,
                                   void *tb, int max)
{
    struct translator_ops ours = *ops;
    real_ops = ops;
    ours.translate_insn = translate_insn;
    __real_translator_loop_x86_64(&ours, base, cpu_state, tb, max);
}

void __wrap_gen_intermediate_code_x86_64(void *cpu_state, void *tb, int max)
{
    struct cpu *cpu = current_cpu;
    uint32_t *cflags = (uint32_t *)((uint8_t *)tb + TB_CFLAGS);
    if (!cpu) {
        __real_gen_intermediate_code_x86_64(cpu_state, tb, max);
        return;
    }
    bool parallel = cpu_mode == CPU_MODE_PARALLEL && !cpu->stepping;
    cpu->translating = true;
    if (parallel) {
        *cflags |= CF_PARALLEL;
        *(uint32_t *)(cpu->tcg + TCG_TB_CFLAGS) |= CF_PARALLEL;
    }
    __real_gen_intermediate_code_x86_64(cpu_state, tb, max);
    *cflags &= ~(uint32_t)CF_PARALLEL; /* the translator's copy stays until code generation has ended */
    cpu->translating = false;
}
