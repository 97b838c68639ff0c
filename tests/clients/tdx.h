/* KVM_MEMORY_ENCRYPT_OP on a TDX VM and its vCPUs, as arch/x86/include/uapi/asm/kvm.h has it. */
#ifndef TDX_H
#define TDX_H

#include "client.h"

enum { TDX_VM = 5, CAPABILITIES = 0, INIT_VM, INIT_VCPU, INIT_MEM_REGION, FINALIZE_VM, GET_CPUID, MEASURE = 1 };
enum { ADDRESS_SIZES = 0x80000008, GPA_BITS = 48 << 16, LEAVES = 32 };

struct tdx_cmd {
    uint32_t id, flags;
    uint64_t data, hw_error;
};
struct mem_region {
    uint64_t source_addr, gpa, nr_pages;
};
struct cpuid_list {
    uint32_t nent, padding;
    struct kvm_cpuid_entry2 entries[LEAVES];
};
struct tdx_capabilities {
    uint64_t supported_attrs, supported_xfam, tdvmcallinfo[4], reserved[250];
    struct cpuid_list cpuid;
};
struct init_vm {
    uint64_t attributes, xfam, mrconfigid[6], mrowner[6], mrownerconfig[6], reserved[12];
    struct cpuid_list cpuid;
};
#define MEMORY_ENCRYPT_OP _IOWR(KVMIO, 0xba, unsigned long)

static uint64_t hw_error;

static inline int command(int fd, uint32_t id, uint32_t flags, void *data) {
    struct tdx_cmd arguments = {.id = id, .flags = flags, .data = (uintptr_t)data};
    int result = ioctl(fd, MEMORY_ENCRYPT_OP, &arguments);
    hw_error = arguments.hw_error;
    return result;
}

/* The least that a TD can be told: how wide its physical addresses are. */
static inline struct init_vm default_init_vm(void) {
    return (struct init_vm){.cpuid = {.nent = 1, .entries = {{.function = ADDRESS_SIZES, .eax = GPA_BITS}}}};
}

/* A TD's vCPUs need an APIC in the kernel, and a TD can have no other controller there. */
static inline int split_irqchip(int vm) {
    struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};

    return ioctl(vm, KVM_ENABLE_CAP, &cap);
}

#endif
