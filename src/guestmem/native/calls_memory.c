/* Mappings: of our files, and over ranges that the server must hear about. */
#define _GNU_SOURCE
#include "shim.h"

#include <sys/mman.h>

#include "calls.h"
#include "real.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum { PAGE_MASK = 4095 };

static bool misaligned(const void *address)
{
    return (uintptr_t)address & PAGE_MASK;
}

/* What is mapped there now is about to go. */
void leave(void *address, size_t length)
{
    if (!areas_touch(address, length, AREA_ANY))
        return;
    call_words(OP_UNMAP, 0, (uintptr_t)address, length, 0, 0);
    areas_remove(address, length, AREA_ANY);
}

/* ---- mmap */

static long map_vcpu(const struct file *file, void *address, size_t length, int protection, int flags, off_t offset)
{
    struct call call = {.request = {.op = OP_RUN_FD, .file = file->id}};
    int error = call_server(&call);
    if (error)
        return -error;
    long mapped = sys(SYS_mmap, address, length, protection, flags, call.fd, offset);
    sys(SYS_close, call.fd);
    return mapped;
}

/* Nobody can touch it until the server has guarded what is private. */
static long map_closed(const struct file *file, void *address, size_t length, int protection, int flags, int fd,
                       off_t offset)
{
    long mapped = sys(SYS_mmap, address, length, PROT_NONE, flags & ~(MAP_POPULATE | MAP_LOCKED), fd, offset);
    if (is_error(mapped))
        return mapped;
    areas_add((void *)mapped, length, AREA_GMEM);
    int error = call_words(OP_MMAP_DONE, file->id, (uint64_t)mapped, length, (uint64_t)offset, (uint64_t)protection);
    if (!error)
        error = (int)-sys(SYS_mprotect, mapped, length, protection);
    if (!error)
        return mapped;
    leave((void *)mapped, length);
    sys(SYS_munmap, mapped, length);
    return -error;
}

static long map_gmem(const struct file *file, void *address, size_t length, int protection, int flags, int fd,
                     off_t offset)
{
    if (offset & PAGE_MASK || !length || flags & MAP_HUGETLB || (flags & MAP_FIXED && misaligned(address)))
        return -EINVAL;
    int error = call_words(OP_MMAP_CHECK, file->id, length, (uint64_t)protection, (uint64_t)flags, (uint64_t)offset);
    if (!error)
        error = guard_prepare();
    if (error)
        return -error;
    long mapped = map_closed(file, address, length, protection, flags, fd, offset);
    /* As in the kernel, a page that cannot be had is no error here. */
    if (!is_error(mapped) && flags & MAP_LOCKED)
        sys(SYS_mlock, mapped, length);
    else if (!is_error(mapped) && flags & MAP_POPULATE)
        sys(SYS_madvise, mapped, length, MADV_POPULATE_READ);
    return mapped;
}

/* A shared mapping of a file is rare enough to ask whose it is. */
static enum kind kind_for_mapping(int flags, int fd, struct file *file)
{
    if (flags & MAP_ANONYMOUS || fd < 0)
        return KIND_NONE;
    return (flags & MAP_TYPE) == MAP_PRIVATE ? file_of_marked(fd, file) : file_of(fd, file);
}

long call_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    struct file file;
    if (!process.active)
        return sys(SYS_mmap, address, length, protection, flags, fd, offset);
    enum kind kind = kind_for_mapping(flags, fd, &file);
    if (flags & MAP_FIXED && (flags & MAP_FIXED_NOREPLACE) != MAP_FIXED_NOREPLACE && !misaligned(address))
        leave(address, length);
    if (kind == KIND_VCPU)
        return map_vcpu(&file, address, length, protection, flags, offset);
    if (kind == KIND_GMEM)
        return map_gmem(&file, address, length, protection, flags, fd, offset);
    return sys(SYS_mmap, address, length, protection, flags, fd, offset);
}

EXPORT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return (void *)libc_result(call_mmap(address, length, protection, flags, fd, offset));
}

EXPORT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));

/* ---- munmap, mprotect */

long call_munmap(void *address, size_t length)
{
    bool gmem = process.active && areas_touch(address, length, AREA_GMEM);
    if (process.active && !misaligned(address) && length)
        leave(address, length);
    long result = sys(SYS_munmap, address, length);
    if (gmem && !result)
        files_sync(); /* it may have been what kept a closed file */
    return result;
}

EXPORT int munmap(void *address, size_t length)
{
    return (int)libc_result(call_munmap(address, length));
}

/* key -1: plain mprotect(), which pkey_mprotect() with that key is, too. */
long call_mprotect(void *address, size_t length, int protection, int key)
{
    if (process.active && areas_touch(address, length, AREA_GMEM)) {
        if (protection & PROT_EXEC)
            return -EACCES;
        if (!misaligned(address))
            call_words(OP_PROTECT, 0, (uintptr_t)address, length, (uint64_t)protection, 0);
    }
    if (key == -1)
        return sys(SYS_mprotect, address, length, protection);
    return sys(SYS_pkey_mprotect, address, length, protection, key);
}

EXPORT int mprotect(void *address, size_t length, int protection)
{
    return (int)libc_result(call_mprotect(address, length, protection, -1));
}

EXPORT int pkey_mprotect(void *address, size_t length, int protection, int key)
{
    return (int)libc_result(call_mprotect(address, length, protection, key));
}

/* ---- madvise, msync */

static long advise_gmem(void *address, size_t length, int advice)
{
    switch (advice) {
    case MADV_REMOVE:
        return -call_words(OP_REMOVE, 0, (uintptr_t)address, length, 0, 0);
    case MADV_COLLAPSE:
        return -EINVAL;
    case MADV_HUGEPAGE: /* guest_memfd takes no such advice, and the memory behind ours would */
        return 0;
    default:
        return sys(SYS_madvise, address, length, advice);
    }
}

long call_madvise(void *address, size_t length, int advice)
{
    if (!process.active || misaligned(address) || !areas_touch(address, length, AREA_GMEM))
        return sys(SYS_madvise, address, length, advice);
    return advise_gmem(address, length, advice);
}

EXPORT int madvise(void *address, size_t length, int advice)
{
    return (int)libc_result(call_madvise(address, length, advice));
}

/* There is nothing to write to. */
int msync_any(void *address, size_t length, int flags)
{
    if (process.active && flags & MS_SYNC && areas_touch(address, length, AREA_GMEM))
        return fail(EINVAL);
    return REAL(msync)(address, length, flags);
}

EXPORT int msync(void *address, size_t length, int flags)
{
    return msync_any(address, length, flags);
}
