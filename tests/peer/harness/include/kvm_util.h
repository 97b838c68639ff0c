/*
 * Stands before the 6.12 test library's kvm_util.h: includes it, and adds what upstream's newer tests expect of it.
 * Written from the use that those tests make of it and from the posted ABI.
 */
#ifndef PEER_KVM_UTIL_H
#define PEER_KVM_UTIL_H

#include_next "kvm_util.h"

#include "kvm_syscalls.h"

#include <setjmp.h>
#include <signal.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

typedef u64 gpa_t;
typedef u64 gva_t;

/* The ABI that 6.12's headers do not have. */

#define GUEST_MEMFD_FLAG_MMAP (1ULL << 0)
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#define KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES 252

struct kvm_memory_attributes2 {
    __u64 offset, size, attributes, flags, error_offset, reserved[11];
};
#define KVM_SET_MEMORY_ATTRIBUTES2 _IOWR(KVMIO, 0xd2, struct kvm_memory_attributes2)

/* An action that must end in SIGBUS, in whichever process or thread runs it. */

extern __thread sigjmp_buf peer_sigbus_return;
void peer_sigbus_handler(int number);

#define TEST_EXPECT_SIGBUS(action)                                                                                     \
    do {                                                                                                               \
        struct sigaction ours_ = {.sa_handler = peer_sigbus_handler}, former_;                                         \
                                                                                                                       \
        sigaction(SIGBUS, &ours_, &former_);                                                                           \
        if (!sigsetjmp(peer_sigbus_return, 1)) {                                                                       \
            action;                                                                                                    \
            TEST_FAIL("no SIGBUS from: %s", #action);                                                                  \
        }                                                                                                              \
        sigaction(SIGBUS, &former_, NULL);                                                                             \
    } while (0)

/* A slot whose host memory is the mapped guest_memfd itself, if its flags allow a mapping. */

#ifndef VM_TYPE_DEFAULT
#define VM_TYPE_DEFAULT 0
#endif

void peer_vm_mem_add(struct kvm_vm *vm, enum vm_mem_backing_src_type source, u64 gpa, u32 slot, u64 pages, u32 flags,
                     int gmem, u64 gmem_offset, u64 gmem_flags);
#define vm_mem_add(...) peer_vm_mem_add(__VA_ARGS__)

int kvm_slot_to_fd(struct kvm_vm *vm, u32 slot);

/* Conversion in place. `__` ones return the ioctl's result; the others fail the test if it is refused. */

int __gmem_set_memory_attributes(int gmem, u64 offset, size_t size, u64 attributes, u64 *error_offset);

static inline int __gmem_set_private(int gmem, u64 offset, size_t size, u64 *error_offset) {
    return __gmem_set_memory_attributes(gmem, offset, size, KVM_MEMORY_ATTRIBUTE_PRIVATE, error_offset);
}

static inline int __gmem_set_shared(int gmem, u64 offset, size_t size, u64 *error_offset) {
    return __gmem_set_memory_attributes(gmem, offset, size, 0, error_offset);
}

void gmem_set_private(int gmem, u64 offset, size_t size);
void gmem_set_shared(int gmem, u64 offset, size_t size);

/* A long-term pin of a mapping's pages, as a driver takes it; one at a time. */

void pin_pages(void *address, u64 size);
void unpin_pages(void);

#endif
