/* Mappings of guest_memfds and of a VM's memory: faults, notices to the server, what is refused. */
#include "client.h"

#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <sys/uio.h>

static sigjmp_buf jump;
static volatile int fault_signal, fault_code;

static void fault_handler(int signal, siginfo_t *info, void *context)
{
    (void)context;
    fault_signal = signal;
    fault_code = info->si_code;
    siglongjmp(jump, 1);
}

/* The signal that a touch gives, or 0. */
static int touch(volatile char *address)
{
    struct sigaction action = {.sa_sigaction = fault_handler, .sa_flags = SA_SIGINFO};
    CHECK(!sigaction(SIGBUS, &action, NULL) && !sigaction(SIGSEGV, &action, NULL));
    if (sigsetjmp(jump, 1))
        return fault_signal;
    (void)*address;
    return 0;
}

static int kvm, vm, gmem;
static char *map;

static void set_up(size_t size)
{
    kvm = kvm_open();
    vm = ioctl(kvm, CREATE_VM, 0);
    gmem = gmem_create(vm, size);
    map = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, 0);
    CHECK(vm >= 0 && map != MAP_FAILED);
}

static int noted(void)
{
    return ioctl(kvm, NOTED, 0);
}

static void private_page(void)
{
    char byte = 0;
    int zero = open("/dev/zero", O_RDONLY), pipes[2];
    set_up(4 * PAGE);
    memset(map, 7, 4 * PAGE);
    CHECK(!pipe(pipes) && !ioctl(kvm, ZAP_PAGE, map));
    CHECK(touch(map) == SIGBUS && fault_code == BUS_ADRERR);
    CHECK_ERRNO(read(zero, map, 1), EFAULT);
    CHECK_ERRNO(write(pipes[1], map, 1), EFAULT);
    CHECK_ERRNO(ioctl(kvm, READ_SUM, map), EFAULT);
    struct iovec here = {&byte, 1}, there = {map, 1};
    CHECK_ERRNO(process_vm_readv(getpid(), &here, 1, &there, 1, 0), EFAULT);
    CHECK_ERRNO(mlock(map, PAGE), ENOMEM);
    CHECK(!touch(map + PAGE) && map[PAGE] == 7);
}

/* A page that is in memory and locked goes all the same. */
static void locked_page(void)
{
    set_up(PAGE);
    CHECK(!mlock(map, PAGE) && !ioctl(kvm, ZAP_PAGE, map) && touch(map) == SIGBUS);
}

static void overlaid_page(void)
{
    set_up(2 * PAGE);
    map[0] = 5;
    CHECK(!ioctl(kvm, OVERLAY_PAGE, map) && touch(map) == SIGBUS && fault_code == BUS_ADRERR);
    CHECK(!touch(map + PAGE) && !ioctl(kvm, UNCOVER_PAGE, map) && map[0] == 5);
}

static void flags(void)
{
    unsigned char resident[4];
    set_up(4 * PAGE);
    CHECK_ERRNO(mmap(0, PAGE, PROT_READ, MAP_PRIVATE, gmem, 0), EINVAL);
    CHECK_ERRNO(mmap(0, PAGE, PROT_READ, MAP_SHARED, gmem, 100), EINVAL);
    CHECK_ERRNO(mmap(0, 0, PROT_READ, MAP_SHARED, gmem, 0), EINVAL);
    char *populated = mmap(0, 4 * PAGE, PROT_READ, MAP_SHARED | MAP_POPULATE, gmem, 0);
    CHECK(populated != MAP_FAILED && !mincore(populated, 4 * PAGE, resident) && resident[3] & 1);
    CHECK(touch(populated) == 0);
    char *none = mmap(0, PAGE, PROT_NONE, MAP_SHARED, gmem, 0);
    CHECK(touch(none) == SIGSEGV);
    char *locked = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_LOCKED, gmem, 0);
    CHECK(locked != MAP_FAILED && !munlock(locked, 4 * PAGE));
    CHECK(mmap(populated, 4 * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, gmem, 0) == populated);
}

static void refused(void)
{
    set_up(4 * PAGE);
    CHECK_ERRNO(mprotect(map, PAGE, PROT_READ | PROT_EXEC), EACCES);
    CHECK_ERRNO(msync(map, PAGE, MS_SYNC), EINVAL);
    CHECK(!msync(map, PAGE, MS_ASYNC) && !madvise(map, PAGE, MADV_HUGEPAGE));
    CHECK_ERRNO(madvise(map, PAGE, 25 /* MADV_COLLAPSE */), EINVAL);
    CHECK_ERRNO(mremap(map, PAGE, PAGE, 4 /* MREMAP_DONTUNMAP */, NULL), EINVAL);
    int fault_fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(uintptr_t)map, PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(fault_fd >= 0 && !ioctl(fault_fd, UFFDIO_API, &api));
    CHECK_ERRNO(ioctl(fault_fd, UFFDIO_REGISTER, &range), EINVAL);
    range.range.start = (uintptr_t)mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(!ioctl(fault_fd, UFFDIO_REGISTER, &range));
}

/* The server hears of each change, once, and of none elsewhere. */
static void notices(void)
{
    set_up(8 * PAGE);
    int before = noted();
    char *other = mmap(0, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(!mprotect(other, PAGE, PROT_NONE) && !munmap(other, 4 * PAGE) && noted() == before);
    CHECK(!mprotect(map, PAGE, PROT_READ) && noted() == ++before);
    CHECK(!madvise(map, PAGE, MADV_REMOVE) && noted() == ++before);
    CHECK(!madvise(map, PAGE, MADV_DONTNEED) && noted() == before);
    CHECK(!munmap(map, PAGE) && noted() == ++before);
    CHECK(!munmap(map, PAGE) && noted() == before);
    char *moved = mremap(map + PAGE, 3 * PAGE, 6 * PAGE, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED && noted() == ++before);
    char *over = mmap(moved, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(over == moved && noted() == ++before);
    CHECK_ERRNO(munmap(moved + PAGE + 1, PAGE), EINVAL);
    CHECK(noted() == before && !munmap(moved, 6 * PAGE) && noted() == ++before);
}

/* To the kernel a guarded page is a mapping of its own; to the client it is not. */
static void moved_in_pieces(void)
{
    set_up(8 * PAGE);
    for (size_t page = 0; page < 8; page++)
        map[page * PAGE] = (char)page;
    CHECK(!ioctl(kvm, ZAP_PAGE, map + PAGE));
    int before = noted();
    char *room = mmap(0, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *moved = mremap(map, 4 * PAGE, 6 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    CHECK(moved == room && noted() == before + 1 && moved[3 * PAGE] == 3 && moved[5 * PAGE] == 5);
    CHECK(touch(map) == SIGSEGV && map[5 * PAGE] == 5);
}

/* /proc/self/maps names it as the kernel does. */
static void maps(void)
{
    static char text[1 << 20];
    char link[64] = {0}, path[64];
    set_up(PAGE);
    int fd = open("/proc/self/maps", O_RDONLY);
    ssize_t length = 0, got;
    while ((got = read(fd, text + length, sizeof(text) - 1 - (size_t)length)) > 0)
        length += got;
    CHECK(strstr(text, "anon_inode:[kvm-gmem]\n") && !strstr(text, "memfd:fake") && strstr(text, "[stack]"));
    snprintf(path, sizeof(path), "/proc/self/fd/%d", gmem);
    CHECK(readlink(path, link, sizeof(link)) == 21 && !strcmp(link, "anon_inode:[kvm-gmem]"));
    CHECK_ERRNO(open(path, O_RDWR), ENXIO);
    CHECK(open(path, O_PATH) >= 0);
    CHECK_ERRNO(truncate(path, PAGE), EINVAL);
}

/* Reached by raw numbers as well. */
static void raw(void)
{
    set_up(PAGE);
    CHECK(syscall(SYS_ioctl, kvm, GET_API_VERSION, 0) == 12);
    CHECK_ERRNO(syscall(SYS_read, gmem, map, 1), EINVAL);
    CHECK_ERRNO(syscall(SYS_ftruncate, gmem, 0), EINVAL);
    CHECK_ERRNO(syscall(SYS_mprotect, map, PAGE, PROT_EXEC), EACCES);
    char *second = (char *)syscall(SYS_mmap, 0, PAGE, PROT_READ, MAP_SHARED, gmem, 0);
    CHECK(second != MAP_FAILED && !syscall(SYS_munmap, second, PAGE));
    CHECK(syscall(SYS_getpid) == getpid());
    CHECK_ERRNO(syscall(100000), ENOSYS);
    int raw_open = (int)syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR);
    CHECK(syscall(SYS_ioctl, raw_open, GET_API_VERSION, 0) == 12 && !syscall(SYS_close, raw_open));
    pid_t child = (pid_t)syscall(SYS_fork), status;
    if (!child)
        _exit(syscall(SYS_getpid) == getpid() ? 3 : 4);
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 3);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"private_page", private_page},
        {"locked_page", locked_page},
        {"overlaid_page", overlaid_page},
        {"flags", flags},
        {"refused", refused},
        {"notices", notices},
        {"moved_in_pieces", moved_in_pieces},
        {"maps", maps},
        {"raw", raw},
        {NULL, NULL},
    };
    return run_test(tests, argc, argv);
}
