/* A TD is launched through KVM_MEMORY_ENCRYPT_OP, in place; the host that makes a page shared again finds zeros. */
#define _GNU_SOURCE
#include "client.h"

enum { TDX_VM = 5, INIT_VM = 1, INIT_VCPU, INIT_MEM_REGION, FINALIZE_VM, MEASURE = 1 };
enum { PAGES = 4, SIZE = PAGES * PAGE };

struct tdx_cmd {
    uint32_t id, flags;
    uint64_t data, hw_error;
};
struct mem_region {
    uint64_t source_addr, gpa, nr_pages;
};
#define MEMORY_ENCRYPT_OP _IOWR(KVMIO, 0xba, unsigned long)

/* mov al, [rbx]; inc byte [rbx]; out 0x10, al */
static const uint8_t tell_and_count[] = {0x8a, 0x03, 0xfe, 0x03, 0xe6, 0x10};

static int command(int fd, uint32_t id, uint32_t flags, void *data) {
    struct tdx_cmd arguments = {.id = id, .flags = flags, .data = (uintptr_t)data};
    return ioctl(fd, MEMORY_ENCRYPT_OP, &arguments);
}

static int convert(int gmem, uint64_t page, uint64_t pages, bool private) {
    struct kvm_memory_attributes2 arguments = {
        .offset = page * PAGE, .size = pages * PAGE, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments);
}

static void launched_in_place(void) {
    struct machine m;
    uint64_t init[512] = {0};
    struct mem_region region = {.gpa = DATA_GPA, .nr_pages = PAGES};
    uint8_t byte = 0;

    CHECK(!open_machine(&m, TDX_VM, tell_and_count, sizeof(tell_and_count)), "errno %d", errno);
    int gmem = create_gmem(m.vm, SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, SIZE, NULL, gmem), "errno %d", errno);
    uint8_t *memory = map_shared(gmem, SIZE);
    memory[0] = 41;
    CHECK(!convert(gmem, 0, PAGES, true), "errno %d", errno);
    CHECK_ERRNO(command(m.vm, FINALIZE_VM, 0, NULL), EINVAL);
    CHECK_ERRNO(command(m.vcpu, INIT_VM, 0, init), EINVAL);
    CHECK_ERRNO(command(m.vm, INIT_VM, 1, init), EINVAL);
    CHECK(!command(m.vm, INIT_VM, 0, init), "errno %d", errno);
    CHECK_ERRNO(command(m.vm, INIT_VM, 0, init), EINVAL);
    CHECK(!command(m.vcpu, INIT_VCPU, 0, NULL), "errno %d", errno);
    CHECK_ERRNO(command(m.vm, INIT_MEM_REGION, MEASURE, &region), EINVAL);
    CHECK_ERRNO(ioctl(m.vcpu, KVM_RUN, 0), EINVAL); /* not finalized */
    CHECK(!command(m.vcpu, INIT_MEM_REGION, MEASURE, &region), "errno %d", errno);
    CHECK(!region.nr_pages && region.gpa == DATA_GPA + SIZE && !region.source_addr, "%lu left", (long)region.nr_pages);
    CHECK(!command(m.vm, FINALIZE_VM, 0, NULL), "errno %d", errno);
    CHECK_ERRNO(command(m.vm, FINALIZE_VM, 0, NULL), EINVAL);
    CHECK(run_guest(&m, DATA_GPA, 0, &byte) && byte == 41, "exit %u, %u", m.run->exit_reason, byte);
    CHECK(access_is_refused(memory, -1), "the host reads a private page");
    CHECK(!convert(gmem, 0, 1, false), "errno %d", errno);
    CHECK(!memory[0] && !memory[1], "%d", memory[0]);
    munmap(memory, SIZE);
    close(gmem);
    close_machine(&m);
}

int main(void) {
    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> TDX_VM & 1)) skip_all("no TDX");
    begin_case();
    launched_in_place();
    end_case("", "launched in place");
    return finish();
}
