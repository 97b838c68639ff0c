/* What our files look like: as anonymous inodes, though they are memfds and sockets. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "calls.h"
#include "real.h"

enum { ANON_INODE_FS = 0x09041934, ST_VALID_ = 0x20, KVM_MINOR = 232, MISC_MAJOR = 10 };
enum { STATX_SHOWN = 0x17ff }; /* basic statistics and the mount, no time of birth */

static mode_t shown_mode(enum kind kind)
{
    switch (kind) {
    case KIND_GMEM:
    case KIND_GUP_TEST:
        return S_IFREG | 0600;
    case KIND_KVM:
    case KIND_IOMMU:
    case KIND_VFIO:
        return S_IFCHR | 0660;
    case KIND_LIVE_UPDATE:
        return S_IFCHR | 0600;
    default:
        return 0600;
    }
}

struct blocks {
    uint64_t size, count; /* of 512 bytes */
};

/* A file of huge pages says how large they are and how many are there. */
static struct blocks blocks_of(const struct file *file)
{
    struct call call = {.request = {.op = OP_STAT, .file = file->id}};
    if (file->kind != KIND_GMEM || call_server(&call))
        return (struct blocks){4096, 0};
    return (struct blocks){call.answer.a, call.answer.b};
}

/* Only what was asked of a descriptor, or is known already: nobody is asked because of somebody's stat(). */
static void show(struct stat *status, const struct file *file, enum kind kind)
{
    if (kind == KIND_NONE)
        return;
    struct blocks blocks = file ? blocks_of(file) : (struct blocks){4096, 0};
    status->st_mode = shown_mode(kind);
    status->st_nlink = 1;
    status->st_blksize = (blksize_t)blocks.size;
    status->st_blocks = (blkcnt_t)blocks.count;
    if (kind == KIND_KVM)
        status->st_rdev = makedev(MISC_MAJOR, KVM_MINOR);
}

static int stat_descriptor(int fd, struct stat *status)
{
    struct file file;
    long result = sys(SYS_fstat, fd, status);
    if (!result && file_marked(fd))
        show(status, &file, file_of_stat(status, &file, true));
    return (int)libc_result(result);
}

static int stat_path(int directory, const char *path, struct stat *status, int flags)
{
    struct file file;
    long result = sys(SYS_newfstatat, directory, path, status, flags);
    if (!result && process.memfd_device)
        show(status, &file, file_of_stat(status, &file, false));
    if (result == -ENOENT && path_is_device(path)) { /* a machine without one */
        *status = (struct stat){.st_blksize = 4096};
        show(status, NULL, KIND_KVM);
        return 0;
    }
    return (int)libc_result(result);
}

EXPORT int fstat(int fd, struct stat *status)
{
    return stat_descriptor(fd, status);
}

EXPORT int fstatat(int directory, const char *path, struct stat *status, int flags)
{
    return stat_path(directory, path, status, flags);
}

EXPORT int stat(const char *path, struct stat *status)
{
    return stat_path(AT_FDCWD, path, status, 0);
}

_Static_assert(sizeof(struct stat) == sizeof(struct stat64), "one layout, two names");

EXPORT int fstat64(int fd, struct stat64 *status)
{
    return stat_descriptor(fd, (struct stat *)status);
}

EXPORT int fstatat64(int directory, const char *path, struct stat64 *status, int flags)
{
    return stat_path(directory, path, (struct stat *)status, flags);
}

EXPORT int stat64(const char *path, struct stat64 *status)
{
    return stat_path(AT_FDCWD, path, (struct stat *)status, 0);
}

/* The names that programs built before glibc 2.33 call. */
int __fxstat(int version, int fd, struct stat *status);
int __fxstatat(int version, int directory, const char *path, struct stat *status, int flags);
int __fxstat64(int version, int fd, struct stat *status);
int __fxstatat64(int version, int directory, const char *path, struct stat *status, int flags);

EXPORT int __fxstat(int version, int fd, struct stat *status)
{
    (void)version;
    return stat_descriptor(fd, status);
}

EXPORT int __fxstatat(int version, int directory, const char *path, struct stat *status, int flags)
{
    (void)version;
    return stat_path(directory, path, status, flags);
}

EXPORT int __fxstat64(int version, int fd, struct stat *status) __attribute__((alias("__fxstat")));
EXPORT int __fxstatat64(int version, int directory, const char *path, struct stat *status, int flags)
    __attribute__((alias("__fxstatat")));

/* ---- statx */

long call_statx(int directory, const char *path, int flags, unsigned mask, struct statx *status)
{
    struct file file;
    long result = sys(SYS_statx, directory, path, flags, mask, status);
    if (result || !process.memfd_device)
        return result;
    struct stat plain = {.st_dev = makedev(status->stx_dev_major, status->stx_dev_minor),
                         .st_ino = status->stx_ino,
                         .st_mode = status->stx_mode};
    enum kind kind = file_of_stat(&plain, &file, file_marked(directory));
    if (kind == KIND_NONE)
        return 0;
    struct blocks blocks = blocks_of(&file);
    status->stx_blksize = (uint32_t)blocks.size;
    status->stx_mask &= STATX_SHOWN;
    status->stx_attributes = 0;
    status->stx_mode = (uint16_t)shown_mode(kind);
    status->stx_nlink = 1;
    status->stx_blocks = blocks.count;
    status->stx_btime = (struct statx_timestamp){0};
    return 0;
}

EXPORT int statx(int directory, const char *path, int flags, unsigned mask, struct statx *status)
{
    return (int)libc_result(call_statx(directory, path, flags, mask, status));
}

/* ---- statfs */

static int statfs_descriptor(int fd, struct statfs *status)
{
    struct file file;
    long result = sys(SYS_fstatfs, fd, status);
    if (!result && file_of_marked(fd, &file) != KIND_NONE)
        *status = (struct statfs){.f_type = process.gmem_magic ? process.gmem_magic : ANON_INODE_FS,
                                  .f_bsize = 4096,
                                  .f_frsize = 4096,
                                  .f_namelen = 255,
                                  .f_flags = ST_VALID_};
    return (int)libc_result(result);
}

EXPORT int fstatfs(int fd, struct statfs *status)
{
    return statfs_descriptor(fd, status);
}

EXPORT int fstatfs64(int fd, struct statfs64 *status)
{
    return statfs_descriptor(fd, (struct statfs *)status);
}
