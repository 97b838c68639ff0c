/* Names under /proc: of a descriptor, and of the mappings. */
#define _GNU_SOURCE
#include "names.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>

#include "shim.h"

/* ---- descriptors */

static bool skip(const char **at, const char *prefix)
{
    size_t length = strlen(prefix);
    if (strncmp(*at, prefix, length))
        return false;
    *at += length;
    return true;
}

static bool skip_number(const char **at, int *number)
{
    const char *start = *at;
    *number = 0;
    while (**at >= '0' && **at <= '9' && *at - start < 9)
        *number = *number * 10 + *(*at)++ - '0';
    return *at > start;
}

/* "/proc/self/", "/proc/thread-self/" or "/proc/<our pid>/" */
static bool skip_proc_self(const char **at)
{
    int pid;
    if (!skip(at, "/proc/"))
        return false;
    if (skip(at, "self/") || skip(at, "thread-self/"))
        return true;
    return skip_number(at, &pid) && pid == sys(SYS_getpid) && skip(at, "/");
}

int name_of_descriptor(const char *path)
{
    int fd;
    bool named = skip(&path, "/dev/fd/") || (skip_proc_self(&path) && skip(&path, "fd/"));
    return named && skip_number(&path, &fd) && !*path ? fd : -1;
}

/* ---- mappings */

bool name_is_maps(const char *path)
{
    return skip_proc_self(&path) && (!strcmp(path, "maps") || !strcmp(path, "smaps"));
}

enum { LINE = 4096 + 256, NAME_COLUMN = 73 };

struct copying {
    long from, to, length, at;
    bool in_gmem; /* the lines of smaps belong to the mapping named before them */
    char buffer[4096], line[LINE];
};

static bool next_line(struct copying *copying, size_t *length)
{
    *length = 0;
    while (*length < LINE - 1) {
        if (copying->at == copying->length) {
            copying->length = sys(SYS_read, copying->from, copying->buffer, sizeof(copying->buffer));
            copying->at = 0;
            if (copying->length <= 0)
                return copying->length = 0, *length > 0;
        }
        char byte = copying->buffer[copying->at++];
        copying->line[(*length)++] = byte;
        if (byte == '\n')
            break;
    }
    copying->line[*length] = '\0';
    return true;
}

static uint64_t number_at(const char **at, unsigned base)
{
    uint64_t value = 0;
    for (;; (*at)++) {
        unsigned digit = **at <= '9' ? (unsigned)(**at - '0') : (unsigned)(**at - 'a' + 10);
        if (digit >= base)
            return value;
        value = value * base + digit;
    }
}

/* start-end perms offset major:minor inode name. False: no such line. */
static bool parse_mapping(const char *at, struct stat *status)
{
    number_at(&at, 16);
    if (*at++ != '-')
        return false;
    number_at(&at, 16);
    if (*at++ != ' ' || !(at = strchr(at, ' ')))
        return false;
    at++;
    number_at(&at, 16);
    at++;
    unsigned major = (unsigned)number_at(&at, 16);
    at++;
    unsigned minor = (unsigned)number_at(&at, 16);
    at++;
    *status = (struct stat){.st_dev = makedev(major, minor), .st_ino = number_at(&at, 10), .st_mode = S_IFREG};
    return true;
}

/* Flags that only our way of guarding pages brings. */
static void drop_flags(char *line)
{
    static const char *const ours[] = {" um", " uw", " me"};
    for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); i++) {
        char *flag = strstr(line, ours[i]);
        if (flag)
            memmove(flag, flag + 3, strlen(flag + 3) + 1);
    }
}

static size_t rewrite(struct copying *copying, size_t length)
{
    struct stat status;
    struct file file;
    char *line = copying->line;
    if (parse_mapping(line, &status)) {
        copying->in_gmem = file_of_stat(&status, &file, false) == KIND_GMEM;
        if (copying->in_gmem && length > NAME_COLUMN)
            strcpy(line + NAME_COLUMN, "anon_inode:[kvm-gmem]\n");
    } else if (copying->in_gmem && !strncmp(line, "VmFlags:", 8)) {
        drop_flags(line);
    }
    return strlen(line);
}

int maps_open(const char *path)
{
    struct copying copying;
    size_t length;
    copying.from = sys(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    copying.to = sys(SYS_memfd_create, "maps", MFD_CLOEXEC);
    copying.length = copying.at = 0;
    copying.in_gmem = false;
    if (!is_error(copying.from) && !is_error(copying.to))
        while (next_line(&copying, &length))
            sys(SYS_write, copying.to, copying.line, rewrite(&copying, length));
    if (!is_error(copying.from))
        sys(SYS_close, copying.from);
    if (is_error(copying.to))
        return -1;
    sys(SYS_lseek, copying.to, 0, SEEK_SET);
    return (int)copying.to;
}
