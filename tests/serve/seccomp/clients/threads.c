/*
 * A VM on private memory that other threads write to, while signals hit the thread of the vCPU and children are forked:
 * no write is lost when the memory becomes the VM's, no exit is lost or seen twice, no other call fails. Ends with 0.
 */
#define _GNU_SOURCE
#include "client.h"

#include <pthread.h>
#include <sys/wait.h>

enum { ROUNDS = 8, EXITS = 40, WRITERS = 3, SIZE = 1 << 20, LOAD = 0x1000, PORT = 0x3f8 };

/* al counts what goes out: a lost or doubled exit shows. mov dx, PORT; again: out dx, al; inc al; jmp again */
static const uint8_t count_out[] = {0xba, 0xf8, 0x03, 0xee, 0xfe, 0xc0, 0xeb, 0xfb};

static uint8_t *memory;
static long written[WRITERS];
static volatile bool stop;
static volatile sig_atomic_t handled;

static volatile long *cell(int writer) {
    return (long *)(memory + 0x4000 + writer * 0x2000);
}

static void *writer(void *argument) {
    int self = (int)(intptr_t)argument;

    while (!stop) {
        ++*cell(self);
        written[self]++;
    }
    return NULL;
}

static void *signaller(void *argument) {
    pthread_t target = *(pthread_t *)argument;

    while (!stop) {
        pthread_kill(target, SIGUSR1);
        pthread_kill(target, SIGURG);
        usleep(700);
    }
    return NULL;
}

static void *forker(void *argument) {
    while (!stop) {
        int status;
        pid_t child = fork();

        if (!child) _exit(3);
        if (waitpid(child, &status, 0) != child || WEXITSTATUS(status) != 3) *(bool *)argument = true;
        usleep(3000);
    }
    return NULL;
}

static void on_signal(int number) {
    (void)number;
    handled = handled + 1;
}

static void check_round(int vm, int vcpu, struct kvm_run *run) {
    struct kvm_userspace_memory_region region = {0, 0, LOAD, SIZE, (uintptr_t)memory};
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = LOAD, .rflags = 2};
    uint8_t expected = 0;

    CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "errno %d", errno);
    CHECK(!ioctl(vcpu, KVM_GET_SREGS, &sregs), "errno %d", errno);
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(!ioctl(vcpu, KVM_SET_SREGS, &sregs), "errno %d", errno);
    CHECK(!ioctl(vcpu, KVM_SET_REGS, &regs), "errno %d", errno);
    while (expected < EXITS) {
        int result = ioctl(vcpu, KVM_RUN, 0);

        CHECK(!result || errno == EINTR, "errno %d", errno);
        if (result) continue;
        CHECK(run->exit_reason == KVM_EXIT_IO && run->io.port == PORT, "exit %u", run->exit_reason);
        uint8_t seen = *((uint8_t *)run + run->io.data_offset);
        CHECK(seen == expected, "%u came out, not %u", seen, expected);
        expected++;
    }
}

static void one_round(int kvm) {
    pthread_t threads[WRITERS + 2], self = pthread_self();
    bool child_failed = false;
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    size_t size = (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

    CHECK(vm >= 0 && vcpu >= 0 && run != MAP_FAILED, "errno %d", errno);
    stop = false;
    memset(written, 0, sizeof(written));
    memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(memory, count_out, sizeof(count_out));
    for (int i = 0; i < WRITERS; i++) pthread_create(&threads[i], NULL, writer, (void *)(intptr_t)i);
    pthread_create(&threads[WRITERS], NULL, signaller, &self);
    pthread_create(&threads[WRITERS + 1], NULL, forker, &child_failed);
    check_round(vm, vcpu, run);
    stop = true;
    for (int i = 0; i < WRITERS + 2; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < WRITERS; i++)
        CHECK(*cell(i) == written[i], "writer %d: %ld of %ld are there", i, *cell(i), written[i]);
    CHECK(!child_failed, "a forked child");
    munmap(memory, SIZE);
    munmap(run, size);
    close(vcpu);
    close(vm);
}

int main(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    int kvm = open("/dev/kvm", O_RDWR);

    if (kvm < 0) skip_all("no /dev/kvm");
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < ROUNDS; i++) {
        begin_case();
        one_round(kvm);
        end_case("", "a VM, writers, signals and forks at once");
    }
    return finish();
}
