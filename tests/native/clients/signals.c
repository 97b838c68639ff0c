/* Signals during calls: they end KVM_RUN and fallocate at any moment, and wait for the end of all others. */

#include "client.h"

#include <setjmp.h>

enum { ROUNDS = 10000 };

static int kvm, vm, vcpu;
static volatile unsigned char *run_page; /* struct kvm_run: byte 1 is immediate_exit */
static volatile int handled, stage;
static sigjmp_buf jump;

static void set_up(void)
{
    kvm = kvm_open();
    vm = ioctl(kvm, CREATE_VM, 0);
    vcpu = ioctl(vm, CREATE_VCPU, 0);
    run_page = mmap(0, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    CHECK(vcpu >= 0 && run_page != MAP_FAILED);
}

static void handle(int signal, void (*handler)(int), int flags)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    CHECK(!sigaction(signal, &action, NULL));
}

static void kick_handler(int signal)
{
    (void)signal;
    run_page[1] = 1;
    handled++;
}

static void wait_microseconds(unsigned microseconds)
{
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        sched_yield();
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < microseconds * 1000L);
}

/* Kicks once a round, somewhere around the moment when the run begins. */
static void *kicker(void *target)
{
    unsigned seed = 1;
    for (int round = 1; round <= ROUNDS; round++) {
        while (stage != round)
            sched_yield();
        wait_microseconds((unsigned)rand_r(&seed) % 120);
        pthread_kill(*(pthread_t *)target, SIGUSR1);
    }
    return NULL;
}

/* immediate_exit closes the gap before the call, the shim all others: no kick is lost, or the run would last 20 s. */
static void no_lost_kick(void)
{
    pthread_t self = pthread_self(), thread;
    set_up();
    handle(SIGUSR1, kick_handler, 0);
    CHECK(!pthread_create(&thread, NULL, kicker, &self));
    for (int round = 1; round <= ROUNDS; round++) {
        run_page[1] = 0;
        stage = round;
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
        CHECK(handled == round && run_page[1] == 1);
    }
    pthread_join(thread, NULL);
}

static int set_mask(sigset_t *mask)
{
    struct {
        uint32_t length;
        unsigned char set[8];
    } argument = {.length = 8};
    memcpy(argument.set, mask, 8);
    return ioctl(vcpu, SET_SIGNAL_MASK, &argument);
}

/* The signal is blocked but for the run: it ends that, stays pending, and its handler never runs. */
static void signal_mask(void)
{
    pthread_t self = pthread_self(), thread;
    sigset_t blocked, none;
    struct timespec now = {0, 0};
    set_up();
    handle(SIGUSR1, kick_handler, 0);
    sigemptyset(&none);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    CHECK(!pthread_sigmask(SIG_BLOCK, &blocked, NULL) && !set_mask(&none));
    CHECK(!pthread_create(&thread, NULL, kicker, &self));
    for (int round = 1; round <= ROUNDS; round++) {
        stage = round;
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
        CHECK(sigtimedwait(&blocked, NULL, &now) == SIGUSR1 && !handled);
    }
    pthread_join(thread, NULL);
}

static void signal_mask_arguments(void)
{
    uint32_t argument[3] = {4, 0, 0};
    set_up();
    CHECK_ERRNO(ioctl(vcpu, SET_SIGNAL_MASK, argument), EINVAL);
    CHECK_ERRNO(ioctl(vcpu, SET_SIGNAL_MASK, (void *)1), EFAULT);
    argument[0] = 8;
    CHECK(!ioctl(vcpu, SET_SIGNAL_MASK, argument) && !ioctl(vcpu, SET_SIGNAL_MASK, NULL));
}

/* The vCPU's mask blocks it: the run goes on, and the handler runs after it. */
static void signal_mask_blocks(void)
{
    sigset_t mask;
    set_up();
    handle(SIGALRM, kick_handler, 0);
    sigfillset(&mask);
    CHECK(!set_mask(&mask));
    ualarm(20000, 0);
    CHECK(ioctl(vcpu, RUN, 0) == 0 && handled == 1);
}

static void sa_restart(void)
{
    set_up();
    handle(SIGALRM, kick_handler, SA_RESTART);
    for (int i = 1; i <= 20; i++) {
        run_page[1] = 0;
        ualarm(2000, 0);
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
        CHECK(handled == i);
    }
}

static void calling_handler(int signal)
{
    uint64_t regs[18];
    (void)signal;
    handled++;
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12 && !ioctl(kvm, GET_REGS, regs));
    CHECK_ERRNO(ioctl(kvm, 0xAEAA, 0), ENOTTY);
}

static void handler_calls(void)
{
    set_up();
    handle(SIGALRM, calling_handler, 0);
    for (int i = 1; i <= 100; i++) {
        ualarm(1000, 0);
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
        CHECK(handled == i && ioctl(kvm, GET_API_VERSION, 0) == 12);
    }
}

static void running_handler(int signal)
{
    (void)signal;
    if (++handled % 2) {
        ualarm(1000, 0);
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
    }
    run_page[1] = 1;
}

/* A run in the handler of a signal that ended a run, itself ended by a signal. */
static void handler_runs(void)
{
    set_up();
    handle(SIGALRM, running_handler, SA_NODEFER);
    for (int i = 1; i <= 50; i++) {
        run_page[1] = 0;
        ualarm(1000, 0);
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
        CHECK(handled == 2 * i);
    }
}

static void jumping_handler(int signal)
{
    (void)signal;
    siglongjmp(jump, 1);
}

/* The handler leaves the call for good. */
static void handler_jumps(void)
{
    set_up();
    handle(SIGALRM, jumping_handler, 0);
    for (int i = 0; i < 200; i++) {
        if (!sigsetjmp(jump, 1)) {
            ualarm(500, 0);
            ioctl(vcpu, RUN, 0);
            CHECK(!"a run that no signal ended");
        }
        CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
    }
}

static void forking_handler(int signal)
{
    int status;
    (void)signal;
    pid_t child = fork();
    if (!child) {
        handled = 100;
        return;
    }
    handled++;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
}

/* Parent and child come back from the run. */
static void handler_forks(void)
{
    set_up();
    handle(SIGALRM, forking_handler, 0);
    for (int i = 1; i <= 20; i++) {
        ualarm(2000, 0);
        CHECK_ERRNO(ioctl(vcpu, RUN, 0), EINTR);
        if (handled == 100)
            _exit(ioctl(kvm, GET_API_VERSION, 0) == 12 ? 7 : 8);
        CHECK(handled == i);
    }
}

/* As system calls, which a signal does not interrupt: the handler runs after them. */
static void others_wait(void)
{
    set_up();
    handle(SIGALRM, kick_handler, 0);
    ualarm(10000, 0);
    CHECK(ioctl(kvm, DELAY, 50000) == 0 && handled == 1);
}

static void fallocate_ends(void)
{
    set_up();
    int gmem = gmem_create(vm, PAGE);
    handle(SIGALRM, kick_handler, SA_RESTART);
    ualarm(10000, 0);
    CHECK_ERRNO(fallocate(gmem, FALLOC_FL_KEEP_SIZE, 0, PAGE), EINTR);
    CHECK(handled == 1);
}

/* What nobody handles and what does nothing ends nothing. */
static void ignored(void)
{
    set_up();
    handle(SIGUSR2, SIG_IGN, 0);
    pid_t child = fork(), parent = getppid();
    if (!child) {
        parent = getppid();
        usleep(20000);
        kill(parent, SIGUSR2);
        _exit(0);
    }
    CHECK(child > 0 && parent && ioctl(vcpu, RUN, 0) == 0);
    CHECK(waitpid(child, NULL, 0) == child);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"no_lost_kick", no_lost_kick},
        {"signal_mask", signal_mask},
        {"signal_mask_arguments", signal_mask_arguments},
        {"signal_mask_blocks", signal_mask_blocks},
        {"sa_restart", sa_restart},
        {"handler_calls", handler_calls},
        {"handler_runs", handler_runs},
        {"handler_jumps", handler_jumps},
        {"handler_forks", handler_forks},
        {"others_wait", others_wait},
        {"fallocate_ends", fallocate_ends},
        {"ignored", ignored},
        {NULL, NULL},
    };
    return run_test(tests, argc, argv);
}
