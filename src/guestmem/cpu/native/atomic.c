/* Exact atomics of CPUs that run at once. Unicorn can translate `lock` to an atomic instruction of the host and does not, as
 * it knows one CPU. The flag that makes it do so is set while a block is translated, and only then, since blocks are looked up
 * by it. Blocks of a single step are translated without. What the host cannot do as one instruction leaves the pass, and is
 * stepped while nobody else executes (run.c). */
#include <string.h>

#include "inside.h"

enum { TB_CFLAGS = 24, TCG_CFLAGS = 100, CF_PARALLEL = 0x80000 };

extern void __real_gen_intermediate_code_x86_64(void *object, void *block, int max);
extern void cpu_loop_exit_restore_x86_64(void *object, uintptr_t pc) __attribute__((noreturn));
extern void __real_cpu_loop_exit_atomic_x86_64(void *object, uintptr_t pc) __attribute__((noreturn));

static void set_flag(void *flags, bool on)
{
    uint32_t value;
    memcpy(&value, flags, sizeof(value));
    value = on ? value | CF_PARALLEL : value & ~(uint32_t)CF_PARALLEL;
    memcpy(flags, &value, sizeof(value));
}

void __wrap_gen_intermediate_code_x86_64(void *object, void *block, int max)
{
    struct cpu *cpu = current;
    bool parallel = mode == CPU_MODE_PARALLEL && cpu && !cpu->stepping;
    if (parallel) {
        set_flag((char *)block + TB_CFLAGS, true);
        set_flag(cpu->at.tcg + TCG_CFLAGS, true); /* stays until code generation has ended */
    }
    __real_gen_intermediate_code_x86_64(object, block, max);
    if (parallel)
        set_flag((char *)block + TB_CFLAGS, false);
}

void __wrap_cpu_loop_exit_atomic_x86_64(void *object, uintptr_t pc)
{
    if (!current)
        __real_cpu_loop_exit_atomic_x86_64(object, pc);
    current->at.pass_end->exception_index = EXIT_ATOMIC;
    cpu_loop_exit_restore_x86_64(object, pc);
}

/* Whether the instruction at RIP is one that others must not see half of: a LOCK prefix, or XCHG, which locks without. */
bool locks_at_rip(struct cpu *cpu)
{
    uint8_t byte;
    struct refused before = cpu->refused;
    bool locks = false;
    if (mode != CPU_MODE_PARALLEL)
        return false;
    for (int i = 0; i < 15 && linear_code(cpu, linear_rip(cpu) + (uint64_t)i, &byte, 1); i++) {
        bool is_prefix = byte == 0x66 || byte == 0x67 || byte == 0xf2 || byte == 0xf3 || byte == 0x2e || byte == 0x36 ||
                         byte == 0x3e || byte == 0x26 || byte == 0x64 || byte == 0x65 || (byte & 0xf0) == 0x40;
        locks = byte == 0xf0 || byte == 0x86 || byte == 0x87;
        if (locks || !is_prefix)
            break;
    }
    cpu->refused = before;
    return locks;
}
