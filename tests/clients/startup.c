/*
 * What VMMs ask once, at their start, before a guest runs: limits, addresses, machine checks, the MSR filter, devices,
 * capabilities that are switched on; too late, twice, with bad values. Every answer is that of a real 6.18, on which it
 * passes unchanged; what a kernel answers from its hardware is not compared.
 */
#define _GNU_SOURCE
#include "client.h"

#ifndef KVM_CAP_X86_TRIPLE_FAULT_EVENT
#define KVM_CAP_X86_TRIPLE_FAULT_EVENT 218
#endif
#ifndef KVM_VCPUEVENT_VALID_TRIPLE_FAULT
#define KVM_VCPUEVENT_VALID_TRIPLE_FAULT 0x20
#endif

static const uint8_t halt[] = {0xf4};
static const uint8_t out_al[] = {0xe6, 0x10};             /* out 16, al */
static const uint8_t rdmsr[] = {0x0f, 0x32, 0xe6, 0x10}; /* rdmsr; out 16, al */
static const uint8_t wrmsr[] = {0x0f, 0x30, 0xe6, 0x10}; /* wrmsr; out 16, al */

#define OK(call) CHECK((call) >= 0, "%s: errno %d", #call, errno)

static int enable(int fd, uint32_t cap, uint64_t value) {
    struct kvm_enable_cap argument = {.cap = cap, .args = {value}};

    return ioctl(fd, KVM_ENABLE_CAP, &argument);
}

static int get_msr(int vcpu, uint32_t index, uint64_t *value) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head.nmsrs = 1, .entry.index = index};
    int done = ioctl(vcpu, KVM_GET_MSRS, &msrs);

    *value = msrs.entry.data;
    return done;
}

static int set_msr(int vcpu, uint32_t index, uint64_t value) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head.nmsrs = 1, .entry = {.index = index, .data = value}};

    return ioctl(vcpu, KVM_SET_MSRS, &msrs);
}

static void addresses_and_limits(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    uint64_t identity = 0xfffbc000, odd = 0xfffbc123;

    CHECK_ERRNO(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffffff0UL), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_SET_TSS_ADDR, 0x100000000UL), EINVAL);
    OK(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd123UL));
    OK(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &odd));
    CHECK_ERRNO(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, (void *)8), EFAULT);
    CHECK_ERRNO(ioctl(vm, KVM_SET_NR_MMU_PAGES, 63), EINVAL);
    OK(ioctl(vm, KVM_SET_NR_MMU_PAGES, 64));
    OK(ioctl(vm, KVM_SET_BOOT_CPU_ID, 0));
    OK(enable(vm, KVM_CAP_MAX_VCPU_ID, 5));
    OK(enable(vm, KVM_CAP_MAX_VCPU_ID, 5));
    CHECK_ERRNO(enable(vm, KVM_CAP_MAX_VCPU_ID, 6), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_VCPU, 5), EINVAL);
    OK(ioctl(vm, KVM_CREATE_VCPU, 4));
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_VCPU, 4), EEXIST);
    CHECK_ERRNO(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_SET_BOOT_CPU_ID, 0), EBUSY);
    CHECK_ERRNO(ioctl(vm, KVM_SET_TSC_KHZ, 1000), EINVAL);
    OK(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000UL));
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    CHECK_ERRNO(ioctl(vm, KVM_SET_BOOT_CPU_ID, 5000), EINVAL);
    OK(ioctl(vm, KVM_SET_BOOT_CPU_ID, 3));
    CHECK_ERRNO(enable(vm, KVM_CAP_MAX_VCPU_ID, 2), EINVAL); /* the processor that boots could not be */
    OK(enable(vm, KVM_CAP_MAX_VCPU_ID, 8));
    CHECK_ERRNO(ioctl(vm, KVM_SET_BOOT_CPU_ID, 9), EINVAL);
    OK(ioctl(vm, KVM_SET_BOOT_CPU_ID, 8)); /* the limit itself passes here */
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_VCPU, 5000), EINVAL);
    CHECK(capability(vm, KVM_CAP_MAX_VCPU_ID) >= capability(vm, KVM_CAP_MAX_VCPUS), "more vCPUs than ids");
    CHECK(capability(vm, KVM_CAP_MAX_VCPUS) >= capability(vm, KVM_CAP_NR_VCPUS), "recommended more than possible");
}

static void what_can_be_switched_on(void) {
    static const uint32_t never[] = {KVM_CAP_HLT, KVM_CAP_IRQFD, KVM_CAP_ENABLE_CAP_VM, KVM_CAP_X86_MSR_FILTER, 9999};
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);

    for (size_t i = 0; i < sizeof(never) / sizeof(*never); i++) CHECK_ERRNO(enable(vm, never[i], 0), EINVAL);
    OK(enable(vm, KVM_CAP_X86_USER_SPACE_MSR, 7));
    CHECK_ERRNO(enable(vm, KVM_CAP_X86_USER_SPACE_MSR, 8), EINVAL);
    OK(enable(vm, KVM_CAP_DISABLE_QUIRKS, ~0UL));
    CHECK_ERRNO(enable(vm, KVM_CAP_DISABLE_QUIRKS2, ~0UL), EINVAL);
    OK(enable(vm, KVM_CAP_EXCEPTION_PAYLOAD, 1));
    CHECK_ERRNO(enable(vcpu, 9999, 0), EINVAL);
}

/* The largest of each: an answer, not a mishap of whoever keeps it. */
static void the_largest_values(void) {
    struct kvm_clock_data clock = {.clock = ~0ULL - 1};
    struct kvm_lapic_state lapic;
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu;

    OK(ioctl(vm, KVM_SET_CLOCK, &clock));
    OK(ioctl(vm, KVM_GET_CLOCK, &clock));
    OK(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 300);
    if (vcpu < 0 && errno == EINVAL) SKIP_CASE("this kernel has no vCPU 300");
    CHECK(vcpu >= 0, "errno %d", errno);
    OK(ioctl(vcpu, KVM_GET_LAPIC, &lapic));
    CHECK((uint8_t)lapic.regs[0x23] == (300 & 0xff), "ID %d", (uint8_t)lapic.regs[0x23]);
    OK(ioctl(vcpu, KVM_SET_LAPIC, &lapic));
    close(vcpu), close(vm);
}

static void devices(void) {
    struct kvm_create_device device = {.type = KVM_DEV_TYPE_VFIO, .flags = KVM_CREATE_DEVICE_TEST};
    struct kvm_device_attr attribute = {.group = 1, .attr = 1};
    int vm = ioctl(kvm, KVM_CREATE_VM, 0), zero = open("/dev/zero", O_RDONLY), fd;

    for (device.type = 1; device.type < 12; device.type++)
        if (device.type != KVM_DEV_TYPE_VFIO) CHECK_ERRNO(ioctl(vm, KVM_CREATE_DEVICE, &device), ENODEV);
    device = (struct kvm_create_device){.type = KVM_DEV_TYPE_VFIO, .flags = KVM_CREATE_DEVICE_TEST};
    OK(ioctl(vm, KVM_CREATE_DEVICE, &device));
    device.flags = 0;
    OK(ioctl(vm, KVM_CREATE_DEVICE, &device));
    fd = (int)device.fd;
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_DEVICE, &device), EBUSY);
    OK(ioctl(fd, KVM_HAS_DEVICE_ATTR, &attribute));
    attribute.addr = (uint64_t)(uintptr_t)&zero;
    CHECK_ERRNO(ioctl(fd, KVM_SET_DEVICE_ATTR, &attribute), EINVAL);
    attribute.group = 7;
    CHECK_ERRNO(ioctl(fd, KVM_HAS_DEVICE_ATTR, &attribute), ENXIO);
    close(zero), close(fd);
    OK(ioctl(vm, KVM_CREATE_DEVICE, &device)); /* the first is gone */
}

static void machine_checks(void) {
    static const uint64_t bad[] = {0, 33, 1ULL << 27 | 10, 0x1000100, 1 << 10 | 1};
    enum { CAP = 0x179, STATUS = 0x17a, CTL = 0x17b, BANK_CTL = 0x400, BANK_STATUS = 0x401, BEYOND = 0x400 + 4 * 10 };
    struct kvm_x86_mce error = {.bank = 10, .status = 1ULL << 63};
    uint64_t capability = 0, banks = 10, value;
    struct machine m;

    CHECK(!open_machine(&m, 0, halt, sizeof(halt)), "errno %d", errno);
    OK(ioctl(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED, &capability));
    CHECK(capability & 1 << 8 && capability & 1 << 24, "%#lx", (unsigned long)capability);
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        CHECK_ERRNO(ioctl(m.vcpu, KVM_X86_SETUP_MCE, &bad[i]), EINVAL);
    banks |= 1 << 8;
    OK(ioctl(m.vcpu, KVM_X86_SETUP_MCE, &banks));
    CHECK(get_msr(m.vcpu, CAP, &value) == 1 && value == banks, "%#lx", (unsigned long)value);
    CHECK(get_msr(m.vcpu, CTL, &value) == 1 && value == ~0ULL, "%#lx", (unsigned long)value);
    CHECK(get_msr(m.vcpu, BANK_CTL + 4 * 9, &value) == 1 && value == ~0ULL, "%#lx", (unsigned long)value);
    CHECK(!get_msr(m.vcpu, BEYOND, &value), "bank 10");
    CHECK(!set_msr(m.vcpu, CAP, 1) && !set_msr(m.vcpu, CTL, 1) && !set_msr(m.vcpu, BANK_CTL, 1), "a wrong value");
    CHECK(set_msr(m.vcpu, BANK_CTL, ~0ULL ^ 1 << 10) == 1 && set_msr(m.vcpu, BANK_CTL, ~0ULL) == 1, "Linux's values");
    CHECK_ERRNO(ioctl(m.vcpu, KVM_X86_SET_MCE, &error), EINVAL);
    error = (struct kvm_x86_mce){.bank = 1};
    CHECK_ERRNO(ioctl(m.vcpu, KVM_X86_SET_MCE, &error), EINVAL);
    error = (struct kvm_x86_mce){.bank = 1, .status = 1ULL << 63, .addr = 0x1000};
    OK(ioctl(m.vcpu, KVM_X86_SET_MCE, &error)); /* corrected: logged */
    OK(ioctl(m.vcpu, KVM_X86_SET_MCE, &error)); /* and again: overflow */
    CHECK(get_msr(m.vcpu, BANK_STATUS + 4, &value) == 1 && value == 3ULL << 62, "%#lx", (unsigned long)value);
    error.status = 1ULL << 61 | 1ULL << 63;
    OK(ioctl(m.vcpu, KVM_X86_SET_MCE, &error)); /* uncorrected, no action: logged */
    CHECK(get_msr(m.vcpu, BANK_STATUS + 4, &value) == 1 && value == error.status, "%#lx", (unsigned long)value);
    error.status |= 1ULL << 57;
    OK(ioctl(m.vcpu, KVM_X86_SET_MCE, &error)); /* the context is corrupt, and CR4.MCE is off: a triple fault */
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_SHUTDOWN, "exit %u", m.run->exit_reason);
    close_machine(&m);
}

static void an_uncorrected_error_waits_for_the_guest(void) {
    struct kvm_x86_mce error = {.bank = 2, .status = 1ULL << 63 | 1ULL << 61, .mcg_status = 5, .addr = 0x2000};
    struct kvm_vcpu_events events;
    struct kvm_sregs sregs;
    uint64_t value;
    struct machine m;

    CHECK(!open_machine(&m, 0, halt, sizeof(halt)), "errno %d", errno);
    OK(ioctl(m.vcpu, KVM_GET_SREGS, &sregs));
    sregs.cr4 |= 1 << 6;
    OK(ioctl(m.vcpu, KVM_SET_SREGS, &sregs));
    value = 10;
    OK(ioctl(m.vcpu, KVM_X86_SETUP_MCE, &value));
    OK(ioctl(m.vcpu, KVM_X86_SET_MCE, &error));
    CHECK(get_msr(m.vcpu, 0x17a, &value) == 1 && value == 5, "MCG_STATUS %#lx", (unsigned long)value);
    CHECK(get_msr(m.vcpu, 0x402 + 8, &value) == 1 && value == 0x2000, "address %#lx", (unsigned long)value);
    OK(ioctl(m.vcpu, KVM_GET_VCPU_EVENTS, &events));
    CHECK(events.exception.injected && events.exception.nr == 18, "exception %d", events.exception.nr);
    close_machine(&m);
}

/* The filter itself. */

enum { APERF = 0xe7, TSC_AUX = 0xc0000103, SYSENTER_CS = 0x174, SYSENTER_ESP = 0x175 };

static void a_filter_that_cannot_be(void) {
    uint8_t bits[0x600] = {0};
    struct kvm_msr_filter_range range = {.flags = 3, .nmsrs = 8, .base = 0x174, .bitmap = bits};
    struct kvm_msr_filter filter = {0};
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);

    OK(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter));
    filter.flags = 1;
    CHECK_ERRNO(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL); /* nothing would be allowed */
    filter.flags = 2;
    CHECK_ERRNO(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    filter.flags = 0;
    filter.ranges[0] = range;
    OK(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter));
    filter.ranges[0].flags = 4;
    CHECK_ERRNO(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    filter.ranges[0].flags = 0;
    CHECK_ERRNO(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    filter.ranges[0] = range;
    filter.ranges[0].nmsrs = 0x600 * 8 + 1;
    CHECK_ERRNO(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), EINVAL);
    filter.ranges[0].nmsrs = 8;
    filter.ranges[0].bitmap = (uint8_t *)8;
    CHECK_ERRNO(ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter), EFAULT);
    close(vm);
}

/* A guest whose SYSENTER_CS may be read but not written, and SYSENTER_ESP written but not read. */
static void open_filtered(struct machine *m, const uint8_t *code, size_t size) {
    uint8_t only_cs[8] = {1}, only_esp[8] = {2};
    struct kvm_msr_filter filter = {
        .ranges = {{.flags = KVM_MSR_FILTER_READ, .nmsrs = 2, .base = SYSENTER_CS, .bitmap = only_cs},
                   {.flags = KVM_MSR_FILTER_WRITE, .nmsrs = 2, .base = SYSENTER_CS, .bitmap = only_esp}}};

    CHECK(!open_machine(m, 0, code, size), "errno %d", errno);
    OK(ioctl(m->vm, KVM_X86_SET_MSR_FILTER, &filter));
    CHECK(set_msr(m->vcpu, SYSENTER_CS, 0x77) == 1 && set_msr(m->vcpu, SYSENTER_ESP, 0x66) == 1, "the VMM may");
}

static void what_is_filtered_is_gp(void) {
    struct machine m;
    uint8_t byte = 0;

    STEP(open_filtered(&m, rdmsr, sizeof(rdmsr)));
    CHECK(run_guest(&m, 0, SYSENTER_CS, &byte) && byte == 0x77, "%#x, exit %u", byte, m.run->exit_reason);
    CHECK(!run_guest(&m, 0, SYSENTER_ESP, &byte), "read %#x", byte);
    CHECK(m.run->exit_reason == KVM_EXIT_SHUTDOWN, "exit %u", m.run->exit_reason); /* #GP without an IDT */
    close_machine(&m);
}

static void what_is_filtered_is_an_exit(void) {
    struct machine m;
    struct kvm_regs regs;
    uint8_t byte = 0;

    STEP(open_filtered(&m, rdmsr, sizeof(rdmsr)));
    OK(enable(m.vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER));
    CHECK(!run_guest(&m, 0, SYSENTER_ESP, &byte) && m.run->exit_reason == KVM_EXIT_X86_RDMSR, "%u", m.run->exit_reason);
    CHECK(m.run->msr.index == SYSENTER_ESP && m.run->msr.reason == KVM_MSR_EXIT_REASON_FILTER, "%#x %u",
          m.run->msr.index, m.run->msr.reason);
    m.run->msr.data = 0x1122334455;
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_IO, "exit %u", m.run->exit_reason);
    OK(ioctl(m.vcpu, KVM_GET_REGS, &regs));
    CHECK(regs.rax == 0x22334455 && regs.rdx == 0x11, "%llx %llx", regs.rdx, regs.rax);
    CHECK(!run_guest(&m, 0, SYSENTER_ESP, &byte) && m.run->exit_reason == KVM_EXIT_X86_RDMSR, "%u", m.run->exit_reason);
    m.run->msr.error = 1;
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_SHUTDOWN, "exit %u", m.run->exit_reason);
    close_machine(&m);
}

static void a_filtered_write_is_an_exit(void) {
    struct kvm_regs regs = {.rip = CODE, .rcx = SYSENTER_CS, .rax = 0x99, .rdx = 1, .rflags = 2};
    struct machine m;
    uint64_t value;

    STEP(open_filtered(&m, wrmsr, sizeof(wrmsr)));
    OK(enable(m.vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER));
    OK(ioctl(m.vcpu, KVM_SET_REGS, &regs));
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_X86_WRMSR, "exit %u", m.run->exit_reason);
    CHECK(m.run->msr.index == SYSENTER_CS && m.run->msr.data == 0x100000099, "%#llx", m.run->msr.data);
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_IO, "exit %u", m.run->exit_reason);
    CHECK(get_msr(m.vcpu, SYSENTER_CS, &value) == 1 && value == 0x77, "it was written: %#lx", (unsigned long)value);
    regs.rcx = SYSENTER_ESP;
    OK(ioctl(m.vcpu, KVM_SET_REGS, &regs));
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_IO, "exit %u", m.run->exit_reason);
    CHECK(get_msr(m.vcpu, SYSENTER_ESP, &value) == 1 && value == 0x100000099, "%#lx", (unsigned long)value);
    close_machine(&m);
}

static void an_unknown_msr_is_an_exit(void) {
    enum { NO_SUCH = 0x12345 };
    struct machine m;
    uint8_t byte;

    CHECK(!open_machine(&m, 0, rdmsr, sizeof(rdmsr)), "errno %d", errno);
    OK(enable(m.vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN));
    CHECK(!run_guest(&m, 0, NO_SUCH, &byte) && m.run->exit_reason == KVM_EXIT_X86_RDMSR, "%u", m.run->exit_reason);
    CHECK(m.run->msr.index == NO_SUCH && m.run->msr.reason == KVM_MSR_EXIT_REASON_UNKNOWN, "%u", m.run->msr.reason);
    OK(enable(m.vm, KVM_CAP_X86_USER_SPACE_MSR, 0));
    m.run->msr.data = 5;
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_IO, "exit %u", m.run->exit_reason);
    CHECK(!run_guest(&m, 0, NO_SUCH, &byte) && m.run->exit_reason == KVM_EXIT_SHUTDOWN, "%u", m.run->exit_reason);
    close_machine(&m);
}

/* Registers */

static void registers_lie_in_kvm_run(void) {
    struct kvm_regs regs;
    struct machine m;

    CHECK(!open_machine(&m, 0, out_al, sizeof(out_al)), "errno %d", errno);
    m.run->kvm_valid_regs = 8;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_RUN, 0), EINVAL);
    m.run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    m.run->kvm_dirty_regs = 8;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_RUN, 0), EINVAL);
    m.run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
    m.run->s.regs.regs = (struct kvm_regs){.rip = CODE, .rax = 0x5a, .rflags = 2};
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_IO, "exit %u", m.run->exit_reason);
    OK(ioctl(m.vcpu, KVM_GET_REGS, &regs));
    CHECK(m.run->s.regs.regs.rax == 0x5a && m.run->s.regs.sregs.cr3 == PML4, "rax %#llx", m.run->s.regs.regs.rax);
    CHECK(!m.run->kvm_dirty_regs, "still dirty");
    close_machine(&m);
}

static void a_linear_address_is_translated(void) {
    static const uint64_t nowhere[] = {0x200000, 1ULL << 39};
    struct kvm_translation translation = {.linear_address = 0x4567};
    struct machine m;

    CHECK(!open_machine(&m, 0, halt, sizeof(halt)), "errno %d", errno);
    OK(ioctl(m.vcpu, KVM_TRANSLATE, &translation));
    CHECK(translation.valid && translation.physical_address == 0x4567, "%#llx", translation.physical_address);
    *(uint64_t *)(m.low + PD) = 0x40000000ULL | PTE_HUGE | PTE_PRESENT;
    OK(ioctl(m.vcpu, KVM_TRANSLATE, &translation));
    CHECK(translation.physical_address == 0x40004567, "%#llx", translation.physical_address);
    for (size_t i = 0; i < sizeof(nowhere) / sizeof(*nowhere); i++) {
        translation.linear_address = nowhere[i];
        OK(ioctl(m.vcpu, KVM_TRANSLATE, &translation));
        CHECK(!translation.valid, "%#llx is %#llx", translation.linear_address, translation.physical_address);
    }
    close_machine(&m);
}

static void events_say_what_the_vmm_knows(void) {
    struct kvm_vcpu_events events;
    struct machine m;

    CHECK(!open_machine(&m, 0, halt, sizeof(halt)), "errno %d", errno);
    OK(ioctl(m.vcpu, KVM_GET_VCPU_EVENTS, &events));
    CHECK(events.flags == (KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM),
          "flags %#x", events.flags);
    events.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_VCPU_EVENTS, &events), EINVAL);
    events.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_VCPU_EVENTS, &events), EINVAL);
    events.flags = 0x40;
    CHECK_ERRNO(ioctl(m.vcpu, KVM_SET_VCPU_EVENTS, &events), EINVAL);
    OK(enable(m.vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1));
    events.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    events.triple_fault.pending = 1;
    OK(ioctl(m.vcpu, KVM_SET_VCPU_EVENTS, &events));
    OK(ioctl(m.vcpu, KVM_GET_VCPU_EVENTS, &events));
    CHECK(events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT && events.triple_fault.pending, "flags %#x", events.flags);
    CHECK(!ioctl(m.vcpu, KVM_RUN, 0) && m.run->exit_reason == KVM_EXIT_SHUTDOWN, "exit %u", m.run->exit_reason);
    close_machine(&m);
}

static const struct test_case cases[] = {
    {"addresses and limits", addresses_and_limits},
    {"what can be switched on", what_can_be_switched_on},
    {"the largest values", the_largest_values},
    {"devices", devices},
    {"machine checks", machine_checks},
    {"an uncorrected error waits for the guest", an_uncorrected_error_waits_for_the_guest},
    {"a filter that cannot be", a_filter_that_cannot_be},
    {"what is filtered is #GP", what_is_filtered_is_gp},
    {"what is filtered is an exit", what_is_filtered_is_an_exit},
    {"a filtered write is an exit", a_filtered_write_is_an_exit},
    {"an unknown MSR is an exit", an_unknown_msr_is_an_exit},
    {"registers lie in kvm_run", registers_lie_in_kvm_run},
    {"a linear address is translated", a_linear_address_is_translated},
    {"events say what the VMM knows", events_say_what_the_vmm_knows},
};

int main(void) {
    open_kvm();
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
