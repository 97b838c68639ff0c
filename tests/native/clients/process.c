/* fork, exec, and descriptors that come from elsewhere. */
#include "client.h"

#include <setjmp.h>
#include <spawn.h>

extern char **environ;
static char *self_path;
static sigjmp_buf jump;

static void fault_handler(int signal)
{
    (void)signal;
    siglongjmp(jump, 1);
}

static bool faults(volatile char *address)
{
    signal(SIGBUS, fault_handler);
    if (sigsetjmp(jump, 1))
        return true;
    (void)*address;
    return false;
}

static void wait_well(pid_t child)
{
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

#define IN_CHILD(body)                                                                                                 \
    do {                                                                                                               \
        pid_t child_ = fork();                                                                                         \
        if (!child_) {                                                                                                 \
            body;                                                                                                      \
            _exit(0);                                                                                                  \
        }                                                                                                              \
        wait_well(child_);                                                                                             \
    } while (0)

/* VMs belong to the address space that made them; the device and guest_memfds to everybody. */
static void child_uses(int kvm, int vm, int gmem)
{
    CHECK_ERRNO(ioctl(vm, CREATE_VCPU, 0), EIO);
    CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12 && !fallocate(gmem, FALLOC_FL_KEEP_SIZE, 0, PAGE));
    char *map = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    CHECK(map != MAP_FAILED && ++*map);
    CHECK(gmem_create(ioctl(kvm, CREATE_VM, 0), PAGE) > 0);
}

static void fork_files(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), gmem = gmem_create(vm, PAGE);
    char *map = mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 0);
    IN_CHILD(child_uses(kvm, vm, gmem));
    CHECK(*map == 1 && ioctl(vm, CREATE_VCPU, 0) > 0);
    IN_CHILD(IN_CHILD(child_uses(kvm, vm, gmem)));
    CHECK(*map == 2);
}

/* A child must not read what its parent may not; nor a child's child. */
static void fork_private(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), gmem = gmem_create(vm, 2 * PAGE);
    char *map = mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    memset(map, 7, 2 * PAGE);
    CHECK(!ioctl(kvm, ZAP_PAGE, map));
    IN_CHILD(CHECK(faults(map) && !faults(map + PAGE) && map[PAGE] == 7));
    IN_CHILD(IN_CHILD(CHECK(faults(map) && !faults(map + PAGE))));
    IN_CHILD({
        CHECK(!ioctl(kvm, ZAP_PAGE, map + PAGE) && faults(map + PAGE));
        IN_CHILD(CHECK(faults(map) && faults(map + PAGE)));
    });
    CHECK(faults(map) && !faults(map + PAGE));
}

/* A child made past libc notices it at its next call. */
static void bare_clone(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0);
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (!child) {
        CHECK_ERRNO(ioctl(vm, CREATE_VCPU, 0), EIO);
        CHECK(ioctl(kvm, GET_API_VERSION, 0) == 12);
        _exit(0);
    }
    wait_well(child);
    CHECK(ioctl(vm, CREATE_VCPU, 0) > 0);
}

static void vfork_child(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), released = ioctl(kvm, RELEASED, 0);
    for (int i = 0; i < 20; i++) {
        pid_t child = vfork();
        if (!child) {
            close(vm);
            close(kvm);
            execl("/bin/true", "true", NULL);
            _exit(1);
        }
        wait_well(child);
        CHECK(ioctl(kvm, RELEASED, 0) == released && ioctl(vm, CREATE_VCPU, 0) > 0);
        CHECK_ERRNO(read(vm, &released, 0), EINVAL);
        pid_t spawned;
        char *arguments[] = {"true", NULL};
        CHECK(!posix_spawn(&spawned, "/bin/true", NULL, NULL, arguments, environ));
        wait_well(spawned);
        CHECK(system("exit 0") == 0);
    }
}

static void exec_child(const char *what, int fd)
{
    char number[16];
    snprintf(number, sizeof(number), "%d", fd);
    setenv("INHERITED", number, 1);
    IN_CHILD(execl(self_path, self_path, what, NULL));
}

static int inherited(void)
{
    return atoi(getenv("INHERITED"));
}

/* In the new program: nothing was called yet, and the number says nothing. */
static void after_exec_gmem(void)
{
    int gmem = inherited();
    struct stat status;
    CHECK_ERRNO(read(gmem, &status, 1), EINVAL);
    CHECK(!fstat(gmem, &status) && status.st_nlink == 1 && status.st_blocks == 0);
    CHECK(!fallocate(gmem, FALLOC_FL_KEEP_SIZE, 0, PAGE));
    char *map = mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 0);
    CHECK(map != MAP_FAILED && *map == 9);
}

static void after_exec_vm(void)
{
    CHECK_ERRNO(ioctl(inherited(), CREATE_VCPU, 0), EIO);
}

static void exec(void)
{
    int vm = vm_create(), gmem = gmem_create(vm, PAGE);
    char *map = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    *map = 9;
    CHECK(!fcntl(vm, F_SETFD, 0));
    exec_child("after_exec_gmem", gmem);
    exec_child("after_exec_vm", vm);
}

static void send_fd(int socket, int fd)
{
    char control[CMSG_SPACE(sizeof(fd))] = {0}, byte = 0;
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(fd));
    memcpy(CMSG_DATA(header), &fd, sizeof(fd));
    CHECK(sendmsg(socket, &message, 0) == 1);
}

static int receive_fd(int socket)
{
    char control[CMSG_SPACE(sizeof(int))], byte;
    struct iovec part = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    int fd;
    CHECK(recvmsg(socket, &message, 0) == 1);
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

static void passed(void)
{
    int pair[2];
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    pid_t child = fork();
    if (!child) {
        int vm = receive_fd(pair[1]), gmem = receive_fd(pair[1]);
        CHECK_ERRNO(ioctl(vm, CREATE_VCPU, 0), EIO);
        CHECK_ERRNO(ftruncate(gmem, 0), EINVAL);
        CHECK(*(char *)mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 0) == 3);
        _exit(0);
    }
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), gmem = gmem_create(vm, PAGE);
    *(char *)mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0) = 3;
    send_fd(pair[0], vm);
    send_fd(pair[0], gmem);
    close(vm);
    close(gmem);
    wait_well(child);
}

static void taken(void)
{
    int gmem = gmem_create(vm_create(), PAGE), pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    int copy = (int)syscall(438 /* SYS_pidfd_getfd */, pidfd, gmem, 0);
    CHECK(copy >= 0);
    CHECK_ERRNO(read(copy, &copy, 0), EINVAL);
}

static void *allocate(void *stop)
{
    while (!*(volatile int *)stop)
        free(malloc(1000));
    return NULL;
}

/* Many forks of a process with mappings and busy threads. */
static void many(void)
{
    int stop = 0, kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), gmem = gmem_create(vm, PAGE);
    char *map = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    pthread_t threads[2];
    *map = 1;
    for (int i = 0; i < 2; i++)
        CHECK(!pthread_create(&threads[i], NULL, allocate, &stop));
    CHECK(!ioctl(kvm, ZAP_PAGE, map));
    for (int i = 0; i < 100; i++)
        IN_CHILD(CHECK(faults(map)));
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
}

static void *run_vcpu(void *vcpu)
{
    CHECK_ERRNO(ioctl(*(int *)vcpu, RUN, 0), EIO);
    return NULL;
}

/* The server goes: calls fail, nothing hangs, the client's own memory and descriptors stay. */
static void server_gone(void)
{
    int kvm = kvm_open(), vm = ioctl(kvm, CREATE_VM, 0), vcpu = ioctl(vm, CREATE_VCPU, 0), gmem = gmem_create(vm, PAGE);
    char *map = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    pthread_t thread;
    *map = 4;
    CHECK(!pthread_create(&thread, NULL, run_vcpu, &vcpu));
    usleep(20000);
    CHECK_ERRNO(ioctl(kvm, END, 0), EIO);
    pthread_join(thread, NULL);
    CHECK_ERRNO(ioctl(kvm, GET_API_VERSION, 0), EIO);
    CHECK_ERRNO(ioctl(vcpu, RUN, 0), EIO);
    CHECK_ERRNO(fallocate(gmem, FALLOC_FL_KEEP_SIZE, 0, PAGE), EIO);
    CHECK_ERRNO(open("/dev/kvm", O_RDWR), ENODEV);
    CHECK(mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 0) == MAP_FAILED && *map == 4);
    IN_CHILD(CHECK(ioctl(kvm, GET_API_VERSION, 0) == -1));
    CHECK(!munmap(map, PAGE) && !close(gmem) && !close(vcpu) && !close(vm) && !close(kvm));
}

/* Without a server named in the environment there is no shim. */
static void inert(void)
{
    int null = open("/dev/null", O_RDWR), none = dup(null);
    CHECK(null >= 0 && !close(none) && !close_range(null + 1, ~0U, 0));
    CHECK(write(null, "x", 1) == 1);
    CHECK_ERRNO(ioctl(null, GET_API_VERSION, 0), ENOTTY);
    CHECK_ERRNO(ioctl(-1, GET_API_VERSION, 0), EBADF);
    void *map = mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED && !mprotect(map, PAGE, PROT_NONE) && !munmap(map, PAGE));
    int kvm = open("/dev/kvm", O_RDWR);
    struct stat status;
    CHECK(kvm < 0 || (!fstat(kvm, &status) && S_ISCHR(status.st_mode)));
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"fork_files", fork_files},
        {"fork_private", fork_private},
        {"bare_clone", bare_clone},
        {"vfork_child", vfork_child},
        {"exec", exec},
        {"after_exec_gmem", after_exec_gmem},
        {"after_exec_vm", after_exec_vm},
        {"passed", passed},
        {"taken", taken},
        {"many", many},
        {"server_gone", server_gone},
        {"inert", inert},
        {NULL, NULL},
    };
    self_path = argv[0];
    return run_test(tests, argc, argv);
}
