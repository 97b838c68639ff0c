/* Section I: what fstat, links and page counts say about a guest_memfd. */
#include "probe.h"

#include <fcntl.h>
#include <inttypes.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

static const char *link_path(int fd)
{
    static char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return path;
}

static void row_link(int fd)
{
    char target[128];
    ssize_t length = readlink(link_path(fd), target, sizeof(target) - 1);
    if (length < 0)
        row_ret("I1", -1);
    else
        row("I1", "\"%.*s\"", (int)length, target);
}

static void row_two_files(int vm, int fd)
{
    struct stat first, second;
    if (fstat(fd, &first) < 0 || fstat(new_gmem(vm, FILE_SIZE, GMEM_BOTH), &second) < 0)
        stop("fstat");
    row("I2", "st_ino differ: %s; st_dev equal: %s; st_dev major %u", first.st_ino != second.st_ino ? "yes" : "no",
        first.st_dev == second.st_dev ? "yes" : "no", major(first.st_dev));
    row("I18", "major %u minor nonzero: %s", major(first.st_dev), minor(first.st_dev) ? "yes" : "no");
}

static void row_file_system(int fd)
{
    struct statfs fs = {0};
    int result = fstatfs(fd, &fs);
    row("I3", "r=%d f_type=0x%lx f_bsize=%ld f_blocks=%lu f_namelen=%ld f_flags=0x%lx", result,
        (unsigned long)fs.f_type, (long)fs.f_bsize, (unsigned long)fs.f_blocks, (long)fs.f_namelen,
        (unsigned long)fs.f_flags);
}

/* "pos, flags (0100002), mnt_id, ino; nothing else": the keys in their order, and the value of flags. */
static void row_fdinfo(int fd)
{
    char path[64], text[1024], *line, *rest = text, keys[256] = "";
    snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
    int info = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = info < 0 ? -1 : read(info, text, sizeof(text) - 1);
    if (length < 0) {
        row_ret("I4", -1);
        return;
    }
    text[length] = 0;
    while ((line = strsep(&rest, "\n")) && *line) {
        char *value = strchr(line, ':');
        size_t used = strlen(keys);
        if (value)
            *value++ = 0;
        snprintf(keys + used, sizeof(keys) - used, "%s%s", used ? ", " : "", line);
        if (strcmp(line, "flags") == 0 && value)
            snprintf(keys + strlen(keys), sizeof(keys) - strlen(keys), " (%s)", value + strspn(value, " \t"));
    }
    row("I4", "%s%s", keys, strcmp(keys, "pos, flags (0100002), mnt_id, ino") ? "" : "; nothing else");
}

static void ask_identity(void)
{
    int vm = new_vm(), fd = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    row_link(fd);
    row_two_files(vm, fd);
    row_file_system(fd);
    row_fdinfo(fd);
    row_fd("I5", open(link_path(fd), O_RDWR | O_CLOEXEC));
    row_fd("I6", open(link_path(fd), O_PATH | O_CLOEXEC));
    row_ret("I7", truncate(link_path(fd), 4096));
    struct stat status;
    row_ret("I17", fstatat(fd, "", &status, AT_EMPTY_PATH));
    struct statx extended = {0};
    int result = statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &extended);
    row("I19", "%s mask=0x%x attributes=0x%" PRIx64 " btime %s", answer(result), extended.stx_mask,
        (uint64_t)extended.stx_attributes, extended.stx_mask & STATX_BTIME ? "present" : "absent");
}

static void row_stat_after(const char *id, int fd, const struct stat *before)
{
    struct stat now = {0};
    fstat(fd, &now);
    bool same = now.st_mode == before->st_mode && now.st_nlink == before->st_nlink && now.st_size == before->st_size &&
                now.st_blksize == before->st_blksize && now.st_ino == before->st_ino && now.st_dev == before->st_dev;
    row(id, "st_blocks=%ld (rest %s)", (long)now.st_blocks, same ? "unchanged" : "changed");
}

static void ask_blocks(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    struct stat fresh = {0};
    if (fstat(fd, &fresh) < 0)
        stop("fstat");
    row("I8", "mode=0%o nlink=%lu size=%ld blksize=%ld blocks=%ld", fresh.st_mode, (unsigned long)fresh.st_nlink,
        (long)fresh.st_size, (long)fresh.st_blksize, (long)fresh.st_blocks);
    populate(fd, 0, 4 * PAGE);
    row_stat_after("I9", fd, &fresh);
    punch(fd, 0, 4 * PAGE);
    row_stat_after("I10", fd, &fresh);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 1);
    touch_write(map + PAGE, 1);
    row_stat_after("I11", fd, &fresh);
}

static void row_cached(const char *id, int fd)
{
    row(id, "nr_cache=%s", answer(cached_pages(fd)));
}

static void ask_cached(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    populate(fd, 0, 3 * PAGE);
    row_cached("I12", fd);
    punch(fd, 0, FILE_SIZE);
    row_cached("I13", fd);
    char *map = map_shared(fd, FILE_SIZE);
    touch_read(map);
    row_cached("I14", fd);
    punch(fd, 0, FILE_SIZE);
    touch_read(map + 5 * PAGE);
    touch_write(map + 100 * PAGE, 1);
    touch_read(map + 300 * PAGE);
    row_cached("I15", fd);
}

/* A present page of a mapping has bit 63 in /proc/self/pagemap; that bit is shown to every user. */
static void ask_fault_around(void)
{
    static uint64_t entries[FILE_PAGES];
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH), present = 0;
    populate(fd, 0, FILE_SIZE);
    char *map = map_shared(fd, FILE_SIZE);
    touch_read(map + 20 * PAGE);
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pread(pagemap, entries, sizeof(entries), (off_t)((uintptr_t)map / PAGE * 8)) != (ssize_t)sizeof(entries))
        stop("pagemap");
    for (size_t page = 0; page < FILE_PAGES; page++)
        present += (int)(entries[page] >> 63);
    row("I16", "present PTEs=%d of %lu", present, FILE_PAGES);
}

static const struct group groups[] = {
    {"identity", ask_identity},
    {"blocks", ask_blocks},
    {"cached", ask_cached},
    {"fault-around", ask_fault_around},
};
SECTION(identity_section, "I", groups);
