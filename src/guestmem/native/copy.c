/* Copies from and to the client's memory. An address that is no memory gives EFAULT, as the kernel's own copies do. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <sys/uio.h>

/* Where the system calls below are forbidden (a sandbox), a pipe copies as safely, at the cost of two descriptors. */
static int copy_through_pipe(void *to, const void *from, size_t length)
{
    int ends[2], error = 0;
    if (is_error(sys(SYS_pipe2, ends, O_CLOEXEC)))
        return EFAULT;
    for (size_t done = 0; done < length && !error;) {
        size_t chunk = length - done < 4096 ? length - done : 4096;
        long wrote = sys(SYS_write, ends[1], (const char *)from + done, chunk);
        if (wrote <= 0 || sys(SYS_read, ends[0], (char *)to + done, wrote) != wrote)
            error = EFAULT;
        else
            done += (size_t)wrote;
    }
    sys(SYS_close, ends[0]);
    sys(SYS_close, ends[1]);
    return error;
}

static int copy(long number, void *local, const void *remote, size_t length, void *to, const void *from)
{
    if (!length)
        return 0;
    struct iovec here = {local, length}, there = {(void *)(uintptr_t)remote, length};
    long copied = sys(number, sys(SYS_getpid), &here, 1, &there, 1, 0);
    if (copied == (long)length)
        return 0;
    if (copied == -EPERM || copied == -ENOSYS)
        return copy_through_pipe(to, from, length);
    return EFAULT;
}

int copy_to_client(void *to, const void *from, size_t length)
{
    return copy(SYS_process_vm_writev, (void *)(uintptr_t)from, to, length, to, from);
}

int copy_from_client(void *to, const void *from, size_t length)
{
    return copy(SYS_process_vm_readv, to, from, length, to, from);
}
