/*
 * A TD is launched through KVM_MEMORY_ENCRYPT_OP, in place; it says with the shared bit of its page tables which kind of
 * page it means, and the host that makes a page shared again finds zeros. On hardware a TD begins outside of long mode
 * and nobody can set its registers.
 */
#define _GNU_SOURCE
#include "protected.h"
#include "tdx.h"

#define SHARED_BIT (1ULL << 47)

/* Make pages private, add and measure them. */
static int measure(struct guest *g, uint64_t gpa, uint64_t size) {
    struct mem_region region = {.gpa = gpa, .nr_pages = size / PAGE};

    return convert(g->gmem, gpa, size, true) || command(g->m.vcpu, INIT_MEM_REGION, MEASURE, &region) ? -1 : 0;
}

static void launched_in_place(void) {
    struct guest g;
    struct init_vm init = default_init_vm();
    struct mem_region region = {.gpa = DATA_GPA, .nr_pages = DATA_PAGES};
    uint32_t exit_;

    CHECK(!open_guest(&g, TDX_VM, 0, SHARED_BIT), "errno %d", errno);
    CHECK(!split_irqchip(g.m.vm), "errno %d", errno);
    uint8_t *data = g.m.low + DATA_GPA;
    data[0] = 41;
    CHECK(!convert(g.gmem, DATA_GPA, DATA_PAGES * PAGE, true), "errno %d", errno);
    CHECK_ERRNO(command(g.m.vm, FINALIZE_VM, 0, NULL), EINVAL);
    CHECK_ERRNO(command(g.m.vm, INIT_VM, 1, &init), EINVAL);
    CHECK(!command(g.m.vm, INIT_VM, 0, &init), "errno %d", errno);
    CHECK_ERRNO(command(g.m.vm, INIT_VM, 0, &init), EINVAL);
    CHECK(!start_vcpu(&g), "errno %d", errno);
    CHECK_ERRNO(command(g.m.vcpu, INIT_VM, 0, &init), EINVAL);
    CHECK(!command(g.m.vcpu, INIT_VCPU, 0, NULL), "errno %d", errno);
    CHECK(!measure(&g, 0, MEASURED), "errno %d", errno);
    CHECK_ERRNO(command(g.m.vm, INIT_MEM_REGION, MEASURE, &region), EINVAL);
    CHECK_ERRNO(ioctl(g.m.vcpu, KVM_RUN, 0), EINVAL); /* not finalized */
    CHECK(!command(g.m.vcpu, INIT_MEM_REGION, MEASURE, &region), "errno %d", errno);
    CHECK(!region.nr_pages && region.gpa == GUEST_SIZE && !region.source_addr, "%lu left", (long)region.nr_pages);
    CHECK(!command(g.m.vm, FINALIZE_VM, 0, NULL), "errno %d", errno);
    CHECK_ERRNO(command(g.m.vm, FINALIZE_VM, 0, NULL), EINVAL);
    exit_ = touch(&g, PRIVATE_VIEW + DATA_GPA);
    CHECK(told(&g, exit_) == 41, "exit %u, %d", exit_, told(&g, exit_));
    CHECK(access_is_refused(data, -1), "the host reads a private page");
    CHECK(!convert(g.gmem, DATA_GPA, PAGE, false), "errno %d", errno);
    CHECK(!data[0] && !data[1], "%d", data[0]);
    close_guest(&g);
}

/* A TD of which all but the last two data pages is private; in a case. */
static void launch(struct guest *g, const char *code, const char *code_end) {
    struct init_vm init = default_init_vm();

    CHECK(!open_guest(g, TDX_VM, 0, SHARED_BIT), "errno %d", errno);
    CHECK(!split_irqchip(g->m.vm), "errno %d", errno);
    memcpy(g->m.low + CODE, code, (size_t)(code_end - code));
    g->m.low[DATA_GPA] = 41;
    CHECK(!command(g->m.vm, INIT_VM, 0, &init), "errno %d", errno);
    CHECK(!start_vcpu(g), "errno %d", errno);
    CHECK(!command(g->m.vcpu, INIT_VCPU, 0, NULL), "errno %d", errno);
    CHECK(!measure(g, 0, MEASURED), "errno %d", errno);
    CHECK(!measure(g, DATA_GPA, 2 * PAGE), "errno %d", errno);
    CHECK(!command(g->m.vm, FINALIZE_VM, 0, NULL), "errno %d", errno);
}

static void by_the_shared_bit(void) {
    struct guest g;

    STEP(launch(&g, guest_count, guest_count_end));
    STEP(both_views(&g));
    close_guest(&g);
}

/* Accepts the third data page by TDG.MEM.PAGE.ACCEPT, for ever, and tells the lowest byte of the upper half of RAX. */
extern const char guest_accept[], guest_accept_end[];
asm(".pushsection .rodata\n"
    "guest_accept:\n"
    "    mov $6, %eax\n"
    "    mov $0x12000, %ecx\n"
    "    .byte 0x66, 0x0f, 0x01, 0xcc\n" /* tdcall */
    "    shr $32, %rax\n"
    "    out %al, $0x10\n"
    "    jmp guest_accept\n"
    "guest_accept_end:\n"
    ".popsection\n");

static void accepted(void) {
    enum { PENDING = DATA_GPA + 2 * PAGE, ALREADY_ACCEPTED = 0x0a /* of 0x00000b0a */ };
    struct guest g;
    uint32_t exit_;

    STEP(launch(&g, guest_accept, guest_accept_end));
    CHECK(!convert(g.gmem, PENDING, PAGE, true), "errno %d", errno);
    exit_ = enter(&g);
    CHECK(told(&g, exit_) == 0, "exit %u, %d", exit_, told(&g, exit_));
    exit_ = enter(&g);
    CHECK(told(&g, exit_) == ALREADY_ACCEPTED, "exit %u, %d", exit_, told(&g, exit_));
    CHECK(access_is_refused(g.m.low + PENDING, -1), "the host reads a private page");
    close_guest(&g);
}

int main(void) {
    static const struct test_case cases[] = {
        {"launched in place", launched_in_place},
        {"by the shared bit", by_the_shared_bit},
        {"accepted by TDCALL", accepted},
    };

    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> TDX_VM & 1)) skip_all("no TDX");
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
