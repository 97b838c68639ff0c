/* SIGSEGV and SIGBUS. A guest's access to memory that cannot be touched raises them in the thread that is in the guest; all
 * others are the client's. So from the first run on the kernel has our handler for both, the client's own are kept here,
 * and it is told of them when it asks. What is not the guest's is handled as its handler's flags say.
 *
 * A client that sets a handler past us (a raw rt_sigaction) is noticed at its next run. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "real.h"
#include "vcpu.h"

struct handled {
    int signal;
    struct sigaction client; /* by `lock`; a handler reads it without */
};

static struct handled handled[] = {{.signal = SIGSEGV}, {.signal = SIGBUS}};
enum { HANDLED = sizeof(handled) / sizeof(handled[0]) };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool ours; /* the kernel has our handlers */

static struct handled *handled_of(int signal)
{
    for (int i = 0; i < HANDLED; i++)
        if (handled[i].signal == signal)
            return &handled[i];
    return NULL;
}

/* ---- a fault */

/* The access is repeated, or the signal comes again, and meets the default. */
static void die(int signal, const siginfo_t *info)
{
    struct sigaction deadly = {.sa_handler = SIG_DFL};
    REAL(sigaction)(signal, &deadly, NULL);
    if (info->si_code <= 0)
        sys(SYS_tgkill, sys(SYS_getpid), sys(SYS_gettid), signal);
}

/* As the kernel would: its mask is put back from the context when our handler returns. */
static void handle_as_client(int signal, siginfo_t *info, void *context)
{
    struct sigaction action = handled_of(signal)->client;
    bool plain = !(action.sa_flags & SA_SIGINFO);
    if (plain && (action.sa_handler == SIG_DFL || (action.sa_handler == SIG_IGN && info->si_code > 0)))
        return die(signal, info);
    if (plain && action.sa_handler == SIG_IGN)
        return;
    kernel_sigset mask;
    memcpy(&mask, &action.sa_mask, sizeof(mask));
    if (!(action.sa_flags & SA_NODEFER))
        mask |= 1ULL << (signal - 1);
    if (action.sa_flags & (int)SA_RESETHAND)
        handled_of(signal)->client = (struct sigaction){.sa_handler = SIG_DFL};
    sys(SYS_rt_sigprocmask, SIG_BLOCK, &mask, 0, sizeof(mask));
    if (plain)
        action.sa_handler(signal);
    else
        action.sa_sigaction(signal, info, context);
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    if (!library.handle_fault(signal, info, context))
        handle_as_client(signal, info, context);
}

/* ---- whose handlers the kernel has */

/* The stack is the client's choice: it has its own handlers on another one to survive that the first is full. */
static void install(struct handled *one)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    action.sa_flags |= one->client.sa_flags & (SA_ONSTACK | SA_RESTART);
    REAL(sigaction)(one->signal, &action, NULL);
}

static void take_over(struct handled *one)
{
    struct sigaction now;
    REAL(sigaction)(one->signal, NULL, &now);
    if (now.sa_sigaction == on_fault)
        return;
    one->client = now;
    install(one);
}

static __thread stack_t own_stack __attribute__((tls_model("initial-exec")));

/* A fault of the guest is left by a jump and needs more stack than an alternative one may have. */
static void stack_away(void)
{
    bool alternative = (handled[0].client.sa_flags | handled[1].client.sa_flags) & SA_ONSTACK;
    own_stack.ss_flags = SS_DISABLE;
    if (!alternative)
        return;
    sys(SYS_sigaltstack, 0, &own_stack);
    if (own_stack.ss_flags & (SS_DISABLE | SS_ONSTACK))
        return;
    stack_t none = {.ss_flags = SS_DISABLE};
    sys(SYS_sigaltstack, &none, 0);
}

/* A fault that is blocked kills. */
static const kernel_sigset raised = 1ULL << (SIGSEGV - 1) | 1ULL << (SIGBUS - 1);

void faults_begin(void)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < HANDLED; i++)
        take_over(&handled[i]);
    __atomic_store_n(&ours, true, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    stack_away();
    sys(SYS_rt_sigprocmask, SIG_UNBLOCK, &raised, 0, sizeof(raised));
}

void faults_end(void)
{
    sys(SYS_rt_sigprocmask, SIG_BLOCK, &raised, 0, sizeof(raised));
    if (!(own_stack.ss_flags & (SS_DISABLE | SS_ONSTACK)))
        sys(SYS_sigaltstack, &own_stack, 0);
}

void faults_after_fork(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

/* ---- sigaction() and signal() of the client */

static int change(struct handled *one, const struct sigaction *new, struct sigaction *old)
{
    kernel_sigset blocked = signals_block();
    pthread_mutex_lock(&lock);
    struct sigaction before = one->client;
    if (new) {
        one->client = *new;
        install(one);
    }
    pthread_mutex_unlock(&lock);
    signals_restore(blocked);
    if (old)
        *old = before;
    return 0;
}

EXPORT int sigaction(int signal, const struct sigaction *new, struct sigaction *old)
{
    struct handled *one = __atomic_load_n(&ours, __ATOMIC_ACQUIRE) ? handled_of(signal) : NULL;
    return one ? change(one, new, old) : REAL(sigaction)(signal, new, old);
}

static __sighandler_t set_handler(int signal, __sighandler_t handler, int flags)
{
    struct sigaction new = {.sa_handler = handler, .sa_flags = flags}, old;
    return change(handled_of(signal), &new, &old) ? SIG_ERR : old.sa_handler;
}

EXPORT __sighandler_t signal(int number, __sighandler_t handler)
{
    if (!__atomic_load_n(&ours, __ATOMIC_ACQUIRE) || !handled_of(number))
        return REAL(signal)(number, handler);
    return set_handler(number, handler, SA_RESTART);
}
