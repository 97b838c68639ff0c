/*
 * An SNP guest is launched through KVM_MEMORY_ENCRYPT_OP, in place: image written while shared, made private, measured with
 * a source address of zero. It finds its image, says with the C-bit of its page tables which kind of page it means, and
 * the host that makes a page shared again finds ciphertext.
 */
#define _GNU_SOURCE
#include "snp.h"

enum { ENCRYPTION_LEAF = 0x8000001f, SEV_AND_SNP = 1 << 1 | 1 << 4 };

static void launched_in_place(void) {
    struct guest g;
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED};
    struct launch_update update = {.gfn_start = DATA_GPA / PAGE, .len = DATA_PAGES * PAGE, .type = NORMAL};
    struct launch_finish end = {0};
    uint32_t exit_;

    CHECK(!open_guest(&g, SNP_VM, C_BIT, 0), "errno %d", errno);
    uint8_t *data = g.m.low + DATA_GPA;
    data[0] = 41;
    CHECK_ERRNO(command(g.m.vm, LAUNCH_START, &start), ENOTTY);
    CHECK(!command(g.m.vm, INIT2, &init), "errno %d", errno);
    CHECK_ERRNO(command(g.m.vm, INIT2, &init), EPERM);
    CHECK(!start_vcpu(&g), "errno %d", errno);
    CHECK(!command(g.m.vm, LAUNCH_START, &start), "errno %d, firmware %u", errno, firmware_error);
    CHECK_ERRNO(command(g.m.vm, LAUNCH_UPDATE, &update), EIO); /* shared */
    CHECK(!measure(&g, 0, MEASURED), "errno %d, firmware %u", errno, firmware_error);
    CHECK(!convert(g.gmem, DATA_GPA, DATA_PAGES * PAGE, true), "errno %d", errno);
    CHECK_ERRNO(ioctl(g.m.vcpu, KVM_RUN, 0), EINVAL); /* not launched */
    CHECK(!command(g.m.vm, LAUNCH_UPDATE, &update), "errno %d, firmware %u", errno, firmware_error);
    CHECK(!update.len && update.gfn_start == GUEST_SIZE / PAGE && !update.uaddr, "%lu left", (long)update.len);
    CHECK(!command(g.m.vm, LAUNCH_FINISH, &end), "errno %d, firmware %u", errno, firmware_error);
    CHECK_ERRNO(command(g.m.vm, LAUNCH_FINISH, &end), EINVAL);
    exit_ = touch(&g, PRIVATE_VIEW + DATA_GPA);
    CHECK(told(&g, exit_) == 41, "exit %u, %d", exit_, told(&g, exit_));
    CHECK(access_is_refused(data, -1), "the host reads a private page");
    CHECK(!convert(g.gmem, DATA_GPA, PAGE, false), "errno %d", errno);
    CHECK(data[0] != 42 || data[1] || data[2], "plaintext");
    close_guest(&g);
}

static void by_the_c_bit(void) {
    struct guest g;

    STEP(open_launch(&g, guest_count, guest_count_end));
    g.m.low[DATA_GPA] = 41;
    STEP(finish_launch(&g));
    STEP(both_views(&g));
    close_guest(&g);
}

/*
 * Asks for the place of the C-bit by the GHCB MSR (SEV_INFO_REQ), VMGEXIT and what comes back; then validates the third data
 * page twice, and tells EAX and the carry flag of each.
 */
extern const char guest_calls[], guest_calls_end[];
asm(".pushsection .rodata\n"
    "guest_calls:\n"
    "    mov $0xc0010130, %ecx\n"
    "    mov $2, %eax\n"
    "    xor %edx, %edx\n"
    "    wrmsr\n"
    "    .byte 0xf3, 0x0f, 0x01, 0xd9\n" /* vmgexit */
    "    rdmsr\n"
    "    shr $24, %eax\n"
    "    out %al, $0x10\n"
    "0:  mov $0x12000, %eax\n"
    "    xor %ecx, %ecx\n"
    "    mov $1, %edx\n"
    "    .byte 0xf2, 0x0f, 0x01, 0xff\n" /* pvalidate */
    "    setc %bl\n"
    "    out %al, $0x10\n"
    "    mov %bl, %al\n"
    "    out %al, $0x10\n"
    "    jmp 0b\n"
    "guest_calls_end:\n"
    ".popsection\n");

static void calls(void) {
    enum { UNMEASURED = DATA_GPA + 2 * PAGE };
    static const int expected[] = {C_BIT_POSITION, 0, 0, 0, 1};
    struct guest g;

    STEP(open_launch(&g, guest_calls, guest_calls_end));
    g.m.low[DATA_GPA] = 41;
    STEP(finish_launch(&g));
    CHECK(!convert(g.gmem, UNMEASURED, PAGE, true), "errno %d", errno);
    for (size_t i = 0; i < sizeof(expected) / sizeof(*expected); i++) {
        uint32_t exit_ = enter(&g);

        CHECK(told(&g, exit_) == expected[i], "%zu: exit %u, %d", i, exit_, told(&g, exit_));
    }
    CHECK(access_is_refused(g.m.low + UNMEASURED, -1), "the host reads a private page");
    close_guest(&g);
}

static void a_shared_page_table(void) {
    struct guest g;
    uint32_t exit_;

    STEP(open_launch(&g, guest_count, guest_count_end));
    g.m.low[DATA_GPA] = 41;
    STEP(finish_launch(&g));
    CHECK(!convert(g.gmem, PD, PAGE, false), "errno %d", errno);
    exit_ = enter(&g);
    CHECK(faulted(&g, exit_, PD, true), "exit %u", exit_);
    close_guest(&g);
}

static void corrected_cpuid(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, SNP_VM), gmem = create_gmem(vm, PAGE, 0);
    uint32_t *table = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct sev_init init = {0};
    struct launch_start start = {.policy = POLICY_RESERVED}, no_policy = {0};
    struct launch_update update = {.uaddr = (uintptr_t)table, .len = PAGE, .type = CPUID};

    table[0] = 1, table[4] = 1, table[12] = 1 << 5; /* leaf 1, ECX: VMX */
    CHECK(!set_region(vm, 0, 0, PAGE, NULL, gmem), "errno %d", errno);
    CHECK(!command(vm, INIT2, &init), "errno %d", errno);
    CHECK_ERRNO(command(vm, LAUNCH_START, &no_policy), EINVAL);
    CHECK(!command(vm, LAUNCH_START, &start), "errno %d", errno);
    CHECK_ERRNO(command(vm, LAUNCH_UPDATE, &update), EIO);
    CHECK(firmware_error == INVALID_PARAM, "firmware says %u", firmware_error);
    CHECK(table[0] == 1 && table[12] == 0, "ECX %#x", table[12]);
    CHECK(!command(vm, LAUNCH_UPDATE, &update), "errno %d, firmware %u", errno, firmware_error);
    munmap(table, PAGE);
    close(gmem), close(vm);
}

static void the_c_bit_in_cpuid(void) {
    enum { ENTRIES = 64 };
    struct kvm_cpuid2 *table = calloc(1, sizeof(*table) + ENTRIES * sizeof(*table->entries));
    const struct kvm_cpuid_entry2 *found = NULL;

    table->nent = ENTRIES;
    CHECK(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, table), "errno %d", errno);
    for (uint32_t i = 0; i < table->nent; i++)
        if (table->entries[i].function == ENCRYPTION_LEAF) found = &table->entries[i];
    CHECK(found, "%u entries without it", table->nent);
    CHECK((found->eax & SEV_AND_SNP) == SEV_AND_SNP, "EAX %#x", found->eax);
    CHECK((found->ebx & 0x3f) == C_BIT_POSITION, "EBX %#x", found->ebx);
    free(table);
}

static void not_for_others(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
    struct sev_init init = {0};

    CHECK_ERRNO(command(vm, INIT2, &init), ENOTTY);
    close(vm);
}

int main(void) {
    static const struct test_case cases[] = {
        {"launched in place", launched_in_place},
        {"by the C-bit", by_the_c_bit},
        {"a shared page table", a_shared_page_table},
        {"PVALIDATE and VMGEXIT", calls},
        {"a corrected CPUID page", corrected_cpuid},
        {"the C-bit in CPUID", the_c_bit_in_cpuid},
        {"not for others", not_for_others},
    };

    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> SNP_VM & 1)) skip_all("no SNP");
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
