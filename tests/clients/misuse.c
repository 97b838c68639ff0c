/*
 * Bad input, as a careless or hostile VMM gives it: structures that end at an unmapped page, pointers to nowhere, wrong
 * descriptors, absurd sizes, descriptors closed while another thread's call on them is under way. Each has the errno that
 * the kernel gives, and a guest still runs afterwards. It passes unchanged on the /dev/kvm of a real 6.18.
 */
#define _GNU_SOURCE
#include "client.h"

#include <pthread.h>

static const uint8_t out_forever[] = {0xb0, 0x2a, 0xe6, 0x10, 0xeb, 0xfc}; /* mov al, 42; out 16, al; jmp to out */
static const uint8_t tell_and_spin[] = {0xc6, 0x04, 0x25, 0, 0, 0, 0, 1, 0xeb, 0xfe}; /* mov byte [0], 1; jmp . */

/* The last `size` bytes before an unmapped page. */
static void *edge(size_t size) {
    static uint8_t *page;

    if (!page) {
        page = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        munmap(page + PAGE, PAGE);
        memset(page, 0, PAGE);
    }
    return page + PAGE - size;
}

static void a_guest_runs(void) {
    struct machine m;
    uint8_t byte = 0;

    CHECK(!open_machine(&m, 0, out_forever, sizeof(out_forever)), "errno %d", errno);
    CHECK(run_guest(&m, 0, 0, &byte), "exit %u, errno %d", m.run->exit_reason, errno);
    CHECK(byte == 42, "%d", byte);
    close_machine(&m);
}

/* The argument of each call, half of it unmapped, and then all of it. */
static void half_an_argument(void) {
    struct machine m;

    CHECK(!open_machine(&m, 0, out_forever, sizeof(out_forever)), "errno %d", errno);
    CHECK_ERRNO(ioctl(m.vm, KVM_CREATE_GUEST_MEMFD, edge(8)), EFAULT);
    CHECK_ERRNO(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, edge(16)), EFAULT);
    CHECK_ERRNO(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION2, edge(64)), EFAULT);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_REGS, edge(72)), EFAULT);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_GET_REGS, edge(72)), EFAULT);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_SREGS, edge(100)), EFAULT);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_GET_SREGS, edge(100)), EFAULT);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_CPUID2, edge(4)), EFAULT);
    close_machine(&m);
}

static void a_pointer_to_nowhere(void) {
    void *nowhere[] = {NULL, (void *)1, (void *)0x7fffffffe000, (void *)-4096L};
    struct machine m;

    CHECK(!open_machine(&m, 0, out_forever, sizeof(out_forever)), "errno %d", errno);
    for (size_t i = 0; i < sizeof(nowhere) / sizeof(*nowhere); i++) {
        CHECK_ERRNO(ioctl(m.vm, KVM_CREATE_GUEST_MEMFD, nowhere[i]), EFAULT);
        CHECK_ERRNO(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION2, nowhere[i]), EFAULT);
        CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_REGS, nowhere[i]), EFAULT);
        CHECK_ERRNO(ioctl(m.vcpu, KVM_GET_REGS, nowhere[i]), EFAULT);
        CHECK_ERRNO(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, nowhere[i]), EFAULT);
    }
    close_machine(&m);
}

/* A list whose header is readable and whose entries are not, or which is longer than any. */
static void a_list_without_end(void) {
    struct kvm_cpuid2 *list = edge(sizeof(*list));
    struct machine m;

    CHECK(!open_machine(&m, 0, out_forever, sizeof(out_forever)), "errno %d", errno);
    list->nent = 3;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_CPUID2, list), EFAULT);
    list->nent = ~0U;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_CPUID2, list), E2BIG);
    list->nent = 0;
    CHECK_ERRNO(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, list), E2BIG);
    close_machine(&m);
}

static void the_wrong_descriptor(void) {
    struct kvm_regs regs = {0};
    struct machine m;

    CHECK(!open_machine(&m, 0, out_forever, sizeof(out_forever)), "errno %d", errno);
    CHECK_ERRNO(ioctl(m.vm, KVM_RUN, 0), ENOTTY);
    CHECK_ERRNO(ioctl(m.vm, KVM_GET_REGS, &regs), ENOTTY);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_CREATE_VCPU, 0), EINVAL);
    CHECK_ERRNO(ioctl(kvm, KVM_RUN, 0), EINVAL);
    CHECK_ERRNO(ioctl(-1, KVM_RUN, 0), EBADF);
    CHECK_ERRNO(ioctl(999, KVM_GET_REGS, &regs), EBADF);
    CHECK_ERRNO(ioctl(STDIN_FILENO, KVM_RUN, 0), ENOTTY);
    int memfd = memfd_create("plain", 0);
    CHECK_ERRNO(ioctl(memfd, KVM_CREATE_VM, 0), ENOTTY);
    CHECK_ERRNO(set_region(m.vm, 5, 1 << 30, PAGE, NULL, m.vm), EINVAL);
    CHECK_ERRNO(set_region(m.vm, 5, 1 << 30, PAGE, NULL, kvm), EINVAL);
    CHECK_ERRNO(set_region(m.vm, 5, 1 << 30, PAGE, NULL, memfd), EINVAL);
    CHECK_ERRNO(set_region(m.vm, 5, 1 << 30, PAGE, NULL, 998), EBADF);
    close(memfd);
    close_machine(&m);
}

static void an_absurd_size(void) {
    const uint64_t sizes[] = {0, 1, ~0ULL, 1ULL << 63, (1ULL << 63) + PAGE, ~0ULL << 12};
    struct machine m;

    CHECK(!open_machine(&m, 0, out_forever, sizeof(out_forever)), "errno %d", errno);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) CHECK_ERRNO(create_gmem(m.vm, sizes[i], 0), EINVAL);
    CHECK_ERRNO(set_region(m.vm, 6, 0, ~0ULL << 12, NULL, -1), EINVAL);
    CHECK_ERRNO(set_region(m.vm, 6, ~0ULL << 12, 2 * PAGE, NULL, -1), EINVAL);
    CHECK_ERRNO(set_region(m.vm, ~0U, 0, PAGE, NULL, -1), EINVAL);
    CHECK_ERRNO(ioctl(m.vm, KVM_CREATE_VCPU, ~0UL), EINVAL);
    CHECK_ERRNO(ioctl(kvm, KVM_CREATE_VM, ~0UL), EINVAL);
    int gmem = create_gmem(m.vm, PAGE, 0);
    CHECK_ERRNO(allocate(gmem, 0, 1LL << 62), EINVAL);
    CHECK_ERRNO(fallocate(gmem, FALLOC_FL_KEEP_SIZE, 1LL << 62, 1LL << 62), EFBIG);
    close(gmem);
    close_machine(&m);
}

/* A thread that runs a vCPU for ever, until a signal. */

static void on_signal(int number) {
    (void)number;
}

static void *run_for_ever(void *argument) {
    struct machine *m = argument;
    long result = ioctl(m->vcpu, KVM_RUN, 0);

    return (void *)(result == -1 ? (long)errno : result);
}

/* The file stays, as the call holds it; the signal ends the call, and with it the file. */
static void closed_during_a_call(void) {
    struct sigaction action = {.sa_handler = on_signal};
    struct machine m;
    pthread_t thread;
    void *result = NULL;

    sigaction(SIGUSR1, &action, NULL);
    CHECK(!open_machine(&m, 0, tell_and_spin, sizeof(tell_and_spin)), "errno %d", errno);
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};
    CHECK(!ioctl(m.vcpu, KVM_SET_REGS, &regs), "errno %d", errno);
    CHECK(!pthread_create(&thread, NULL, run_for_ever, &m), "errno %d", errno);
    while (!*(volatile uint8_t *)m.low) usleep(1000);
    close(m.vcpu);
    close(m.vm);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_GET_REGS, &regs), EBADF);
    usleep(5000);
    pthread_kill(thread, SIGUSR1);
    pthread_join(thread, &result);
    CHECK((long)result == EINTR, "%ld", (long)result);
    munmap(m.run, m.run_size);
    munmap(m.low, LOW_SIZE);
}

/* Its slot loses the memory that it shows. */
static void memory_that_goes(void) {
    static const uint8_t read_at_rbx[] = {0x8a, 0x03, 0xe6, 0x10}; /* mov al, [rbx]; out 16, al */
    struct machine m;
    uint8_t byte = 0;

    CHECK(!open_machine(&m, 0, read_at_rbx, sizeof(read_at_rbx)), "errno %d", errno);
    uint8_t *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory[0] = 7;
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, PAGE, memory, -1), "errno %d", errno);
    CHECK(run_guest(&m, DATA_GPA, 0, &byte) && byte == 7, "%d", byte);
    munmap(memory, PAGE);
    CHECK(!run_guest(&m, DATA_GPA, 0, &byte), "the guest still reads %d", byte);
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, 0, NULL, -1), "errno %d", errno);
    close_machine(&m);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"half an argument", half_an_argument},
    {"a pointer to nowhere", a_pointer_to_nowhere},
    {"a list without end", a_list_without_end},
    {"the wrong descriptor", the_wrong_descriptor},
    {"an absurd size", an_absurd_size},
    {"closed during a call", closed_during_a_call},
    {"memory that goes", memory_that_goes},
    {"a guest runs", a_guest_runs},
};

int main(void) {
    open_kvm();
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        begin_case();
        cases[i].run();
        end_case("", cases[i].name);
    }
    return finish();
}
