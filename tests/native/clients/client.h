/* What the clients of these tests share: a failed check says where and ends the program. */
#pragma once

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno);                          \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define CHECK_ERRNO(call, expected)                                                                                    \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        long result_ = (long)(call);                                                                                   \
        CHECK(result_ == -1 && errno == (expected));                                                                   \
    } while (0)

#define PAGE 4096UL

enum {
    GET_API_VERSION = 0xAE00,
    CREATE_VM = 0xAE01,
    CREATE_VCPU = 0xAE41,
    RUN = 0xAE80,
    RELEASED = 0xAEF0,
    READ_SUM,
    WRITE_X,
    ZAP_PAGE,
    OVERLAY_PAGE,
    UNCOVER_PAGE,
    FD_FACTS,
    NOTED = FD_FACTS + 2,
    DELAY,
    HELLOS,
    END,
};
#define CREATE_GMEM 0xC040AED4UL
#define SET_REGS 0x4090AE82UL
#define GET_REGS 0x8090AE81UL
#define SET_SIGNAL_MASK 0x4004AE8BUL

struct test {
    const char *name;
    void (*run)(void);
};

static inline int kvm_open(void)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static inline int vm_create(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0);
    CHECK(vm >= 0);
    close(kvm);
    return vm;
}

static inline int gmem_create(int vm, uint64_t size)
{
    uint64_t argument[8] = {size, 3};
    int fd = ioctl(vm, CREATE_GMEM, argument);
    CHECK(fd >= 0);
    return fd;
}

static inline int run_test(const struct test *tests, int argc, char **argv)
{
    for (; argc > 1 && tests->name; tests++)
        if (!strcmp(tests->name, argv[1])) {
            tests->run();
            return 0;
        }
    fprintf(stderr, "no such test\n");
    return 2;
}
