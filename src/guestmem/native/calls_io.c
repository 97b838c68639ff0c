/* A guest_memfd is no file to read, write or resize, though the memfd behind it is; and the other files are sockets only to
 * us. What the kernel answers, in golden_6_18's sections O and F. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
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
