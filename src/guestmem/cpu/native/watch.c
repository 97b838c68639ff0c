/* Breakpoints on data (DR7), which Unicorn has taken out of QEMU: two functions of it that answer no are wrapped.
 *
 * Pages that hold a watched address are taken the slow way. There an access that hits ends the pass in front of its
 * instruction, which is then stepped, since the trap comes after it. A guest that moves DR0 to DR3 without a write to DR7
 * has the old addresses watched. Source: Intel SDM vol. 3, 18.2.4 "Debug control register (DR7)". */
#include "internal.h"

extern void cpu_loop_exit_restore_x86_64(void *cpu_state, uintptr_t pc) __attribute__((noreturn));

enum { MEM_READ = 1, MEM_WRITE = 2, ON_WRITE = 1, ON_ACCESS = 3 };

/* The breakpoints that an access hits, as bits of DR6. */
static unsigned hits(const struct cpu *cpu, uint64_t address, uint64_t length, int flags)
{
    static const uint8_t sizes[4] = {1, 2, 8, 4};
    const uint64_t *dr = cpu->tail->dr;
    unsigned found = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned type = dr[7] >> (16 + 4 * i) & 3, size = sizes[dr[7] >> (18 + 4 * i) & 3];
        uint64_t first = dr[i] & ~(uint64_t)(size - 1);
        bool wanted = type == ON_ACCESS || (type == ON_WRITE && flags & MEM_WRITE);
        if (dr[7] >> 2 * i & 3 && wanted && (first - address < length || address - first < size))
            found |= 1u << i;
    }
    return found;
}

int __wrap_cpu_watchpoint_address_matches_x86_64(void *cpu_state, uint64_t address, uint64_t length)
{
    (void)cpu_state;
    const struct cpu *cpu = current_cpu;
    /* Port instructions put their own breakpoint there, which is not on data. */
    return cpu && cpu->tail->dr[7] & 0xff && hits(cpu, address, length, MEM_WRITE) ? MEM_READ | MEM_WRITE : 0;
}

void __wrap_cpu_check_watchpoint_x86_64(void *cpu_state, uint64_t address, uint64_t length, unsigned attributes, int flags,
                                        uintptr_t pc)
{
    struct cpu *cpu = current_cpu;
    (void)attributes;
    unsigned found = hits(cpu, address, length, flags);
    cpu->watch_hits |= found;
    if (!found || cpu->watch_step)
        return;
    cpu->pass_end->exception_index = EXIT_WATCH;
    cpu_loop_exit_restore_x86_64(cpu_state, pc);
}

/* The step of the instruction that hit; `watch_hits` are those of it. */
int step_watched(struct cpu *cpu)
{
    cpu->watch_hits = 0;
    cpu->watch_step = true;
    int stop = step(cpu);
    cpu->watch_step = false;
    return stop;
}
