/* Section N: KVM_CREATE_GUEST_MEMFD. */
#include "probe.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

static const struct {
    const char *id;
    uint64_t size;
} sizes[] = {
    {"N1", 0},
    {"N2", 1},
    {"N3", 0xfff},
    {"N4", 0x1000},
    {"N5", 0x1001},
    {"N6", 0x200000},
    {"N7", 0x10000000000},
    {"N8", 0x4000000000000000},
    {"N9", MAX_SIZE},
    {"N10", 0x7fffffffffffffff},
    {"N11", 0x8000000000000000},
    {"N12", 0xfffffffffffff000},
    {"N13", 0xffffffffffffffff},
};

static const struct {
    const char *id;
    uint64_t flags;
} bad_flags[] = {
    {"N14", 4},
    {"N15", 5},
    {"N16", 8},
    {"N17", 0x10},
    {"N18", 0x80000000},
    {"N19", 0x100000000},
    {"N20", 0x8000000000000000},
    {"N21", ~0ul},
};

/* The errno name or "fd"; the file is closed again. */
static const char *create_and_close(int vm, uint64_t size, uint64_t flags)
{
    int fd = create_gmem(vm, size, flags);
    const char *text = answer_fd(fd);
    if (fd >= 0)
        close(fd);
    return text;
}

/* One row asks with several flags: the first answer that differs from the first is told with its flags. */
static void row_size(const char *id, int vm, uint64_t size)
{
    const char *first = create_and_close(vm, size, 0);
    for (uint64_t flags = 1; flags < 4; flags++) {
        const char *other = create_and_close(vm, size, flags);
        if (strcmp(first, other) != 0) {
            row(id, "%s, but %s with flags %d", first, other, (int)flags);
            return;
        }
    }
    row(id, "%s", first);
}

static void row_flags(const char *id, int vm, uint64_t flags)
{
    const char *empty = create_and_close(vm, 0, flags), *page = create_and_close(vm, PAGE, flags);
    if (strcmp(empty, page) == 0)
        row(id, "%s", page);
    else
        row(id, "%s with size 0, %s with size 0x1000", empty, page);
}

static void ask_sizes(void)
{
    int vm = new_vm();
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        row_size(sizes[i].id, vm, sizes[i].size);
    for (size_t i = 0; i < sizeof(bad_flags) / sizeof(bad_flags[0]); i++)
        row_flags(bad_flags[i].id, vm, bad_flags[i].flags);
    struct stat status = {0};
    if (fstat(new_gmem(vm, MAX_SIZE, 0), &status) < 0)
        row_ret("N22", -1);
    else
        row("N22", "0x%lx", (unsigned long)status.st_size);
}

static void ask_arguments(void)
{
    int kvm = open_kvm(), vm = new_vm(), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0ul);
    struct gmem_create create = {.size = PAGE, .reserved = {1, 2, 3, 4, 5, 6}};
    row_fd("N23", ioctl(vm, CREATE_GMEM, &create));
    row_fd("N24", ioctl(vm, CREATE_GMEM, NULL));
    row_fd("N25", ioctl(vm, CREATE_GMEM, (void *)1));
    row_fd("N26", create_gmem(kvm, PAGE, 0));
    row_fd("N27", ioctl(vm, _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0xd4, 56), &create));
    row_fd("N28", ioctl(vm, _IOC(_IOC_WRITE, KVMIO, 0xd4, sizeof(create)), &create));
    struct gmem_create before = create;
    int fd = ioctl(vm, CREATE_GMEM, &create);
    row("N29", "%s", fd < 0 ? errno_name(errno) : memcmp(&before, &create, sizeof(create)) ? "changed" : "unchanged");
    row_fd("N33", create_gmem(vcpu, PAGE, 0));
}

static void ask_descriptor(void)
{
    int vm = new_vm(), lowest = dup(STDOUT_FILENO);
    close(lowest);
    int fd = new_gmem(vm, PAGE, 0);
    row("N30", "%s", fd == lowest ? "lowest free fd" : "another fd");
    row_ret("N31", fcntl(fd, F_GETFD));
    int flags = fcntl(fd, F_GETFL);
    row("N32", "0%o%s", flags, flags == 0100002 ? " (O_RDWR=02, O_LARGEFILE=0100000)" : "");
}

static void ask_exhausted(void)
{
    int vm = new_vm();
    struct rlimit limit = {64, 64};
    setrlimit(RLIMIT_NOFILE, &limit);
    while (dup(STDOUT_FILENO) >= 0)
        ;
    row_fd("N34", create_gmem(vm, PAGE, 0));
    row_fd("N35", create_gmem(vm, PAGE, 4));
    row_fd("N36", create_gmem(vm, 1, 0));
}

static const struct group groups[] = {
    {"sizes", ask_sizes},
    {"arguments", ask_arguments},
    {"descriptor", ask_descriptor},
    {"exhausted", ask_exhausted},
};
SECTION(create_section, "N", groups);
