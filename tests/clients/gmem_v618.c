/*
 * guest_memfd as of Linux 6.18, seen from a plain KVM client: creation, file operations, mappings, holes, NUMA policy,
 * and a guest whose memory it is. What the kernel's own guest_memfd_test covers, in our own words and with the errno
 * that the kernel gives. It passes unchanged on the /dev/kvm of a real 6.18 and under `guestmem run --abi v6.18`.
 */
#define _GNU_SOURCE
#include "client.h"

#include <linux/mempolicy.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { SIZE = 4 * PAGE, HUGE = 2 << 20, FILL = 0xaa };

/* A fresh file of SIZE bytes for each case, on a VM that lives through all cases of its type. */
struct fixture {
    int vm, gmem;
    uint64_t flags;
};

static bool all_bytes_are(const uint8_t *bytes, size_t size, uint8_t value) {
    for (size_t i = 0; i < size; i++)
        if (bytes[i] != value) return false;
    return true;
}

/* Creation. */

static void only_known_flags(struct fixture *f) {
    uint64_t known = capability(f->vm, KVM_CAP_GUEST_MEMFD_FLAGS);

    for (int bit = 0; bit < 64; bit++) {
        if (!(known >> bit & 1)) {
            CHECK_ERRNO(create_gmem(f->vm, PAGE, 1ULL << bit), EINVAL);
            continue;
        }
        int fd = create_gmem(f->vm, PAGE, 1ULL << bit);
        CHECK(fd >= 0, "flag 1<<%d: errno %d", bit, errno);
        close(fd);
    }
}

static void only_whole_pages(struct fixture *f) {
    for (size_t size = 0; size < PAGE; size++) CHECK_ERRNO(create_gmem(f->vm, size, f->flags), EINVAL);
    CHECK_ERRNO(create_gmem(f->vm, 0x7fffffffffffffffULL, f->flags), EINVAL);
    CHECK_ERRNO(create_gmem(f->vm, 0x8000000000000000ULL, f->flags), EINVAL);
}

static void two_files_are_two(struct fixture *f) {
    int other = create_gmem(f->vm, 2 * SIZE, f->flags);
    struct stat one, two;

    CHECK(other >= 0, "errno %d", errno);
    CHECK(!fstat(f->gmem, &one) && !fstat(other, &two), "errno %d", errno);
    CHECK(one.st_size == SIZE, "%ld", (long)one.st_size);
    CHECK(two.st_size == 2 * SIZE, "%ld", (long)two.st_size);
    CHECK(one.st_ino != two.st_ino, "inode %lu", (unsigned long)one.st_ino);
    close(other);
}

/* File operations. */

static void no_read_or_write(struct fixture *f) {
    char buffer[64] = {0};

    CHECK_ERRNO(read(f->gmem, buffer, sizeof(buffer)), EINVAL);
    CHECK_ERRNO(write(f->gmem, buffer, sizeof(buffer)), EINVAL);
    CHECK_ERRNO(pread(f->gmem, buffer, sizeof(buffer), 0), ESPIPE);
    CHECK_ERRNO(pwrite(f->gmem, buffer, sizeof(buffer), 0), ESPIPE);
    CHECK_ERRNO(ftruncate(f->gmem, PAGE), EINVAL);
}

static void its_size_is_seen(struct fixture *f) {
    struct stat status;

    CHECK(!fstat(f->gmem, &status), "errno %d", errno);
    CHECK(status.st_size == SIZE, "%ld", (long)status.st_size);
    CHECK(status.st_blksize == PAGE, "%ld", (long)status.st_blksize);
}

static void allocation_stays_inside(struct fixture *f) {
    CHECK(!allocate(f->gmem, 0, SIZE), "errno %d", errno);
    CHECK_ERRNO(allocate(f->gmem, SIZE, PAGE), EINVAL);
    CHECK_ERRNO(allocate(f->gmem, SIZE + PAGE, PAGE), EINVAL);
    CHECK_ERRNO(fallocate(f->gmem, 0, 0, SIZE), EOPNOTSUPP);
    CHECK(!punch(f->gmem, PAGE, PAGE), "errno %d", errno);
    CHECK(!allocate(f->gmem, PAGE, PAGE), "errno %d", errno);
}

static void holes_may_lie_outside(struct fixture *f) {
    CHECK(!punch(f->gmem, SIZE, PAGE), "errno %d", errno);
    CHECK(!punch(f->gmem, SIZE + PAGE, PAGE), "errno %d", errno);
    CHECK(!punch(f->gmem, SIZE - PAGE, 2 * PAGE), "errno %d", errno);
}

static void holes_are_whole_pages(struct fixture *f) {
    static const off_t starts[] = {0, 1, PAGE - 1, PAGE}, lengths[] = {1, PAGE - 1, PAGE, PAGE + 1};

    for (size_t i = 0; i < sizeof(starts) / sizeof(*starts); i++)
        for (size_t j = 0; j < sizeof(lengths) / sizeof(*lengths); j++)
            if (starts[i] % PAGE || lengths[j] % PAGE) CHECK_ERRNO(punch(f->gmem, starts[i], lengths[j]), EINVAL);
}

/* Mappings. */

static void no_mapping_without_the_flag(struct fixture *f) {
    CHECK_ERRNO(map_shared(f->gmem, PAGE), ENODEV);
    CHECK_ERRNO(map_shared(f->gmem, SIZE), ENODEV);
}

static void no_private_mapping(struct fixture *f) {
    CHECK_ERRNO(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, f->gmem, 0), EINVAL);
}

static void bytes_are_kept_but_in_a_hole(struct fixture *f) {
    uint8_t *memory = map_shared(f->gmem, SIZE);

    CHECK(memory != MAP_FAILED, "errno %d", errno);
    memset(memory, FILL, SIZE);
    CHECK(all_bytes_are(memory, SIZE, FILL), "lost bytes");
    CHECK(!punch(f->gmem, 0, PAGE), "errno %d", errno);
    CHECK(all_bytes_are(memory, PAGE, 0), "the hole is not zero");
    CHECK(all_bytes_are(memory + PAGE, SIZE - PAGE, FILL), "lost bytes beside the hole");
    memset(memory, FILL, PAGE);
    CHECK(all_bytes_are(memory, SIZE, FILL), "lost bytes");
    munmap(memory, SIZE);
}

static void sigbus_past_the_end(struct fixture *f) {
    uint8_t *memory = map_shared(f->gmem, 4 * SIZE);

    CHECK(memory != MAP_FAILED, "errno %d", errno);
    memset(memory, FILL, SIZE);
    CHECK_SIGBUS(memory + SIZE, FILL);
    CHECK_SIGBUS(memory + SIZE, -1);
    CHECK_SIGBUS(memory + 4 * SIZE - 1, -1);
    CHECK(all_bytes_are(memory, SIZE, FILL), "lost bytes");
    munmap(memory, 4 * SIZE);
}

static void sigbus_on_private_pages(struct fixture *f) {
    uint8_t *memory = map_shared(f->gmem, SIZE);

    CHECK(memory != MAP_FAILED, "errno %d", errno);
    for (size_t offset = 0; offset < SIZE; offset += PAGE) {
        CHECK_SIGBUS(memory + offset, FILL);
        CHECK_SIGBUS(memory + offset, -1);
    }
    munmap(memory, SIZE);
}

/* What the kernel reads for us from a private page is EFAULT, not a signal. */
static void system_calls_see_no_private_page(struct fixture *f) {
    uint8_t *memory = map_shared(f->gmem, SIZE);
    int ends[2];

    CHECK(memory != MAP_FAILED, "errno %d", errno);
    CHECK(!pipe(ends), "errno %d", errno);
    CHECK_ERRNO(write(ends[1], memory, 16), EFAULT);
    close(ends[0]);
    close(ends[1]);
    munmap(memory, SIZE);
}

/* Huge pages may be advised, but small ones are never made into one: it would reach beyond what is shared. */
static void no_collapse(struct fixture *f) {
    int gmem = create_gmem(f->vm, HUGE, f->flags);
    uint8_t *reserved = mmap(NULL, 2 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *aligned = (uint8_t *)(((uintptr_t)reserved + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    void *mapped = mmap(aligned, HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, gmem, 0);

    CHECK(gmem >= 0 && mapped == aligned, "errno %d", errno);
    aligned[0] = FILL;
    for (size_t offset = PAGE; offset < HUGE; offset += PAGE)
        CHECK(*(volatile uint8_t *)(aligned + offset) == 0, "offset %zu", offset);
    CHECK(!madvise(aligned, HUGE, MADV_HUGEPAGE) || errno == EINVAL, "errno %d", errno); /* EINVAL: none built in */
    CHECK_ERRNO(madvise(aligned, HUGE, MADV_COLLAPSE), EINVAL);
    CHECK(!madvise(aligned, HUGE, MADV_DONTNEED), "errno %d", errno);
    CHECK(*(volatile uint8_t *)aligned == FILL, "bytes went with the mapping's entries");
    munmap(reserved, 2 * HUGE);
    close(gmem);
}

/* NUMA. */

static void check_policy(uint8_t *address, int expected, unsigned long expected_nodes) {
    unsigned long nodes = 0;
    int policy = -1;

    CHECK(!syscall(SYS_get_mempolicy, &policy, &nodes, 64UL, address, (long)MPOL_F_ADDR), "errno %d", errno);
    CHECK(policy == expected && nodes == expected_nodes, "policy %d, nodes %lx", policy, nodes);
}

static void policy_is_stored(struct fixture *f) {
    uint8_t *memory = map_shared(f->gmem, SIZE);
    unsigned long node0 = 1;

    CHECK(memory != MAP_FAILED, "errno %d", errno);
    if (access("/sys/devices/system/node/node0", F_OK)) SKIP_CASE("this kernel has no NUMA");
    STEP(check_policy(memory, MPOL_DEFAULT, 0));
    CHECK(!syscall(SYS_mbind, memory, 2UL * PAGE, (long)MPOL_BIND, &node0, 64UL, 0L), "errno %d", errno);
    STEP(check_policy(memory, MPOL_BIND, node0));
    STEP(check_policy(memory + 2 * PAGE, MPOL_DEFAULT, 0));
    CHECK(!syscall(SYS_mbind, memory, (long)SIZE, (long)MPOL_DEFAULT, NULL, 0L, 0L), "errno %d", errno);
    STEP(check_policy(memory, MPOL_DEFAULT, 0));
    CHECK_ERRNO(syscall(SYS_mbind, memory, (long)PAGE, 999L, &node0, 64UL, 0L), EINVAL);
    munmap(memory, SIZE);
}

/* On which node each page is: move_pages() without a destination. */
static void check_nodes(uint8_t *memory, const int expected[4]) {
    void *pages[4];
    int nodes[4];

    for (int i = 0; i < 4; i++) pages[i] = memory + i * PAGE;
    CHECK(!syscall(SYS_move_pages, 0L, 4UL, pages, NULL, nodes, 0L), "errno %d", errno);
    for (int i = 0; i < 4; i++) CHECK(nodes[i] == expected[i], "page %d is on node %d", i, nodes[i]);
}

static void bind_halves(uint8_t *memory, unsigned long first, unsigned long second) {
    CHECK(!syscall(SYS_mbind, memory, 2UL * PAGE, (long)MPOL_BIND, &first, 8UL, 0L), "errno %d", errno);
    CHECK(!syscall(SYS_mbind, memory + 2 * PAGE, 2UL * PAGE, (long)MPOL_BIND, &second, 8UL, 0L), "errno %d", errno);
}

static void allocation_follows_the_policy(struct fixture *f) {
    uint8_t *memory = map_shared(f->gmem, SIZE);

    CHECK(memory != MAP_FAILED, "errno %d", errno);
    if (access("/sys/devices/system/node/node1", F_OK)) SKIP_CASE("there is one NUMA node");
    memset(memory, FILL, PAGE); /* a page that is there stays where it is until it is punched */
    CHECK(!punch(f->gmem, 0, PAGE), "errno %d", errno);
    STEP(bind_halves(memory, 1 << 1, 1 << 0));
    memset(memory, FILL, SIZE);
    STEP(check_nodes(memory, (const int[]){1, 1, 0, 0}));
    CHECK(!punch(f->gmem, 0, SIZE), "errno %d", errno);
    STEP(bind_halves(memory, 1 << 0, 1 << 1));
    memset(memory, FILL, SIZE);
    STEP(check_nodes(memory, (const int[]){0, 0, 1, 1}));
    munmap(memory, SIZE);
}

/* A guest: compares its page with FILL, fills it with 0xff, gives out whether all bytes had been equal. */

extern const char guest_compare_and_fill[], guest_compare_and_fill_end[];
asm(".pushsection .rodata\n"
    "guest_compare_and_fill:\n"
    "    cld\n"
    "    mov %ebx, %edi\n"
    "    mov $4096, %ecx\n"
    "    mov $0xaa, %al\n"
    "    repe scasb\n"
    "    sete %dl\n"
    "    mov %ebx, %edi\n"
    "    mov $4096, %ecx\n"
    "    mov $0xff, %al\n"
    "    rep stosb\n"
    "    mov %dl, %al\n"
    "    out %al, $0x10\n"
    "guest_compare_and_fill_end:\n"
    ".popsection\n");

static void guest_and_host_share_it(struct fixture *f) {
    size_t code_size = (size_t)(guest_compare_and_fill_end - guest_compare_and_fill);
    struct machine m;
    uint8_t all_equal = 0;

    CHECK(!open_machine(&m, 0, guest_compare_and_fill, code_size), "errno %d", errno);
    int gmem = create_gmem(m.vm, PAGE, f->flags);
    CHECK(gmem >= 0, "errno %d", errno);
    uint8_t *memory = map_shared(gmem, PAGE);
    CHECK(memory != MAP_FAILED, "errno %d", errno);
    /* The slot's host address is not used but by a KVM that emulates the instruction; that one needs the mapping. */
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, PAGE, memory, gmem), "errno %d", errno);
    memset(memory, FILL, PAGE);
    CHECK(run_guest(&m, DATA_GPA, 0, &all_equal), "exit %u, errno %d", m.run->exit_reason, errno);
    CHECK(all_equal == 1, "the guest has seen other bytes");
    CHECK(all_bytes_are(memory, PAGE, 0xff), "the host sees other bytes than the guest wrote");
    munmap(memory, PAGE);
    close(gmem);
    close_machine(&m);
}

/* The cases, and for which files they are: not mappable, mappable but private, mappable and shared. */

enum { NO_MAP = 1, PRIVATE = 2, SHARED = 4, ALL = NO_MAP | PRIVATE | SHARED };

static const struct {
    const char *name;
    void (*run)(struct fixture *);
    int kinds;
} cases[] = {
    {"only known flags", only_known_flags, NO_MAP},
    {"only whole pages", only_whole_pages, ALL},
    {"two files are two", two_files_are_two, ALL},
    {"no read or write", no_read_or_write, ALL},
    {"its size is seen", its_size_is_seen, ALL},
    {"allocation stays inside", allocation_stays_inside, ALL},
    {"holes may lie outside", holes_may_lie_outside, ALL},
    {"holes are whole pages", holes_are_whole_pages, ALL},
    {"no mapping without the flag", no_mapping_without_the_flag, NO_MAP},
    {"no private mapping", no_private_mapping, PRIVATE | SHARED},
    {"SIGBUS on private pages", sigbus_on_private_pages, PRIVATE},
    {"system calls see no private page", system_calls_see_no_private_page, PRIVATE},
    {"bytes are kept but in a hole", bytes_are_kept_but_in_a_hole, SHARED},
    {"SIGBUS past the end", sigbus_past_the_end, SHARED},
    {"no collapse", no_collapse, SHARED},
    {"policy is stored", policy_is_stored, PRIVATE | SHARED},
    {"allocation follows the policy", allocation_follows_the_policy, SHARED},
};

static void run_one(int vm, uint64_t flags, const char *group, const char *name, void (*run)(struct fixture *)) {
    struct fixture f = {.vm = vm, .gmem = create_gmem(vm, SIZE, flags), .flags = flags};

    if (f.gmem < 0) bail_out("KVM_CREATE_GUEST_MEMFD");
    begin_case();
    run(&f);
    end_case(group, name);
    close(f.gmem);
}

static void run_kind(int vm, unsigned long type, int kind, uint64_t flags, const char *kind_name) {
    char group[64];

    snprintf(group, sizeof(group), "type %lu, %s: ", type, kind_name);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
        if (cases[i].kinds & kind) run_one(vm, flags, group, cases[i].name, cases[i].run);
}

static void run_type(unsigned long type) {
    const uint64_t shared = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    int vm = ioctl(kvm, KVM_CREATE_VM, type);

    if (vm < 0) bail_out("KVM_CREATE_VM");
    uint64_t known = capability(vm, KVM_CAP_GUEST_MEMFD_FLAGS);
    run_kind(vm, type, NO_MAP, 0, "not mappable");
    if (known & GUEST_MEMFD_FLAG_MMAP) run_kind(vm, type, PRIVATE, GUEST_MEMFD_FLAG_MMAP, "private");
    if ((known & shared) == shared) run_kind(vm, type, SHARED, shared, "shared");
    if ((known & shared) == shared && type == 0)
        run_one(vm, shared, "type 0, shared: ", "guest and host share it", guest_and_host_share_it);
    close(vm);
}

int main(void) {
    open_kvm();
    if (!(capability(kvm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP))
        skip_all("this kernel cannot map a guest_memfd");
    uint64_t types = capability(kvm, KVM_CAP_VM_TYPES);
    for (unsigned long type = 0; type < 2; type++) /* default and software-protected; the others need firmware */
        if (types >> type & 1) run_type(type);
    return finish();
}
