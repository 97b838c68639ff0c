/* Faults of the host below a guest's access: SIGSEGV and SIGBUS in translated code, in a helper of it, in the translator, and
 * where the library itself touches guest memory.
 *
 * The handler ends the pass in front of the instruction, as Unicorn does for an exception. Which page it was is found after
 * that: the instruction is stepped once with an empty TLB, and the fill that leads to the page is refused. What has changed
 * meanwhile is right as well: a leaf that was dropped is a miss, memory that has come back is used. */
#define _GNU_SOURCE
#include "internal.h"

#include <string.h>
#include <ucontext.h>

extern void cpu_loop_exit_x86_64(void *cpu_state) __attribute__((noreturn));
extern void cpu_loop_exit_restore_x86_64(void *cpu_state, uintptr_t pc) __attribute__((noreturn));
extern void *tcg_tb_lookup_x86_64(void *tcg, uintptr_t pc);

enum { STACK_WORDS = 2048, GETPC_ADJUST = 2 };

static struct sigaction previous[2]; /* SIGSEGV, SIGBUS; written once */

/* What the host cannot do at once ends in a step with all other CPUs out of the guest. */
void __wrap_cpu_loop_exit_atomic_x86_64(void *cpu_state, uintptr_t pc)
{
    current_cpu->pass_end->exception_index = EXIT_ATOMIC;
    cpu_loop_exit_restore_x86_64(cpu_state, pc);
}

/* The address in translated code that the fault belongs to, or 0: the instruction itself, or the call of the helper. */
static uintptr_t translated_pc(struct cpu *cpu, const ucontext_t *context)
{
    uintptr_t buffer = *(uintptr_t *)(cpu->tcg + TCG_CODE_BUFFER), size = *(uintptr_t *)(cpu->tcg + TCG_CODE_BUFFER_SIZE);
    uintptr_t pc = (uintptr_t)context->uc_mcontext.gregs[REG_RIP];
    if (pc - buffer < size)
        return pc + GETPC_ADJUST;
    const uintptr_t *stack = (const uintptr_t *)context->uc_mcontext.gregs[REG_RSP];
    for (int i = 0; i < STACK_WORDS; i++)
        if (stack[i] - buffer < size && tcg_tb_lookup_x86_64(cpu->tcg, stack[i]))
            return stack[i];
    return 0;
}

bool cpu_handle_fault(int signal, siginfo_t *info, void *context)
{
    struct cpu *cpu = current_cpu;
    if (!cpu || info->si_code <= 0 || info->si_code == SI_KERNEL || (!cpu->guard && !cpu->in_pass))
        return false;
    const ucontext_t *where = context;
    cpu->fault_hva = (uint64_t)info->si_addr;
    cpu->fault_signal = (uint8_t)signal;
    /* The handler is not returned from: whoever installed it may have had signals blocked meanwhile. */
    if (cpu->guard) {
        pthread_sigmask(SIG_SETMASK, &where->uc_sigmask, NULL);
        siglongjmp(*cpu->guard, 1);
    }
    uintptr_t pc = cpu->translating ? 0 : translated_pc(cpu, where);
    if (!pc && !cpu->translating)
        return false;
    pthread_sigmask(SIG_SETMASK, &where->uc_sigmask, NULL);
    cpu->pass_end->exception_index = EXIT_FAULT;
    if (!cpu->translating)
        cpu_loop_exit_restore_x86_64(cpu->cpu_state, pc);
    cpu->translating = false;
    cpu_loop_exit_x86_64(cpu->cpu_state);
}

static void pass_on(int signal, siginfo_t *info, void *context)
{
    static __thread bool passing;
    struct sigaction *old = &previous[signal == SIGBUS];
    /* A handler that was set after ours hands the signal back to us: then the default ends the process. */
    if (passing) {
        struct sigaction none = {.sa_handler = SIG_DFL};
        sigaction(signal, &none, NULL);
        return;
    }
    passing = true;
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(signal, info, context);
    else if (old->sa_handler == SIG_DFL)
        sigaction(signal, old, NULL); /* the access is repeated, and ends the process */
    else if (old->sa_handler != SIG_IGN)
        old->sa_handler(signal);
    passing = false;
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    if (!cpu_handle_fault(signal, info, context))
        pass_on(signal, info, context);
}

void cpu_install_handlers(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct sigaction now, ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    static const int signals[2] = {SIGSEGV, SIGBUS};
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 2; i++) {
        sigaction(signals[i], NULL, &now);
        if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_fault)
            continue;
        previous[i] = now;
        sigaction(signals[i], &ours, NULL);
    }
    pthread_mutex_unlock(&lock);
}

/* After a pass that a fault has ended, with RIP on the instruction. The stop; 0: it was done, or something else waits. */
int after_fault(struct cpu *cpu)
{
    cpu->block->host_faults++;
    tlb_flush(cpu);
    cpu->probe_hva = cpu->fault_hva & PAGE_MASK;
    cpu->probe_offset = cpu->fault_hva % PAGE;
    int stop = step(cpu);
    cpu->probe_hva = 0;
    return stop;
}
