/* Section F: fallocate on a file of 2 MiB, in the table's order. */
#include "probe.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>

/* The modes by number: glibc 2.36 does not know WRITE_ZEROES (6.17), and no header offers NO_HIDE_STALE. */
#define KEEP 0x01
#define PUNCH 0x02
#define NO_HIDE_STALE 0x04
#define COLLAPSE 0x08
#define ZERO 0x10
#define INSERT 0x20
#define UNSHARE 0x40
#define WRITE_ZEROES 0x80
#define UNKNOWN 0x1000
#define HOLE (PUNCH | KEEP)

static const struct {
    const char *id;
    int mode;
    uint64_t offset, size;
} calls[] = {
    {"F1", 0, 0, PAGE},
    {"F2", KEEP, 0, PAGE},
    {"F3", KEEP, 0, FILE_SIZE},
    {"F4", PUNCH, 0, PAGE},
    {"F5", HOLE, 0, PAGE},
    {"F6", HOLE, 0, FILE_SIZE},
    {"F7", COLLAPSE, 0, PAGE},
    {"F8", COLLAPSE | KEEP, 0, PAGE},
    {"F9", ZERO, 0, PAGE},
    {"F10", ZERO | KEEP, 0, PAGE},
    {"F11", INSERT, 0, PAGE},
    {"F12", INSERT | KEEP, 0, PAGE},
    {"F13", UNSHARE, 0, PAGE},
    {"F14", UNSHARE | KEEP, 0, PAGE},
    {"F15", NO_HIDE_STALE, 0, PAGE},
    {"F16", WRITE_ZEROES, 0, PAGE},
    {"F17", WRITE_ZEROES | KEEP, 0, PAGE},
    {"F18", PUNCH | ZERO | KEEP, 0, PAGE},
    {"F19", UNKNOWN | KEEP, 0, PAGE},
    {"F20", KEEP, 1, PAGE},
    {"F21", KEEP, 0, 1},
    {"F22", KEEP, 0, 4095},
    {"F23", HOLE, 1, PAGE},
    {"F24", HOLE, 0, 1},
    {"F25", HOLE, 2048, PAGE},
    {"F26", 0, 1, 100},
    {"F27", COLLAPSE, 1, 100},
    {"F28", KEEP, 0, 0},
    {"F29", KEEP, 0, -1ul},
    {"F30", KEEP, 0, -PAGE},
    {"F31", KEEP, -PAGE, PAGE},
    {"F32", HOLE, 0, 0},
    {"F33", HOLE, -PAGE, PAGE},
    {"F34", HOLE, 0, -PAGE},
    {"F35", 0, 0, 0},
    {"F36", UNKNOWN, 0, 0},
    {"F37", UNKNOWN, 0, PAGE},
    {"F38", KEEP, FILE_SIZE, PAGE},
    {"F39", KEEP, FILE_SIZE - PAGE, 2 * PAGE},
    {"F40", KEEP, 2 * FILE_SIZE, PAGE},
    {"F41", HOLE, FILE_SIZE, PAGE},
    {"F42", HOLE, FILE_SIZE - PAGE, 2 * PAGE},
    {"F43", HOLE, 2 * FILE_SIZE, PAGE},
    {"F44", HOLE, 0, MAX_SIZE},
    {"F45", HOLE, PAGE, MAX_SIZE},
    {"F46", KEEP, PAGE, MAX_SIZE},
    {"F47", KEEP, 0, MAX_SIZE},
    {"F48", HOLE, MAX_SIZE, PAGE},
};

/* A guest_memfd does not look at RLIMIT_FSIZE. A memfd that stands in for one does: if a row of 2^63 bytes reaches it,
 * the answer is EFBIG, and not a machine without memory (tmpfs allocates until nothing is left). */
static void limit_growth(void)
{
    struct rlimit limit = {16 * MIB, 16 * MIB};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
}

static void ask_modes(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    limit_growth();
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++)
        row_ret(calls[i].id, fallocate(fd, calls[i].mode, (off_t)calls[i].offset, (off_t)calls[i].size));
}

static void ask_private_file(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, 0);
    row_ret("F49", populate(fd, 0, PAGE));
    row_ret("F50", punch(fd, 0, PAGE));
}

static void ask_repeated(void)
{
    int vm = new_vm(), fd = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    populate(fd, 0, 4 * PAGE);
    row_ret("F51", populate(fd, 0, 4 * PAGE));
    /* posix_fallocate returns the errno instead of setting it. */
    int refused = posix_fallocate(new_gmem(vm, FILE_SIZE, GMEM_BOTH), 0, PAGE);
    row("F52", "%s", refused ? errno_name(refused) : "0");
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 7);
    populate(fd, 0, PAGE);
    row("F53", "byte=%u", touch_read(map).value);
    row_ret("F54", populate(new_gmem(vm, TIB, GMEM_BOTH), TIB - PAGE, PAGE));
}

static const struct group groups[] = {
    {"modes", ask_modes}, {"private file", ask_private_file}, {"repeated", ask_repeated}};
SECTION(fallocate_section, "F", groups);
