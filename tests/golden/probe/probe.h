/* The harness of the golden probe: a row is one question to the kernel, printed as "id<TAB>answer".
 *
 * The probe is run natively and under an LD_PRELOAD shim, so it calls the C library's wrappers; syscall() stands only
 * where glibc 2.36 has no wrapper (cachestat, mseal, futex, userfaultfd, mbind, get_mempolicy, move_pages). */
#ifndef GOLDEN_PROBE_H
#define GOLDEN_PROBE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "uapi.h"

#define PAGE 4096ul
#define MIB (1ul << 20)
#define TIB (1ul << 40)
#define FILE_SIZE (2 * MIB)
#define FILE_PAGES (FILE_SIZE / PAGE)
/* The largest page-aligned size that a file may have. */
#define MAX_SIZE 0x7ffffffffffff000ul

/* A group is what one forked child asks; a crash or a hang loses the rest of its group and nothing else. */
struct group {
    const char *name;
    void (*ask)(void);
};

struct section {
    const char *name;
    const struct group *groups;
    size_t count;
};

#define SECTION(variable, letter, groups)                                                                              \
    const struct section variable = {letter, groups, sizeof(groups) / sizeof((groups)[0])}

extern const struct section caps_section, create_section, identity_section, fileops_section, wrongfd_section,
    mmap_section, touch_section, fallocate_section, share_section, vma_section, numa_section, region_section,
    guest_section;

/* Answers. `row_ret` prints the number or the errno's name, `row_fd` "fd", `row_map` "ok", instead of the number. */
void row(const char *id, const char *format, ...) __attribute__((format(printf, 2, 3)));
void row_ret(const char *id, long result);
void row_fd(const char *id, int fd);
void row_map(const char *id, const void *address);
/* A fixed set of spare buffers: at most four answers can be held at the same time. */
const char *answer(long result);
const char *answer_fd(int fd);
const char *errno_name(int number);

/* What touching one byte did: a value, or a signal with its code and address. */
struct touch {
    int signal, code;
    const char *address;
    unsigned value;
};

struct touch touch_read(const void *address);
struct touch touch_write(void *address, unsigned char value);
const char *touch_text(struct touch touch, const void *map);
void row_touch(const char *id, struct touch touch, const void *map);

/* Things that the rows ask about. Each of these ends the group with a message if it fails. */
int open_kvm(void);
int new_vm(void);
int new_gmem(int vm, uint64_t size, uint64_t flags);
void *map_shared(int fd, size_t size);
int new_memfd(size_t size);
/* An open, already unlinked file of one page where $TMPDIR is, for O_DIRECT and for links. */
int new_disk_file(int flags);
const char *scratch_directory(void);
void stop(const char *what) __attribute__((noreturn));

int create_gmem(int vm, uint64_t size, uint64_t flags);
int set_region(int vm, const struct region2 *region);
int punch(int fd, uint64_t offset, uint64_t size);
int populate(int fd, uint64_t offset, uint64_t size);
/* Pages of the file that are in memory, by cachestat(2); -1 with errno. */
long cached_pages(int fd);
/* The child's rows are part of the parent's group; waits for it. */
void in_child(void (*ask)(void *), void *argument);

/* Set by main: how to start this program again, for the row about execve. */
extern const char *own_path;
int after_exec(const char *fd);

#endif
