/* open(), and what else takes a path: our devices, and names under /proc that lead to our files. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "calls.h"
#include "names.h"
#include "real.h"

/* Paths are looked at before the kernel has checked that they are memory; a bad one is nearly always NULL. */
static bool readable(const char *path)
{
    return process.active && (uintptr_t)path >= 4096 && path[0] == '/';
}

#define VFIO_PATH "/dev/vfio/devices/vfio"

static uint64_t vfio_device(const char *number)
{
    unsigned device = (unsigned)number[0] - '0';
    return device < VFIO_DEVICES && !number[1] ? OPEN_VFIO + device : 0;
}

static uint64_t device_of(const char *path)
{
    if (!readable(path))
        return 0;
    if (!strcmp(path, "/dev/kvm"))
        return OPEN_KVM;
    if (!strcmp(path, "/dev/iommu"))
        return OPEN_IOMMU;
    if (!strcmp(path, "/dev/liveupdate"))
        return OPEN_LIVE_UPDATE;
    if (!strncmp(path, VFIO_PATH, sizeof(VFIO_PATH) - 1))
        return vfio_device(path + sizeof(VFIO_PATH) - 1);
    return strcmp(path, "/sys/kernel/debug/gup_test") ? 0 : OPEN_GUP_TEST;
}

bool path_is_device(const char *path)
{
    return device_of(path) != 0;
}

/* The guest_memfd, or another of our files, that a name under /proc leads to. */
static enum kind kind_of_name(const char *path, struct file *file)
{
    if (!readable(path) || (path[1] != 'p' && path[1] != 'd'))
        return KIND_NONE;
    int fd = name_of_descriptor(path);
    return fd < 0 ? KIND_NONE : file_of_marked(fd, file);
}

/* ---- open */

static enum kind kind_of_device(uint64_t device)
{
    switch (device) {
    case OPEN_KVM:
        return KIND_KVM;
    case OPEN_GUP_TEST:
        return KIND_GUP_TEST;
    case OPEN_IOMMU:
        return KIND_IOMMU;
    case OPEN_LIVE_UPDATE:
        return KIND_LIVE_UPDATE;
    default:
        return KIND_VFIO;
    }
}

static int open_device(uint64_t device, int flags)
{
    struct call call = {.request = {.op = OP_OPEN, .a = device}};
    int error = call_server(&call);
    if (error)
        return fail(error == EIO ? ENODEV : error);
    if (!(flags & O_CLOEXEC))
        sys(SYS_fcntl, call.fd, F_SETFD, 0);
    file_made(call.fd, kind_of_device(device));
    return call.fd;
}

static int open_maps(const char *path, int flags)
{
    int fd = maps_open(path);
    if (fd >= 0 && !(flags & O_CLOEXEC))
        sys(SYS_fcntl, fd, F_SETFD, 0);
    return fd;
}

/* Programs that look at how the kvm module was loaded, where none is: as it is by default. */
static bool is_module_parameter(const char *path)
{
    return !strcmp(path, "/sys/module/kvm/parameters/force_emulation_prefix");
}

static int open_module_parameter(void)
{
    long fd = sys(SYS_memfd_create, "parameter", 0);
    if (is_error(fd))
        return fail(ENOENT);
    sys(SYS_pwrite64, fd, "0\n", 2, 0);
    return (int)fd;
}

int open_any(int directory, const char *path, int flags, mode_t mode)
{
    struct file file;
    if (!readable(path) || flags & O_PATH)
        return REAL(openat)(directory, path, flags, mode);
    uint64_t device = device_of(path);
    if (device && shim_active())
        return open_device(device, flags);
    if (kind_of_name(path, &file) != KIND_NONE)
        return fail(ENXIO);
    int fd = areas_exist() && name_is_maps(path) ? open_maps(path, flags) : -1;
    if (fd < 0)
        fd = REAL(openat)(directory, path, flags, mode);
    return fd < 0 && errno == ENOENT && is_module_parameter(path) ? open_module_parameter() : fd;
}

static bool needs_mode(int flags)
{
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE;
}

#define MODE_ARGUMENT(flags)                                                                                           \
    ({                                                                                                                 \
        mode_t mode_ = 0;                                                                                              \
        if (needs_mode(flags)) {                                                                                       \
            va_list arguments_;                                                                                        \
            va_start(arguments_, flags);                                                                               \
            mode_ = va_arg(arguments_, mode_t);                                                                        \
            va_end(arguments_);                                                                                        \
        }                                                                                                              \
        mode_;                                                                                                         \
    })

EXPORT int open(const char *path, int flags, ...)
{
    return open_any(AT_FDCWD, path, flags, MODE_ARGUMENT(flags));
}

EXPORT int openat(int directory, const char *path, int flags, ...)
{
    return open_any(directory, path, flags, MODE_ARGUMENT(flags));
}

EXPORT int open64(const char *path, int flags, ...) __attribute__((alias("open")));
EXPORT int openat64(int directory, const char *path, int flags, ...) __attribute__((alias("openat")));

/* The names that fortified programs call. */
int __open_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);

EXPORT int __open_2(const char *path, int flags)
{
    return open_any(AT_FDCWD, path, flags, 0);
}

EXPORT int __openat_2(int directory, const char *path, int flags)
{
    return open_any(directory, path, flags, 0);
}

EXPORT int __open64_2(const char *path, int flags) __attribute__((alias("__open_2")));
EXPORT int __openat64_2(int directory, const char *path, int flags) __attribute__((alias("__openat_2")));

/* ---- access: whoever runs under us may use the device, whether the machine has one or not */

EXPORT int access(const char *path, int mode)
{
    return device_of(path) ? 0 : (int)libc_result(sys(SYS_access, path, mode));
}

EXPORT int faccessat(int directory, const char *path, int mode, int flags)
{
    return device_of(path) ? 0 : REAL(faccessat)(directory, path, mode, flags);
}

EXPORT int euidaccess(const char *path, int mode)
{
    return device_of(path) ? 0 : REAL(euidaccess)(path, mode);
}

EXPORT int eaccess(const char *path, int mode) __attribute__((alias("euidaccess")));

/* ---- readlink */

static const char *shown_name(enum kind kind)
{
    switch (kind) {
    case KIND_KVM:
        return "/dev/kvm";
    case KIND_VM:
        return "anon_inode:kvm-vm";
    case KIND_VCPU:
        return "anon_inode:kvm-vcpu:0";
    case KIND_GMEM:
        return "anon_inode:[kvm-gmem]";
    case KIND_IOMMU:
        return "/dev/iommu";
    case KIND_LIVE_UPDATE:
        return "/dev/liveupdate";
    case KIND_SESSION:
        return "anon_inode:[luo_session]";
    case KIND_VFIO:
        return "/dev/vfio/devices/vfio0";
    default:
        return "/sys/kernel/debug/gup_test";
    }
}

static ssize_t readlink_any(int directory, const char *path, char *buffer, size_t size)
{
    struct file file;
    enum kind kind = kind_of_name(path, &file);
    if (kind == KIND_NONE || (ssize_t)size <= 0)
        return libc_result(sys(SYS_readlinkat, directory, path, buffer, size));
    const char *name = shown_name(kind);
    size_t length = strlen(name);
    if (length > size)
        length = size;
    return copy_to_client(buffer, name, length) ? fail(EFAULT) : (ssize_t)length;
}

EXPORT ssize_t readlink(const char *path, char *buffer, size_t size)
{
    return readlink_any(AT_FDCWD, path, buffer, size);
}

EXPORT ssize_t readlinkat(int directory, const char *path, char *buffer, size_t size)
{
    return readlink_any(directory, path, buffer, size);
}

/* ---- truncate, execveat, name_to_handle_at */

EXPORT int truncate(const char *path, off_t size)
{
    struct file file;
    if (kind_of_name(path, &file) == KIND_GMEM)
        return fail(EINVAL);
    return (int)libc_result(sys(SYS_truncate, path, size));
}

EXPORT int truncate64(const char *path, off_t size) __attribute__((alias("truncate")));

EXPORT int name_to_handle_at(int directory, const char *path, struct file_handle *handle, int *mount, int flags)
{
    struct file file;
    if (flags & AT_EMPTY_PATH && file_of_marked(directory, &file) != KIND_NONE)
        return fail(EOPNOTSUPP);
    return (int)libc_result(sys(SYS_name_to_handle_at, directory, path, handle, mount, flags));
}

EXPORT int execveat(int directory, const char *path, char *const arguments[], char *const environment[], int flags)
{
    struct file file;
    if (flags & AT_EMPTY_PATH && file_of_marked(directory, &file) != KIND_NONE)
        return fail(EACCES);
    return (int)libc_result(sys(SYS_execveat, directory, path, arguments, environment, flags));
}
