/* The messages of docs/reference/wire.md. */
#pragma once

#include <stdint.h>

enum { WIRE_VERSION = 2, WIRE_MAX = 64 * 1024, WIRE_FDS = 8 };

enum wire_op {
    OP_HELLO = 1,
    OP_OPEN,
    OP_IDENTIFY,
    OP_IOCTL,
    OP_RUN_FD,
    OP_MMAP_CHECK,
    OP_MMAP_DONE,
    OP_UNMAP,
    OP_MOVED,
    OP_PROTECT,
    OP_FALLOCATE = 12,
    OP_REMOVE,
    OP_SYNC,
    OP_GUARD,
    OP_CANCEL,
    OP_UPCALL_DONE,
    OP_STAT,
    OP_VCPU,
};

enum wire_upcall {
    UP_ANSWER = 0,
    UP_ZAP,
    UP_READ,
    UP_WRITE,
    UP_OVERLAY = 6,
    UP_UNCOVER,
    UP_FD = 9,
    UP_ENTER,
    UP_DROP,
    UP_ALIAS,
    UP_UNALIAS,
    UP_KICK,
    UP_FORGET,
    UP_POPULATE,
};

enum { HELLO_HELPER = 1, HELLO_FORKED = 2 };
enum { OPEN_KVM = 1, OPEN_GUP_TEST = 2, OPEN_IOMMU = 3, OPEN_VFIO = 4, OPEN_LIVE_UPDATE = 100 };
enum { VFIO_DEVICES = 6 };
enum { ANSWER_KEEP_ON_EXEC = 1, ANSWER_FD_IN_ARGUMENT = 2 };
enum { RUN_OWN = 1 };    /* RUN_FD for the shim's own use, not for a mmap() of the client */
enum { STOP_LEFT = 100 }; /* of ENTER: the exit is written, KVM_RUN returns 0 */

struct wire_request {
    uint32_t op, flags;
    uint64_t file, a, b, c, d;
};

struct wire_answer {
    uint32_t op;
    int32_t error;
    int64_t value;
    uint64_t a, b, c, d;
};

_Static_assert(sizeof(struct wire_request) == 48, "wire.md: a request is 48 bytes");
_Static_assert(sizeof(struct wire_answer) == 48, "wire.md: an answer is 48 bytes");
