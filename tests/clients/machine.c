/*
 * What VMMs ask of KVM besides memory: state of a vCPU read back as it was written, the dirty log, writes that are no
 * exits (ioeventfd, coalesced MMIO), and ordinary memory that guest and host write at the same time, with other threads
 * of the VMM running. It passes unchanged on a real /dev/kvm.
 */
#define _GNU_SOURCE
#include "client.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/resource.h>

static const uint8_t store_at_rbx[] = {0x88, 0x0b, 0xe6, 0x10};    /* mov [rbx], cl; out 16, al */
static const uint8_t store_4_at_rbx[] = {0x89, 0x0b, 0xe6, 0x10};  /* mov [rbx], ecx; out 16, al */
static const uint8_t port_then_out[] = {0xe6, 0x20, 0xe6, 0x10};   /* out 32, al; out 16, al */
/* again: lock inc dword [rbx]; dec rcx; jnz again; out 16, al */
static const uint8_t count_at_rbx[] = {0xf0, 0xff, 0x03, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0xe6, 0x10};

enum { UNMAPPED_GPA = 0x40000 };

static void open_with(struct machine *m, const uint8_t *code, size_t size) {
    CHECK(!open_machine(m, 0, code, size), "errno %d", errno);
}

static void state_is_kept(void) {
    struct machine m;
    struct kvm_regs regs = {.rax = 1, .rbx = ~0ULL, .r15 = 1ULL << 63, .rip = 0x1234, .rflags = 0x246}, regs2;
    struct kvm_sregs sregs, sregs2;
    struct kvm_fpu fpu, fpu2;
    struct kvm_debugregs debug = {.db = {0x1000, 0x2000}, .dr6 = 0xffff0ff0, .dr7 = 0x400}, debug2;
    struct kvm_xcrs xcrs, xcrs2;
    static struct kvm_xsave xsave, xsave2;

    STEP(open_with(&m, store_at_rbx, sizeof(store_at_rbx)));
    CHECK(!ioctl(m.vcpu, KVM_SET_REGS, &regs) && !ioctl(m.vcpu, KVM_GET_REGS, &regs2), "errno %d", errno);
    CHECK(!memcmp(&regs, &regs2, sizeof(regs)), "rip %#llx", (unsigned long long)regs2.rip);
    CHECK(!ioctl(m.vcpu, KVM_GET_SREGS, &sregs), "errno %d", errno);
    sregs.fs.base = 0x7f0012345000;
    sregs.cr2 = 0xdead000;
    CHECK(!ioctl(m.vcpu, KVM_SET_SREGS, &sregs) && !ioctl(m.vcpu, KVM_GET_SREGS, &sregs2), "errno %d", errno);
    CHECK(!memcmp(&sregs, &sregs2, sizeof(sregs)), "cr2 %#llx", (unsigned long long)sregs2.cr2);
    CHECK(!ioctl(m.vcpu, KVM_GET_FPU, &fpu), "errno %d", errno);
    fpu.fcw = 0x27f;
    memset(fpu.xmm[3], 0x5a, 16);
    CHECK(!ioctl(m.vcpu, KVM_SET_FPU, &fpu) && !ioctl(m.vcpu, KVM_GET_FPU, &fpu2), "errno %d", errno);
    CHECK(fpu2.fcw == 0x27f && fpu2.xmm[3][15] == 0x5a, "fcw %#x, xmm3 %#x", fpu2.fcw, fpu2.xmm[3][15]);
    CHECK(!ioctl(m.vcpu, KVM_SET_DEBUGREGS, &debug) && !ioctl(m.vcpu, KVM_GET_DEBUGREGS, &debug2), "errno %d", errno);
    CHECK(debug2.db[1] == 0x2000 && debug2.dr7 == 0x400, "db1 %#llx", (unsigned long long)debug2.db[1]);
    CHECK(!ioctl(m.vcpu, KVM_GET_XCRS, &xcrs) && !ioctl(m.vcpu, KVM_SET_XCRS, &xcrs), "errno %d", errno);
    CHECK(!ioctl(m.vcpu, KVM_GET_XCRS, &xcrs2) && xcrs2.xcrs[0].value == xcrs.xcrs[0].value, "errno %d", errno);
    CHECK(!ioctl(m.vcpu, KVM_GET_XSAVE, &xsave) && !ioctl(m.vcpu, KVM_SET_XSAVE, &xsave), "errno %d", errno);
    CHECK(!ioctl(m.vcpu, KVM_GET_XSAVE, &xsave2), "errno %d", errno);
    CHECK(!memcmp(&xsave, &xsave2, 512), "xmm %#x", xsave2.region[52]);
    close_machine(&m);
}

static void msrs_stop_at_the_first_unknown(void) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[3];
    } msrs = {{.nmsrs = 3}, {{.index = 0xc0000081, .data = 0x1122334400000000}, {.index = 0x12345678}, {.index = 0x10}}};
    struct machine m;

    STEP(open_with(&m, store_at_rbx, sizeof(store_at_rbx)));
    int set = ioctl(m.vcpu, KVM_SET_MSRS, &msrs);
    CHECK(set == 1, "%d", set);
    msrs.entry[0].data = 0;
    int got = ioctl(m.vcpu, KVM_GET_MSRS, &msrs);
    CHECK(got == 1 && msrs.entry[0].data == 0x1122334400000000, "%d: %#llx", got, (unsigned long long)msrs.entry[0].data);
    close_machine(&m);
}

static void dirty_pages_are_logged(void) {
    uint64_t bitmap[2] = {0};
    struct kvm_dirty_log log = {.slot = DATA_SLOT, .dirty_bitmap = bitmap};
    struct machine m;
    uint8_t byte;

    STEP(open_with(&m, store_at_rbx, sizeof(store_at_rbx)));
    uint8_t *memory = mmap(NULL, 80 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region2 region = {.slot = DATA_SLOT, .guest_phys_addr = DATA_GPA,
        .memory_size = 80 * PAGE, .userspace_addr = (uint64_t)(uintptr_t)memory};
    CHECK(!ioctl(m.vm, KVM_SET_USER_MEMORY_REGION2, &region), "errno %d", errno);
    CHECK(run_guest(&m, DATA_GPA + PAGE, 1, &byte), "exit %u", m.run->exit_reason); /* before there is a log */
    CHECK_ERRNO(ioctl(m.vm, KVM_GET_DIRTY_LOG, &log), ENOENT);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    CHECK(!ioctl(m.vm, KVM_SET_USER_MEMORY_REGION2, &region), "errno %d", errno);
    for (int round = 0; round < 3; round++) {
        CHECK(run_guest(&m, DATA_GPA + PAGE, 1, &byte) && run_guest(&m, DATA_GPA + 70 * PAGE, 1, &byte), "no exit");
        CHECK(!ioctl(m.vm, KVM_GET_DIRTY_LOG, &log), "errno %d", errno);
        CHECK(bitmap[0] == 2 && bitmap[1] == 1ULL << 6, "round %d: %#llx %#llx", round, (unsigned long long)bitmap[0],
              (unsigned long long)bitmap[1]);
    }
    CHECK(!ioctl(m.vm, KVM_GET_DIRTY_LOG, &log) && !bitmap[0] && !bitmap[1], "%#llx", (unsigned long long)bitmap[0]);
    close_machine(&m);
    munmap(memory, 80 * PAGE);
}

static void an_eventfd_takes_a_write(void) {
    struct machine m;
    uint64_t count = 0;
    uint8_t byte;
    int event = eventfd(0, EFD_NONBLOCK);
    struct kvm_ioeventfd port = {.addr = 32, .len = 1, .fd = event, .flags = KVM_IOEVENTFD_FLAG_PIO};

    STEP(open_with(&m, port_then_out, sizeof(port_then_out)));
    CHECK(run_guest(&m, 0, 0, &byte) && m.run->io.port == 32, "port %u", m.run->io.port);
    CHECK(!ioctl(m.vm, KVM_IOEVENTFD, &port), "errno %d", errno);
    CHECK_ERRNO(ioctl(m.vm, KVM_IOEVENTFD, &port), EEXIST);
    CHECK(run_guest(&m, 0, 0, &byte) && m.run->io.port == 16, "port %u", m.run->io.port);
    CHECK(read(event, &count, 8) == 8 && count == 1, "%llu", (unsigned long long)count);
    port.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
    CHECK(!ioctl(m.vm, KVM_IOEVENTFD, &port), "errno %d", errno);
    CHECK_ERRNO(ioctl(m.vm, KVM_IOEVENTFD, &port), ENOENT);
    CHECK(run_guest(&m, 0, 0, &byte) && m.run->io.port == 32, "port %u", m.run->io.port);
    close(event);
    close_machine(&m);
}

static void an_eventfd_that_is_full(void) {
    struct machine m;
    uint64_t most = ~0ULL - 1, count = 0;
    uint8_t byte;
    int event = eventfd(0, 0); /* a write of ours would block */
    struct kvm_ioeventfd port = {.addr = 32, .len = 1, .fd = event, .flags = KVM_IOEVENTFD_FLAG_PIO};

    STEP(open_with(&m, port_then_out, sizeof(port_then_out)));
    CHECK(write(event, &most, 8) == 8, "errno %d", errno);
    CHECK(!ioctl(m.vm, KVM_IOEVENTFD, &port), "errno %d", errno);
    CHECK(run_guest(&m, 0, 0, &byte) && m.run->io.port == 16, "port %u", m.run->io.port);
    CHECK(read(event, &count, 8) == 8 && count >= most, "%llu", (unsigned long long)count);
    close(event);
    close_machine(&m);
}

static void writes_are_coalesced(void) {
    struct kvm_coalesced_mmio_zone zone = {.addr = UNMAPPED_GPA, .size = PAGE};
    struct machine m;
    uint8_t byte;

    STEP(open_with(&m, store_4_at_rbx, sizeof(store_4_at_rbx)));
    int page = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO);
    CHECK(page > 0 && !ioctl(m.vm, KVM_REGISTER_COALESCED_MMIO, &zone), "errno %d", errno);
    struct kvm_coalesced_mmio_ring *ring = (void *)((uint8_t *)m.run + page * PAGE);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK(run_guest(&m, UNMAPPED_GPA + 8 * i, 0x100 + i, &byte), "exit %u", m.run->exit_reason);
        CHECK(ring->last == i + 1, "last %u", ring->last);
        struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[i];
        CHECK(entry->phys_addr == UNMAPPED_GPA + 8 * i && entry->len == 4 && entry->data[0] == i, "entry %u", i);
    }
    CHECK(!ioctl(m.vm, KVM_UNREGISTER_COALESCED_MMIO, &zone), "errno %d", errno);
    CHECK(!run_guest(&m, UNMAPPED_GPA, 1, &byte) && m.run->exit_reason == KVM_EXIT_MMIO, "exit %u", m.run->exit_reason);
    close_machine(&m);
}

/* Threads that write the guest's memory while the vCPU touches it for the first time: no write of anybody is lost. */

enum { WRITERS = 3, TURNS = 20000, PAGES = 64 };

struct writer {
    _Atomic uint32_t *words; /* its own word in each page */
    atomic_bool *stop;
    uint32_t turns;
};

static void *write_words(void *argument) {
    struct writer *w = argument;

    while (!*w->stop) {
        for (int page = 0; page < PAGES; page++) w->words[page * PAGE / 4]++;
        w->turns++;
    }
    return NULL;
}

static void nobody_loses_a_write(void) {
    static struct writer writers[WRITERS];
    pthread_t threads[WRITERS];
    atomic_bool stop = false;
    struct machine m;
    uint8_t byte;

    STEP(open_with(&m, count_at_rbx, sizeof(count_at_rbx)));
    uint8_t *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, PAGES * PAGE, memory, -1), "errno %d", errno);
    for (int i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){(void *)(memory + 64 * (i + 1)), &stop, 0};
        CHECK(!pthread_create(&threads[i], NULL, write_words, &writers[i]), "errno %d", errno);
    }
    usleep(2000);
    bool ran = true;
    for (int page = 0; page < PAGES && ran; page++) ran = run_guest(&m, DATA_GPA + page * PAGE, TURNS / PAGES, &byte);
    stop = true;
    for (int i = 0; i < WRITERS; i++) pthread_join(threads[i], NULL);
    CHECK(ran, "exit %u", m.run->exit_reason);
    for (int page = 0; page < PAGES; page++) {
        uint32_t guest = *(uint32_t *)(memory + page * PAGE);
        CHECK(guest == TURNS / PAGES, "page %d: the guest counted to %u", page, guest);
        for (int i = 0; i < WRITERS; i++)
            CHECK(writers[i].words[page * PAGE / 4] == writers[i].turns, "page %d, writer %d: %u of %u", page, i,
                  writers[i].words[page * PAGE / 4], writers[i].turns);
    }
    close_machine(&m);
    munmap(memory, PAGES * PAGE);
}

/* Mappings of our parent whose name has `name` in it. On a real kernel none has. */
static int mappings_of_parent(const char *name) {
    char path[64], line[512];
    int found = 0;

    snprintf(path, sizeof(path), "/proc/%d/maps", getppid());
    FILE *maps = fopen(path, "r");
    if (!maps) return -1;
    while (fgets(line, sizeof(line), maps)) found += strstr(line, name) != NULL;
    fclose(maps);
    return found;
}

/* Memory that a guest has used and its VMM has unmapped is nobody's, in whatever process stands behind the VM. */
static void memory_is_given_back(void) {
    static const uint8_t read_at_rbx[] = {0x8a, 0x03, 0xe6, 0x10}; /* mov al, [rbx]; out 16, al */
    struct machine m;
    uint8_t byte = 0;

    STEP(open_with(&m, read_at_rbx, sizeof(read_at_rbx)));
    int before = mappings_of_parent("guestmem:slot");
    if (before < 0) SKIP_CASE("the parent's mappings cannot be seen");
    for (int round = 0; round < 50; round++) {
        uint8_t *memory = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memory[0] = (uint8_t)round;
        CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, 16 * PAGE, memory, -1), "errno %d", errno);
        CHECK(run_guest(&m, DATA_GPA, 0, &byte) && byte == round, "round %d: %d", round, byte);
        if (round % 2) munmap(memory, 16 * PAGE); /* before its slot goes, and after */
        CHECK(!set_region(m.vm, DATA_SLOT, DATA_GPA, 0, NULL, -1), "errno %d", errno);
        if (!(round % 2)) munmap(memory, 16 * PAGE);
    }
    int after = mappings_of_parent("guestmem:slot");
    CHECK(after <= before + 1, "%d mappings before, %d after", before, after);
    close_machine(&m);
}

/* As many open files as a process may have, and more than most are allowed at first. */
static void many_files(void) {
    enum { MANY = 3000 };
    static int fds[MANY];
    struct rlimit limit;

    CHECK(!getrlimit(RLIMIT_NOFILE, &limit), "errno %d", errno);
    if (limit.rlim_max < MANY + 100) SKIP_CASE("the hard limit of descriptors is %lu", (unsigned long)limit.rlim_max);
    limit.rlim_cur = limit.rlim_max;
    CHECK(!setrlimit(RLIMIT_NOFILE, &limit), "errno %d", errno);
    for (int i = 0; i < MANY; i++) {
        fds[i] = ioctl(kvm, KVM_CREATE_VM, 0);
        CHECK(fds[i] >= 0, "VM %d: errno %d", i, errno);
        if (i % 2) close(fds[i]); /* of those, half at a time: VMs are dear on a real kernel */
    }
    for (int i = 0; i < MANY; i += 2) close(fds[i]);
}

static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {
    {"state is kept", state_is_kept},
    {"MSRs stop at the first unknown", msrs_stop_at_the_first_unknown},
    {"dirty pages are logged", dirty_pages_are_logged},
    {"an eventfd takes a write", an_eventfd_takes_a_write},
    {"an eventfd that is full", an_eventfd_that_is_full},
    {"writes are coalesced", writes_are_coalesced},
    {"nobody loses a write", nobody_loses_a_write},
    {"memory is given back", memory_is_given_back},
    {"many files", many_files},
};

int main(void) {
    open_kvm();
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        begin_case();
        cases[i].run();
        end_case("", cases[i].name);
    }
    return finish();
}
