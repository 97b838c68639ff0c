/* What a VMM asks and says of a TD: what there is to choose, what it chooses, and what came of it. */
#define _GNU_SOURCE
#include "tdx.h"

#define SEPT_VE_DISABLE (1UL << 28)
#define STATUS(error) ((error) >> 32)
enum { OPERAND_INVALID_CPUID_CONFIG = 69 };
static const uint64_t operand_invalid = 0xc0000100, no_vcpus = 0xc0000609;

static int open_td(void) {
    int vm = ioctl(kvm, KVM_CREATE_VM, TDX_VM);

    if (vm < 0 || split_irqchip(vm)) bail_out("a VM for a TD");
    return vm;
}

static void capabilities(void) {
    struct tdx_capabilities caps = {.cpuid.nent = 0};
    struct init_vm init = {0};
    int vm = open_td();

    CHECK_ERRNO(command(vm, CAPABILITIES, 0, &caps), E2BIG);
    caps.cpuid.nent = LEAVES;
    CHECK_ERRNO(command(vm, CAPABILITIES, 1, &caps), EINVAL);
    CHECK(!command(vm, CAPABILITIES, 0, &caps), "errno %d", errno);
    CHECK(caps.supported_attrs == SEPT_VE_DISABLE, "attributes %#lx", (long)caps.supported_attrs);
    CHECK(caps.supported_xfam == 3, "XFAM %#lx", (long)caps.supported_xfam);
    CHECK(caps.cpuid.nent && caps.cpuid.nent < LEAVES, "%u leaves", caps.cpuid.nent);
    init.attributes = caps.supported_attrs, init.xfam = caps.supported_xfam, init.cpuid = caps.cpuid;
    for (uint32_t i = 0; i < init.cpuid.nent; i++) {
        struct kvm_cpuid_entry2 *entry = &init.cpuid.entries[i];

        if (entry->function == 1) entry->eax = 0; /* the machine's own family and model */
        if (entry->function == ADDRESS_SIZES) entry->eax = GPA_BITS;
    }
    CHECK(!command(vm, INIT_VM, 0, &init), "errno %d, module %#lx", errno, (long)hw_error);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_IRQCHIP, 0), EEXIST);
    close(vm);
}

static void not_what_there_is(void) {
    struct init_vm init = default_init_vm();
    struct tdx_cmd dirty = {.id = INIT_VM, .data = (uintptr_t)&init, .hw_error = 1};
    int vm = open_td(), other = ioctl(kvm, KVM_CREATE_VM, TDX_VM);

    CHECK_ERRNO(ioctl(other, KVM_CREATE_IRQCHIP, 0), ENOTTY);
    close(other);
    CHECK_ERRNO(ioctl(vm, MEMORY_ENCRYPT_OP, &dirty), EINVAL);
    init.attributes = 1; /* DEBUG */
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    init = default_init_vm(), init.xfam = 7;
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    init = default_init_vm(), init.reserved[11] = 1;
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    init = default_init_vm(), init.cpuid.nent = 0;
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    init = default_init_vm(), init.cpuid.entries[0].eax = 52 << 16;
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    init = default_init_vm(), init.cpuid.nent = 2, init.cpuid.entries[1].function = 0x40000000;
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    CHECK(!hw_error, "the module was not asked: %#lx", (long)hw_error);
    init.cpuid.entries[1].function = 1, init.cpuid.entries[1].ebx = 1;
    CHECK_ERRNO(command(vm, INIT_VM, 0, &init), EINVAL);
    CHECK(STATUS(hw_error) == operand_invalid && (uint32_t)hw_error == OPERAND_INVALID_CPUID_CONFIG, "module %#lx",
          (long)hw_error);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_VCPU, 0), EIO);
    close(vm);
}

static void a_vcpu(void) {
    struct init_vm init = default_init_vm();
    struct cpuid_list list = {.nent = 1};
    struct mem_region region = {.nr_pages = 1}, shared = {.gpa = 1UL << 47, .nr_pages = 1};
    int vm = open_td(), gmem = create_gmem(vm, PAGE, 0);
    bool wide = false;

    CHECK(!set_region(vm, 0, 0, PAGE, NULL, gmem), "errno %d", errno);
    CHECK(!command(vm, INIT_VM, 0, &init), "errno %d", errno);
    CHECK_ERRNO(command(vm, FINALIZE_VM, 0, NULL), EIO);
    CHECK(STATUS(hw_error) == no_vcpus, "module %#lx", (long)hw_error);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    CHECK(vcpu >= 0, "errno %d", errno);
    int never = ioctl(vm, KVM_CREATE_VCPU, 1); /* initialised */
    CHECK_ERRNO(command(vcpu, GET_CPUID, 0, &list), E2BIG);
    CHECK(list.nent > 1 && list.nent <= LEAVES, "%u leaves", list.nent);
    list.nent = LEAVES;
    CHECK(!command(vcpu, GET_CPUID, 0, &list), "errno %d", errno);
    for (uint32_t i = 0; i < list.nent; i++)
        if (list.entries[i].function == ADDRESS_SIZES) wide = (list.entries[i].eax & 0xff0000) == GPA_BITS;
    CHECK(wide, "no leaf %#x in %u", ADDRESS_SIZES, list.nent);
    CHECK_ERRNO(command(vcpu, INIT_MEM_REGION, MEASURE, &region), EINVAL);
    CHECK_ERRNO(command(vcpu, INIT_VCPU, 1, NULL), EINVAL);
    CHECK(!command(vcpu, INIT_VCPU, 0, NULL), "errno %d", errno);
    CHECK_ERRNO(command(vcpu, INIT_VCPU, 0, NULL), EINVAL);
    CHECK_ERRNO(command(vcpu, INIT_MEM_REGION, 2, &region), EINVAL);
    CHECK_ERRNO(command(vcpu, INIT_MEM_REGION, MEASURE, &shared), EINVAL);
    CHECK(!command(vcpu, INIT_MEM_REGION, MEASURE, &region), "errno %d", errno);
    CHECK_ERRNO(ioctl(vcpu, KVM_RUN, 0), EINVAL);
    CHECK(!command(vm, FINALIZE_VM, 0, NULL), "errno %d", errno);
    CHECK_ERRNO(command(vcpu, GET_CPUID, 0, &list), EINVAL);
    CHECK_ERRNO(command(never, INIT_VCPU, 0, NULL), EINVAL);
    CHECK_ERRNO(ioctl(never, KVM_RUN, 0), EINVAL);
    CHECK_ERRNO(ioctl(vm, KVM_CREATE_VCPU, 2), EIO);
    close(never), close(vcpu), close(gmem), close(vm);
}

int main(void) {
    static const struct test_case cases[] = {
        {"capabilities", capabilities},
        {"not what there is", not_what_there_is},
        {"a vCPU", a_vcpu},
    };

    open_kvm();
    if (!(capability(kvm, KVM_CAP_VM_TYPES) >> TDX_VM & 1)) skip_all("no TDX");
    return run_cases(cases, sizeof(cases) / sizeof(*cases));
}
