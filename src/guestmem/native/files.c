/* Which descriptors are ours. The file decides, not the number: by its st_ino, which the server knows, and for linked
 * guest_memfds, which are several files of one inode, by its position, where the server has put the view's number. */
#define _GNU_SOURCE
#include "shim.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- numbers that may be ours. Once set a bit stays: a vfork()ed child shares it with its parent, not the descriptor. */

enum { MARKABLE = 1 << 20 };

static uint64_t marks[MARKABLE / 64];

void file_mark(int fd)
{
    if (fd >= 0 && fd < MARKABLE)
        __atomic_or_fetch(&marks[fd / 64], 1ULL << fd % 64, __ATOMIC_RELAXED);
}

bool file_marked(int fd)
{
    if (fd < 0 || !process.active)
        return false;
    return fd >= MARKABLE || (__atomic_load_n(&marks[fd / 64], __ATOMIC_RELAXED) >> fd % 64 & 1);
}

int file_next_marked(int from)
{
    for (int fd = from < 0 ? 0 : from; fd < MARKABLE; fd++) {
        uint64_t word = __atomic_load_n(&marks[fd / 64], __ATOMIC_RELAXED) >> fd % 64;
        if (word)
            return fd + __builtin_ctzll(word);
        fd |= 63;
    }
    return -1;
}

/* ---- what the server said of a file. Read in signal handlers, so nobody waits here: a reader that meets a writer asks
 * the server again, a writer that meets another does not write. */

struct cached {
    uint32_t sequence; /* odd while written */
    uint32_t kind;
    uint64_t device, inode, maker;
};

enum { CACHED = 4096 };

static struct cached cache[CACHED];

static struct cached *cache_place(uint64_t inode)
{
    return &cache[inode * 0x9e3779b97f4a7c15u >> 52];
}

static bool cache_find(const struct stat *status, struct file *file)
{
    struct cached *place = cache_place(status->st_ino);
    uint32_t before = __atomic_load_n(&place->sequence, __ATOMIC_ACQUIRE);
    struct cached copy = *place;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (before & 1 || before != __atomic_load_n(&place->sequence, __ATOMIC_RELAXED))
        return false;
    if (!before || copy.inode != status->st_ino || copy.device != status->st_dev)
        return false;
    *file = (struct file){copy.inode, copy.kind, copy.maker};
    return true;
}

static void cache_store(const struct stat *status, const struct file *file)
{
    struct cached *place = cache_place(status->st_ino);
    uint32_t even = __atomic_load_n(&place->sequence, __ATOMIC_RELAXED) & ~1u;
    if (!__atomic_compare_exchange_n(&place->sequence, &even, even + 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    __atomic_thread_fence(__ATOMIC_RELEASE);
    place->kind = file->kind;
    place->device = status->st_dev;
    place->inode = status->st_ino;
    place->maker = file->maker;
    __atomic_store_n(&place->sequence, even + 2, __ATOMIC_RELEASE);
}

/* ---- asking */

static bool could_be_ours(const struct stat *status)
{
    if (S_ISSOCK(status->st_mode))
        return true;
    uint64_t device = __atomic_load_n(&process.memfd_device, __ATOMIC_ACQUIRE);
    return S_ISREG(status->st_mode) && (!device || status->st_dev == device);
}

static enum kind identify(const struct stat *status, struct file *file)
{
    struct call call = {.request = {.op = OP_IDENTIFY, .file = status->st_ino, .a = status->st_dev}};
    *file = (struct file){status->st_ino, KIND_NONE, 0};
    if (call_server(&call))
        return KIND_NONE;
    file->kind = (enum kind)call.answer.value;
    file->maker = call.answer.a;
    cache_store(status, file);
    return file->kind;
}

enum kind file_of_stat(const struct stat *status, struct file *file, bool ask)
{
    if (!could_be_ours(status))
        return KIND_NONE;
    if (cache_find(status, file))
        return file->kind;
    return ask ? identify(status, file) : KIND_NONE;
}

enum { VIEW_SHIFT = 48, MAX_VIEW = 1 << 15 };

/* The number of a file. A memfd that is none of ours may have any position. */
uint64_t file_number(int fd, const struct stat *status)
{
    if (!S_ISREG(status->st_mode) || !could_be_ours(status))
        return status->st_ino;
    long view = sys(SYS_lseek, fd, 0, SEEK_CUR);
    return status->st_ino | (uint64_t)(view > 0 && view < MAX_VIEW ? view : 0) << VIEW_SHIFT;
}

enum kind file_of(int fd, struct file *file)
{
    struct stat status;
    if (fd < 0 || !shim_active() || is_error(sys(SYS_fstat, fd, &status)))
        return KIND_NONE;
    status.st_ino = file_number(fd, &status);
    enum kind kind = file_of_stat(&status, file, true);
    if (kind != KIND_NONE)
        file_mark(fd);
    return kind;
}

enum kind file_of_marked(int fd, struct file *file)
{
    return file_marked(fd) ? file_of(fd, file) : KIND_NONE;
}

/* The server has just given us this descriptor. */
void file_made(int fd, enum kind kind)
{
    struct stat status;
    file_mark(fd);
    if (kind == KIND_NONE || is_error(sys(SYS_fstat, fd, &status)))
        return;
    status.st_ino = file_number(fd, &status);
    struct file file = {status.st_ino, kind, process.client};
    cache_store(&status, &file);
}

/* What came over execve(): sockets and files without a name may be ours. */
void files_mark_inherited(void)
{
    char buffer[1024];
    long directory = sys(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0), got;
    if (is_error(directory))
        return;
    while ((got = sys(SYS_getdents64, directory, buffer, sizeof(buffer))) > 0) {
        for (long at = 0; at < got;) {
            const struct dirent64 *entry = (const struct dirent64 *)(buffer + at);
            struct stat status;
            int fd = atoi(entry->d_name);
            at += entry->d_reclen;
            if (entry->d_name[0] == '.' || fd == directory || is_error(sys(SYS_fstat, fd, &status)))
                continue;
            if (S_ISSOCK(status.st_mode) || (S_ISREG(status.st_mode) && !status.st_nlink))
                file_mark(fd);
        }
    }
    sys(SYS_close, directory);
}

/* One of our files was closed, perhaps for the last time: its release is over when close() returns. */
void files_sync(void)
{
    call_words(OP_SYNC, 0, 0, 0, 0, 0);
}
