/* SIGSEGV and SIGBUS below a guest's access. Translated code reaches guest memory by plain loads and stores, so memory that
 * the host would not let be touched raises a signal there, in a helper that translated code has called, or in our own touch
 * of a page table. The first two end the pass with the registers of the instruction's start, as an exception of the guest
 * would; the last is caught where it happens. Which guest page it was, and how it was to be used, is found by a step of that
 * instruction with an empty TLB: its fills name the page (run.c). */
#include <signal.h>
#include <string.h>
#include <ucontext.h>

#include "inside.h"

/* Of libunicorn.a: the registers at a place in translated code, and the way out of it. */
extern void cpu_loop_exit_restore_x86_64(void *object, uintptr_t pc) __attribute__((noreturn));
extern void *tcg_tb_lookup_x86_64(void *tcg, uintptr_t pc);

enum { TCG_CODE = 160, TCG_CODE_SIZE = 184 }; /* in TCGContext */
enum { STACK_WORDS = 1024, RETURN_ADJUST = 2 };
enum { ERROR_WRITE = 2 }; /* of the page fault */

static bool in_translated_code(const struct cpu *cpu, uintptr_t pc)
{
    uint64_t start, size;
    memcpy(&start, cpu->at.tcg + TCG_CODE, sizeof(start));
    memcpy(&size, cpu->at.tcg + TCG_CODE_SIZE, sizeof(size));
    return pc - start < size;
}

/* The place in translated code that the fault belongs to; 0: none. A helper was called by it: its return address lies on
 * the stack. */
static uintptr_t guest_place(const struct cpu *cpu, const ucontext_t *context)
{
    uintptr_t pc = (uintptr_t)context->uc_mcontext.gregs[REG_RIP];
    if (in_translated_code(cpu, pc))
        return pc + RETURN_ADJUST;
    const uintptr_t *stack = (const uintptr_t *)context->uc_mcontext.gregs[REG_RSP];
    for (int i = 0; i < STACK_WORDS; i++)
        if (in_translated_code(cpu, stack[i]) && tcg_tb_lookup_x86_64(cpu->at.tcg, stack[i]))
            return stack[i];
    return 0;
}

static void note(struct cpu *cpu, int signal, const siginfo_t *info, const ucontext_t *context)
{
    cpu->host_fault = (uint64_t)info->si_addr;
    cpu->host_signal = (uint8_t)signal;
    cpu->host_write = (context->uc_mcontext.gregs[REG_ERR] & ERROR_WRITE) != 0;
    cpu->block->host_faults++;
}

bool cpu_handle_fault(int signal, siginfo_t *info, void *context)
{
    struct cpu *cpu = current;
    if (!cpu || info->si_code <= 0) /* sent, not raised */
        return false;
    if (cpu->guard) {
        note(cpu, signal, info, context);
        siglongjmp(*cpu->guard, 1);
    }
    if (!cpu->emulating)
        return false;
    uintptr_t place = guest_place(cpu, context);
    if (!place)
        return false;
    note(cpu, signal, info, context);
    cpu->at.pass_end->exception_index = EXIT_HOST_FAULT;
    cpu_loop_exit_restore_x86_64(cpu->at.object, place);
}

/* ---- handlers for a process that has none of its own for this */

static struct sigaction before[2];

static int place_of(int signal)
{
    return signal == SIGBUS;
}

static void pass_on(int signal, siginfo_t *info, void *context)
{
    const struct sigaction *old = &before[place_of(signal)];
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(signal, info, context);
    else if (old->sa_handler != SIG_DFL && old->sa_handler != SIG_IGN)
        old->sa_handler(signal);
    else
        sigaction(signal, &(struct sigaction){.sa_handler = SIG_DFL}, NULL); /* the access is repeated, and kills */
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    if (!cpu_handle_fault(signal, info, context))
        pass_on(signal, info, context);
}

void cpu_install_handlers(void)
{
    static const int signals[] = {SIGSEGV, SIGBUS};
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK}, now;
    for (int i = 0; i < 2; i++) {
        sigaction(signals[i], NULL, &now);
        if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_fault)
            continue;
        before[place_of(signals[i])] = now;
        sigaction(signals[i], &ours, NULL);
    }
}
