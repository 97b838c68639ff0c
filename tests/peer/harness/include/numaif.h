/* NUMA system calls without libnuma, and the kvm_NAME() form of each, which must succeed. */
#ifndef PEER_NUMAIF_H
#define PEER_NUMAIF_H

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kvm_syscalls.h"

static inline long mbind(void *address, unsigned long size, int mode, const unsigned long *nodes, unsigned long maxnode,
                         unsigned int flags) {
    return syscall(SYS_mbind, address, size, (long)mode, nodes, maxnode, (long)flags);
}

static inline long get_mempolicy(int *mode, unsigned long *nodes, unsigned long maxnode, void *address, int flags) {
    return syscall(SYS_get_mempolicy, mode, nodes, maxnode, address, (long)flags);
}

static inline long move_pages(int pid, unsigned long count, void **pages, const int *nodes, int *status, int flags) {
    return syscall(SYS_move_pages, (long)pid, count, pages, nodes, status, (long)flags);
}

#define kvm_mbind(...) PEER_MUST_SUCCEED(mbind(__VA_ARGS__))
#define kvm_get_mempolicy(...) PEER_MUST_SUCCEED(get_mempolicy(__VA_ARGS__))
#define kvm_move_pages(...) PEER_MUST_SUCCEED(move_pages(__VA_ARGS__))

/* The tests use nodes 0 and 1. */
static inline bool is_multi_numa_node_system(void) {
    return !access("/sys/devices/system/node/node0", F_OK) && !access("/sys/devices/system/node/node1", F_OK);
}

#endif
