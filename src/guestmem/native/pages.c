/* Mappings and resident pages, by the ioctls that recent kernels have for that, else by the files under /proc. */
#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "raw.h"

/* ---- mappings: PROCMAP_QUERY (Linux 6.11), or the text of /proc/self/maps */

struct procmap_query {
    uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};

#define PROCMAP_QUERY_ _IOWR('f', 17, struct procmap_query)
enum { QUERY_SHARED = 0x08, QUERY_COVERING_OR_NEXT = 0x10 };

static long vma_query(long maps, uintptr_t address, struct vma *vma)
{
    struct procmap_query query = {
        .size = sizeof(query), .query_flags = QUERY_COVERING_OR_NEXT, .query_addr = address};
    long result = sys(SYS_ioctl, maps, PROCMAP_QUERY_, &query);
    if (!is_error(result))
        *vma = (struct vma){query.vma_start, query.vma_end, (int)query.vma_flags & (PROT_READ | PROT_WRITE | PROT_EXEC),
                            query.inode != 0, query.vma_flags & QUERY_SHARED};
    return result;
}

struct text {
    long fd, length, at;
    char buffer[1024];
};

static int text_byte(struct text *text)
{
    if (text->at == text->length) {
        text->length = sys(SYS_read, text->fd, text->buffer, sizeof(text->buffer));
        text->at = 0;
        if (text->length <= 0)
            return text->length = 0, -1;
    }
    return (unsigned char)text->buffer[text->at++];
}

static bool text_number(struct text *text, unsigned base, uint64_t *value)
{
    int byte;
    *value = 0;
    while ((byte = text_byte(text)) >= 0) {
        unsigned digit = byte <= '9' ? (unsigned)byte - '0' : (unsigned)byte - 'a' + 10;
        if (digit >= base)
            return true;
        *value = *value * base + digit;
    }
    return false;
}

/* start-end perms offset major:minor inode   name */
static bool text_line(struct text *text, struct vma *vma)
{
    uint64_t start, end, number;
    if (!text_number(text, 16, &start) || !text_number(text, 16, &end))
        return false;
    *vma = (struct vma){start, end, 0, false, false};
    vma->protection |= text_byte(text) == 'r' ? PROT_READ : 0;
    vma->protection |= text_byte(text) == 'w' ? PROT_WRITE : 0;
    vma->protection |= text_byte(text) == 'x' ? PROT_EXEC : 0;
    vma->shared = text_byte(text) == 's';
    text_byte(text);
    for (int i = 0; i < 3; i++)
        text_number(text, 16, &number);
    /* the inode number ends at a blank, or at the end of the line */
    int byte;
    for (number = 0; (byte = text_byte(text)) >= '0' && byte <= '9';)
        number = number * 10 + (unsigned)byte - '0';
    vma->file_backed = number != 0;
    while (byte >= 0 && byte != '\n')
        byte = text_byte(text);
    return true;
}

static int vma_scan(long maps, uintptr_t address, struct vma *vma)
{
    struct text text = {.fd = maps};
    struct vma line;
    while (text_line(&text, &line)) {
        if (line.end > address) {
            *vma = line;
            return 0;
        }
    }
    return ENOENT;
}

int vma_next(uintptr_t address, struct vma *vma)
{
    long maps = sys(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC, 0);
    if (is_error(maps))
        return (int)-maps;
    long result = vma_query(maps, address, vma);
    int error = is_error(result) ? (int)-result : 0;
    if (error && error != ENOENT)
        error = vma_scan(maps, address, vma);
    sys(SYS_close, maps);
    return error;
}

/* ---- pages: PAGEMAP_SCAN (Linux 6.7), or the words of /proc/self/pagemap, or all of them */

struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
        category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN_ _IOWR('f', 16, struct pm_scan_arg)
enum { PAGE_PRESENT = 1 << 3, PAGE_SWAPPED = 1 << 4, PAGE_ZERO = 1 << 5 };
enum { PAGE = 4096, WORDS = 64 };

void page_runs_begin(struct page_runs *runs, const void *address, size_t length)
{
    runs->at = (uintptr_t)address;
    runs->end = (uintptr_t)address + length;
    runs->count = runs->next = 0;
    runs->pagemap = (int)sys(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
}

void page_runs_end(struct page_runs *runs)
{
    if (runs->pagemap >= 0)
        sys(SYS_close, runs->pagemap);
}

static bool scan(struct page_runs *runs)
{
    struct pm_scan_arg arg = {.size = sizeof(arg),
                              .start = runs->at,
                              .end = runs->end,
                              .vec = (uintptr_t)runs->found,
                              .vec_len = PAGE_RUNS,
                              .category_anyof_mask = PAGE_PRESENT | PAGE_SWAPPED,
                              .return_mask = PAGE_PRESENT | PAGE_SWAPPED | PAGE_ZERO};
    long count = sys(SYS_ioctl, runs->pagemap, PAGEMAP_SCAN_, &arg);
    if (is_error(count))
        return false;
    runs->count = count;
    runs->at = arg.walk_end;
    return true;
}

static void read_words(struct page_runs *runs)
{
    uint64_t words[WORDS];
    long got = sys(SYS_pread64, runs->pagemap, words, sizeof(words), runs->at / PAGE * sizeof(words[0]));
    long known = got > 0 ? got / (long)sizeof(words[0]) : 0;
    uintptr_t stop = runs->at + WORDS * (uintptr_t)PAGE;
    for (long i = 0; runs->at < stop && runs->at < runs->end; i++, runs->at += PAGE)
        if (i >= known || words[i] >> 62)
            runs->found[runs->count++] = (struct page_run){runs->at, runs->at + PAGE, PAGE_PRESENT};
}

bool page_runs_next(struct page_runs *runs, uintptr_t *start, uintptr_t *end)
{
    for (;;) {
        while (runs->next < runs->count) {
            const struct page_run *run = &runs->found[runs->next++];
            if (run->categories & PAGE_ZERO)
                continue;
            *start = run->start;
            *end = run->end;
            return true;
        }
        if (runs->at >= runs->end)
            return false;
        runs->count = runs->next = 0;
        if (!scan(runs))
            read_words(runs);
    }
}
