/* Section O: file operations, nearly all of which a guest_memfd refuses. */
#include "probe.h"

#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/xattr.h>

static int new_file(void)
{
    return new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
}

static void ask_bytes(void)
{
    int fd = new_file();
    char bytes[64] = "golden";
    struct iovec vector = {bytes, sizeof(bytes)};
    row_ret("O1", read(fd, bytes, 64));
    row_ret("O2", read(fd, bytes, 0));
    row_ret("O3", write(fd, bytes, 64));
    row_ret("O4", write(fd, bytes, 0));
    row_ret("O5", pread(fd, bytes, 64, 0));
    row_ret("O6", pwrite(fd, bytes, 64, 0));
    row_ret("O7", readv(fd, &vector, 1));
    row_ret("O8", writev(fd, &vector, 1));
    row_ret("O9", preadv(fd, &vector, 1, 0));
    row_ret("O10", preadv2(fd, &vector, 1, -1, 0));
    row_ret("O11", pread(fd, bytes, 64, -1));
    vector.iov_len = 64;
    row_ret("O68", preadv2(fd, &vector, 1, -1, 0));
}

static void ask_seek(void)
{
    int fd = new_file();
    row_ret("O12", lseek(fd, 0, SEEK_SET));
    row_ret("O13", lseek(fd, 0, SEEK_END));
    row_ret("O14", lseek(fd, 0, SEEK_CUR));
    row_ret("O15", lseek(fd, 0, SEEK_DATA));
    row_ret("O16", lseek(fd, 0, SEEK_HOLE));
    row_ret("O17", lseek(fd, 0, 99));
}

static void ask_splice(void)
{
    int fd = new_file(), ends[2];
    off64_t at = 0;
    if (pipe(ends) < 0 || write(ends[1], "golden", 6) != 6)
        stop("pipe");
    row_ret("O18", splice(fd, NULL, ends[1], NULL, 64, 0));
    row_ret("O19", splice(fd, &at, ends[1], NULL, 64, 0));
    row_ret("O20", splice(ends[0], NULL, fd, NULL, 6, 0));
    row_ret("O21", splice(ends[0], NULL, fd, &at, 6, 0));
}

static void ask_copy(void)
{
    int fd = new_file(), memfd = new_memfd(PAGE), sockets[2];
    off_t at = 0;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) < 0)
        stop("socketpair");
    row_ret("O22", sendfile(memfd, fd, NULL, 64));
    row_ret("O23", sendfile(memfd, fd, &at, 64));
    row_ret("O24", sendfile(fd, memfd, NULL, 64));
    row_ret("O25", sendfile(sockets[0], fd, NULL, 64));
    row_ret("O26", copy_file_range(fd, NULL, memfd, NULL, 64, 0));
    row_ret("O27", copy_file_range(memfd, NULL, fd, NULL, 64, 0));
}

static void ask_size_and_sync(void)
{
    int fd = new_file();
    row_ret("O28", ftruncate(fd, FILE_SIZE));
    row_ret("O29", ftruncate(fd, 2 * FILE_SIZE));
    row_ret("O30", ftruncate(fd, PAGE));
    row_ret("O31", ftruncate(fd, 0));
    row_ret("O32", ftruncate(fd, -1));
    row_ret("O33", fsync(fd));
    row_ret("O34", fdatasync(fd));
    row_ret("O35", sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE));
    row_ret("O36", posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
    row_ret("O37", posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED));
    row_ret("O38", readahead(fd, 0, 4096));
}

static void ask_attributes(void)
{
    int fd = new_file();
    char value[64] = "x";
    row_ret("O39", fchmod(fd, 0600));
    row_ret("O40", fchown(fd, 0, 0));
    row_ret("O41", futimens(fd, NULL));
    row_ret("O42", fsetxattr(fd, "user.a", value, 1, 0));
    row_ret("O43", fgetxattr(fd, "user.a", value, sizeof(value)));
    row_ret("O44", fgetxattr(fd, "security.selinux", value, sizeof(value)));
    row_ret("O45", flistxattr(fd, value, sizeof(value)));
}

static void ask_fcntl(void)
{
    int fd = new_file();
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    row_ret("O46", fcntl(fd, F_SETLK, &whole));
    row_ret("O47", fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
    row_ret("O48", fcntl(fd, F_GET_SEALS));
    row_ret("O49", fcntl(fd, F_SETFL, O_NONBLOCK));
    row_ret("O50", fcntl(fd, F_SETFL, O_DIRECT));
    row_ret("O51", fcntl(fd, F_SETFL, O_APPEND));
    row_ret("O52", fcntl(fd, F_SETLEASE, F_WRLCK));
    int lock = flock(fd, LOCK_EX);
    row("O67", "%s, %s", answer(lock), answer(flock(fd, LOCK_UN)));
}

static void ask_poll(void)
{
    int fd = new_file(), epoll = epoll_create1(EPOLL_CLOEXEC);
    struct pollfd polled = {.fd = fd, .events = POLLIN | POLLOUT};
    struct epoll_event event = {.events = EPOLLIN};
    int result = poll(&polled, 1, 0);
    row("O53", "%s revents=0x%x", answer(result), (unsigned)polled.revents);
    row_ret("O54", epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}

/* No header of the library or of linux-libc-dev 6.1 has this request and its struct. */
struct reserve {
    int16_t type, whence;
    int64_t start, length;
    int32_t system, process, padding[4];
};

#define RESERVE_SPACE _IOW('X', 40, struct reserve)

static void ask_ioctl(void)
{
    int fd = new_file(), value = 0;
    long flags = 0;
    struct fiemap map = {.fm_length = FILE_SIZE};
    struct reserve reserve = {.length = PAGE};
    row_ret("O55", ioctl(fd, FIONREAD, &value));
    row_ret("O56", ioctl(fd, FIBMAP, &value));
    row_ret("O57", ioctl(fd, FS_IOC_GETFLAGS, &flags));
    row_ret("O58", ioctl(fd, FS_IOC_FIEMAP, &map));
    row_ret("O59", ioctl(fd, RESERVE_SPACE, &reserve));
    int result = ioctl(fd, FIGETBSZ, &value);
    row("O65", "%s value %d", answer(result), value);
    result = ioctl(fd, FIOCLEX);
    row("O66", "%s, F_GETFD then %d", answer(result), fcntl(fd, F_GETFD));
}

/* name_to_handle_at's struct ends in a flexible array. */
union handle {
    struct file_handle header;
    char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
};

static void ask_paths(void)
{
    int fd = new_file(), mount = 0;
    char target[256], *none[] = {(char *)"golden", NULL}, *empty[] = {NULL};
    union handle handle = {.header.handle_bytes = MAX_HANDLE_SZ};
    snprintf(target, sizeof(target), "%s/golden-link-%d", scratch_directory(), (int)getpid());
    int linked = linkat(fd, "", AT_FDCWD, target, AT_EMPTY_PATH);
    row_ret("O60", linked);
    if (linked == 0)
        unlink(target);
    row_ret("O61", execveat(fd, "", none, empty, AT_EMPTY_PATH));
    row_ret("O62", name_to_handle_at(fd, "", &handle.header, &mount, AT_EMPTY_PATH));
    row_ret("O63", fchdir(fd));
    row_fd("O64", openat(fd, "x", O_RDONLY | O_CLOEXEC));
}

static const struct group groups[] = {
    {"bytes", ask_bytes}, {"seek", ask_seek},          {"splice", ask_splice},
    {"copy", ask_copy},   {"size", ask_size_and_sync}, {"attributes", ask_attributes},
    {"fcntl", ask_fcntl}, {"poll", ask_poll},          {"ioctl", ask_ioctl},
    {"paths", ask_paths},
};
SECTION(fileops_section, "O", groups);
