/* What <linux/kvm.h> of 6.1 (Debian 12) does not have yet, under names of our own so that a newer one does not clash.
 */
#ifndef GOLDEN_UAPI_H
#define GOLDEN_UAPI_H

#include <linux/kvm.h>
#include <stdint.h>
#include <sys/ioctl.h>

struct gmem_create {
    uint64_t size, flags, reserved[6];
};

struct region2 {
    uint32_t slot, flags;
    uint64_t gpa, size, hva, offset;
    uint32_t fd, pad1;
    uint64_t pad2[14];
};

struct pre_fault {
    uint64_t gpa, size, flags, padding[5];
};

#define GMEM_MMAP 1u
#define GMEM_INIT_SHARED 2u
#define GMEM_BOTH (GMEM_MMAP | GMEM_INIT_SHARED)

#define SLOT_LOG_DIRTY 1u
#define SLOT_READONLY 2u
#define SLOT_GMEM 4u

#define CREATE_GMEM _IOWR(KVMIO, 0xd4, struct gmem_create)
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)
#define PRE_FAULT _IOWR(KVMIO, 0xd5, struct pre_fault)
#define SET_ATTRIBUTES 0x4020aed2ul
#define SET_ATTRIBUTES2 0xc080aed2ul
#define LINK_GMEM_V2 0xc040aed6ul
#define GMEM_CONVERT_SHARED 0xc040af41ul

/* System calls newer than the C library's headers; the numbers are the same on every architecture since 424. */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif

#endif
