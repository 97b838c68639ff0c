/*
 * A guest as SNP and TDX have it: code, page tables and data in one guest_memfd, written while shared, then private and
 * measured. The pages from DATA_GPA on are seen at two virtual addresses, as private and as shared memory.
 *
 * The guest asks port ASK for a virtual address, adds one to the byte there and tells the byte that it was to port TELL,
 * for ever. So its registers are set once, before the launch: afterwards they are the guest's. On hardware a guest would
 * have to ask for IN and OUT by #VC or #VE; here they are as in any VM.
 */
#ifndef PROTECTED_H
#define PROTECTED_H

#include "client.h"

enum { DATA_PAGES = 4, MEASURED = CODE + PAGE, GUEST_SIZE = DATA_GPA + DATA_PAGES * PAGE };
enum { PRIVATE_VIEW = 0, SHARED_VIEW = 1 << 21 }; /* + gpa */
enum { ASK = 0x20, TELL = 0x10 };

/* The end of KVM_RUN that older headers lack. */
enum { EXIT_MEMORY_FAULT = 39, FAULT_PRIVATE = 1 << 3 };
struct memory_fault {
    uint64_t flags, gpa, size;
};

struct guest {
    struct machine m; /* `low` is its memory */
    int gmem;
};

extern const char guest_count[], guest_count_end[];
asm(".pushsection .rodata\n"
    "guest_count:\n"
    "    in $0x20, %eax\n"
    "    mov %eax, %ebx\n"
    "    mov (%rbx), %al\n"
    "    incb (%rbx)\n"
    "    out %al, $0x10\n"
    "    jmp guest_count\n"
    "guest_count_end:\n"
    ".popsection\n");

static inline int convert(int gmem, uint64_t offset, uint64_t size, bool private) {
    struct kvm_memory_attributes2 arguments = {
        .offset = offset, .size = size, .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};

    return ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, &arguments);
}

/* A VM of this type with the guest in it, all of it still shared, without a vCPU; -1 with errno if a call fails. */
static inline int open_guest(struct guest *g, unsigned long type, uint64_t private_bit, uint64_t shared_bit) {
    struct machine *m = &g->m;
    uint64_t *entry;

    *m = (struct machine){.vm = ioctl(kvm, KVM_CREATE_VM, type), .vcpu = -1};
    if (m->vm < 0) return -1;
    g->gmem = create_gmem(m->vm, GUEST_SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED);
    m->low = map_shared(g->gmem, GUEST_SIZE);
    if (m->low == MAP_FAILED || set_region(m->vm, LOW_SLOT, 0, GUEST_SIZE, m->low, g->gmem)) return -1;
    entry = (uint64_t *)(m->low + PML4), *entry = PDPT | private_bit | PTE_PRESENT | PTE_WRITE;
    entry = (uint64_t *)(m->low + PDPT), *entry = PD | private_bit | PTE_PRESENT | PTE_WRITE;
    entry = (uint64_t *)(m->low + PD);
    entry[PRIVATE_VIEW >> 21] = private_bit | PTE_HUGE | PTE_PRESENT | PTE_WRITE;
    entry[SHARED_VIEW >> 21] = shared_bit | PTE_HUGE | PTE_PRESENT | PTE_WRITE;
    memcpy(m->low + CODE, guest_count, (size_t)(guest_count_end - guest_count));
    return 0;
}

/* Its vCPU, at the guest's first instruction: after the VM was initialised, before its launch is over. */
static inline int start_vcpu(struct guest *g) {
    if (add_vcpu(&g->m)) return -1;
    return ioctl(g->m.vcpu, KVM_SET_REGS, &(struct kvm_regs){.rip = CODE, .rflags = 2});
}

static inline void close_guest(struct guest *g) {
    munmap(g->m.run, g->m.run_size);
    munmap(g->m.low, GUEST_SIZE);
    close(g->gmem), close(g->m.vcpu), close(g->m.vm);
}

/* KVM_RUN; the exit reason, or that of KVM_RUN that fails with EFAULT, or 0 for any other failure. */
static inline uint32_t enter(struct guest *g) {
    int result;

    do {
        result = ioctl(g->m.vcpu, KVM_RUN, 0);
    } while (result == -1 && errno == EINTR);
    if (result == -1 && (errno != EFAULT || g->m.run->exit_reason != EXIT_MEMORY_FAULT)) return 0;
    return g->m.run->exit_reason;
}

/* Run to the guest's question and answer it with `address`; the exit after that. */
static inline uint32_t touch(struct guest *g, uint32_t address) {
    uint32_t reason = enter(g);

    if (reason != KVM_EXIT_IO || g->m.run->io.port != ASK) return 0;
    memcpy((uint8_t *)g->m.run + g->m.run->io.data_offset, &address, sizeof(address));
    return enter(g);
}

/* The byte that the guest told in the last exit; -1 if it did not. */
static inline int told(struct guest *g, uint32_t reason) {
    if (reason != KVM_EXIT_IO || g->m.run->io.port != TELL) return -1;
    return *((uint8_t *)g->m.run + g->m.run->io.data_offset);
}

/* Whether the last exit is the memory fault of an access of this kind to this page. */
static inline bool faulted(struct guest *g, uint32_t reason, uint64_t gpa, bool private) {
    const struct memory_fault *fault = (const void *)&g->m.run->hw; /* the first of the union */

    return reason == EXIT_MEMORY_FAULT && fault->gpa == gpa && fault->size == PAGE &&
           fault->flags == (private ? FAULT_PRIVATE : 0);
}

/*
 * In a case, with the guest launched and its first two data pages private, 41 in the first of them, the third shared:
 * the guest meets each kind of page through each kind of mapping, and goes on once the VMM has converted.
 */
static inline void both_views(struct guest *g) {
    uint8_t *memory = g->m.low;
    enum { PRIVATE_PAGE = DATA_GPA, SHARED_PAGE = DATA_GPA + 2 * PAGE };
    uint32_t exit_;

    exit_ = touch(g, PRIVATE_VIEW + PRIVATE_PAGE);
    CHECK(told(g, exit_) == 41, "exit %u, %d", exit_, told(g, exit_));
    CHECK(access_is_refused(memory + PRIVATE_PAGE, -1), "the host reads a private page");

    memory[SHARED_PAGE] = 7;
    exit_ = touch(g, SHARED_VIEW + SHARED_PAGE);
    CHECK(told(g, exit_) == 7, "exit %u, %d", exit_, told(g, exit_));
    CHECK(memory[SHARED_PAGE] == 8, "the host sees %d", memory[SHARED_PAGE]);

    exit_ = touch(g, PRIVATE_VIEW + SHARED_PAGE);
    CHECK(faulted(g, exit_, SHARED_PAGE, true), "exit %u", exit_);
    exit_ = enter(g);
    CHECK(faulted(g, exit_, SHARED_PAGE, true), "it repeats: exit %u", exit_);
    CHECK(!convert(g->gmem, SHARED_PAGE, PAGE, true), "errno %d", errno);
    exit_ = enter(g);
    CHECK(told(g, exit_) >= 0, "exit %u", exit_);
    CHECK(access_is_refused(memory + SHARED_PAGE, -1), "the host reads a private page");

    exit_ = touch(g, SHARED_VIEW + PRIVATE_PAGE);
    CHECK(faulted(g, exit_, PRIVATE_PAGE, false), "exit %u", exit_);
    CHECK(!convert(g->gmem, PRIVATE_PAGE, PAGE, false), "errno %d", errno);
    memory[PRIVATE_PAGE] = 99;
    exit_ = enter(g);
    CHECK(told(g, exit_) == 99, "exit %u, %d", exit_, told(g, exit_));
    CHECK(memory[PRIVATE_PAGE] == 100, "the host sees %d", memory[PRIVATE_PAGE]);
}

#endif
