/*
 * Conversion in place, seen from a plain KVM client: a software-protected VM whose guest and host take turns in reading
 * and writing the pages of one mapped guest_memfd, while KVM_SET_MEMORY_ATTRIBUTES2 makes them private and shared.
 * The nine cases of upstream's posted guest_memfd_conversions_test (v8), in our own words, and what the ioctl refuses.
 * Runs under `guestmem run --abi v7.4`; no kernel that is released has the ioctl.
 */
#define _GNU_SOURCE
#include "exchange.h"

#include <sys/wait.h>

/* A VM with one vCPU, and one file that is all of its data memory and mapped here. */
struct fixture {
    struct machine m;
    int gmem;
    size_t pages;
    uint8_t *memory;
};

static void open_fixture(struct fixture *f, size_t pages, uint64_t flags) {
    size_t code_size = (size_t)(guest_exchange_end - guest_exchange);

    *f = (struct fixture){.gmem = -1, .pages = pages};
    if (open_machine(&f->m, KVM_X86_SW_PROTECTED_VM, guest_exchange, code_size)) bail_out("the VM");
    f->gmem = create_gmem(f->m.vm, pages * PAGE, flags);
    if (f->gmem < 0) bail_out("KVM_CREATE_GUEST_MEMFD");
    f->memory = map_shared(f->gmem, pages * PAGE);
    if (f->memory == MAP_FAILED) bail_out("mmap of the guest_memfd");
    if (set_region(f->m.vm, DATA_SLOT, DATA_GPA, pages * PAGE, f->memory, f->gmem)) bail_out("the data slot");
}

static void close_fixture(struct fixture *f) {
    munmap(f->memory, f->pages * PAGE);
    close(f->gmem);
    close_machine(&f->m);
}

/* The ioctl; in-place conversion names bytes of the file, not guest addresses. */
static int convert(struct fixture *f, size_t page, size_t pages, uint64_t attributes, uint64_t *error_offset) {
    struct kvm_memory_attributes2 request = {
        .offset = page * PAGE,
        .size = pages * PAGE,
        .attributes = attributes,
        .error_offset = *error_offset,
    };
    int result = ioctl(f->gmem, KVM_SET_MEMORY_ATTRIBUTES2, &request);

    *error_offset = request.error_offset;
    return result;
}

static void make_private(struct fixture *f, size_t page, size_t pages) {
    uint64_t error_offset = 0;

    CHECK(!convert(f, page, pages, KVM_MEMORY_ATTRIBUTE_PRIVATE, &error_offset), "page %zu, errno %d", page, errno);
}

static void make_shared(struct fixture *f, size_t page, size_t pages) {
    uint64_t error_offset = 0;

    CHECK(!convert(f, page, pages, 0, &error_offset), "page %zu, errno %d", page, errno);
}

/* The request is refused as busy, and names the first page that is. */
static void check_busy(struct fixture *f, size_t page, size_t pages, size_t busy) {
    uint64_t error_offset = ~0ULL;

    CHECK_ERRNO(convert(f, page, pages, KVM_MEMORY_ATTRIBUTE_PRIVATE, &error_offset), EAGAIN);
    CHECK(error_offset == busy * PAGE, "error_offset %#llx", (unsigned long long)error_offset);
}

/* One turn: read the first byte of a page, which must be `old`, and write `new` over it. */

static void host_turn(struct fixture *f, size_t page, uint8_t old, uint8_t new) {
    volatile uint8_t *byte = f->memory + page * PAGE;

    CHECK(!access_is_refused(byte, -1), "page %zu", page);
    CHECK(*byte == old, "page %zu: host reads %#x, not %#x", page, *byte, old);
    *byte = new;
}

static void guest_turn(struct fixture *f, size_t page, uint8_t old, uint8_t new) {
    uint8_t seen = 0;

    CHECK(run_guest(&f->m, DATA_GPA + page * PAGE, new, &seen), "page %zu: exit %u, errno %d", page,
          f->m.run->exit_reason, errno);
    CHECK(seen == old, "page %zu: guest reads %#x, not %#x", page, seen, old);
}

/* Only the guest gets to a private page. */
static void private_turns(struct fixture *f, size_t page, uint8_t old, uint8_t new) {
    CHECK_SIGBUS(f->memory + page * PAGE, new);
    STEP(guest_turn(f, page, old, new));
    CHECK_SIGBUS(f->memory + page * PAGE, -1);
}

/* Host and guest see what the other wrote on a shared one. */
static void shared_turns(struct fixture *f, size_t page, uint8_t old, uint8_t by_host, uint8_t by_guest) {
    STEP(host_turn(f, page, old, by_host));
    STEP(guest_turn(f, page, by_host, by_guest));
    STEP(host_turn(f, page, by_guest, by_guest));
}

/* The nine cases. `page` counts through all pages of the file in those that are run once for each. */

static void born_private(struct fixture *f, size_t page) {
    STEP(private_turns(f, page, 0, 'A'));
    STEP(make_shared(f, page, 1));
    STEP(shared_turns(f, page, 'A', 'B', 'C'));
    STEP(make_private(f, page, 1));
    STEP(private_turns(f, page, 'C', 'D'));
}

static void born_shared(struct fixture *f, size_t page) {
    STEP(shared_turns(f, page, 0, 'A', 'B'));
    STEP(make_private(f, page, 1));
    STEP(private_turns(f, page, 'B', 'C'));
    STEP(make_shared(f, page, 1));
    STEP(shared_turns(f, page, 'C', 'D', 'E'));
}

/* A byte that tells both the page and the round. */
static uint8_t mark(size_t page, int round) { return (uint8_t)(page * 16 + round); }

static void one_page_alone(struct fixture *f, size_t page) {
    for (size_t i = f->pages; i-- > 0;) STEP(shared_turns(f, i, 0, mark(i, 1), mark(i, 2)));
    STEP(make_private(f, page, 1));
    for (size_t i = 0; i < f->pages; i++) {
        if (i == page) STEP(private_turns(f, i, mark(i, 2), mark(i, 4)));
        else STEP(shared_turns(f, i, mark(i, 2), mark(i, 3), mark(i, 4)));
    }
    STEP(make_shared(f, page, 1));
    for (size_t i = 0; i < f->pages; i++) STEP(shared_turns(f, i, mark(i, 4), mark(i, 5), mark(i, 6)));
}

static void to_private_before_the_first_touch(struct fixture *f, size_t page) {
    STEP(make_private(f, page, 1));
    STEP(private_turns(f, page, 0, 'A'));
}

static void to_shared_before_the_first_touch(struct fixture *f, size_t page) {
    STEP(make_shared(f, page, 1));
    STEP(shared_turns(f, page, 0, 'A', 'B'));
}

static void some_pages_are_not_there(struct fixture *f, size_t page) {
    const size_t fixed = f->pages / 2; /* with `page` moving around it, every layout of present and absent pages */

    STEP(host_turn(f, page, 0, 'A'));
    if (page != fixed) STEP(host_turn(f, fixed, 0, 'A'));
    STEP(make_private(f, 0, f->pages));
    for (size_t i = 0; i < f->pages; i++) STEP(private_turns(f, i, i == page || i == fixed ? 'A' : 0, 'B'));
    for (size_t i = 0; i < f->pages; i++) {
        STEP(make_shared(f, i, 1));
        STEP(shared_turns(f, i, 'B', 'C', 'D'));
    }
}

static void a_hole_keeps_the_state(struct fixture *f, size_t page) {
    STEP(host_turn(f, page, 0, 'A'));
    CHECK(!punch(f->gmem, (off_t)page * PAGE, PAGE), "errno %d", errno);
    STEP(host_turn(f, page, 0, 'A'));
    STEP(make_private(f, page, 1));
    STEP(private_turns(f, page, 'A', 'B'));
    CHECK(!punch(f->gmem, (off_t)page * PAGE, PAGE), "errno %d", errno);
    STEP(private_turns(f, page, 0, 'C'));
}

/* The other process: touches the page while it is shared, says so, waits, and must then be refused. */
static int child_of_fork(struct fixture *f, int to_parent, int from_parent) {
    volatile uint8_t *byte = f->memory;
    char token = 0;

    if (access_is_refused(byte, -1) || *byte != 'B') return 1;
    *byte = 'C';
    if (write(to_parent, &token, 1) != 1 || read(from_parent, &token, 1) != 1) return 2;
    if (!access_is_refused(byte, -1)) return 3;
    return access_is_refused(byte, 'X') ? 0 : 4;
}

static void every_process_loses_the_page(struct fixture *f, size_t page) {
    int up[2], down[2], status = -1;
    char token = 0;

    STEP(shared_turns(f, page, 0, 'A', 'B'));
    CHECK(!pipe(up) && !pipe(down), "errno %d", errno);
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0, "errno %d", errno);
    if (!child) { /* holds no end of a pipe that is not its own: it ends with its parent, whatever happens */
        close(up[0]);
        close(down[1]);
        _exit(child_of_fork(f, up[1], down[0]));
    }
    close(up[1]);
    close(down[0]);
    CHECK(read(up[0], &token, 1) == 1, "the child has ended early");
    STEP(make_private(f, page, 1));
    STEP(private_turns(f, page, 'C', 'D'));
    CHECK(write(down[1], &token, 1) == 1, "errno %d", errno);
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child's status is %#x", status);
    close(up[0]);
    close(down[1]);
}

static void a_pinned_page_is_busy(struct fixture *f, size_t page) {
    struct pin_longterm_test pin = {
        .addr = (uint64_t)(uintptr_t)(f->memory + page * PAGE), .size = PAGE, .flags = PIN_FOR_WRITE};
    int gup = open(GUP_TEST, O_RDWR);

    if (gup < 0) SKIP_CASE("no " GUP_TEST);
    CHECK(!ioctl(gup, PIN_LONGTERM_TEST_START, &pin), "errno %d", errno);
    for (size_t i = 0; i < f->pages; i++) STEP(shared_turns(f, i, 0, 'A', 'B'));
    STEP(check_busy(f, 0, f->pages, page)); /* all or nothing: no page has changed */
    for (size_t i = 0; i < f->pages; i++) {
        if (i == page) {
            STEP(check_busy(f, i, 1, page));
            STEP(shared_turns(f, i, 'B', 'C', 'D'));
        } else {
            STEP(shared_turns(f, i, 'B', 'C', 'D'));
            STEP(make_private(f, i, 1));
            STEP(private_turns(f, i, 'D', 'E'));
        }
    }
    CHECK(!ioctl(gup, PIN_LONGTERM_TEST_STOP), "errno %d", errno);
    close(gup);
    STEP(make_private(f, 0, f->pages));
    for (size_t i = 0; i < f->pages; i++) STEP(private_turns(f, i, i == page ? 'D' : 'E', 'F'));
}

/* What the ioctl refuses; none of it changes anything. */

static int ask(struct fixture *f, struct kvm_memory_attributes2 request) {
    return ioctl(f->gmem, KVM_SET_MEMORY_ATTRIBUTES2, &request);
}

static void nonsense_is_refused(struct fixture *f, size_t page) {
    const uint64_t size = f->pages * PAGE, private = KVM_MEMORY_ATTRIBUTE_PRIVATE;
    struct kvm_memory_attributes2 whole = {.size = size, .attributes = private}, request;

    STEP(host_turn(f, page, 0, 'A'));
    for (int bit = 0; bit < 64; bit++) {
        request = whole;
        request.flags = 1ULL << bit;
        CHECK_ERRNO(ask(f, request), EINVAL);
        request = whole;
        request.attributes |= 1ULL << bit;
        if (request.attributes != private) CHECK_ERRNO(ask(f, request), EINVAL);
    }
    for (int word = 0; word < 11; word++) {
        request = whole;
        request.reserved[word] = 1;
        CHECK_ERRNO(ask(f, request), EINVAL);
    }
    CHECK_ERRNO(ask(f, (struct kvm_memory_attributes2){.size = 0, .attributes = private}), EINVAL);
    CHECK_ERRNO(ask(f, (struct kvm_memory_attributes2){.size = 1, .attributes = private}), EINVAL);
    CHECK_ERRNO(ask(f, (struct kvm_memory_attributes2){.offset = 1, .size = PAGE, .attributes = private}), EINVAL);
    CHECK_ERRNO(ask(f, (struct kvm_memory_attributes2){.offset = size, .size = PAGE, .attributes = private}), EINVAL);
    CHECK_ERRNO(ask(f, (struct kvm_memory_attributes2){.size = size + PAGE, .attributes = private}), EINVAL);
    CHECK_ERRNO(ask(f, (struct kvm_memory_attributes2){.offset = -PAGE, .size = PAGE, .attributes = private}), EINVAL);
    CHECK_ERRNO(ioctl(f->gmem, KVM_SET_MEMORY_ATTRIBUTES2, NULL), EFAULT);
    CHECK_ERRNO(ioctl(f->gmem, KVM_CREATE_VCPU, 0), ENOTTY);
    STEP(host_turn(f, page, 'A', 'B'));
}

/* On which file a case runs: its pages, whether it is born shared, and whether the case runs once for each page. */
static const struct {
    const char *name;
    void (*run)(struct fixture *, size_t page);
    size_t pages;
    bool shared, each_page;
} cases[] = {
    {"born private", born_private, 1, false, false},
    {"born shared", born_shared, 1, true, false},
    {"one page alone", one_page_alone, 4, true, true},
    {"to private before the first touch", to_private_before_the_first_touch, 1, true, false},
    {"to shared before the first touch", to_shared_before_the_first_touch, 1, false, false},
    {"some pages are not there", some_pages_are_not_there, 8, true, true},
    {"a hole keeps the state", a_hole_keeps_the_state, 1, true, false},
    {"every process loses the page", every_process_loses_the_page, 1, true, false},
    {"a pinned page is busy", a_pinned_page_is_busy, 4, true, true},
    {"nonsense is refused", nonsense_is_refused, 4, true, false},
};

int main(void) {
    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> KVM_X86_SW_PROTECTED_VM & 1)) skip_all("no software-protected VM");
    if (!(capability(kvm, KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE))
        skip_all("no conversion in place");
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        uint64_t flags = GUEST_MEMFD_FLAG_MMAP | (cases[i].shared ? GUEST_MEMFD_FLAG_INIT_SHARED : 0);

        begin_case();
        for (size_t page = 0; page < (cases[i].each_page ? cases[i].pages : 1); page++) {
            struct fixture f;

            open_fixture(&f, cases[i].pages, flags);
            cases[i].run(&f, page);
            close_fixture(&f);
            if (tap.failed || tap.skipped) break;
        }
        end_case("", cases[i].name);
    }
    return finish();
}
