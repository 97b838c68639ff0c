/* What upstream's newer tests expect of a test library, on top of the one of 6.12. */
#include "kvm_util.h"

#include <sys/ioctl.h>

__thread sigjmp_buf peer_sigbus_return;

void peer_sigbus_handler(int number) {
    (void)number;
    siglongjmp(peer_sigbus_return, 1);
}

/*
 * The library of 6.12 gives every slot host memory of its own. It does all the book-keeping here, too; then the mapping
 * of the file takes the place of that memory, at the same address.
 */
void peer_vm_mem_add(struct kvm_vm *vm, enum vm_mem_backing_src_type source, u64 gpa, u32 slot, u64 pages, u32 flags,
                     int gmem, u64 gmem_offset, u64 gmem_flags) {
    u64 size = pages * vm->page_size;
    bool mapped = (flags & KVM_MEM_GUEST_MEMFD) && (gmem_flags & GUEST_MEMFD_FLAG_MMAP);
    int created = -1;

    if ((flags & KVM_MEM_GUEST_MEMFD) && gmem < 0) gmem = created = vm_create_guest_memfd(vm, size, gmem_flags);
    (vm_mem_add)(vm, mapped ? VM_MEM_SRC_ANONYMOUS : source, gpa, slot, pages, flags, gmem, gmem_offset);
    if (mapped) {
        void *host = memslot2region(vm, slot)->host_mem;
        void *address = mmap(host, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, gmem, (off_t)gmem_offset);

        TEST_ASSERT(address == host, "mmap of the guest_memfd, errno %d", errno);
    }
    if (created >= 0) close(created); /* the slot has a descriptor of its own */
}

int kvm_slot_to_fd(struct kvm_vm *vm, u32 slot) {
    return (int)memslot2region(vm, slot)->region.guest_memfd;
}

int __gmem_set_memory_attributes(int gmem, u64 offset, size_t size, u64 attributes, u64 *error_offset) {
    struct kvm_memory_attributes2 request = {.offset = offset, .size = size, .attributes = attributes};
    int result = ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &request);

    if (error_offset) *error_offset = request.error_offset;
    return result;
}

static void gmem_must_set(int gmem, u64 offset, size_t size, u64 attributes) {
    int result = __gmem_set_memory_attributes(gmem, offset, size, attributes, NULL);

    TEST_ASSERT(!result, "attributes %#lx at %#lx = %d, errno %d", (long)attributes, (long)offset, result, errno);
}

void gmem_set_private(int gmem, u64 offset, size_t size) {
    gmem_must_set(gmem, offset, size, KVM_MEMORY_ATTRIBUTE_PRIVATE);
}

void gmem_set_shared(int gmem, u64 offset, size_t size) { gmem_must_set(gmem, offset, size, 0); }

/* The kernel's gup_test file (mm/gup_test.h): START pins the pages for write, STOP lets go of them. */
struct pin_longterm_test {
    __u64 addr, size;
    __u32 flags;
};
#define PIN_LONGTERM_TEST_START _IOW('g', 7, struct pin_longterm_test)
#define PIN_LONGTERM_TEST_STOP _IO('g', 8)
enum { PIN_FOR_WRITE = 1 };

static int gup_test = -1;

void pin_pages(void *address, u64 size) {
    struct pin_longterm_test pin = {.addr = (u64)address, .size = size, .flags = PIN_FOR_WRITE};

    gup_test = open_path_or_exit("/sys/kernel/debug/gup_test", O_RDWR);
    TEST_ASSERT(!ioctl(gup_test, PIN_LONGTERM_TEST_START, &pin), "pinning %p, errno %d", address, errno);
}

void unpin_pages(void) {
    TEST_ASSERT(!ioctl(gup_test, PIN_LONGTERM_TEST_STOP), "unpinning, errno %d", errno);
    close(gup_test);
    gup_test = -1;
}
