/* syscall(): for those system calls that are ours by their libc names. All others go straight to the kernel, without a
 * frame of C: the call may be clone() or vfork(), of which both sides return. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "calls.h"

#define BIT(number) (1ULL << ((number) % 64))

/* By word of 64 numbers. Read by the code in assembler below. */
__attribute__((visibility("hidden"), used)) const uint64_t syscalls_handled[8] = {
    [0] = BIT(SYS_read) | BIT(SYS_write) | BIT(SYS_open) | BIT(SYS_close) | BIT(SYS_fstat) | BIT(SYS_lseek) |
          BIT(SYS_mmap) | BIT(SYS_mprotect) | BIT(SYS_munmap) | BIT(SYS_ioctl) | BIT(SYS_pread64) | BIT(SYS_pwrite64) |
          BIT(SYS_readv) | BIT(SYS_writev) | BIT(SYS_mremap) | BIT(SYS_msync) | BIT(SYS_madvise) | BIT(SYS_dup) |
          BIT(SYS_dup2) | BIT(SYS_recvmsg),
    [SYS_fcntl / 64] = BIT(SYS_fcntl) | BIT(SYS_fsync) | BIT(SYS_fdatasync) | BIT(SYS_ftruncate) | BIT(SYS_fchmod) |
                       BIT(SYS_fchown) | BIT(SYS_truncate),
    [SYS_mbind / 64] = BIT(SYS_mbind) | BIT(SYS_get_mempolicy),
    [SYS_openat / 64] = BIT(SYS_openat) | BIT(SYS_fallocate) | BIT(SYS_dup3) | BIT(SYS_newfstatat),
    [SYS_statx / 64] = BIT(SYS_statx) | BIT(SYS_pkey_mprotect),
    [SYS_close_range / 64] = BIT(SYS_close_range) | BIT(SYS_openat2) | BIT(SYS_pidfd_getfd),
};

_Static_assert(SYS_fcntl / 64 == 1 && SYS_truncate / 64 == 1 && SYS_fsync / 64 == 1 && SYS_fchown / 64 == 1, "word 1");
_Static_assert(SYS_mbind / 64 == 3 && SYS_get_mempolicy / 64 == 3, "word 3");
_Static_assert(SYS_openat / 64 == 4 && SYS_fallocate / 64 == 4 && SYS_dup3 / 64 == 4 && SYS_newfstatat / 64 == 4, "word 4");
_Static_assert(SYS_statx / 64 == 5 && SYS_pkey_mprotect / 64 == 5, "word 5");
_Static_assert(SYS_close_range / 64 == 6 && SYS_openat2 / 64 == 6 && SYS_pidfd_getfd / 64 == 6, "word 6");

__asm__(".text\n"
        ".globl syscall\n"
        ".type syscall, @function\n"
        "syscall:\n"
        "    .cfi_startproc\n"
        "    cmpq $511, %rdi\n"
        "    ja 1f\n"
        "    leaq syscalls_handled(%rip), %rax\n"
        "    btq %rdi, (%rax)\n"
        "    jc syscall_of_ours\n"
        "1:  movq %rdi, %rax\n"
        "    movq %rsi, %rdi\n"
        "    movq %rdx, %rsi\n"
        "    movq %rcx, %rdx\n"
        "    movq %r8, %r10\n"
        "    movq %r9, %r8\n"
        "    movq 8(%rsp), %r9\n"
        "    syscall\n"
        "    cmpq $-4095, %rax\n"
        "    jae 2f\n"
        "    ret\n"
        "2:  movq %rax, %rdi\n"
        "    jmp syscall_failed\n"
        "    .cfi_endproc\n"
        ".size syscall, . - syscall\n");

__attribute__((visibility("hidden"), used)) long syscall_failed(long result)
{
    return libc_result(result);
}

static long open_how(int directory, const char *path, const struct open_how *how, size_t size)
{
    struct open_how copy = {0};
    if (size >= sizeof(copy) && !copy_from_client(&copy, how, sizeof(copy)) && path_is_device(path))
        return open_any(directory, path, (int)copy.flags, (mode_t)copy.mode);
    return libc_result(sys(SYS_openat2, directory, path, how, size));
}

static long got_descriptor(long fd)
{
    if (!is_error(fd) && process.active)
        file_mark((int)fd);
    return libc_result(fd);
}

static long on_file(long number, long a, long b, long c, long d)
{
    int fd = (int)a;
    switch (number) {
    case SYS_read:
        return read(fd, (void *)b, (size_t)c);
    case SYS_write:
        return write(fd, (const void *)b, (size_t)c);
    case SYS_pread64:
        return pread(fd, (void *)b, (size_t)c, d);
    case SYS_pwrite64:
        return pwrite(fd, (const void *)b, (size_t)c, d);
    case SYS_readv:
        return readv(fd, (const struct iovec *)b, (int)c);
    case SYS_writev:
        return writev(fd, (const struct iovec *)b, (int)c);
    case SYS_lseek:
        return lseek(fd, b, (int)c);
    case SYS_fstat:
        return fstat(fd, (struct stat *)b);
    case SYS_fsync:
        return fsync(fd);
    case SYS_fdatasync:
        return fdatasync(fd);
    case SYS_ftruncate:
        return ftruncate(fd, b);
    case SYS_fchmod:
        return fchmod(fd, (mode_t)b);
    case SYS_fchown:
        return fchown(fd, (uid_t)b, (gid_t)c);
    case SYS_fallocate:
        return fallocate(fd, (int)b, c, d);
    default:
        return fail(ENOSYS);
    }
}

static long on_descriptor(long number, long a, long b, long c, long d)
{
    int fd = (int)a;
    switch (number) {
    case SYS_close:
        return close(fd);
    case SYS_close_range:
        return libc_result(call_close_range((unsigned)a, (unsigned)b, (unsigned)c));
    case SYS_dup:
        return dup(fd);
    case SYS_dup2:
        return dup2(fd, (int)b);
    case SYS_dup3:
        return dup3(fd, (int)b, (int)c);
    case SYS_fcntl:
        return fcntl(fd, (int)b, c);
    case SYS_recvmsg:
        return recvmsg(fd, (struct msghdr *)b, (int)c);
    case SYS_ioctl:
        return libc_result(call_ioctl_any(fd, (unsigned long)b, (uintptr_t)c));
    case SYS_pidfd_getfd:
        return got_descriptor(sys(number, a, b, c));
    default:
        return on_file(number, a, b, c, d);
    }
}

static long on_path(long number, long a, long b, long c, long d, long e)
{
    switch (number) {
    case SYS_open:
        return open_any(AT_FDCWD, (const char *)a, (int)b, (mode_t)c);
    case SYS_openat:
        return open_any((int)a, (const char *)b, (int)c, (mode_t)d);
    case SYS_openat2:
        return open_how((int)a, (const char *)b, (const struct open_how *)c, (size_t)d);
    case SYS_truncate:
        return truncate((const char *)a, b);
    case SYS_newfstatat:
        return fstatat((int)a, (const char *)b, (struct stat *)c, (int)d);
    case SYS_statx:
        return libc_result(call_statx((int)a, (const char *)b, (int)c, (unsigned)d, (struct statx *)e));
    default:
        return on_descriptor(number, a, b, c, d);
    }
}

/* Called, or rather jumped to, with the arguments of syscall(). */
__attribute__((visibility("hidden"), used)) long syscall_of_ours(long number, long a, long b, long c, long d, long e, long f)
{
    switch (number) {
    case SYS_mmap:
        return libc_result(call_mmap((void *)a, (size_t)b, (int)c, (int)d, (int)e, f));
    case SYS_munmap:
        return libc_result(call_munmap((void *)a, (size_t)b));
    case SYS_mremap:
        return libc_result(call_mremap((void *)a, (size_t)b, (size_t)c, (int)d, (void *)e));
    case SYS_mprotect:
        return libc_result(call_mprotect((void *)a, (size_t)b, (int)c, -1));
    case SYS_pkey_mprotect:
        return libc_result(call_mprotect((void *)a, (size_t)b, (int)c, (int)d));
    case SYS_madvise:
        return libc_result(call_madvise((void *)a, (size_t)b, (int)c));
    case SYS_mbind:
        return libc_result(call_mbind((void *)a, (size_t)b, (int)c, (const void *)d, (unsigned long)e, (unsigned)f));
    case SYS_get_mempolicy:
        return libc_result(call_get_mempolicy((int *)a, (void *)b, (unsigned long)c, (void *)d, (unsigned)e));
    case SYS_msync:
        return msync_any((void *)a, (size_t)b, (int)c);
    default:
        return on_path(number, a, b, c, d, e);
    }
}
