/* Section S: dup, fork, passing the descriptor, lifetime. */
#include "probe.h"

#include <fcntl.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

static void ask_dup(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH), copy = dup(fd);
    char *map = map_shared(fd, FILE_SIZE), *again = map_shared(copy, FILE_SIZE);
    touch_write(map, 11);
    row("S1", "value %u", touch_read(again).value);
    struct stat first = {0}, second = {0};
    fstat(fd, &first);
    fstat(copy, &second);
    row("S2", "%s", first.st_ino && first.st_ino == second.st_ino ? "yes" : "no");
}

struct inherited {
    int vm, fd;
    char *map;
};

static void ask_in_child(void *argument)
{
    const struct inherited *had = argument;
    row("S3", "value %u", touch_read(had->map).value);
    row_fd("S4", create_gmem(had->vm, PAGE, 0));
    row_ret("S5", populate(had->fd, 0, PAGE));
    struct region2 bind = {.slot = 1, .flags = SLOT_GMEM, .size = MIB, .fd = (uint32_t)had->fd};
    row_ret("S6", set_region(had->vm, &bind));
    row_fd("S7", ioctl(had->vm, KVM_CREATE_VCPU, 0ul));
    void *map = mmap(NULL, FILE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, had->fd, 0);
    row_map("S8", map);
    if (map != MAP_FAILED)
        touch_write(map, 12);
}

static void ask_fork(void)
{
    struct inherited have = {.vm = new_vm()};
    have.fd = new_gmem(have.vm, FILE_SIZE, GMEM_BOTH);
    have.map = map_shared(have.fd, FILE_SIZE);
    touch_write(have.map, 11);
    in_child(ask_in_child, &have);
    row("S9", "value %u", touch_read(have.map).value);
}

static ssize_t send_fd(int socket, int fd)
{
    char byte = 'x', control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec vector = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(header), &fd, sizeof(fd));
    return sendmsg(socket, &message, 0);
}

static int receive_fd(int socket)
{
    int fd = -1;
    char byte, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec vector = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    if (recvmsg(socket, &message, MSG_DONTWAIT) == 1 && CMSG_FIRSTHDR(&message))
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

static void ask_passing(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH), sockets[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) < 0)
        stop("socketpair");
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 33);
    munmap(map, FILE_SIZE);
    row_ret("S10", send_fd(sockets[0], fd));
    close(fd);
    int received = receive_fd(sockets[1]);
    row("S11", "value %u", touch_read(map_shared(received, FILE_SIZE)).value);
    row_fd("S12", pidfd_getfd(pidfd_open(getpid(), 0), received, 0));
}

static void ask_last_close(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    close(fd);
    row_touch("S13", touch_write(map, 77), map);
}

int after_exec(const char *fd)
{
    struct stat status;
    bool inherited = fcntl(atoi(fd), F_GETFD) == 0 && fstat(atoi(fd), &status) == 0 && status.st_size == FILE_SIZE;
    row("S14", "%s", inherited ? "yes (inherited)" : "no");
    return 0;
}

static void exec_self(void *argument)
{
    char number[16];
    snprintf(number, sizeof(number), "%d", *(int *)argument);
    execl(own_path, own_path, "--after-exec", number, (char *)NULL);
    stop(own_path);
}

static void ask_exec(void)
{
    int fd = new_gmem(new_vm(), FILE_SIZE, GMEM_BOTH);
    in_child(exec_self, &fd);
}

static void ask_vm_closed(void)
{
    int vm = new_vm(), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0ul), fd = new_gmem(vm, FILE_SIZE, GMEM_BOTH);
    char *map = map_shared(fd, FILE_SIZE);
    touch_write(map, 68);
    close(vcpu);
    close(vm);
    row_touch("S15", touch_read(map), map);
    close(fd);
    row_touch("S16", touch_read(map), map);
}

static const struct group groups[] = {
    {"dup", ask_dup},   {"fork", ask_fork},           {"passing", ask_passing}, {"last close", ask_last_close},
    {"exec", ask_exec}, {"vm closed", ask_vm_closed},
};
SECTION(share_section, "S", groups);
