/* A guest_memfd is no file to read, write or resize, though the memfd behind it is; and the other files are sockets to
 * nobody but us. The answers are those of Linux 6.18. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "calls.h"
#include "real.h"

static enum kind kind_of(int fd)
{
    struct file file;
    return file_of_marked(fd, &file);
}

/* ---- fallocate */

long call_fallocate(int fd, int mode, off_t offset, off_t length)
{
    struct file file;
    if (file_of(fd, &file) != KIND_GMEM)
        return 1;
    struct call call = {.request = {.op = OP_FALLOCATE,
                                    .file = file.id,
                                    .a = (uint32_t)mode,
                                    .b = (uint64_t)offset,
                                    .c = (uint64_t)length},
                        .wait = WAIT_SIGNALS};
    return -call_server(&call);
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t length)
{
    long result = call_fallocate(fd, mode, offset, length);
    return result > 0 ? REAL(fallocate)(fd, mode, offset, length) : (int)libc_result(result);
}

EXPORT int fallocate64(int fd, int mode, off_t offset, off_t length) __attribute__((alias("fallocate")));

/* libc's own falls back to reading and writing where the file system cannot, and gets ESPIPE from that. */
EXPORT int posix_fallocate(int fd, off_t offset, off_t length)
{
    if (kind_of(fd) != KIND_GMEM)
        return REAL(posix_fallocate)(fd, offset, length);
    return offset < 0 || length <= 0 ? EINVAL : ESPIPE;
}

EXPORT int posix_fallocate64(int fd, off_t offset, off_t length) __attribute__((alias("posix_fallocate")));

/* ---- reading and writing: there is no such operation, and no position */

long refused_io(int fd)
{
    return kind_of(fd) == KIND_NONE ? 0 : -EINVAL;
}

long refused_io_at(int fd, off_t offset)
{
    enum kind kind = kind_of(fd);
    if (kind == KIND_NONE)
        return 0;
    return offset >= 0 && kind == KIND_GMEM ? -ESPIPE : -EINVAL;
}

#define REFUSE(refusal)                                                                                                \
    do {                                                                                                               \
        long refused_ = (refusal);                                                                                     \
        if (refused_)                                                                                                  \
            return fail((int)-refused_);                                                                               \
    } while (0)

EXPORT ssize_t read(int fd, void *buffer, size_t size)
{
    REFUSE(refused_io(fd));
    return REAL(read)(fd, buffer, size);
}

EXPORT ssize_t write(int fd, const void *buffer, size_t size)
{
    REFUSE(refused_io(fd));
    return REAL(write)(fd, buffer, size);
}

EXPORT ssize_t readv(int fd, const struct iovec *parts, int count)
{
    REFUSE(refused_io(fd));
    return REAL(readv)(fd, parts, count);
}

EXPORT ssize_t writev(int fd, const struct iovec *parts, int count)
{
    REFUSE(refused_io(fd));
    return REAL(writev)(fd, parts, count);
}

EXPORT ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(pread)(fd, buffer, size, offset);
}

EXPORT ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(pwrite)(fd, buffer, size, offset);
}

EXPORT ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(preadv)(fd, parts, count, offset);
}

EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(pwritev)(fd, parts, count, offset);
}

EXPORT ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(preadv2)(fd, parts, count, offset, flags);
}

EXPORT ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(pwritev2)(fd, parts, count, offset, flags);
}

ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room);
ssize_t __pread_chk(int fd, void *buffer, size_t size, off_t offset, size_t room);

EXPORT ssize_t __read_chk(int fd, void *buffer, size_t size, size_t room)
{
    REFUSE(refused_io(fd));
    return REAL(__read_chk)(fd, buffer, size, room);
}

EXPORT ssize_t __pread_chk(int fd, void *buffer, size_t size, off_t offset, size_t room)
{
    REFUSE(refused_io_at(fd, offset));
    return REAL(__pread_chk)(fd, buffer, size, offset, room);
}

#define SAME_AS(name) __attribute__((alias(#name)))
EXPORT ssize_t pread64(int fd, void *buffer, size_t size, off_t offset) SAME_AS(pread);
EXPORT ssize_t pwrite64(int fd, const void *buffer, size_t size, off_t offset) SAME_AS(pwrite);
EXPORT ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t offset) SAME_AS(preadv);
EXPORT ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) SAME_AS(pwritev);
EXPORT ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) SAME_AS(preadv2);
EXPORT ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) SAME_AS(pwritev2);
EXPORT ssize_t __pread64_chk(int fd, void *buffer, size_t size, off_t offset, size_t room) SAME_AS(__pread_chk);

long refused_seek(int fd, int whence)
{
    if (kind_of(fd) != KIND_GMEM)
        return 0;
    return whence >= SEEK_SET && whence <= SEEK_HOLE ? -ESPIPE : -EINVAL;
}

EXPORT off_t lseek(int fd, off_t offset, int whence)
{
    REFUSE(refused_seek(fd, whence));
    return libc_result(sys(SYS_lseek, fd, offset, whence));
}

EXPORT off_t lseek64(int fd, off_t offset, int whence) SAME_AS(lseek);

/* ---- from file to file */

EXPORT ssize_t splice(int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags)
{
    REFUSE(refused_io(in));
    REFUSE(refused_io(out));
    return REAL(splice)(in, in_offset, out, out_offset, size, flags);
}

EXPORT ssize_t sendfile(int out, int in, off_t *offset, size_t size)
{
    REFUSE(offset ? refused_io_at(in, 0) : refused_io(in));
    REFUSE(refused_io(out));
    return libc_result(sys(SYS_sendfile, out, in, offset, size));
}

EXPORT ssize_t sendfile64(int out, int in, off_t *offset, size_t size) SAME_AS(sendfile);

EXPORT ssize_t copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags)
{
    if (kind_of(in) == KIND_GMEM || kind_of(out) == KIND_GMEM)
        return fail(EXDEV);
    return REAL(copy_file_range)(in, in_offset, out, out_offset, size, flags);
}

/* ---- size, attributes, writing back */

long refused_change(int fd)
{
    return kind_of(fd) == KIND_GMEM ? -EINVAL : 0;
}

EXPORT int ftruncate(int fd, off_t size)
{
    REFUSE(refused_change(fd));
    return (int)libc_result(sys(SYS_ftruncate, fd, size));
}

EXPORT int ftruncate64(int fd, off_t size) SAME_AS(ftruncate);

EXPORT int fsync(int fd)
{
    REFUSE(refused_change(fd));
    return REAL(fsync)(fd);
}

EXPORT int fdatasync(int fd)
{
    REFUSE(refused_change(fd));
    return REAL(fdatasync)(fd);
}

EXPORT ssize_t readahead(int fd, off_t offset, size_t size)
{
    REFUSE(refused_change(fd));
    return libc_result(sys(SYS_readahead, fd, offset, size));
}

EXPORT int fchmod(int fd, mode_t mode)
{
    REFUSE(refused_change(fd));
    return (int)libc_result(sys(SYS_fchmod, fd, mode));
}

EXPORT int fchown(int fd, uid_t owner, gid_t group)
{
    REFUSE(refused_change(fd));
    return (int)libc_result(sys(SYS_fchown, fd, owner, group));
}

int futimens(int fd, const struct timespec times[2]);

EXPORT int futimens(int fd, const struct timespec times[2])
{
    REFUSE(refused_change(fd));
    return REAL(futimens)(fd, times);
}

static long refused_xattr(int fd)
{
    return kind_of(fd) == KIND_GMEM ? -EOPNOTSUPP : 0;
}

EXPORT int fsetxattr(int fd, const char *name, const void *value, size_t size, int flags)
{
    REFUSE(refused_xattr(fd));
    return (int)libc_result(sys(SYS_fsetxattr, fd, name, value, size, flags));
}

EXPORT ssize_t fgetxattr(int fd, const char *name, void *value, size_t size)
{
    REFUSE(refused_xattr(fd));
    return libc_result(sys(SYS_fgetxattr, fd, name, value, size));
}

EXPORT int fremovexattr(int fd, const char *name)
{
    REFUSE(refused_xattr(fd));
    return (int)libc_result(sys(SYS_fremovexattr, fd, name));
}

EXPORT ssize_t flistxattr(int fd, char *list, size_t size)
{
    return kind_of(fd) == KIND_GMEM ? 0 : libc_result(sys(SYS_flistxattr, fd, list, size));
}
