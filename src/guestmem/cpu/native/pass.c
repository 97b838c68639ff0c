/* One pass of Unicorn, which ends for one of four reasons. A hook asked for it: `cause`, and the first wins. A TLB fill was
 * refused: `refused`, and the instruction has not happened. An exception or an exit of the SVM kind: exception_index. Or
 * HLT.
 *
 * A stop that a hook asks for is taken at the start of a block, where it is exact. Unicorn by itself also looks for one
 * after each load and store, when RIP is still on the instruction: after a store it would happen twice.
 * `no_exit_request`, which exists for the IT blocks of ARM, leaves these checks out. A step (`stepping`) wants them, because
 * a read must be stopped before its value is used, and is of one instruction.
 *
 * Another thread ends a pass as a request for INIT, which the CPU exits for, and not by uc_emu_stop(): once a stop is asked
 * for, Unicorn calls only the first of its instruction hooks, so a SYSCALL before the end of the block would be left out. */
#define _GNU_SOURCE
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Exits of an SVM guest, AMD APM vol. 2, appendix C: bits of the intercept vector that begins with INTR (0x60). */
enum { INTERCEPT_NMI = 1 << 1, INTERCEPT_INIT = 1 << 3, INTERCEPT_VINTR = 1 << 4, INTERCEPT_MSR = 1 << 28 };
enum { VMCB_MSRPM = 72, MSRPM_SIZE = 0x2000 };
#define HOST_SIZE (1ull << 48)

/* What QEMU reads of the host's control block: that every MSR is intercepted. */
static uint8_t *control_block(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static uint8_t *block;
    pthread_mutex_lock(&lock);
    if (!block) {
        void *memory = mmap(NULL, PAGE + MSRPM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory != MAP_FAILED) {
            block = memory;
            memset(block + PAGE, 0xff, MSRPM_SIZE);
            *(uint64_t *)(block + VMCB_MSRPM) = (uint64_t)block + PAGE;
        }
    }
    pthread_mutex_unlock(&lock);
    return block;
}

bool pass_open(struct cpu *cpu)
{
    uc_hook hook;
    uint8_t *vmcb = control_block();
    if (!vmcb || !(cpu->uc = layout_open()))
        return false;
    uint16_t tags = 0xffff;
    uc_reg_write(cpu->uc, UC_X86_REG_FPTAG, &tags);
    struct uc_view *view = (struct uc_view *)cpu;
    layout_view(cpu->uc, view);
    if (uc_mem_map_ptr(cpu->uc, PAGE, HOST_SIZE - PAGE, UC_PROT_ALL, (void *)PAGE) ||
        uc_hook_add(cpu->uc, &hook, UC_HOOK_TLB_FILL, (void *)on_fill, cpu, 1, 0))
        return false;
    cpu->tail->vm_vmcb = (uint64_t)vmcb;
    cpu->tail->intercept = INTERCEPT_NMI | INTERCEPT_INIT | INTERCEPT_VINTR | INTERCEPT_MSR;
    cpu->tail->intercept_dr_write = DR_WRITES;
    cpu->env->hflags |= HF_GUEST | HF_IOBPT;
    cpu->env->hflags2 |= HF2_GIF | HF2_VINTR;
    *cpu->no_exit_request = 1;
    return true;
}

void set_interrupt_request(struct cpu *cpu, uint32_t set, uint32_t clear)
{
    if (clear)
        __atomic_and_fetch(cpu->interrupt_request, ~clear, __ATOMIC_SEQ_CST);
    if (set)
        __atomic_or_fetch(cpu->interrupt_request, set, __ATOMIC_SEQ_CST);
}

/* One pass. Unicorn's error. */
int emulate(struct cpu *cpu)
{
    cpu->cause = CAUSE_NONE;
    cpu->refused.kind = NOT_REFUSED;
    cpu->in_pass = true;
    int code = uc_emu_start(cpu->uc, cpu->env->eip, 0, 0, 0);
    cpu->in_pass = false;
    return code;
}

/* A pass of one instruction. What RFLAGS.TF does with DR6 is taken back. */
int single_step(struct cpu *cpu)
{
    struct uc_env *env = cpu->env;
    uint64_t traced = env->eflags & RFLAGS_TF, dr6 = cpu->tail->dr[6];
    int code;
    cpu->stepping = true;
    *cpu->no_exit_request = 0;
    env->eflags |= RFLAGS_TF;
    do {
        __atomic_store_n(cpu->interrupt_request, 0, __ATOMIC_SEQ_CST);
        code = emulate(cpu);
        /* A kick that began before `stepping` was set has ended the pass before its instruction. */
    } while (!cpu->cause && !cpu->refused.kind && code == UC_ERR_EXCEPTION &&
             cpu->pass_end->exception_index == VMEXIT + EXIT_INIT);
    env->eflags = (env->eflags & ~(uint64_t)RFLAGS_TF) | traced;
    cpu->tail->dr[6] = dr6;
    *cpu->no_exit_request = 1;
    cpu->stepping = false;
    return code;
}

/* A pass in which no fetch succeeds and nothing happens: at its end Unicorn lets go of hooks that were deleted. Its TLB is
 * empty after it. */
void sealed_pass(struct cpu *cpu)
{
    tlb_flush(cpu);
    cpu->sealed = true;
    emulate(cpu);
    cpu->sealed = false;
}

/* For hooks: end the pass because of `cause`, at the start of the next block, or in a step at once. */
void end_pass(struct cpu *cpu, enum cause cause)
{
    if (!cpu->cause)
        cpu->cause = cause;
    uc_emu_stop(cpu->uc);
}

/* Tells a CPU, from any thread, to leave its blocks and look at `kicks`. */
void kick(struct cpu *cpu, uint32_t why)
{
    atomic_fetch_or(&cpu->kicks, why);
    if (!__atomic_load_n(&cpu->stepping, __ATOMIC_SEQ_CST)) {
        set_interrupt_request(cpu, REQUEST_INIT, 0);
        __atomic_store_n(cpu->leave_blocks, 0xffff, __ATOMIC_SEQ_CST);
    }
}
