/* Calls of a KVM client, timed: "name<TAB>nanoseconds" a line. Runs on a real /dev/kvm and under `guestmem run`. A real
 * kernel has no conversion yet: the nearest that it has is a hole, which also takes a page from every mapping. */
#define _GNU_SOURCE
#include "../tests/clients/client.h"

#include <time.h>

enum { ROUNDS = 5000, LARGE_ROUNDS = 300, LARGE = 2 << 20, TOUCHED = 4096 };

static struct machine m;
static uint8_t *memory;
static int gmem;
static bool converts;

static double now(void) {
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void empty_ioctl(void) { ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS); }

static void get_regs(void) {
    struct kvm_regs regs;

    ioctl(m.vcpu, KVM_GET_REGS, &regs);
}

static void run_to_exit(void) { ioctl(m.vcpu, KVM_RUN, 0); }

static void convert(uint64_t size, uint64_t attributes) {
    struct kvm_memory_attributes2 arguments = {.size = size, .attributes = attributes};

    if (ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments)) bail_out("KVM_SET_MEMORY_ATTRIBUTES2");
}

/* Away from the host, and back; between the two the host has touched it. */
static void there_and_back(uint64_t size) {
    *(volatile uint8_t *)memory = 1;
    if (converts) {
        convert(size, KVM_MEMORY_ATTRIBUTE_PRIVATE);
        convert(size, 0);
    } else {
        if (punch(gmem, 0, size)) bail_out("punch");
        *(volatile uint8_t *)memory = 1;
        if (punch(gmem, 0, size)) bail_out("punch");
    }
}

static void there_and_back_4k(void) { there_and_back(PAGE); }

static void there_and_back_2m(void) { there_and_back(LARGE); }

static void measure(const char *name, void (*call)(void), int rounds, int each) {
    for (int i = 0; i < rounds / 10; i++) call();
    double began = now();
    for (int i = 0; i < rounds; i++) call();
    printf("%s\t%.1f\n", name, (now() - began) / rounds / each);
}

static void measure_first_touch(void) {
    int fd = create_gmem(m.vm, (uint64_t)TOUCHED * PAGE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    volatile uint8_t *fresh = map_shared(fd, (size_t)TOUCHED * PAGE);
    double began = now();

    for (int page = 0; page < TOUCHED; page++) fresh[(size_t)page * PAGE] = 1;
    printf("first touch of a shared page\t%.1f\n", (now() - began) / TOUCHED);
    close(fd);
}

int main(void) {
    static const uint8_t out_forever[] = {0xe6, 0x10, 0xeb, 0xfc}; /* out 16, al; jmp to it */
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};

    open_kvm();
    converts = capability(kvm, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES);
    if (open_machine(&m, converts, out_forever, sizeof(out_forever))) bail_out("machine");
    gmem = create_gmem(m.vm, LARGE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    memory = map_shared(gmem, LARGE);
    if (set_region(m.vm, DATA_SLOT, 1 << 30, LARGE, memory, gmem)) bail_out("region");
    ioctl(m.vcpu, KVM_SET_REGS, &regs);
    measure("empty ioctl", empty_ioctl, ROUNDS, 1);
    measure("KVM_GET_REGS", get_regs, ROUNDS, 1);
    measure("KVM_RUN and a port exit", run_to_exit, ROUNDS, 1);
    measure("conversion of 4 KiB (a hole)", there_and_back_4k, ROUNDS, 2);
    memset(memory, 1, LARGE);
    measure("conversion of 2 MiB (a hole)", there_and_back_2m, LARGE_ROUNDS, 2);
    measure_first_touch();
    return 0;
}
