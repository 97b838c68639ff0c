/* Section M: mmap of a file of 2 MiB. */
#include "probe.h"

#include <fcntl.h>

#define RW (PROT_READ | PROT_WRITE)

static const struct {
    const char *id;
    uint64_t file_flags;
    int prot, flags;
} plain[] = {
    {"M1", 0, RW, MAP_SHARED},
    {"M2", GMEM_INIT_SHARED, RW, MAP_SHARED},
    {"M3", GMEM_MMAP, RW, MAP_SHARED},
    {"M4", GMEM_BOTH, RW, MAP_SHARED},
    {"M5", GMEM_BOTH, PROT_READ, MAP_SHARED},
    {"M6", GMEM_BOTH, PROT_NONE, MAP_SHARED},
    {"M7", GMEM_BOTH, PROT_WRITE, MAP_SHARED},
    {"M8", GMEM_BOTH, PROT_READ | PROT_EXEC, MAP_SHARED},
    {"M9", GMEM_BOTH, RW | PROT_EXEC, MAP_SHARED},
    {"M10", GMEM_BOTH, RW, MAP_PRIVATE},
    {"M11", GMEM_BOTH, PROT_READ, MAP_PRIVATE},
    {"M12", 0, PROT_READ, MAP_PRIVATE},
    {"M13", GMEM_BOTH, RW, MAP_SHARED_VALIDATE},
    {"M14", GMEM_BOTH, RW, MAP_SHARED_VALIDATE | MAP_SYNC},
    {"M15", GMEM_BOTH, RW, MAP_SHARED | MAP_HUGETLB},
    {"M16", GMEM_BOTH, RW, MAP_SHARED | MAP_LOCKED},
    {"M17", GMEM_BOTH, RW, MAP_SHARED | MAP_NORESERVE},
    {"M18", GMEM_BOTH, RW, MAP_SHARED | MAP_GROWSDOWN},
};

static void ask_flags(void)
{
    int vm = new_vm();
    for (size_t i = 0; i < sizeof(plain) / sizeof(plain[0]); i++) {
        int fd = new_gmem(vm, FILE_SIZE, plain[i].file_flags);
        void *map = mmap(NULL, FILE_SIZE, plain[i].prot, plain[i].flags, fd, 0);
        row_map(plain[i].id, map);
        if (map != MAP_FAILED)
            munmap(map, FILE_SIZE);
        close(fd);
    }
}

/* "512/512", or the errno's name if mincore failed. */
static const char *resident(void *map)
{
    static unsigned char pages[FILE_PAGES];
    static char text[32];
    int count = 0;
    if (mincore(map, FILE_SIZE, pages) < 0)
        return errno_name(errno);
    for (size_t page = 0; page < FILE_PAGES; page++)
        count += pages[page] & 1;
    snprintf(text, sizeof(text), "%d/%lu", count, FILE_PAGES);
    return text;
}

static void ask_populate(void)
{
    int vm = new_vm(), both = new_gmem(vm, FILE_SIZE, GMEM_BOTH), closed = new_gmem(vm, FILE_SIZE, GMEM_MMAP);
    void *map = mmap(NULL, FILE_SIZE, RW, MAP_SHARED | MAP_POPULATE, both, 0);
    row_map("M19", map);
    row("M20", "0 resident=%s", resident(map));
    punch(both, 0, FILE_SIZE);
    row("M21", "resident=%s", resident(map));
    row_map("M22", mmap(NULL, FILE_SIZE, RW, MAP_SHARED | MAP_POPULATE, closed, 0));
    row("M23", "nr_cache=%s", answer(cached_pages(closed)));
}

static void ask_end_of_file(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    char *map = mmap(NULL, 2 * FILE_SIZE, RW, MAP_SHARED, fd, 0);
    row_map("M24", map);
    row_touch("M25", touch_write(map + FILE_SIZE - 1, 'x'), map);
    row_touch("M26", touch_write(map + FILE_SIZE, 'x'), map);
    row_touch("M27", touch_read(map + FILE_SIZE + 4096), map);
    map = mmap(NULL, PAGE, RW, MAP_SHARED, fd, 2 * FILE_SIZE);
    row_map("M28", map);
    row_touch("M29", touch_read(map), map);
}

static void ask_addresses(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    row_map("M30", mmap(NULL, PAGE, RW, MAP_SHARED, fd, 100));
    row_map("M31", mmap(NULL, 0, RW, MAP_SHARED, fd, 0));
    row_map("M32", mmap(NULL, 100, RW, MAP_SHARED, fd, 4096));
    void *area = mmap(NULL, FILE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *map = mmap(area, FILE_SIZE, RW, MAP_SHARED | MAP_FIXED, fd, 0);
    row("M33", "%s", map == MAP_FAILED ? errno_name(errno) : map == area ? "ok, same address" : "ok, other address");
}

/* The text of a file of /proc/self, whole: by open and read, which the shim sees. */
static char *whole(const char *path)
{
    static char text[1 << 20];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    ssize_t got;
    while (fd >= 0 && length < sizeof(text) - 1 && (got = read(fd, text + length, sizeof(text) - 1 - length)) > 0)
        length += (size_t)got;
    close(fd);
    text[length] = 0;
    return text;
}

/* The rest of the text from the line about the mapping that starts at `map`; NULL if there is none. */
static char *line_of(char *text, const void *map)
{
    char start[32];
    snprintf(start, sizeof(start), "%lx-", (unsigned long)map);
    for (char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (strncmp(line, start, strlen(start)) == 0)
            return line;
    return NULL;
}

static void ask_listed(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    void *map = map_shared(fd, FILE_SIZE);
    char permissions[8] = "?", name[128] = "?", *line = line_of(whole("/proc/self/maps"), map);
    if (line)
        sscanf(line, "%*s %7s %*s %*s %*s %127[^\n]", permissions, name);
    row("M34", "permissions %s, name %s", permissions, name);
    line = line_of(whole("/proc/self/smaps"), map);
    char *flags = line ? strstr(line, "VmFlags:") : NULL;
    row("M35", "%.*s", flags ? (int)strcspn(flags, "\n") : 1, flags ? flags : "?");
}

static const struct group groups[] = {
    {"flags", ask_flags},         {"populate", ask_populate}, {"end-of-file", ask_end_of_file},
    {"addresses", ask_addresses}, {"listed", ask_listed},
};
SECTION(mmap_section, "M", groups);
