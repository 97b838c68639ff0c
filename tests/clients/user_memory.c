/*
 * Guest memory is the client's memory: what the client does to its own mappings the guest sees, and the other way round.
 * userfaultfd, madvise, fork, pins, files that are cut, mappings that go, change or move, under a slot that stays.
 * It passes unchanged on a real /dev/kvm, but for what a machine's CPU back end makes of an access that has no page.
 */
#define _GNU_SOURCE
#include "client.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif

/* test ch, ch; jz 1f; mov [rbx], cl; 1: mov al, [rbx]; out 16, al */
static const uint8_t either[] = {0x84, 0xed, 0x74, 0x02, 0x88, 0x0b, 0x8a, 0x03, 0xe6, 0x10};
enum { STORE = 0x100, PAGES = 8, FAULTS_AT_LOAD = CODE + 6, FAULTS_AT_STORE = CODE + 4 };

static uint8_t *anonymous(void) {
    return mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void open_on(struct machine *m, void *memory) {
    CHECK(memory != MAP_FAILED, "errno %d", errno);
    CHECK(!open_machine(m, 0, either, sizeof(either)), "errno %d", errno);
    CHECK(!set_region(m->vm, DATA_SLOT, DATA_GPA, PAGES * PAGE, memory, -1), "errno %d", errno);
}

static void reads(struct machine *m, int page, uint8_t expected) {
    uint8_t byte = 0;
    CHECK(run_guest(m, DATA_GPA + (uint64_t)page * PAGE, 0, &byte), "page %d: exit %u errno %d", page, m->run->exit_reason, errno);
    CHECK(byte == expected, "page %d: %d, not %d", page, byte, expected);
}

static void writes(struct machine *m, int page, uint8_t value) {
    uint8_t byte = 0;
    CHECK(run_guest(m, DATA_GPA + (uint64_t)page * PAGE, STORE | value, &byte), "page %d: errno %d", page, errno);
    CHECK(byte == value, "page %d: %d, not %d", page, byte, value);
}

/* The page cannot be had: KVM_RUN fails with EFAULT at the very instruction, and says which page. */
static void faults(struct machine *m, int page, bool write) {
    struct kvm_regs regs;
    uint8_t byte;
    uint64_t gpa = DATA_GPA + (uint64_t)page * PAGE;
    const uint64_t *fault = (const void *)&m->run->hw; /* flags, gpa, size */

    bool ran = run_guest(m, gpa, write ? STORE | 1 : 0, &byte);
    int error = errno;
    CHECK(!ran, "page %d was touched", page);
    if (m->run->exit_reason == KVM_EXIT_MMIO) SKIP_CASE("this CPU back end makes MMIO of it");
    CHECK(error == EFAULT && m->run->exit_reason == KVM_EXIT_MEMORY_FAULT, "errno %d exit %u", error, m->run->exit_reason);
    CHECK(fault[1] == gpa && fault[2] == PAGE, "gpa %#llx", (unsigned long long)fault[1]);
    CHECK(!ioctl(m->vcpu, KVM_GET_REGS, &regs), "errno %d", errno);
    uint64_t rip = write ? FAULTS_AT_STORE : FAULTS_AT_LOAD;
    CHECK(regs.rip == rip && regs.rbx == gpa, "rip %#llx", (unsigned long long)regs.rip);
}

static void what_the_host_writes_the_guest_reads(void) {
    struct machine m;
    uint8_t *memory = anonymous();

    STEP(open_on(&m, memory));
    memory[0] = 7;
    STEP(reads(&m, 0, 7));
    memory[0] = 8;
    STEP(reads(&m, 0, 8));
    STEP(writes(&m, 0, 9));
    CHECK(memory[0] == 9, "%d", memory[0]);
    close_machine(&m);
}

/* ---- userfaultfd */

static int uffd;
static volatile int served;

static void *serve(void *memory) {
    static uint8_t page[PAGE] __attribute__((aligned(PAGE)));
    struct pollfd poll_for = {uffd, POLLIN, 0};

    while (poll(&poll_for, 1, 2000) > 0 && poll_for.revents == POLLIN) {
        struct uffd_msg message;
        if (read(uffd, &message, sizeof(message)) != sizeof(message)) continue;
        uint64_t address = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
        memset(page, (int)(100 + (address - (uintptr_t)memory) / PAGE), PAGE);
        struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)page, .len = PAGE};
        served++;
        if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST) break;
    }
    return NULL;
}

static void a_userfaultfd_serves_the_guest(void) {
    struct machine m;
    pthread_t thread;
    uint8_t *memory = anonymous();
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(uintptr_t)memory, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};

    STEP(open_on(&m, memory));
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0) SKIP_CASE("no userfaultfd for faults of the kernel: errno %d", errno);
    CHECK(!ioctl(uffd, UFFDIO_API, &api) && !ioctl(uffd, UFFDIO_REGISTER, &range), "errno %d", errno);
    served = 0;
    CHECK(!pthread_create(&thread, NULL, serve, memory), "no thread");
    STEP(reads(&m, 3, 103));
    CHECK(served == 1, "%d", served);
    STEP(writes(&m, 5, 55));
    CHECK(served == 2 && memory[5 * PAGE] == 55 && memory[5 * PAGE + 1] == 105, "%d", served);
    CHECK(!madvise(memory + 5 * PAGE, PAGE, MADV_DONTNEED), "errno %d", errno);
    STEP(reads(&m, 5, 105));
    CHECK(served == 3, "%d", served);
    close(uffd);
    pthread_join(thread, NULL);
    close_machine(&m);
}

/* ---- madvise */

static bool is_resident(void *page) {
    unsigned char resident = 0;
    return !mincore(page, PAGE, &resident) && resident & 1;
}

static void dropped_pages_read_as_zero(void) {
    struct machine m;
    uint8_t *memory = anonymous();

    STEP(open_on(&m, memory));
    for (int page = 0; page < PAGES; page++) STEP(writes(&m, page, (uint8_t)(10 + page)));
    CHECK(!madvise(memory + 2 * PAGE, PAGE, MADV_DONTNEED), "errno %d", errno);
    CHECK(!is_resident(memory + 2 * PAGE), "it is still there");
    STEP(reads(&m, 2, 0));
    STEP(reads(&m, 3, 13));
    close_machine(&m);
}

static void holes_in_a_shared_file_read_as_zero(void) {
    struct machine m;
    int file = memfd_create("memory", 0);

    CHECK(!ftruncate(file, PAGES * PAGE), "errno %d", errno);
    uint8_t *memory = map_shared(file, PAGES * PAGE);
    STEP(open_on(&m, memory));
    STEP(writes(&m, 2, 12));
    CHECK(!madvise(memory + 2 * PAGE, PAGE, MADV_DONTNEED), "errno %d", errno);
    STEP(reads(&m, 2, 12));
    CHECK(!madvise(memory + 2 * PAGE, PAGE, MADV_REMOVE), "errno %d", errno);
    STEP(reads(&m, 2, 0));
    STEP(writes(&m, 4, 14));
    CHECK(!punch(file, 4 * PAGE, PAGE), "errno %d", errno);
    STEP(reads(&m, 4, 0));
    close_machine(&m);
    close(file);
}

/* ---- fork */

static void a_child_has_its_own_copy(void) {
    struct machine m;
    uint8_t *memory = anonymous();
    int go[2], saw[2];
    uint8_t seen[3] = {0};

    STEP(open_on(&m, memory));
    STEP(writes(&m, 0, 11));
    CHECK(!pipe(go) && !pipe(saw), "errno %d", errno);
    pid_t child = fork();
    if (!child) {
        char byte;
        bool told = read(go[0], &byte, 1) == 1;
        uint8_t mine[3] = {memory[0], memory[PAGE], memory[2 * PAGE]};
        memory[3 * PAGE] = 99;
        _exit(told && write(saw[1], mine, sizeof(mine)) == sizeof(mine) ? 0 : 1);
    }
    STEP(writes(&m, 0, 21));
    STEP(writes(&m, 1, 22));
    memory[2 * PAGE] = 55;
    CHECK(write(go[1], "", 1) == 1 && read(saw[0], seen, sizeof(seen)) == sizeof(seen), "errno %d", errno);
    CHECK(seen[0] == 11 && seen[1] == 0 && seen[2] == 0, "child saw %d %d %d", seen[0], seen[1], seen[2]);
    STEP(reads(&m, 3, 0));
    waitpid(child, NULL, 0);
    close_machine(&m);
}

/* A VM forked away from its memory: the parent's guest goes on while children come and go. */
static void children_come_and_go(void) {
    struct machine m;
    uint8_t *memory = anonymous();

    STEP(open_on(&m, memory));
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) {
            memory[0] = 200;
            _exit(memory[1] == 0 ? 0 : 1);
        }
        STEP(writes(&m, 0, (uint8_t)i));
        int status = 0;
        waitpid(child, &status, 0);
        CHECK(!status && memory[0] == i, "status %#x, %d", status, memory[0]);
    }
    close_machine(&m);
}

/* ---- pins that were taken before the guest ran */

static void a_page_in_a_pipe_is_the_guests(void) {
    struct machine m;
    uint8_t *memory = anonymous(), got[PAGE];
    int pipes[2];

    STEP(open_on(&m, memory));
    memory[PAGE] = 5;
    CHECK(!pipe(pipes), "errno %d", errno);
    struct iovec part = {memory + PAGE, PAGE};
    CHECK(vmsplice(pipes[1], &part, 1, 0) == PAGE, "errno %d", errno);
    STEP(writes(&m, 1, 77));
    CHECK(read(pipes[0], got, PAGE) == PAGE && got[0] == 77, "the pipe has %d", got[0]);
    close(pipes[0]);
    close(pipes[1]);
    close_machine(&m);
}

/* ---- memory that cannot be had */

static void a_file_that_is_cut(void) {
    struct machine m;
    int file = memfd_create("cut", 0);

    CHECK(!ftruncate(file, PAGES * PAGE), "errno %d", errno);
    STEP(open_on(&m, map_shared(file, PAGES * PAGE)));
    STEP(writes(&m, 1, 5));
    CHECK(!ftruncate(file, PAGE), "errno %d", errno);
    STEP(faults(&m, 1, false));
    STEP(faults(&m, 1, true));
    STEP(writes(&m, 0, 6));
    CHECK(!ftruncate(file, PAGES * PAGE), "errno %d", errno);
    STEP(reads(&m, 1, 0));
    close_machine(&m);
    close(file);
}

static void a_slot_that_is_unmapped(void) {
    struct machine m;
    uint8_t *memory = anonymous();

    STEP(open_on(&m, memory));
    STEP(writes(&m, 1, 5));
    munmap(memory + PAGE, PAGE);
    STEP(faults(&m, 1, false));
    STEP(writes(&m, 2, 6));
    void *again = mmap(memory + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(again == memory + PAGE, "errno %d", errno);
    memory[PAGE] = 9;
    STEP(reads(&m, 1, 9));
    close_machine(&m);
}

static void protections_are_the_guests_too(void) {
    struct machine m;
    uint8_t *memory = anonymous();

    STEP(open_on(&m, memory));
    STEP(writes(&m, 1, 5));
    CHECK(!mprotect(memory + PAGE, PAGE, PROT_READ), "errno %d", errno);
    STEP(reads(&m, 1, 5));
    STEP(faults(&m, 1, true));
    CHECK(!mprotect(memory + PAGE, PAGE, PROT_NONE), "errno %d", errno);
    STEP(faults(&m, 1, false));
    CHECK(!mprotect(memory + PAGE, PAGE, PROT_READ | PROT_WRITE), "errno %d", errno);
    STEP(writes(&m, 1, 6));
    close_machine(&m);
}

static void memory_that_was_moved_away(void) {
    struct machine m;
    uint8_t *memory = anonymous();

    STEP(open_on(&m, memory));
    STEP(writes(&m, 1, 5));
    uint8_t *moved = mremap(memory + PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, memory + 4 * PAGE);
    CHECK(moved == memory + 4 * PAGE, "errno %d", errno);
    STEP(reads(&m, 4, 5));
    STEP(faults(&m, 1, false));
    close_machine(&m);
}

static void a_private_mapping_of_a_file_is_copied_on_write(void) {
    struct machine m;
    uint8_t byte = 0;
    int file = memfd_create("image", 0);

    CHECK(!ftruncate(file, PAGES * PAGE) && pwrite(file, "A", 1, PAGE) == 1, "errno %d", errno);
    uint8_t *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    STEP(open_on(&m, memory));
    STEP(reads(&m, 1, 'A'));
    STEP(writes(&m, 1, 'B'));
    CHECK(pread(file, &byte, 1, PAGE) == 1 && byte == 'A', "the file has %d", byte);
    CHECK(memory[PAGE] == 'B', "%d", memory[PAGE]);
    close_machine(&m);
    close(file);
}

static void huge_pages(void) {
    enum { HUGE = 2 << 20 };
    struct machine m;
    uint8_t byte = 0, *memory = mmap(NULL, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

    if (memory == MAP_FAILED) SKIP_CASE("this machine has no huge page free");
    CHECK(!open_machine(&m, 0, either, sizeof(either)), "errno %d", errno);
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, PAGES * PAGE, memory, -1), "errno %d", errno);
    CHECK(run_guest(&m, DATA_GPA, STORE | 5, &byte) && memory[0] == 5, "%d", memory[0]);
    close_machine(&m);
    munmap(memory, HUGE);
}

static void a_slot_that_goes_is_gone(void) {
    struct machine m;
    uint8_t byte, *memory = anonymous();

    STEP(open_on(&m, memory));
    STEP(writes(&m, 1, 5));
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, 0, memory, -1), "errno %d", errno);
    CHECK(!run_guest(&m, DATA_GPA + PAGE, 0, &byte), "the guest still reads it");
    CHECK(m.run->exit_reason == KVM_EXIT_MMIO && m.run->mmio.phys_addr == DATA_GPA + PAGE, "exit %u", m.run->exit_reason);
    m.run->immediate_exit = 1; /* the load is finished with what mmio.data has */
    ioctl(m.vcpu, KVM_RUN, 0);
    m.run->immediate_exit = 0;
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, PAGES * PAGE, memory, -1), "errno %d", errno);
    STEP(reads(&m, 1, 5));
    close_machine(&m);
}

int main(void) {
    static const struct test_case cases[] = {
        {"what the host writes the guest reads", what_the_host_writes_the_guest_reads},
        {"a userfaultfd serves the guest", a_userfaultfd_serves_the_guest},
        {"dropped pages read as zero, and are given back", dropped_pages_read_as_zero},
        {"holes in a shared file read as zero", holes_in_a_shared_file_read_as_zero},
        {"a child has its own copy", a_child_has_its_own_copy},
        {"children come and go", children_come_and_go},
        {"a page in a pipe is the guest's", a_page_in_a_pipe_is_the_guests},
        {"a file that is cut", a_file_that_is_cut},
        {"a slot that is unmapped", a_slot_that_is_unmapped},
        {"protections are the guest's, too", protections_are_the_guests_too},
        {"memory that was moved away", memory_that_was_moved_away},
        {"a private mapping of a file is copied on write", a_private_mapping_of_a_file_is_copied_on_write},
        {"huge pages", huge_pages},
        {"a slot that goes is gone", a_slot_that_goes_is_gone},
    };

    open_kvm();
    return run_cases(cases, sizeof(cases) / sizeof(cases[0]));
}
