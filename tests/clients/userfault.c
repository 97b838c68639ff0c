/*
 * KVM Userfault as a VMM uses it to restore a guest lazily: each page is brought when the guest first touches it, by the
 * bitmap and the exit, and no page that it does not touch.
 */
#define _GNU_SOURCE
#include "client.h"

#ifndef KVM_MEM_USERFAULT
#define KVM_MEM_USERFAULT (1UL << 3)
#define KVM_MEMORY_EXIT_FLAG_USERFAULT (1ULL << 4)
#endif
#ifndef KVM_CAP_USERFAULT
#define KVM_CAP_USERFAULT 253 /* of guestmem's level "future"; no kernel has a number yet */
#endif

/* struct kvm_run's memory_fault, which old headers do not have. */
enum { EXIT_MEMORY_FAULT = 39, MEMORY_FAULT_AT = 32 };
struct memory_fault {
    uint64_t flags, gpa, size;
};

enum { PAGES = 8, SIZE = PAGES * PAGE };

static const uint8_t load_and_out[] = {0x8a, 0x03, 0xe6, 0x10}; /* mov al, [rbx]; out 16, al */

static uint64_t missing; /* the slot's bitmap */

static int set_userfault(int vm, int gmem, uint8_t *memory, uint64_t *bitmap) {
    struct kvm_userspace_memory_region2 region = {
        .slot = DATA_SLOT,
        .flags = KVM_MEM_GUEST_MEMFD | (bitmap ? KVM_MEM_USERFAULT : 0),
        .guest_phys_addr = DATA_GPA,
        .memory_size = SIZE,
        .userspace_addr = (uint64_t)(uintptr_t)memory,
        .guest_memfd = (uint32_t)gmem,
        .pad2[0] = (uint64_t)(uintptr_t)bitmap,
    };

    return ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region);
}

/* Run to the OUT, bringing what is missing; -1 if something else happened. How many pages were brought. */
static int restore_and_load(struct machine *m, uint8_t *memory, unsigned page, uint8_t *byte) {
    struct kvm_regs regs = {.rip = CODE, .rbx = DATA_GPA + page * PAGE, .rflags = 2};
    int brought = 0;

    if (ioctl(m->vcpu, KVM_SET_REGS, &regs)) return -1;
    while (ioctl(m->vcpu, KVM_RUN, 0)) {
        struct memory_fault *fault = (struct memory_fault *)((uint8_t *)m->run + MEMORY_FAULT_AT);
        uint64_t touched = (fault->gpa - DATA_GPA) / PAGE;

        if (errno == EINTR) continue;
        if (errno != EFAULT || m->run->exit_reason != EXIT_MEMORY_FAULT) return -1;
        if (fault->flags != KVM_MEMORY_EXIT_FLAG_USERFAULT || touched != page) return -1;
        memory[touched * PAGE] = (uint8_t)(0x40 + touched); /* what the snapshot has */
        __atomic_fetch_and(&missing, ~(1ULL << touched), __ATOMIC_RELEASE);
        brought++;
    }
    if (m->run->exit_reason != KVM_EXIT_IO) return -1;
    *byte = *((uint8_t *)m->run + m->run->io.data_offset);
    return brought;
}

static void a_guest_is_restored_as_it_runs(void) {
    struct machine m;
    uint8_t byte = 0;

    CHECK(!open_machine(&m, 0, load_and_out, sizeof(load_and_out)), "errno %d", errno);
    int gmem = create_gmem(m.vm, SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    uint8_t *memory = map_shared(gmem, SIZE);
    CHECK(memory != MAP_FAILED, "errno %d", errno);
    missing = (1 << PAGES) - 1;
    CHECK(!set_userfault(m.vm, gmem, memory, &missing), "errno %d", errno);
    static const unsigned order[] = {5, 0, 7, 5};
    for (int i = 0; i < 4; i++) {
        int brought = restore_and_load(&m, memory, order[i], &byte);
        CHECK(brought == (i < 3), "page %u: %d brought, errno %d", order[i], brought, errno);
        CHECK(byte == 0x40 + order[i], "page %u has %#x", order[i], byte);
    }
    CHECK(missing == 0x5e, "%#llx", (unsigned long long)missing);
    missing = ~0ULL; /* a bit that is set later takes nothing away */
    CHECK(restore_and_load(&m, memory, 5, &byte) == 0, "errno %d", errno);
    CHECK(!set_userfault(m.vm, gmem, memory, NULL), "errno %d", errno);
    CHECK(restore_and_load(&m, memory, 1, &byte) == 0 && !byte, "page 1 has %#x, errno %d", byte, errno);
    CHECK(!set_userfault(m.vm, gmem, memory, &missing), "errno %d", errno); /* but turning it on does */
    CHECK(restore_and_load(&m, memory, 5, &byte) == 1, "errno %d", errno);
    CHECK_ERRNO(set_userfault(m.vm, gmem, memory, (uint64_t *)(~0ULL - 7)), EINVAL);
    munmap(memory, SIZE);
    close(gmem);
    close_machine(&m);
}

int main(void) {
    open_kvm();
    if (!capability(kvm, KVM_CAP_USERFAULT)) skip_all("this kernel has no KVM_CAP_USERFAULT");
    begin_case();
    a_guest_is_restored_as_it_runs();
    end_case("", "a guest is restored as it runs");
    return finish();
}
