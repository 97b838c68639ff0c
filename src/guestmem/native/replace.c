/* Private memory becomes a mapping of the server's file, its contents kept, while other threads of the client run.
 *
 * A userfaultfd on the range makes whoever touches a missing page wait. mremap() with MREMAP_DONTUNMAP then takes all pages
 * away at once, so from that moment every thread that touches the range waits until the file is mapped there. No write can
 * fall between the copy and the new mapping. */
#define _GNU_SOURCE
#include "shim.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "pages.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

/* The pages of a chunk exist twice for a while. */
static const size_t CHUNK = 1UL << 30, HUGE = 2UL << 20;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* A part of the range within one mapping. */
struct piece {
    char *address;
    size_t length;
    int protection;
    int fd;
    uint64_t offset;
    bool file_backed, shared;
};

/* ---- contents */

/* hugetlb files have no write(). */
static int copy_through_mapping(const struct piece *to, uint64_t offset, const char *from, size_t length)
{
    uint64_t start = offset & ~(HUGE - 1);
    size_t size = offset + length - start;
    long window = sys(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_SHARED, to->fd, start);
    if (is_error(window))
        return (int)-window;
    int error = copy_from_client((char *)window + (offset - start), from, length);
    sys(SYS_munmap, window, size);
    return error;
}

static int copy_run(const struct piece *to, uint64_t offset, const char *from, size_t length)
{
    while (length) {
        long wrote = sys(SYS_pwrite64, to->fd, from, length, offset);
        if (wrote == -EINVAL)
            return copy_through_mapping(to, offset, from, length);
        if (wrote <= 0)
            return wrote ? (int)-wrote : EIO;
        from += wrote;
        offset += (uint64_t)wrote;
        length -= (size_t)wrote;
    }
    return 0;
}

/* `from` is where the pages of piece+done are now. */
static int copy_contents(const struct piece *piece, size_t done, const char *from, size_t length)
{
    struct page_runs runs;
    int error = 0;
    uintptr_t start, end;
    if (piece->file_backed || piece->shared) /* a page that is not here yet has contents, too */
        return copy_run(piece, piece->offset + done, from, length);
    page_runs_begin(&runs, from, length);
    while (!error && page_runs_next(&runs, &start, &end))
        error = copy_run(piece, piece->offset + done + (start - (uintptr_t)from), (const char *)start, end - start);
    page_runs_end(&runs);
    return error;
}

static int map_file(const struct piece *piece, size_t done, size_t length)
{
    long result = sys(SYS_mmap, piece->address + done, length, piece->protection, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                      piece->fd, piece->offset + done);
    return is_error(result) ? (int)-result : 0;
}

/* ---- with all writers waiting */

static int hold_writers(const struct piece *piece)
{
    int fd = userfaultfd_open(0);
    struct uffdio_register range = {.range = {(uintptr_t)piece->address, piece->length},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (fd >= 0 && is_error(sys(SYS_ioctl, fd, UFFDIO_REGISTER, &range))) {
        sys(SYS_close, fd);
        return -1;
    }
    return fd;
}

/* Moves whole page tables and huge pages, if the new place is as aligned as the old one. */
static char *take_pages_away(char *address, size_t length)
{
    long room = sys(SYS_mmap, 0, length + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (is_error(room))
        return NULL;
    char *start = (char *)room, *place = start + (((uintptr_t)address - (uintptr_t)start) & (HUGE - 1));
    long moved =
        sys(SYS_mremap, address, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, place);
    if (place > start)
        sys(SYS_munmap, start, place - start);
    size_t behind = (size_t)(start + HUGE - place);
    if (behind)
        sys(SYS_munmap, place + length, behind);
    return is_error(moved) ? NULL : place; /* on failure the place may have been given to another thread already */
}

static int swap_chunk(const struct piece *piece, size_t done, size_t length)
{
    char *address = piece->address + done, *away = take_pages_away(address, length);
    if (!away)
        return ENOTSUP;
    sys(SYS_mprotect, away, length, PROT_READ);
    int error = copy_contents(piece, done, away, length);
    if (!error)
        error = map_file(piece, done, length);
    if (!error) {
        sys(SYS_munmap, away, length);
        return 0;
    }
    sys(SYS_mprotect, away, length, piece->protection);
    sys(SYS_mremap, away, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address);
    return error;
}

/* ENOTSUP: nothing was done, this memory cannot be taken away. */
static int replace_held(const struct piece *piece)
{
    int fd = hold_writers(piece), error = 0;
    if (fd < 0)
        return ENOTSUP;
    for (size_t done = 0; done < piece->length && !error; done += CHUNK) {
        size_t left = piece->length - done;
        error = swap_chunk(piece, done, left < CHUNK ? left : CHUNK);
        if (done && error == ENOTSUP)
            error = ENOMEM;
    }
    sys(SYS_close, fd); /* lets the waiting threads go on */
    return error;
}

/* A write that falls between the copy and the new mapping is lost. For memory that userfaultfd does not know (mappings of
 * files), or that cannot be moved (huge pages of hugetlb), or where there is no userfaultfd. */
static int replace_plainly(const struct piece *piece)
{
    int error = 0;
    if (!(piece->protection & PROT_READ))
        sys(SYS_mprotect, piece->address, piece->length, piece->protection | PROT_READ);
    error = copy_contents(piece, 0, piece->address, piece->length);
    return error ? error : map_file(piece, 0, piece->length);
}

static int replace_piece(const struct piece *piece, unsigned flags)
{
    int error = ENOTSUP;
    if (!piece->file_backed && !piece->shared && !(flags & REPLACE_HUGETLB))
        error = replace_held(piece);
    return error == ENOTSUP ? replace_plainly(piece) : error;
}

/* A gap between mappings stays one. Where the mappings cannot be read the server's word is taken. */
static int replace_all(char *address, size_t length, int protection, unsigned flags, int fd)
{
    char *end = address + length;
    int error = 0;
    for (char *at = address; at < end && !error;) {
        struct vma vma = {(uintptr_t)at, (uintptr_t)end, protection, false, !(flags & REPLACE_PRIVATE)};
        if (vma_next((uintptr_t)at, &vma) == ENOENT || vma.start >= (uintptr_t)end)
            break;
        char *start = vma.start > (uintptr_t)at ? (char *)vma.start : at;
        char *stop = vma.end < (uintptr_t)end ? (char *)vma.end : end;
        struct piece piece = {
            start, (size_t)(stop - start), vma.protection, fd, (uint64_t)(start - address), vma.file_backed, vma.shared};
        error = replace_piece(&piece, flags);
        at = stop;
    }
    return error;
}

int replace_memory(char *address, size_t length, int protection, unsigned flags, int fd)
{
    pthread_mutex_lock(&lock);
    int error = replace_all(address, length, protection, flags, fd);
    pthread_mutex_unlock(&lock);
    return error;
}

void replace_lock(void)
{
    pthread_mutex_lock(&lock);
}

void replace_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

void replace_after_fork(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}
