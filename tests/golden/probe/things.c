/* The VMs, files and mappings that the rows ask about. */
#include "probe.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/syscall.h>
#include <sys/wait.h>

void stop(const char *what)
{
    dprintf(STDOUT_FILENO, "# %s: %s\n", what, errno_name(errno));
    _exit(2);
}

int open_kvm(void)
{
    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        stop("/dev/kvm");
    return fd;
}

int new_vm(void)
{
    int kvm = open_kvm();
    int vm = ioctl(kvm, KVM_CREATE_VM, 0ul);
    if (vm < 0)
        stop("KVM_CREATE_VM");
    close(kvm);
    return vm;
}

int create_gmem(int vm, uint64_t size, uint64_t flags)
{
    struct gmem_create create = {.size = size, .flags = flags};
    return ioctl(vm, CREATE_GMEM, &create);
}

int new_gmem(int vm, uint64_t size, uint64_t flags)
{
    int fd = create_gmem(vm, size, flags);
    if (fd < 0)
        stop("KVM_CREATE_GUEST_MEMFD");
    return fd;
}

int set_region(int vm, const struct region2 *region)
{
    return ioctl(vm, SET_REGION2, region);
}

void *map_shared(int fd, size_t size)
{
    void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        stop("mmap");
    return map;
}

int new_memfd(size_t size)
{
    int fd = memfd_create("golden", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
        stop("memfd");
    return fd;
}

const char *scratch_directory(void)
{
    const char *directory = getenv("TMPDIR");
    return directory ? directory : "/tmp";
}

int new_disk_file(int flags)
{
    static const char zeros[PAGE];
    char path[256];
    snprintf(path, sizeof(path), "%s/golden-XXXXXX", scratch_directory());
    int first = mkstemp(path);
    if (first < 0)
        stop("mkstemp");
    int fd = write(first, zeros, PAGE) == (ssize_t)PAGE ? open(path, O_RDWR | O_CLOEXEC | flags) : -1;
    unlink(path);
    close(first);
    if (fd < 0)
        stop("a file on disk");
    return fd;
}

int punch(int fd, uint64_t offset, uint64_t size)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
}

int populate(int fd, uint64_t offset, uint64_t size)
{
    return fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
}

long cached_pages(int fd)
{
    struct {
        uint64_t offset, length;
    } range = {0, 0}; /* length 0: to the end of the file */
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages;
    if (syscall(SYS_cachestat, fd, &range, &pages, 0) < 0)
        return -1;
    return (long)pages.cached;
}

void in_child(void (*ask)(void *), void *argument)
{
    pid_t child = fork();
    if (child < 0)
        stop("fork");
    if (child == 0) {
        alarm(10); /* the parent's alarm is not inherited */
        ask(argument);
        _exit(0);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0)
        dprintf(STDOUT_FILENO, "# a forked child ended with wait status 0x%x\n", status);
}
