/* Section V: operations on the mapping of a file that is MMAP and INIT_SHARED. */
#include "probe.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/syscall.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define ADVICE_GUARD_INSTALL 102
#define ADVICE_GUARD_REMOVE 103
#define RW (PROT_READ | PROT_WRITE)

static int new_file(void)
{
    return new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
}

static char *new_map(void)
{
    return map_shared(new_file(), FILE_SIZE);
}

static const struct {
    const char *id;
    int advice;
} advices[] = {
    {"V1", MADV_NORMAL},          {"V2", MADV_RANDOM},
    {"V3", MADV_SEQUENTIAL},      {"V4", MADV_WILLNEED},
    {"V5", MADV_DONTNEED},        {"V6", MADV_FREE},
    {"V7", MADV_REMOVE},          {"V8", MADV_DONTFORK},
    {"V9", MADV_DOFORK},          {"V10", MADV_MERGEABLE},
    {"V11", MADV_UNMERGEABLE},    {"V12", MADV_HUGEPAGE},
    {"V13", MADV_NOHUGEPAGE},     {"V14", MADV_DONTDUMP},
    {"V15", MADV_DODUMP},         {"V16", MADV_WIPEONFORK},
    {"V17", MADV_KEEPONFORK},     {"V18", MADV_COLD},
    {"V19", MADV_PAGEOUT},        {"V20", MADV_POPULATE_READ},
    {"V21", MADV_POPULATE_WRITE}, {"V22", 24 /* DONTNEED_LOCKED */},
    {"V23", MADV_COLLAPSE},       {"V24", ADVICE_GUARD_INSTALL},
    {"V25", ADVICE_GUARD_REMOVE}, {"V26", 99},
};

static void ask_madvise(void)
{
    char *map = new_map();
    for (size_t i = 0; i < sizeof(advices) / sizeof(advices[0]); i++) {
        if (advices[i].advice != ADVICE_GUARD_REMOVE)
            touch_write(map, 66);
        int result = madvise(map, PAGE, advices[i].advice);
        const char *text = answer(result);
        if (advices[i].advice == ADVICE_GUARD_INSTALL)
            row(advices[i].id, "%s", text);
        else
            row(advices[i].id, "%s; byte after: %s", text, touch_text(touch_read(map), map));
    }
}

static void ask_collapse(void)
{
    int fd = new_file();
    char *room = mmap(NULL, 2 * FILE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *aligned = (char *)(((uintptr_t)room + FILE_SIZE - 1) & ~(FILE_SIZE - 1));
    char *map = mmap(aligned, FILE_SIZE, RW, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, 0);
    if (map == MAP_FAILED)
        stop("mmap");
    row_ret("V27", madvise(map, FILE_SIZE, MADV_COLLAPSE));
}

static void ask_locks(void)
{
    int fd = new_file();
    char *map = map_shared(fd, FILE_SIZE);
    unsigned char resident = 0;
    row_ret("V28", mlock(map, PAGE));
    row_ret("V29", punch(fd, 0, PAGE));
    int result = mincore(map, PAGE, &resident);
    row("V30", "resident=%s", result < 0 ? errno_name(errno) : resident & 1 ? "1" : "0");
    row_ret("V31", munlock(map, PAGE));
    row_ret("V32", mlock2(map, PAGE, MLOCK_ONFAULT));
}

static void ask_protection(void)
{
    char *map = new_map();
    touch_write(map, 1);
    row_ret("V33", mprotect(map, PAGE, PROT_READ));
    row_touch("V34", touch_write(map, 2), map);
    row_ret("V35", mprotect(map, PAGE, RW));
    row_ret("V36", mprotect(map, PAGE, PROT_READ | PROT_EXEC));
    row_ret("V37", mprotect(map, PAGE, PROT_NONE));
    row_touch("V38", touch_read(map), map);
}

static void ask_msync(void)
{
    char *map = new_map();
    touch_write(map, 1);
    row_ret("V39", msync(map, PAGE, MS_SYNC));
    row_ret("V40", msync(map, PAGE, MS_ASYNC));
    row_ret("V41", msync(map, PAGE, MS_INVALIDATE | MS_SYNC));
}

static void ask_mremap(void)
{
    int fd = new_file();
    char *map = map_shared(fd, 4 * PAGE),
         *target = mmap(NULL, FILE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    map = mremap(map, 4 * PAGE, 2 * PAGE, 0);
    row_map("V42", map);
    map = mremap(map, 2 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
    row_map("V43", map);
    row_touch("V44", touch_write(map + 7 * PAGE, 1), map);
    map = mremap(map, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
    row_map("V45", map);
    /* The fifth argument is passed on even without MREMAP_FIXED: what a register held would be refused as an address.
     */
    row_map("V46", mremap(map, 8 * PAGE, 8 * PAGE, MREMAP_DONTUNMAP, NULL));
    row_map("V46b", mremap(map, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL));
    row_map("V47", mremap(map, 0, 8 * PAGE, MREMAP_MAYMOVE));
    map = mremap(map_shared(fd, FILE_SIZE), FILE_SIZE, 4 * FILE_SIZE, MREMAP_MAYMOVE);
    row_map("V48", map);
    row_touch("V49", touch_read(map + 3 * FILE_SIZE), map);
    map = map_shared(fd, FILE_SIZE);
    row_ret("V50", remap_file_pages(map, PAGE, 0, 3, 0));
}

static void row_register(const char *id, int uffd, char *map, uint64_t mode)
{
    struct uffdio_register range = {.range = {(uintptr_t)map, FILE_SIZE}, .mode = mode};
    row_ret(id, ioctl(uffd, UFFDIO_REGISTER, &range));
}

/* USER_MODE_ONLY: what any user may create; registering does not look at it. */
static void ask_userfaultfd(void)
{
    char *map = new_map();
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY); /* no wrapper */
    struct uffdio_api api = {.api = UFFD_API};
    row_fd("V51", uffd);
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        stop("UFFDIO_API");
    row_register("V52", uffd, map, UFFDIO_REGISTER_MODE_MISSING);
    row_register("V53", uffd, map, UFFDIO_REGISTER_MODE_WP);
    row_register("V54", uffd, map, UFFDIO_REGISTER_MODE_MINOR);
    row_register("V55", uffd, map, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
}

static void ask_seal(void)
{
    char *map = new_map();
    row_ret("V56", syscall(SYS_mseal, map, PAGE, 0)); /* no wrapper */
    row_ret("V57", pkey_mprotect(map + PAGE, PAGE, PROT_READ, -1));
}

static const struct group groups[] = {
    {"madvise", ask_madvise},         {"collapse", ask_collapse}, {"locks", ask_locks},
    {"protection", ask_protection},   {"msync", ask_msync},       {"mremap", ask_mremap},
    {"userfaultfd", ask_userfaultfd}, {"seal", ask_seal},
};
SECTION(vma_section, "V", groups);
