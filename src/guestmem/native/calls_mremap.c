/* mremap(). A mapping of a guest_memfd never leaves its place before the server knows: the place could be given to another
 * thread's mapping in between. So a move is a second mapping of the same pages, a word to the server, and an munmap. */
#define _GNU_SOURCE
#include "shim.h"

#include <stdarg.h>
#include <sys/mman.h>

#include "calls.h"
#include "pages.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

struct remap {
    char *address;
    size_t length, new_length;
    int flags;
    char *new_address;
};

static bool misaligned(const void *address)
{
    return (uintptr_t)address & 4095;
}

static size_t whole_pages(size_t length)
{
    return (length + 4095) & ~(size_t)4095;
}

static long remap_natively(const struct remap *remap)
{
    return sys(SYS_mremap, remap->address, remap->length, remap->new_length, remap->flags, remap->new_address);
}

/* `left`: how much of the old place is no longer this mapping's. */
static void tell(const struct remap *remap, long moved, size_t left)
{
    areas_add((void *)moved, remap->new_length, AREA_GMEM);
    call_words(OP_MOVED, 0, (uintptr_t)remap->address, left, (uint64_t)moved, remap->new_length);
}

/* Guarded ranges are mappings of their own to the kernel, but one to the client; what mprotect() has split is not. */
static bool is_one_mapping(const struct remap *remap)
{
    uintptr_t at = (uintptr_t)remap->address, end = at + remap->length;
    struct vma first = {0}, vma;
    while (at < end) {
        if (vma_next(at, &vma) || vma.start > at)
            return false;
        if (!first.end)
            first = vma;
        if (vma.protection != first.protection)
            return false;
        at = vma.end;
    }
    return true;
}

static bool overlap(const struct remap *remap)
{
    return remap->flags & MREMAP_FIXED && remap->new_address < remap->address + remap->length &&
           remap->address < remap->new_address + remap->new_length;
}

static long move(const struct remap *remap)
{
    if (overlap(remap))
        return -EINVAL;
    if (!is_one_mapping(remap))
        return -EFAULT;
    long moved = sys(SYS_mremap, remap->address, 0, remap->new_length, remap->flags, remap->new_address);
    if (is_error(moved))
        return moved;
    if (remap->length)
        sys(SYS_mprotect, remap->address, remap->length, PROT_NONE); /* the guard goes before the mapping does */
    tell(remap, moved, remap->length);
    areas_remove(remap->address, remap->length, AREA_ANY);
    if (remap->length)
        sys(SYS_munmap, remap->address, remap->length);
    return moved;
}

static long shrink(const struct remap *remap)
{
    long result = remap->length > remap->new_length
                      ? call_munmap(remap->address + remap->new_length, remap->length - remap->new_length)
                      : 0;
    return is_error(result) ? result : (long)remap->address;
}

static long grow(const struct remap *remap)
{
    long grown = sys(SYS_mremap, remap->address, remap->length, remap->new_length, 0, 0);
    if (!is_error(grown)) {
        tell(remap, grown, remap->length);
        return grown;
    }
    return remap->flags & MREMAP_MAYMOVE ? move(remap) : grown;
}

static long keep_both(const struct remap *remap)
{
    long moved = remap_natively(remap);
    if (!is_error(moved))
        tell(remap, moved, 0);
    return moved;
}

static long remap_gmem(const struct remap *remap)
{
    const int known = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
    bool may_move = remap->flags & MREMAP_MAYMOVE;
    if (misaligned(remap->address) || !remap->new_length || remap->flags & ~known || (remap->flags && !may_move))
        return remap_natively(remap); /* an error, and the kernel knows which */
    if (remap->flags & MREMAP_DONTUNMAP)
        return keep_both(remap);
    if (!remap->length || remap->flags & MREMAP_FIXED)
        return may_move ? move(remap) : -EINVAL;
    return remap->new_length <= remap->length ? shrink(remap) : grow(remap);
}

long call_mremap(void *address, size_t length, size_t new_length, int flags, void *new_address)
{
    struct remap remap = {address, whole_pages(length), whole_pages(new_length), flags, new_address};
    if (!process.active || !areas_exist())
        return remap_natively(&remap);
    if (flags & MREMAP_FIXED && !misaligned(new_address) && !overlap(&remap))
        leave(new_address, remap.new_length);
    if (areas_touch(address, length ? length : 1, AREA_GMEM))
        return remap_gmem(&remap);
    if (!misaligned(address))
        leave(address, remap.length);
    return remap_natively(&remap);
}

EXPORT void *mremap(void *address, size_t length, size_t new_length, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    void *new_address = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) ? va_arg(arguments, void *) : NULL;
    va_end(arguments);
    return (void *)libc_result(call_mremap(address, length, new_length, flags, new_address));
}
