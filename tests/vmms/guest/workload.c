/* What a guest is asked to do, and the host beside it: integers, floating point, pipes, signals, timers, fork. Every line
 * that it prints is the same on every right x86-64 CPU. Statically linked; of libm it uses nothing, whose variants for one
 * CPU or another differ in the last bit. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t fnv(uint64_t sum, const void *data, size_t size) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < size; i++) sum = (sum ^ bytes[i]) * 0x100000001b3;
    return sum;
}

static void must(int holds, const char *what) {
    if (holds) return;
    printf("failed: %s (%s)\n", what, strerror(errno));
    exit(1);
}

/* Multiplication and division of 64 and 128 bits, shifts, rotations, bit counts, signed and unsigned. */
static uint64_t integers(int rounds) {
    uint64_t x = 88172645463325252u, sum = 0xcbf29ce484222325;
    for (int i = 0; i < rounds; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        unsigned __int128 product = (unsigned __int128)x * (x >> 3 | 1);
        uint64_t parts[6] = {(uint64_t)(product >> 64), (uint64_t)(product / (x >> 40 | 1)), x % ((x >> 50) + 1),
                             (uint64_t)((int64_t)x / ((int32_t)x | 1)), x << (x & 63) | x >> (-x & 63),
                             (uint64_t)__builtin_popcountll(x) << 8 | (uint64_t)__builtin_ctzll(x | 1ull << 63)};
        sum = fnv(sum, parts, sizeof parts);
    }
    return sum;
}

/* The logistic map and Newton's square root, each in float (SSE), double (SSE2) and long double (x87). */
#define FLOATING(type, name)                                                     \
    static uint64_t name(int rounds) {                                           \
        type x = (type)0.3, root = (type)2;                                      \
        uint64_t sum = 0xcbf29ce484222325;                                       \
        for (int i = 1; i <= rounds; i++) {                                      \
            x = (type)3.9 * x * ((type)1 - x);                                   \
            root = (root + (type)i / root) / (type)2;                            \
            int64_t seen[2] = {(int64_t)(x * (type)1e15), (int64_t)(root * (type)1e9)}; \
            sum = fnv(sum, seen, sizeof seen);                                   \
        }                                                                        \
        return sum;                                                              \
    }
FLOATING(float, floats)
FLOATING(double, doubles)
FLOATING(long double, long_doubles)

/* A chain of processes, each of which adds its number to every word that passes through it. */
static uint64_t pipes(int depth, int words) {
    int in, ends[2];
    must(!pipe(ends), "pipe");
    pid_t source = fork();
    must(source >= 0, "fork");
    if (!source) {
        close(ends[0]);
        for (uint32_t i = 0; i < (uint32_t)words; i++) must(write(ends[1], &i, sizeof i) == sizeof i, "write");
        _exit(0);
    }
    close(ends[1]), in = ends[0];
    for (int stage = 1; stage <= depth; stage++) {
        must(!pipe(ends), "pipe");
        pid_t pid = fork();
        must(pid >= 0, "fork");
        if (!pid) {
            uint32_t word;
            close(ends[0]);
            while (read(in, &word, sizeof word) == sizeof word) {
                word += (uint32_t)stage;
                must(write(ends[1], &word, sizeof word) == sizeof word, "write");
            }
            _exit(0);
        }
        close(in), close(ends[1]), in = ends[0];
    }
    uint64_t sum = 0xcbf29ce484222325;
    uint32_t word;
    int got = 0;
    for (; read(in, &word, sizeof word) == sizeof word; got++) sum = fnv(sum, &word, sizeof word);
    close(in);
    must(got == words, "every word");
    for (int i = 0; i <= depth; i++) must(wait(NULL) > 0, "wait");
    return sum;
}

static volatile sig_atomic_t caught, alarms;
static sigjmp_buf back;
static void on_signal(int number) { (void)number, caught++; }
static void on_alarm(int number) { (void)number, alarms++; }
static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    siglongjmp(back, info->si_addr == (void *)0x1000 ? 1 : 2);
}

/* A signal to oneself and from a child, a page fault, a division by zero, a timer. */
static void signals(void) {
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    signal(SIGUSR1, on_signal), signal(SIGALRM, on_alarm);
    sigaction(SIGSEGV, &fault, NULL), sigaction(SIGFPE, &fault, NULL);
    for (int i = 0; i < 100; i++) raise(SIGUSR1);
    pid_t pid = fork();
    if (!pid) _exit(kill(getppid(), SIGUSR1));
    must(waitpid(pid, NULL, 0) == pid, "waitpid");
    int where = sigsetjmp(back, 1);
    if (!where) *(volatile char *)0x1000 = 1;
    volatile int one = 1, zero = 0;
    int divided = sigsetjmp(back, 1);
    if (!divided) zero = one / zero;
    struct itimerval every = {{0, 20000}, {0, 20000}}, never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &every, NULL);
    while (alarms < 5) pause();
    setitimer(ITIMER_REAL, &never, NULL);
    printf("signals %d, fault at 0x1000 %d, division %d, timer %d\n", (int)caught, where, divided, alarms >= 5);
}

/* A child on every CPU that there is; all must find the same. Copy on write, and memory that stays shared. */
static void forks(int children) {
    uint64_t *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(shared != MAP_FAILED, "mmap");
    cpu_set_t cpus, one;
    must(!sched_getaffinity(0, sizeof cpus, &cpus), "sched_getaffinity");
    static uint64_t mine = 7;
    uint64_t expected = integers(2000) ^ doubles(2000), codes = 0;
    for (int i = 0, cpu = 0; i < children; i++, cpu = (cpu + 1) % CPU_SETSIZE) {
        while (!CPU_ISSET(cpu, &cpus)) cpu = (cpu + 1) % CPU_SETSIZE;
        pid_t pid = fork();
        must(pid >= 0, "fork");
        if (!pid) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            must(!sched_setaffinity(0, sizeof one, &one), "sched_setaffinity");
            mine += (uint64_t)i;
            for (int n = 0; n < 1000; n++) __atomic_fetch_add(&shared[0], 1, __ATOMIC_RELAXED);
            _exit((integers(2000) ^ doubles(2000)) == expected && mine == 7 + (uint64_t)i ? i : 255);
        }
    }
    for (int i = 0, status; i < children; i++) {
        must(wait(&status) > 0 && WIFEXITED(status), "wait");
        codes += (uint64_t)WEXITSTATUS(status);
    }
    printf("forks %d, exit codes %lu, shared %lu, own %lu\n", children, codes, shared[0], mine);
}

int main(void) {
    setvbuf(stdout, NULL, _IONBF, 0);
    uint64_t sums[] = {integers(50000), floats(50000), doubles(50000), long_doubles(50000), pipes(4, 500)};
    printf("integers %016lx\nfloat %016lx\ndouble %016lx\nlong double %016lx\npipes %016lx\n", sums[0], sums[1], sums[2],
           sums[3], sums[4]);
    signals();
    forks(16);
    printf("checksum %016lx\n", fnv(0xcbf29ce484222325, sums, sizeof sums));
    return 0;
}
