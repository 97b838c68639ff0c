/* Section T: touching memory, and what system calls do with it. A "closed" file is MMAP without INIT_SHARED. */
#include "probe.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/utsname.h>

static char *closed_map(void)
{
    return map_shared(new_gmem(new_vm(), FILE_SIZE, GMEM_MMAP), FILE_SIZE);
}

static char *open_map(void)
{
    char *map = map_shared(new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH), FILE_SIZE);
    touch_write(map, 0x5a);
    return map;
}

static void ask_touch(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_MMAP);
    char *map = map_shared(fd, FILE_SIZE);
    row_touch("T1", touch_read(map + 0x10), map);
    row_touch("T2", touch_write(map + 0x5123, 1), map);
    populate(fd, 0, PAGE);
    row_touch("T3", touch_read(map), map);
}

static void ask_process_vm(void)
{
    char *map = closed_map(), local[8] = "local";
    struct iovec here = {local, 8}, there = {map, 8};
    row_ret("T4", process_vm_readv(getpid(), &here, 1, &there, 1, 0));
    row_ret("T5", process_vm_writev(getpid(), &here, 1, &there, 1, 0));
    int memory = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    row_ret("T6", pread(memory, local, 8, (off_t)(uintptr_t)map));
}

static void ask_files(void)
{
    char *map = closed_map();
    int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC), memfd = new_memfd(PAGE), ends[2];
    if (pipe(ends) < 0 || write(ends[1], "12345678", 8) != 8)
        stop("pipe");
    row_ret("T7", read(zero, map, 8));
    row_ret("T8", read(ends[0], map, 8));
    row_ret("T9", write(ends[1], map, 8));
    row_ret("T10", write(memfd, map, 8));
}

static void ask_calls(void)
{
    char *map = closed_map();
    int ends[2];
    struct iovec vector = {map, PAGE};
    if (pipe(ends) < 0)
        stop("pipe");
    row_ret("T11", syscall(SYS_futex, map, FUTEX_WAIT, 1, NULL, NULL, 0)); /* no wrapper in the library */
    row_ret("T12", uname((struct utsname *)map));
    row_ret("T13", vmsplice(ends[1], &vector, 1, 0));
    row_ret("T14", mlock(map, PAGE));
    row_ret("T15", madvise(map, PAGE, MADV_POPULATE_READ));
    row_ret("T16", madvise(map, PAGE, MADV_POPULATE_WRITE));
}

static void ask_shared_calls(void)
{
    char *map = open_map(), local[8] = "local";
    int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC), memory = open("/proc/self/mem", O_RDWR | O_CLOEXEC), ends[2];
    struct iovec here = {local, 8}, there = {map, 8}, page = {map, PAGE};
    if (pipe(ends) < 0)
        stop("pipe");
    row_ret("T17", read(zero, map, 8));
    row_ret("T18", process_vm_readv(getpid(), &here, 1, &there, 1, 0));
    row_ret("T19", pread(memory, local, 8, (off_t)(uintptr_t)map));
    row_ret("T20", vmsplice(ends[1], &page, 1, 0));
    row_ret("T22", write(new_memfd(PAGE), map, 8));
}

static void ask_punched(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    unsigned char *map = map_shared(fd, FILE_SIZE);
    memset(map, 0x5a, 3 * PAGE);
    punch(fd, PAGE, PAGE);
    row("T21", "page0=0x%x page1=0x%x page2=0x%x", touch_read(map).value, touch_read(map + PAGE).value,
        touch_read(map + 2 * PAGE).value);
}

static void ask_direct(void)
{
    char *map = open_map();
    row_ret("T23", pwrite(new_disk_file(O_DIRECT), map, PAGE, 0));
    row_ret("T24", pread(new_disk_file(O_DIRECT), map, PAGE, 0));
    row_ret("T25", pread(new_disk_file(O_DIRECT), closed_map(), PAGE, 0));
}

static const struct group groups[] = {
    {"touch", ask_touch},   {"process_vm", ask_process_vm},     {"files", ask_files},
    {"calls", ask_calls},   {"shared calls", ask_shared_calls}, {"punched", ask_punched},
    {"direct", ask_direct},
};
SECTION(touch_section, "T", groups);
