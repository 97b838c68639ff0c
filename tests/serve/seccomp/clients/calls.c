/*
 * What is special for a client whose system calls are traced: signals and KVM_RUN, descriptors by every way they are
 * duplicated and passed on, processes. Ends with 0.
 */
#define _GNU_SOURCE
#include "client.h"

#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { LOAD = 0x1000 };

static int kvm, vm, vcpu;
static struct kvm_run *run;
static uint8_t *memory;
static volatile sig_atomic_t handled;

static void on_signal(int number) {
    (void)number;
    handled = handled + 1;
}

static void *kick(void *target) {
    usleep(30000);
    pthread_kill(*(pthread_t *)target, SIGUSR1);
    return NULL;
}

/* KVM_RUN of a guest that spins, with a SIGUSR1 in the middle of it. */
static int run_until_kicked(void) {
    struct kvm_regs regs = {.rip = LOAD, .rflags = 2};
    pthread_t thread, self = pthread_self();

    ioctl(vcpu, KVM_SET_REGS, &regs);
    run->exit_reason = 0;
    pthread_create(&thread, NULL, kick, &self);
    errno = 0;
    int result = ioctl(vcpu, KVM_RUN, 0), error = errno;
    pthread_join(thread, NULL);
    errno = error;
    return result;
}

static void open_vm(void) {
    struct kvm_userspace_memory_region region = {0, 0, LOAD, PAGE, 0};
    struct kvm_sregs sregs;

    memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(memory, "\xeb\xfe", 2);
    region.userspace_addr = (uintptr_t)memory;
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) skip_all("no /dev/kvm");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (vcpu < 0 || run == MAP_FAILED || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region)) bail_out("VM");
    ioctl(vcpu, KVM_GET_SREGS, &sregs);
    sregs.cs.base = sregs.cs.selector = 0;
    ioctl(vcpu, KVM_SET_SREGS, &sregs);
}

static void a_signal_ends_a_run(void) {
    handled = 0;
    CHECK(run_until_kicked() == -1 && errno == EINTR, "errno %d", errno);
    CHECK(handled == 1, "%d handled", (int)handled);
    CHECK(run->exit_reason == KVM_EXIT_INTR, "exit %u", run->exit_reason);
}

static void the_vcpus_mask_takes_the_place_of_the_threads(void) {
    struct {
        struct kvm_signal_mask mask;
        uint8_t set[8];
    } none = {{.len = 8}, {0}};
    sigset_t block, former, pending;

    handled = 0;
    sigemptyset(&block);
    sigaddset(&block, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &block, &former);
    CHECK(!ioctl(vcpu, KVM_SET_SIGNAL_MASK, &none), "errno %d", errno);
    CHECK(run_until_kicked() == -1 && errno == EINTR, "errno %d", errno);
    CHECK(!handled, "handled, though blocked");
    sigpending(&pending);
    CHECK(sigismember(&pending, SIGUSR1), "not pending");
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR, "a pending one: errno %d", errno);
    pthread_sigmask(SIG_SETMASK, &former, NULL);
    CHECK(handled == 1, "%d handled", (int)handled);
    CHECK(!ioctl(vcpu, KVM_SET_SIGNAL_MASK, NULL), "errno %d", errno);
}

static bool is_vm(int fd) {
    return ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1;
}

static void every_duplicate_is_the_file(void) {
    int copies[] = {dup(vm), dup2(vm, 10), dup3(vm, 11, O_CLOEXEC), fcntl(vm, F_DUPFD, 3), fcntl(vm, F_DUPFD_CLOEXEC, 3)};

    CHECK(copies[1] == 10 && copies[2] == 11, "dup2 %d, dup3 %d", copies[1], copies[2]);
    CHECK(fcntl(copies[0], F_GETFD) == 0 && fcntl(copies[4], F_GETFD) == FD_CLOEXEC, "close-on-exec");
    for (int i = 0; i < 5; i++) {
        CHECK(is_vm(copies[i]), "copy %d: errno %d", i, errno);
        CHECK(!close(copies[i]), "errno %d", errno);
        CHECK_ERRNO(ioctl(copies[i], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), EBADF);
    }
    CHECK(is_vm(vm), "errno %d", errno);
}

static void a_descriptor_survives_a_socket(void) {
    int pair[2], received = -1;
    char byte = 'x';
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

    memset(&control, 0, sizeof(control));
    control.head = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.head), &vm, sizeof(int));
    CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), "errno %d", errno);
    CHECK(sendmsg(pair[0], &message, 0) == 1 && recvmsg(pair[1], &message, 0) == 1, "errno %d", errno);
    memcpy(&received, CMSG_DATA(&control.head), sizeof(int));
    CHECK(received >= 0 && is_vm(received), "errno %d", errno);
    close(received);
    close(pair[0]);
    close(pair[1]);
}

static void the_last_close_releases(void) {
    struct kvm_create_guest_memfd create = {.size = PAGE};
    int other = ioctl(kvm, KVM_CREATE_VM, 0), gmem = ioctl(other, KVM_CREATE_GUEST_MEMFD, &create), copy = dup(gmem);

    CHECK(other >= 0 && gmem >= 0 && copy >= 0, "errno %d", errno);
    CHECK(!close(gmem), "errno %d", errno);
    struct stat status;
    CHECK(!fstat(copy, &status) && status.st_size == PAGE && status.st_mode == (S_IFREG | 0600), "mode %o", status.st_mode);
    CHECK(!syscall(SYS_close_range, copy, copy, 0), "errno %d", errno);
    CHECK_ERRNO(fstat(copy, &status), EBADF);
    CHECK(!close(other), "errno %d", errno);
}

static int status_of(pid_t child) {
    int status = -1;

    return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void a_child_has_the_file_but_not_the_memory(void) {
    pid_t child = fork();

    if (!child) _exit(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == -1 && errno == EIO ? 0 : 1);
    CHECK(status_of(child) == 0, "the VM in a forked child");
    memory[8] = 1;
    child = fork();
    if (!child) {
        memory[8] = 2; /* private to it, although the VM's memory is shared with the server */
        _exit(0);
    }
    CHECK(status_of(child) == 0 && memory[8] == 1, "byte %u", memory[8]);
    child = vfork();
    if (!child) _exit(7);
    CHECK(status_of(child) == 7, "vfork");
    CHECK(system("exit 3") == 3 << 8, "system()");
}

/* A mapping of a guest_memfd with MMAP, whose pages are shared if `shared`. */
static uint8_t *map_gmem(int machine, size_t pages, size_t mapped, bool shared) {
    uint64_t flags = GUEST_MEMFD_FLAG_MMAP | (shared ? GUEST_MEMFD_FLAG_INIT_SHARED : 0);
    struct kvm_create_guest_memfd create = {.size = pages * PAGE, .flags = flags};
    int gmem = ioctl(machine, KVM_CREATE_GUEST_MEMFD, &create);
    uint8_t *map = gmem < 0 ? MAP_FAILED : mmap(NULL, mapped * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);

    close(gmem);
    return map;
}

static void private_pages_stay_closed_when_they_move(void) {
    uint8_t *map = map_gmem(vm, 4, 2, false), *room = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (map == MAP_FAILED) SKIP_CASE("no mapping of a guest_memfd: errno %d", errno);
    CHECK_SIGBUS(map, -1);
    CHECK(mremap(map, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room, "errno %d", errno);
    CHECK_SIGBUS(room + PAGE, 1);
    CHECK(mremap(room, 2 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room + 4 * PAGE) == room + 4 * PAGE, "errno %d",
          errno);
    for (int page = 4; page < 8; page++) CHECK_SIGBUS(room + page * PAGE, -1);
    CHECK(!munmap(room, 8 * PAGE), "errno %d", errno);
}

static void shared_pages_keep_their_bytes_when_they_move(void) {
    uint8_t *map = map_gmem(vm, 8, 8, true), *copy, *grown;

    if (map == MAP_FAILED) SKIP_CASE("no mapping of a guest_memfd: errno %d", errno);
    for (int page = 0; page < 8; page++) map[page * PAGE] = (uint8_t)(page + 1);
    CHECK(mremap(map, 8 * PAGE, 4 * PAGE, 0) == map, "errno %d", errno);
    copy = mremap(map, 0, 4 * PAGE, MREMAP_MAYMOVE);
    CHECK(copy != MAP_FAILED && copy != map && copy[PAGE] == 2, "errno %d", errno);
    copy[PAGE] = 22;
    grown = mremap(map, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
    CHECK(grown != MAP_FAILED && grown[PAGE] == 22 && grown[7 * PAGE] == 8, "errno %d", errno);
    CHECK(!munmap(grown, 8 * PAGE) && !munmap(copy, 4 * PAGE), "errno %d", errno);
}

static void bad_addresses_are_faults(void) {
    CHECK_ERRNO(ioctl(vcpu, KVM_GET_REGS, 8), EFAULT);
    CHECK_ERRNO(ioctl(vcpu, KVM_SET_REGS, 8), EFAULT);
    CHECK_ERRNO(ioctl(vm, KVM_SET_USER_MEMORY_REGION, 8), EFAULT);
    CHECK_ERRNO(ioctl(vm, KVM_SET_USER_MEMORY_REGION, "read-only\0"), EINVAL);
    CHECK_ERRNO(ioctl(vcpu, KVM_GET_REGS, (void *)bad_addresses_are_faults), EFAULT);
    CHECK_ERRNO(open((char *)8, O_RDONLY), EFAULT);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"a signal ends a run", a_signal_ends_a_run},
    {"the vCPU's mask takes the place of the thread's", the_vcpus_mask_takes_the_place_of_the_threads},
    {"every duplicate is the file", every_duplicate_is_the_file},
    {"a descriptor survives a socket", a_descriptor_survives_a_socket},
    {"the last close releases", the_last_close_releases},
    {"a child has the file but not the memory", a_child_has_the_file_but_not_the_memory},
    {"private pages stay closed when they move", private_pages_stay_closed_when_they_move},
    {"shared pages keep their bytes when they move", shared_pages_keep_their_bytes_when_they_move},
    {"bad addresses are faults", bad_addresses_are_faults},
};

int main(void) {
    struct sigaction action = {.sa_handler = on_signal};

    sigaction(SIGUSR1, &action, NULL);
    open_vm();
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        begin_case();
        cases[i].run();
        end_case("", cases[i].name);
    }
    return finish();
}
