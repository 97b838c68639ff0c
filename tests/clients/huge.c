/*
 * Files of huge pages, seen from a plain KVM client: what creation and fallocate refuse, what stat() says, and pages of
 * 4 KiB that are converted inside a huge page by both families of ioctls, while guest and host look at the bytes.
 * Runs under `guestmem run --hugepages 2M=8,1G=4`; with the argument "stepwise" under `--huge-policy stepwise` too. No
 * kernel that is released has such files.
 */
#define _GNU_SOURCE
#include "exchange.h"

#include <sys/stat.h>

#define GUEST_MEMFD_FLAG_HUGETLB (1ULL << 2)
#define PAGE_SIZE_SHIFT 58
struct kvm_gmem_convert {
    __u64 offset, size, error_offset, reserved[5];
};
#define KVM_GMEM_CONVERT_SHARED _IOWR(0xaf, 0x41, struct kvm_gmem_convert)
#define KVM_GMEM_CONVERT_PRIVATE _IOWR(0xaf, 0x42, struct kvm_gmem_convert)

enum { MIB_2 = 2 << 20, FILES = 64, SHOWN = 4 };
#define HUGE_GPA (1ULL << 30)

static bool stepwise;

/* A VM with one vCPU, and a file of huge pages, mapped here, from guest address HUGE_GPA on. */
struct fixture {
    struct machine m;
    int gmem;
    uint64_t huge, size, flags; /* bytes; flags that ask for this page size */
    uint8_t *memory;
};

static uint64_t huge_flags(int log2) { return GUEST_MEMFD_FLAG_HUGETLB | (uint64_t)log2 << PAGE_SIZE_SHIFT; }

/* The first four blocks of 2 MiB of the file, and of its second GiB, are what the guest has page tables for. */
static uint64_t guest_address(uint64_t offset) {
    uint64_t block = offset / MIB_2;

    return (block < SHOWN ? 1 + block : 1 + SHOWN + block - 512) * MIB_2 + offset % MIB_2;
}

static void open_fixture(struct fixture *f, int log2, unsigned pages, uint64_t flags) {
    size_t code_size = (size_t)(guest_exchange_end - guest_exchange);

    *f = (struct fixture){.huge = 1ULL << log2, .size = (uint64_t)pages << log2, .flags = huge_flags(log2)};
    if (open_machine(&f->m, KVM_X86_SW_PROTECTED_VM, guest_exchange, code_size)) bail_out("the VM");
    f->gmem = create_gmem(f->m.vm, f->size, f->flags | flags);
    if (f->gmem < 0) bail_out("KVM_CREATE_GUEST_MEMFD");
    if (flags & GUEST_MEMFD_FLAG_MMAP) f->memory = map_shared(f->gmem, f->size);
    else f->memory = mmap(NULL, f->size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->memory == MAP_FAILED) bail_out("mmap");
    if (set_region(f->m.vm, DATA_SLOT, HUGE_GPA, f->size, f->memory, f->gmem)) bail_out("the slot");
    for (int i = 0; i < 2 * SHOWN; i++) {
        uint64_t offset = (i < SHOWN ? 0 : 1ULL << 30) + (uint64_t)(i % SHOWN) * MIB_2;

        ((uint64_t *)(f->m.low + PD))[1 + i] = (HUGE_GPA + offset) | PTE_HUGE | PTE_PRESENT | PTE_WRITE;
    }
}

static void close_fixture(struct fixture *f) {
    if (f->memory) munmap(f->memory, f->size);
    if (f->gmem >= 0) close(f->gmem);
    if (f->m.vm >= 0) close_machine(&f->m);
}

/* One turn: read the byte at an offset, which must be `old`, and write `new` over it. */

static void host_turn(struct fixture *f, uint64_t offset, uint8_t old, uint8_t new) {
    volatile uint8_t *byte = f->memory + offset;

    CHECK(!access_is_refused(byte, -1), "offset %#lx", offset);
    CHECK(*byte == old, "offset %#lx: host reads %#x, not %#x", offset, *byte, old);
    *byte = new;
}

static void guest_turn(struct fixture *f, uint64_t offset, uint8_t old, uint8_t new) {
    uint8_t seen = 0;

    CHECK(run_guest(&f->m, guest_address(offset), new, &seen), "offset %#lx: exit %u, errno %d", offset,
          f->m.run->exit_reason, errno);
    CHECK(seen == old, "offset %#lx: guest reads %#x, not %#x", offset, seen, old);
}

/* Both families of calls say the same. */

enum family { ATTRIBUTES, CONVERT };

static int convert(struct fixture *f, enum family family, uint64_t offset, uint64_t size, bool private,
                   uint64_t *error_offset) {
    struct kvm_memory_attributes2 attributes = {
        .offset = offset, .size = size, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    struct kvm_gmem_convert range = {.offset = offset, .size = size};
    int result;

    if (family == ATTRIBUTES) result = ioctl(f->gmem, KVM_SET_MEMORY_ATTRIBUTES2, &attributes);
    else result = ioctl(f->gmem, private ? KVM_GMEM_CONVERT_PRIVATE : KVM_GMEM_CONVERT_SHARED, &range);
    *error_offset = family == ATTRIBUTES ? attributes.error_offset : range.error_offset;
    return result;
}

static void make(struct fixture *f, enum family family, uint64_t offset, uint64_t size, bool private) {
    uint64_t error_offset = 0;

    CHECK(!convert(f, family, offset, size, private, &error_offset), "offset %#lx, errno %d", offset, errno);
}

static void check_blocks(struct fixture *f, uint64_t huge_pages) {
    struct stat status, by_name;
    struct statx extended;

    CHECK(!fstat(f->gmem, &status), "errno %d", errno);
    CHECK((uint64_t)status.st_blksize == f->huge, "%ld", (long)status.st_blksize);
    CHECK((uint64_t)status.st_blocks * 512 == huge_pages * f->huge, "%ld", (long)status.st_blocks);
    CHECK((uint64_t)status.st_size == f->size, "%ld", (long)status.st_size);
    CHECK(!fstatat(f->gmem, "", &by_name, AT_EMPTY_PATH), "errno %d", errno);
    CHECK(by_name.st_blksize == status.st_blksize && by_name.st_blocks == status.st_blocks, "%ld",
          (long)by_name.st_blocks);
    CHECK(!statx(f->gmem, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &extended), "errno %d", errno);
    CHECK(extended.stx_blksize == f->huge && extended.stx_blocks == (uint64_t)status.st_blocks, "%lld",
          (long long)extended.stx_blocks);
}

/* The cases. `log2` is that of the page size. */

static void creation_refuses_nonsense(int log2) {
    struct fixture f = {.gmem = -1, .huge = 1ULL << log2, .flags = huge_flags(log2)};
    int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);

    CHECK(vm >= 0, "errno %d", errno);
    CHECK(capability(vm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGETLB, "not offered");
    CHECK_ERRNO(create_gmem(vm, f.huge, GUEST_MEMFD_FLAG_HUGETLB), EINVAL);
    CHECK_ERRNO(create_gmem(vm, f.huge, (uint64_t)log2 << PAGE_SIZE_SHIFT), EINVAL);
    for (int other = 1; other < 64; other++)
        if (other != 21 && other != 30) CHECK_ERRNO(create_gmem(vm, 1ULL << 40, huge_flags(other)), EINVAL);
    CHECK_ERRNO(create_gmem(vm, f.huge, f.flags | 1ULL << 3), EINVAL);
    CHECK_ERRNO(create_gmem(vm, f.huge, f.flags | 1ULL << 57), EINVAL);
    CHECK_ERRNO(create_gmem(vm, 0, f.flags), EINVAL);
    CHECK_ERRNO(create_gmem(vm, PAGE, f.flags), EINVAL);
    CHECK_ERRNO(create_gmem(vm, f.huge / 2, f.flags), EINVAL);
    CHECK_ERRNO(create_gmem(vm, f.huge + PAGE, f.flags), EINVAL);
    CHECK_ERRNO(create_gmem(vm, f.huge + 1, f.flags), EINVAL);
    CHECK_ERRNO(create_gmem(vm, -f.huge, f.flags), EINVAL);
    for (uint64_t others = 0; others < 4; others++) {
        int gmem = create_gmem(vm, f.huge, f.flags | others);

        CHECK(gmem >= 0, "flags %lu, errno %d", others, errno);
        close(gmem);
    }
    close(vm);
}

static int create_all(int vm, int log2, int gmems[FILES]) {
    int count = 0;

    while (count < FILES && (gmems[count] = create_gmem(vm, 1ULL << log2, huge_flags(log2))) >= 0) count++;
    return count;
}

static void close_all(int gmems[FILES], int count) {
    while (count-- > 0) close(gmems[count]);
}

static void what_is_reserved_is_nobody_elses(int log2) {
    int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM), gmems[FILES], count = create_all(vm, log2, gmems);

    if (count == FILES) SKIP_CASE("there are as many huge pages as one likes");
    CHECK(errno == ENOMEM, "errno %d", errno);
    CHECK_ERRNO(create_gmem(vm, 1ULL << log2, huge_flags(log2)), ENOMEM);
    int gmem = create_gmem(vm, PAGE, 0);
    CHECK(gmem >= 0, "pages of 4 KiB are not scarce; errno %d", errno);
    close(gmem);
    close(gmems[--count]);
    CHECK_ERRNO(create_gmem(vm, 2ULL << log2, huge_flags(log2)), ENOMEM);
    gmems[count] = create_gmem(vm, 1ULL << log2, huge_flags(log2));
    CHECK(gmems[count++] >= 0, "errno %d", errno);
    close_all(gmems, count);
    int again = create_all(vm, log2, gmems);
    CHECK(again == count, "%d, and before %d", again, count);
    close_all(gmems, again);
    close(vm);
}

static void stat_counts_huge_pages(struct fixture *f) {
    STEP(check_blocks(f, 0));
    CHECK_ERRNO(allocate(f->gmem, 0, PAGE), EINVAL);
    CHECK_ERRNO(allocate(f->gmem, PAGE, (off_t)f->huge), EINVAL);
    CHECK_ERRNO(allocate(f->gmem, 0, (off_t)f->huge + PAGE), EINVAL);
    CHECK_ERRNO(allocate(f->gmem, (off_t)f->size, (off_t)f->huge), EINVAL);
    STEP(check_blocks(f, 0));
    CHECK(!allocate(f->gmem, 0, (off_t)f->huge), "errno %d", errno);
    STEP(check_blocks(f, 1));
    STEP(guest_turn(f, f->huge + 7 * PAGE, 0, 'A')); /* one touch brings all of it */
    STEP(check_blocks(f, 2));
    STEP(guest_turn(f, f->huge, 0, 'B'));
    STEP(check_blocks(f, 2));
    CHECK(!punch(f->gmem, PAGE, PAGE), "errno %d", errno);
    STEP(check_blocks(f, 2));
    CHECK(!punch(f->gmem, (off_t)f->huge - PAGE, (off_t)f->huge), "errno %d", errno);
    STEP(check_blocks(f, 2)); /* a part of each, so none is freed */
    CHECK(!punch(f->gmem, 0, (off_t)f->huge), "errno %d", errno);
    STEP(check_blocks(f, 1));
    CHECK(!punch(f->gmem, 0, (off_t)f->size), "errno %d", errno);
    STEP(check_blocks(f, 0));
    STEP(guest_turn(f, f->huge + 7 * PAGE, 0, 'C'));
}

/* Offsets all over the file: the converted page, its neighbours, the ends of huge pages of both sizes. */
static const uint64_t places[] = {0, PAGE, 2 * PAGE, 3 * PAGE, MIB_2 - PAGE, MIB_2, 2 * MIB_2 + PAGE, 3 * MIB_2};
enum { PLACES = sizeof(places) / sizeof(*places), CONVERTED = 2 };

static void bytes_survive_split_and_merge(struct fixture *f, enum family there, enum family back) {
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], 0, (uint8_t)('a' + i)));
    for (int round = 0; round < 3; round++) {
        uint8_t was = (uint8_t)(round ? 'C' : 'a' + CONVERTED);

        STEP(make(f, there, places[CONVERTED], PAGE, false));
        STEP(host_turn(f, places[CONVERTED], was, 'A'));
        STEP(guest_turn(f, places[CONVERTED], 'A', 'B'));
        STEP(host_turn(f, places[CONVERTED], 'B', 'C'));
        CHECK_SIGBUS(f->memory + places[CONVERTED - 1], -1);
        CHECK_SIGBUS(f->memory + places[CONVERTED + 1], 'X');
        CHECK_SIGBUS(f->memory + f->huge, -1);
        for (int i = 0; i < PLACES; i++)
            if (i != CONVERTED) STEP(guest_turn(f, places[i], (uint8_t)('a' + i), (uint8_t)('a' + i)));
        STEP(make(f, back, places[CONVERTED], PAGE, true));
        CHECK_SIGBUS(f->memory + places[CONVERTED], -1);
        for (int i = 0; i < PLACES; i++)
            STEP(guest_turn(f, places[i], i == CONVERTED ? 'C' : (uint8_t)('a' + i),
                            i == CONVERTED ? 'C' : (uint8_t)('a' + i)));
    }
    STEP(make(f, there, 0, f->size, false)); /* all of it, and so on both sides of every border */
    for (int i = 0; i < PLACES; i++)
        STEP(host_turn(f, places[i], i == CONVERTED ? 'C' : (uint8_t)('a' + i), (uint8_t)('k' + i)));
    STEP(make(f, back, 0, f->size, true));
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], (uint8_t)('k' + i), 0));
    STEP(make(f, there, 0, 0, false)); /* nothing, which is no error of the second family */
}

static void by_calls_of_the_second_family(struct fixture *f) { STEP(bytes_survive_split_and_merge(f, CONVERT, CONVERT)); }

static void one_family_undoes_the_other(struct fixture *f) {
    struct kvm_gmem_convert range = {.size = PAGE, .error_offset = 1};
    uint64_t error_offset;

    CHECK_ERRNO(ioctl(f->gmem, KVM_GMEM_CONVERT_SHARED, &range), EINVAL);
    CHECK_ERRNO(convert(f, CONVERT, 1, PAGE, false, &error_offset), EINVAL);
    CHECK_ERRNO(convert(f, CONVERT, 0, PAGE + 1, false, &error_offset), EINVAL);
    CHECK_ERRNO(convert(f, CONVERT, f->size, PAGE, false, &error_offset), EINVAL);
    CHECK_ERRNO(convert(f, CONVERT, -(uint64_t)PAGE, 2 * PAGE, false, &error_offset), EINVAL);
    CHECK_ERRNO(ioctl(f->gmem, KVM_GMEM_CONVERT_PRIVATE, NULL), EFAULT);
    STEP(guest_turn(f, PAGE, 0, 'A'));
    STEP(make(f, ATTRIBUTES, PAGE, PAGE, false));
    STEP(host_turn(f, PAGE, 'A', 'B'));
    STEP(make(f, CONVERT, PAGE, PAGE, true));
    STEP(guest_turn(f, PAGE, 'B', 'C'));
    CHECK_SIGBUS(f->memory + PAGE, -1);
    STEP(make(f, CONVERT, PAGE, PAGE, false));
    STEP(host_turn(f, PAGE, 'C', 'D'));
    STEP(make(f, ATTRIBUTES, 0, f->huge, true));
    STEP(guest_turn(f, PAGE, 'D', 'E'));
}

static void born_shared_in_pages_of_4_kib(struct fixture *f) {
    for (int i = 0; i < PLACES; i++) STEP(host_turn(f, places[i], 0, (uint8_t)('a' + i)));
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], (uint8_t)('a' + i), (uint8_t)('k' + i)));
    STEP(make(f, CONVERT, 0, f->size, true));
    for (int i = 0; i < PLACES; i++) {
        CHECK_SIGBUS(f->memory + places[i], -1);
        STEP(guest_turn(f, places[i], (uint8_t)('k' + i), 'X'));
    }
}

static void a_hole_in_a_part_zeroes_it(struct fixture *f) {
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], 0, (uint8_t)('a' + i)));
    STEP(make(f, CONVERT, 3 * PAGE, PAGE, false));
    CHECK(!punch(f->gmem, 2 * PAGE, 2 * PAGE), "errno %d", errno); /* one private, one shared */
    STEP(host_turn(f, 3 * PAGE, 0, 'X'));
    for (int i = 0; i < PLACES; i++) {
        uint8_t expected = (uint8_t)(i == 2 ? 0 : i == 3 ? 'X' : 'a' + i);

        STEP(guest_turn(f, places[i], expected, expected));
    }
    CHECK(!punch(f->gmem, 0, (off_t)f->huge), "errno %d", errno);
    STEP(host_turn(f, 3 * PAGE, 0, 'Y')); /* it stays shared */
    CHECK_SIGBUS(f->memory + 2 * PAGE, -1);
    STEP(guest_turn(f, PAGE, 0, 'Z'));
}

/* Its memory may be of another kind: nobody but the guest gets at it. */
static void nobody_maps_it(struct fixture *f) {
    const uint64_t touched = f->huge == MIB_2 ? SHOWN : 1;

    CHECK_ERRNO((intptr_t)map_shared(f->gmem, f->size), ENODEV);
    if (f->huge == MIB_2) CHECK(!allocate(f->gmem, 0, (off_t)f->huge), "errno %d", errno);
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], 0, (uint8_t)('a' + i)));
    STEP(check_blocks(f, touched));
    CHECK(!punch(f->gmem, PAGE, PAGE), "errno %d", errno);
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], i == 1 ? 0 : (uint8_t)('a' + i), 'X'));
    CHECK(!punch(f->gmem, 0, (off_t)f->huge), "errno %d", errno);
    STEP(check_blocks(f, touched - 1));
    for (int i = 0; i < PLACES; i++) STEP(guest_turn(f, places[i], places[i] < f->huge ? 0 : 'X', 'Y'));
    STEP(check_blocks(f, touched));
}

static int pin(struct fixture *f, uint64_t offset) {
    struct pin_longterm_test pin = {
        .addr = (uint64_t)(uintptr_t)(f->memory + offset), .size = PAGE, .flags = PIN_FOR_WRITE};
    int gup = open(GUP_TEST, O_RDWR);

    if (gup >= 0 && ioctl(gup, PIN_LONGTERM_TEST_START, &pin)) bail_out("a pin");
    return gup;
}

/* In the second huge page of all of which a page is pinned. What comes before it is converted if it goes by steps. */
static void a_pinned_page_is_busy(struct fixture *f) {
    const uint64_t busy = f->huge + 5 * PAGE;
    uint64_t error_offset = 0;

    STEP(make(f, CONVERT, 0, f->size, false));
    STEP(host_turn(f, 0, 0, 'A'));
    STEP(host_turn(f, busy, 0, 'B'));
    int gup = pin(f, busy);
    if (gup < 0) SKIP_CASE("no " GUP_TEST);
    for (int family = ATTRIBUTES; family <= CONVERT; family++) {
        CHECK_ERRNO(convert(f, (enum family)family, 0, f->size, true, &error_offset), EAGAIN);
        CHECK(error_offset == (stepwise ? f->huge : busy), "error_offset %#lx", error_offset);
        if (stepwise) CHECK_SIGBUS(f->memory, -1);
        else STEP(host_turn(f, 0, 'A', 'A'));
        STEP(host_turn(f, busy, 'B', 'B'));
    }
    STEP(make(f, CONVERT, f->huge, 5 * PAGE, true)); /* its neighbours can be had */
    CHECK_ERRNO(punch(f->gmem, (off_t)f->huge, (off_t)f->huge), EAGAIN);
    STEP(host_turn(f, busy, 'B', 'C'));
    CHECK(!ioctl(gup, PIN_LONGTERM_TEST_STOP), "errno %d", errno);
    close(gup);
    STEP(make(f, ATTRIBUTES, 0, f->size, true));
    STEP(guest_turn(f, 0, 'A', 0));
    STEP(guest_turn(f, busy, 'C', 0));
    CHECK(!punch(f->gmem, (off_t)f->huge, (off_t)f->huge), "errno %d", errno);
}

static void memory_comes_back_at_the_last_put(struct fixture *f) {
    int log2 = f->huge == MIB_2 ? 21 : 30, gmems[FILES], vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);

    STEP(make(f, CONVERT, PAGE, PAGE, false));
    STEP(host_turn(f, PAGE, 0, 'A'));
    int gup = pin(f, PAGE);
    if (gup < 0) SKIP_CASE("no " GUP_TEST);
    close_fixture(f);
    f->memory = NULL;
    f->gmem = f->m.vm = -1;
    int while_pinned = create_all(vm, log2, gmems);
    close_all(gmems, while_pinned);
    if (while_pinned == FILES) SKIP_CASE("there are as many huge pages as one likes");
    CHECK(!ioctl(gup, PIN_LONGTERM_TEST_STOP), "errno %d", errno);
    close(gup);
    int afterwards = create_all(vm, log2, gmems);
    close_all(gmems, afterwards);
    CHECK(afterwards == while_pinned + 1, "%d huge pages, %d while one was pinned", afterwards, while_pinned);
    close(vm);
}

static const struct {
    const char *name;
    void (*run)(struct fixture *);
    uint64_t flags;
} cases[] = {
    {"stat counts huge pages", stat_counts_huge_pages, GUEST_MEMFD_FLAG_MMAP},
    {"bytes survive split and merge", by_calls_of_the_second_family, GUEST_MEMFD_FLAG_MMAP},
    {"one family undoes the other", one_family_undoes_the_other, GUEST_MEMFD_FLAG_MMAP},
    {"born shared, in pages of 4 KiB", born_shared_in_pages_of_4_kib,
     GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED},
    {"a hole in a part zeroes it", a_hole_in_a_part_zeroes_it, GUEST_MEMFD_FLAG_MMAP},
    {"nobody maps it", nobody_maps_it, 0},
    {"a pinned page is busy", a_pinned_page_is_busy, GUEST_MEMFD_FLAG_MMAP},
    {"memory comes back at the last put", memory_comes_back_at_the_last_put, GUEST_MEMFD_FLAG_MMAP},
};

static void run_size(int log2, const char *name) {
    begin_case();
    creation_refuses_nonsense(log2);
    end_case(name, "creation refuses nonsense");
    begin_case();
    what_is_reserved_is_nobody_elses(log2);
    end_case(name, "what is reserved is nobody else's");
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct fixture f;

        begin_case();
        open_fixture(&f, log2, log2 == 21 ? SHOWN : 2, cases[i].flags);
        cases[i].run(&f);
        close_fixture(&f);
        end_case(name, cases[i].name);
    }
}

int main(int count, char **arguments) {
    stepwise = count > 1 && !strcmp(arguments[1], "stepwise");
    open_kvm();
    if (!(capability(kvm, KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_HUGETLB)) skip_all("no files of huge pages");
    run_size(21, "2M: ");
    run_size(30, "1G: ");
    return finish();
}
