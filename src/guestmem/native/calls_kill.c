/* Signals that the client sends to its own threads. One that is in the guest has them blocked and is told to look. */
#define _GNU_SOURCE
#include <signal.h>
#include <unistd.h>

#include "calls.h"
#include "real.h"
#include "vcpu.h"

EXPORT int pthread_kill(pthread_t thread, int signal)
{
    int error = REAL(pthread_kill)(thread, signal);
    if (process.active && !error && signal)
        vcpus_look(thread);
    return error;
}

EXPORT int pthread_sigqueue(pthread_t thread, int signal, const union sigval value)
{
    int error = REAL(pthread_sigqueue)(thread, signal, value);
    if (process.active && !error && signal)
        vcpus_look(thread);
    return error;
}

/* By number: whose it is we do not know. */
long call_kill(long number, long a, long b, long c, long d)
{
    long result = sys(number, a, b, c, d);
    if (process.active && !result)
        vcpus_look_all();
    return result;
}

EXPORT int tgkill(pid_t process_id, pid_t thread, int signal)
{
    return (int)libc_result(call_kill(SYS_tgkill, process_id, thread, signal, 0));
}

EXPORT int kill(pid_t process_id, int signal)
{
    return (int)libc_result(call_kill(SYS_kill, process_id, signal, 0, 0));
}
