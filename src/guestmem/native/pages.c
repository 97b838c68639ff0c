/* Mappings, by the ioctl that recent kernels have for that, else by the file under /proc. */
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
