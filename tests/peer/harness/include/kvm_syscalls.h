/* System calls that must succeed: kvm_NAME() is NAME() with the test failing otherwise. */
#ifndef PEER_KVM_SYSCALLS_H
#define PEER_KVM_SYSCALLS_H

#include <fcntl.h>
#include <sys/mman.h>

#include "test_util.h"

#define PEER_MUST_SUCCEED(call)                                                                                        \
    do {                                                                                                               \
        long result_ = (call);                                                                                         \
                                                                                                                       \
        TEST_ASSERT(!result_, "%s = %ld, errno %d", #call, result_, errno);                                            \
    } while (0)

#define kvm_munmap(address, size) PEER_MUST_SUCCEED(munmap(address, size))
#define kvm_madvise(address, size, advice) PEER_MUST_SUCCEED(madvise(address, size, advice))
#define kvm_fallocate(fd, mode, offset, size) PEER_MUST_SUCCEED(fallocate(fd, mode, offset, size))

static inline void *kvm_mmap(size_t size, int protection, int flags, int fd) {
    void *address = mmap(NULL, size, protection, flags, fd, 0);

    TEST_ASSERT(address != MAP_FAILED, "mmap of %zu bytes, fd %d, errno %d", size, fd, errno);
    return address;
}

#endif
